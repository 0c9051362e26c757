"""Generalized advantages on the CPU, in machine code: one pass over memory, backward in time.

Neighbouring environments step together. Arrays whose environments are neighbours in memory are read
and written where they lie; of others a tile at a time is brought into that order (`tiles`). The
adjoint, of which gradients are made, is the same forward in time. Sums are carried in float64.
"""

import numpy as np
from torch import Tensor

from vecpg.kernels.jit import jit
from vecpg.returns.cpu import MODES, in_threads
from vecpg.returns.halves import LIKE
from vecpg.returns.steps import GENERAL, MASKED, PLAIN, WIDTH, back, forth
from vecpg.returns.tiles import elements, turn

# Rows between which what is carried stays in registers.
_TOGETHER = 8
# Rows of a tile that is brought into order; and elements of one that need not be.
_TILE_ROWS = 256
_TILE_ELEMENTS = 8192
# Environments of one that need not be, at most: what is carried for them is in the fastest cache.
_COLUMNS = 1024

_CUT, _SKIP, _ZERO = MODES["cut"], MODES["skip"], MODES["zero"]
_FLAG, _WIDE = np.uint8(0), np.float64(0)
# Rows that stand for what is not given: read, written to, or a factor for each element.
_NOTHING, _UNREAD, _GAMMA, _LAMBDA = range(4)
_one_back, _back_general = back(1, GENERAL), back(_TOGETHER, GENERAL)
_back_plain, _back_masked = back(_TOGETHER, PLAIN), back(_TOGETHER, MASKED)
_one_forth, _forth_general = forth(1, GENERAL), forth(_TOGETHER, GENERAL)
_forth_plain, _forth_masked = forth(_TOGETHER, PLAIN), forth(_TOGETHER, MASKED)


def generalized_advantage(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    final_values: Tensor | None,
    carried: Tensor,
    mask: Tensor | None,
    mask_mode: str,
    plus_values: bool,
    out: Tensor,
) -> None:
    """Write what `vecpg.returns.generalized_advantage` describes to `out`; all (T, N), checked.

    Tensors of gamma and lambda are float64 in the shape of rewards. `carried` is float64 (2, N),
    contiguous: the advantage and the value after the last row, which become those of the first.
    With `plus_values` the values are added before it is rounded.
    """
    places = rewards, values, dones, out, mask, final_values, _tensor(gamma), _tensor(gae_lambda)
    _run(_back, places, carried, gamma, gae_lambda, mask_mode, plus_values)


def adjoint(
    grad: Tensor,
    dones: Tensor,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    carried: Tensor,
    mask: Tensor | None,
    mask_mode: str,
    plus_values: bool,
    to_rewards: Tensor,
    to_values: Tensor | None,
    to_final: Tensor | None,
) -> None:
    """Write the gradients of rewards, values and final values, given that of the result.

    `carried` (2, N), zeros, becomes those of the advantage and the value after the last row.
    """
    gammas, lambdas = _tensor(gamma), _tensor(gae_lambda)
    places = grad, to_values, dones, to_rewards, mask, to_final, gammas, lambdas
    _run(_forth, places, carried, gamma, gae_lambda, mask_mode, plus_values)


def _run(
    kernel: object,
    given: tuple[Tensor | None, ...],
    carried: Tensor,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    mask_mode: str,
    plus_values: bool,
) -> None:
    first = given[0]
    assert first is not None
    length, num_envs = first.shape
    if length == 0 or num_envs == 0:
        return
    places = tuple([0 if each is None else each.data_ptr() for each in given])
    strides: tuple[int, ...] = ()
    for each in given:
        strides += (0, 1) if each is None else each.stride()
    factors = _number(gamma), _number(gamma) * _number(gae_lambda), _number(gae_lambda)
    options = places, strides, carried.data_ptr(), length, num_envs
    tail = factors, MODES[mask_mode], plus_values, LIKE[first.dtype]
    in_threads(kernel, options, num_envs, tail, length * num_envs)


def _tensor(factor: float | Tensor) -> Tensor | None:
    return factor if isinstance(factor, Tensor) else None


