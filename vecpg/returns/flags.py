"""A mask of numbers as bools, in machine code: looked at and converted in one pass."""

import numpy as np
import torch
from torch import Tensor

from vecpg.kernels.jit import jit
from vecpg.returns.tiles import elements

# What a one looks like in memory, and what has that many bits.
_ONE = {
    torch.float64: 0x3FF0000000000000,
    torch.float32: 0x3F800000,
    torch.float16: 0x3C00,
    torch.bfloat16: 0x3F80,
    torch.int64: 1,
    torch.int32: 1,
    torch.int16: 1,
    torch.int8: 1,
    torch.uint8: 1,
}
_LIKE = {1: np.uint8(0), 2: np.uint16(0), 4: np.uint32(0), 8: np.uint64(0)}


def of_numbers(mask: Tensor) -> Tensor | None:
    """True for 1 and False for 0; None where there is another number, or no kernel for it."""
    if type(mask) is not Tensor or mask.dtype not in _ONE or mask._is_zerotensor():
        return None
    mask = mask.resolve_neg()
    if not (mask.is_contiguous() or (mask.ndim == 2 and mask.mT.is_contiguous())):
        mask = mask.contiguous()
    flags = torch.empty_like(mask, dtype=torch.bool)
    like = _LIKE[mask.itemsize]
    one = type(like)(_ONE[mask.dtype])
    right = _convert(mask.data_ptr(), flags.data_ptr(), mask.numel(), one, like)
    return flags if right else None


@jit
def _convert(numbers, flags, count, one, like):
    given = elements(numbers, like, count)
    result = elements(flags, np.uint8(0), count)
    others = 0
    for i in range(count):
        bits = given[i]
        result[i] = bits == one
        others |= (bits != one) & (bits != 0)
    return others == 0
