"""Memory: what there is, what settings need at least, and which to lower when it ran out.

No torch is imported here: what can never fit is refused before it is loaded.
"""

import errno
import itertools
import math
import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gymnasium import spaces

from vecpg.config import Config, ConfigError, flag
from vecpg.images import UNITS, image_of, num_parameters, resolve_network
from vecpg.torchrun import place

# What a copy of an environment takes at the very least: objects of an environment with its wrappers
# (CartPole-v1 takes 5 KB); and a process, forked from one with Gymnasium loaded (6 MB of its own).
_BYTES_OF_A_COPY = {"sync": 2_000, "async": 2_000}
_BYTES_OF_A_WORKER = 2_000_000
# Of a row the reward, three flags and one number of an action. Of each number of an observation
# there is the number itself, and what the space of all copies keeps of it: two bounds, and whether
# they are.
_BYTES_OF_A_ROW = 4 + 3 + 4
# Every parameter is there in the state and in the draft of an iteration, and has a gradient; and
# Adam keeps two averages of it, in the state and in the draft.
_BYTES_OF_A_PARAMETER = 4 * 7
# An evaluated episode's return and length, as numbers in lists.
_BYTES_OF_AN_EPISODE = 40

_ADVICE = {
    "collect": ("collecting", "lower --num-envs (or --num-steps)"),
    "returns": ("computing returns", "lower --num-envs (or --num-steps)"),
    "update": ("updating", "lower --num-envs, --num-steps or --hidden-sizes"),
    "evaluate": ("evaluating", "lower --eval-episodes or --hidden-sizes"),
    "begin": ("preparing", "lower --num-envs, --num-steps or --hidden-sizes"),
}


# -- What there is, and what is needed -----------------------------------------------------------


def there_is() -> float:
    """Bytes that this process could have, were nothing else running; infinite where unknown.

    That is the machine's memory, or the container's where that is less, and swap space; not more
    than the process's own limit. Ranks on one machine have equal parts of it.
    """
    try:
        memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # there is no such call, or it does not know
        memory = math.inf
    memory = min([memory, *_limits_of_containers()]) + _swap()
    if (where := place()) is not None:
        memory /= where.local_world_size
    try:
        import resource
    except ImportError:  # Windows
        return memory
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    return memory if own == resource.RLIM_INFINITY else min(memory, float(own))


def _limits_of_containers() -> Iterator[float]:
    """Of the control groups that this process is in, of either version."""
    groups = _text("/proc/self/cgroup").splitlines()
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        inside = Path(path.strip("/"))
        for group in (inside, *inside.parents):
            limit = _text(root / group / name).strip()
            if limit.isdigit():
                yield float(limit)


