"""Generalized advantages on the CPU, in machine code: one pass over memory, backward in time.

Neighbouring environments step together. Arrays whose environments are neighbours in memory are read
and written where they lie; of others a tile at a time is brought into that order (`tiles`). The
adjoint, of which gradients are made, is the same forward in time. Sums are carried in float64.
"""

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecpg.kernels.jit import jit
from vecpg.returns.halves import LIKE
from vecpg.returns.ranges import (
    MODES,
    THREAD_ELEMENTS,
    in_threads,
    number_of,
    places_of,
    tensor_of,
)
from vecpg.returns.steps import GENERAL, MASKED, PLAIN, WIDTH, back, forth
from vecpg.returns.tiles import (
    COLUMNS,
    TILE_ROWS,
    TOGETHER,
    elements,
    extent,
    give,
    held,
    is_dense,
    keep,
    take,
    tile,
)

# Of fewer columns than step together, so many spans do, if there are so many rows.
_SPANS, _LONG = 64, 2**14
_LEAST = 5e-324  # the smallest number above 0

_CUT, _SKIP, _ZERO = MODES["cut"], MODES["skip"], MODES["zero"]
# Final values and tensors of gamma and lambda, which are not given.
_ABSENT, _ABSENT_STRIDES = (0, 0, 0), (0, 1, 0, 1, 0, 1)
_FLAG, _WIDE = np.uint8(0), np.float64(0)
# Rows that stand for what is not given: read, written to, or a factor for each element.
_NOTHING, _UNREAD, _GAMMA, _LAMBDA, _THROUGH = range(5)
_one_back, _back_general = back(1, GENERAL), back(TOGETHER, GENERAL)
_back_plain, _back_masked = back(TOGETHER, PLAIN), back(TOGETHER, MASKED)
_one_forth, _forth_general = forth(1, GENERAL), forth(TOGETHER, GENERAL)
_forth_plain, _forth_masked = forth(TOGETHER, PLAIN), forth(TOGETHER, MASKED)


def generalized_advantage(
    rewards: Tensor,
    values: Tensor | None,
    dones: Tensor,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    final_values: Tensor | None,
    last_values: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
    plus_values: bool,
    resets: bool,
    out: Tensor,
) -> None:
    """Write what `vecpg.returns.generalized_advantage` describes to `out`; all (T, N), checked.

    Tensors of gamma and lambda are float64 in the shape of rewards. Without values they are 0. With
    `plus_values` the values are added before it is rounded. With `resets` a row ends an episode
    though it is masked.
    """
    carried = _nothing(rewards)
    if last_values is not None:
        carried[1] = last_values
    places = (
        rewards,
        values,
        dones,
        out,
        mask,
        final_values,
        tensor_of(gamma),
        tensor_of(gae_lambda),
    )
    _run(True, places, carried, gamma, gae_lambda, mask_mode, (plus_values, resets))


def common_advantage(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    gamma: float,
    gae_lambda: float,
    mask: Tensor | None,
    mask_mode: str,
    plus_values: bool,
    out: Tensor,
) -> None:
    """The same without further options, at little cost for a small call."""
    length, num_envs = rewards.shape
    if num_envs < WIDTH or not 0 < length * num_envs < 2 * THREAD_ELEMENTS:
        options = gamma, gae_lambda, None, None, mask, mask_mode, plus_values, False
        generalized_advantage(rewards, values, dones, *options, out)
        return
    _back(
        (
            rewards.data_ptr(),
            values.data_ptr(),
            dones.data_ptr(),
            out.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            *_ABSENT,
        ),
        (
            *rewards.stride(),
            *values.stride(),
            *dones.stride(),
            *out.stride(),
            *((0, 1) if mask is None else mask.stride()),
            *_ABSENT_STRIDES,
        ),
        0,
        length,
        num_envs,
        0,
        num_envs,
        (gamma, gamma * gae_lambda, gae_lambda),
        MODES[mask_mode],
        plus_values,
        False,
        LIKE[rewards.dtype],
    )


def adjoint(
    grad: Tensor,
    dones: Tensor,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    mask: Tensor | None,
    mask_mode: str,
    plus_values: bool,
    resets: bool,
    to_rewards: Tensor,
    to_values: Tensor | None,
    to_final: Tensor | None,
    to_last: Tensor,
) -> None:
    """Write the gradients of rewards, values, final and last values, given that of the result.

    All are (T, N), but that of last values, which has as many elements in any shape.
    """
    carried = _nothing(grad)
    gammas, lambdas = tensor_of(gamma), tensor_of(gae_lambda)
    places = grad, to_values, dones, to_rewards, mask, to_final, gammas, lambdas
    _run(False, places, carried, gamma, gae_lambda, mask_mode, (plus_values, resets))
    to_last.copy_(carried[1].view(to_last.shape))


