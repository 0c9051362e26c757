"""Discounted returns over ragged episodes.

The contract lives here: checks, the choice of a backend, and the call. Nothing else of vecpg is
imported. Kernels are compiled when they are first called.
"""

import importlib.util
import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from vecpg.returns import operator, reference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MASK_MODES = ("cut", "skip", "decay")
_OFFSETS_REMEDY = "pass the lengths' cumsum(0) behind a 0"
_BACKENDS = ("auto", "reference", "cpu", "cuda")
# Found once: a small call is mostly made of looking things up.
_has_transforms = torch._C._are_functorch_transforms_active
_count_modes = torch._C._len_torch_dispatch_stack
_get_tracing = torch._C._get_tracing_state
_log = logging.getLogger(__name__)
_announced: set[str] = set()


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
        and _is_common(rewards, dones, gamma, mask, mask_mode, out)
    ):
        out = _writable(rewards, out)
        operator.write_common(rewards, dones, float(gamma), mask, mask_mode, out)
        return out
    _check_rewards(rewards)
    _check_row_inputs(rewards, dones, final_values, last_values, mask, mask_mode)
    scalar, gammas = _check_gamma("gamma", gamma, rewards)
    given: dict[str, object] = {"rewards": rewards, "dones": dones, "gamma": gamma, "mask": mask}
    given |= {"final_values": final_values, "last_values": last_values}
    if out is not None:
        _check_out(out, rewards, given)
    if not _is_served(backend, rewards):
        discounts = torch.tensor(scalar, dtype=torch.float64, device=rewards.device)
        discounts = discounts if gammas is None else gammas
        result = reference.reward_to_go(
            rewards, dones, discounts, final_values, last_values, mask, mask_mode
        )
        return result if out is None else out.copy_(result)
    arguments = (rewards, dones, scalar, gammas, final_values, last_values, mask, mask_mode)
    if _is_plain((*given.values(), out)):
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
        and _is_commonly_packed(rewards, offsets, gamma)
        and operator.is_partition(offsets, rewards.shape[0])
    ):
        out = torch.empty_like(rewards)
        operator.write_packed(rewards, offsets, gamma, None, out)
        return out
    _check_rewards(rewards)
    if rewards.ndim != 1:
        raise ValueError(
            f"rewards: expected (total,), got shape {tuple(rewards.shape)}; pass padded rewards to"
            " reward_to_go, with a mask"
        )
    _check_offsets(offsets, rewards)
    if final_values is not None:
        _check_like("final_values", final_values, rewards, rewards.dtype, (offsets.shape[0] - 1,))
    scalar, gammas = _check_gamma("gamma", gamma, rewards)
    discount = scalar if gammas is None else gammas
    served = _is_served(backend, rewards)
    if served and _is_plain((rewards, offsets, gamma, final_values)):
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
    _check_rewards(rewards)
    if isinstance(values, Tensor) and values.dtype == torch.bool:
        raise TypeError(
            f"values: expected {_name(rewards.dtype)}, got bool; pass rewards, values, dones, in"
            " this order"
        )
    _check_like("values", values, rewards, rewards.dtype)
    _check_row_inputs(rewards, dones, final_values, last_values, mask, mask_mode)
    scalar, gammas = _check_gamma("gamma", gamma, rewards)
    scalar_lambda, lambdas = _check_gamma("gae_lambda", gae_lambda, rewards)
    if out is not None:
        given: dict[str, object] = {"rewards": rewards, "values": values, "dones": dones}
        given |= {"gamma": gamma, "gae_lambda": gae_lambda, "mask": mask}
        given |= {"final_values": final_values, "last_values": last_values}
        _check_out(out, rewards, given)

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


def _is_common(
    rewards: Tensor,
    dones: Tensor,
    gamma: float | Tensor,
    mask: Tensor | None,
    mask_mode: str,
    out: Tensor | None,
) -> bool:
    """Whether a call is right and asks for nothing special: found out in 2 us instead of 20.

    What is not is checked again, and named, one by one.
    """
    if not (
        _is_eager()  # first: a compiler cannot follow all of the others
        and _is_discount(gamma)
        and _is_known(rewards)
        and rewards.ndim == 2
        and type(dones) is Tensor
        and dones.dtype is torch.bool
        and dones.is_cpu
        and rewards.shape == dones.shape
        and dones.layout is torch.strided
        and not dones._is_zerotensor()
        and mask_mode in _MASK_MODES
    ):
        return False
    if mask is not None and not (
        type(mask) is Tensor
        and mask.dtype is torch.bool
        and mask.is_cpu
        and rewards.shape == mask.shape
        and mask.layout is torch.strided
        and not mask._is_zerotensor()
    ):
        return False
    return out is None or (
        _is_known(out)
        and out.dtype is rewards.dtype
        and out.shape == rewards.shape
        and (out.is_contiguous() or out.mT.is_contiguous())
        and not _share_memory(out, rewards, dones, mask)
    )


