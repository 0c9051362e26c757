"""What a call of the returns kernels expects, in words that say what it got and what to do.

`is_common` finds a right and simple call in a tenth of the time.
"""

import logging
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from vecpg.kernels import kept

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_BOOL, _STRIDED = torch.bool, torch.strided
_MASK_MODES = ("cut", "skip", "decay", "zero")
_OFFSETS_REMEDY = "pass the lengths' cumsum(0) behind a 0"


def _unknown() -> bool:
    """Stands for what can no longer be asked: no call counts as eager then."""
    return True


# Found once: a small call is mostly made of looking things up. The names are torch's own: where one
# is gone, all calls go through torch's dispatcher, which is always right.
_gone = False
_has_transforms: Callable[[], bool]
_count_modes: Callable[[], int]
_get_tracing: Callable[[], object]
try:
    _has_transforms = torch._C._are_functorch_transforms_active
    _count_modes = torch._C._len_torch_dispatch_stack
    _get_tracing = torch._C._get_tracing_state
    forward_ad._current_level  # noqa: B018 - it changes: looked up again where it is read
except AttributeError as error:
    _gone = True
    _has_transforms = _count_modes = _get_tracing = _unknown
    logging.getLogger("vecpg.returns").warning(
        "torch %s: %s, which tells plain calls from traced ones; all take the longer way, and"
        " numbers inside tensors are not checked",
        torch.__version__,
        error,
    )


def is_common(
    rewards: Tensor,
    dones: Tensor,
    gamma: float | Tensor,
    mask: Tensor | None,
    mask_mode: str,
    out: Tensor | None,
) -> bool:
    """Whether a call is right and asks for nothing special: found out in 1 us instead of 20.

    What is not is checked again, and named, one by one.
    """
    if not (
        is_eager()  # first: a compiler cannot follow all of the others
        and _is_discount(gamma)
        and _is_known(rewards)
        and mask_mode in _MASK_MODES
    ):
        return False
    shape, dtype = rewards.shape, rewards.dtype
    return (
        0 < len(shape) <= 2
        and _is_flags(dones, shape)
        and (mask is None or _is_flags(mask, shape))
        and (
            out is None
            or (
                _is_known(out)
                and out.dtype is dtype
                and out.shape == shape
                and (out.is_contiguous() or out.stride() == (1, shape[0]))
                and not _share_memory(out, rewards, dones, mask)
            )
        )
    )


def is_common_advantage(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor | None,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    mask: Tensor | None,
    mask_mode: str,
    out: Tensor | None,
) -> bool:
    """The same for advantages of (T, N) tensors."""
    return (
        dones is not None
        and is_common(rewards, dones, gamma, mask, mask_mode, out)
        and _is_discount(gae_lambda)
        and len(rewards.shape) == 2
        and is_alike(values, rewards)
        and (out is None or not _share_memory(out, values))
    )


def is_alike(tensor: Tensor, rewards: Tensor) -> bool:
    """Whether one more tensor has the dtype and shape of such rewards, and asks for no more."""
    return _is_known(tensor) and tensor.dtype is rewards.dtype and tensor.shape == rewards.shape


def is_commonly_packed(rewards: Tensor, offsets: Tensor, gamma: float | Tensor) -> bool:
    """The same for packed rewards; not whether the offsets are right."""
    return (
        is_eager()
        and _is_discount(gamma)
        and _is_known(rewards)
        and rewards.ndim == 1
        and type(offsets) is Tensor
        and offsets.dtype is torch.int64
        and offsets.is_cpu
        and offsets.ndim == 1
        and offsets.shape[0] > 0
        and offsets.layout is _STRIDED
        and not offsets.is_neg()
        and not offsets._is_zerotensor()
    )


def _is_discount(gamma: float | Tensor) -> bool:
    return type(gamma) is float and 0.0 <= gamma <= 1.0


def _is_known(tensor: Tensor) -> bool:
    """Whether the CPU kernel can read and write a tensor directly."""
    return (
        type(tensor) is Tensor
        and tensor.dtype in _DTYPES
        and tensor.is_cpu
        and not tensor.requires_grad
        and tensor.layout is _STRIDED
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )


def _is_flags(tensor: Tensor, shape: torch.Size) -> bool:
    """The same of a bool for each reward."""
    return (
        type(tensor) is Tensor
        and tensor.dtype is _BOOL
        and tensor.is_cpu
        and tensor.shape == shape
        and tensor.layout is _STRIDED
        and not tensor._is_zerotensor()
    )


