"""What an environment answered, as numbers of the types that Gymnasium puts together."""

import math
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from vecpg.envs.errors import SubEnvironmentError

_FLAGS = (bool, np.bool_)


def read_answer(reward: Any, terminated: Any, truncated: Any) -> tuple[float, bool, bool]:
    """A reward and two flags, whatever kind of number each of them is.

    Many environments return an array of one number where Gymnasium asks for a number.

    Args:
        reward: a real number, or an array or tensor of one, of any shape.
        terminated: True or False, or 1 or 0, or an array or tensor of one of them.
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
        terminated = _flag(terminated, "a terminated that is True or False")
    if not isinstance(truncated, _FLAGS):
        truncated = _flag(truncated, "a truncated that is True or False")
    return float(reward), bool(terminated), bool(truncated)


def mask_sizes(space: spaces.Space[Any]) -> list[int]:
    """Of every component of an action, how many values a mask says something about.

    Raises:
        ValueError: actions that are not masked.

    Example:
        >>> mask_sizes(spaces.MultiDiscrete([2, 3]))
        [2, 3]
    """
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return [int(size) for size in space.nvec]
    raise ValueError(
        f"--action-masks: expected actions that are Discrete, or MultiDiscrete of one dimension,"
        f" got {space}"
    )


def read_action_mask(info: Any, space: spaces.Space[Any]) -> NDArray[np.bool_]:
    """Which actions of `space` `info["action_mask"]` allows: (A,) bool, True = allowed.

    A is the number of actions of a `Discrete` space; for a `MultiDiscrete` the components stand one
    behind the other.

    Args:
        info: as an environment's `reset` or `step` gave it. The mask in it is A numbers or bools, 1
            or True = allowed; for a `MultiDiscrete` it may be a tuple or list of an array for each
            component.
        space: of the actions.

    Raises:
        TypeError: there is no mask, or one of another shape, or with other values than 0 and 1. One
            that allows nothing is returned as it is.

    Example:
        >>> read_action_mask({"action_mask": np.array([1, 0, 1], np.int8)}, spaces.Discrete(3))
        array([ True, False,  True])
        >>> read_action_mask({"action_mask": ([1, 0], [True])}, spaces.MultiDiscrete([2, 1]))
        array([ True, False,  True])
        >>> read_action_mask({}, spaces.Discrete(3))
        Traceback (most recent call last):
            ...
        TypeError: expected info["action_mask"] of 3 booleans, got none; ...
    """
    sizes = mask_sizes(space)
    given = info.get("action_mask") if isinstance(info, dict) else None
    numbers = given if isinstance(given, np.ndarray) else _array(given, sizes)
    if numbers is not None and numbers.dtype == object:
        numbers = _array(given, sizes)
    if numbers is not None and numbers.shape == (sum(sizes),) and numbers.dtype.kind in "biuf":
        allowed: NDArray[np.bool_] = numbers == 1
        if (allowed | (numbers == 0)).all():
            return allowed
    got = f"{_shown(given)} ({type(given).__name__})"
    if isinstance(given, np.ndarray):
        got = f"{_shown(given)} of shape {given.shape} and dtype {given.dtype}"
    if given is None:
        got = "none; --action-masks is for environments, or wrappers, that give one"
    kind = f"{sum(sizes)} booleans"
    if isinstance(space, spaces.MultiDiscrete):
        kind += f", or a tuple of {sizes}"
    raise TypeError(f'expected info["action_mask"] of {kind}, got {got}')


def _array(given: Any, sizes: list[int]) -> NDArray[Any] | None:
    """What was given as one array, or None. What is an array for each component is put together."""
    if given is None:
        return None
    try:
        listed = isinstance(given, list | tuple | np.ndarray) and len(given) > 0
        if listed and all(np.ndim(each) == 1 for each in given):
            if [len(each) for each in given] != sizes:
                return None
            return np.concatenate([np.asarray(each) for each in given])
        return np.asarray(given)
    # Whatever objects of others raise where they are asked for an array.
    except Exception:
        return None


def read_action_masks(
    infos: Any,
    space: spaces.Space[Any],
    *,
    needed: NDArray[np.bool_],
    ended: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """What a vector environment's infos allow every copy: (N, A) bool, True = allowed.

    Args:
        infos: `infos["action_mask"]` is (N, A), or N of what `read_action_mask` takes; Gymnasium's
            `infos["_action_mask"]`, where there is one, says which copies have given one.
        space: of one copy's actions.
        needed: (N,) the copies whose next action counts.
        ended: (N,) the copies whose episode has just ended: their next action is ignored, and all
            is allowed.

    Raises:
        SubEnvironmentError: a copy whose mask is needed has none, has one that cannot be read, or
            allows no action.
    """
    sizes, num_envs = mask_sizes(space), len(needed)
    masks = np.ones((num_envs, sum(sizes)), np.bool_)
    given: Any = infos.get("action_mask") if isinstance(infos, dict) else None
    if isinstance(given, list | tuple) and len(given) == num_envs:
        rows = np.empty(num_envs, object)
        for index, mask in enumerate(given):
            rows[index] = mask
        given = rows
    elif hasattr(given, "numpy"):  # a tensor
        given = np.asarray(given)
    there = np.full(num_envs, isinstance(given, np.ndarray) and given.shape[:1] == (num_envs,))
    if there.any() and "_action_mask" in infos:
        said = np.asarray(infos["_action_mask"])
        there &= said.astype(np.bool_) if said.shape == (num_envs,) else False
    read = ended.copy()
    if there.any() and given.shape == masks.shape and given.dtype.kind in "biuf":
        allowed = given == 1
        read |= there & (allowed | (given == 0)).all(axis=1)
        masks = np.where((read & ~ended)[:, None], allowed, True)
    # One by one, what is none of this, or has to be named.
    for n in np.flatnonzero(~read):
        try:
            masks[n] = read_action_mask({"action_mask": given[n]} if there[n] else {}, space)
        except TypeError as error:
            if needed[n]:
                detail = f"TypeError: {error}"
                raise SubEnvironmentError((int(n), "failed", detail, "")) from None
    starts = np.cumsum([0, *sizes[:-1]])
    none = ~np.logical_or.reduceat(masks, starts, axis=1)
    if not none.any():
        return masks
    for n, component in np.argwhere(none):
        if needed[n]:
            of = f" of component {component}" if len(sizes) > 1 else ""
            reason = f"no value{of} is 1 in its action_mask"
            raise SubEnvironmentError((int(n), "allows no action", reason, ""))
    masks[none.any(axis=1)] = True
    return masks


def check_observation(obs: Any, space: spaces.Space[Any]) -> None:
    """Refuse an observation of another shape or kind of numbers than a space of numbers has.

    Raises:
        TypeError: its numbers are of another kind, or do not fit.
        ValueError: its shape is another.

    Example:
        >>> check_observation([0.0, 1.0], spaces.Box(0, 1, (3,)))
        Traceback (most recent call last):
            ...
        ValueError: expected an observation of shape (3,), got (2,)
    """
    try:
        found = np.asarray(obs)
    except ValueError:  # rows of several lengths
        found = np.asarray(None)
    if found.dtype == object:
        raise TypeError(f"expected an observation of {space.dtype}, got {_shown(obs)}")
    if found.shape != space.shape:
        raise ValueError(f"expected an observation of shape {space.shape}, got {found.shape}")
    if space.dtype is not None and not np.can_cast(found.dtype, space.dtype, "same_kind"):
        raise TypeError(f"expected an observation of dtype {space.dtype}, got {found.dtype}")
    check_whole_numbers(found, space.dtype)


def check_whole_numbers(obs: Any, dtype: Any) -> None:
    """Refuse an observation of whole numbers that its space's type would take for others.

    Args:
        obs: what an environment gave.
        dtype: of the observation space; where it is of no whole numbers, nothing is looked at.

    Raises:
        TypeError: with the first that does not fit.

    Example:
        >>> check_whole_numbers(np.array([255]), np.uint8)
        >>> check_whole_numbers(np.array([3, 300]), np.uint8)
        Traceback (most recent call last):
            ...
        TypeError: expected an observation of uint8, got 300 (int64)
    """
    given, wanted = np.asarray(obs), np.dtype(dtype)
    if given.dtype == wanted or wanted.kind not in "iu" or given.dtype.kind not in "iu":
        return
    limits = np.iinfo(wanted)
    # Compared as Python compares whole numbers of any two types.
    outside = (given < int(limits.min)) | (given > int(limits.max))
    if outside.any():
        first = given[outside].flat[0]
        raise TypeError(f"expected an observation of {wanted}, got {first} ({given.dtype})")


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


def _flag(given: Any, expected: str) -> bool:
    number = _number(given, expected)
    if number not in (0.0, 1.0):
        raise TypeError(f"expected {expected}, got {_shown(given)}")
    return number == 1.0


def _number(given: Any, expected: str) -> float:
    try:
        shape = np.shape(given)
        value = given
        if math.prod(shape) == 1 and (shape or hasattr(given, "item")):
            value = given.item() if hasattr(given, "item") else np.asarray(given).item()
        # Python would read a number out of text, too, and NumPy the real part of a complex one.
        if not isinstance(value, str | bytes | complex):
            return float(value)
    # Whatever objects of others raise where they are asked for a number.
    except Exception:
        pass
    raise TypeError(f"expected {expected}, got {_shown(given)}") from None


def _shown(given: Any) -> str:
    text = " ".join(repr(given).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
