"""The settings of a run: one frozen dataclass, checked when it is made.

Only the standard library is imported here, so that `--help` and a wrong flag cost no time.
"""

import dataclasses
import json
import math
import re
import sys
import types
import typing
import unicodedata
from dataclasses import dataclass, field
from typing import Any, Literal

# No machine has more cores; and an update is finished before a signal is answered.
_MOST = {"threads": 4096, "value_steps": 1_000_000}
# Nearest divisors are looked for among those that are at most this, and their counterparts.
_MOST_DIVISOR = 1_000_000


class ConfigError(ValueError):
    """A setting that cannot work here, found before the first environment step."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of a training run. The flags of `vecpg train` are these fields.

    Raises:
        ConfigError: a value outside its range, with the range and what was given.

    Example:
        >>> Config(num_envs=8).learning_rate == Config().learning_rate
        True
        >>> Config(num_envs=0)
        Traceback (most recent call last):
            ...
        vecpg.config.ConfigError: --num-envs: expected at least 1, got 0
    """

    recipe: str = "default"
    """Named settings that the other flags override. `--recipe list` prints them all."""

    env_id: str = "CartPole-v1"
    """A registered Gymnasium id; `module:Id` imports the module first."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment, as JSON; used in training and evaluation alike."""
    max_episode_steps: int | None = None
    """Time limit in steps; none keeps the environment's own."""
    wrappers: tuple[str, ...] = ()
    """module:callable, each called as callable(env) -> env, in order, on every copy, in training
    and evaluation, such as gymnasium.wrappers:FlattenObservation. They are stepped sync or async;
    one that needs arguments is a function of your own."""
    action_masks: bool = False
    """Never take an action that info["action_mask"] of the environment says is invalid, for
    Discrete and MultiDiscrete actions. They are drawn and differentiated in torch then."""
    num_envs: int = 64
    """Parallel copies of the environment, N. At least 1."""
    num_steps: int = 1
    """A copy starts another episode while it has made fewer real steps. 1 = one episode each."""
    vectorization: Literal["auto", "sync", "async", "vector_entry_point", "tensor"] = "auto"
    """How the copies are stepped. tensor: all at once as tensors (CartPole-v1, Pendulum-v1,
    Acrobot-v1, MountainCarContinuous-v0, and your own: docs/environments.md). auto: tensor where
    vecpg has it, else the environment's own vectorized form, else sync."""
    step_timeout: float = 60.0
    """Seconds after which an async environment that has not answered counts as hung, also while
    it is made. Others run in the main process, which they may block."""
    envs_per_worker: int | Literal["auto"] = "auto"
    """async: copies stepped one after the other in one process; auto divides them over the cores.
    1 where they wait for something else than a core, or a process can have one only. At least 1."""
    device: str = "auto"
    """cpu, cuda or cuda:i. auto: cpu until a committed measurement shows CUDA faster."""
    threads: int | None = None
    """Threads of the kernels, whose results do not depend on it; by default one for every core,
    which ranks on one machine share. Torch gets them only if given here, for policies or values
    that the kernels do not serve: its last bits may depend on it. 1 to 4096."""
    activation_memory: int = 128
    """Megabytes of hidden activations, of layers with 64 inputs or more, that collecting keeps for
    the update where both are in machine code; what is beyond is computed again, as is everything
    with 0. Each of many runs that go on at once has as many. No result depends on it. At least
    0."""

    total_timesteps: int | None = 500_000
    """End with the iteration that reaches this many real environment steps."""
    total_episodes: int | None = None
    """End with the iteration that reaches this many episodes."""
    total_iterations: int | None = None
    """End after this many iterations (one collection and one update each)."""

    network: str = "auto"
    """What makes features of observations, before the hidden layers: mlp (they are taken as they
    are), cnn (the convolutions of Mnih et al. 2015, for images), or module:function of your own,
    called as function(observation_space) -> torch.nn.Module. auto: cnn for uint8 images, else
    mlp. Convolutions want a smaller --learning-rate than the default, such as 1e-3."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Nonlinearity after each hidden layer."""
    dropout: float = 0.0
    """Probability of dropping a hidden unit in training, in [0, 1). Evaluation drops none."""
    embedding_size: int = 8
    """Length of the learned vector for each value of a discrete observation. At least 1."""
    normalize_obs: bool = False
    """Shift and scale Box observations by their statistics over earlier iterations."""
    log_std: Literal["parameter", "network"] = "parameter"
    """Of Gaussian actions: the same for all observations, or computed from each."""

    learning_rate: float = 1.2e-2
    """Adam's step size. Greater than 0."""
    gamma: float = 0.99
    """Discount per step, in [0, 1]."""
    weights: Literal["reward_to_go", "full_return", "gae"] = "reward_to_go"
    """What multiplies grad log pi(a_t|s_t): the rewards from t on, of the whole episode, or
    generalized advantages, which need --baseline value."""
    gae_lambda: float = 0.97
    """Of generalized advantages, in [0, 1]. 1 is unbiased; less has less variance."""
    baseline: Literal["none", "mean", "timestep_mean", "leave_one_out", "value"] = "leave_one_out"
    """What is subtracted from the weights. Exactly unbiased: none, leave_one_out and value."""
    value_learning_rate: float = 1e-3
    """Adam's step size for the value function of --baseline value. Greater than 0."""
    value_steps: int = 80
    """Steps of fitting the value function after each update. 1 to 1,000,000."""
    bootstrap_truncations: bool = False
    """Continue an episode that a limit cut with the value of its final observation, instead of
    with 0. Needs --baseline value."""
    normalize: bool = False
    """Shift and scale the weights to mean 0 and standard deviation 1 over the iteration."""
    reduction: Literal["episode", "step", "sum"] = "episode"
    """Divide the summed loss by num_envs, by the number of counted steps, or by nothing."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus (mean over counted steps, in nats). At least 0."""
    max_grad_norm: float | None = None
    """Scale the gradient down to this norm when it is longer; none never does."""

    target_return: float | Literal["auto"] | None = "auto"
    """Mean return that counts as solved. auto: the environment's own threshold; none: never."""
    return_window: int = 100
    """The mean is over the last whole iterations that make at least this many episodes."""
    confirm: bool = True
    """Solved only when a greedy evaluation reaches the target too."""
    eval_episodes: int = 100
    """Fresh episodes per evaluation. At least 1."""

    seed: int = 1
    """Every random number of the run is a function of this. 0 to 2**64 - 1."""
    shards: int | None = None
    """Groups of environments whose sums are formed apart and added in order, so that any number of
    torchrun's ranks that divides this one gives the same bits. Divides --num-envs; none = one for
    each rank, and bits that depend on their number."""
    dist_timeout: float = 120.0
    """Under torchrun: seconds after which a rank that has not answered counts as dead; 0.1 to 1e9.
    Rank 0 may evaluate for longer."""
    out_dir: str = "runs"
    """Run directories are made in here."""
    exp_name: str = "reinforce"
    """Part of the run directory's name."""
    save_every: float = 60.0
    """Seconds between checkpoints."""
    resume: str | None = None
    """Go on with a run: its directory or a checkpoint in it, with every setting from there; or with
    the runs of a population, by its directory. auto: the newest unfinished run in --out-dir with
    this --env-id, --exp-name and --seed; a new one where there is none."""
    progress: bool = field(default_factory=lambda: _shows_a_line())
    """One live line; without it, a plain line every `--log-every` seconds."""
    log_every: float = 2.0
    """Seconds between plain progress lines."""
    capture_video: bool = False
    """At the end, record one greedy episode of the best policy in a separate environment, as
    videos/best.mp4 of the run. Needs the extra: vecpg[video]."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("hidden_sizes", "wrappers"):
            if isinstance(getattr(self, name), list):  # as JSON has it
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, expected in typing.get_type_hints(Config).items():
            value = getattr(self, name)
            _check_type(name, value, expected)
            if expected in (int, int | None) and name != "seed":
                _check(name, value is None or value < 2**63, "a number below 2**63", value)
        for name in (
            "num_envs",
            "num_steps",
            "return_window",
            "eval_episodes",
            "embedding_size",
            "value_steps",
        ):
            _check(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        for name, most in _MOST.items():
            value = getattr(self, name)
            _check(name, value is None or value <= most, f"at most {most:,}", value)
        for name in (
            "threads",
            "shards",
            "max_episode_steps",
            "total_timesteps",
            "total_episodes",
            "total_iterations",
        ):
            value = getattr(self, name)
            _check(name, value is None or value >= 1, "at least 1, or none", value)
        kept = self.activation_memory
        _check("activation_memory", kept >= 0, "at least 0", kept)
        each = self.envs_per_worker
        _check("envs_per_worker", each == "auto" or each >= 1, "at least 1, or auto", each)
        if self.num_envs % self.resolved_shards:
            raise ConfigError(
                f"--shards: expected a number that divides --num-envs {self.num_envs}, got"
                f" {self.shards}; nearest: {_nearest_divisors(self.num_envs, self.resolved_shards)}"
            )
        limits = (self.total_timesteps, self.total_episodes, self.total_iterations)
        if limits == (None, None, None):
            raise ConfigError(
                "a run needs an end: expected one of --total-timesteps, --total-episodes and"
                " --total-iterations, got none of them"
            )
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None
        _check("device", known, "auto, cpu, cuda or cuda:i", self.device)
        for name in self.wrappers:
            _check("wrappers", _names_a_callable(name), "module:callable", name)
        named = self.network in ("auto", "mlp", "cnn") or _names_a_callable(self.network)
        _check("network", named, "auto, mlp, cnn or module:function", self.network)
        sizes = self.hidden_sizes
        _check("hidden_sizes", all(size >= 1 for size in sizes), "widths of at least 1", sizes)
        for name in ("gamma", "gae_lambda"):
            _check(name, 0 <= getattr(self, name) <= 1, "a number in [0, 1]", getattr(self, name))
        _check("dropout", 0 <= self.dropout < 1, "a number in [0, 1)", self.dropout)
        for name, asked in (
            ("weights", self.weights == "gae"),
            ("bootstrap_truncations", self.bootstrap_truncations),
        ):
            if asked and self.baseline != "value":
                value = f" {self.weights}" if name == "weights" else ""
                raise ConfigError(
                    f"{flag(name)}{value}: expected --baseline value, which learns V(s), got"
                    f" --baseline {self.baseline}"
                )
        for name in (
            "learning_rate",
            "value_learning_rate",
            "step_timeout",
            "save_every",
            "log_every",
        ):
            value = getattr(self, name)
            _check(name, 0 < value < math.inf, "a finite number greater than 0", value)
        # Torch counts nanoseconds in 64 bits.
        _check("dist_timeout", 0.1 <= self.dist_timeout <= 1e9, "0.1 to 1e9", self.dist_timeout)
        _check("ent_coef", 0 <= self.ent_coef < math.inf, "a finite number >= 0", self.ent_coef)
        norm = self.max_grad_norm
        _check("max_grad_norm", norm is None or norm > 0, "greater than 0, or none", norm)
        target = self.target_return
        finite = not isinstance(target, int | float) or math.isfinite(target)
        _check("target_return", finite, "a finite number, auto or none", target)
        _check("seed", 0 <= self.seed < 2**64, "a number from 0 to 2**64 - 1", self.seed)
        _check("env_id", self.env_id != "", "a Gymnasium id", self.env_id)
        try:
            json.dumps(self.env_kwargs, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"--env-kwargs: expected JSON types, got {self.env_kwargs} ({error})"
            ) from None
        # As a file has them: a tuple is a list there.
        object.__setattr__(self, "env_kwargs", json.loads(json.dumps(self.env_kwargs)))
        for name in ("exp_name", "out_dir", "resume"):
            _check(name, getattr(self, name) != "", "a name", getattr(self, name))
        printable = ascii(self.env_id)
        _check("env_id", self.env_id.isprintable(), "an id that can be printed", printable)
        for name in ("recipe", "exp_name", "out_dir"):
            value = getattr(self, name)
            plain = not any(unicodedata.category(each) == "Cc" for each in value)
            _check(name, plain, "text without control characters", ascii(value))
        _check("exp_name", "/" not in self.exp_name, "a name without /", self.exp_name)

    @property
    def in_each_worker(self) -> int | None:
        """`envs_per_worker`, or None where the copies are divided over the cores."""
        return None if self.envs_per_worker == "auto" else self.envs_per_worker

    @property
    def resolved_shards(self) -> int:
        """`shards`, or 1 where none are asked for."""
        return self.shards or 1


def check_ranks(config: Config, ranks: int) -> None:
    """Refuse a run that cannot be split over so many ranks, each with as much of it.

    Args:
        config: of a run that begins now; one that goes on has its shards already.
        ranks: how many there are. At least 1.

    Raises:
        ConfigError: with the nearest numbers that would do.

    Example:
        >>> check_ranks(Config(num_envs=64), 3)
        Traceback (most recent call last):
            ...
        vecpg.config.ConfigError: --num-envs: expected a number that 3 ranks divide, got 64; \
