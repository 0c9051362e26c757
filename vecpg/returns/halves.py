"""16-bit floats in machine code, as bits: Numba knows none, and not every processor does.

A kernel names the type of its elements by a number of that type, `LIKE[dtype]`. bfloat16 is read as
uint16 and float16 as int16, so that each has machine code of its own. `widen` and `narrow` are what
a loop reads and writes every element through; loops with them vectorize.

Both are torch's `.float()` and `.to(dtype)` bit for bit, but for the payload of a NaN: to the
nearest, ties to even, subnormal numbers included, whatever the processor does with those.
"""

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

LIKE = {
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
}
_BFLOAT16 = types.uint16
_SIXTEEN_BITS = (types.uint16, types.int16)
# Bits of float32: where float16's numbers begin to be normal, and where there are no more.
_SMALLEST_NORMAL = 113 << 23
_TOO_LARGE = 143 << 23
_INFINITY = 255 << 23
_HALF = 126 << 23  # 0.5: its last bit is worth float16's smallest number


@intrinsic
def widen(context, element):
    """An element as it lies in memory, as float32, or as float64 if it is."""
    if element not in _SIXTEEN_BITS:
        return element(element), lambda target, builder, signature, args: args[0]

    def build(target, builder, signature, args):
        return widened(target, builder, args[0], element)

    return types.float32(element), build


@intrinsic
def narrow(context, number, like):
    """A float64 as an element of the type of `like`: to 16 bits by way of float32."""

    def build(target, builder, signature, args):
        if like == types.float64:
            return args[0]
        single = builder.fptrunc(args[0], ir.FloatType())
        return single if like == types.float32 else narrowed(target, builder, single, like)

    return like(types.float64, like), build


def widened(target, builder, value, kind):
    """Build 16 bits, or a vector of them, as float32."""
    if kind != _BFLOAT16 and _has_float16(target):
        half = builder.bitcast(value, _of(value.type, ir.HalfType()))
        return builder.fpext(half, _of(value.type, ir.FloatType()))
    whole, single = _of(value.type, ir.IntType(32)), _of(value.type, ir.FloatType())
    bits = builder.zext(value, whole)
    if kind == _BFLOAT16:
        return builder.bitcast(builder.shl(bits, _all(whole, 16)), single)
    sign = builder.shl(builder.and_(bits, _all(whole, 0x8000)), _all(whole, 16))
    shifted = builder.shl(builder.and_(bits, _all(whole, 0x7FFF)), _all(whole, 13))
    normal = builder.add(shifted, _all(whole, 112 << 23))
    infinite = builder.add(shifted, _all(whole, 224 << 23))
    # As the last bits of a normal number, which is then taken away.
    smallest = builder.bitcast(_all(whole, _SMALLEST_NORMAL), single)
    above = builder.bitcast(builder.add(shifted, _all(whole, _SMALLEST_NORMAL)), single)
    subnormal = builder.bitcast(builder.fsub(above, smallest), whole)
    is_infinite = builder.icmp_signed(">=", shifted, _all(whole, 31 << 23))
    is_subnormal = builder.icmp_signed("<", shifted, _all(whole, 1 << 23))
    size = builder.select(is_infinite, infinite, normal)
    size = builder.select(is_subnormal, subnormal, size)
    return builder.bitcast(builder.or_(size, sign), single)


def narrowed(target, builder, value, kind):
    """Build float32, or a vector of them, as 16 bits."""
    short, whole = _of(value.type, ir.IntType(16)), _of(value.type, ir.IntType(32))
    if kind != _BFLOAT16 and _has_float16(target):
        half = builder.fptrunc(value, _of(value.type, ir.HalfType()))
        return builder.bitcast(half, short)
    bits = builder.bitcast(value, whole)
    size = builder.and_(bits, _all(whole, 0x7FFFFFFF))
    is_nan = builder.icmp_signed(">", size, _all(whole, _INFINITY))
    if kind == _BFLOAT16:
        odd = builder.and_(builder.lshr(bits, _all(whole, 16)), _all(whole, 1))
        rounded = builder.add(builder.add(bits, _all(whole, 0x7FFF)), odd)
        rounded = builder.lshr(rounded, _all(whole, 16))
        return builder.trunc(builder.select(is_nan, _all(whole, 0x7FC0), rounded), short)
    sign = builder.lshr(builder.xor(bits, size), _all(whole, 16))
    odd = builder.and_(builder.lshr(size, _all(whole, 13)), _all(whole, 1))
    normal = builder.add(builder.sub(size, _all(whole, (112 << 23) - 0xFFF)), odd)
    normal = builder.lshr(normal, _all(whole, 13))
    # Adding 0.5 rounds to float16's smallest number: the processor's own rounding, to even.
    half = builder.bitcast(_all(whole, _HALF), value.type)
    above = builder.bitcast(builder.fadd(builder.bitcast(size, value.type), half), whole)
    subnormal = builder.sub(above, _all(whole, _HALF))
    infinite = builder.select(is_nan, _all(whole, 0x7E00), _all(whole, 0x7C00))
    is_infinite = builder.icmp_signed(">=", size, _all(whole, _TOO_LARGE))
    is_subnormal = builder.icmp_signed("<", size, _all(whole, _SMALLEST_NORMAL))
    rounded = builder.select(is_infinite, infinite, normal)
    rounded = builder.select(is_subnormal, subnormal, rounded)
    return builder.trunc(builder.or_(rounded, sign), short)


def _has_float16(target):
    """Whether the processor that code is made for converts float16 itself.

    Without that, LLVM calls functions of a library that Numba does not bring.
    """
    triple, _, features = target.codegen().magic_tuple()
    return triple.startswith(("aarch64", "arm64")) or "+f16c" in features.split(",")


def fuses(target):
    """Whether the processor that code is made for multiplies and adds in one instruction."""
    triple, _, features = target.codegen().magic_tuple()
    return triple.startswith(("aarch64", "arm64")) or "+fma" in features.split(",")


def _of(like, element):
    """A scalar type, or one of vectors as long as those of `like`."""
    return ir.VectorType(element, like.count) if isinstance(like, ir.VectorType) else element


def _all(kind, number):
    """A constant, in every place of a vector."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [number] * kind.count)
    return ir.Constant(kind, number)
