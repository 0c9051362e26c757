"""What an environment answered, as numbers of the types that Gymnasium puts together."""

import math
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

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
