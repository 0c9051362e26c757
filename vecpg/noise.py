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
    DROPOUT = 5
    START = 6


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
    rows = torch.arange(steps.start, steps.stop, device=device)[:, None]
    return uniforms_at(
        seed, iteration, rows, torch.arange(num_envs, device=device), purpose, count=1
    )[0]


def uniforms_at(
    seed: int, iteration: int, steps: Tensor, envs: Tensor, purpose: Purpose, count: int
) -> Tensor:
    """`count` uniform numbers in [0, 1) for every pair of a step and an environment.

    The first of them is that of `uniforms`.

    Args:
        seed: 0 to 2**64 - 1.
        iteration: 0 to 2**32 - 1.
        steps: int64, in [0, 2**32).
        envs: int64, broadcasts with `steps`.
        purpose: what the numbers are for.
        count: how many for each pair, at most 2**26.

    Returns:
        (count, *shape) float32 on the device of `steps`, multiples of 2**-24.

    Example:
        >>> steps, envs = torch.tensor([3, 9]), torch.tensor([1, 0])
        >>> many = uniforms_at(1, 0, steps, envs, Purpose.ACTION, count=6)
        >>> torch.equal(many[0, 1], uniforms(1, 0, range(10), 1, Purpose.ACTION)[9, 0])
        True
    """
    # Philox gives four words for a counter; further ones are counted above the purpose.
    shape = (steps + envs).shape
    blocks = torch.arange((count + 3) // 4, device=steps.device).reshape(-1, *[1] * len(shape))
    counter = (steps.expand(1, *shape), envs, iteration, int(purpose) | blocks << 8)
    words = torch.stack(philox(counter, (seed & WORD, seed >> 32)), dim=1)
    return (words.flatten(0, 1)[:count] >> 8).to(torch.float32) * 2.0**-24


class StepNoise:
    """The numbers of `uniforms_at`, a step at a time, made many steps at once.

    A call of `uniforms_at` costs far more than its numbers.
    """

    def __init__(
        self,
        seed: int,
        iteration: int,
        num_envs: int,
        purpose: Purpose,
        device: torch.device,
        count: int = 1,
    ) -> None:
        self._seed, self._iteration, self._purpose, self._count = seed, iteration, purpose, count
        self._envs = torch.arange(num_envs, device=device)
        self._steps = max(1, min(64, 2**18 // max(1, num_envs * count)))
        self._start = -self._steps
        self._block = torch.empty(0)

    def __call__(self, t: int) -> Tensor:
        """(count, num_envs) numbers for step t."""
        if not self._start <= t < self._start + self._steps:
            self._start = t - t % self._steps
            steps = torch.arange(self._steps, device=self._envs.device) + self._start
            self._block = uniforms_at(
                self._seed, self._iteration, steps[:, None], self._envs, self._purpose, self._count
            )
        return self._block[:, t - self._start]


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
