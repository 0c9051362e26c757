"""The memory of whole iterations on a GPU: nothing of it is allocated, or moved, between them.

R runs go on side by side, each of N environments in `shards` groups, and each as it would alone. An
iteration k reads slot k modulo the number of slots of what is kept in a ring, and leaves the state
that it comes to in the next slot: so the host can take up any iteration that it has not released.
"""

import itertools
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

# Environments of a program: as many as fill a tile, and fewer where there would be few programs.
_BLOCK, _SMALL_BLOCK, _FEW_ENVS = 64, 16, 4096


class Shape(NamedTuple):
    """A policy of two hidden layers: features -> units -> units -> outputs.

    features:     numbers of an observation.
    units:        of both hidden layers.
    outputs:      actions to choose from, or numbers of an action.
    tanh:         the activation; else ReLU.
    gaussian:     actions are a Box; else Discrete.
    first_action: the smallest, where they are Discrete.

    In a row its parameters are W1 (units, features), b1, W2, b2, W3 (outputs, units), b3, and of a
    Gaussian the raw log_std (outputs,): each as torch holds it, without gaps.

    Example:
        >>> Shape(4, (64, 64), 2, True, False, 0).size
        4610
    """

    features: int
    units: tuple[int, int]
    outputs: int
    tanh: bool
    gaussian: bool
    first_action: int

    @property
    def sizes(self) -> list[int]:
        """How many numbers each of the parameters has."""
        widths = [self.features, *self.units, self.outputs]
        layers = [count for into, out in itertools.pairwise(widths) for count in (into * out, out)]
        return [*layers, *([self.outputs] if self.gaussian else [])]

    @property
    def size(self) -> int:
        """How many numbers the parameters have together."""
        return sum(self.sizes)

    @property
    def stride(self) -> int:
        """From one policy's numbers to the next one's: a multiple of 128, and two more at least."""
        return -(-(self.size + 2) // 128) * 128


class Tally(IntEnum):
    """What is counted of a block of environments in an iteration."""

    COUNTED = 0  # rows
    EPISODES = 1
    RETURN_SUM = 2
    RETURN_LOW = 3
    RETURN_HIGH = 4
    FINITE = 5  # 1: every number that counts is; else 0


class Entry(IntEnum):
    """What the host is told of an iteration of a run."""

    COUNTED = 0  # rows
    ROWS = 1  # masked ones too: the most of any block
    EPISODES = 2
    RETURN_SUM = 3
    RETURN_LOW = 4
    RETURN_HIGH = 5
    POLICY_LOSS = 6
    ENTROPY = 7  # mean over counted rows
    GRAD_NORM = 8  # before clipping
    ROLLOUT_FINITE = 9  # 1 or 0
    UPDATE_FINITE = 10  # 1 or 0: the three numbers before, and the parameters that were left


class Setting(IntEnum):
    """A run's numbers that do not change."""

    GAMMA = 0
    ENT_COEF = 1
    MAX_GRAD_NORM = 2  # infinite: none
    DIVISOR = 3  # of the loss; 0: the number of counted rows


class Scalar(IntEnum):
    """What Adam's step count makes of its settings, as `vecpg.adam.Adam` has it."""

    STEP_SIZE = 0  # lr / (1 - beta1^t)
    ROOT = 1  # (1 - beta2^t)^0.5


class Stamp(IntEnum):
    """When, in nanoseconds of the GPU's clock, something of an iteration began, or all ended."""

    COLLECT = 0
    RETURNS = 1
    UPDATE = 2
    END = 3


class Memory(NamedTuple):
    """Tensors on one device, contiguous. B blocks of `block` environments are a run.

    A block lies within a shard: block b has the environments b % (B / shards) * block and following
    of shard b // (B / shards), those beyond its end left out. Rows at and after `last` of a block
    hold whatever was there.

    What stays, or is written by the host:
        at:       (1,) int64, the iteration at hand, from 0 on.
        keys:     (slots, R, 6) int64: lower and upper word of the seed, the iteration, lower and
                  upper word of the seed of start states, the index of the first environment.
        scalars:  (slots, R, len(Scalar)) float64.
        settings: (R, len(Setting)) float64.
        bounds:   (2, A) float32, lowest and highest numbers of an action; (2, 0) for Discrete ones.
    The state:
        states:   (slots, R, 3, shape.stride) float32: parameters, and Adam's two averages, in a row
                  as `Shape` says.
    Rows, time-major, of at most `capacity` = C:
        obs:      (R, C + 1, N, F) float32.
        actions:  (R, C, N) int8 numbers from 0 on, or (R, C, N, A) float32 as drawn.
        rewards:  (R, C, N) float32, 0 where masked.
        flags:    (R, C, N) int8: 1 = the row counts, plus 2 = it terminated, plus 4 = truncated.
        weights:  (R, C, N) float32, 0 where masked.
        last:     (R, B) int32, how many rows a block has.
    Episodes:
        starts, stops: (R, E, N) int32, the first row of an environment's k-th episode, and the one
                  after its last; E = the start window.
        numbers:  (R, N) int32, how many episodes it has.
        longest:  (R, N) int32, the most rows of one of them.
        tallies:  (R, B, len(Tally)) float64.
    Sums:
        parts:    (R, shards, P, shape.stride) float64: of parts of a shard's rows the gradient in a
                  row, and at [..., shape.size] and [..., shape.size + 1] the loss and the entropy;
                  stride has room for them.
        sums:     (R, shape.stride) float64, likewise, of all.
        entries:  (slots, R, len(Entry)) float64.
        stamps:   (slots, R, len(Stamp)) int64.
    """

    at: Tensor
    keys: Tensor
    scalars: Tensor
    settings: Tensor
    bounds: Tensor
    states: Tensor
    obs: Tensor
    actions: Tensor
    rewards: Tensor
    flags: Tensor
    weights: Tensor
    last: Tensor
    starts: Tensor
    stops: Tensor
    numbers: Tensor
    longest: Tensor
    tallies: Tensor
    parts: Tensor
    sums: Tensor
    entries: Tensor
    stamps: Tensor

    @property
    def block(self) -> int:
        """Environments of a block."""
        return block_of(self.flags.shape[2] // self.parts.shape[1])


def block_of(envs_of_shard: int) -> int:
    """How many environments are a block: whoever is alone or with other runs has the same.

    Example:
        >>> block_of(64), block_of(65536)
        (16, 64)
    """
    return _BLOCK if envs_of_shard > _FEW_ENVS else _SMALL_BLOCK


def make_memory(
    shape: Shape,
    *,
    runs: int,
    num_envs: int,
    shards: int,
    num_steps: int,
    max_episode_steps: int,
    slots: int,
    parts: int,
    device: torch.device,
) -> Memory:
    """All of it, zeros.

    Args:
        shape: of the policy.
        runs: R.
        num_envs: N of each.
        shards: groups of environments of each.
        num_steps: the start window, E.
        max_episode_steps: the time limit. 2 E - 2 rows may come before an environment's last
            episode begins: see `vecpg.rollout.tensor`.
        slots: of the ring.
        parts: P.
        device: where.
    """

    def zeros(*size: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(size, dtype=of, device=device)

    whole, wide = torch.int32, torch.float64
    capacity = 2 * (num_steps - 1) + max_episode_steps
    rows = runs, capacity, num_envs
    blocks = shards * -(-(num_envs // shards) // block_of(num_envs // shards))
    components = [shape.outputs] if shape.gaussian else []
    return Memory(
        at=zeros(1, of=torch.int64),
        keys=zeros(slots, runs, 6, of=torch.int64),
        scalars=zeros(slots, runs, len(Scalar), of=wide),
        settings=zeros(runs, len(Setting), of=wide),
        bounds=zeros(2, sum(components)),
        states=zeros(slots, runs, 3, shape.stride),
        obs=zeros(runs, capacity + 1, num_envs, shape.features),
        actions=zeros(*rows, *components, of=torch.float32 if shape.gaussian else torch.int8),
        rewards=zeros(*rows),
        flags=zeros(*rows, of=torch.int8),
        weights=zeros(*rows),
        last=zeros(runs, blocks, of=whole),
        starts=zeros(runs, num_steps, num_envs, of=whole),
        stops=zeros(runs, num_steps, num_envs, of=whole),
        numbers=zeros(runs, num_envs, of=whole),
        longest=zeros(runs, num_envs, of=whole),
        tallies=zeros(runs, blocks, len(Tally), of=wide),
        parts=zeros(runs, shards, parts, shape.stride, of=wide),
        sums=zeros(runs, shape.stride, of=wide),
        entries=zeros(slots, runs, len(Entry), of=wide),
        stamps=zeros(slots, runs, len(Stamp), of=torch.int64),
    )
