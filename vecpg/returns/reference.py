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
    """See `vecpg.returns.reward_to_go`; `gamma` is float64 and broadcasts to `rewards`."""
    gamma = gamma.expand(rewards.shape)
    zero = torch.zeros(rewards.shape[1:], dtype=torch.float64, device=rewards.device)
    carry = zero if last_values is None else last_values.to(torch.float64)
    rows = []
    for t in reversed(range(rewards.shape[0])):
        ending = zero if final_values is None else final_values[t].to(torch.float64)
        row = rewards[t].to(torch.float64) + gamma[t] * torch.where(dones[t], ending, carry)
        if mask is None:
            carry = row
        else:
            through = {"cut": zero, "skip": carry, "decay": gamma[t] * carry}[mask_mode]
            carry = torch.where(mask[t], row, through)
            row = torch.where(mask[t], row, zero)
        rows.append(row)
    if not rows:
        return torch.empty_like(rewards)
    return torch.stack(rows[::-1]).to(rewards.dtype)
