"""Whitening on the CPU, in machine code: one pass to sum, and one to write.

Elements are summed up in chunks of a fixed size, and chunks in their order: no bit depends on the
number of threads.
"""

import math

import numpy as np
import torch
from torch import Tensor

from vecpg.kernels.jit import jit
from vecpg.returns.halves import LIKE, narrow, widen
from vecpg.returns.ranges import in_threads
from vecpg.returns.tiles import elements

# Elements of a chunk: they are in the fastest cache when their squares are summed up.
_CHUNK = 2048
_FLAG = np.uint8(0)
# What is known of a chunk: how many are counted, one of them, what their mean is above that, and
# the sum of squares of their distances from the mean.
_NUMBER, _ORIGIN, _ABOVE, _SQUARES = range(4)


def masked_whiten(x: Tensor, mask: Tensor | None, groups: int, ddof: int, out: Tensor) -> None:
    """Write what `vecpg.returns.masked_whiten` describes, of groups that follow one another.

    Elements are compared with those of their group: the first, second ... `groups`-th part of all,
    in the order of memory, which is that of all three, dense tensors.
    """
    size = x.numel() // groups
    chunks = -(-size // _CHUNK)
    known = torch.empty((groups * chunks, 4), dtype=torch.float64, device="cpu")
    scales = torch.empty((groups, 3), dtype=torch.float64, device="cpu")
    real = 0 if mask is None else mask.data_ptr()
    like, work = LIKE[x.dtype], x.numel()
    options = x.data_ptr(), real, known.data_ptr(), size, chunks
    in_threads(_sum, options, groups * chunks, (like,), work)
    _combine(known.data_ptr(), scales.data_ptr(), groups, chunks, ddof)
    options = x.data_ptr(), real, scales.data_ptr(), size, chunks
    in_threads(_write, options, groups * chunks, (out.data_ptr(), like), work)


@jit
def _sum(x, mask, known, size, chunks, start, stop, like):
    """What is known of chunks `start` to `stop`."""
    bytes_each = np.full(1, like).itemsize
    away = np.empty(_CHUNK)
    for chunk in range(start, stop):
        first = chunk // chunks * size + chunk % chunks * _CHUNK
        count = min(_CHUNK, size - chunk % chunks * _CHUNK)
        row = elements(x + first * bytes_each, like, count)
        real = elements(mask if mask == 0 else mask + first, _FLAG, 0 if mask == 0 else count)
        into = elements(known + chunk * 32, np.float64(0), 4)
        k = 0
        while mask != 0 and k < count and real[k] == 0:
            k += 1
        into[:] = 0.0
        if k == count:
            continue
        origin = np.float64(widen(row[k]))
        number, total, squares = 0, 0.0, 0.0
        if mask == 0:
            number = count
            for i in range(count):
                away[i] = np.float64(widen(row[i])) - origin
                total += away[i]
            above = total / number
            for i in range(count):
                squares += (away[i] - above) ** 2
        else:
            for i in range(count):
                number += real[i] != 0
            for i in range(count):
                # Selected before it is added: a masked element may be NaN.
                element = np.float64(widen(row[i])) - origin
                away[i] = element if real[i] != 0 else 0.0
                total += away[i]
            above = total / number
            for i in range(count):
                distance = away[i] - above
                squares += distance * distance if real[i] != 0 else 0.0
        into[_NUMBER], into[_ORIGIN], into[_ABOVE], into[_SQUARES] = number, origin, above, squares


@jit(as_written=True)
def _combine(known, scales, groups, chunks, ddof):
    """Each group's origin, its mean above that, and one over its standard deviation."""
    for group in range(groups):
        of_group = elements(scales + group * 24, np.float64(0), 3)
        parts = elements(known + group * chunks * 32, np.float64(0), 4 * chunks)
        number, origin, above, squares = 0.0, 0.0, 0.0, 0.0
        for chunk in range(chunks):
            part = parts[4 * chunk : 4 * chunk + 4]
            if part[_NUMBER] == 0.0:
                continue
            if number == 0.0:
                origin = part[_ORIGIN]
            both = number + part[_NUMBER]
            further = (part[_ORIGIN] - origin) + (part[_ABOVE] - above)
            squares += part[_SQUARES] + further * further * (number * part[_NUMBER] / both)
            above += further * (part[_NUMBER] / both)
            number = both
        # Not a number is not 0.
        differ = squares != 0.0 and number > ddof
        of_group[0], of_group[1] = origin, above
        of_group[2] = 1.0 / math.sqrt(squares / (number - ddof)) if differ else 0.0


@jit(as_written=True)
def _write(x, mask, scales, size, chunks, start, stop, out, like):
    """The elements of chunks `start` to `stop`.

    As written: the mean of large numbers, origin and all, would be rounded.
    """
    bytes_each = np.full(1, like).itemsize
    for chunk in range(start, stop):
        first = chunk // chunks * size + chunk % chunks * _CHUNK
        count = min(_CHUNK, size - chunk % chunks * _CHUNK)
        row = elements(x + first * bytes_each, like, count)
        into = elements(out + first * bytes_each, like, count)
        real = elements(mask if mask == 0 else mask + first, _FLAG, 0 if mask == 0 else count)
        origin, above, scale = elements(scales + chunk // chunks * 24, np.float64(0), 3)
        if mask == 0:
            for i in range(count):
                into[i] = narrow((np.float64(widen(row[i])) - origin - above) * scale, like)
        else:
            for i in range(count):
                whitened = (np.float64(widen(row[i])) - origin - above) * scale
                into[i] = narrow(whitened if real[i] != 0 else 0.0, like)
