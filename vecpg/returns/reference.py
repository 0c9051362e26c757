"""The recurrences as visible loops: plain torch, any device, the truth the others are tested by."""

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


def generalized_advantage(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    gamma: Tensor,
    gae_lambda: Tensor,
    final_values: Tensor | None,
    last_values: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
    plus_values: bool,
) -> Tensor:
    """See `vecpg.returns.generalized_advantage`; gamma and lambda are float64 and broadcast.

    With `plus_values` it is `lambda_returns`: the advantage and the value, rounded together.
    """
    wide, shape = torch.float64, rewards.shape
    advantage = torch.zeros(shape[1:], dtype=wide, device=rewards.device)
    value = advantage if last_values is None else last_values.to(wide)
    final = torch.zeros_like(rewards) if final_values is None else final_values
    real = torch.ones_like(dones) if mask is None else mask
    rows = []
    timed = rewards, values, dones, final, real, gamma.expand(shape), gae_lambda.expand(shape)
    for r, v, done, last, counts, discount, decay in zip(
        *(each.unbind()[::-1] for each in timed), strict=True
    ):
        # Selected before they are multiplied, as above.
        done = done & counts
        paid, own = torch.where(counts, r, 0.0).to(wide), torch.where(counts, v, 0.0).to(wide)
        following = paid + discount * torch.where(done, torch.where(done, last, 0.0), value)
        following = following + discount * decay * torch.where(done, 0.0, advantage)
        rows.append(torch.where(counts, following if plus_values else following - own, 0.0))
        if mask_mode == "cut":
            passed, shown = torch.zeros_like(advantage), torch.zeros_like(value)
        elif mask_mode == "skip":
            passed, shown = advantage, value
        elif mask_mode == "decay":
            passed, shown = discount * decay * advantage, discount * value
        else:
            passed = discount * value + discount * decay * advantage
            shown = torch.zeros_like(value)
        advantage = torch.where(counts, following - own, passed)
        value = torch.where(counts, own, shown)
    if not rows:
        return torch.empty_like(rewards)
    return torch.stack(rows[::-1]).to(rewards.dtype)