def _swap() -> float:
    found = re.search(r"^SwapTotal:\s*(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    return 1024.0 * int(found[1]) if found else 0.0


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def check_room(
    config: Config,
    vectorization: str,
    observation_space: spaces.Space[Any] | None = None,
    action_space: spaces.Space[Any] | None = None,
    *,
    have: float | None = None,
) -> None:
    """Refuse settings that need more memory than there is, by the least that they can need.

    What passes may still be too much. Nothing is allocated.

    Args:
        config: of the run; of one that is split over ranks, of this rank's part.
        vectorization: as it is resolved.
        observation_space: of one environment; where it is not known yet, an observation counts as
            one number, and no network is looked at.
        action_space: of one environment.
        have: bytes; by default what `there_is`.

    Raises:
        ConfigError: with the setting, what it needs, and what would fit.

    Example:
        >>> check_room(Config(num_envs=10**6), "sync", have=1e9)
        Traceback (most recent call last):
            ...
        vecpg.config.ConfigError: --num-envs: expected at most 493,827, got 1,000,000, which take \
at least 2.0 GB; there is 1.0 GB
    """
    have = there_is() if have is None else have
    seen = 1 if observation_space is None else _numbers(observation_space)
    number = 4 if observation_space is None else _bytes_of_a_number(observation_space)
    copy = _BYTES_OF_A_COPY.get(vectorization, 0)
    workers = 0
    if vectorization == "async":
        # Without a number there are as many as cores, whatever the number of copies.
        workers = _BYTES_OF_A_WORKER
        if config.in_each_worker is not None:
            workers, copy = 0, copy + _BYTES_OF_A_WORKER // config.in_each_worker
    if observation_space is None or isinstance(observation_space, spaces.Box):
        copy += 2 * (number + 1) * seen
    row = number * seen + _BYTES_OF_A_ROW
    _check(config, "num_envs", copy + row, workers, have)
    # A copy begins episodes until it has made --num-steps steps.
    _check(config, "num_steps", config.num_envs * row, config.num_envs * copy + workers, have)
    _check(config, "eval_episodes", _BYTES_OF_AN_EPISODE, 0, have)
    supported = spaces.Box | spaces.Discrete | spaces.MultiBinary | spaces.MultiDiscrete
    if not isinstance(observation_space, supported):
        return  # not known yet, or refused where the network is made
    inputs, below = seen, 0
    network = resolve_network(config.network, observation_space)
    if network == "cnn":
        below, inputs = num_parameters(image_of(observation_space)), UNITS
    elif network != "mlp":
        inputs = 1  # at least: it is not asked yet
    elif not isinstance(observation_space, spaces.Box | spaces.MultiBinary):
        table = _categories(observation_space)
        _check(config, "embedding_size", table * _BYTES_OF_A_PARAMETER, 0, have)
        inputs = seen * config.embedding_size
    outputs = 1
    if isinstance(action_space, spaces.Discrete | spaces.MultiDiscrete):
        outputs = _categories(action_space)
    elif isinstance(action_space, spaces.MultiBinary):
        outputs = 2 * _numbers(action_space)
    elif isinstance(action_space, spaces.Box):
        outputs = _numbers(action_space)
    widths = [inputs, *config.hidden_sizes, outputs]
    parameters = below + sum(
        following * (width + 1) for width, following in itertools.pairwise(widths)
    )
    need = parameters * _BYTES_OF_A_PARAMETER
    if below * _BYTES_OF_A_PARAMETER > have:
        raise ConfigError(
            f"--network cnn: expected smaller images than {observation_space.shape}: its"
            f" {below:,} parameters take at least {in_words(below * _BYTES_OF_A_PARAMETER)}; there"
            f" is {in_words(have)}"
        )
    if need > have:
        raise ConfigError(
            f"--hidden-sizes: expected smaller ones than {' '.join(map(str, config.hidden_sizes))}:"
            f" {parameters:,} parameters take at least {in_words(need)}; there is {in_words(have)}"
        )


def _check(config: Config, name: str, each: int, beside: int, have: float) -> None:
    """Refuse a number of things that take so many bytes each, and others beside them."""
    number = getattr(config, name)
    if number * each + beside > have:
        most = int((have - beside) // each)
        expected = f"at most {most:,}" if most >= 1 else "what fits"
        where = place()
        ranks = "" if where is None or where.world_size == 1 else " on each rank"
        raise ConfigError(
            f"{flag(name)}: expected {expected}{ranks}, got {number:,}, which take at least"
            f" {in_words(number * each + beside)}; there is {in_words(have)}"
        )


def _bytes_of_a_number(space: spaces.Space[Any]) -> int:
    """As a rollout has it: float32, but uint8 stays what it is, and what is looked up is int64."""
    if isinstance(space, spaces.Box):
        return 1 if space.dtype == "uint8" else 4
    return 8 if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) else 4


def _numbers(space: spaces.Space[Any]) -> int:
    return math.prod(space.shape or ())


def _categories(space: Any) -> int:
    """How many values there are in all components together."""
    return int(space.n if isinstance(space, spaces.Discrete) else space.nvec.sum())


def in_words(number: float) -> str:
    """Bytes, in the unit that leaves a short number.

    Example:
        >>> in_words(275.4e9), in_words(2_500)
        ('275 GB', '2.5 KB')
    """
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:,.0f} {unit}" if number >= 100 or unit == "bytes" else f"{number:.1f} {unit}"


# -- When it ran out -----------------------------------------------------------------------------


def ran_out(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that there was no more memory, here or on a GPU.

    Example:
        >>> ran_out(MemoryError()), ran_out(ValueError())
        (True, False)
    """
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and re.search(
            r"DefaultCPUAllocator|CUDA error: out of memory", str(error)
        ):
            return True
        error = error.__cause__
    return False


def explained(error: BaseException, phase: str) -> str:
    """One line for an error that `ran_out` is true of: in which phase it was, and what to lower.

    Args:
        error: what it says of its own is kept, where that is a sentence.
        phase: "begin", "collect", "returns", "update" or "evaluate".

    Example:
        >>> explained(MemoryError(), "update")
        'out of memory while updating; lower --num-envs, --num-steps or --hidden-sizes'
    """
    doing, advice = _ADVICE[phase]
    words = " ".join(str(error).split())
    if "DefaultCPUAllocator" in words:
        asked = re.search(r"allocate (\d+) bytes", words)
        words = f"{in_words(int(asked[1]))} were asked for" if asked else ""
    return f"out of memory while {doing}{': ' if words else ''}{words}; {advice}"


@contextmanager
def named(phase: Callable[[], str]) -> Iterator[None]:
    """Where memory runs out inside, say so in one line, and give back what was held by then.

    What ended calls still held goes, so that there is room to save: an error keeps it alive.

    Args:
        phase: says, when it is asked, in which phase that is, as `explained` takes it.

    Raises:
        MemoryError: with that line.
    """
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        held: BaseException | None = error
        while held is not None:
            traceback.clear_frames(held.__traceback__)
            held = held.__context__
        raise MemoryError(explained(error, phase())) from None
