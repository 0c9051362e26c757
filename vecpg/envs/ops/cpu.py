"""The operations in machine code, on float32. Loops over them vectorize, but for exp and log."""

import math

import numpy as np

from vecpg.kernels.jit import jit
from vecpg.kernels.matrix import tanh

__all__ = [
    "clip",
    "cos",
    "exp",
    "floor",
    "log",
    "maximum",
    "minimum",
    "sin",
    "sqrt",
    "tanh",
    "where",
]


@jit(as_written=True, inlined=True)
def sin(x):
    """As `ops.sin`."""
    rest, quadrant = _reduced(x)
    cosine, sine = _cos_sin(rest)
    odd = (quadrant == np.float32(1.0)) | (quadrant == np.float32(3.0))
    found = cosine if odd else sine
    return -found if quadrant >= np.float32(2.0) else found


@jit(as_written=True, inlined=True)
def cos(x):
    """As `ops.cos`."""
    rest, quadrant = _reduced(x)
    cosine, sine = _cos_sin(rest)
    odd = (quadrant == np.float32(1.0)) | (quadrant == np.float32(3.0))
    found = sine if odd else cosine
    below = (quadrant == np.float32(1.0)) | (quadrant == np.float32(2.0))
    return -found if below else found


@jit(as_written=True, inlined=True)
def _reduced(angle):
    """The angle less n quarter turns, between -pi/4 and pi/4, and n modulo 4.

    A quarter turn is subtracted in three parts, of which n times the first two are exact for n
    below 4096; far beyond, the rest means nothing, but is no more than 1.

    Source: Cody & Waite (1980), "Software manual for the elementary functions".
    """
    n = np.floor(angle * np.float32(2.0 / math.pi) + np.float32(0.5))
    rest = angle - n * np.float32(1.5703125)
    rest = rest - n * np.float32(4.838705062866211e-4)
    rest = rest + n * np.float32(4.371139000186243e-8)
    rest = np.float32(1.0) if rest > np.float32(1.0) else rest
    rest = np.float32(-1.0) if rest < np.float32(-1.0) else rest
    return rest, n - np.float32(4.0) * np.floor(n * np.float32(0.25))


@jit(as_written=True, inlined=True)
def _cos_sin(angle):
    """Within 1e-7 up to an angle of 1."""
    square = angle * angle
    cos = np.float32(-1.0 / 3628800.0)
    cos = cos * square + np.float32(1.0 / 40320.0)
    cos = cos * square - np.float32(1.0 / 720.0)
    cos = cos * square + np.float32(1.0 / 24.0)
    cos = cos * square - np.float32(0.5)
    cos = cos * square + np.float32(1.0)
    sin = np.float32(1.0 / 362880.0)
    sin = sin * square - np.float32(1.0 / 5040.0)
    sin = sin * square + np.float32(1.0 / 120.0)
    sin = sin * square - np.float32(1.0 / 6.0)
    return cos, sin * (square * angle) + angle


@jit(as_written=True, inlined=True)
def exp(x):
    """As `ops.exp`."""
    return math.exp(x)


@jit(as_written=True, inlined=True)
def log(x):
    """As `ops.log`."""
    return math.log(x)


@jit(as_written=True, inlined=True)
def sqrt(x):
    """As `ops.sqrt`."""
    return math.sqrt(x)


@jit(as_written=True, inlined=True)
def floor(x):
    """As `ops.floor`."""
    return np.floor(x)


@jit(as_written=True, inlined=True)
def where(flag, one, other):
    """As `ops.where`."""
    return one if flag else other


@jit(as_written=True, inlined=True)
def minimum(x, y):
    """As `ops.minimum`."""
    return x if (x < y) | (x != x) else y


@jit(as_written=True, inlined=True)
def maximum(x, y):
    """As `ops.maximum`."""
    return x if (x > y) | (x != x) else y


@jit(as_written=True, inlined=True)
def clip(x, low, high):
    """As `ops.clip`."""
    return minimum(maximum(x, low), high)
