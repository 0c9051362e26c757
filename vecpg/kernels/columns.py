"""Tuples of float32 read from memory and written to it, for functions of one copy of something.

A loop over such a function vectorizes: number v of copy i stands at [v * stride + i].
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

VECTOR = types.Array(types.float32, 1, "C")


def reader(count: int, stride: int) -> Any:
    """`read(vector, at)`: the tuple of `count` numbers at `at`, `at + stride`, ..."""

    @intrinsic
    def read(context, vector, at):
        given = types.UniTuple(types.float32, count)

        def build(target, builder, signature, args):
            first = _first(target, builder, signature, args)
            numbers = [
                builder.load(builder.gep(first, [ir.IntType(64)(number * stride)]))
                for number in range(count)
            ]
            return cgutils.pack_array(builder, numbers, ir.FloatType())

        return given(VECTOR, types.intp), build

    return read


def writer(count: int, stride: int) -> Any:
    """`write(vector, at, numbers)`: the opposite. Other numbers than float32 do not compile."""

    @intrinsic
    def write(context, vector, at, numbers):
        wanted = types.UniTuple(types.float32, count)
        if numbers != wanted:
            raise TypingError(f"expected {wanted}, got {numbers}")

        def build(target, builder, signature, args):
            first = _first(target, builder, signature, args)
            for number in range(count):
                place = builder.gep(first, [ir.IntType(64)(number * stride)])
                builder.store(builder.extract_value(args[2], number), place)
            return target.get_dummy_value()

        return types.none(VECTOR, types.intp, numbers), build

    return write


def _first(target: Any, builder: Any, signature: Any, args: Any) -> Any:
    array = target.make_array(signature.args[0])(target, builder, args[0])
    return builder.gep(array.data, [args[1]])
