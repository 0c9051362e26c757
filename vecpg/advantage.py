"""From rewards to the numbers that weigh grad log pi: weights, baselines, normalization.

Masked rows never take part: they are selected away, not multiplied by zero, so they may hold NaN.
Sums are formed in float64, for each shard by itself, and added in shard order: only these few
numbers pass from one shard to another.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from vecpg.kernels.jit import jit
from vecpg.kernels.sums import in_order
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
        config: `weights`, `gamma`, `gae_lambda`, `baseline`, `bootstrap_truncations`, `normalize`
            and `resolved_shards` are read.
        values: (T, N) float32, V of the observations; needed by the baseline "value".
        final_values: (K,) float32, V of `rollout.final_obs`; needed to bootstrap.

    Returns:
        (T, N) float32, 0 where masked.

    Raises:
        ValueError: values that are needed and were not given.

    Source: Williams (1992), section 3; Schulman et al. (2016), section 3, for "gae"; Kool et al.
    (2019), "Buy 4 REINFORCE samples, get a baseline for free!", section 3, for leaving one out.
    """
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
    shards = rollout.shards(config.resolved_shards)
    masks, dones = [shard.mask for shard in shards], [shard.dones for shard in shards]
    none: list[Tensor | None] = [None] * len(shards)
    weights = [
        _weigh(config, *parts)
        for parts in zip(
            [shard.rewards for shard in shards],
            masks,
            dones,
            none if values is None else rollout.split(values, shards),
            none if continued is None else rollout.split(continued, shards),
            strict=True,
        )
    ]
    if config.baseline == "mean":
        mean = masked_mean(weights, masks).to(weights[0].dtype)
        weights = [
            torch.where(mask, own - mean, 0.0) for own, mask in zip(weights, masks, strict=True)
        ]
    if config.baseline in ("timestep_mean", "leave_one_out"):
        rows = list(zip(weights, masks, dones, strict=True))
        sums = add_by_age([sums_by_age(*own) for own in rows])
        for own in rows:
            subtract_mean_by_age(*own, sums, others=config.baseline == "leave_one_out")
    if config.normalize:
        weights = normalized(weights, masks)
    return rollout.join(weights)


def prepare_advantages(device: torch.device) -> None:
    """Compile, or load, what the advantages of a rollout on a device will need."""
    ones = torch.ones(1, 2, dtype=torch.float32, device=device)
    rows = reward_to_go(ones, ones > 0, 1.0, mask=ones > 0), ones > 0, ones > 0
    subtract_mean_by_age(*rows, sums_by_age(*rows), others=True)


def _weigh(
    config: "Config",
    rewards: Tensor,
    mask: Tensor,
    dones: Tensor,
    values: Tensor | None,
    continued: Tensor | None,
) -> Tensor:
    """w_t of a shard's rows, less V(s_t) where that is the baseline. No sum goes over rows."""
    weights = torch.empty_like(rewards)
    for block in _blocks(mask):
        paid, ends, counted = rewards[:, block], dones[:, block], mask[:, block]
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
    return weights


# -- Over all rows -------------------------------------------------------------------------------


def sum_and_count(values: Tensor, mask: Tensor) -> Tensor:
    """(2,) float64: the sum of a shard's `values` where `mask`, and how many they are."""
    total = torch.where(mask, values, 0.0).sum(dtype=torch.float64)
    return torch.stack([total, mask.sum().to(torch.float64)])


