"""Advantages of completions within their groups: leave-one-out, or standardized."""

import torch
from torch import Tensor

from vecpg.returns.checks import check_mask, check_rewards, is_eager, name_of

_KINDS = ("rloo", "grpo")
_REMEDY = "pass one id for each reward, or offsets: the sizes' cumsum(0) behind a 0"


def group_advantage(
    rewards: Tensor, groups: Tensor, *, kind: str = "rloo", mask: Tensor | None = None
) -> Tensor:
    """Advantages of completions over the others of their group.

        "rloo":  A[i] = r[i] - mean of r over the other counted members of i's group
        "grpo":  A[i] = (r[i] - mean) / std,  both over the counted members of i's group

    std is that of a sample (n - 1). A member that is alone has no others: with "rloo" the baseline
    is then 0 and A[i] = r[i]; with "grpo" A[i] = 0, as in a group whose rewards are all equal: no
    NaN, and no epsilon in the divisor. A masked completion gets 0, and its reward is not read: it
    may be NaN.

    Args:
        rewards: (B,) float32, float64, bfloat16 or float16. One number for each completion.
        groups: int64 or int32, either (B,) ids: equal numbers are one group, any numbers in any
            order; or (G + 1,) offsets from 0 to B that never decrease: completions offsets[g] to
            offsets[g + 1] - 1 are group g, and equal neighbours an empty one. B numbers are always
            ids. B numbers that could be offsets (from 0 to B, never falling: B - 1 groups) are
            refused; on CUDA and while a compiler traces, where numbers are not looked at, the
            result is then NaN.
        kind: "rloo" or "grpo".
        mask: (B,) bool, or numbers that are 0 or 1. True = counted.

    Returns:
        (B,), dtype and device of `rewards`; differentiable in `rewards`, any number of times.

    Raises:
        TypeError: a dtype that is not as above, or an argument that is not a tensor.
        ValueError: shapes or devices that differ, offsets that are not as above, B numbers that
            could be either, a mask with other numbers, an unknown `kind`.

    Numerics: float64 throughout, rounded once. What is summed are differences from one member, so
    equal rewards give 0 exactly, and large ones keep their digits. The order of completions changes
    no more than the last rounding.
    Source: Kool et al. (2019), "Buy 4 REINFORCE samples, get a baseline for free!"; Shao et al.
    (2024), "DeepSeekMath", section 4.1.2.

    Example:
        >>> rewards = torch.tensor([1.0, 0.0, 2.0, 5.0])
        >>> group_advantage(rewards, torch.tensor([7, 7, 7, 3]))
        tensor([ 0.0000, -1.5000,  1.5000,  5.0000])
        >>> group_advantage(rewards, torch.tensor([0, 3, 4]), kind="grpo")
        tensor([ 0., -1.,  1.,  0.])
    """
    check_rewards(rewards)
    if rewards.ndim != 1:
        raise ValueError(
            f"rewards: expected (B,), got shape {tuple(rewards.shape)}; pass one number for each"
            " completion: token rewards.sum(-1), or rewards.flatten() where a row is a group"
        )
    if kind not in _KINDS:
        raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {kind!r}")
    is_seen = _check_groups(groups, rewards)
    given = check_mask(mask, "cut", rewards)
    counts = torch.ones_like(rewards, dtype=torch.bool) if given is None else given
    size = rewards.shape[0]
    if size == 0:
        return rewards.clone()

    are_ids = groups.shape[0] == size
    group = _number(groups) if are_ids else _find(groups, size)
    wide = torch.float64
    # As many as there can be groups, whatever the numbers are.
    nothing = torch.zeros(max(size, groups.shape[0]), dtype=wide, device=rewards.device)

    def total(values: Tensor) -> Tensor:
        if nothing.is_cpu:
            return nothing.scatter_add(0, group, values).gather(0, group)
        # Not these, which on CUDA add in any order, here or in the gradient: index_put sorts.
        return nothing.index_put((group,), values, accumulate=True)[group]

    paid = rewards.to(wide)
    # Selected before anything is multiplied by it: a masked reward may be NaN.
    apart = torch.where(counts, paid - _of_first(paid.detach(), counts, group, len(nothing)), 0.0)
    members = total(counts.to(wide))
    others = (members - 1.0).clamp(min=1.0)
    away = torch.where(counts, apart - total(apart) / members.clamp(min=1.0), 0.0)
    if kind == "rloo":
        result = torch.where(members > 1.0, away * (members / others), paid)
    else:
        variance = total(away.square()) / others
        differ = variance != 0.0
        result = torch.where(differ, away / torch.where(differ, variance, 1.0).sqrt(), 0.0)
    result = torch.where(counts, result, 0.0)
    if are_ids and not is_seen:
        result = torch.where(_could_be_offsets(groups, size), torch.nan, result)
    return result.to(rewards.dtype)


