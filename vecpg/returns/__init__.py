"""Discounted returns over ragged episodes.

The contract lives here: the choice of a backend, and the call. Of vecpg only `kernels/` is
imported. Kernels are compiled when they are first called.
"""

import importlib.util
import logging

import torch
from torch import Tensor

from vecpg.kernels.announce import once
from vecpg.returns import operator, reference
from vecpg.returns.checks import (
    check_gamma,
    check_like,
    check_offsets,
    check_out,
    check_rewards,
    check_row_inputs,
    is_common,
    is_commonly_packed,
    is_eager,
    is_plain,
    name_of,
)

_BACKENDS = ("auto", "reference", "cpu", "cuda")
_ON_CPU = "returns on cpu: machine code"
_log = logging.getLogger(__name__)


def reward_to_go(
    rewards: Tensor,
    dones: Tensor,
    gamma: float | Tensor,
    *,
    final_values: Tensor | None = None,
    last_values: Tensor | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "cut",
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Discounted reward-to-go, restarting at the end of every episode.

        G[t] = r[t] + gamma[t] * (final_values[t] if dones[t] else G[t + 1]),   G[T] = last_values

    Values that are not given are 0. A masked row gets 0, and its reward, `dones` and `final_values`
    are ignored: they may hold NaN. What a masked row does to the rows before it is `mask_mode`:
    "cut" lets nothing through; "skip" is transparent, as if the row were not there; "decay" counts
    it as a row with reward 0, so the discount goes on.

    Args:
        rewards: (T, *batch) float32, float64, bfloat16 or float16, any strides. A (B, T) batch is
            passed as `rewards.mT`.
        dones: the shape of `rewards`, bool. True where the row's action ended its episode
            (terminated or truncated).
        gamma: discount per step in [0, 1]: a float, or a float tensor that broadcasts to
            `rewards`.
        final_values: the shape and dtype of `rewards`. The value of the state after the row, read
            where `dones`.
        last_values: (*batch), dtype of `rewards`. The value of the state after the last row, read
            where the last episode is still open.
        mask: the shape of `rewards`, bool. True = a real row.
        mask_mode: "cut", "skip" or "decay".
        out: a tensor like `rewards` to write to. It may not overlap an input, nor take part in
            gradients.
        backend: "auto" follows the device of `rewards`; "reference", "cpu" and "cuda" insist.

    Returns:
        (T, *batch), dtype and device of `rewards`; differentiable in `rewards`, `final_values`,
        `last_values` and a tensor `gamma`.

    Raises:
        TypeError: a dtype that is not as above, or an argument that is not a tensor.
        ValueError: shapes or devices that differ, gamma outside [0, 1], an unknown `mask_mode` or
            `backend`, an `out` that overlaps an input.
        RuntimeError: a backend that was asked for and is not there.

    Numerics: gamma is held and sums are formed in float64 and rounded once; to 16 bits by way of
    float32.
    Source: Williams (1992), section 3; Sutton & Barto (2018), section 13.3.

    Example:
        >>> rewards = torch.tensor([1.0, 1.0, 1.0])
        >>> dones = torch.tensor([False, True, False])
        >>> reward_to_go(rewards, dones, 0.5)
        tensor([1.5000, 1.0000, 1.0000])
        >>> reward_to_go(rewards, dones, 0.5, last_values=torch.tensor(4.0))
        tensor([1.5000, 1.0000, 3.0000])
    """
    if (
        final_values is last_values is None
        and backend == "auto"
        and is_common(rewards, dones, gamma, mask, mask_mode, out)
    ):
        once(_log, _ON_CPU)
        out = _writable(rewards, out)
        operator.write_common(rewards, dones, float(gamma), mask, mask_mode, out)
        return out
    check_rewards(rewards)
    check_row_inputs(rewards, dones, final_values, last_values, mask, mask_mode)
    scalar, gammas = check_gamma("gamma", gamma, rewards)
    given: dict[str, object] = {"rewards": rewards, "dones": dones, "gamma": gamma, "mask": mask}
    given |= {"final_values": final_values, "last_values": last_values}
    if out is not None:
        check_out(out, rewards, given)
    if not _is_served(backend, rewards):
        discounts = torch.tensor(scalar, dtype=torch.float64, device=rewards.device)
        discounts = discounts if gammas is None else gammas
        result = reference.reward_to_go(
            rewards, dones, discounts, final_values, last_values, mask, mask_mode
        )
        return result if out is None else out.copy_(result)
    arguments = (rewards, dones, scalar, gammas, final_values, last_values, mask, mask_mode)
    if is_plain((*given.values(), out)):
        out = _writable(rewards, out)
        operator.write(*arguments, out)
        return out
    result = operator.differentiable(*arguments)
    return result if out is None else out.copy_(result)


def packed_reward_to_go(
    rewards: Tensor,
    offsets: Tensor,
    gamma: float | Tensor,
    *,
    final_values: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Discounted reward-to-go of episodes that lie one after the other.

        G[t] = r[t] + gamma[t] * G[t + 1],   offsets[i] <= t < offsets[i + 1],
                                             G[offsets[i + 1]] = final_values[i]

    Args:
        rewards: (total,) float32, float64, bfloat16 or float16, any stride.
        offsets: (B + 1,) int64 from 0 to total, never decreasing: the layout of a jagged
            NestedTensor. Equal neighbours are an episode without steps.
        gamma: discount per step in [0, 1]: a float, or a float tensor that broadcasts to
            `rewards`.
        final_values: (B,), dtype of `rewards`. The value after each episode's last step; 0 if not
            given.
        backend: as in `reward_to_go`.

    Returns:
        (total,), dtype and device of `rewards`; differentiable in `rewards`, `final_values` and a
        tensor `gamma`.

    Raises:
        TypeError: a dtype that is not as above, or an argument that is not a tensor.
        ValueError: shapes or devices that differ, offsets or a gamma that are not as above. (On
            CUDA, and while a compiler traces, what the tensors hold is not looked at.)
        RuntimeError: a backend that was asked for and is not there.

    Numerics and source: as `reward_to_go`.

    Example:
        >>> rewards = torch.tensor([1.0, 1.0, 1.0])
        >>> packed_reward_to_go(rewards, torch.tensor([0, 2, 3]), 0.5)
        tensor([1.5000, 1.0000, 1.0000])
    """
    if (
        final_values is None
        and backend == "auto"
        and is_commonly_packed(rewards, offsets, gamma)
        and operator.is_partition(offsets, rewards.shape[0])
    ):
        once(_log, _ON_CPU)
        out = torch.empty_like(rewards)
        operator.write_packed(rewards, offsets, gamma, None, out)
        return out
    check_rewards(rewards)
    if rewards.ndim != 1:
        raise ValueError(
            f"rewards: expected (total,), got shape {tuple(rewards.shape)}; pass padded rewards to"
            " reward_to_go, with a mask"
        )
    check_offsets(offsets, rewards)
    if final_values is not None:
        check_like("final_values", final_values, rewards, rewards.dtype, (offsets.shape[0] - 1,))
    scalar, gammas = check_gamma("gamma", gamma, rewards)
    discount = scalar if gammas is None else gammas
    served = _is_served(backend, rewards)
    if served and is_plain((rewards, offsets, gamma, final_values)):
        out = torch.empty_like(rewards)
        operator.write_packed(rewards, offsets, discount, final_values, out)
        return out
    # An episode without steps writes behind the last element, which is then cut off.
    lasts = torch.where(offsets[1:] > offsets[:-1], offsets[1:] - 1, rewards.shape[0])
    dones = torch.zeros(rewards.shape[0] + 1, dtype=torch.bool, device=rewards.device)
    dones = dones.index_fill(0, lasts, True)[:-1]
    values = None
    if final_values is not None:
        values = rewards.new_zeros(rewards.shape[0] + 1).index_copy(0, lasts, final_values)[:-1]
    return reward_to_go(rewards, dones, discount, final_values=values, backend=backend)


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
        given |= {"gamma": gamma, "gae_lambda": gae_lambda, "mask": mask}
        given |= {"final_values": final_values, "last_values": last_values}
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


def _is_served(backend: str, rewards: Tensor) -> bool:
    """Whether a kernel serves a tensor, rather than the reference; says once which it is."""
    device = rewards.device.type
    if backend not in _BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(_BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return False
    if backend != "auto" and backend != device:
        raise RuntimeError(
            f"backend: expected one for {device} tensors, got {backend!r}; move the tensors to"
            f' {backend}, or pass backend="auto"'
        )
    has_triton = device == "cuda" and importlib.util.find_spec("triton") is not None
    if backend == "cuda" and not has_triton:
        raise RuntimeError(
            'backend: expected triton to be installed for "cuda", found none; pip install triton,'
            ' or pass backend="reference"'
        )
    served = device == "cpu" or has_triton
    if is_eager():
        how = "machine code" if served else "the reference backend, a loop over time"
        once(_log, f"returns on {device}: {how}")
    return served


def _writable(rewards: Tensor, out: Tensor | None) -> Tensor:
    """`out`, with autograd told that it changes, or a new tensor."""
    if out is None:
        return torch.empty_like(rewards)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


__all__ = ["generalized_advantage", "packed_reward_to_go", "reward_to_go"]
