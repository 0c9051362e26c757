"""The settings of a search: those of the runs, and how they are searched."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import tyro

from vecpg.config import Config, ConfigError, flag, to_dict
from vecpg.run.resume import shown

# What may be given anew when a search goes on, and what says where it is and how it is shown.
_ANEW = ("confirm_seeds", "progress", "out_dir", "resume")


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Config):
    """Search settings with Optuna, over seeds, halving after each round. Needs vecpg[tune].

    All settings are drawn at once. In a round, all that are left are trained as one population,
    each over the same seeds (`--seed` and those after it), to the budget of the round; then those
    go whose median greedy return over the seeds is below the median of all. Every round has twice
    the budget of the one before, the last has `--total-timesteps`; runs go on, none is begun again.
    Flags of `vecpg train` fix what is not searched. One JSON line goes to stdout.

    Raises:
        ConfigError: as `Config`; and a search without a budget, or with too many rounds.

    Example:
        >>> TuneConfig(total_timesteps=400_000).budgets
        [100000, 200000, 400000]
    """

    exp_name: str = "tune"
    """What the name of the search's directory begins with."""
    resume: str | None = None
    """Go on with a search that was stopped: its directory, with every setting from there."""
    param: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=log:LOW:HIGH, NAME=linear:LOW:HIGH, NAME=int:LOW:HIGH or NAME=choice:A,B,...: a setting
    that is searched, and where. Give it once for each."""
    trials: int = 16
    """How many settings are tried. At least 2."""
    seeds_per_trial: int = 3
    """Runs of each. At least 1."""
    rounds: int = 3
    """How often those that are left are trained on. 1 to the number that leaves one of them."""
    confirm_seeds: int = 0
    """In the end, train the best settings and the default ones, those that the other flags give,
    over so many fresh seeds."""

    def __post_init__(self) -> None:
        """Check every field."""
        if isinstance(self.param, list):  # as JSON has it
            object.__setattr__(self, "param", tuple(self.param))
        super().__post_init__()
        least = {"trials": 2, "seeds_per_trial": 1, "rounds": 1, "confirm_seeds": 0}
        for name, at_least in least.items():
            value = getattr(self, name)
            if type(value) is not int or not at_least <= value < 2**31:
                raise ConfigError(f"{flag(name)}: expected at least {at_least}, got {value}")
        if not all(isinstance(each, str) for each in self.param):
            raise ConfigError(f"--param: expected NAME=KIND:..., got {self.param}")
        for name in ("total_episodes", "total_iterations"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{flag(name)}: expected none, since rounds share out --total-timesteps, got"
                    f" {getattr(self, name)}"
                )
        # A run needs an end, and there is no other.
        assert self.total_timesteps is not None
        if self.total_timesteps < 2 ** (self.rounds - 1):
            raise ConfigError(
                f"--total-timesteps: expected at least {2 ** (self.rounds - 1)}, since each of"
                f" {self.rounds} rounds has twice the one before, got {self.total_timesteps}"
            )
        most = self.trials.bit_length()
        if self.rounds > most:
            raise ConfigError(
                f"--rounds: expected at most {most}, which leave one of {self.trials} trials, got"
                f" {self.rounds}"
            )

    @property
    def fixed(self) -> Config:
        """The runs' settings, where they are not searched."""
        names = [each.name for each in dataclasses.fields(Config)]
        settings = {name: getattr(self, name) for name in names}
        return Config(**settings | {"exp_name": Config.exp_name, "resume": None})

    @property
    def search(self) -> dict[str, Any]:
        """The settings that a run has not."""
        names = {each.name for each in dataclasses.fields(Config)}
        return {name: value for name, value in to_dict(self).items() if name not in names}

    @property
    def budgets(self) -> list[int]:
        """The total_timesteps of each round, doubled from one to the next.

        Half of the settings go, and runs go on: no round costs more than the first one.
        """
        assert self.total_timesteps is not None
        last = self.total_timesteps
        return [-(-last // 2 ** (self.rounds - number)) for number in range(1, self.rounds + 1)]

    @property
    def seeds(self) -> range:
        """Those that each of the settings is tried with."""
        return range(self.seed, self.seed + self.seeds_per_trial)

    @property
    def fresh_seeds(self) -> range:
        """Those of `confirm_seeds`, which had no part in choosing."""
        return range(self.seeds.stop, self.seeds.stop + self.confirm_seeds)


def of_search(fixed: Config, search: dict[str, Any]) -> TuneConfig:
    """What has these as `fixed` and `search`.

    Raises:
        ConfigError: as `TuneConfig`.
        TypeError: another setting than those of a search.
    """
    own = {"exp_name": TuneConfig.exp_name, "resume": None}
    return TuneConfig(**to_dict(fixed) | own | search)


def check_same(config: TuneConfig, stored: TuneConfig) -> None:
    """Refuse other settings than a search was begun with.

    Raises:
        ConfigError: one differs; the message has both values.
    """
    given = to_dict(config)
    for name, had in to_dict(stored).items():
        if name not in _ANEW and given[name] != had:
            raise ConfigError(
                f"{flag(name)}: expected {shown(had)}, with which the search was begun, got"
                f" {shown(given[name])}; leave it out, or start a new search"
            )
