"""From rewards to the numbers that weigh grad log pi: weights, baselines, normalization.

Masked rows never take part: they are selected away, not multiplied by zero, so they may hold NaN.
Sums are formed in float64.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vecpg.kernels.jit import jit
from vecpg.returns import generalized_advantage, reward_to_go

if TYPE_CHECKING:
    from vecpg.config import Config
    from vecpg.rollout import Rollout

# Environments are taken in blocks of about this many rows, so that the temporaries stay small.
_BLOCK_ROWS = 2**18
# As many have their sums by age in the cache, were episodes not too long.
_BLOCK_ENVS = 64


def advantages(
    rollout: "Rollout",
    config: "Config",
    values: Tensor | None = None,
    final_values: Tensor | None = None,
) -> Tensor:
    """w_t - b_t: what multiplies grad log pi(a_t|s_t).

    The weight w_t is, by `config.weights`, the reward-to-go sum over k >= t of gamma^(k-t) r_k, or
    the full return sum over k >= 0 of gamma^k r_k, the same for the whole episode. With "gae" the
    result is the sum over k >= t of (gamma * lambda)^(k-t) (r_k + gamma * V(s_{k+1}) - V(s_k)),
    from which V is subtracted already. The baseline b_t is, by `config.baseline`:

    - "none": 0.
    - "mean": the mean of w over all counted rows.
    - "timestep_mean": the mean over counted rows of the same age (steps since the episode began).
    - "leave_one_out": the mean over counted rows of the same age in other environments, 0 where
      there is none.
    - "value": V(s_t), which is `values`.

    With `config.bootstrap_truncations` an episode that was cut by a limit, and did not terminate,
    goes on with V of its final observation, discounted; else every end is followed by 0.

    With `config.normalize` the result is shifted and scaled to mean 0 and standard deviation 1
    (n - 1) over all counted rows; if they are all equal, or there is only one, it is 0.

    Args:
        rollout: T steps of N environments.
        config: `weights`, `gamma`, `gae_lambda`, `baseline`, `bootstrap_truncations` and
            `normalize` are read.
        values: (T, N) float32, V of the observations; needed by the baseline "value".
        final_values: (K,) float32, V of `rollout.final_obs`; needed to bootstrap.

    Returns:
        (T, N) float32, 0 where masked.

    Raises:
        ValueError: values that are needed and were not given.

    Source: Williams (1992), section 3; Schulman et al. (2016), section 3, for "gae"; Kool et al.
    (2019), "Buy 4 REINFORCE samples, get a baseline for free!", section 3, for leaving one out.
    """
    mask, dones = rollout.mask, rollout.dones
    if config.baseline == "value" and values is None:
        raise ValueError(
            'values: expected (T, N), got None; baseline="value" needs V of every observation'
        )
    continued = None
    if config.bootstrap_truncations:
        if final_values is None:
            raise ValueError(
                "final_values: expected (K,), got None; bootstrap_truncations needs V of every"
                " final observation"
            )
        continued = rollout.values_at_truncations(final_values)
    weights = torch.empty_like(rollout.rewards)
    for block in _blocks(mask):
        paid, ends, counted = rollout.rewards[:, block], dones[:, block], mask[:, block]
        after = None if continued is None else continued[:, block]
        if config.weights == "gae" and values is not None:
            weights[:, block] = generalized_advantage(
                paid,
                values[:, block],
                ends,
                config.gamma,
                config.gae_lambda,
                final_values=after,
                mask=counted,
            )
        else:
            weights[:, block] = reward_to_go(
                paid, ends, config.gamma, final_values=after, mask=counted
            )
    if config.weights == "full_return":
        for block in _blocks(mask):
            first = _first_rows(mask[:, block], dones[:, block])
            whole = weights[:, block].gather(0, first)
            weights[:, block] = torch.where(mask[:, block], whole, 0.0)
    if values is not None and config.baseline == "value" and config.weights != "gae":
        weights = torch.where(mask, weights - values, 0.0)
    if config.baseline == "mean":
        weights = torch.where(mask, weights - masked_mean(weights, mask).to(weights.dtype), 0.0)
    if config.baseline in ("timestep_mean", "leave_one_out"):
        _subtract_mean_by_age(weights, mask, dones, config.baseline == "leave_one_out")
    if config.normalize:
        weights = normalized(weights, mask)
    return weights


def prepare_advantages(device: torch.device) -> None:
    """Compile, or load, what the advantages of a rollout on a device will need."""
    ones = torch.ones(1, 2, device=device)
    every = ones > 0
    _subtract_mean_by_age(reward_to_go(ones, every, 1.0, mask=every), every, every, True)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `values` where `mask`, in float64; 0 where nothing counts.

    Example:
        >>> masked_mean(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False]))
        tensor(2., dtype=torch.float64)
    """
    total = torch.where(mask, values, 0.0).sum(dtype=torch.float64)
    return total / mask.sum().clamp(min=1)


