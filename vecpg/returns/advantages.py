"""Generalized advantages."""

import torch
from torch import Tensor

from vecpg.returns import operator, reference
from vecpg.returns.backend import is_served, say_cpu, writable
from vecpg.returns.checks import (
    check_gamma,
    check_out,
    check_rewards,
    check_row_inputs,
    check_values,
    has_derivatives,
    is_common_advantage,
    is_plain,
)
from vecpg.returns.to_go import reward_to_go


def generalized_advantage(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor | None = None,
    gamma: float | Tensor = None,  # type: ignore[assignment]  # needed, though dones are not
    gae_lambda: float | Tensor = None,  # type: ignore[assignment]
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
    row is masked, and nothing flows through it; with "skip" V' is the next real row's value, as if
    the rows in between were not there; with "decay" it is that value, and A the advantage,
    discounted by them; with "zero" a masked row is one whose reward and value are 0.

    Args:
        rewards: (T, *batch) float32, float64, bfloat16 or float16, any strides.
        values: the shape and dtype of `rewards`. V(s) of the state each action was taken in.
        dones: the shape of `rewards`, bool. True where the row's action ended its episode. None:
            no row does.
        gamma: as in `reward_to_go`.
        gae_lambda: in [0, 1]: a float, or a float tensor that broadcasts to `rewards`, such as
            (B,), one for each sequence of a (B, T) batch passed as `.mT`. There is no default.
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
    options = final_values, last_values, mask, mask_mode
    return _advantages(rewards, values, dones, gamma, gae_lambda, options, False, out, backend)


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor | None = None,
    gamma: float | Tensor = None,  # type: ignore[assignment]  # needed, though dones are not
    lam: float | Tensor = None,  # type: ignore[assignment]
    *,
    final_values: Tensor | None = None,
    last_values: Tensor | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "cut",
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Lambda-returns, TD(lambda)'s targets, restarting at the end of every episode.

        G[t] = r[t] + gamma[t] * ((1 - lambda[t]) * V'[t] + lambda[t] * G[t + 1])
        G[t] = r[t] + gamma[t] * V'[t]   where dones[t], and in the last row

    V'[t] is the value after the row, as in `generalized_advantage`. So G is `generalized_advantage`
    and V[t] together, rounded once; with lambda = 1 it is `reward_to_go`, with lambda = 0 it looks
    one step ahead. V[t] itself does not take part in G[t].

    Args:
        rewards: as in `generalized_advantage`.
        values: as in `generalized_advantage`: V(s) of the state each action was taken in, not of
            the one after it.
        dones: as in `generalized_advantage`.
        gamma: as in `generalized_advantage`.
        lam: lambda in [0, 1]: a float, or a float tensor that broadcasts.
        final_values: as in `generalized_advantage`.
        last_values: as in `generalized_advantage`.
        mask: as in `generalized_advantage`.
        mask_mode: as in `generalized_advantage`.
        out: as in `generalized_advantage`.
        backend: as in `generalized_advantage`.

    Returns:
        (T, *batch), dtype and device of `rewards`; differentiable in everything but the flags.

    Raises:
        TypeError: as `reward_to_go`.
        ValueError: as `reward_to_go`.
        RuntimeError: as `reward_to_go`.

    Numerics: float64 throughout, rounded once; to 16 bits by way of float32.
    Source: Sutton & Barto (2018), section 12.1; in this recursive form, section 12.8, equation
    12.20.

    Example:
        >>> ones, values = torch.ones(2), torch.tensor([8.0, 4.0])
        >>> lambda_returns(ones, values, torch.tensor([False, True]), 0.5, 0.5)
        tensor([2.2500, 1.0000])
    """
    options = final_values, last_values, mask, mask_mode
    return _advantages(rewards, values, dones, gamma, lam, options, True, out, backend)


def _advantages(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor | None,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    options: tuple[Tensor | None, Tensor | None, Tensor | None, str],
    plus_values: bool,
    out: Tensor | None,
    backend: str,
) -> Tensor:
    """Advantages, or with `plus_values` what they and the values add up to."""
    final_values, last_values, mask, mask_mode = options
    if (
        final_values is last_values is None
        and backend == "auto"
        and is_common_advantage(rewards, values, dones, gamma, gae_lambda, mask, mask_mode, out)
    ):
        say_cpu()
        out = writable(rewards, out)
        operator.write_common_advantage(
            rewards, values, dones, gamma, gae_lambda, mask, mask_mode, plus_values, out
        )
        return out
    check_rewards(rewards)
    check_values(values, rewards, "dones")
    dones, mask = check_row_inputs(rewards, dones, final_values, last_values, mask, mask_mode)
    options = final_values, last_values, mask, mask_mode
    scalar, gammas = check_gamma("gamma", gamma, rewards)
    scalar_lambda, lambdas = check_gamma(
        "lam" if plus_values else "gae_lambda", gae_lambda, rewards
    )
    given: dict[str, object] = {"rewards": rewards, "values": values, "dones": dones}
    given = {**given, "gamma": gamma, "gae_lambda": gae_lambda, "mask": mask}
    given = {**given, "final_values": final_values, "last_values": last_values}
    if out is not None:
        check_out(out, rewards, given)
    arguments = rewards, values, dones, scalar, gammas, scalar_lambda, lambdas
    if not is_served(backend, rewards):
        discounts, decays = (
            torch.full((), number, dtype=torch.float64, device=rewards.device)
            if one is None
            else one
            for number, one in ((scalar, gammas), (scalar_lambda, lambdas))
        )
        result = reference.generalized_advantage(
            rewards, values, dones, discounts, decays, *options, plus_values
        )
    elif not has_derivatives(gamma, gae_lambda):
        if is_plain((*given.values(), out)):
            out = writable(rewards, out)
            operator.write_advantage(*arguments, *options, plus_values, False, out)
            return out
        result = operator.differentiable_advantage(*arguments, *options, plus_values, False)
    else:
        discount = scalar if gammas is None else gammas
        decay = scalar_lambda if lambdas is None else lambdas
        result = _composed(rewards, values, dones, discount, decay, *options, plus_values, backend)
    return result if out is None else out.copy_(result)


def _composed(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    final_values: Tensor | None,
    last_values: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
    plus_values: bool,
    backend: str,
) -> Tensor:
    """Reward-to-go of the errors: where gamma or lambda take part in derivatives."""
    wide = torch.float64
    after = rewards.new_zeros((1, *rewards.shape[1:]), dtype=wide)
    if last_values is not None:
        after = last_values.to(wide)[None]
    known = values.to(wide)
    paid = rewards.to(wide)
    shown = known
    ends, passing = dones, mask
    if mask is not None:
        paid, known = torch.where(mask, paid, 0.0), torch.where(mask, known, 0.0)
        # Which value a row shows to the one before it: its own, or what its mode lets through.
        shown = known
        ends = dones & mask
        if mask_mode in ("skip", "decay"):
            discount = gamma if mask_mode == "decay" else 1.0
            shown = reward_to_go(known, mask, discount, last_values=after[0], backend=backend)
        if mask_mode == "zero":
            passing = None
    following = torch.cat([shown[1:], after]) if rewards.shape[0] else shown
    ending = after.new_zeros(()) if final_values is None else final_values.to(wide)
    after_row = torch.where(ends, ending, following)
    if passing is not None:
        after_row = torch.where(passing, after_row, 0.0)
    delta = paid + gamma * after_row - known
    result = reward_to_go(
        delta, ends, gamma * gae_lambda, mask=passing, mask_mode=mask_mode, backend=backend
    )
    result = result + known if plus_values else result
    result = result if mask is None else torch.where(mask, result, 0.0)
    return result.to(rewards.dtype)