def _number(ids: Tensor) -> Tensor:
    """Ids as numbers from 0, for each completion; without a shape that depends on the ids."""
    ordered, order = ids.sort(stable=True)
    is_new = torch.cat([torch.zeros_like(order[:1]), (ordered[1:] != ordered[:-1]).long()])
    return torch.zeros_like(order).scatter(0, order, is_new.cumsum(0))


def _find(offsets: Tensor, size: int) -> Tensor:
    """The group that each completion lies in."""
    # As many groups as there are ends up to it lie before it.
    ends = offsets[1:].long().clamp(0, size)
    return ends.new_zeros(size + 1).scatter_add(0, ends, torch.ones_like(ends)).cumsum(0)[:size]


def _of_first(values: Tensor, counts: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """The value of the group's first counted member, for each completion."""
    size = len(values)
    places = torch.where(counts, torch.arange(size, device=values.device), size - 1)
    lasts = places.new_full((num_groups,), size - 1)
    firsts = lasts.scatter_reduce(0, group, places, "amin")
    return values.gather(0, firsts.gather(0, group))


def _could_be_offsets(groups: Tensor, size: int) -> Tensor:
    rises = (groups[1:] >= groups[:-1]).all()
    return (groups[0] == 0) & (groups[-1] == size) & rises


def _check_groups(groups: Tensor, rewards: Tensor) -> bool:
    """Ids, or offsets that are right; returns whether the numbers were looked at."""
    if not isinstance(groups, Tensor):
        remedy = (
            "torch.tensor(groups), or of names np.unique(groups, return_inverse=True)[1] as one"
        )
        if isinstance(groups, int):
            remedy = "torch.arange(len(rewards)) // n for groups of n that lie together"
        raise TypeError(f"groups: expected a tensor, got {type(groups).__name__}; pass {remedy}")
    if groups.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"groups: expected int64 or int32, got {name_of(groups.dtype)}; pass groups.long()"
        )
    if groups.device != rewards.device:
        raise ValueError(
            f"groups: expected a tensor on {rewards.device} like rewards, got {groups.device};"
            " pass groups.to(rewards.device)"
        )
    if groups.ndim != 1 or groups.shape[0] == 0 != rewards.shape[0]:
        raise ValueError(
            f"groups: expected shape ({rewards.shape[0]},) or (G + 1,), got {tuple(groups.shape)};"
            f" {_REMEDY}"
        )
    if groups.device.type != "cpu" or not is_eager():
        return False
    size = rewards.shape[0]
    if groups.shape[0] == size:
        if size and bool(_could_be_offsets(groups, size)):
            raise ValueError(
                f"groups: expected ids or offsets, got {size} numbers that could be either, from 0"
                f" to {size}; pass groups + 1 for ids, or for offsets"
                " torch.arange(len(groups) - 1).repeat_interleave(groups.diff())"
            )
    elif not bool(_could_be_offsets(groups, size)):
        raise ValueError(
            f"groups: expected {size} ids, or offsets from 0 to {size} that never decrease, got"
            f" {groups.shape[0]} numbers from {groups[0]} to {groups[-1]}; {_REMEDY}"
        )
    return True
