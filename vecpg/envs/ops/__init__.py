"""What a definition of an environment computes with, beside Python's + - * / % abs < == & |.

Here the operations are on plain numbers. `vecpg.envs.ops.tensor` has them on tensors, and
`vecpg.envs.ops.cpu` in machine code; those are put in the place of these.
"""

import math


def sin(x: float) -> float:
    """The sine of an angle in radians. In machine code exact to 1e-7 up to an angle of 1000."""
    return math.sin(x)


def cos(x: float) -> float:
    """The cosine, as `sin`."""
    return math.cos(x)


def exp(x: float) -> float:
    """E to the power of x."""
    return math.exp(x)


def log(x: float) -> float:
    """The natural logarithm."""
    return math.log(x)


def sqrt(x: float) -> float:
    """The square root."""
    return math.sqrt(x)


def tanh(x: float) -> float:
    """The hyperbolic tangent."""
    return math.tanh(x)


def floor(x: float) -> float:
    """The largest whole number that is not above x."""
    return float(math.floor(x))


def where(flag: bool, one: float, other: float) -> float:
    """`one` where the flag is True, else `other`; both are computed.

    Example:
        >>> where(2.0 > 1.0, 10.0, -10.0)
        10.0
    """
    return one if flag else other


def minimum(x: float, y: float) -> float:
    """The smaller of two numbers; NaN where one of them is NaN."""
    return x if x < y or x != x else y


def maximum(x: float, y: float) -> float:
    """The larger of two numbers; NaN where one of them is NaN."""
    return x if x > y or x != x else y


def clip(x: float, low: float, high: float) -> float:
    """X inside its bounds.

    Example:
        >>> clip(3.0, -1.0, 1.0)
        1.0
    """
    return minimum(maximum(x, low), high)