def check_rewards(rewards: Tensor) -> None:
    """A tensor of a supported dtype, strided."""
    if not isinstance(rewards, Tensor):
        remedy = "torch.as_tensor(rewards)"
        if isinstance(rewards, (list, tuple)) and any(
            isinstance(each, Tensor) and each.ndim > 0 for each in rewards
        ):
            remedy = "torch.stack(rewards, 1), or torch.cat(rewards) to a packed function"
        raise TypeError(f"rewards: expected a tensor, got {type(rewards).__name__}; pass {remedy}")
    if rewards.dtype not in _DTYPES:
        remedy = "rewards.real" if rewards.is_complex() else "rewards.float()"
        raise TypeError(
            "rewards: expected float32, float64, bfloat16 or float16, got"
            f" {name_of(rewards.dtype)}; pass {remedy}"
        )
    _check_layout("rewards", rewards)
    if rewards.ndim == 0:
        raise ValueError("rewards: expected (T, *batch), got no dimensions; pass rewards[None]")


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        remedy = f"{name}.to_dense()"
        if tensor.is_nested:
            remedy = f"{name}.values(), and rewards.offsets(), to a packed function"
        raise TypeError(f"{name}: expected a dense tensor, got {tensor.layout}; pass {remedy}")


def check_like(
    name: str,
    value: Tensor,
    rewards: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...] | None = None,
) -> None:
    """A tensor with the dtype and device of `rewards`, and its shape or another that is given."""
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
        raise TypeError(
            f"{name}: expected {name_of(dtype)}, got {name_of(value.dtype)}; pass {remedy}"
        )
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
    if tuple(value.shape) == (*shape, 1):
        return f"pass {name}[..., 0]"
    if name == "last_values":
        return "pass one for each sequence or environment, without time"
    if name == "final_values":
        if tuple(value.shape) == tuple(shape[1:]):
            return "pass one for each row, or what follows the last row as last_values"
        return "pass one for each row, or, packed, one for each sequence"
    if name == "values" and len(shape) > 1 and value.shape == (shape[0] + 1, *shape[1:]):
        return "pass values[:-1], and values[-1] as last_values"
    return "pass one for each element of rewards"


def check_values(values: Tensor, rewards: Tensor, following: str) -> None:
    """A value for each reward; `following` is the name of the argument behind it."""
    if values is None:
        raise TypeError(
            "values: expected a tensor, got NoneType; pass V of each state, or call reward_to_go or"
            " packed_reward_to_go, which take none"
        )
    if isinstance(values, Tensor) and values.dtype in (torch.bool, torch.int32, torch.int64):
        raise TypeError(
            f"values: expected {name_of(rewards.dtype)}, got {name_of(values.dtype)}; pass"
            f" rewards, values, {following}, in this order"
        )
    check_like("values", values, rewards, rewards.dtype)


def check_row_inputs(
    rewards: Tensor,
    dones: Tensor | None,
    final_values: Tensor | None,
    last_values: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
) -> tuple[Tensor, Tensor | None]:
    """What every row has, or a batch's last row; returns `dones` and `mask` as bools."""
    dones = check_dones(dones, rewards)
    if final_values is not None:
        check_like("final_values", final_values, rewards, rewards.dtype)
    if last_values is not None:
        check_like("last_values", last_values, rewards, rewards.dtype, rewards.shape[1:])
    return dones, check_mask(mask, mask_mode, rewards)


def check_dones(dones: Tensor | None, rewards: Tensor) -> Tensor:
    """A flag for each row; none are given where no row ends an episode."""
    if dones is None:
        return _no_ends(rewards)
    if isinstance(dones, (int, float)):  # a tuple: the compiler of torch 2.6 knows no union
        raise TypeError(
            f"dones: expected a bool tensor or None, got {type(dones).__name__}; pass gamma by"
            " name, or None for dones before it"
        )
    check_like("dones", dones, rewards, torch.bool)
    return dones


def _no_ends(rewards: Tensor) -> Tensor:
    """False for every row, of memory for one row or column: whichever lies in one piece."""
    length, *batch = rewards.shape
    if rewards.stride(0) == 1:
        one = torch.zeros(length, dtype=torch.bool, device=rewards.device)
        return one.view(length, *(1 for _ in batch)).expand(rewards.shape)
    return torch.zeros(batch, dtype=torch.bool, device=rewards.device).expand(rewards.shape)


