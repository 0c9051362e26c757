"""The recurrence as a visible loop: plain torch, any device, the truth the others are tested by."""

import torch
from torch import Tensor


def reward_to_go(
    rewards: Tensor,
    dones: Tensor,
    gamma: Tensor,
    final_values: Tensor | None,
    last_values: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
) -> Tensor:
    """See `vecpg.returns.reward_to_go`; `gamma` is float64 and broadcasts to `rewards`.

    Every row is paid + discount * (what follows), where nothing follows an end.
    """
    paid = rewards.to(torch.float64)
    discount = gamma.expand(rewards.shape)
    ends = dones
    if final_values is not None:
        paid = paid + torch.where(dones, discount * final_values, 0.0)
    if mask is not None:
        # A masked row pays nothing, and lets through what its mode says.
        paid = torch.where(mask, paid, 0.0)
        ends = torch.where(mask, dones, mask_mode == "cut")
        discount = torch.where(mask, discount, 1.0) if mask_mode == "skip" else discount

    if last_values is None:
        following = torch.zeros(rewards.shape[1:], dtype=torch.float64, device=rewards.device)
    else:
        following = last_values.to(torch.float64)
    rows = []
    for row_paid, row_discount, row_ends in zip(
        *(each.flip(0) for each in (paid, discount, ends)), strict=True
    ):
        # Selected, not multiplied by 0: what follows an end may be NaN or infinite.
        following = row_paid + torch.where(row_ends, 0.0, row_discount * following)
        rows.append(following)
    if not rows:
        return torch.empty_like(rewards)
    returns = torch.stack(rows).flip(0)
    if mask is not None:
        returns = torch.where(mask, returns, 0.0)
    return returns.to(rewards.dtype)