nearest: 63 and 66
    """
    number, shards = config.num_envs, config.shards
    if number % ranks:
        below = number // ranks * ranks
        nearest = f"{below} and {below + ranks}" if below else f"{ranks}"
        raise ConfigError(
            f"--num-envs: expected a number that {ranks} ranks divide, got {number}; nearest:"
            f" {nearest}"
        )
    if shards is not None and shards % ranks:
        raise ConfigError(
            f"--shards: expected a multiple of the {ranks} ranks that divides --num-envs {number},"
            f" got {shards}; nearest: {_nearest_divisors(number, shards, ranks)}"
        )


def _shows_a_line() -> bool:
    """Whether stderr is a terminal, or a notebook, where a line can be written anew."""
    notebook = type(sys.stderr).__module__.partition(".")[0] == "ipykernel"
    return notebook or (sys.stderr is not None and sys.stderr.isatty())


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def to_dict(config: Config) -> dict[str, Any]:
    """The settings as plain JSON types; `Config(**to_dict(config)) == config`."""
    lists = {name: list(getattr(config, name)) for name in ("hidden_sizes", "wrappers")}
    return dataclasses.asdict(config) | lists


def _names_a_callable(text: str) -> bool:
    """Whether it may be "module:callable"."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", text) is not None


def _nearest_divisors(number: int, to: int, multiples: int = 1) -> str:
    """Of the multiples that divide a number, the nearest below and above one that is not."""
    each = number // multiples
    most = min(math.isqrt(each), _MOST_DIVISOR)
    small = [divisor for divisor in range(1, most + 1) if each % divisor == 0]
    divisors = sorted({*small, *(each // divisor for divisor in small)})
    found = [divisor * multiples for divisor in divisors]
    below, above = [one for one in found if one < to], [one for one in found if one > to]
    return " and ".join(map(str, below[-1:] + above[:1]))


def _check(name: str, holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"{flag(name)}: expected {expected}, got {got}")


def _check_type(name: str, value: object, expected: Any) -> None:
    if not _matches(value, expected):
        raise ConfigError(f"{flag(name)}: expected {_words(expected)}, got {value!r}")


def _matches(value: object, expected: Any) -> bool:
    origin = typing.get_origin(expected)
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, one) for one in typing.get_args(expected))
    if origin is Literal:
        return value in typing.get_args(expected)
    if origin is tuple:
        each = typing.get_args(expected)[0]
        return isinstance(value, tuple) and all(_matches(item, each) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


def _words(expected: Any) -> str:
    origin = typing.get_origin(expected)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_words(one) for one in typing.get_args(expected))
    if origin is Literal:
        return " or ".join(typing.get_args(expected))
    if origin is tuple:
        return "whole numbers" if typing.get_args(expected)[0] is int else "module:callable ..."
    if origin is dict:
        return "a dictionary"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return words.get(expected, "none")
