"""Which elements count: a mask of bools, or of numbers that are 0 or 1."""

import torch
from torch import Tensor

from vecpg.returns.checks import is_eager, name_of

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_floats(name: str, values: Tensor) -> None:
    """A dense tensor of floats."""
    if not isinstance(values, Tensor):
        raise TypeError(
            f"{name}: expected a tensor, got {type(values).__name__}; pass torch.as_tensor({name})"
        )
    if values.dtype not in _FLOATS:
        remedy = f"{name}.real" if values.is_complex() else f"{name}.float()"
        raise TypeError(
            f"{name}: expected float32, float64, bfloat16 or float16, got {name_of(values.dtype)};"
            f" pass {remedy}"
        )
    if values.layout is not torch.strided:
        raise TypeError(
            f"{name}: expected a dense tensor, got {values.layout}; pass {name}.to_dense()"
        )


def counted(mask: Tensor | None, name: str, values: Tensor) -> Tensor:
    """A mask as bools in the shape of `values`, which are called `name`."""
    if mask is None:
        return torch.ones_like(values, dtype=torch.bool)
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"mask: expected a tensor or None, got {type(mask).__name__};"
            " pass torch.as_tensor(mask)"
        )
    if mask.is_complex() or mask.layout is not torch.strided:
        raise TypeError(
            f"mask: expected a dense tensor of bool, or of numbers that are 0 or 1, got"
            f" {name_of(mask.dtype)}, {mask.layout}; pass a bool mask, True where it counts"
        )
    if mask.device != values.device:
        raise ValueError(
            f"mask: expected a tensor on {values.device} like {name}, got {mask.device};"
            f" pass mask.to({name}.device)"
        )
    try:
        mask = mask.expand(values.shape)
    except RuntimeError:
        raise ValueError(
            f"mask: expected a shape that broadcasts to that of {name}, {tuple(values.shape)},"
            f" got {tuple(mask.shape)}; pass one flag for each element"
        ) from None
    if mask.dtype == torch.bool:
        return mask
    if mask.device.type == "cpu" and is_eager() and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"mask: expected 0 or 1, got {mask.min().item()} to {mask.max().item()}; pass a bool"
            " mask, True where it counts"
        )
    return mask != 0