def normalized(values: Tensor, mask: Tensor) -> Tensor:
    """`values` shifted and scaled to mean 0 and standard deviation 1 (n - 1) where `mask`, else 0.

    If the standard deviation is 0, or only one row counts, everything is 0.

    Example:
        >>> normalized(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False]))
        tensor([-0.7071,  0.7071,  0.0000])
    """
    centred = torch.where(mask, values - masked_mean(values, mask), 0.0)
    squares = centred.square().sum(dtype=torch.float64)
    deviation = (squares / (mask.sum() - 1).clamp(min=1)).sqrt()
    return torch.where(deviation > 0, centred / deviation, 0.0)


def _subtract_mean_by_age(weights: Tensor, mask: Tensor, dones: Tensor, others: bool) -> None:
    """Subtract in place the mean over rows of the same age, of all or of other environments."""
    if weights.device.type == "cpu" and weights.dtype == torch.float32:
        width = max(1, min(_BLOCK_ENVS, mask.shape[1], _BLOCK_ROWS // max(1, len(mask))))
        rows = weights.detach().numpy()
        _subtract_on_host(rows, mask.numpy(), dones.numpy(), others, width)
    else:
        _subtract_in_torch(weights, mask, dones, others)


@jit
def _subtract_on_host(weights, mask, dones, others, width):  # type: ignore[no-untyped-def]
    """As `_subtract_in_torch`, row after row of `width` environments."""
    length, num_envs = mask.shape
    total, count = np.zeros(length), np.zeros(length)
    shape = length, width
    own_total, own_count = np.zeros(shape), np.zeros(shape)
    for start in range(0, num_envs, width):
        _add_by_age(weights, mask, dones, start, total, count, own_total, own_count, False)
    for start in range(0, num_envs, width):
        if others:
            own_total[:] = 0.0
            own_count[:] = 0.0
            _add_by_age(weights, mask, dones, start, total, count, own_total, own_count, True)
        age = np.zeros(width, np.int64)
        for t in range(length):
            for n in range(min(width, num_envs - start)):
                if not mask[t, start + n]:
                    weights[t, start + n] = 0.0
                    age[n] = 0
                    continue
                sum_here = total[age[n]] - own_total[age[n], n]
                count_here = count[age[n]] - own_count[age[n], n]
                if count_here > 0:
                    weights[t, start + n] -= sum_here / count_here
                age[n] = 0 if dones[t, start + n] else age[n] + 1


@jit
def _add_by_age(  # type: ignore[no-untyped-def]
    weights, mask, dones, start, total, count, own_total, own_count, own
):
    """Add a block of environments to the sums over rows of each age, of all or of each."""
    length, num_envs = mask.shape
    width = own_total.shape[1]
    age = np.zeros(width, np.int64)
    for t in range(length):
        for n in range(min(width, num_envs - start)):
            if not mask[t, start + n]:
                age[n] = 0
                continue
            if own:
                own_total[age[n], n] += weights[t, start + n]
                own_count[age[n], n] += 1.0
            else:
                total[age[n]] += weights[t, start + n]
                count[age[n]] += 1.0
            age[n] = 0 if dones[t, start + n] else age[n] + 1


def _subtract_in_torch(weights: Tensor, mask: Tensor, dones: Tensor, others: bool) -> None:
    """The reference, on any device."""
    length = mask.shape[0]
    total = torch.zeros(length, dtype=torch.float64, device=weights.device)
    count = torch.zeros_like(total)
    for block in _blocks(mask):
        block_total, block_count = _sums_by_age(weights, mask, dones, block)[:2]
        total += block_total.sum(dim=1)
        count += block_count.sum(dim=1)
    for block in _blocks(mask):
        own_total, own_count, age = _sums_by_age(weights, mask, dones, block)
        if others:
            means = (total[:, None] - own_total) / (count[:, None] - own_count)
            means = torch.where(count[:, None] > own_count, means, 0.0)
        else:
            means = (total / count)[:, None].expand(own_total.shape)
        centred = weights[:, block] - means.gather(0, age)
        weights[:, block] = torch.where(mask[:, block], centred, 0.0).to(weights.dtype)


def _sums_by_age(
    weights: Tensor, mask: Tensor, dones: Tensor, block: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum and number of the weights of each (age, environment), and every row's age."""
    mask, weights = mask[:, block], weights[:, block]
    steps = torch.arange(mask.shape[0], device=mask.device)[:, None]
    age = steps - _first_rows(mask, dones[:, block])
    total = torch.zeros(weights.shape, dtype=torch.float64, device=weights.device)
    count = torch.zeros_like(total)
    total.scatter_add_(0, age, torch.where(mask, weights, 0.0).to(torch.float64))
    count.scatter_add_(0, age, mask.to(torch.float64))
    return total, count, age


def _first_rows(mask: Tensor, dones: Tensor) -> Tensor:
    """(T, N) int64: the row in which each counted row's episode began."""
    begins = mask.clone()
    begins[1:] &= dones[:-1] | ~mask[:-1]
    steps = torch.arange(mask.shape[0], device=mask.device)[:, None]
    return torch.where(begins, steps, 0).cummax(dim=0).values


def _blocks(mask: Tensor) -> Iterator[slice]:
    """All environments, a few at a time."""
    length, num_envs = mask.shape
    width = max(1, _BLOCK_ROWS // max(1, length))
    for start in range(0, num_envs, width):
        yield slice(start, start + width)
