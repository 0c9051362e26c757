"""Matrix products and elementary functions in machine code, on float32.

Matrices are vectors with strides. A row's bits depend on that row alone, whichever rows are beside
it. Rows have room for whole tiles of a product: what is beyond their width is 0.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vecpg.kernels.jit import jit
from vecpg.kernels.vectors import (
    TILE,
    eight_dots,
    has_avx512,
    lanes_sum,
    product_adder,
    slope_turner,
)

# Rows so many features long compete for the same places of the cache.
_FAR = 128
# 0 in a type that is no constant: else what it is passed to would be compiled for each constant.
NONE: Any = np.int64(0)


@jit
def whole_tiles(width):
    """The width rounded up to whole tiles."""
    return (width + (TILE - 1)) // TILE * TILE


@jit
def row_stride(width):
    """From a row of a hidden layer's activations to the next."""
    wide = whole_tiles(width)
    return wide + TILE if wide >= _FAR else wide


@jit
def add_product(
    a, a_row, a_column, b, b_tile, b_row, start, start_row, c, c_row, rows, inner, columns
):
    """C = S + A B on vectors that hold matrices; the columns of B, S and C make whole tiles.

    A has any strides; B goes on by `b_tile` from tile to tile and by `b_row` from row to row. S may
    be C, or with stride 0 a row that stands for all. An element of C is summed in the order of the
    inner index, wherever its row stands and whatever vectors the processor has. At 64 x 64 x 64, on
    one core of an AMD EPYC: 258 GFLOP/s with AVX-512, and 117 with AVX2.
    """
    tiles = columns // TILE
    # Two multiply-adds a cycle, four cycles long each, need sums in eight registers: with AVX2,
    # which has sixteen, four rows of a tile make them. AVX-512 has 32, and eight rows of two tiles
    # read less for each multiply-add.
    done, wide = NONE, NONE
    if has_avx512():
        done, pairs, wide = rows // 8 * 8, tiles // 2 * 2, tiles // 4 * 4
        for j in range(0, pairs, 2):
            for n in range(0, done, 8):
                _add_8_by_2(
                    a, a_row, a_column, b, b_tile, b_row, start, start_row, c, c_row, inner, n, j
                )
        for j in range(pairs, tiles):
            for n in range(0, done, 4):
                _add_4_by_1(
                    a, a_row, a_column, b, b_tile, b_row, start, start_row, c, c_row, inner, n, j
                )
        for j in range(0, wide, 4):
            n = done
            if rows & 4:
                _add_4_by_4(
                    a, a_row, a_column, b, b_tile, b_row, start, start_row, c, c_row, inner, n, j
                )
                n += 4
            if rows & 2:
                _add_2_by_4(
                    a, a_row, a_column, b, b_tile, b_row, start, start_row, c, c_row, inner, n, j
                )
                n += 2
            if rows & 1:
                _add_1_by_4(
                    a, a_row, a_column, b, b_tile, b_row, start, start_row, c, c_row, inner, n, j
                )
    for j in range(wide, tiles):
        n = done
        while n + 4 <= rows:
            _add_4_by_1(
                a, a_row, a_column, b, b_tile, b_row, start, start_row, c, c_row, inner, n, j
            )
            n += 4
        while n < rows:
            _add_1_by_1(
                a, a_row, a_column, b, b_tile, b_row, start, start_row, c, c_row, inner, n, j
            )
            n += 1


_add_8_by_2, _add_4_by_4 = product_adder(8, 2), product_adder(4, 4)
_add_2_by_4, _add_1_by_4 = product_adder(2, 4), product_adder(1, 4)
_add_4_by_1, _add_1_by_1 = product_adder(4, 1), product_adder(1, 1)


