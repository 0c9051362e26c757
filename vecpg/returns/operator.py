"""The recurrence as an operator of torch: traceable, batchable, differentiable.

    x[t] = r[t] + gamma[t] * (final_values[t] if dones[t] else x[t + 1])

`vecpg::reward_to_go` is what compilers see. Gradients are an `autograd.Function` around it: a
backward pass is the same recurrence forwards in time, so it is the operator again, and can be
differentiated again.
"""

import functools
import importlib
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vecpg.returns import kept

_library = torch.library.Library("vecpg", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "reward_to_go(Tensor rewards, Tensor dones, float gamma, Tensor? gammas, Tensor? final_values,"
    " Tensor? last_values, Tensor? mask, str mask_mode) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = torch.ops.vecpg.reward_to_go.default


def differentiable(
    rewards: Tensor,
    dones: Tensor,
    gamma: float,
    gammas: Tensor | None,
    final_values: Tensor | None,
    last_values: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
) -> Tensor:
    """The operator with gradients; `gammas` is float64 in the shape of `rewards`, or None."""
    result: Tensor = _RewardToGo.apply(  # type: ignore[no-untyped-call]
        rewards, dones, gamma, gammas, final_values, last_values, mask, mask_mode
    )
    return result


def write(
    rewards: Tensor,
    dones: Tensor,
    gamma: float,
    gammas: Tensor | None,
    final_values: Tensor | None,
    last_values: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
    out: Tensor,
) -> None:
    """Write the returns of (T, *batch) tensors to `out`, on the backend of their device."""
    if rewards.ndim != 2:
        timed: list[Any] = [rewards, dones, gammas, final_values, mask, out]
        try:
            views: list[Any] = [None if each is None else _matrix(each) for each in timed]
        except RuntimeError:  # strides that no matrix has
            dim = min(range(1, rewards.ndim), key=lambda dim: rewards.shape[dim])
            for i in range(rewards.shape[dim]):
                part: list[Any] = [None if each is None else each.select(dim, i) for each in timed]
                r, d, g, f, m, o = part
                last = None if last_values is None else last_values.select(dim - 1, i)
                write(r, d, gamma, g, f, last, m, mask_mode, o)
            return
        rewards, dones, gammas, final_values, mask, out = views
        last_values = None if last_values is None else last_values.reshape(-1)
    discount = gamma if gammas is None else gammas
    _kernels(rewards.is_cuda).reward_to_go(
        rewards, dones, discount, final_values, last_values, mask, mask_mode, out
    )


def write_common(
    rewards: Tensor,
    dones: Tensor,
    gamma: float,
    mask: Tensor | None,
    mask_mode: str,
    out: Tensor,
) -> None:
    """As `write`, of (T, N) or (T,) tensors on the CPU without further options."""
    _kernels(False).common_reward_to_go(rewards, dones, gamma, mask, mask_mode, out)


def is_partition(offsets: Tensor, total: int) -> bool:
    """Whether offsets on the CPU go from 0 to `total` and never fall."""
    found: bool = _kernels(False).is_partition(offsets, total)
    return found


def write_packed(
    rewards: Tensor,
    offsets: Tensor,
    gamma: float | Tensor,
    final_values: Tensor | None,
    out: Tensor,
) -> None:
    """Write the returns of packed episodes to `out`, on the backend of their device."""
    _kernels(rewards.is_cuda).packed_reward_to_go(rewards, offsets, gamma, final_values, out)


@functools.cache
def _kernels(on_cuda: bool) -> ModuleType:
    """Imported when first needed: Numba takes a second, and Triton may not be there."""
    return importlib.import_module(f"vecpg.returns.{'cuda' if on_cuda else 'cpu'}")


def _matrix(tensor: Tensor) -> Tensor:
    """(T, *batch) as (T, N), without a copy."""
    columns = math.prod(tensor.shape[1:])
    return tensor[:, None] if tensor.ndim == 1 else tensor.view(len(tensor), columns)


def _implementation(
    rewards: Tensor,
    dones: Tensor,
    gamma: float,
    gammas: Tensor | None,
    final_values: Tensor | None,
    last_values: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
) -> Tensor:
    out = kept.empty_like(rewards)
    write(rewards, dones, gamma, gammas, final_values, last_values, mask, mask_mode, out)
    return out


def _fake(rewards: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(rewards)


def _batched(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    """One more batch dimension, behind that of time."""
    size = info.batch_size
    moved = []
    for index, (value, dim) in enumerate(zip(arguments, in_dims, strict=True)):
        if isinstance(value, Tensor):
            place = 0 if index == 5 else 1  # last_values have no time
            if dim is None:
                value = value.unsqueeze(place)
                shape = list(value.shape)
                shape[place] = size
                value = value.expand(shape)
            else:
                value = value.movedim(dim, place)
        moved.append(value)
    return _operator(*moved), 1


_library.impl("reward_to_go", _implementation, "CPU")  # type: ignore[no-untyped-call]
_library.impl("reward_to_go", _implementation, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("vecpg::reward_to_go", _fake, lib=_library)
torch.library.register_vmap("vecpg::reward_to_go", _batched, lib=_library)


class _RewardToGo(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        rewards: Tensor,
        dones: Tensor,
        gamma: float,
        gammas: Tensor | None,
        final_values: Tensor | None,
        last_values: Tensor | None,
        mask: Tensor | None,
        mask_mode: str,
    ) -> Tensor:
        result: Tensor = _operator(
            rewards, dones, gamma, gammas, final_values, last_values, mask, mask_mode
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rewards, dones, ctx.gamma, gammas, final_values, last_values, mask, ctx.mask_mode = inputs
        # What is paid matters for the gradient of gamma alone.
        if not ctx.needs_input_grad[3]:
            rewards = None
            final_values = None
        ctx.save_for_backward(rewards, dones, gammas, final_values, last_values, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rewards, dones, gammas, final_values, last_values, mask = ctx.saved_tensors
        grad = grads[0]
        wide = torch.float64
        nothing = torch.zeros((), dtype=wide, device=grad.device)
        discount = torch.full_like(nothing, ctx.gamma) if gammas is None else gammas
        # x[t] = paid[t] + (0 if closed[t] else through[t] * x[t + 1])
        closed, through = dones, discount.expand(grad.shape)
        if mask is not None:
            closed = torch.where(mask, dones, ctx.mask_mode == "cut")
            if ctx.mask_mode == "skip":
                through = torch.where(mask, through, 1.0)
            grad = torch.where(mask, grad, 0.0)
        # reached[t] = grad[t] + (0 if closed[t - 1] else through[t - 1] * reached[t - 1]): the same
        # with time reversed.
        first = torch.ones_like(closed[:1])
        reached = differentiable(
            grad.flip(0),
            torch.cat([closed.flip(0)[1:], first]),
            0.0,
            torch.cat([through.flip(0)[1:], first.to(wide)]),
            None,
            None,
            None,
            "cut",
        ).flip(0)
        counted = reached if mask is None else torch.where(mask, reached, 0.0)
        to_final = to_last = to_gammas = None
        if ctx.needs_input_grad[4]:
            to_final = torch.where(dones, discount * counted, nothing).to(grad.dtype)
        if ctx.needs_input_grad[5]:
            to_last = torch.where(closed, nothing, through * reached)[-1:].sum(0).to(grad.dtype)
        if ctx.needs_input_grad[3]:
            values = nothing if final_values is None else final_values.to(wide)
            paid = rewards.to(wide) + torch.where(dones, discount * values, nothing)
            paid = paid if mask is None else torch.where(mask, paid, nothing)
            last = None if last_values is None else last_values.to(wide)
            carries = differentiable(paid, closed, 0.0, through, None, last, None, "cut")
            after = torch.zeros_like(carries[:1]) if last is None else last[None]
            following = torch.cat([carries[1:], after])
            read = torch.where(dones, values, following)
            if mask is not None:
                masked = following if ctx.mask_mode == "decay" else nothing
                read = torch.where(mask, read, masked)
            to_gammas = reached * read
        return counted, None, None, to_gammas, to_final, to_last, None, None
