"""Numbers with mean 0 and standard deviation 1 over the elements that count."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vecpg.kernels import kept
from vecpg.returns.checks import as_bools, is_plain, name_of

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def masked_whiten(
    x: Tensor, mask: Tensor | None, *, dim: int | Sequence[int] | None = None, ddof: int = 1
) -> Tensor:
    """Whiten over the counted elements, all together or along dimensions.

        y = (x - mean) / std,   std^2 = sum of (x - mean)^2 over counted / (number counted - ddof)

    Where std is 0 or is not defined (equal elements, at most ddof of them) y is 0: never NaN, and
    no epsilon in the divisor. A masked element gets 0, and it is not read: it may be NaN.

    Args:
        x: any shape, float32, float64, bfloat16 or float16.
        mask: a shape that broadcasts to that of `x` (so (B, 1) counts whole rows), bool, or numbers
            that are 0 or 1. True = counted. None counts all.
        dim: the dimension, or dimensions, that an element is compared along; all if not given.
        ddof: what the number of counted elements is lowered by in the variance: 1 for that of a
            sample, 0 for that of a population.

    Returns:
        the shape, dtype and device of `x`; differentiable in `x`, any number of times.

    Raises:
        TypeError: a dtype that is not as above, an argument that is not a tensor or an integer.
        ValueError: shapes or devices that differ, a `dim` that `x` has not, or twice, a negative
            `ddof`, a mask with other numbers.

    Numerics: float64 throughout, rounded once. What is summed are differences from one element, so
    equal elements give 0 exactly, and large ones keep their digits.
    Source: Stiennon et al. (2020), "Learning to summarize from human feedback", whose code whitens
    advantages so.

    Example:
        >>> x = torch.tensor([1.0, 3.0, torch.nan])
        >>> masked_whiten(x, torch.tensor([True, True, False]))
        tensor([-0.7071,  0.7071,  0.0000])
    """
    _check_floats(x)
    dims = _dims(dim, x)
    if isinstance(ddof, bool) or not isinstance(ddof, int):
        raise TypeError(f"ddof: expected an int, got {type(ddof).__name__}; pass 1 or 0")
    if ddof < 0:
        raise ValueError(f"ddof: expected 0 or more, got {ddof}; pass 1 or 0")
    given = x, mask
    counts = None if mask is None else _counted(mask, x)
    if x.numel() == 0:
        return x.clone()
    if x.is_cpu and is_plain(given):
        written = _in_machine_code(x, counts, dims, ddof)
        if written is not None:
            return written
    if counts is None:
        counts = torch.ones_like(x, dtype=torch.bool)

    wide = torch.float64
    number = counts.sum(dims, keepdim=True, dtype=wide)
    origin = torch.where(counts, x.detach(), -torch.inf).amax(dims, keepdim=True)
    origin = torch.where(number > 0.0, origin, 0.0)
    # Selected before it is multiplied by anything: a masked element may be NaN.
    away = torch.where(counts, x, origin).to(wide).sub_(origin)
    mean = away.sum(dims, keepdim=True) / number.clamp(min=1.0)
    away = away.sub_(mean).mul_(counts)
    variance = (away * away).sum(dims, keepdim=True) / (number - ddof).clamp(min=1.0)
    differ = (variance != 0.0) & (number > ddof)
    scale = torch.where(differ, torch.where(differ, variance, 1.0).rsqrt(), 0.0)
    return torch.where(counts, (away * scale).to(x.dtype), 0.0)


def _in_machine_code(
    x: Tensor, counts: Tensor | None, dims: tuple[int, ...], ddof: int
) -> Tensor | None:
    """On the CPU without gradients; None where a group's elements are not neighbours in memory."""
    order = sorted((i for i in range(x.ndim) if x.shape[i] > 1), key=x.stride, reverse=True)
    inside = [i in dims for i in order]
    rest = [i for i in range(x.ndim) if x.shape[i] == 1]
    if inside != sorted(inside) or not x.permute(order + rest).is_contiguous():
        return None
    from vecpg.returns import cpu_whiten  # Numba takes a second

    if counts is not None and any(counts.stride(i) != x.stride(i) for i in order):
        counts = torch.empty_like(x, dtype=torch.bool).copy_(counts)
    groups = math.prod(x.shape[i] for i in order if i not in dims)
    out = kept.empty_like(x)
    cpu_whiten.masked_whiten(x, counts, groups, ddof, out)
    return out


def _dims(dim: int | Sequence[int] | None, x: Tensor) -> tuple[int, ...]:
    if dim is None:
        return tuple(range(x.ndim))
    given = (dim,) if isinstance(dim, int) else tuple(dim)
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in given):
        raise TypeError(f"dim: expected an int, several, or None, got {dim!r}")
    dims = tuple(each % x.ndim for each in given if -x.ndim <= each < x.ndim)
    if not given or len(set(dims)) < len(given):
        raise ValueError(
            f"dim: expected different dimensions of x, which has {x.ndim}, got {dim!r}; pass None"
            " for all"
        )
    return dims


def _check_floats(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}; pass torch.as_tensor(x)")
    if x.dtype not in _FLOATS:
        raise TypeError(
            f"x: expected float32, float64, bfloat16 or float16, got {name_of(x.dtype)};"
            f" pass {'x.real' if x.is_complex() else 'x.float()'}"
        )
    if x.layout is not torch.strided:
        remedy = "x.values()" if x.is_nested else "x.to_dense()"
        raise TypeError(f"x: expected a dense tensor, got {x.layout}; pass {remedy}")


def _counted(mask: Tensor, x: Tensor) -> Tensor:
    """A mask as bools in the shape of `x`."""
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"mask: expected a tensor or None, got {type(mask).__name__}; pass"
            " torch.as_tensor(mask)"
        )
    if mask.device != x.device:
        raise ValueError(
            f"mask: expected a tensor on {x.device} like x, got {mask.device}; pass"
            " mask.to(x.device)"
        )
    try:
        mask = mask.expand(x.shape)
    except RuntimeError:
        is_turned = mask.ndim == 2 and mask.mT.shape == x.shape
        raise ValueError(
            f"mask: expected a shape that broadcasts to that of x, {tuple(x.shape)}, got"
            f" {tuple(mask.shape)}; pass {'mask.mT' if is_turned else 'one flag for each element'}"
        ) from None
    return as_bools(mask)