def check_mask(mask: Tensor | None, mask_mode: str, rewards: Tensor) -> Tensor | None:
    """A mask as bools, or None."""
    if mask_mode not in _MASK_MODES:
        raise ValueError(f"mask_mode: expected one of {', '.join(_MASK_MODES)}, got {mask_mode!r}")
    if mask is None:
        return None
    check_like("mask", mask, rewards, mask.dtype if isinstance(mask, Tensor) else torch.bool)
    return as_bools(mask)


def as_bools(mask: Tensor) -> Tensor:
    """A mask as bools; the numbers of one on a CPU are looked at, and must be 0 and 1."""
    if mask.dtype == torch.bool:
        return mask
    if mask.is_complex():
        raise TypeError(
            "mask: expected bool, or integers or floats that are 0 or 1, got"
            f" {name_of(mask.dtype)}; pass a bool mask, True for a real row"
        )
    if mask.device.type != "cpu" or not is_eager():
        return mask != 0
    from vecpg.returns import flags  # when first needed: Numba takes a second

    counted = flags.of_numbers(mask)
    if counted is not None:
        return counted
    counted = mask == 1
    others = (counted != (mask != 0)).nonzero()
    if len(others):
        place = tuple(others[0].tolist())
        where = place if len(place) > 1 else place[0]
        raise ValueError(
            f"mask: expected 0 or 1, got {mask[place].item()} at place {where}; pass a bool"
            " mask, True for a real row"
        )
    return counted


def check_packed(
    rewards: Tensor,
    offsets: Tensor,
    final_values: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
    padded: str,
) -> tuple[Tensor, Tensor | None]:
    """What packed rewards have; returns int64 offsets and a bool mask. `padded` is who pads."""
    if rewards.ndim != 1:
        remedy = f"padded rewards to {padded}, with a mask"
        if rewards.ndim == 2 and rewards.shape[0] == 1:
            remedy = "rewards[0]"
        raise ValueError(
            f"rewards: expected (total,), got shape {tuple(rewards.shape)}; pass {remedy}"
        )
    offsets = check_offsets(offsets, rewards)
    if final_values is not None:
        check_like("final_values", final_values, rewards, rewards.dtype, (offsets.shape[0] - 1,))
    return offsets, check_mask(mask, mask_mode, rewards)


def check_offsets(offsets: Tensor, rewards: Tensor) -> Tensor:
    """From 0 to the number of rewards, never decreasing; on a CPU the numbers are looked at.

    Returns them as int64.
    """
    if not isinstance(offsets, Tensor):
        remedy = "offsets before gamma" if isinstance(offsets, float) else "torch.tensor(offsets)"
        raise TypeError(f"offsets: expected a tensor, got {type(offsets).__name__}; pass {remedy}")
    if offsets.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"offsets: expected int64 or int32, got {name_of(offsets.dtype)}; pass offsets.long()"
        )
    if offsets.ndim != 1 or offsets.shape[0] == 0:
        raise ValueError(
            f"offsets: expected shape (B + 1,), got {tuple(offsets.shape)}; {_OFFSETS_REMEDY}"
        )
    if offsets.device != rewards.device:
        raise ValueError(
            f"offsets: expected a tensor on {rewards.device} like rewards, got {offsets.device};"
            " pass offsets.to(rewards.device)"
        )
    offsets = offsets.long()
    if offsets.device.type != "cpu" or not is_eager():
        return offsets
    places = offsets.numpy(force=True)  # whatever view it is
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
    return offsets


