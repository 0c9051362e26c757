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
    if mask is not None:
        # A masked row pays nothing, and lets through what its mode says.
        paid = torch.where(mask, paid, 0.0)
        dones = dones & mask
        ends = torch.where(mask, dones, mask_mode == "cut")
        discount = torch.where(mask, discount, 1.0) if mask_mode == "skip" else discount
    # Here and below values are selected before anything is multiplied by them: what is not read may
    # be NaN, and 0 * NaN is NaN, in gradients too.
    if final_values is not None:
        paid = paid + discount * torch.where(dones, final_values, 0.0)

    if last_values is None:
        following = torch.zeros(rewards.shape[1:], dtype=torch.float64, device=rewards.device)
    else:
        following = last_values.to(torch.float64)
    rows = []
    for row_paid, row_discount, row_ends in zip(
        *(each.unbind()[::-1] for each in (paid, discount, ends)), strict=True
    ):
        following = row_paid + row_discount * torch.where(row_ends, 0.0, following)
        rows.append(following)
    if not rows:
        return torch.empty_like(rewards)
    returns = torch.stack(rows[::-1])
    if mask is not None:
        returns = torch.where(mask, returns, 0.0)
    return returns.to(rewards.dtype)