def _number(factor: float | Tensor) -> float:
    return 1.0 if isinstance(factor, Tensor) else factor


@jit
def _back(places, strides, carried, length, num_envs, start, stop, factors, mode, plus, like):
    """Columns `start` to `stop`. Places and strides are those of the arrays of `steps.back`."""
    room = _room(places, strides, start, stop, factors, like)
    state = room[0]
    modes = mode == _CUT, mode == _SKIP, mode == _ZERO
    both = factors[0], factors[1]
    kind = _kind(places)
    column = start
    while column < stop:
        count, height = _extent(strides, column, stop)
        _take(state, carried, num_envs, column, count)
        advantage, value = state[0].ctypes.data, state[1].ctypes.data
        end = length
        while end > 0:
            begin = max(0, end - height)
            block = begin, end - begin, column, count
            at, step = _tiles(places, strides, block, room, True, like)
            for j in range(0, count, WIDTH):
                t = end - begin
                while t > 0:
                    together = t % _TOGETHER == 0
                    t -= _TOGETHER if together else 1
                    if not together:
                        _one_back(at, step, t, j, advantage, value, both, modes, plus, like)
                    elif kind == PLAIN:
                        _back_plain(at, step, t, j, advantage, value, both, modes, plus, like)
                    elif kind == MASKED:
                        _back_masked(at, step, t, j, advantage, value, both, modes, plus, like)
                    else:
                        _back_general(at, step, t, j, advantage, value, both, modes, plus, like)
            _keep(places[3], strides[6:8], block, at[3], step[3], like)
            end = begin
        _give(state, carried, num_envs, column, count)
        column += count
    return _held(room)


@jit
def _forth(places, strides, carried, length, num_envs, start, stop, factors, mode, plus, like):
    """The same of `steps.forth`."""
    room = _room(places, strides, start, stop, factors, like)
    state = room[0]
    modes = mode == _CUT, mode == _SKIP, mode == _ZERO
    both = factors[0], factors[1]
    kind = _kind(places)
    column = start
    while column < stop:
        count, height = _extent(strides, column, stop)
        _take(state, carried, num_envs, column, count)
        advantage, value = state[0].ctypes.data, state[1].ctypes.data
        begin = 0
        while begin < length:
            rows = min(height, length - begin)
            block = begin, rows, column, count
            at, step = _tiles(places, strides, block, room, False, like)
            for j in range(0, count, WIDTH):
                t = 0
                while t < rows:
                    together = t + _TOGETHER <= rows
                    if not together:
                        _one_forth(at, step, t, j, advantage, value, both, modes, plus, like)
                    elif kind == PLAIN:
                        _forth_plain(at, step, t, j, advantage, value, both, modes, plus, like)
                    elif kind == MASKED:
                        _forth_masked(at, step, t, j, advantage, value, both, modes, plus, like)
                    else:
                        _forth_general(at, step, t, j, advantage, value, both, modes, plus, like)
                    t += _TOGETHER if together else 1
            _keep(places[1], strides[2:4], block, at[1], step[1], like)
            _keep(places[3], strides[6:8], block, at[3], step[3], like)
            _keep(places[5], strides[10:12], block, at[5], step[5], like)
            begin += rows
        _give(state, carried, num_envs, column, count)
        column += count
    return _held(room)


@jit
def _kind(places):
    if places[5] != 0 or places[6] != 0 or places[7] != 0:
        return GENERAL
    return PLAIN if places[4] == 0 else MASKED


@jit
def _is_dense(strides):
    """Whether the environments of every array are neighbours."""
    dense = True
    for number in range(8):
        dense = dense and strides[2 * number + 1] == 1
    return dense