def check_gamma(
    name: str, gamma: float | Tensor, rewards: Tensor, sequences: int | None = None
) -> tuple[float, Tensor | None]:
    """Check a discount, and return one number, or a float64 tensor in the shape of `rewards`.

    `sequences` is their number where they are packed.
    """
    if not isinstance(gamma, Tensor):
        # A tuple: the compiler of torch 2.6 knows no union.
        if isinstance(gamma, bool) or not isinstance(gamma, (int, float)):
            remedy = f"float({name})" if gamma is not None else f"{name}=1.0, or a smaller one"
            if hasattr(gamma, "__len__") and not isinstance(gamma, str):
                remedy = f"torch.as_tensor({name})"
            raise TypeError(
                f"{name}: expected a float or a tensor, got {type(gamma).__name__}; pass {remedy}"
            )
        if not 0 <= gamma <= 1:
            raise ValueError(
                f"{name}: expected a number in [0, 1], got {gamma}; pass one such as 0.99"
            )
        return float(gamma), None
    if not gamma.dtype.is_floating_point:
        raise TypeError(
            f"{name}: expected a float tensor, got {name_of(gamma.dtype)}; pass {name}.float()"
        )
    if gamma.device != rewards.device and not (gamma.ndim == 0 and gamma.device.type == "cpu"):
        raise ValueError(
            f"{name}: expected a tensor on {rewards.device} like rewards, got {gamma.device};"
            f" pass {name}.to(rewards.device)"
        )
    try:
        gamma.expand(rewards.shape)
    except RuntimeError:
        remedy = "pass a number, or one for each row or column"
        if rewards.ndim == 2 and tuple(gamma.shape) == (rewards.shape[1], 1):
            remedy = f"pass {name}.mT"
        elif rewards.ndim == 2 and tuple(gamma.shape) == (rewards.shape[0],):
            remedy = f"pass {name}[:, None]"
        if sequences is not None:
            remedy = "pass a number, or one for each reward"
            if tuple(gamma.shape) == (sequences,):
                remedy = f"pass {name}.repeat_interleave(offsets.diff())"
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {tuple(rewards.shape)},"
            f" got {tuple(gamma.shape)}; {remedy}"
        ) from None
    if gamma.device.type == "cpu" and is_eager():
        if gamma.numel():
            low, high = (end.item() for end in gamma.detach().aminmax())
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"{name}: expected numbers in [0, 1], got {low} to {high}; pass ones such as"
                    " 0.99"
                )
        plain = type(gamma) is Tensor and not gamma.requires_grad
        if plain and gamma.ndim == 0:  # a number: nothing is copied to another device
            return float(gamma), None
        if plain and gamma.dtype != torch.float64:
            wide = kept.empty_like(gamma, torch.float64).copy_(gamma)
            return 0.0, wide.expand(rewards.shape)
    return 0.0, gamma.to(device=rewards.device, dtype=torch.float64).expand(rewards.shape)


def check_out(out: Tensor, rewards: Tensor, given: Mapping[str, object]) -> None:
    """A tensor like `rewards` that shares no memory with an input and takes no gradient."""
    if not isinstance(out, Tensor) or out.dtype != rewards.dtype:
        found = name_of(out.dtype) if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(
            f"out: expected {name_of(rewards.dtype)} like rewards, got {found};"
            " pass torch.empty_like(rewards)"
        )
    check_like("out", out, rewards, rewards.dtype)
    gradients = torch.is_grad_enabled()
    if gradients and out.requires_grad:
        raise ValueError(
            "out: expected a tensor without gradients, got one that requires them; pass"
            " torch.empty_like(rewards)"
        )
    for name, value in given.items():
        if isinstance(value, Tensor):
            if gradients and value.requires_grad:
                raise ValueError(
                    f"out: expected no gradients, got {name} that requires them; pass no out, or"
                    " call it under torch.no_grad()"
                )
            if is_eager() and out.device == value.device and _share_memory(out, value):
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
    start = out.data_ptr()
    for other in others:
        if other is not None:
            after = other.data_ptr() - start
            overlap = after < _reach(out) if after >= 0 else -after < _reach(other)
            if overlap and out.numel() > 0 and other.numel() > 0:
                return True
    return False


def _reach(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if tensor.is_contiguous() or tensor.stride() == (1, tensor.shape[0]):
        return tensor.nbytes
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * step for size, step in steps) + 1) * tensor.element_size()


def is_plain(given: Iterable[object]) -> bool:
    """Whether memory can be read and written directly: no gradients, nobody who looks on."""
    if not is_eager():
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


def has_derivatives(*factors: float | Tensor) -> bool:
    """Whether one of them takes part in derivatives, or may, in forward mode."""
    tensors = [each for each in factors if isinstance(each, Tensor)]
    return any(each.requires_grad for each in tensors) or (len(tensors) > 0 and has_duals())


def has_duals() -> bool:
    """Whether derivatives are carried along, in forward mode."""
    if is_compiling():
        return False
    if _gone:
        try:
            with forward_ad.dual_level():  # there is none within another
                return False
        except RuntimeError:
            return True
    return forward_ad._current_level >= 0


def is_eager() -> bool:
    """Whether tensors hold numbers here and now: not traced, not batched, not dual numbers."""
    return not (
        is_compiling()
        or _has_transforms()
        or _count_modes() > 0
        or forward_ad._current_level >= 0
        or _get_tracing() is not None
    )


def name_of(dtype: torch.dtype) -> str:
    """A dtype without its package."""
    return str(dtype).removeprefix("torch.")
