"""The innermost loops of `matrix`, built instruction by instruction: their sums stay in registers.

A vector is as long as a tile of a matrix is wide. No bit depends on how long a register is.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Columns of a tile: one register of AVX-512, or two of AVX2.
TILE = 16

# Numba would allow any order of what has no flag; this one says nothing about a sum.
_AS_WRITTEN = ("arcp",)
_FUSED = ("contract",)
_INDEX, _LANE = ir.IntType(64), ir.IntType(32)
_VECTOR = ir.VectorType(ir.FloatType(), TILE)


@intrinsic
def has_avx512(context):
    """Whether this is compiled for a processor that has AVX-512: a constant in machine code."""

    def build(target, builder, signature, args):
        # Kernels are kept on disk for these features.
        features = target.codegen().magic_tuple()[2].split(",")
        return ir.IntType(1)("+avx512f" in features)

    return types.boolean(), build


def product_adder(rows: int, tiles: int) -> Any:
    """`add(a, ..., inner, n, j)`: C = S + A B for so many rows and tiles, from row n and tile j on.

    Its other arguments are those of `matrix.add_product`.
    """

    @intrinsic
    def add(context, a, a_row, a_column, b, b_tile, b_row, start, start_row, c, c_row, inner, n, j):
        given = (
            a,
            *2 * [types.intp],
            b,
            *2 * [types.intp],
            start,
            types.intp,
            c,
            *4 * [types.intp],
        )

        def build(target, builder, signature, args):
            _, a_row, a_column, _, b_tile, b_row, _, start_row, _, c_row, inner, n, j = args
            column = builder.mul(j, _INDEX(TILE))
            left, right, start, c = (_first(target, builder, given, args, k) for k in (0, 3, 6, 8))
            left = _every(builder, left, builder.mul(n, a_row), a_row, rows)
            right = _every(builder, right, builder.mul(j, b_tile), b_tile, tiles)

            def places(matrix, stride):
                first = builder.add(builder.mul(n, stride), column)
                lines = _every(builder, matrix, first, stride, rows)
                return [
                    place
                    for line in lines
                    for place in _every(builder, line, _INDEX(0), _INDEX(TILE), tiles)
                ]

            def step(k, sums):
                at, past = builder.mul(k, b_row), builder.mul(k, a_column)
                factors = [_load(builder, builder.gep(tile, [at])) for tile in right]
                numbers = [
                    _spread(builder, builder.load(builder.gep(line, [past])), _VECTOR)
                    for line in left
                ]
                pairs = [(number, factor) for number in numbers for factor in factors]
                return [
                    _multiply_add(builder, *pair, total)
                    for pair, total in zip(pairs, sums, strict=True)
                ]

            before = [_load(builder, place) for place in places(start, start_row)]
            sums = _loop(builder, inner, before, step)
            for total, place in zip(sums, places(c, c_row), strict=True):
                _store(builder, total, place)
            return target.get_dummy_value()

        return types.none(*given), build

    return add


@intrinsic
def eight_dots(context, a, a_at, a_row, b, b_at, start, c, c_at, tiles):
    """C[n] = start + sum over i of A[n, i] B[i] for eight rows n of so many tiles.

    Sums of every 16th product, and then of halves of them, are added in pairs.
    """
    index = types.intp
    given = a, index, index, b, index, types.float32, c, index, index

    def build(target, builder, signature, args):
        _, a_at, a_row, _, b_at, start, _, c_at, tiles = args
        left, right, c = (_first(target, builder, given, args, number) for number in (0, 3, 6))
        lines = _every(builder, left, a_at, a_row, 8)
        right = builder.gep(right, [b_at])

        def step(k, sums):
            at = builder.mul(k, _INDEX(TILE))
            factor = _load(builder, builder.gep(right, [at]))
            numbers = [_load(builder, builder.gep(line, [at])) for line in lines]
            return [
                _multiply_add(builder, number, factor, total)
                for number, total in zip(numbers, sums, strict=True)
            ]

        sums = _loop(builder, tiles, 8 * [ir.Constant(_VECTOR, 16 * [0.0])], step)
        sums = [_pairs(builder, total, total, range(8), range(8, 16)) for total in sums]
        even, odd = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
        for _ in range(2):
            sums = [
                _pairs(builder, one, other, even, odd)
                for one, other in zip(sums[::2], sums[1::2], strict=True)
            ]
        low, high = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
        total = _pairs(builder, *sums, low, high)
        total = builder.fadd(total, _spread(builder, start, total.type), flags=_AS_WRITTEN)
        _store(builder, total, builder.gep(c, [c_at]))
        return target.get_dummy_value()

    return types.none(*given), build


@intrinsic
def lanes_sum(context, a, tiles):
    """The sum, in float64, of so many tiles of a vector.

    Sums of every 16th number, and then of halves of them, are added in pairs.
    """
    given = a, types.intp

    def build(target, builder, signature, args):
        first = _first(target, builder, given, args, 0)
        wide = ir.VectorType(ir.DoubleType(), TILE)

        def step(k, sums):
            numbers = _load(builder, builder.gep(first, [builder.mul(k, _INDEX(TILE))]))
            return [builder.fadd(sums[0], builder.fpext(numbers, wide), flags=_AS_WRITTEN)]

        (lanes,) = _loop(builder, args[1], [ir.Constant(wide, TILE * [0.0])], step)
        for half in (8, 4, 2, 1):
            lanes = _pairs(builder, lanes, lanes, range(half), range(half, 2 * half))
        total = builder.extract_element(lanes, _LANE(0))
        return total

    return types.float64(*given), build


def slope_turner(tiles: int, relu: bool) -> Any:
    """`turn(slopes, active, stride, rows, total, j)`: from behind an activation to before it.

    Slopes in what it gave, `active`, become those in what it took, in so many tiles from tile j on,
    and each column's are added to `total`, row after row.
    """

    @intrinsic
    def turn(context, slopes, active, stride, rows, total, j):
        given = slopes, active, types.intp, types.intp, total, types.intp

        def build(target, builder, signature, args):
            _, _, stride, rows, _, j = args
            column = builder.mul(j, _INDEX(TILE))
            slopes, active, total = (
                _every(
                    builder,
                    _first(target, builder, given, args, number),
                    column,
                    _INDEX(TILE),
                    tiles,
                )
                for number in (0, 1, 4)
            )
            one, zero = (ir.Constant(_VECTOR, TILE * [number]) for number in (1.0, 0.0))

            def step(n, sums):
                at, after = builder.mul(n, stride), []
                for place, gave, before in zip(slopes, active, sums, strict=True):
                    place = builder.gep(place, [at])
                    slope, unit = _load(builder, place), _load(builder, builder.gep(gave, [at]))
                    if relu:
                        positive = builder.fcmp_ordered(">", unit, zero)
                        slope = builder.select(positive, slope, zero)
                    else:
                        square = builder.fmul(unit, unit, flags=_FUSED)
                        rest = builder.fsub(one, square, flags=_FUSED)
                        slope = builder.fmul(slope, rest, flags=_AS_WRITTEN)
                    _store(builder, slope, place)
                    after.append(builder.fadd(before, slope, flags=_AS_WRITTEN))
                return after

            sums = _loop(builder, rows, [_load(builder, place) for place in total], step)
            for after, place in zip(sums, total, strict=True):
                _store(builder, after, place)
            return target.get_dummy_value()

        return types.none(*given), build

    return turn


def _first(target: Any, builder: Any, given: Any, args: Any, number: int) -> Any:
    """A pointer to an array's first number."""
    return target.make_array(given[number])(target, builder, args[number]).data