def _nothing(matrix: Tensor) -> Tensor:
    """(2, N): an advantage and a value, or their gradients, where nothing is carried."""
    return torch.zeros((2, matrix.shape[1]), dtype=torch.float64, device="cpu")


def _run(
    is_back: bool,
    given: tuple[Tensor | None, ...],
    carried: Tensor,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    mask_mode: str,
    flags: tuple[bool, bool],
) -> None:
    """Run a kernel; `carried` becomes what is carried after the last row."""
    first = given[0]
    assert first is not None
    length, num_envs = first.shape
    if length == 0 or num_envs == 0:
        return
    places, strides = places_of(*given)
    factors = number_of(gamma), number_of(gamma) * number_of(gae_lambda), number_of(gae_lambda)
    tail = factors, MODES[mask_mode], *flags, LIKE[first.dtype]
    if num_envs < WIDTH and length >= _LONG:
        for column in range(num_envs):
            one = tuple([None if each is None else each[:, column, None] for each in given])
            part = carried[:, column, None].contiguous()
            _run_spans(is_back, one, *places_of(*one), part, tail)
            carried[:, column, None] = part
        return
    _call(is_back, places, strides, carried, length, num_envs, tail)


def _call(
    is_back: bool,
    places: tuple[int, ...],
    strides: tuple[int, ...],
    carried: Tensor,
    length: int,
    num_envs: int,
    tail: tuple[Any, ...],
) -> None:
    options = places, strides, carried.data_ptr(), length, num_envs
    in_threads(_back if is_back else _forth, options, num_envs, tail, length * num_envs)


def _run_spans(
    is_back: bool,
    given: tuple[Tensor | None, ...],
    places: tuple[int, ...],
    strides: tuple[int, ...],
    carried: Tensor,
    tail: tuple[Any, ...],
) -> None:
    """Run a kernel on a long column, of which spans step together as environments do.

    What flows into a span is found first: it is what flows out of the one before. Where an episode
    ends in that one, it does not depend on what flows into it; elsewhere it is linear in it.
    """
    first, values, dones, mask = given[0], given[1], given[2], given[4]
    assert first is not None
    assert dones is not None
    length, size = len(first), first.element_size()
    rows, rest = length // _SPANS, length % _SPANS
    steps, sizes = strides[0::2], (size, size, 1, size, 1, size, 8, 8)
    apart = tuple(each for step in steps for each in (step, step * rows))
    single = tuple(each for step in steps for each in (step, 1))

    def at(row: int, *blank: int) -> tuple[int, ...]:
        """The places from a row on, without those that are not read or written."""
        return tuple(
            0 if place == 0 or number in blank else place + row * steps[number] * sizes[number]
            for number, place in enumerate(places)
        )

    # Spans in the order of what flows.
    order = range(_SPANS - 1, -1, -1) if is_back else range(_SPANS)
    if is_back and rest > 0:
        _call(is_back, at(rows * _SPANS), single, carried, rest, 1, tail)
    into = torch.zeros((2, _SPANS), dtype=torch.float64, device="cpu")
    into[:, order[0]] = carried[:, 0]
    # The rows that what flows in reaches in every span: to the first end, or 0 if there is none.
    reached = np.empty(_SPANS, np.int64)
    _reach(places[2], steps[2], places[4], steps[4], tail[3], rows, is_back, reached)
    depths = reached[list(order[1:])]
    depth = int(depths.max())
    if depths.all() and 2 * depth < rows:
        out = into.clone()
        _call(is_back, at(0), apart, out, rows, _SPANS, tail)
        into[:, list(order[1:])] = out[:, list(order[:-1])]
        _call(is_back, at(rows - depth if is_back else 0), apart, into, depth, _SPANS, tail)
    else:
        unwritten = (3,) if is_back else (1, 3, 5)
        if is_back and mask is None and values is not None:  # then they are known
            into[1, :-1] = values[rows : rows * _SPANS : rows, 0]
        out, by_advantage, by_value = into.clone(), torch.zeros_like(into), torch.zeros_like(into)
        _call(is_back, at(0, *unwritten), apart, out, rows, _SPANS, tail)
        if mask is None and places[6] == places[7] == 0:
            gamma, through, _ = tail[0]
            open_spans = torch.from_numpy(reached == 0)
            # Never 0 where something flows: infinity comes through powers too small to be held, and
            # is NaN times a factor of 0.
            by_advantage[0, open_spans] = max(_LEAST, through**rows) if through else math.nan
            if not is_back:
                follows = gamma * through ** (rows - 1)
                by_advantage[1, open_spans] = max(_LEAST, follows) if through else math.nan
        else:
            by_advantage[0] = by_value[1] = 1.0
            _call(is_back, at(0, 0, 1, 3, 5), apart, by_advantage, rows, _SPANS, tail)
            _call(is_back, at(0, 0, 1, 3, 5), apart, by_value, rows, _SPANS, tail)
        _follow(into, out, by_advantage, by_value, order)
        out = into
        _call(is_back, at(0), apart, out, rows, _SPANS, tail)
    carried[:, 0] = out[:, order[-1]]
    if not is_back and rest > 0:
        _call(is_back, at(rows * _SPANS), single, carried, rest, 1, tail)


