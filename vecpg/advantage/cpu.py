"""Sums by age on the CPU in machine code, a few environments at a time."""

import numpy as np
from torch import Tensor

from vecpg.kernels.jit import jit

# Environments are taken in blocks of about this many rows, so that the temporaries stay small.
_BLOCK_ROWS = 2**18
# As many have their sums by age in the cache, were episodes not too long.
_BLOCK_ENVS = 64


def sums_by_age(weights: Tensor, mask: Tensor, dones: Tensor, sums: Tensor) -> None:
    """See `vecpg.advantage.ages.sums_by_age`; float32, and `sums` are added to."""
    rows = weights.detach().numpy(), mask.numpy(), dones.numpy()
    _add(*rows, *sums[:, :, None].numpy(), _width(mask))


def subtract_mean_by_age(
    weights: Tensor, mask: Tensor, dones: Tensor, sums: Tensor, others: bool
) -> None:
    """See `vecpg.advantage.ages.subtract_mean_by_age`; float32."""
    rows = weights.detach().numpy(), mask.numpy(), dones.numpy()
    # No episode of these is longer, whatever those are that others have.
    _subtract(*rows, *sums[:, : len(mask)].numpy(), others, _width(mask))


def _width(mask: Tensor) -> int:
    """How many environments are taken at once."""
    return max(1, min(_BLOCK_ENVS, mask.shape[1], _BLOCK_ROWS // max(1, len(mask))))


@jit
def _add(weights, mask, dones, total, count, width):
    """Add all environments to the sums of each age, (T, 1), a block after the other."""
    for start in range(0, mask.shape[1], width):
        _add_by_age(weights, mask, dones, start, width, total, count, False)


@jit
def _subtract(weights, mask, dones, total, count, others, width):
    """As the reference, row after row of `width` environments."""
    length, num_envs = mask.shape
    longest = length
    while longest > 0 and count[longest - 1] == 0:
        longest -= 1
    own_total, own_count = np.zeros((longest, width)), np.zeros((longest, width))
    age, mean = np.zeros(width, np.int64), np.empty(width)
    for start in range(0, num_envs, width):
        if others:
            own_total[:] = 0.0
            own_count[:] = 0.0
            _add_by_age(weights, mask, dones, start, width, own_total, own_count, True)
        age[:] = 0
        here = min(width, num_envs - start)
        for t in range(length):
            row, counted = weights[t, start : start + here], mask[t, start : start + here]
            ends = dones[t, start : start + here]
            for n in range(here):
                sum_here = total[age[n]] - own_total[age[n], n]
                count_here = count[age[n]] - own_count[age[n], n]
                mean[n] = sum_here / count_here if count_here > 0 else 0.0
            for n in range(here):
                row[n] = row[n] - mean[n] if counted[n] else 0.0
                age[n] = age[n] + 1 if counted[n] and not ends[n] else 0


@jit
def _add_by_age(weights, mask, dones, start, width, total, count, apart):
    """Add a block of environments to the sums over rows of each age, of all or each `apart`."""
    length, num_envs = mask.shape
    age = np.zeros(width, np.int64)
    here = min(width, num_envs - start)
    for t in range(length):
        row, counted = weights[t, start : start + here], mask[t, start : start + here]
        ends = dones[t, start : start + here]
        for n in range(here):
            # Adding 0 is faster than asking, which cannot be foretold.
            column = n if apart else 0
            total[age[n], column] += row[n] if counted[n] else 0.0
            count[age[n], column] += counted[n]
            age[n] = age[n] + 1 if counted[n] and not ends[n] else 0
