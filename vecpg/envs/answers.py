"""What an environment answered, as numbers of the types that Gymnasium puts together."""

import math
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

_FLAGS = (bool, np.bool_)


def read_answer(reward: Any, terminated: Any, truncated: Any) -> tuple[float, bool, bool]:
    """A reward and two flags, whatever kind of number each of them is.

    Many environments return an array of one number where Gymnasium asks for a number.

    Args:
        reward: a real number, or an array or tensor of one, of any shape.
        terminated: True or False, or a number that means one, or an array or tensor of one.
        truncated: as `terminated`.

    Raises:
        TypeError: one is nothing of the kind; the message has its name.

    Example:
        >>> read_answer(np.array([0.5], np.float32), np.False_, 1)
        (0.5, False, True)
        >>> read_answer(None, False, False)
        Traceback (most recent call last):
            ...
        TypeError: expected a reward that is a number, got None
    """
    if not isinstance(reward, float):
        reward = _number(reward, "a reward that is a number")
    if not isinstance(terminated, _FLAGS):
        terminated = _number(terminated, "a terminated that is True or False")
    if not isinstance(truncated, _FLAGS):
        truncated = _number(truncated, "a truncated that is True or False")
    return float(reward), bool(terminated), bool(truncated)


def num_choices(space: spaces.Space[Any]) -> list[int]:
    """How many values each component of an action has: what a mask of actions has flags for.

    Raises:
        TypeError: neither a `Discrete` nor a `MultiDiscrete` space.

    Example:
        >>> num_choices(spaces.Discrete(3)), num_choices(spaces.MultiDiscrete([3, 2]))
        ([3], [3, 2])
    """
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return [int(size) for size in space.nvec.flat]
    raise TypeError(f"action_mask: expected actions of Discrete or MultiDiscrete, got {space}")


def read_action_mask(info: Mapping[str, Any], space: spaces.Space[Any]) -> NDArray[np.bool_]:
    """Which actions `info["action_mask"]` allows: (A,) bool, True = allowed.

    A is n of a `Discrete` space, and the sum of nvec of a `MultiDiscrete` one, whose components
    follow each other.

    Args:
        info: as an environment returned it. The mask is an array of A booleans, or zeros and ones;
            or, for `MultiDiscrete`, a tuple of one such array for each component.
        space: of the actions.

    Raises:
        TypeError: there is no mask, or it is none of the kind.

    Example:
        >>> read_action_mask({"action_mask": np.array([1, 0, 1], np.int8)}, spaces.Discrete(3))
        array([ True, False,  True])
        >>> read_action_mask({"action_mask": ([True, False], [0, 1, 1])},
        ...                  spaces.MultiDiscrete([2, 3]))
        array([ True, False, False,  True,  True])
        >>> read_action_mask({}, spaces.Discrete(3))
        Traceback (most recent call last):
            ...
        TypeError: expected info["action_mask"] of 3 booleans, got none
    """
    sizes = num_choices(space)
    kind = f"{sum(sizes)} booleans"
    if isinstance(space, spaces.MultiDiscrete):
        kind += f", or a tuple of {sizes}"
    expected = f'expected info["action_mask"] of {kind}'
    if "action_mask" not in info:
        raise TypeError(f"{expected}, got none")
    given = info["action_mask"]
    parts, lengths = [given], [sum(sizes)]
    if isinstance(given, tuple) and isinstance(space, spaces.MultiDiscrete):
        parts, lengths = list(given), sizes
    found = [flags for part in parts if (flags := _flags(part)) is not None]
    if [len(flags) for flags in found] != lengths:
        raise TypeError(f"{expected}, got {_shown(given)}")
    return np.concatenate(found)


def _flags(given: Any) -> NDArray[np.bool_] | None:
    """(n,) bool of a row of booleans, or zeros and ones; None of anything else."""
    try:
        found = np.asarray(given)
    # Whatever objects of others raise where they are asked for an array.
    except Exception:
        return None
    if found.ndim != 1 or found.dtype.kind not in "biu":
        return None
    flags = found.astype(np.bool_)
    return flags if (flags == found).all() else None


def with_typed_observations(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    """`env`, or around it what gives integers the type of its `Discrete` observation space.

    Any integer may belong to such a space. Gymnasium takes those of int64, and of the space's type.

    Example:
        >>> env = gymnasium.make("FrozenLake-v1")
        >>> with_typed_observations(env) is env
        True
    """
    space = env.observation_space
    other = isinstance(space, spaces.Discrete) and space.dtype != np.int64
    return _Typed(env) if other else env


class _Typed(gymnasium.ObservationWrapper[Any, Any, Any]):
    def observation(self, observation: Any) -> Any:
        space: Any = self.observation_space
        if np.shape(observation) == () and np.asarray(observation).dtype.kind in "iu":
            # From Python's own integer: what does not fit is not taken for another.
            return space.dtype.type(int(observation))
        return observation


def _number(given: Any, expected: str) -> float:
    try:
        shape = np.shape(given)
        value = given
        if shape and math.prod(shape) == 1:
            value = given.item() if hasattr(given, "item") else np.asarray(given).item()
        # Python would read a number out of text, too.
        if not isinstance(value, str | bytes):
            return float(value)
    # Whatever objects of others raise where they are asked for a number.
    except Exception:
        pass
    raise TypeError(f"expected {expected}, got {_shown(given)}") from None


def _shown(given: Any) -> str:
    text = " ".join(repr(given).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