def _follow(
    into: Tensor, out: Tensor, by_advantage: Tensor, by_value: Tensor, order: range
) -> None:
    """What flows into each span, given what flows out where nothing more than `into` flows in.

    By both parts of what flows in, the other two say how much more flows out: 0 is nothing, NaN no
    number times it.
    """
    known, true = into.tolist(), into.tolist()
    flows, first, second = out.tolist(), by_advantage.tolist(), by_value.tolist()
    for before, span in itertools.pairwise(order):
        for part in range(2):
            flow = flows[part][before]
            for number, factors in enumerate((first, second)):
                more = true[number][before] - known[number][before]
                factor = factors[part][before]
                # What does not flow on may be infinite.
                if math.isnan(factor):
                    flow += 0.0 * more
                elif factor != 0.0:
                    flow += factor * more
            true[part][span] = flow
    into.copy_(torch.tensor(true, dtype=torch.float64, device="cpu"))


@jit(as_written=True)
def _back(
    places, strides, carried, length, num_envs, start, stop, factors, mode, plus, resets, like
):
    """Columns `start` to `stop`. Places and strides are those of the arrays of `steps.back`."""
    room = _room(places, strides, start, stop, factors, like)
    state = room[0]
    modes = mode == _CUT, mode == _SKIP, mode == _ZERO, resets
    both = room[1][_GAMMA].ctypes.data, room[1][_THROUGH].ctypes.data
    kind = _kind(places, strides)
    column = start
    while column < stop:
        count, height = extent(strides, column, stop)
        take(state, carried, num_envs, column, count)
        _factors(places, strides, column, count, room[1])
        advantage, value = state[0].ctypes.data, state[1].ctypes.data
        end = length
        while end > 0:
            begin = max(0, end - height)
            block = begin, end - begin, column, count
            at, step = _tiles(places, strides, block, room, True, like)
            for j in range(0, count, WIDTH):
                t = end - begin
                while t > 0:
                    together = t % TOGETHER == 0
                    t -= TOGETHER if together else 1
                    if not together:
                        _one_back(at, step, t, j, advantage, value, both, modes, plus, like)
                    elif kind == PLAIN:
                        _back_plain(at, step, t, j, advantage, value, both, modes, plus, like)
                    elif kind == MASKED:
                        _back_masked(at, step, t, j, advantage, value, both, modes, plus, like)
                    else:
                        _back_general(at, step, t, j, advantage, value, both, modes, plus, like)
            keep(places[3], strides[6:8], block, at[3], step[3], like)
            end = begin
        give(state, carried, num_envs, column, count)
        column += count
    return held(room)


@jit(as_written=True)
def _forth(
    places, strides, carried, length, num_envs, start, stop, factors, mode, plus, resets, like
):
    """The same of `steps.forth`."""
    room = _room(places, strides, start, stop, factors, like)
    state = room[0]
    modes = mode == _CUT, mode == _SKIP, mode == _ZERO, resets
    both = room[1][_GAMMA].ctypes.data, room[1][_THROUGH].ctypes.data
    kind = _kind(places, strides)
    column = start
    while column < stop:
        count, height = extent(strides, column, stop)
        take(state, carried, num_envs, column, count)
        _factors(places, strides, column, count, room[1])
        advantage, value = state[0].ctypes.data, state[1].ctypes.data
        begin = 0
        while begin < length:
            rows = min(height, length - begin)
            block = begin, rows, column, count
            at, step = _tiles(places, strides, block, room, False, like)
            for j in range(0, count, WIDTH):
                t = 0
                while t < rows:
                    together = t + TOGETHER <= rows
                    if not together:
                        _one_forth(at, step, t, j, advantage, value, both, modes, plus, like)
                    elif kind == PLAIN:
                        _forth_plain(at, step, t, j, advantage, value, both, modes, plus, like)
                    elif kind == MASKED:
                        _forth_masked(at, step, t, j, advantage, value, both, modes, plus, like)
                    else:
                        _forth_general(at, step, t, j, advantage, value, both, modes, plus, like)
                    t += TOGETHER if together else 1
            keep(places[1], strides[2:4], block, at[1], step[1], like)
            keep(places[3], strides[6:8], block, at[3], step[3], like)
            keep(places[5], strides[10:12], block, at[5], step[5], like)
            begin += rows
        give(state, carried, num_envs, column, count)
        column += count
    return held(room)


