"""From rewards to the numbers that weigh grad log pi: weights, baselines, normalization.

Masked rows never take part: they are selected away, not multiplied by zero, so they may hold NaN.
Sums are formed in float64, for each shard by itself, and added in shard order: only these few
numbers pass from one shard to another. On a GPU nothing here waits for it, of one shard.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vecpg.advantage.ages import add_by_age, on_gpu, subtract_mean_by_age, sums_by_age
from vecpg.advantage.reference import first_rows
from vecpg.kernels.sums import Combine, here, merged
from vecpg.returns import generalized_advantage, reward_to_go

if TYPE_CHECKING:
    from vecpg.config import Config
    from vecpg.rollout import Rollout

__all__ = [
    "Weighed",
    "add_by_age",
    "advantages",
    "advantages_of",
    "normalized",
    "prepare_advantages",
    "subtract_mean_by_age",
    "sum_and_count",
    "sums_by_age",
    "weigh",
]

# On the CPU environments are taken in blocks of about this many rows, so that the
# temporaries stay small.
_BLOCK_ROWS = 2**18
_BY_AGE = ("timestep_mean", "leave_one_out")


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
    weighed = weigh(rollout, config, values, final_values)
    return advantages_of(weighed, config, rollout, add_by_age(weighed.sums))


@dataclass(frozen=True, slots=True)
class Weighed:
    """Rows with their weights w_t, and what a baseline needs of them; of each shard one.

    weights: (T, N).
    masks:   (T, N) bool, True = counted.
    dones:   (T, N) bool.
    sums:    (2, n) float64, sums and numbers: n = T ages for the baselines by age, 1 for "mean", 0
             for those that need none.
    """

    weights: list[Tensor]
    masks: list[Tensor]
    dones: list[Tensor]
    sums: list[Tensor]


def weigh(
    rollout: "Rollout",
    config: "Config",
    values: Tensor | None = None,
    final_values: Tensor | None = None,
) -> Weighed:
    """The weights w_t that `advantages` begins with, less V(s_t) where that is the baseline.

    The rollout may be a part of the whole: no sum goes beyond a shard of it.

    Args:
        rollout: as `advantages` has it, and likewise the others.
        config: see there.
        values: see there.
        final_values: see there.

    Raises:
        ValueError: as `advantages`.
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
    rows = zip(weights, masks, dones, strict=True)
    return Weighed(weights, masks, dones, [_sums(config, *own) for own in rows])


def advantages_of(
    weighed: Weighed, config: "Config", rollout: "Rollout", total: Tensor, combine: Combine = here
) -> Tensor:
    """What `advantages` makes of weights: baseline subtracted, normalized.

    Args:
        weighed: as `weigh` gave them; its weights are overwritten.
        config: as for `weigh`.
        rollout: the same.
        total: (2, n) float64, `Weighed.sums` of all shards as `add_by_age` adds them, those of
            other ranks too; columns of 0 may follow.
        combine: adds up over the same shards; called once, with `config.normalize`.

    Returns:
        (T, N) float32, 0 where masked.
    """
    weights, masks = weighed.weights, weighed.masks
    if config.baseline == "mean":
        sum_of_all, count = total[:, 0]
        mean = (sum_of_all / count.clamp(min=1)).to(weights[0].dtype)
        weights = [
            torch.where(mask, own - mean, 0.0) for own, mask in zip(weights, masks, strict=True)
        ]
    if config.baseline in _BY_AGE:
        for own in zip(weights, masks, weighed.dones, strict=True):
            subtract_mean_by_age(*own, total, others=config.baseline == "leave_one_out")
    if config.normalize:
        weights = normalized(weights, masks, combine)
    return rollout.join(weights)


def prepare_advantages(device: torch.device, config: "Config", longest: int) -> None:
    """Compile, or load, what the advantages of a run's rollouts on a device will need.

    Args:
        device: where the rollouts will be.
        config: as for `advantages`; `num_envs` too.
        longest: the most rows that a rollout can have.
    """
    if on_gpu(device):
        _prepare_on_gpu(device, config, longest)
    elif device.type == "cpu":
        ones = torch.ones(1, 2, dtype=torch.float32)
        rows = reward_to_go(ones, ones > 0, 1.0, mask=ones > 0), ones > 0, ones > 0
        subtract_mean_by_age(*rows, sums_by_age(*rows), others=True)


