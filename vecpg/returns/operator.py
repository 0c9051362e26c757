"""The recurrences as operators of torch: traceable, batchable, differentiable.

`vecpg::reward_to_go`, `vecpg::generalized_advantage` and `vecpg::advantage_adjoint` are what
compilers see. Gradients are `autograd.Function`s around them. Each is linear but in the discounts,
and the last is the adjoint of the other two, reward-to-go being an advantage with lambda 1 over
values of 0. So they differentiate each other, to any order.
"""

import functools
import importlib
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vecpg.kernels import kept
from vecpg.returns.checks import has_duals

_library = torch.library.Library("vecpg", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "reward_to_go(Tensor rewards, Tensor dones, float gamma, Tensor? gammas, Tensor? final_values,"
    " Tensor? last_values, Tensor? mask, str mask_mode) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(  # type: ignore[no-untyped-call]
    "generalized_advantage(Tensor rewards, Tensor? values, Tensor dones, float gamma,"
    " Tensor? gammas, float gae_lambda, Tensor? lambdas, Tensor? final_values, Tensor? last_values,"
    " Tensor? mask, str mask_mode, bool plus_values, bool resets) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(  # type: ignore[no-untyped-call]
    "advantage_adjoint(Tensor grad, Tensor dones, float gamma, Tensor? gammas, float gae_lambda,"
    " Tensor? lambdas, Tensor? mask, str mask_mode, bool plus_values, bool resets,"
    " bool has_values, bool has_final) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = torch.ops.vecpg.reward_to_go.default
_advantage = torch.ops.vecpg.generalized_advantage.default
_adjoint = torch.ops.vecpg.advantage_adjoint.default


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
    result: Tensor = (_DualRewardToGo if has_duals() else _RewardToGo).apply(  # type: ignore[no-untyped-call]
        rewards, dones, gamma, gammas, final_values, last_values, mask, mask_mode
    )
    return result


def differentiable_advantage(
    rewards: Tensor,
    values: Tensor | None,
    dones: Tensor,
    gamma: float,
    gammas: Tensor | None,
    gae_lambda: float,
    lambdas: Tensor | None,
    final_values: Tensor | None,
    last_values: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
    plus_values: bool,
    resets: bool,
) -> Tensor:
    """The same of advantages, but without gradients of gamma and lambda.

    Those are float64 in the shape of `rewards`, or None. Without values they are 0. With
    `plus_values` the values are added before it is rounded; with `resets` a row ends an episode
    though it is masked.
    """
    result: Tensor = (_DualAdvantage if has_duals() else _Advantage).apply(  # type: ignore[no-untyped-call]
        *(rewards, values, dones, gamma, gammas, gae_lambda, lambdas, final_values, last_values),
        *(mask, mask_mode, plus_values, resets),
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
    kernels = _kernels(rewards.is_cuda)
    timed = rewards, dones, gammas, final_values, mask, out
    for (r, d, g, f, m, o), last in _matrices(timed, last_values):
        last = None if last is None else last.reshape(-1)
        kernels.reward_to_go(r, d, gamma if g is None else g, f, last, m, mask_mode, o)


def write_advantage(
    rewards: Tensor,
    values: Tensor | None,
    dones: Tensor,
    gamma: float,
    gammas: Tensor | None,
    gae_lambda: float,
    lambdas: Tensor | None,
    final_values: Tensor | None,
    last_values: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
    plus_values: bool,
    resets: bool,
    out: Tensor,
) -> None:
    """Write generalized advantages of (T, *batch) tensors to `out`; `resets` on the CPU alone."""
    timed = rewards, values, dones, gammas, lambdas, final_values, mask, out
    for (r, v, d, g, k, f, m, o), last in _matrices(timed, last_values):
        discount, decay = gamma if g is None else g, gae_lambda if k is None else k
        last = None if last is None else last.reshape(-1)
        options = r, v, d, discount, decay, f, last, m, mask_mode, plus_values
        if rewards.is_cuda:
            _kernels(True).generalized_advantage(*options, o)
        else:
            _advantage_kernels().generalized_advantage(*options, resets, o)


def write_common_advantage(*arguments: Any) -> None:
    """As `write_advantage`, of (T, N) tensors on the CPU, and without final and last values."""
    _advantage_kernels().common_advantage(*arguments)


def _matrices(
    timed: tuple[Tensor | None, ...], last_values: Tensor | None
) -> Iterator[tuple[list[Any], Tensor | None]]:
    """(T, *batch) tensors as (T, N) without a copy: as one, or in parts.

    The last values of each stay (*batch): those of a part may be a view that no (N,) is.
    """
    first = next(each for each in timed if each is not None)
    if first.ndim == 2:
        yield list(timed), last_values
        return
    columns = math.prod(first.shape[1:])
    try:
        views = [None if each is None else each.view(len(each), columns) for each in timed]
    except RuntimeError:  # strides that no matrix has
        dim = min(range(1, first.ndim), key=lambda dim: first.shape[dim])
        for i in range(first.shape[dim]):
            part = tuple(None if each is None else each.select(dim, i) for each in timed)
            yield from _matrices(
                part, None if last_values is None else last_values.select(dim - 1, i)
            )
        return
    yield views, last_values


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


def write_masked_packed(
    rewards: Tensor,
    offsets: Tensor,
    gamma: float,
    final_values: Tensor | None,
    mask: Tensor,
    mask_mode: str,
    out: Tensor,
) -> None:
    """The same on the CPU, with a mask and one gamma."""
    _kernels(False).masked_packed_reward_to_go(
        rewards, offsets, gamma, final_values, mask, mask_mode, out
    )


@functools.cache
def _kernels(on_cuda: bool) -> ModuleType:
    """Imported when first needed: Numba takes a second, and Triton may not be there."""
    return importlib.import_module(f"vecpg.returns.{'cuda' if on_cuda else 'cpu'}")


@functools.cache
def _advantage_kernels() -> ModuleType:
    return importlib.import_module("vecpg.returns.cpu_advantages")


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


def _advantage_implementation(*arguments: Any) -> Tensor:
    out = kept.empty_like(arguments[0])
    write_advantage(*arguments, out)  # type: ignore[call-arg]
    return out


def _adjoint_implementation(
    grad: Tensor,
    dones: Tensor,
    gamma: float,
    gammas: Tensor | None,
    gae_lambda: float,
    lambdas: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
    plus_values: bool,
    resets: bool,
    has_values: bool,
    has_final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if grad.is_cuda:
        return adjoint_by_returns(
            *(grad, dones, gamma, gammas, gae_lambda, lambdas, mask, mask_mode, plus_values),
            *(has_values, has_final),
        )
    results = _adjoint_results(grad, dones, has_values, has_final, kept.empty_like)
    to_rewards, to_values, to_final, to_last = results
    timed = (
        *(grad, dones, gammas, lambdas, mask, to_rewards),
        to_values if has_values else None,
        to_final if has_final else None,
    )
    for (x, d, g, k, m, r, v, f), last in _matrices(timed, to_last):
        discount, decay = gamma if g is None else g, gae_lambda if k is None else k
        _advantage_kernels().adjoint(
            *(x, d, discount, decay, m, mask_mode, plus_values, resets, r, v, f, last)
        )
    return results


def adjoint_by_returns(
    grad: Tensor,
    dones: Tensor,
    gamma: float,
    gammas: Tensor | None,
    gae_lambda: float,
    lambdas: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
    plus_values: bool,
    has_values: bool,
    has_final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same where there is no kernel for it: reward-to-go with time reversed, once or twice.

        reached[t] = grad[t] + a[t - 1] * reached[t - 1]
        shown[t] = d[t - 1] * reached[t - 1] + p[t - 1] * shown[t - 1]

    An advantage is b[t] + a[t] * (the next one), where b holds d[t] * (the value that is shown to
    the row), and a value is shown through a row by the factor p[t].
    """
    wide = torch.float64
    discount = torch.full((), gamma, dtype=wide, device=grad.device) if gammas is None else gammas
    discount = discount.expand(grad.shape)
    ends = dones if mask is None else dones & mask
    advantage_by = discount * (gae_lambda if lambdas is None else lambdas)
    advantage_by, value_by = torch.where(ends, 0.0, advantage_by), torch.where(ends, 0.0, discount)
    through = torch.zeros_like(discount)
    own = grad.to(wide)
    if mask is not None:
        own = torch.where(mask, own, 0.0)
        if mask_mode == "cut":
            advantage_by = torch.where(mask, advantage_by, 0.0)
        if mask_mode == "skip":
            advantage_by = torch.where(mask, advantage_by, 1.0)
        if mask_mode != "zero":
            value_by = torch.where(mask, value_by, 0.0)
        if mask_mode in ("skip", "decay"):
            passed = torch.ones_like(discount) if mask_mode == "skip" else discount
            through = torch.where(mask, 0.0, passed)
    reached = _along(own, advantage_by)
    from_row = value_by * reached
    shown = _along(torch.cat([torch.zeros_like(own[:1]), from_row[:-1]]), through)
    to_last = (from_row + through * shown)[-1:].sum(0)
    to_rewards = reached if mask is None else torch.where(mask, reached, 0.0)
    to_values = shown if mask is None else torch.where(mask, shown, 0.0)
    to_values = to_values - to_rewards + (own if plus_values else 0.0)
    to_final = torch.where(ends, discount * reached, 0.0)
    results = _adjoint_results(grad, dones, has_values, has_final, torch.empty_like)
    results[0].copy_(to_rewards)
    if has_values:
        results[1].copy_(to_values)
    if has_final:
        results[2].copy_(to_final)
    results[3].copy_(to_last)
    return results


def _along(paid: Tensor, through: Tensor) -> Tensor:
    """x[t] = paid[t] + through[t - 1] * x[t - 1]."""
    discount = torch.cat([through.flip(0)[1:], torch.zeros_like(through[:1])])
    out = torch.empty_like(paid)
    flags = torch.zeros_like(paid, dtype=torch.bool)
    write(paid.flip(0), flags, 0.0, discount, None, None, None, "cut", out)
    return out.flip(0)


def _adjoint_results(
    grad: Tensor, dones: Tensor, has_values: bool, has_final: bool, like: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for gradients of rewards, values, final and last values, laid out like the flags."""
    return (
        like(dones, dtype=grad.dtype),
        like(dones, dtype=grad.dtype) if has_values else grad.new_empty(0),
        like(dones, dtype=grad.dtype) if has_final else grad.new_empty(0),
        grad.new_empty(grad.shape[1:]),
    )


def _fake(rewards: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(rewards)


def _adjoint_fake(grad: Tensor, dones: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    has_values, has_final = arguments[-2:]
    return _adjoint_results(grad, dones, has_values, has_final, torch.empty_like)


def _batched(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    return _operator(*_moved(info, in_dims, arguments, without_time=5)), 1


def _advantage_batched(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    return _advantage(*_moved(info, in_dims, arguments, without_time=8)), 1


def _adjoint_batched(
    info: Any, in_dims: tuple[Any, ...], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    has_values, has_final = arguments[-2:]
    dims = 1, 1 if has_values else None, 1 if has_final else None, 0
    return _adjoint(*_moved(info, in_dims, arguments)), dims


def _moved(
    info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...], without_time: int | None = None
) -> list[Any]:
    """Arguments with one more batch dimension, behind that of time."""
    moved = []
    for index, (value, dim) in enumerate(zip(arguments, in_dims, strict=True)):
        if isinstance(value, Tensor):
            place = 0 if index == without_time else 1
            if dim is None:
                value = value.unsqueeze(place)
                shape = list(value.shape)
                shape[place] = info.batch_size
                value = value.expand(shape)
            else:
                value = value.movedim(dim, place)
        moved.append(value)
    return moved


_library.impl("reward_to_go", _implementation, "CPU")  # type: ignore[no-untyped-call]
_library.impl("reward_to_go", _implementation, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("vecpg::reward_to_go", _fake, lib=_library)
torch.library.register_vmap("vecpg::reward_to_go", _batched, lib=_library)
_library.impl("generalized_advantage", _advantage_implementation, "CPU")  # type: ignore[no-untyped-call]
_library.impl("generalized_advantage", _advantage_implementation, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("vecpg::generalized_advantage", _fake, lib=_library)
torch.library.register_vmap("vecpg::generalized_advantage", _advantage_batched, lib=_library)
_library.impl("advantage_adjoint", _adjoint_implementation, "CPU")  # type: ignore[no-untyped-call]
_library.impl("advantage_adjoint", _adjoint_implementation, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("vecpg::advantage_adjoint", _adjoint_fake, lib=_library)
torch.library.register_vmap("vecpg::advantage_adjoint", _adjoint_batched, lib=_library)


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
        ctx.dtype = rewards.dtype
        # What is paid matters for derivatives with respect to gamma alone.
        if gammas is None:
            rewards = final_values = None
        saved = rewards, dones, gammas, final_values, last_values, mask
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, dones, gammas, _, _, mask = ctx.saved_tensors
        grad = grads[0]
        has_final, has_last = ctx.needs_input_grad[4:6]
        if grad.device.type == "cpu" and not ctx.needs_input_grad[3]:
            to_rewards, _, to_final, to_last = (
                _DualAdvantageAdjoint if has_duals() else _AdvantageAdjoint
            ).apply(  # type: ignore[no-untyped-call]
                *(grad, dones, ctx.gamma, gammas, 1.0, None, mask, ctx.mask_mode),
                *(False, False, False, has_final),
            )
            to_final, to_last = to_final if has_final else None, to_last if has_last else None
            return to_rewards, None, None, None, to_final, to_last, None, None
        discount, closed, through = _flow(ctx, dones, gammas, mask)
        nothing = torch.zeros((), dtype=torch.float64, device=grad.device)
        grad = grad if mask is None else torch.where(mask, grad, 0.0)
        # reached[t] = grad[t] + (0 if closed[t - 1] else through[t - 1] * reached[t - 1]): the same
        # with time reversed.
        first = torch.ones_like(closed[:1])
        reached = differentiable(
            grad.flip(0),
            torch.cat([closed.flip(0)[1:], first]),
            0.0,
            torch.cat([through.flip(0)[1:], first.to(torch.float64)]),
            None,
            None,
            None,
            "cut",
        ).flip(0)
        counted = reached if mask is None else torch.where(mask, reached, 0.0)
        to_final = to_last = to_gammas = None
        if has_final:
            to_final = torch.where(dones, discount * counted, nothing).to(grad.dtype)
        if has_last:
            to_last = torch.where(closed, nothing, through * reached)[-1:].sum(0).to(grad.dtype)
        if ctx.needs_input_grad[3]:
            to_gammas = reached * _read(ctx, *ctx.saved_tensors)
        return counted, None, None, to_gammas, to_final, to_last, None, None


def _flow(
    ctx: Any, dones: Tensor, gammas: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A recurrence's discounts, where it ends, and what flows through a row where it does not.

    x[t] = paid[t] + (0 if closed[t] else through[t] * x[t + 1])
    """
    discount = torch.full((1,), ctx.gamma, dtype=torch.float64, device=dones.device)
    discount = discount.expand(dones.shape) if gammas is None else gammas
    closed, through = dones, discount
    if mask is not None:
        closed = torch.where(mask, dones, ctx.mask_mode == "cut")
        if ctx.mask_mode == "skip":
            through = torch.where(mask, through, 1.0)
    return discount, closed, through


def _read(
    ctx: Any,
    rewards: Tensor,
    dones: Tensor,
    gammas: Tensor,
    final_values: Tensor | None,
    last_values: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """What every row's gamma is multiplied by: the derivative with respect to it."""
    wide = torch.float64
    discount, closed, through = _flow(ctx, dones, gammas, mask)
    nothing = torch.zeros((), dtype=wide, device=dones.device)
    values = nothing if final_values is None else final_values.to(wide)
    paid = rewards.to(wide) + torch.where(dones, discount * values, nothing)
    paid = paid if mask is None else torch.where(mask, paid, nothing)
    last = None if last_values is None else last_values.to(wide)
    carries = differentiable(paid, closed, 0.0, through, None, last, None, "cut")
    after = torch.zeros_like(carries[:1]) if last is None else last[None]
    read = torch.where(dones, values, torch.cat([carries[1:], after]))
    if mask is not None:
        following = torch.cat([carries[1:], after])
        masked = nothing if ctx.mask_mode in ("cut", "skip") else following
        read = torch.where(mask, read, masked)
    return read


class _Advantage(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        rewards: Tensor,
        values: Tensor | None,
        dones: Tensor,
        gamma: float,
        gammas: Tensor | None,
        gae_lambda: float,
        lambdas: Tensor | None,
        final_values: Tensor | None,
        last_values: Tensor | None,
        mask: Tensor | None,
        mask_mode: str,
        plus_values: bool,
        resets: bool,
    ) -> Tensor:
        result: Tensor = _advantage(
            *(rewards, values, dones, gamma, gammas, gae_lambda, lambdas, final_values),
            *(last_values, mask, mask_mode, plus_values, resets),
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rewards, _, dones, ctx.gamma, gammas, ctx.gae_lambda, lambdas, *_ = inputs
        ctx.dtype = rewards.dtype
        mask, *ctx.options = inputs[9:]
        ctx.has_values = inputs[1] is not None
        ctx.save_for_backward(dones, gammas, lambdas, mask)
        ctx.save_for_forward(dones, gammas, lambdas, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dones, gammas, lambdas, mask = ctx.saved_tensors
        has_final = ctx.needs_input_grad[7]
        to_rewards, to_values, to_final, to_last = (
            _DualAdvantageAdjoint if has_duals() else _AdvantageAdjoint
        ).apply(  # type: ignore[no-untyped-call]
            *(grads[0], dones, ctx.gamma, gammas, ctx.gae_lambda, lambdas, mask),
            *(*ctx.options, ctx.has_values, has_final),
        )
        to_values = to_values if ctx.has_values else None
        to_final = to_final if has_final else None
        to_last = to_last if ctx.needs_input_grad[8] else None
        return to_rewards, to_values, *(None,) * 5, to_final, to_last, *(None,) * 4


class _AdvantageAdjoint(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor,
        dones: Tensor,
        gamma: float,
        gammas: Tensor | None,
        gae_lambda: float,
        lambdas: Tensor | None,
        mask: Tensor | None,
        mask_mode: str,
        plus_values: bool,
        resets: bool,
        has_values: bool,
        has_final: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor, Tensor] = _adjoint(
            *(grad, dones, gamma, gammas, gae_lambda, lambdas, mask, mask_mode, plus_values),
            *(resets, has_values, has_final),
        )
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, dones, ctx.gamma, gammas, ctx.gae_lambda, lambdas, mask, *ctx.options = inputs
        ctx.save_for_backward(dones, gammas, lambdas, mask)
        ctx.save_for_forward(dones, gammas, lambdas, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dones, gammas, lambdas, mask = ctx.saved_tensors
        *options, has_values, has_final = ctx.options
        rewards, values, of_final, last_values = grads
        final_values = of_final if has_final else None
        result = differentiable_advantage(
            *(rewards, values if has_values else None, dones, ctx.gamma, gammas),
            *(ctx.gae_lambda, lambdas, final_values, last_values, mask, *options),
        )
        return result, *(None,) * 11


# Apart, with forward mode too: torch.compile traces no function that has it.


class _DualRewardToGo(_RewardToGo):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        _, dones, gammas, _, _, mask = ctx.saved_tensors
        paid, _, _, gamma, final_values, last_values, _, _ = tangents
        if paid is None:
            paid = torch.zeros_like(dones, dtype=ctx.dtype)
        if gamma is None:
            return differentiable(
                paid, dones, ctx.gamma, gammas, final_values, last_values, mask, ctx.mask_mode
            )
        discount, closed, through = _flow(ctx, dones, gammas, mask)
        wide = paid.to(torch.float64)
        if final_values is not None:
            wide = wide + discount * torch.where(dones, final_values, 0.0)
        wide = wide if mask is None else torch.where(mask, wide, 0.0)
        wide = wide + gamma * _read(ctx, *ctx.saved_tensors)
        last = None if last_values is None else last_values.to(torch.float64)
        result = differentiable(wide, closed, 0.0, through, None, last, None, "cut")
        result = result if mask is None else torch.where(mask, result, 0.0)
        return result.to(ctx.dtype)


class _DualAdvantage(_Advantage):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        dones, gammas, lambdas, mask = ctx.saved_tensors
        rewards, values, final_values, last_values = (tangents[i] for i in (0, 1, 7, 8))
        return differentiable_advantage(
            torch.zeros_like(dones, dtype=ctx.dtype) if rewards is None else rewards,
            *(values, dones, ctx.gamma, gammas, ctx.gae_lambda, lambdas, final_values),
            *(last_values, mask, *ctx.options),
        )


class _DualAdvantageAdjoint(_AdvantageAdjoint):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        dones, gammas, lambdas, mask = ctx.saved_tensors
        return (_DualAdvantageAdjoint if has_duals() else _AdvantageAdjoint).apply(  # type: ignore[no-untyped-call]
            *(tangents[0], dones, ctx.gamma, gammas, ctx.gae_lambda, lambdas, mask, *ctx.options)
        )
