"""Value targets and advantages of a policy other than the one that acted."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vecpg.kernels import kept
from vecpg.returns import trace
from vecpg.returns.backend import is_served, say_cpu
from vecpg.returns.checks import (
    check_gamma,
    check_like,
    check_rewards,
    check_row_inputs,
    check_values,
    is_alike,
    is_common_advantage,
    is_plain,
    name_of,
)


class VTrace(NamedTuple):
    """What `vtrace` returns: both (T, *batch), 0 where masked."""

    targets: Tensor
    advantages: Tensor


def vtrace(
    rewards: Tensor,
    values: Tensor,
    log_ratios: Tensor,
    dones: Tensor | None = None,
    gamma: float | Tensor = None,  # type: ignore[assignment]  # needed, though dones are not
    *,
    lam: float | Tensor = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    final_values: Tensor | None = None,
    last_values: Tensor | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "cut",
    backend: str = "auto",
) -> VTrace:
    """V-trace: value targets and policy-gradient advantages from another policy's actions.

        x[t] = rho[t] * delta[t] + gamma[t] * c[t] * x'[t]
        delta[t] = r[t] + gamma[t] * V'[t] - V[t]
        targets[t] = V[t] + x[t]
        advantages[t] = rho[t] * (delta[t] + gamma[t] * x'[t])

    rho = min(rho_bar, ratio) and c = lambda * min(c_bar, ratio), where ratio = exp(log_ratios) is
    pi(a|s) / mu(a|s), of the policy that learns over the one that acted. x'[t] is x[t + 1], 0 where
    `dones` and after the last row. V'[t] is `final_values[t]` where `dones` (0 if not given), else
    the value of the next row, and `last_values` after the last row (0 if not given). So V' + x' is
    the target of the next state. Acting on the policy that learns (log_ratios = 0), targets - V is
    `generalized_advantage`, and with lambda = 1 the targets are `reward_to_go`.

    Masked rows get 0, and nothing of them is read. With `mask_mode` "cut" V' and x' are 0 where the
    next row is masked; with "skip" they are the next real row's; with "decay" they are
    those, V' discounted by the rows in between, and x' by gamma * c with a ratio of 1; with "zero"
    a masked row is one whose reward, value and log-ratio are 0.

    Args:
        rewards: (T, *batch) float32, float64, bfloat16 or float16, any strides.
        values: the shape and dtype of `rewards`. V(s) of the state each action was taken in.
        log_ratios: the shape and dtype of `rewards`. log pi(a|s) - log mu(a|s).
        dones: as in `generalized_advantage`.
        gamma: as in `reward_to_go`.
        lam: lambda in [0, 1], what c is lowered by (remark 2 of the paper): a float, or a float
            tensor that broadcasts.
        rho_bar: the bound of the weight of an error, at least 0; `math.inf` is none. It decides
            which policy the targets are of.
        c_bar: the bound of the weights that errors are traced back with, at least 0.
        final_values: as in `reward_to_go`.
        last_values: as in `reward_to_go`.
        mask: as in `reward_to_go`.
        mask_mode: as in `reward_to_go`.
        backend: as in `reward_to_go`.

    Returns:
        `targets` and `advantages`, each (T, *batch), dtype and device of `rewards`; differentiable
        in everything but the flags and bounds. A ratio above its bound has gradient 0; at the bound
        it has its own.

    Raises:
        TypeError: as `reward_to_go`.
        ValueError: as `reward_to_go`, and a bound that is negative.
        RuntimeError: as `reward_to_go`.

    Numerics: float64 throughout, rounded once.
    Source: Espeholt et al. (2018), "IMPALA: scalable distributed deep-RL with importance weighted
    actor-learner architectures", sections 4.1 (equation 1, remark 2) and 4.2.

    Example:
        >>> rewards, dones = torch.ones(2), torch.tensor([False, True])
        >>> log_ratios = torch.tensor([0.0, 0.5]).log()
        >>> vtrace(rewards, torch.zeros(2), log_ratios, dones, 0.5)
        VTrace(targets=tensor([0.0000, 0.5000]), advantages=tensor([0.0000, 0.5000]))
    """
    if (
        final_values is last_values is None
        and backend == "auto"
        and is_common_advantage(rewards, values, dones, gamma, lam, mask, mask_mode, None)
        and is_alike(log_ratios, rewards)
        and _is_bound(rho_bar)
        and _is_bound(c_bar)
    ):
        say_cpu()
        written = kept.empty_like(rewards), kept.empty_like(rewards)
        read = rewards, values, log_ratios, dones, gamma, lam
        trace.write_common(*read, rho_bar, c_bar, None, None, mask, mask_mode, *written)
        return VTrace(*written)
    check_rewards(rewards)
    check_values(values, rewards, "log_ratios, dones")
    if isinstance(log_ratios, Tensor) and log_ratios.dtype == torch.bool:
        raise TypeError(
            f"log_ratios: expected {name_of(rewards.dtype)}, got bool; pass rewards, values,"
            " log_ratios, dones, in this order"
        )
    check_like("log_ratios", log_ratios, rewards, rewards.dtype)
    dones, mask = check_row_inputs(rewards, dones, final_values, last_values, mask, mask_mode)
    scalar, gammas = check_gamma("gamma", gamma, rewards)
    scalar_lambda, lambdas = check_gamma("lam", lam, rewards)
    _check_bound("rho_bar", rho_bar)
    _check_bound("c_bar", c_bar)

    served = is_served(backend, rewards)
    factor = scalar_lambda if lambdas is None else lambdas
    discount = scalar if gammas is None else gammas
    inputs = rewards, values, log_ratios, final_values, last_values
    if served and rewards.is_cpu and is_plain((dones, gamma, lam, mask)):
        # Only their memory is asked about: there are derivatives with respect to these.
        with torch.no_grad():
            has_memory = is_plain(inputs)
        if has_memory and trace.are_matrices((*inputs[:4], dones, discount, factor, mask)):
            options = dones, discount, factor, rho_bar, c_bar, mask, mask_mode
            written = trace.in_machine_code(inputs, options)
            return VTrace(*(each.to(rewards.dtype) for each in written))
    arguments: tuple[Any, ...] = (rewards, values, log_ratios, dones, discount, factor)
    arguments += (rho_bar, c_bar, final_values, last_values, mask, mask_mode)
    how = trace.composed if served else _looped
    targets, advantages = how(*arguments)
    return VTrace(targets.to(rewards.dtype), advantages.to(rewards.dtype))


def _looped(
    rewards: Tensor,
    values: Tensor,
    log_ratios: Tensor,
    dones: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
    rho_bar: float,
    c_bar: float,
    final_values: Tensor | None,
    last_values: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
) -> tuple[Tensor, Tensor]:
    """The reference: a visible loop over time."""
    wide = torch.float64
    zero = torch.zeros((), dtype=wide, device=rewards.device)
    error = zero.expand(rewards.shape[1:])
    after = error if last_values is None else last_values.to(wide)
    gammas, lams = (
        (zero + each).expand(rewards.shape) if isinstance(each, float) else each
        for each in (gamma, lam)
    )
    targets, advantages = [], []
    for t in range(rewards.shape[0] - 1, -1, -1):
        real = torch.ones_like(dones[t]) if mask is None else mask[t]
        r, v, log_ratio = (
            torch.where(real, each[t].to(wide), zero) for each in (rewards, values, log_ratios)
        )
        final = zero if final_values is None else final_values[t].to(wide)
        ends = dones[t] & real
        rho, c = trace.bounded(log_ratio, rho_bar), lams[t] * trace.bounded(log_ratio, c_bar)
        shown = torch.where(ends, final, after)
        shown = torch.where(real | (mask_mode == "zero"), shown, zero)
        behind = torch.where(ends, zero, error)
        delta = r + gammas[t] * shown - v
        x = rho * delta + gammas[t] * c * behind
        targets.append(torch.where(real, v + x, zero))
        advantages.append(torch.where(real, rho * (delta + gammas[t] * behind), zero))
        passed = {
            "cut": (zero, zero),
            "skip": (error, after),
            "decay": (gammas[t] * c * error, gammas[t] * after),
            "zero": (x, v),
        }[mask_mode]
        error, after = torch.where(real, x, passed[0]), torch.where(real, v, passed[1])
    if not targets:
        return torch.empty_like(rewards), torch.empty_like(rewards)
    return torch.stack(targets[::-1]), torch.stack(advantages[::-1])


def _is_bound(bound: float) -> bool:
    return type(bound) is float and bound >= 0.0


def _check_bound(name: str, bound: float) -> None:
    if isinstance(bound, bool) or not isinstance(bound, (int, float)):
        raise TypeError(
            f"{name}: expected a float, got {type(bound).__name__}; pass 1.0, or math.inf"
        )
    if not bound >= 0.0:
        raise ValueError(f"{name}: expected 0 or more, got {bound}; pass 1.0")