def _is_commonly_packed(rewards: Tensor, offsets: Tensor, gamma: float | Tensor) -> bool:
    """The same for packed rewards; not whether the offsets are right."""
    return (
        _is_eager()
        and _is_discount(gamma)
        and _is_known(rewards)
        and rewards.ndim == 1
        and type(offsets) is Tensor
        and offsets.dtype is torch.int64
        and offsets.is_cpu
        and offsets.ndim == 1
        and offsets.shape[0] > 0
        and offsets.layout is torch.strided
    )


def _is_discount(gamma: float | Tensor) -> bool:
    return type(gamma) is float and 0.0 <= gamma <= 1.0


def _is_known(tensor: Tensor) -> bool:
    """Whether the CPU kernel can read and write a tensor directly, and has been announced."""
    return (
        type(tensor) is Tensor
        and (tensor.dtype is torch.float32 or tensor.dtype is torch.float64)
        and tensor.is_cpu
        and not tensor.requires_grad
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        and "cpu" in _announced
    )


def _check_rewards(rewards: Tensor) -> None:
    if not isinstance(rewards, Tensor):
        raise TypeError(
            f"rewards: expected a tensor, got {type(rewards).__name__};"
            " pass torch.as_tensor(rewards)"
        )
    if rewards.dtype not in _DTYPES:
        raise TypeError(
            f"rewards: expected float32, float64, bfloat16 or float16, got {_name(rewards.dtype)};"
            f" pass {'rewards.real' if rewards.is_complex() else 'rewards.float()'}"
        )
    _check_layout("rewards", rewards)
    if rewards.ndim == 0:
        raise ValueError("rewards: expected (T, *batch), got no dimensions; pass rewards[None]")


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        remedy = f"{name}.to_dense()"
        if tensor.is_nested:
            remedy = f"packed_reward_to_go({name}.values(), {name}.offsets(), ...)"
        raise TypeError(f"{name}: expected a dense tensor, got {tensor.layout}; pass {remedy}")


def _check_like(
    name: str,
    value: Tensor,
    rewards: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...] | None = None,
) -> None:
    shape = rewards.shape if shape is None else shape
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a tensor, got {type(value).__name__}; pass torch.as_tensor({name})"
        )
    if value.dtype != dtype:
        remedy = f"{name}.to(rewards.dtype)"
        if dtype == torch.bool:
            remedy = f"{name}.bool()"
            if name == "dones":
                remedy = "terminations | truncations, or dones.bool() if it is their 0 or 1"
        raise TypeError(f"{name}: expected {_name(dtype)}, got {_name(value.dtype)}; pass {remedy}")
    _check_layout(name, value)
    if value.shape != shape:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)};"
            f" {_shape_remedy(name, value, shape)}"
        )
    if value.device != rewards.device:
        raise ValueError(
            f"{name}: expected a tensor on {rewards.device} like rewards, got {value.device};"
            f" pass {name}.to(rewards.device)"
        )


def _shape_remedy(name: str, value: Tensor, shape: tuple[int, ...]) -> str:
    if value.ndim == 2 and tuple(value.mT.shape) == tuple(shape):
        return f"pass {name}.mT"
    if name == "last_values":
        return "pass one for each environment, without time"
    return "pass one for each element of rewards, or, packed, one final value for each episode"


def _check_row_inputs(
    rewards: Tensor,
    dones: Tensor,
    final_values: Tensor | None,
    last_values: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
) -> None:
    _check_like("dones", dones, rewards, torch.bool)
    if final_values is not None:
        _check_like("final_values", final_values, rewards, rewards.dtype)
    if last_values is not None:
        _check_like("last_values", last_values, rewards, rewards.dtype, rewards.shape[1:])
    if mask is not None:
        _check_like("mask", mask, rewards, torch.bool)
    if mask_mode not in _MASK_MODES:
        raise ValueError(f"mask_mode: expected one of {', '.join(_MASK_MODES)}, got {mask_mode!r}")


def _check_offsets(offsets: Tensor, rewards: Tensor) -> None:
    if not isinstance(offsets, Tensor):
        raise TypeError(
            f"offsets: expected a tensor, got {type(offsets).__name__}; pass torch.tensor(offsets)"
        )
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets: expected int64, got {_name(offsets.dtype)}; pass offsets.long()")
    if offsets.ndim != 1 or offsets.shape[0] == 0:
        raise ValueError(
            f"offsets: expected shape (B + 1,), got {tuple(offsets.shape)}; {_OFFSETS_REMEDY}"
        )
    if offsets.device != rewards.device:
        raise ValueError(
            f"offsets: expected a tensor on {rewards.device} like rewards, got {offsets.device};"
            " pass offsets.to(rewards.device)"
        )
    if offsets.device.type != "cpu" or not _is_eager():
        return
    places = offsets.numpy()
    if places.item(0) != 0 or places.item(-1) != rewards.shape[0]:
        raise ValueError(
            f"offsets: expected numbers from 0 to {rewards.shape[0]}, the length of rewards, got"
            f" {places[0]} to {places[-1]}; {_OFFSETS_REMEDY}"
        )
    falls = places[1:] < places[:-1]
    if falls.any():
        i = int(falls.argmax())
        raise ValueError(
            f"offsets: expected numbers that never decrease, got {places[i]} and then"
            f" {places[i + 1]} at place {i + 1}; {_OFFSETS_REMEDY}"
        )


