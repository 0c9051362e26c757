"""What is searched: `--param NAME=KIND:...`, and settings drawn from it. Standard library only."""

import dataclasses
import difflib
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vecpg.config import Config, ConfigError, flag

# These say what the task is, how it is judged, where and on what it runs and how that is shown:
# runs that differ in the first two cannot be compared, in the others not told apart.
_NOT_SEARCHED = frozenset(
    (
        "recipe",
        "env_id",
        "env_kwargs",
        "max_episode_steps",
        "wrappers",
        "total_timesteps",
        "total_episodes",
        "total_iterations",
        "target_return",
        "return_window",
        "confirm",
        "eval_episodes",
        "seed",
        "out_dir",
        "exp_name",
        "save_every",
        "resume",
        "progress",
        "log_every",
        "capture_video",
        "vectorization",
        "step_timeout",
        "envs_per_worker",
        "device",
        "threads",
        "activation_memory",
        "shards",
    )
)
_WORDS = {"none": None, "true": True, "false": False}


@dataclass(frozen=True)
class Parameter:
    """One setting that is searched.

    name:   a field of `Config`.
    kind:   log or linear (real numbers from a range), int (whole ones), or choice.
    values: the range, both ends included; or what is chosen from.
    """

    name: str
    kind: str
    values: tuple[Any, ...]

    def at(self, place: float) -> Any:
        """The value at a place in [0, 1) of the range, or of the choices, which share it evenly.

        Real numbers have three digits: of their own (log), or of the range's width (linear).

        Example:
            >>> Parameter("learning_rate", "log", (1e-4, 1e-2)).at(0.5)
            0.001
            >>> Parameter("gamma", "linear", (0.95, 0.999)).at(0.3)
            0.9647
            >>> Parameter("num_envs", "int", (8, 11)).at(0.5)
            10
        """
        if self.kind == "choice":
            return self.values[int(place * len(self.values))]
        low, high = self.values
        if self.kind == "int":
            return low + int(place * (high - low + 1))
        if self.kind == "log":
            value = float(f"{low * (high / low) ** place:.3g}")
        else:
            value = round(low + place * (high - low), 2 - math.floor(math.log10(high - low)))
        return min(max(value, low), high)


def read_space(texts: Sequence[str], fixed: Config) -> list[Parameter]:
    """What `--param` says, checked.

    Args:
        texts: each NAME=KIND:VALUES.
        fixed: the settings that are not searched.

    Raises:
        ConfigError: an unknown name or kind, a range that is none, a value that `Config` refuses.

    Example:
        >>> read_space(["num_envs=choice:8,64"], Config())
        [Parameter(name='num_envs', kind='choice', values=(8, 64))]
        >>> read_space(["learning_rat=log:1e-4:1e-2"], Config())
        Traceback (most recent call last):
            ...
        vecpg.config.ConfigError: --param learning_rat: expected a setting that ... learning_rate?
    """
    if not texts:
        raise ConfigError("--param: expected at least one, such as learning_rate=log:1e-4:1e-1")
    space = [_read(text, fixed) for text in texts]
    names = [parameter.name for parameter in space]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--param {name}: expected it once, got it {names.count(name)} times")
    return space


def draw(space: Sequence[Parameter], count: int, seed: int) -> list[dict[str, Any]]:
    """Settings spread evenly: of each parameter's range, every count-th part has one of them.

    All are drawn before any is tried, so there is nothing to learn from; and independent draws
    would leave gaps and clusters.

    Args:
        space: what is searched.
        count: how many settings.
        seed: fixes them.

    Source: McKay, Beckman and Conover (1979), Latin hypercube sampling.

    Example:
        >>> drawn = draw([Parameter("num_envs", "choice", (8, 16))], 4, seed=1)
        >>> sorted(settings["num_envs"] for settings in drawn)
        [8, 8, 16, 16]
    """
    generator = random.Random(seed)
    columns = []
    for parameter in space:
        parts = generator.sample(range(count), count)
        columns.append([parameter.at((part + generator.random()) / count) for part in parts])
    names = [parameter.name for parameter in space]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def settle(fixed: Config, settings: dict[str, Any], **of_run: Any) -> Config:
    """The configuration of a run that has these settings.

    Raises:
        ConfigError: they do not go together.
    """
    try:
        return dataclasses.replace(fixed, **settings, **of_run)
    except ConfigError as error:
        raise ConfigError(f"--param: {in_words(settings)} do not go together: {error}") from None


def in_words(settings: dict[str, Any]) -> str:
    """Settings in one line.

    Example:
        >>> in_words({"learning_rate": 0.01, "hidden_sizes": (64, 64)})
        'learning_rate 0.01, hidden_sizes 64 64'
    """
    return ", ".join(f"{name} {as_text(value)}" for name, value in settings.items())


def as_text(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _read(text: str, fixed: Config) -> Parameter:
    given, _, described = text.partition("=")
    kind, _, rest = described.partition(":")
    name = given.replace("-", "_")
    known = [each.name for each in dataclasses.fields(Config) if each.name not in _NOT_SEARCHED]
    if name not in known:
        near = [] if name in _NOT_SEARCHED else difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"--param {given}: expected a setting that can be searched; {hint}")
    if kind in ("log", "linear", "int"):
        values = _range(name, kind, rest)
    elif kind == "choice":
        values = _choices(name, rest, isinstance(getattr(fixed, name), tuple))
    else:
        raise ConfigError(
            f"--param {name}: expected {name}=log:LOW:HIGH, linear:LOW:HIGH, int:LOW:HIGH or"
            f" choice:A,B,..., got {described or 'nothing'}"
        )
    for value in values:
        try:
            dataclasses.replace(fixed, **{name: value})
        except ConfigError as error:
            raise ConfigError(f"--param {name}={described}: {error}") from None
    return Parameter(name, kind, values)


def _range(name: str, kind: str, text: str) -> tuple[Any, ...]:
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise ConfigError(
            f"--param {name}: expected {kind}:LOW:HIGH, two numbers, got {kind}:{text}"
        ) from None
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"--param {name}: expected LOW less than HIGH, both finite, got {text}")
    if kind == "log" and low <= 0:
        raise ConfigError(f"--param {name}: expected LOW greater than 0 for log, got {text}")
    if kind == "int":
        if not low.is_integer() or not high.is_integer():
            raise ConfigError(f"--param {name}: expected whole numbers for int, got {text}")
        return int(low), int(high)
    return low, high


def _choices(name: str, text: str, several: bool) -> tuple[Any, ...]:
    """The values between commas; where one has several parts, with spaces between them."""
    values = tuple(
        tuple(map(_value, each.split())) if several else _value(each) for each in text.split(",")
    )
    if "" in values or () in values:
        raise ConfigError(f"--param {name}: expected values with commas between, got {text!r}")
    for one, other in itertools.pairwise(sorted(map(as_text, values))):
        if one == other:
            raise ConfigError(f"--param {name}: expected different values, got {one} twice")
    if len(values) < 2:
        raise ConfigError(
            f"--param {name}: expected at least two values, got {text}; fix it by {flag(name)}"
        )
    return values


def _value(text: str) -> Any:
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number
