"""Memory of large results, kept when they are gone.

The system clears memory that it hands out, page by page, when it is first written to: of a large
result that takes several times as long as computing it. So memory of a result that nobody refers to
any more is kept for the next, up to 256 MiB of it.
"""

import itertools
import math
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Smaller results are left to the allocator, which keeps memory of that size itself.
_LARGE = 2**20
# Bytes that are kept for results to come; what is in use is not counted.
_LIMIT = 2**28
_LINE = 64  # bytes that a processor fetches at once: no two results share some

# Without a lock: a garbage collection may call `_keep` at any point, in any thread. Each step is
# one of the interpreter's own, and a number names a buffer once and never again.
_free: dict[int, npt.NDArray[np.uint8]] = {}
_in_use: dict[int, weakref.ref[Any]] = {}
_numbers = itertools.count()


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As `torch.empty_like`, with memory of an earlier result where it is large and on the CPU.

    Views, arrays of NumPy and graphs of autograd hold the memory as they do any tensor's. But it is
    of one size: `resize_` to more elements, and a `resize_` of the storage, raise RuntimeError.

    Example:
        >>> result = empty_like(torch.zeros(1000, 1000))
        >>> place = result.data_ptr()
        >>> del result
        >>> empty_like(torch.zeros(1000, 1000)).data_ptr() == place
        True
    """
    dtype = tensor.dtype if dtype is None else dtype
    if tensor.numel() * dtype.itemsize < _LARGE or not tensor.is_cpu:
        return torch.empty_like(tensor, dtype=dtype)
    if tensor.is_contiguous() or (tensor.ndim == 2 and tensor.mT.is_contiguous()):
        return _strided(tensor.shape, tensor.stride(), dtype)
    return _strided(tensor.shape, torch.empty_like(tensor, device="meta").stride(), dtype)


def vector(count: int, dtype: torch.dtype) -> Tensor:
    """So many elements on the CPU, with memory of an earlier result where that is large."""
    if count * dtype.itemsize < _LARGE:
        return torch.empty(count, dtype=dtype, device="cpu")
    return _strided((count,), (1,), dtype)


def _strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = _take(nbytes)
    # Torch holds the view until the memory of the last tensor in it is given back.
    view = buffer[:nbytes]
    number = next(_numbers)
    _in_use[number] = weakref.ref(view, lambda _: _keep(number, buffer))
    storage = torch.from_numpy(view).untyped_storage()
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, strides)


def _take(nbytes: int) -> npt.NDArray[np.uint8]:
    """A free buffer that is large enough, and not much larger, or a new one."""
    # A list of the items would make tuples, at which a collection may run and change what is free.
    for number in reversed(list(_free)):  # the latest may be in a cache still
        buffer = _free.get(number)
        if buffer is None or not nbytes <= buffer.nbytes <= 1.25 * nbytes:
            continue
        if _free.pop(number, None) is not None:
            return buffer
    memory = np.empty(nbytes + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + nbytes]


def _keep(number: int, buffer: npt.NDArray[np.uint8]) -> None:
    """Nobody refers to a buffer any more; the oldest go where there are too many."""
    _in_use.pop(number, None)
    _free[number] = buffer
    while sum(each.nbytes for each in list(_free.values())) > _LIMIT:
        _free.pop(next(iter(list(_free)), number), None)
