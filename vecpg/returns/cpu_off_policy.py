"""V-trace on the CPU, in machine code: one pass over memory, backward in time.

Its adjoint, of which gradients are made, is one forward in time. Tiles and threads are those of
advantages.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecpg.kernels.jit import jit
from vecpg.returns.halves import LIKE
from vecpg.returns.ranges import MODES, in_threads, number_of, places_of, tensor_of
from vecpg.returns.steps import WIDTH, trace_back, trace_forth
from vecpg.returns.tiles import (
    COLUMNS,
    TILE_ROWS,
    extent,
    give,
    held,
    is_dense,
    keep,
    take,
    tile,
)

# Rows between which what is carried stays in registers: fewer than of advantages, since a row takes
# more of them.
_TOGETHER = 4
_CUT, _SKIP, _ZERO = MODES["cut"], MODES["skip"], MODES["zero"]
_FLAG, _WIDE = np.uint8(0), np.float64(0)
# Arrays of a step, by number: floats that are read, flags, float64, and floats that are written.
_READ, _FLAGS, _FACTORS, _ARRAYS = 6, 8, 10, 14
_one_back, _some_back = trace_back(1), trace_back(_TOGETHER)
_one_forth, _some_forth = trace_forth(1), trace_forth(_TOGETHER)


def vtrace(
    rewards: Tensor,
    values: Tensor,
    log_ratios: Tensor,
    dones: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
    rho_bar: float,
    c_bar: float,
    final_values: Tensor | None,
    last_values: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
    targets: Tensor,
    advantages: Tensor,
    own: Tensor | None = None,
    traced: Tensor | None = None,
) -> None:
    """Write what `vecpg.returns.vtrace` describes; all are (T, N), checked.

    Tensors of gamma and lambda are float64 in the shape of rewards. For the adjoint, what a row's
    own error adds to the target, and what is traced back to it, are written to the last two.
    """
    carried = None
    if last_values is not None:
        carried = torch.zeros((2, rewards.shape[1]), dtype=torch.float64, device="cpu")
        carried[1] = last_values
    read = rewards, values, log_ratios, final_values, None, None
    written = targets, advantages, own, traced
    factors = gamma, lam, float(rho_bar), float(c_bar)
    _run(_back, read, dones, mask, factors, mask_mode, written, carried)


def adjoint(
    of_targets: Tensor | None,
    of_advantages: Tensor | None,
    log_ratios: Tensor,
    advantages: Tensor,
    own: Tensor | None,
    traced: Tensor | None,
    dones: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
    rho_bar: float,
    c_bar: float,
    mask: Tensor | None,
    mask_mode: str,
    to_rewards: Tensor | None,
    to_values: Tensor | None,
    to_log_ratios: Tensor | None,
    to_final: Tensor | None,
    to_last: Tensor,
) -> None:
    """Write the gradients of what V-trace is made of, given those of its results.

    Of the results' gradients None is 0; of those that are written, none that is wanted.
    """
    carried = torch.zeros((2, log_ratios.shape[1]), dtype=torch.float64, device="cpu")
    read = of_targets, of_advantages, log_ratios, advantages, own, traced
    written = to_rewards, to_values, to_log_ratios, to_final
    factors = gamma, lam, float(rho_bar), float(c_bar)
    _run(_forth, read, dones, mask, factors, mask_mode, written, carried)
    to_last.copy_(carried[1])


def _run(
    kernel: Any,
    read: tuple[Any, ...],
    dones: Tensor,
    mask: Tensor | None,
    factors: tuple[float | Tensor, float | Tensor, float, float],
    mask_mode: str,
    written: tuple[Tensor | None, ...],
    carried: Tensor | None,
) -> None:
    length, num_envs = dones.shape
    if length == 0 or num_envs == 0:
        return
    _, _, log_ratios, *_ = read
    gamma, lam, *bounds = factors
    numbers = number_of(gamma), number_of(lam)
    places, strides = places_of(*read, dones, mask, tensor_of(gamma), tensor_of(lam), *written)
    options = places, strides, 0 if carried is None else carried.data_ptr(), length, num_envs
    tail = numbers, tuple(bounds), MODES[mask_mode], LIKE[log_ratios.dtype]
    in_threads(kernel, options, num_envs, tail, length * num_envs)


@jit
def _back(places, strides, carried, length, num_envs, start, stop, numbers, bounds, mode, like):
    """Columns `start` to `stop`. Places and strides are those of the arrays of `trace_back`."""
    room = _room(strides, start, stop, numbers, like)
    state = room[0]
    modes = mode == _CUT, mode == _SKIP, mode == _ZERO, False
    column = start
    while column < stop:
        count, height = extent(strides, column, stop)
        take(state, carried, num_envs, column, count)
        error, value = state[0].ctypes.data, state[1].ctypes.data
        end = length
        while end > 0:
            begin = max(0, end - height)
            block = begin, end - begin, column, count
            at, step = _tiles(places, strides, block, room, like)
            for j in range(0, count, WIDTH):
                t = end - begin
                while t > 0:
                    together = t % _TOGETHER == 0
                    t -= _TOGETHER if together else 1
                    if together:
                        _some_back(at, step, t, j, error, value, bounds, modes, like)
                    else:
                        _one_back(at, step, t, j, error, value, bounds, modes, like)
            _write(places, strides, block, at, step, like)
            end = begin
        give(state, carried, num_envs, column, count)
        column += count
    return held(room)


@jit
def _forth(places, strides, carried, length, num_envs, start, stop, numbers, bounds, mode, like):
    """The same of `trace_forth`."""
    room = _room(strides, start, stop, numbers, like)
    state = room[0]
    modes = mode == _CUT, mode == _SKIP, mode == _ZERO, False
    column = start
    while column < stop:
        count, height = extent(strides, column, stop)
        take(state, carried, num_envs, column, count)
        error, value = state[0].ctypes.data, state[1].ctypes.data
        begin = 0
        while begin < length:
            rows = min(height, length - begin)
            block = begin, rows, column, count
            at, step = _tiles(places, strides, block, room, like)
            for j in range(0, count, WIDTH):
                t = 0
                while t < rows:
                    together = t + _TOGETHER <= rows
                    if together:
                        _some_forth(at, step, t, j, error, value, bounds, modes, like)
                    else:
                        _one_forth(at, step, t, j, error, value, bounds, modes, like)
                    t += _TOGETHER if together else 1
            _write(places, strides, block, at, step, like)
            begin += rows
        give(state, carried, num_envs, column, count)
        column += count
    return held(room)


@jit
def _room(strides, start, stop, numbers, like):
    """Memory: what is carried, rows for what is not given, and tiles of floats, flags, float64."""
    dense = is_dense(strides)
    width = min(COLUMNS, (stop - start) // WIDTH * WIDTH + WIDTH) if dense else WIDTH
    fit = 0 if dense and (stop - start) % WIDTH == 0 else TILE_ROWS * WIDTH
    state, rest = np.zeros((2, width)), np.zeros((4, width))
    # Read as 0, written to and not read, gamma, lambda.
    rest[2], rest[3] = numbers
    real = np.ones(width, np.uint8)
    floats = np.empty((_ARRAYS, fit * np.full(1, like).itemsize), np.uint8)
    return state, rest, real, floats, np.empty((2, fit), np.uint8), np.empty((2, fit))


@jit
def _tiles(places, strides, block, room, like):
    """Where a tile of each array is, read unless it is a result, and the bytes from row to row."""
    _, rest, real, floats, flags, wide = room
    a, s = np.empty(_ARRAYS, np.intp), np.zeros(_ARRAYS, np.intp)
    for i in range(_ARRAYS):
        steps = strides[2 * i], strides[2 * i + 1]
        if i < _READ or i >= _FACTORS:
            is_read = i < _READ
            a[i] = rest[0 if is_read else 1].ctypes.data
            if places[i] != 0:
                a[i], s[i] = tile(places[i], steps, block, floats[i].ctypes.data, is_read, like)
        elif i < _FLAGS:
            a[i] = real.ctypes.data
            if places[i] != 0:
                a[i], s[i] = tile(
                    places[i], steps, block, flags[i - _READ].ctypes.data, True, _FLAG
                )
        else:
            a[i] = rest[2 + i - _FLAGS].ctypes.data
            if places[i] != 0:
                a[i], s[i] = tile(
                    places[i], steps, block, wide[i - _FLAGS].ctypes.data, True, _WIDE
                )
    at = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13]
    step = s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13]
    return at, step


@jit
def _write(places, strides, block, at, step, like):
    """Write tiles of results to where they belong."""
    for i in range(_FACTORS, _ARRAYS):
        keep(places[i], (strides[2 * i], strides[2 * i + 1]), block, at[i], step[i], like)