def _every(builder: Any, first: Any, at: Any, stride: Any, count: int) -> list[Any]:
    """So many pointers, to `at` and on by `stride`."""
    first = builder.gep(first, [at])
    return [builder.gep(first, [builder.mul(stride, _INDEX(k))]) for k in range(count)]


def _load(builder: Any, place: Any) -> Any:
    return builder.load(builder.bitcast(place, _VECTOR.as_pointer()), align=4)


def _store(builder: Any, vector: Any, place: Any) -> None:
    builder.store(vector, builder.bitcast(place, vector.type.as_pointer()), align=4)


def _spread(builder: Any, number: Any, vector: Any) -> Any:
    """A vector of the same number."""
    empty = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(empty, number, _LANE(0))
    same = ir.Constant(ir.VectorType(_LANE, vector.count), vector.count * [0])
    return builder.shuffle_vector(one, empty, same)


def _multiply_add(builder: Any, one: Any, other: Any, total: Any) -> Any:
    return builder.fadd(total, builder.fmul(one, other, flags=_FUSED), flags=_FUSED)


def _pairs(builder: Any, one: Any, other: Any, left: Any, right: Any) -> Any:
    """The sums of numbers of two vectors, of those in places `left` and those in `right`."""
    parts = [
        builder.shuffle_vector(
            one, other, ir.Constant(ir.VectorType(_LANE, len(places)), list(places))
        )
        for places in (left, right)
    ]
    return builder.fadd(*parts, flags=_AS_WRITTEN)


def _loop(builder: Any, count: Any, before: list[Any], step: Any) -> list[Any]:
    """What `step(k, sums)` has made of vectors for each k from 0 to `count` - 1."""
    entry, loop = builder.block, builder.append_basic_block("loop")
    end = builder.append_basic_block("end")
    builder.cbranch(builder.icmp_signed(">", count, _INDEX(0)), loop, end)
    builder.position_at_end(loop)
    k, sums = builder.phi(_INDEX), [builder.phi(vector.type) for vector in before]
    after = step(k, sums)
    following = builder.add(k, _INDEX(1))
    builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
    for phi, first, next_one in zip(
        [k, *sums], [_INDEX(0), *before], [following, *after], strict=True
    ):
        phi.add_incoming(first, entry)
        phi.add_incoming(next_one, loop)
    builder.position_at_end(end)
    results = [builder.phi(vector.type) for vector in before]
    for result, first, total in zip(results, before, after, strict=True):
        result.add_incoming(first, entry)
        result.add_incoming(total, loop)
    return results
