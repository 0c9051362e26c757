"""Generalized advantages."""

import torch
from torch import Tensor

from vecpg.returns.checks import (
    check_gamma,
    check_like,
    check_out,
    check_rewards,
    check_row_inputs,
    name_of,
)
from vecpg.returns.to_go import reward_to_go


def generalized_advantage(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    *,
    final_values: Tensor | None = None,
    last_values: Tensor | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "cut",
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Generalized advantages, restarting at the end of every episode.

        A[t] = delta[t] + gamma[t] * lambda[t] * (0 if dones[t] else A[t + 1]),   A[T] = 0
        delta[t] = r[t] + gamma[t] * V'[t] - V[t]

    V'[t] is `final_values[t]` where `dones` (0 if not given), else the value of the next row, and
    `last_values` after the last row (0 if not given). With lambda = 1, A + V is `reward_to_go`.

    Masked rows get 0, and nothing of them is read. With `mask_mode` "cut" V' is 0 where the next
    row is masked; with "skip" it is the next real row's value; with "decay" that value discounted
    by the masked rows in between.

    Args:
        rewards: (T, *batch) float32, float64, bfloat16 or float16, any strides.
        values: the shape and dtype of `rewards`. V(s) of the state each action was taken in.
        dones: the shape of `rewards`, bool. True where the row's action ended its episode.
        gamma: discount per step in [0, 1]: a float, or a float tensor that broadcasts.
        gae_lambda: in [0, 1]: a float, or a float tensor that broadcasts.
        final_values: as in `reward_to_go`.
        last_values: as in `reward_to_go`.
        mask: as in `reward_to_go`.
        mask_mode: as in `reward_to_go`.
        out: as in `reward_to_go`.
        backend: as in `reward_to_go`.

    Returns:
        (T, *batch), dtype and device of `rewards`; differentiable in everything but the flags.

    Raises:
        TypeError: as `reward_to_go`.
        ValueError: as `reward_to_go`.
        RuntimeError: as `reward_to_go`.

    Numerics: float64 throughout, rounded once.
    Source: Schulman et al. (2016), "High-dimensional continuous control using generalized advantage
    estimation", section 3, equation 16.

    Example:
        >>> ones, dones = torch.ones(2), torch.tensor([False, True])
        >>> generalized_advantage(ones, torch.zeros(2), dones, 0.5, 1.0)
        tensor([1.5000, 1.0000])
    """
    check_rewards(rewards)
    if isinstance(values, Tensor) and values.dtype == torch.bool:
        raise TypeError(
            f"values: expected {name_of(rewards.dtype)}, got bool; pass rewards, values, dones, in"
            " this order"
        )
    check_like("values", values, rewards, rewards.dtype)
    check_row_inputs(rewards, dones, final_values, last_values, mask, mask_mode)
    scalar, gammas = check_gamma("gamma", gamma, rewards)
    scalar_lambda, lambdas = check_gamma("gae_lambda", gae_lambda, rewards)
    if out is not None:
        given: dict[str, object] = {"rewards": rewards, "values": values, "dones": dones}
        given = {**given, "gamma": gamma, "gae_lambda": gae_lambda, "mask": mask}
        given = {**given, "final_values": final_values, "last_values": last_values}
        check_out(out, rewards, given)

    wide = torch.float64
    discount = scalar if gammas is None else gammas
    after = rewards.new_zeros((1, *rewards.shape[1:]), dtype=wide)
    if last_values is not None:
        after = last_values.to(wide)[None]
    known = values.to(wide)
    paid = rewards.to(wide)
    if mask is None:
        reached = known
    else:
        paid, known = torch.where(mask, paid, 0.0), torch.where(mask, known, 0.0)
        # Which value a row shows to the one before it: its own, or what its mode lets through.
        closed = mask if mask_mode != "cut" else torch.ones_like(mask)
        passing = discount if mask_mode == "decay" else 1.0
        reached = reward_to_go(known, closed, passing, last_values=after[0], backend=backend)
    following = torch.cat([reached[1:], after]) if rewards.shape[0] else reached
    ending = after.new_zeros(()) if final_values is None else final_values.to(wide)
    after_row = torch.where(dones, ending, following)
    if mask is not None:
        after_row = torch.where(mask, after_row, 0.0)
    delta = paid + discount * after_row - known
    factor = scalar_lambda if lambdas is None else lambdas
    result = reward_to_go(
        delta, dones, discount * factor, mask=mask, mask_mode=mask_mode, backend=backend
    ).to(rewards.dtype)
    return result if out is None else out.copy_(result)
