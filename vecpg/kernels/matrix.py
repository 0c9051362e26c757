"""Matrix products and elementary functions in machine code, on float32.

Matrices are vectors with strides. A row's bits depend on that row alone, whichever rows are beside
it. Rows have room for whole tiles of a product: what is beyond their width is 0.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vecpg.kernels.jit import jit

# Columns of a tile of a product, one vector of AVX-512 or two of AVX2. Two multiply-adds a cycle,
# four cycles long each, need sums in eight registers: with AVX2, which has sixteen, four rows of a
# tile make them. AVX-512 has 32, and eight rows of two tiles read less for each multiply-add.
TILE = 16
_ROWS, _MANY_ROWS = 4, 8
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
def add_rows(matrix, stride, rows, total):
    """Add every row of a matrix to `total`."""
    for n in range(rows):
        row = matrix[n * stride : n * stride + len(total)]
        for i in range(len(total)):
            total[i] += row[i]


@jit
def add_product(a, a_row, a_column, b, b_tile, b_row, c, c_row, rows, inner, columns):
    """C += A B on vectors that hold matrices; the columns of B and C make whole tiles.

    A has any strides; B goes on by `b_tile` from tile to tile and by `b_row` from row to row. An
    element of C is summed in the order of the inner index, wherever its row stands and whatever
    vectors the processor has. At 64 x 64 x 64, on one core of an AMD EPYC: 258 GFLOP/s, and 117
    with AVX2.
    """
    j = np.int64(0)
    if _has_avx512():
        while j + 2 * TILE <= columns:
            b_at = j // TILE * b_tile
            n = np.int64(0)
            while n + _MANY_ROWS <= rows:
                to = j + n * c_row
                _add_many(
                    a, n * a_row, a_row, a_column, b, b_at, b_tile, b_row, c, to, c_row, inner
                )
                n += _MANY_ROWS
            while n + _ROWS <= rows:
                to = j + n * c_row
                _add_pair(
                    a, n * a_row, a_row, a_column, b, b_at, b_tile, b_row, c, to, c_row, inner
                )
                n += _ROWS
            while n < rows:
                to = j + n * c_row
                _add_row_pair(
                    a, n * a_row, a_row, a_column, b, b_at, b_tile, b_row, c, to, c_row, inner
                )
                n += 1
            j += 2 * TILE
    while j < columns:
        b_at = j // TILE * b_tile
        n = np.int64(0)
        while n + _ROWS <= rows:
            to = j + n * c_row
            _add_tile(a, n * a_row, a_row, a_column, b, b_at, b_tile, b_row, c, to, c_row, inner)
            n += _ROWS
        while n < rows:
            to = j + n * c_row
            _add_row(a, n * a_row, a_row, a_column, b, b_at, b_tile, b_row, c, to, c_row, inner)
            n += 1
        j += TILE


@intrinsic
def _has_avx512(context):
    """Whether code is made for a processor that has AVX-512: a constant in it."""

    def build(target, builder, signature, args):
        # Kernels are kept on disk for these features.
        features = target.codegen().magic_tuple()[2].split(",")
        return ir.IntType(1)("+avx512f" in features)

    return types.boolean(), build


def _tile_intrinsic(rows: int, tiles: int) -> Any:
    """Adds to `tiles` tiles of C, whose sums stay in registers, `rows` rows of A times those of B.

    Matrices are given as vectors, each with the place of the first element and the strides of its
    rows, A with that of its columns and B with that of its tiles too.
    """

    @intrinsic
    def _tile(context, a, a_at, a_row, a_column, b, b_at, b_tile, b_row, c, c_at, c_row, inner):
        place, stride = types.intp, types.intp
        given = a, place, stride, stride, b, place, stride, stride, c, place, stride, types.intp

        def build(target, builder, signature, args):
            a_at, a_row, a_column, b_at, b_tile, b_row, c_at, c_row, inner = (
                args[number] for number in (1, 2, 3, 5, 6, 7, 9, 10, 11)
            )
            index = inner.type
            vector = ir.VectorType(ir.FloatType(), TILE)

            def first(number, at):
                array = target.make_array(given[number])(target, builder, args[number])
                return builder.gep(array.data, [at])

            def vectors(pointer, stride):
                places = (
                    builder.gep(pointer, [builder.mul(stride, index(tile))])
                    for tile in range(tiles)
                )
                return [builder.bitcast(place, vector.as_pointer()) for place in places]

            def row_of(pointer, stride, row):
                return builder.gep(pointer, [builder.mul(stride, index(row))])

            a_rows = [row_of(first(0, a_at), a_row, row) for row in range(rows)]
            b_first, c_first = first(4, b_at), first(8, c_at)
            places = [
                place
                for row in range(rows)
                for place in vectors(row_of(c_first, c_row, row), index(TILE))
            ]
            before = [builder.load(place, align=4) for place in places]
            entry, loop = builder.block, builder.append_basic_block("tile")
            end = builder.append_basic_block("tile.end")
            builder.cbranch(builder.icmp_signed(">", inner, index(0)), loop, end)

            builder.position_at_end(loop)
            k = builder.phi(index)
            sums = [builder.phi(vector) for _ in places]
            b_here = builder.gep(b_first, [builder.mul(k, b_row)])
            factors = [builder.load(place, align=4) for place in vectors(b_here, b_tile)]
            empty = ir.Constant(vector, ir.Undefined)
            same = ir.Constant(ir.VectorType(ir.IntType(32), TILE), [0] * TILE)
            after: list[Any] = []
            for row in range(rows):
                here = builder.gep(a_rows[row], [builder.mul(k, a_column)])
                one = builder.insert_element(empty, builder.load(here), ir.IntType(32)(0))
                spread = builder.shuffle_vector(one, empty, same)
                for factor in factors:
                    product = builder.fmul(spread, factor, flags=("contract",))
                    total = sums[len(after)]
                    after.append(builder.fadd(total, product, flags=("contract",)))
            following = builder.add(k, index(1))
            builder.cbranch(builder.icmp_signed("<", following, inner), loop, end)
            for phi, start, step in zip(
                [k, *sums], [index(0), *before], [following, *after], strict=True
            ):
                phi.add_incoming(start, entry)
                phi.add_incoming(step, loop)

            builder.position_at_end(end)
            results = [builder.phi(vector) for _ in places]
            for result, start, total in zip(results, before, after, strict=True):
                result.add_incoming(start, entry)
                result.add_incoming(total, loop)
            for result, place in zip(results, places, strict=True):
                builder.store(result, place, align=4)
            return target.get_dummy_value()

        return types.none(*given), build

    return _tile


_add_many = _tile_intrinsic(_MANY_ROWS, 2)
_add_pair, _add_row_pair = _tile_intrinsic(_ROWS, 2), _tile_intrinsic(1, 2)
_add_tile, _add_row = _tile_intrinsic(_ROWS, 1), _tile_intrinsic(1, 1)


@jit
def tanh(x):
    """Tanh within 1e-7, also of itself, and exactly 1 far out. It vectorizes.

    With e = exp(2|x|) - 1, it is e / (e + 2), and errors of a large e do not show.
    """
    doubled = min(abs(x) * np.float32(2.0), np.float32(20.0))
    power, grown = _scaled_growth(doubled)
    e = power * grown + (power - np.float32(1.0))
    return math.copysign(e / (e + np.float32(2.0)), x)


@jit
def exp(x):
    """Exp of a number of at most 0, within 1e-6 of itself and never below 1e-38. It vectorizes."""
    power, grown = _scaled_growth(max(x, np.float32(-86.0)))
    return power * grown + power


@jit
def _scaled_growth(x):
    """2^n and exp(r) - 1 with x = n log(2) + r and r near 0; x is no more than 88 from 0.

    Coefficients: Cephes, `expf`.
    """
    n = np.int32(x * np.float32(1.0 / math.log(2.0)) + math.copysign(np.float32(0.5), x))
    r = x - np.float32(n) * np.float32(math.log(2.0))
    grown = np.float32(1.9875691500e-4)
    grown = grown * r + np.float32(1.3981999507e-3)
    grown = grown * r + np.float32(8.3334519073e-3)
    grown = grown * r + np.float32(4.1665795894e-2)
    grown = grown * r + np.float32(1.6666665459e-1)
    grown = grown * r + np.float32(5.0000001201e-1)
    return _power_of_two(n), grown * (r * r) + r


@intrinsic
def _power_of_two(context, n):
    """2^n as float32, made of its bits; n is from -126 to 127."""

    def build(target, builder, signature, args):
        word = args[0].type
        exponent = builder.shl(builder.add(args[0], word(127)), word(23))
        return builder.bitcast(exponent, ir.FloatType())

    return types.float32(types.int32), build