def _check_gamma(name: str, gamma: float | Tensor, rewards: Tensor) -> tuple[float, Tensor | None]:
    """Check a discount, and return one number, or a float64 tensor in the shape of `rewards`."""
    if not isinstance(gamma, Tensor):
        if isinstance(gamma, bool) or not isinstance(gamma, int | float):
            raise TypeError(
                f"{name}: expected a float or a tensor, got {type(gamma).__name__};"
                f" pass float({name})"
            )
        if not 0 <= gamma <= 1:
            raise ValueError(
                f"{name}: expected a number in [0, 1], got {gamma}; pass a discount such as 0.99"
            )
        return float(gamma), None
    if not gamma.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a float tensor, got {_name(gamma.dtype)}")
    if gamma.device != rewards.device and not (gamma.ndim == 0 and gamma.device.type == "cpu"):
        raise ValueError(
            f"{name}: expected a tensor on {rewards.device} like rewards, got {gamma.device};"
            f" pass {name}.to(rewards.device)"
        )
    try:
        gamma.expand(rewards.shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {tuple(rewards.shape)},"
            f" got {tuple(gamma.shape)}"
        ) from None
    if (
        gamma.device.type == "cpu"
        and _is_eager()
        and gamma.numel()
        and not bool(((gamma >= 0) & (gamma <= 1)).all())
    ):
        raise ValueError(
            f"{name}: expected numbers in [0, 1], got {gamma.min().item()} to {gamma.max().item()}"
        )
    return 0.0, gamma.to(device=rewards.device, dtype=torch.float64).expand(rewards.shape)


def _check_out(out: Tensor, rewards: Tensor, given: Mapping[str, object]) -> None:
    if isinstance(out, Tensor) and out.dtype != rewards.dtype:
        raise TypeError(
            f"out: expected {_name(rewards.dtype)} like rewards, got {_name(out.dtype)};"
            " pass torch.empty_like(rewards)"
        )
    _check_like("out", out, rewards, rewards.dtype)
    gradients = torch.is_grad_enabled()
    if gradients and out.requires_grad:
        raise ValueError(
            "out: expected a tensor without gradients, got one that requires them; pass"
            " torch.empty_like(rewards)"
        )
    for name, value in given.items():
        if isinstance(value, Tensor):
            if gradients and value.requires_grad:
                raise ValueError(f"out: expected no gradients, got {name} that requires them")
            if _is_eager() and out.device == value.device and _share_memory(out, value):
                raise ValueError(
                    f"out: expected memory of its own, got a tensor that may overlap {name};"
                    " pass torch.empty_like(rewards)"
                )
    reach = 1
    for step, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and out.numel() and step < reach:
            raise ValueError(
                "out: expected one place for each element, got strides"
                f" {out.stride()} for shape {tuple(out.shape)}; pass torch.empty_like(rewards)"
            )
        reach = (size - 1) * step + reach if size > 1 else reach


def _share_memory(out: Tensor, *others: Tensor | None) -> bool:
    """Whether one of the others lies, at least in part, between the ends of `out`."""
    start, size = out.data_ptr(), _reach(out)
    for other in others:
        if other is not None:
            after = other.data_ptr() - start
            overlap = -after < _reach(other) if after < 0 else after < size
            if overlap and out.numel() > 0 and other.numel() > 0:
                return True
    return False


def _reach(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if tensor.is_contiguous() or (tensor.ndim == 2 and tensor.mT.is_contiguous()):
        return tensor.nbytes
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * step for size, step in steps) + 1) * tensor.element_size()


def _is_served(backend: str, rewards: Tensor) -> bool:
    """Whether a kernel serves a tensor, rather than the reference; says once which it is."""
    if backend == "auto" and rewards.is_cpu and "cpu" in _announced:
        return True
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
    if device not in _announced and _is_eager():
        _announced.add(device)
        how = "machine code" if served else "the reference backend, a loop over time"
        _log.info("returns on %s: %s", device, how)
    return served


def _is_plain(given: Iterable[object]) -> bool:
    """Whether memory can be read and written directly: no gradients, nobody who looks on."""
    if not _is_eager():
        return False
    gradients = torch.is_grad_enabled()
    for value in given:
        kind = type(value)
        if kind is Tensor or kind is torch.nn.Parameter:
            tensor: Tensor = value  # type: ignore[assignment]
            if (gradients and tensor.requires_grad) or tensor.is_neg() or tensor._is_zerotensor():
                return False
        elif isinstance(value, Tensor):
            return False
    return True


def _is_eager() -> bool:
    """Whether tensors hold numbers here and now: not traced, not batched, not dual numbers."""
    return not (
        is_compiling()
        or _has_transforms()
        or _count_modes() > 0
        or forward_ad._current_level >= 0
        or _get_tracing() is not None
    )


def _writable(rewards: Tensor, out: Tensor | None) -> Tensor:
    """`out`, with autograd told that it changes, or a new tensor."""
    if out is None:
        return torch.empty_like(rewards)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = ["generalized_advantage", "packed_reward_to_go", "reward_to_go"]
