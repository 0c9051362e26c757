"""Tiles of a matrix, turned: what lies row by row is written column by column, eight by eight.

So what has time contiguous steps in machine code like what has environments contiguous, whatever
its options are. A tile of what has environments contiguous is taken where it lies.
"""

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from vecpg.kernels.jit import jit
from vecpg.returns.steps import WIDTH
from vecpg.returns.vectors import pick, turned_halves

# Rows between which what is carried stays in registers.
TOGETHER = 8
# Rows of a tile that is brought into order; and elements of one that need not be.
TILE_ROWS = 256
_TILE_ELEMENTS = 8192
# Environments of one that need not be, at most: what is carried for them is in the fastest cache.
COLUMNS = 1024
_WIDE = np.float64(0)


@intrinsic
def _at(context, address, like):
    """A pointer to elements of the type of `like`."""

    def build(machine, builder, signature, args):
        return builder.inttoptr(args[0], machine.get_value_type(signature.return_type))

    return types.CPointer(like)(types.intp, like), build


@intrinsic
def _turn(context, source, source_step, target, target_step, like):
    """Write eight times eight elements of the type of `like`, rows and columns exchanged.

    Addresses, and steps from row to row, are in bytes; a row's elements are neighbours.
    """

    def build(machine, builder, signature, args):
        element = machine.get_value_type(like)
        size = machine.get_abi_sizeof(element)
        rows = _load(builder, args[0], args[1], element)
        turned = {1: _turned_bytes, 2: _turned_pairs}.get(size, _turned_wide)(builder, rows)
        for number, row in enumerate(turned):
            builder.store(row, _place(builder, args[2], args[3], number, row.type), align=1)
        return machine.get_dummy_value()

    return types.none(types.intp, types.intp, types.intp, types.intp, like), build


def _place(builder, address, step, number, kind):
    there = builder.add(address, builder.mul(step, step.type(number)))
    return builder.inttoptr(there, kind.as_pointer())


def _load(builder, address, step, element):
    row = ir.VectorType(element, 8)
    return [
        builder.load(_place(builder, address, step, number, row), align=1) for number in range(8)
    ]


def _interleaved(builder, one, other):
    """The elements of both, in turn: those of the first halves, and of the second."""
    size = one.type.count
    places = [place for i in range(size) for place in (i, size + i)]
    return [pick(builder, one, other, places[:size]), pick(builder, one, other, places[size:])]


def _turned_bytes(builder, rows):
    # Three rounds of interleaving with the row half the number further turn a matrix. Two rows of
    # bytes fill a register, so that the first round makes one vector of each pair.
    places = [place for i in range(8) for place in (i, 8 + i)]
    pairs = [pick(builder, rows[i], rows[i + 4], places) for i in range(4)]
    for _ in range(2):
        pairs = [half for i in range(2) for half in _interleaved(builder, pairs[i], pairs[i + 2])]
    return [
        pick(builder, both, both, range(first, first + 8)) for both in pairs for first in (0, 8)
    ]


def _turned_pairs(builder, rows):
    for _ in range(3):
        rows = [half for i in range(4) for half in _interleaved(builder, rows[i], rows[i + 4])]
    return rows


def _turned_wide(builder, rows):
    # Moving elements within halves of a 256-bit register is cheaper than across them: the halves
    # of rows i and i + 4 are put together first.
    turned = []
    for half in (range(4), range(4, 8)):
        places = [*half, *(8 + i for i in half)]
        wide = [pick(builder, rows[i], rows[i + 4], places) for i in range(4)]
        turned += turned_halves(builder, wide)
    return turned


@jit
def turn(source, source_step, target, target_step, rows, columns, like):
    """Write `rows` times `columns` elements with rows and columns exchanged; steps in bytes."""
    size = np.full(1, like).itemsize
    for column in range(0, columns - 7, 8):
        for row in range(0, rows - 7, 8):
            _turn(
                source + row * source_step + column * size,
                source_step,
                target + column * target_step + row * size,
                target_step,
                like,
            )
    for row in range(rows):
        whole = row < rows - rows % 8
        for column in range(columns - columns % 8 if whole else 0, columns):
            element = elements(source + row * source_step + column * size, like, 1)[0]
            elements(target + column * target_step + row * size, like, 1)[0] = element


@jit
def elements(address, like, count):
    """`count` elements of the type of `like`, as they lie in memory."""
    return numba.carray(_at(address, like), (count,))


@jit
def is_dense(strides):
    """Whether the environments of every array are neighbours."""
    dense = True
    for number in range(len(strides) // 2):
        dense = dense and strides[2 * number + 1] == 1
    return dense


@jit
def extent(strides, column, stop):
    """The columns, and the rows at most, of the next tile."""
    if is_dense(strides) and stop - column >= WIDTH:
        count = min(COLUMNS, (stop - column) // WIDTH * WIDTH)
        return count, max(TOGETHER, _TILE_ELEMENTS // count)
    return min(WIDTH, stop - column), TILE_ROWS


@jit
def take(state, carried, num_envs, column, count):
    """Read what is carried into some columns; nothing is where there is no address."""
    state[:, :] = 0.0
    if carried == 0:
        return
    for i in range(2):
        row = elements(carried + 8 * (i * num_envs + column), _WIDE, count)
        state[i, :count] = row


@jit
def give(state, carried, num_envs, column, count):
    """Write what is carried out of them."""
    if carried == 0:
        return
    for i in range(2):
        row = elements(carried + 8 * (i * num_envs + column), _WIDE, count)
        row[:] = state[i, :count]


@jit
def tile(place, strides, block, scratch, is_read, like):
    """Where a tile of a matrix lies row by row, brought there if it must be; bytes between rows."""
    size = np.full(1, like).itemsize
    begin, rows, column, count = block
    first = place + (begin * strides[0] + column * strides[1]) * size
    if strides[1] == 1 and count % WIDTH == 0:
        return first, strides[0] * size
    step = WIDTH * size
    if not is_read:
        return scratch, step
    if strides[0] == 1:
        turn(first, strides[1] * size, scratch, step, count, rows, like)
        return scratch, step
    reach = (rows - 1) * strides[0] + (count - 1) * strides[1] + 1
    source = elements(first, like, reach)
    target = elements(scratch, like, rows * WIDTH)
    for t in range(rows):
        for j in range(count):
            target[t * WIDTH + j] = source[t * strides[0] + j * strides[1]]
    return scratch, step


@jit
def keep(place, strides, block, at, step, like):
    """Write a tile to where it belongs, unless it lies there or belongs nowhere."""
    size = np.full(1, like).itemsize
    begin, rows, column, count = block
    first = place + (begin * strides[0] + column * strides[1]) * size
    if first == at or place == 0:
        return
    if strides[0] == 1:
        turn(at, step, first, strides[1] * size, rows, count, like)
        return
    reach = (rows - 1) * strides[0] + (count - 1) * strides[1] + 1
    source = elements(at, like, rows * WIDTH)
    target = elements(first, like, reach)
    for t in range(rows):
        for j in range(count):
            target[t * strides[0] + j * strides[1]] = source[t * WIDTH + j]


@jit
def held(room):
    """Memory that mere addresses stand for is held until this is asked."""
    state, rest, real, floats, flags, wide = room
    return state.size + rest.size + real.size + floats.size + flags.size + wide.size