@jit
def dots(a, a_row, b, b_row, start, c, c_row, rows, inner, columns):
    """C[m, n] = start[m] + sum over i of A[n, i] B[m, i], where rows of A and B make whole tiles.

    So many rows of A, and columns of C, are taken as make whole eights: there has to be room.
    """
    for m in range(columns):
        for n in range(0, rows, 8):
            eight_dots(a, n * a_row, a_row, b, m * b_row, start[m], c, m * c_row + n, inner // TILE)


@jit
def sum_of(vector, count):
    """The sum, in float64, of so many numbers; those behind them are 0, up to a whole tile."""
    return lanes_sum(vector, (count + (TILE - 1)) // TILE)


@jit
def turn_slopes(slopes, active, stride, rows, columns, relu, total):
    """From the slopes in what an activation gave, `active`, those in what it took, in place.

    Rows are `stride` apart and make whole tiles. Each column's slopes are added to `total`.
    """
    tiles = columns // TILE
    wide = tiles // 4 * 4
    for j in range(0, wide, 4):
        if relu:
            _turn_relu_4(slopes, active, stride, rows, total, j)
        else:
            _turn_tanh_4(slopes, active, stride, rows, total, j)
    for j in range(wide, tiles):
        if relu:
            _turn_relu(slopes, active, stride, rows, total, j)
        else:
            _turn_tanh(slopes, active, stride, rows, total, j)


_turn_tanh_4, _turn_tanh = slope_turner(4, relu=False), slope_turner(1, relu=False)
_turn_relu_4, _turn_relu = slope_turner(4, relu=True), slope_turner(1, relu=True)


@jit
def tanh(x):
    """Tanh within 1e-7, also of itself, and exactly 1 far out. It vectorizes.

    With e = exp(2|x|) - 1, it is e / (e + 2), and errors of a large e do not show.
    """
    x_abs = abs(x)
    doubled = min(x_abs + x_abs, np.float32(20.0))
    power, grown = _scaled_growth(doubled)
    e = power * grown + (power - np.float32(1.0))
    return math.copysign(e / (e + np.float32(2.0)), x)


@jit
def exp(x):
    """Exp of a number of at most 0, within 1e-6 of itself and never below 1e-38. It vectorizes."""
    power, grown = _scaled_growth(max(x, np.float32(-86.0)))
    return power * grown + power


@jit
def log(x):
    """Log of a number of at least 1, within 1e-7, also of itself. It vectorizes.

    Coefficients: Cephes, `logf`.
    """
    split: Any = _power_and_rest(x)
    n, z = split[0], split[1] - np.float32(1.0)
    y = np.float32(7.0376836292e-2)
    y = y * z + np.float32(-1.1514610310e-1)
    y = y * z + np.float32(1.1676998740e-1)
    y = y * z + np.float32(-1.2420140846e-1)
    y = y * z + np.float32(1.4249322787e-1)
    y = y * z + np.float32(-1.6668057665e-1)
    y = y * z + np.float32(2.0000714765e-1)
    y = y * z + np.float32(-2.4999993993e-1)
    y = y * z + np.float32(3.3333331174e-1)
    square = z * z
    result = n * np.float32(math.log(2.0)) + (z - square * (np.float32(0.5) - y * z))
    return result if x == x else x  # NaN has no power and rest


@jit
def _scaled_growth(x):
    """2^n and exp(r) - 1 with x = n log(2) + r and r near 0; x is no more than 88 from 0.

    Coefficients: of the least error of exp(r) - 1, 3e-8 of itself, for |r| <= log(2) / 2.
    """
    nearest: Any = _nearest_power(x * np.float32(1.0 / math.log(2.0)))
    power, n = nearest
    r = x - n * np.float32(math.log(2.0))
    grown = np.float32(1.37144e-3)
    grown = grown * r + np.float32(8.36935e-3)
    grown = grown * r + np.float32(4.167039e-2)
    grown = grown * r + np.float32(0.16666517)
    grown = grown * r + np.float32(0.49999984)
    return power, grown * (r * r) + r


@intrinsic
def _nearest_power(context, x):
    """2^n and n, for the whole number n that is nearest to x, from -126 to 127; float32.

    Beside a number of 24 bits, 1.5 * 2^23, there is room for whole ones. It is larger by 127 here:
    so n's last bits are those of the exponent of 2^n, and are moved to its place.
    """

    def build(target, builder, signature, args):
        number, word = ir.FloatType(), ir.IntType(32)
        large = number(1.5 * 2**23 + 127)
        # With a flag, so that Numba does not allow to leave out what is added and subtracted.
        near = builder.fadd(args[0], large, flags=("contract",))
        n = builder.fsub(near, large, flags=("contract",))
        power = builder.bitcast(builder.shl(builder.bitcast(near, word), word(23)), number)
        return cgutils.pack_array(builder, [power, n], number)

    return types.UniTuple(types.float32, 2)(types.float32), build


@intrinsic
def _power_and_rest(context, x):
    """Of a normal positive x the n, and x / 2^n, that is from sqrt(1/2) to sqrt(2); float32."""

    def build(target, builder, signature, args):
        number, word = ir.FloatType(), ir.IntType(32)
        root = word(0x3F3504F3)  # sqrt(1/2)
        over = builder.sub(builder.bitcast(args[0], word), root)
        n = builder.sitofp(builder.ashr(over, word(23)), number)
        rest = builder.add(builder.and_(over, word(2**23 - 1)), root)
        return cgutils.pack_array(builder, [n, builder.bitcast(rest, number)], number)

    return types.UniTuple(types.float32, 2)(types.float32), build
