"""The operations of a definition as parts of Triton kernels, on float32 blocks or numbers."""

import triton
import triton.language as tl

from vecpg.kernels.cuda import cos, exp, log, sin, tanh

__all__ = [
    "clip",
    "cos",
    "divide",
    "exp",
    "floor",
    "log",
    "maximum",
    "minimum",
    "modulo",
    "sin",
    "sqrt",
    "tanh",
    "where",
]


@triton.jit
def sqrt(x):
    """As `ops.sqrt`."""
    return tl.sqrt_rn(x)


@triton.jit
def floor(x):
    """As `ops.floor`."""
    return tl.floor(x)


@triton.jit
def where(flag, one, other):
    """As `ops.where`."""
    return tl.where(flag, one, other)


@triton.jit
def minimum(x, y):
    """As `ops.minimum`."""
    return tl.where((x < y) | (x != x), x, y)


@triton.jit
def maximum(x, y):
    """As `ops.maximum`."""
    return tl.where((x > y) | (x != x), x, y)


@triton.jit
def clip(x, low, high):
    """As `ops.clip`."""
    return minimum(maximum(x, low), high)


@triton.jit
def divide(x, y):
    """X / y, rounded to the nearest: Triton's own division of float32 is not."""
    return tl.div_rn(x, y)


@triton.jit
def modulo(x, y):
    """X % y as Python has it, with the sign of y; exact for quotients below 2**28."""
    wide, by = x.to(tl.float64), y.to(tl.float64)
    return (wide - tl.floor(wide / by) * by).to(tl.float32)
