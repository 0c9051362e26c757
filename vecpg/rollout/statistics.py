"""Return and length of every episode of a rollout."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vecpg.kernels.jit import jit
from vecpg.kernels.sums import in_order
from vecpg.rollout.data import Rollout


@dataclass(frozen=True, slots=True)
class Episodes:
    """The episodes of a rollout, in order of (environment, start).

    returns:    (episodes,) float64, undiscounted.
    lengths:    (episodes,) int64.
    return_sum: float64 without dimensions: each shard's sum, added in shard order.
    """

    returns: Tensor
    lengths: Tensor
    return_sum: Tensor


@dataclass(frozen=True, slots=True)
class Tally:
    """What all environments of an iteration came to together.

    counted:     rows that count.
    rows:        T, of the longest collection.
    episodes:    how many ended.
    return_sum:  of their returns; float64 without dimensions, as the next three.
    return_low:  the smallest return.
    return_high: the largest.
    length:      the mean length of an episode.
    sums:        what a baseline needs: (2, n) float64, as `vecpg.advantage.add_by_age` gives it.
    """

    counted: int
    rows: int
    episodes: int
    return_sum: Tensor
    return_low: Tensor
    return_high: Tensor
    length: Tensor
    sums: Tensor


def tally(rollout: Rollout, episodes: Episodes, sums: Tensor) -> Tally:
    """That of a rollout which is the whole.

    On CUDA the host waits only where the rollout does not say which rows count.

    Args:
        rollout: whole episodes.
        episodes: of it.
        sums: as `Tally` has them.
    """
    counted = rollout.mask.sum() if rollout.counted is None else len(rollout.counted)
    return Tally(
        int(counted),
        len(rollout.mask),
        len(episodes.returns),
        episodes.return_sum,
        episodes.returns.min(),
        episodes.returns.max(),
        episodes.lengths.to(torch.float64).mean(),
        sums,
    )


def episode_statistics(rollout: Rollout, shards: int = 1) -> Episodes:
    """Undiscounted return and length of every episode.

    On CUDA the host waits only where the rollout does not say how many there are, or is sharded.

    Args:
        rollout: whole episodes.
        shards: groups of environments; the sum of returns is formed for each of them.

    Example:
        >>> rewards = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> ends = torch.tensor([[False, True], [True, False]])
        >>> rows = Rollout(
        ...     torch.zeros(2, 2, 1), torch.zeros(2, 2, dtype=torch.int64), rewards, ends,
        ...     torch.zeros_like(ends), torch.tensor([[True, True], [True, False]]),
        ...     torch.zeros(0, 1), torch.zeros(0, 2, dtype=torch.int64))
        >>> episodes = episode_statistics(rows)
        >>> episodes.returns, episodes.lengths, episodes.return_sum
        (tensor([4., 2.], dtype=torch.float64), tensor([2, 1]), tensor(6., dtype=torch.float64))
    """
    parts = [_statistics(shard) for shard in rollout.shards(shards)]
    returns, lengths = zip(*parts, strict=True)
    return Episodes(
        torch.cat(returns), torch.cat(lengths), in_order([own.sum() for own in returns])
    )


def _statistics(rollout: Rollout) -> tuple[Tensor, Tensor]:
    if rollout.mask.device.type == "cpu" and rollout.rewards.dtype == torch.float32:
        return _statistics_on_host(rollout)
    return _statistics_in_torch(rollout)


def _statistics_on_host(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """As `_statistics_in_torch`, in one pass."""
    mask, dones = rollout.mask.numpy(), rollout.dones.numpy()
    begins = _count(mask, dones).cumsum()
    returns, lengths = np.empty(begins[-1]), np.empty(begins[-1], np.int64)
    _add_up(rollout.rewards.detach().numpy(), mask, dones, begins, returns, lengths)
    return torch.from_numpy(returns), torch.from_numpy(lengths)


def prepare_statistics(device: torch.device) -> None:
    """Compile, or load, what the statistics of a rollout on a device will need."""
    if device.type != "cpu":
        return
    number, flags = np.zeros(1), np.zeros((1, 1), np.bool_)
    rewards, whole = np.zeros((1, 1), np.float32), np.zeros(1, np.int64)
    _count(flags, flags)
    _add_up(rewards, flags, flags, whole, number, whole)


def _statistics_in_torch(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """The reference, on any device. A host waits if it has to ask how many episodes there are."""
    mask, ends = rollout.mask, rollout.dones & rollout.mask
    num_envs = mask.shape[1]
    num_episodes = rollout.num_episodes
    if num_episodes is None:
        num_episodes = int(ends.sum())
    n = torch.arange(num_envs, device=mask.device)
    # Each end's place among all, in order of (environment, start); other rows go behind.
    ended = ends.cumsum(dim=0)
    before = ended[-1].cumsum(dim=0) - ended[-1] - 1
    place = torch.where(ends, ended + before, num_episodes + n).reshape(-1)
    rows = torch.arange(ends.numel(), device=mask.device)
    places = rows.new_empty(num_episodes + num_envs).scatter_(0, place, rows)[:num_episodes]
    # CUDA adds up one column alone in an order that differs between calls, but not two.
    paid = torch.where(mask, rollout.rewards, 0.0).expand(-1, max(2, num_envs))
    totals = paid.cumsum(dim=0, dtype=torch.float64)[:, :num_envs]
    steps = mask.cumsum(dim=0)
    first = torch.ones_like(places, dtype=torch.bool)
    first[1:] = (places % num_envs).diff() != 0
    returns, lengths = (
        _differences(each.reshape(-1).index_select(0, places), first) for each in (totals, steps)
    )
    return returns, lengths


def _differences(values: Tensor, first: Tensor) -> Tensor:
    return torch.where(first, values, values.diff(prepend=values[:1]))


@jit
def _count(mask, dones):  # type: ignore[no-untyped-def]
    """0, and of every environment how many episodes it ended."""
    counts = np.zeros(mask.shape[1] + 1, np.int64)
    for t in range(len(mask)):
        counted, ends = mask[t], dones[t]
        for n in range(len(counted)):
            counts[n + 1] += counted[n] & ends[n]
    return counts


@jit
def _add_up(rewards, mask, dones, begins, returns, lengths):  # type: ignore[no-untyped-def]
    """Write every episode's return and length, from where those of its environment begin."""
    num_envs = mask.shape[1]
    at = begins.copy()
    total, steps = np.zeros(num_envs), np.zeros(num_envs, np.int64)
    for t in range(len(mask)):
        for n in range(num_envs):
            if mask[t, n]:
                total[n] += rewards[t, n]
                steps[n] += 1
                if dones[t, n]:
                    returns[at[n]], lengths[at[n]] = total[n], steps[n]
                    at[n] += 1
                    total[n], steps[n] = 0.0, 0
