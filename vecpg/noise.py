"""Random numbers as a function of where they are used, not of what was drawn before.

Every number is a pure function of (seed, iteration, global environment index, step, purpose), so a
run can be resumed, split over processes or moved to another device and draw the same numbers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


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
    return _rounds(counter, [_of_round(key, i) for i in range(ROUNDS)])


def _of_round(key: tuple[int, int], i: int) -> tuple[int, int]:
    return (key[0] + i * WEYL[0]) & WORD, (key[1] + i * WEYL[1]) & WORD


def _rounds(
    counter: Sequence[Tensor | int], keys: Sequence[tuple[Tensor | int, Tensor | int]]
) -> list[Tensor]:
    """As `philox`, with the key of every round."""
    c0, c1, c2, c3 = counter
    for k0, k1 in keys:
        # The 64-bit product wraps into the sign, and the bits are right all the same.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & WORD) ^ c1 ^ k0,
            p1 & WORD,
            ((p0 >> 32) & WORD) ^ c3 ^ k1,
            p0 & WORD,
        )
    return [torch.as_tensor(word) for word in (c0, c1, c2, c3)]


@dataclass(frozen=True, slots=True)
class Stream:
    """What fixes every random number of a collection.

        number = f(seed, iteration, first_env + n, step, purpose),   n = 0 ... num_envs - 1

    A part of the environments draws what it would draw as a part of all of them: only their index
    in the whole run counts.

    Args:
        seed: of the run, 0 to 2**64 - 1.
        iteration: which collection, 0 to 2**32 - 1; in evaluation, which set of episodes.
        first_env: the index in the whole run of the first environment.
        num_envs: how many follow from there on.

    Example:
        >>> whole, part = Stream(1, 0, 0, 8), Stream(1, 0, 6, 2)
        >>> numbers = whole.uniforms(range(10), Purpose.ACTION)
        >>> torch.equal(numbers[7:9, 6:], part.uniforms(range(7, 9), Purpose.ACTION))
        True
        >>> whole.reset_seeds(Purpose.TRAINING_RESET)[6:] == part.reset_seeds(
        ...     Purpose.TRAINING_RESET
        ... )
        True
    """

    seed: int
    iteration: int
    first_env: int
    num_envs: int

    def part(self, first: int, count: int) -> "Stream":
        """The stream of environments `first` to `first + count - 1` of these."""
        return Stream(self.seed, self.iteration, self.first_env + first, count)

    def reset_seeds(self, purpose: Purpose) -> list[int]:
        """One reset seed for each environment."""
        words = self._words(purpose, self.first_env + self.num_envs)
        return [int(word) for word in words[self.first_env :]]

    def common_seed(self, purpose: Purpose) -> int:
        """One reset seed for all environments of the run together, whichever of them these are."""
        return int(self._words(purpose, 1)[0])

    def _words(self, purpose: Purpose, count: int) -> NDArray[np.unsignedinteger]:
        """One for each of the run's first `count` environments."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(int(purpose), self.iteration))
        return sequence.generate_state(count)

    def uniforms(
        self, steps: range, purpose: Purpose, device: torch.device | str = "cpu"
    ) -> Tensor:
        """One uniform number in [0, 1) for every step and environment.

        Args:
            steps: the rows wanted, counted from the start of the iteration.
            purpose: what the numbers are for.
            device: where they are wanted; the bits are the same everywhere.

        Returns:
            (len(steps), num_envs) float32, multiples of 2**-24.
        """
        rows = torch.arange(steps.start, steps.stop, device=device)[:, None]
        envs = torch.arange(self.num_envs, device=device)
        return self.uniforms_at(rows, envs, purpose, count=1)[0]

    def uniforms_at(self, steps: Tensor, envs: Tensor, purpose: Purpose, count: int) -> Tensor:
        """`count` uniform numbers in [0, 1) for every pair of a step and an environment.

        The first of them is that of `uniforms`.

        Args:
            steps: int64, in [0, 2**32).
            envs: int64, in [0, num_envs), broadcasts with `steps`.
            purpose: what the numbers are for.
            count: how many for each pair, at most 2**26.

        Returns:
            (count, *shape) float32 on the device of `steps`, multiples of 2**-24.

        Example:
            >>> stream, steps, envs = Stream(1, 0, 0, 2), torch.tensor([3, 9]), torch.tensor([1, 0])
            >>> many = stream.uniforms_at(steps, envs, Purpose.ACTION, count=6)
            >>> torch.equal(many[0, 1], stream.uniforms(range(10), Purpose.ACTION)[9, 0])
            True
        """
        # Philox gives four words for a counter; further ones are counted above the purpose.
        shape = (steps + envs).shape
        blocks = torch.arange((count + 3) // 4, device=steps.device).reshape(-1, *[1] * len(shape))
        counter = (
            steps.expand(1, *shape),
            envs + self.first_env,
            self.iteration,
            int(purpose) | blocks << 8,
        )
        words = torch.stack(philox(counter, (self.seed & WORD, self.seed >> 32)), dim=1)
        return _as_uniforms(words.flatten(0, 1)[:count])

    def key(self, purpose: Purpose) -> NDArray[np.uint64]:
        """What machine code takes of it: the words of the seed, the iteration and the purpose.

        Its counters hold the environment's index in the whole run.
        """
        return np.array([self.seed & WORD, self.seed >> 32, self.iteration, purpose], np.uint64)

    def device_key(self) -> list[int]:
        """What `KeyedNoise` takes of it while training: start states are its reset's own."""
        start_seed = self.common_seed(Purpose.TRAINING_RESET)
        return [self.seed & WORD, self.seed >> 32, self.iteration, start_seed, 0, self.first_env]


def _as_uniforms(words: Tensor) -> Tensor:
    """32-bit words as numbers in [0, 1)."""
    return (words >> 8).to(torch.float32) * 2.0**-24


def steps_at_once(numbers: int, device: torch.device) -> int:
    """For how many steps random numbers are drawn together, of so many for each.

    On a CPU they stay in its cache; a GPU gets enough to do.
    """
    most, steps = (2**18, 64) if device.type == "cpu" else (2**23, 256)
    return max(1, min(steps, most // max(1, numbers)))


class StepNoise:
    """The numbers of `Stream.uniforms_at`, a step at a time, made many steps at once.

    A call of `uniforms_at` costs far more than its numbers, and so may what is made of them:
    `made`, from (count, *shape) numbers to (rows, *shape) others.
    """

    def __init__(
        self,
        stream: Stream,
        purpose: Purpose,
        device: torch.device,
        count: int = 1,
        made: Callable[[Tensor], Tensor] = lambda numbers: numbers,
    ) -> None:
        self._stream, self._purpose, self._count, self._made = stream, purpose, count, made
        self._envs = torch.arange(stream.num_envs, device=device)
        self._steps = steps_at_once(stream.num_envs * count, device)
        self._start = -self._steps
        self._block = torch.empty(0)

    def __call__(self, t: int) -> Tensor:
        """(count, num_envs) numbers for step t, or what is made of them."""
        if not self._start <= t < self._start + self._steps:
            self._start = t - t % self._steps
            steps = torch.arange(self._steps, device=self._envs.device) + self._start
            numbers = self._stream.uniforms_at(
                steps[:, None], self._envs, self._purpose, self._count
            )
            self._block = self._made(numbers)
        return self._block[:, t - self._start]


class KeyedNoise:
    """The numbers of `Stream.uniforms_at`, for a block of steps, from a key that is a tensor.

    Which numbers they are is known to the device alone: nothing here depends on Python's numbers
    that change between two calls, so that a CUDA graph may hold one.

    The key is (6,) int64: both words of the seed, the iteration, both words of the seed of start
    states, and the index in the whole run of the first environment. Numbers for `Purpose.START` are
    those of the latter seed, of iteration 0, and of the step after: a row that resets an
    environment draws the state of the following one.

    Args:
        counts: how many numbers of each purpose, for every step and environment.
        steps: how many steps a block has.
        num_envs: how many environments.
        device: where the key is.

    Example:
        >>> noise = KeyedNoise({Purpose.ACTION: 1}, 3, 2, torch.device("cpu"))
        >>> (numbers,) = noise(torch.tensor([7, 0, 4, 0, 0, 5]), torch.tensor([10]))
        >>> torch.equal(numbers[0], Stream(7, 4, 5, 2).uniforms(range(10, 13), Purpose.ACTION))
        True
    """

    def __init__(
        self, counts: Mapping[Purpose, int], steps: int, num_envs: int, device: torch.device
    ) -> None:
        blocks = [
            (purpose, block)
            for purpose, count in counts.items()
            for block in range((count + 3) // 4)
        ]
        starts = [purpose == Purpose.START for purpose, _ in blocks]

        def column(numbers: Iterable[int]) -> Tensor:
            return torch.tensor([*numbers], dtype=torch.int64).to(device)[:, None, None]

        self._counts = [*counts.values()]
        self._envs = torch.arange(num_envs, device=device)
        # Of each block of four numbers the counter's last word, and where in the key its seed is.
        self._above = column(purpose | block << 8 for purpose, block in blocks)
        self._seeds = column(3 if start else 0 for start in starts).flatten()
        self._iterations = column(not start for start in starts)
        self._steps = torch.arange(steps, device=device)[:, None] + column(starts)
        self._weyl = [
            column(i * word & WORD for i in range(ROUNDS)).view(ROUNDS, 1, 1, 1) for word in WEYL
        ]

    def __call__(self, key: Tensor, t: Tensor) -> list[Tensor]:
        """(count, steps, num_envs) float32 of each purpose, from step t on, (1,) int64."""
        if not self._counts:
            return []
        low = key.index_select(0, self._seeds)[:, None, None]
        high = key[1:].index_select(0, self._seeds)[:, None, None]
        keys = zip(
            ((low + self._weyl[0]) & WORD).unbind(),
            ((high + self._weyl[1]) & WORD).unbind(),
            strict=True,
        )
        counter = self._steps + t, self._envs + key[5:], self._iterations * key[2], self._above
        words = _rounds(counter, [*keys])
        numbers, block = [], 0
        for count in self._counts:
            chosen = [words[i % 4][block + i // 4] for i in range(count)]
            numbers.append(_as_uniforms(torch.stack(chosen)))
            block += (count + 3) // 4
        return numbers
