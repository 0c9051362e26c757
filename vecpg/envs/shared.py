"""Memory that the main process shares with its workers. It has no name that could be left behind.

It begins with which environment each worker is at. The rest, rows of all environments, is added
once the spaces are known.
"""

import math
import mmap
import os
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

_SUPPORTED = spaces.Box | spaces.Discrete | spaces.MultiBinary | spaces.MultiDiscrete
# What every processor's lines of cache are a multiple of: two workers never write to one.
_ALIGNMENT = 64


def create(num_workers: int) -> int:
    """Memory for so many workers, as a file descriptor."""
    memory = os.memfd_create("vecpg")
    os.truncate(memory, num_workers * _ALIGNMENT)
    return memory


def positions(memory: int, num_workers: int) -> NDArray[np.int64]:
    """(W,) the index i of the environment that each worker is at, or ~i while it closes that.

    Example:
        >>> memory = create(2)
        >>> positions(memory, 2)[:] = 3, 5
        >>> positions(memory, 2)
        array([3, 5])
        >>> os.close(memory)
    """
    held = mmap.mmap(memory, num_workers * _ALIGNMENT)
    return np.ndarray((num_workers,), np.int64, held, strides=(_ALIGNMENT,))


def can_be_shared(space: spaces.Space[Any]) -> bool:
    """Whether values of the space are numbers of one shape and dtype.

    Example:
        >>> can_be_shared(spaces.Discrete(3)), can_be_shared(spaces.Tuple([spaces.Discrete(3)]))
        (True, False)
    """
    return isinstance(space, _SUPPORTED)


class SharedRows:
    """What N environments are told and answer, as arrays in the memory of all processes.

    actions: (N, ...) of the action space's shape and dtype.
    obs: (N, ...) of the observation space's shape and dtype.
    rewards: (N,) float64.
    terminations, truncations: (N,) bool.
    action_masks: (N, A) bool, True = allowed, A = the sum of `mask_sizes`; or (N, 0).

    Args:
        memory: as `create` gives it; grows to hold the rows.
        num_workers: as it was given there.
        num_envs: N.
        observation_space: of one environment, one that `can_be_shared`.
        action_space: likewise.
        flags: A; 0 = there are no masks.

    Example:
        >>> memory = create(1)
        >>> box, discrete = spaces.Box(0, 1, (2,)), spaces.Discrete(3)
        >>> ours, theirs = (SharedRows(memory, 1, 4, box, discrete, 0) for _ in range(2))
        >>> ours.actions[3] = 2
        >>> theirs.actions
        array([0, 0, 0, 2])
        >>> os.close(memory)
    """

    def __init__(
        self,
        memory: int,
        num_workers: int,
        num_envs: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        flags: int,
    ) -> None:
        forms: dict[str, tuple[tuple[int, ...], Any]] = {
            "actions": (action_space.shape or (), action_space.dtype),
            "obs": (observation_space.shape or (), observation_space.dtype),
            "rewards": ((), np.float64),
            "terminations": ((), np.bool_),
            "truncations": ((), np.bool_),
            "action_masks": ((flags,), np.bool_),
        }
        offsets, end = {}, num_workers * _ALIGNMENT
        for name, (shape, dtype) in forms.items():
            offsets[name] = end
            size = num_envs * math.prod(shape) * np.dtype(dtype).itemsize
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        os.truncate(memory, end)
        held = mmap.mmap(memory, end)
        found = {
            name: np.ndarray((num_envs, *shape), dtype, held, offsets[name])
            for name, (shape, dtype) in forms.items()
        }
        self.actions, self.obs = found["actions"], found["obs"]
        self.rewards = found["rewards"]
        self.terminations, self.truncations = found["terminations"], found["truncations"]
        self.action_masks = found["action_masks"]