@jit
def _reach(dones, dones_step, mask, mask_step, resets, rows, is_back, reached):
    """How many rows of each span what flows into it reaches: to the first end. 0: there is none."""
    spans = len(reached)
    ends = elements(dones, _FLAG, (rows * spans - 1) * dones_step + 1)
    real = elements(mask, _FLAG, 0 if mask == 0 else (rows * spans - 1) * mask_step + 1)
    for span in range(spans):
        reached[span] = 0
        k = 0
        while k < rows and reached[span] == 0:
            count = min(TILE_ROWS, rows - k)
            begin = span * rows + (rows - k - count if is_back else k)
            if dones_step != 1 or _any(ends[begin : begin + count]):
                for i in range(count):
                    t = begin + (count - 1 - i if is_back else i)
                    if ends[t * dones_step] and (resets or mask == 0 or real[t * mask_step]):
                        reached[span] = k + i + 1
                        break
            k += count


@jit
def _any(flags):
    found = 0
    for i in range(len(flags)):  # all of them: a loop that may stop early is not vectorized
        found |= flags[i]
    return found != 0


@jit
def _kind(places, strides):
    if places[5] != 0 or _differs(places, strides, 6) or _differs(places, strides, 7):
        return GENERAL
    return PLAIN if places[4] == 0 else MASKED


@jit
def _differs(places, strides, number):
    """Whether gammas, or lambdas, are given for each row, not for each environment alone."""
    return places[number] != 0 and strides[2 * number] != 0


@jit
def _factors(places, strides, column, count, rest):
    """Read the gammas and lambdas of some environments, where they are the same in all rows."""
    for number, row in ((6, _GAMMA), (7, _LAMBDA)):
        if places[number] != 0 and not _differs(places, strides, number):
            step = strides[2 * number + 1]
            given = elements(places[number] + 8 * column * step, _WIDE, (count - 1) * step + 1)
            for j in range(count):
                rest[row, j] = given[j * step]
    for j in range(count):
        rest[_THROUGH, j] = rest[_GAMMA, j] * rest[_LAMBDA, j]


@jit
def _room(places, strides, start, stop, factors, like):
    """Memory: what is carried, rows for what is not given, and tiles of floats, flags, float64."""
    dense = is_dense(strides)
    row = min(COLUMNS, (stop - start) // WIDTH * WIDTH + WIDTH) if dense else WIDTH
    fit = 0 if dense and (stop - start) % WIDTH == 0 else TILE_ROWS * WIDTH
    state = np.zeros((2, row))
    rest = np.zeros((5, row))
    rest[_GAMMA], rest[_LAMBDA] = factors[0], factors[2]
    real = np.ones(row, np.uint8)
    floats = np.empty((4, fit * np.full(1, like).itemsize), np.uint8)
    flags = np.empty((2, fit), np.uint8)
    wide = np.empty((2, fit if _kind(places, strides) == GENERAL else 0))
    return state, rest, real, floats, flags, wide


@jit
def _tiles(places, strides, block, room, is_back, like):
    """Where a tile of each array is, read unless it is a result, and the bytes from row to row."""
    _, rest, real, floats, flags, wide = room
    nothing, unread = rest[_NOTHING].ctypes.data, rest[_UNREAD].ctypes.data
    a0, s0 = nothing, 0
    if places[0] != 0:
        a0, s0 = tile(places[0], strides[0:2], block, floats[0].ctypes.data, True, like)
    a1, s1 = nothing if is_back else unread, 0
    if places[1] != 0:
        a1, s1 = tile(places[1], strides[2:4], block, floats[1].ctypes.data, is_back, like)
    a2, s2 = tile(places[2], strides[4:6], block, flags[0].ctypes.data, True, _FLAG)
    a3, s3 = unread, 0
    if places[3] != 0:
        a3, s3 = tile(places[3], strides[6:8], block, floats[2].ctypes.data, False, like)
    a4, s4 = real.ctypes.data, 0
    if places[4] != 0:
        a4, s4 = tile(places[4], strides[8:10], block, flags[1].ctypes.data, True, _FLAG)
    a5, s5 = nothing if is_back else unread, 0
    if places[5] != 0:
        a5, s5 = tile(places[5], strides[10:12], block, floats[3].ctypes.data, is_back, like)
    a6, s6 = rest[_GAMMA].ctypes.data, 0
    if _differs(places, strides, 6):
        a6, s6 = tile(places[6], strides[12:14], block, wide[0].ctypes.data, True, _WIDE)
    a7, s7 = rest[_LAMBDA].ctypes.data, 0
    if _differs(places, strides, 7):
        a7, s7 = tile(places[7], strides[14:16], block, wide[1].ctypes.data, True, _WIDE)
    return (a0, a1, a2, a3, a4, a5, a6, a7), (s0, s1, s2, s3, s4, s5, s6, s7)