@jit
def _extent(strides, column, stop):
    """The columns, and the rows at most, of the next tile."""
    if _is_dense(strides) and stop - column >= WIDTH:
        count = min(_COLUMNS, (stop - column) // WIDTH * WIDTH)
        return count, max(_TOGETHER, _TILE_ELEMENTS // count)
    return min(WIDTH, stop - column), _TILE_ROWS


@jit
def _room(places, strides, start, stop, factors, like):
    """Memory: what is carried, rows for what is not given, and tiles of floats, flags, float64."""
    dense = _is_dense(strides)
    row = _COLUMNS if dense else WIDTH
    fit = 0 if dense and (stop - start) % WIDTH == 0 else _TILE_ROWS * WIDTH
    state = np.zeros((2, row))
    rest = np.zeros((4, row))
    rest[_GAMMA], rest[_LAMBDA] = factors[0], factors[2]
    real = np.ones(row, np.uint8)
    floats = np.empty((4, fit * np.full(1, like).itemsize), np.uint8)
    flags = np.empty((2, fit), np.uint8)
    wide = np.empty((2, fit if _kind(places) == GENERAL else 0))
    return state, rest, real, floats, flags, wide


@jit
def _held(room):
    """Memory that mere addresses stand for is held until this is asked."""
    state, rest, real, floats, flags, wide = room
    return state.size + rest.size + real.size + floats.size + flags.size + wide.size


@jit
def _take(state, carried, num_envs, column, count):
    """Read what is carried into some columns."""
    state[:, :] = 0.0
    for i in range(2):
        row = elements(carried + 8 * (i * num_envs + column), _WIDE, count)
        state[i, :count] = row


@jit
def _give(state, carried, num_envs, column, count):
    """Write what is carried out of them."""
    for i in range(2):
        row = elements(carried + 8 * (i * num_envs + column), _WIDE, count)
        row[:] = state[i, :count]


@jit
def _tiles(places, strides, block, room, is_back, like):
    """Where a tile of each array is, read unless it is a result, and the bytes from row to row."""
    _, rest, real, floats, flags, wide = room
    nothing, unread = rest[_NOTHING].ctypes.data, rest[_UNREAD].ctypes.data
    a0, s0 = _tile(places[0], strides[0:2], block, floats[0].ctypes.data, True, like)
    a1, s1 = unread, 0
    if places[1] != 0:
        a1, s1 = _tile(places[1], strides[2:4], block, floats[1].ctypes.data, is_back, like)
    a2, s2 = _tile(places[2], strides[4:6], block, flags[0].ctypes.data, True, _FLAG)
    a3, s3 = _tile(places[3], strides[6:8], block, floats[2].ctypes.data, False, like)
    a4, s4 = real.ctypes.data, 0
    if places[4] != 0:
        a4, s4 = _tile(places[4], strides[8:10], block, flags[1].ctypes.data, True, _FLAG)
    a5, s5 = nothing if is_back else unread, 0
    if places[5] != 0:
        a5, s5 = _tile(places[5], strides[10:12], block, floats[3].ctypes.data, is_back, like)
    a6, s6 = rest[_GAMMA].ctypes.data, 0
    if places[6] != 0:
        a6, s6 = _tile(places[6], strides[12:14], block, wide[0].ctypes.data, True, _WIDE)
    a7, s7 = rest[_LAMBDA].ctypes.data, 0
    if places[7] != 0:
        a7, s7 = _tile(places[7], strides[14:16], block, wide[1].ctypes.data, True, _WIDE)
    return (a0, a1, a2, a3, a4, a5, a6, a7), (s0, s1, s2, s3, s4, s5, s6, s7)


@jit
def _tile(place, strides, block, scratch, is_read, like):
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
def _keep(place, strides, block, tile, step, like):
    """Write a tile to where it belongs, unless it lies there or belongs nowhere."""
    size = np.full(1, like).itemsize
    begin, rows, column, count = block
    first = place + (begin * strides[0] + column * strides[1]) * size
    if first == tile or place == 0:
        return
    if strides[0] == 1:
        turn(tile, step, first, strides[1] * size, rows, count, like)
        return
    reach = (rows - 1) * strides[0] + (count - 1) * strides[1] + 1
    source = elements(tile, like, rows * WIDTH)
    target = elements(first, like, reach)
    for t in range(rows):
        for j in range(count):
            target[t * strides[0] + j * strides[1]] = source[t * WIDTH + j]