def masked_mean(values: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """The mean of every shard's `values` where its mask is True, in float64; 0 if nothing counts.

    Example:
        >>> values, mask = torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False])
        >>> masked_mean([values], [mask])
        tensor(2., dtype=torch.float64)
    """
    total, count = in_order([sum_and_count(*pair) for pair in zip(values, masks, strict=True)])
    mean: Tensor = total / count.clamp(min=1)
    return mean


def normalized(values: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """Shards' `values` with mean 0 and standard deviation 1 (n - 1) where their mask is True.

    Elsewhere they are 0. If the standard deviation is 0, or only one row counts, everything is.

    Example:
        >>> values, mask = torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False])
        >>> normalized([values], [mask])
        [tensor([-0.7071,  0.7071,  0.0000])]
    """
    mean = masked_mean(values, masks)
    centred = [torch.where(mask, own - mean, 0.0) for own, mask in zip(values, masks, strict=True)]
    # The square of what float32 holds need not be in it.
    squares = in_order([own.to(torch.float64).square().sum() for own in centred])
    count = in_order([mask.sum() for mask in masks])
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    # NaN, of what was not finite, stays NaN; what no number can hold would make everything 0.
    largest = torch.finfo(centred[0].dtype).max
    deviation = torch.where(deviation <= largest, deviation, torch.nan)
    return [torch.where(deviation == 0, 0.0, own / deviation) for own in centred]


# -- Over rows of the same age -------------------------------------------------------------------


def sums_by_age(weights: Tensor, mask: Tensor, dones: Tensor) -> Tensor:
    """The sum, and the number, of a shard's weights of each age: steps since the episode began.

    Args:
        weights: (T, N).
        mask: (T, N) bool, True = counted; other rows are not read.
        dones: (T, N) bool, True = the episode ends here.

    Returns:
        (2, T) float64, sums and numbers.

    Example:
        >>> whole = torch.tensor([[True, True], [True, False]])
        >>> ends = torch.tensor([[False, True], [True, False]])
        >>> sums_by_age(torch.tensor([[1.0, 2.0], [4.0, torch.nan]]), whole, ends).tolist()
        [[3.0, 4.0], [2.0, 1.0]]
    """
    sums = torch.zeros(2, len(mask), dtype=torch.float64, device=weights.device)
    if _on_host(weights):
        rows = weights.detach().numpy(), mask.numpy(), dones.numpy()
        _add_on_host(*rows, *sums[:, :, None].numpy(), _width(mask))
        return sums
    for block in _blocks(mask):
        total, count, _ = _of_each(weights, mask, dones, block)
        sums[0] += total.sum(dim=1)
        sums[1] += count.sum(dim=1)
    return sums


def add_by_age(parts: Sequence[Tensor]) -> Tensor:
    """The shards' `sums_by_age`, (2, T of each), added in their order: (2, the longest T)."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.shape[1] for part in parts)
    return in_order([nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts])


def subtract_mean_by_age(
    weights: Tensor, mask: Tensor, dones: Tensor, sums: Tensor, *, others: bool
) -> None:
    """Subtract from a shard's weights, in place, the mean over all counted rows of the same age.

    Args:
        weights: (T, N); 0 where masked afterwards.
        mask: as in `sums_by_age`.
        dones: the same.
        sums: of all shards, as `add_by_age` gives them.
        others: leave out the rows of the own environment; where no other has that age, subtract 0.
    """
    if _on_host(weights):
        rows = weights.detach().numpy(), mask.numpy(), dones.numpy()
        _subtract_on_host(*rows, *sums.numpy(), others, _width(mask))
    else:
        _subtract_in_torch(weights, mask, dones, sums, others)


def _on_host(weights: Tensor) -> bool:
    return weights.device.type == "cpu" and weights.dtype == torch.float32


def _width(mask: Tensor) -> int:
    """How many environments the machine code takes at once."""
    return max(1, min(_BLOCK_ENVS, mask.shape[1], _BLOCK_ROWS // max(1, len(mask))))


@jit
def _add_on_host(weights, mask, dones, total, count, width):  # type: ignore[no-untyped-def]
    """Add all environments to the sums of each age, (T, 1), a block after the other."""
    for start in range(0, mask.shape[1], width):
        _add_by_age(weights, mask, dones, start, width, total, count, False)


@jit
def _subtract_on_host(weights, mask, dones, total, count, others, width):  # type: ignore[no-untyped-def]
    """As `_subtract_in_torch`, row after row of `width` environments."""
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
def _add_by_age(weights, mask, dones, start, width, total, count, apart):  # type: ignore[no-untyped-def]
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


def _subtract_in_torch(
    weights: Tensor, mask: Tensor, dones: Tensor, sums: Tensor, others: bool
) -> None:
    """The reference, on any device."""
    total, count = sums[:, : len(mask), None]
    for block in _blocks(mask):
        own_total, own_count, age = _of_each(weights, mask, dones, block)
        if others:
            means = (total - own_total) / (count - own_count)
            means = torch.where(count > own_count, means, 0.0)
        else:
            means = (total / count).expand(own_total.shape)
        centred = weights[:, block] - means.gather(0, age)
        weights[:, block] = torch.where(mask[:, block], centred, 0.0).to(weights.dtype)


def _of_each(
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
