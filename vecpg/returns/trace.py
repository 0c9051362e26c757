"""V-trace by what there is for returns, and in machine code with gradients of its own.

The first is what compilers, maps and derivatives of derivatives go through, and what serves CUDA.
"""

import functools
import importlib
import math
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vecpg.kernels import kept
from vecpg.returns import operator
from vecpg.returns.checks import is_plain
from vecpg.returns.to_go import reward_to_go


def composed(
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
    """The errors x are a reward-to-go: of rho * delta, with the discount gamma * c."""
    wide = torch.float64
    # Selected before anything is done with it: what is masked may be NaN.
    paid, known, logs = (_selected(mask, each.to(wide)) for each in (rewards, values, log_ratios))
    zero = torch.zeros((), dtype=wide, device=rewards.device)
    none = zero.expand(rewards.shape[1:])
    last = none if last_values is None else last_values.to(wide)
    final = zero if final_values is None else final_values.to(wide)
    rho = bounded(logs, rho_bar)
    through = gamma * (lam * (rho if c_bar == rho_bar else bounded(logs, c_bar)))
    # What a row shows to the one before it, its value and its error, is its own or what its mode
    # lets through.
    reached, closed = known, dones
    if mask is not None:
        dones = closed = dones & mask
        if mask_mode == "cut":
            closed = torch.where(mask, dones, True)
        elif mask_mode != "zero":
            passing = gamma if mask_mode == "decay" else 1.0
            reached = reward_to_go(known, mask, passing, last_values=last)
            through = torch.where(mask, through, 1.0) if mask_mode == "skip" else through
    # Masked rows have no error, unless they count as rows that are 0.
    stands = None if mask_mode == "zero" else mask
    after = _selected(stands, torch.where(dones, final, _next(reached, last)))
    delta = _selected(stands, rho * (paid + gamma * after - known))
    # The operator, since a bound above 1 makes this a discount above 1.
    traces = through.expand(delta.shape)
    error = operator.differentiable(delta, closed, 0.0, traces, None, None, None, "cut")
    advantages = delta + rho * gamma * torch.where(dones, zero, _next(error, none))
    return _selected(mask, known + error), _selected(mask, advantages)


def in_machine_code(inputs: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The same on the CPU, of tensors whose memory can be read and has the strides of matrices.

    Inputs, which there are derivatives with respect to: rewards, values, log-ratios, final and last
    values. Options: flags, gamma, lambda, two bounds, mask, its mode.
    """
    if is_plain(inputs):
        targets, advantages = _write(inputs, options, 2)
        return targets, advantages
    if inputs[0].dtype.itemsize == 2:  # what the adjoint reads is rounded too
        inputs = tuple(None if each is None else each.float() for each in inputs)
    targets, advantages = _Trace.apply(*inputs, *options)  # type: ignore[no-untyped-call]
    return targets, advantages


def write_common(*arguments: Any) -> None:
    """Write V-trace of (T, N) tensors on the CPU, as its kernel takes them."""
    _kernels().vtrace(*arguments)


def are_matrices(given: Iterable[object]) -> bool:
    """Whether each that is a tensor has memory, with the strides of a matrix."""
    try:
        for each in given:
            if isinstance(each, Tensor):
                _matrix(each).data_ptr()  # autograd's batches of gradients have none
    except RuntimeError:
        return False
    return True


def _matrix(given: Any) -> Any:
    """(T, *batch) as (T, N), without a copy; what is no tensor as it is."""
    if not isinstance(given, Tensor) or given.ndim == 2:
        return given
    return given.view(len(given), math.prod(given.shape[1:]))


@functools.cache
def _kernels() -> ModuleType:
    """Imported when first needed: Numba takes a second."""
    return importlib.import_module("vecpg.returns.cpu_off_policy")


def _write(inputs: tuple[Any, ...], options: tuple[Any, ...], results: int) -> list[Tensor]:
    """Targets and advantages, and if there shall be four results what the adjoint reads."""
    rewards, values, log_ratios, final_values, last_values = inputs
    dones, gamma, lam, rho_bar, c_bar, mask, mask_mode = options
    written = [kept.empty_like(_matrix(rewards)) for _ in range(results)]
    _kernels().vtrace(
        *(_matrix(each) for each in (rewards, values, log_ratios, dones, gamma, lam)),
        *(rho_bar, c_bar, _matrix(final_values)),
        *(None if last_values is None else last_values.reshape(-1), _matrix(mask), mask_mode),
        *written,
    )
    return [each.view(rewards.shape) for each in written]


class _Trace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        inputs, options = arguments[:5], arguments[5:]
        targets, advantages, *parts = _write(inputs, options, 4 if ctx.needs_input_grad[2] else 2)
        ctx.set_materialize_grads(False)
        tensors = [each if isinstance(each, Tensor) else None for each in options]
        ctx.others = [None if isinstance(each, Tensor) else each for each in options]
        ctx.save_for_backward(*inputs, *tensors, advantages, *parts)
        return targets, advantages

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[:5]
        inputs, advantages = saved[:5], saved[12]
        options = tuple(
            other if each is None else each
            for each, other in zip(saved[5:12], ctx.others, strict=True)
        )
        no_options = (None,) * len(options)
        if torch.is_grad_enabled() or not (is_plain(grads) and are_matrices(grads)):
            return *_composed_gradients(inputs, options, grads, needed), *no_options
        rewards, _, log_ratios = inputs[:3]
        dones, gamma, lam, rho_bar, c_bar, mask, mask_mode = options
        parts = saved[13:] or (None, None)
        like = _matrix(rewards)
        written = [kept.empty_like(like) if each else None for each in needed[:4]]
        to_last = rewards.new_empty(rewards.shape[1:])
        _kernels().adjoint(
            *(_matrix(each) for each in (*grads, log_ratios, advantages, *parts)),
            *(_matrix(each) for each in (dones, gamma, lam)),
            *(rho_bar, c_bar, _matrix(mask), mask_mode, *written, to_last.view(-1)),
        )
        shaped = [None if each is None else each.view(rewards.shape) for each in written]
        return *shaped, to_last if needed[4] else None, *no_options


def _composed_gradients(
    inputs: tuple[Any, ...],
    options: tuple[Any, ...],
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients that can be differentiated, or mapped."""
    with torch.enable_grad():
        # Of new views: one input may have been made of another.
        views: list[Any] = [None if each is None else each.view_as(each) for each in inputs]
        rewards, values, log_ratios, final_values, last_values = views
        dones, gamma, lam, rho_bar, c_bar, mask, mask_mode = options
        results = composed(
            *(rewards, values, log_ratios, dones, gamma, lam, rho_bar, c_bar),
            *(final_values, last_values, mask, mask_mode),
        )
        pairs = [pair for pair in zip(results, grads, strict=True) if pair[1] is not None]
        found = torch.autograd.grad(
            [result.to(rewards.dtype) for result, _ in pairs],
            [view for view, is_needed in zip(views, needed, strict=True) if is_needed],
            [grad for _, grad in pairs],
            create_graph=True,
            allow_unused=True,
        )
    rest = iter(found)
    return [next(rest) if each else None for each in needed]


def _selected(mask: Tensor | None, rows: Tensor) -> Tensor:
    return rows if mask is None else torch.where(mask, rows, 0.0)


def bounded(logs: Tensor, bound: float) -> Tensor:
    """min(bound, exp(logs)), whose gradient above the bound is 0 and not inf * 0."""
    return logs.clamp(max=math.log(bound) if bound > 0.0 else -math.inf).exp()


def _next(rows: Tensor, last: Tensor) -> Tensor:
    return torch.cat([rows[1:], last[None]]) if rows.shape[0] else rows
