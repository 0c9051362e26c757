"""V-trace on the CPU, in machine code: one pass over memory, backward in time."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecpg.kernels.jit import jit
from vecpg.returns.ranges import MODES, in_threads
from vecpg.returns.tiles import elements

# Columns that step together, and fewer where a row's elements are far apart.
_COLUMNS = 256
_FAR_COLUMNS = 16
_CUT, _SKIP, _ZERO = MODES["cut"], MODES["skip"], MODES["zero"]
_FLAG, _WIDE = np.uint8(0), np.float64(0)
_LIKE = {torch.float32: np.float32(0), torch.float64: np.float64(0)}


def vtrace(
    rewards: Tensor,
    values: Tensor,
    ratios: Tensor,
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
) -> None:
    """Write what `vecpg.returns.vtrace` describes; all are (T, N), checked, ratios float64."""
    length, num_envs = rewards.shape
    if length == 0 or num_envs == 0:
        return
    tensors = (each if isinstance(each, Tensor) else None for each in (gamma, lam))
    numbers = tuple(1.0 if isinstance(each, Tensor) else float(each) for each in (gamma, lam))
    read, flags = _places(rewards, values, final_values), _places(dones, mask)
    (last,) = _places(None if last_values is None else last_values[None])
    options: tuple[Any, ...] = (read, flags, _places(ratios, *tensors), last)
    options += (_places(targets, advantages), length)
    tail = (*numbers, float(rho_bar), float(c_bar)), MODES[mask_mode], _LIKE[rewards.dtype]
    in_threads(_vtrace, options, num_envs, tail, length * num_envs)


def _places(*matrices: Tensor | None) -> tuple[Any, ...]:
    """Where each lies and its two strides; 0 = not given."""
    return tuple(
        (0, 0, 0) if each is None else (each.data_ptr(), *each.stride()) for each in matrices
    )


@jit
def _vtrace(read, flags, wides, last, written, length, start, stop, numbers, mode, like):
    """Columns `start` to `stop`."""
    gamma, lam, rho_bar, c_bar = numbers
    width = _COLUMNS if read[0][2] == 1 else _FAR_COLUMNS
    given, factors = np.zeros((3, width)), np.empty((3, width))
    marks, carried = np.ones((2, width), np.uint8), np.empty((2, width))
    own = np.empty((4, width))
    masked = flags[1][0] != 0
    for column in range(start, stop, width):
        count = min(width, stop - column)
        reward, value, final = given[0, :count], given[1, :count], given[2, :count]
        ratio, discount, lowered = factors[0, :count], factors[1, :count], factors[2, :count]
        closed, counted = marks[0, :count], marks[1, :count]
        error, after = carried[0, :count], carried[1, :count]
        weight, trace, shown, behind = (
            own[0, :count],
            own[1, :count],
            own[2, :count],
            own[3, :count],
        )
        discount[:], lowered[:] = gamma, lam
        error[:], after[:] = 0.0, 0.0
        if last[0] != 0:
            _load(last, 0, column, after, like)
        for t in range(length - 1, -1, -1):
            # Those that are not given stay as they are.
            for k in range(3):
                _load(read[k], t, column, given[k, :count], like)
                _load(wides[k], t, column, factors[k, :count], _WIDE)
            for k in range(2):
                _load(flags[k], t, column, marks[k, :count], _FLAG)
            if masked:
                # Selected before it is multiplied, here and below: 0 times NaN is NaN.
                _keep(counted, reward, 0.0)
                _keep(counted, value, 0.0)
                _keep(counted, ratio, 1.0)
                for j in range(count):
                    ending = closed[j]
                    closed[j] = ending if counted[j] else 0
            for j in range(count):
                given_ratio = ratio[j]
                weight[j] = rho_bar if given_ratio > rho_bar else given_ratio
                trace[j] = c_bar if given_ratio > c_bar else given_ratio
            for j in range(count):
                trace[j] *= discount[j] * lowered[j]
            for j in range(count):
                here, there = final[j], after[j]
                shown[j] = discount[j] * (here if closed[j] else there)
            for j in range(count):
                following = error[j]
                behind[j] = 0.0 if closed[j] else following
            for j in range(count):
                reward[j] = weight[j] * (reward[j] + (shown[j] - value[j]))
            if masked and mode != _ZERO:
                # Masked rows have no error of their own, and let through what their mode says.
                _keep(counted, reward, 0.0)
                _pass(counted, error, after, discount, trace, mode)
            for j in range(count):
                ratio[j] = reward[j] + trace[j] * behind[j]
            for j in range(count):
                reward[j] += weight[j] * (discount[j] * behind[j])
            if masked and mode != _ZERO:
                _choose(counted, ratio, error)
                _choose(counted, value, after)
            else:
                error[:] = ratio
                after[:] = value
            for j in range(count):
                ratio[j] += value[j]
            if masked:
                _keep(counted, ratio, 0.0)
                _keep(counted, reward, 0.0)
            _store(written[0], t, column, ratio, like)
            _store(written[1], t, column, reward, like)


@jit
def _keep(counted, row, other):
    for j in range(len(row)):
        kept = row[j]
        row[j] = kept if counted[j] else other


@jit
def _choose(counted, row, into):
    for j in range(len(into)):
        own, kept = row[j], into[j]
        into[j] = own if counted[j] else kept


@jit
def _pass(counted, error, after, discount, trace, mode):
    """What masked rows let through, of the error and of the value that follow."""
    for j in range(len(error) if mode != _SKIP else 0):
        following = error[j]
        passed = 0.0 if mode == _CUT else trace[j] * following
        error[j] = following if counted[j] else passed
    for j in range(len(after) if mode != _SKIP else 0):
        following = after[j]
        passed = 0.0 if mode == _CUT else discount[j] * following
        after[j] = following if counted[j] else passed


@jit
def _load(matrix, t, column, into, like):
    """Some of a row's elements, if the matrix is given. It vectorizes where it can."""
    place, row_step, step = matrix
    count = len(into) if place != 0 else 0
    first = t * row_step + column * step
    flat = elements(place, like, first + (len(into) - 1) * step + 1)
    if step == 1:
        row = flat[first:]
        for j in range(count):
            into[j] = row[j]
    else:
        for j in range(count):
            into[j] = flat[first + j * step]


@jit
def _store(matrix, t, column, row, like):
    place, row_step, step = matrix
    first = t * row_step + column * step
    flat = elements(place, like, first + (len(row) - 1) * step + 1)
    if step == 1:
        into = flat[first:]
        for j in range(len(row)):
            into[j] = row[j]
    else:
        for j in range(len(row)):
            flat[first + j * step] = row[j]