def _prepare_on_gpu(device: torch.device, config: "Config", longest: int) -> None:
    from vecpg.advantage import cuda as by_age
    from vecpg.returns import cuda as returns

    num_envs = config.num_envs // config.resolved_shards
    with_final = config.bootstrap_truncations
    # With "gae" it is what V is fitted to.
    returns.prepare_reward_to_go(num_envs, longest, device, with_final=with_final)
    if config.weights == "gae":
        returns.prepare_generalized_advantage(num_envs, longest, device, with_final=with_final)
    if config.baseline in _BY_AGE:
        by_age.prepare(device, others=config.baseline == "leave_one_out")


def _weigh(
    config: "Config",
    rewards: Tensor,
    mask: Tensor,
    dones: Tensor,
    values: Tensor | None,
    continued: Tensor | None,
) -> Tensor:
    """w_t of a shard's rows, less V(s_t) where that is the baseline. No sum goes over rows."""
    length, num_envs = rewards.shape
    width = max(1, _BLOCK_ROWS // max(1, length))
    # On a GPU one call for all rows: few launches, and columns that lie where they were allocated.
    if rewards.device.type != "cpu" or num_envs <= width:
        return _weigh_block(config, rewards, mask, dones, values, continued)
    weights = torch.empty_like(rewards)
    for start in range(0, num_envs, width):
        own = slice(start, start + width)
        weights[:, own] = _weigh_block(
            config,
            rewards[:, own],
            mask[:, own],
            dones[:, own],
            None if values is None else values[:, own],
            None if continued is None else continued[:, own],
        )
    return weights


def _weigh_block(
    config: "Config",
    rewards: Tensor,
    mask: Tensor,
    dones: Tensor,
    values: Tensor | None,
    continued: Tensor | None,
) -> Tensor:
    if config.weights == "gae" and values is not None:
        return generalized_advantage(
            rewards,
            values,
            dones,
            config.gamma,
            config.gae_lambda,
            final_values=continued,
            mask=mask,
        )
    weights = reward_to_go(rewards, dones, config.gamma, final_values=continued, mask=mask)
    if config.weights == "full_return":
        weights = torch.where(mask, weights.gather(0, first_rows(mask, dones)), 0.0)
    if values is not None and config.baseline == "value":
        weights = torch.where(mask, weights - values, 0.0)
    return weights


def _sums(config: "Config", weights: Tensor, mask: Tensor, dones: Tensor) -> Tensor:
    """(2, n), as `Weighed.sums`."""
    if config.baseline in _BY_AGE:
        return sums_by_age(weights, mask, dones)
    if config.baseline == "mean":
        return sum_and_count(weights, mask)[:, None]
    return weights.new_empty((2, 0), dtype=torch.float64)


# -- Over all rows -------------------------------------------------------------------------------


def sum_and_count(values: Tensor, mask: Tensor) -> Tensor:
    """(2,) float64: the sum of a shard's `values` where `mask`, and how many they are."""
    total = torch.where(mask, values, 0.0).sum(dtype=torch.float64)
    return torch.stack([total, mask.sum().to(torch.float64)])


def normalized(
    values: Sequence[Tensor], masks: Sequence[Tensor], combine: Combine = here
) -> list[Tensor]:
    """Shards' `values` with mean 0 and standard deviation 1 (n - 1) where their mask is True.

    Elsewhere they are 0. If the standard deviation is 0, or only one row counts, everything is.
    Mean and deviation are those of all shards of `combine`, which is called once.

    Example:
        >>> values, mask = torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False])
        >>> normalized([values], [mask])
        [tensor([-0.7071,  0.7071,  0.0000])]
    """
    own = [_moments(*pair) for pair in zip(values, masks, strict=True)]
    _, of_all = combine([each[:0] for each in own], own)
    count, mean, squares = functools.reduce(merged, of_all)
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    # NaN, of what was not finite, stays NaN; what no number can hold would make everything 0.
    largest = torch.finfo(values[0].dtype).max
    deviation = torch.where(deviation <= largest, deviation, torch.nan)
    return [
        torch.where(deviation == 0, 0.0, torch.where(mask, each - mean, 0.0) / deviation)
        for each, mask in zip(values, masks, strict=True)
    ]


def _moments(values: Tensor, mask: Tensor) -> Tensor:
    """(3,) float64: number, mean, and sum of squares about it, of `values` where `mask`."""
    total, count = sum_and_count(values, mask)
    mean = total / count.clamp(min=1)
    centred = torch.where(mask, values - mean, 0.0)
    # The square of what float32 holds need not be in it.
    return torch.stack([count, mean, centred.to(torch.float64).square().sum()])
