"""Random numbers as a function of where they are used, not of what was drawn before.

Every number is a pure function of (seed, iteration, global environment index, step, purpose), so a
run can be resumed, split over processes or moved to another device and draw the same numbers.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


class Purpose(IntEnum):
    """What a random number is for. Streams of different purposes never meet."""

    ACTION = 0
    TRAINING_RESET = 1
    CONFIRMATION_RESET = 2
    EVALUATION_RESET = 3
    VIDEO_RESET = 4


def philox(counter: Sequence[Tensor | int], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10: four random 32-bit words for each counter.

    Args:
        counter: four int64 tensors that broadcast together, or integers, in [0, 2**32). The first
            is a tensor.
        key: two integers in [0, 2**32).

    Returns:
        four int64 tensors with values in [0, 2**32).

    Source: Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3", section 3.

    Example:
        >>> [hex(word.item()) for word in philox([torch.tensor(0), 0, 0, 0], (0, 0))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps into the sign, and the bits are right all the same.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & WORD) ^ c1 ^ k0,
            p1 & WORD,
            ((p0 >> 32) & WORD) ^ c3 ^ k1,
            p0 & WORD,
        )
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return [torch.as_tensor(word) for word in (c0, c1, c2, c3)]


def uniforms(
    seed: int,
    iteration: int,
    steps: range,
    num_envs: int,
    purpose: Purpose,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One uniform number in [0, 1) for every step and environment.

    Args:
        seed: 0 to 2**64 - 1.
        iteration: 0 to 2**32 - 1.
        steps: the rows wanted, counted from the start of the iteration.
        num_envs: environments 0 to num_envs - 1.
        purpose: what the numbers are for.
        device: where they are wanted; the bits are the same everywhere.

    Returns:
        (len(steps), num_envs) float32, multiples of 2**-24.

    Example:
        >>> many = uniforms(1, 0, range(10), 8, Purpose.ACTION)
        >>> torch.equal(many[7:9, :3], uniforms(1, 0, range(7, 9), 3, Purpose.ACTION))
        True
    """
    counter = (
        torch.arange(steps.start, steps.stop, device=device)[:, None],
        torch.arange(num_envs, device=device),
        iteration,
        int(purpose),
    )
    words = philox(counter, (seed & WORD, seed >> 32))[0]
    return (words >> 8).to(torch.float32) * 2.0**-24


class StepNoise:
    """The numbers of `uniforms`, a step at a time, made many steps at once.

    A call of `uniforms` costs far more than its numbers.
    """

    _BLOCK = 64

    def __init__(
        self, seed: int, iteration: int, num_envs: int, purpose: Purpose, device: torch.device
    ) -> None:
        self._given = (num_envs, purpose, device)
        self._seed, self._iteration = seed, iteration
        self._start = -self._BLOCK
        self._block = torch.empty(0)

    def __call__(self, t: int) -> Tensor:
        """(num_envs,) numbers for step t."""
        if not self._start <= t < self._start + self._BLOCK:
            self._start = t - t % self._BLOCK
            steps = range(self._start, self._start + self._BLOCK)
            self._block = uniforms(self._seed, self._iteration, steps, *self._given)
        return self._block[t - self._start]


def reset_seeds(seed: int, iteration: int, num_envs: int, purpose: Purpose) -> list[int]:
    """One reset seed for each environment; the first k do not depend on how many are asked for.

    Example:
        >>> reset_seeds(1, 0, 8, Purpose.TRAINING_RESET)[:3] == reset_seeds(
        ...     1, 0, 3, Purpose.TRAINING_RESET
        ... )
        True
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(int(purpose), iteration))
    return [int(word) for word in sequence.generate_state(num_envs)]
