"""Discounted returns on the CPU, in machine code.

Kernels take addresses and strides in elements: any layout is read where it lies, and a call costs
little. Sums are carried in float64. Three loops share the work:

- `_rows`: the elements of a row lie one after the other; all columns of a block step together.
- `_columns`: time lies contiguous (a transposed batch). Eight steps of eight environments are
  turned in registers, and then step like rows. A sequence alone is eight spans (`spans`).
- `cpu_advantages`: values at ends, a gamma for each element, any strides.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecpg.kernels import kept, threads
from vecpg.kernels.jit import jit
from vecpg.returns import cpu_advantages
from vecpg.returns.columns import (
    masked_steps_of_8,
    masked_steps_of_32,
    steps_of_8,
    steps_of_32,
)
from vecpg.returns.halves import LIKE, narrow, widen
from vecpg.returns.ranges import MODES, THREAD_ELEMENTS, in_threads
from vecpg.returns.spans import (
    BLOCK,
    begin_spans,
    end_spans,
    join_spans,
    step_lanes,
    step_rest,
    step_sequence,
)
from vecpg.returns.tiles import elements

# Columns that step together. Their carries fill the fastest cache, but narrower blocks are slower:
# the next row then lies on another page, and is not fetched ahead.
_COLUMNS = 4096
# So many and fewer step together with their carries in registers.
_NARROW = 256
_CUT, _SKIP = MODES["cut"], MODES["skip"]
_BOOL = np.uint8(0)


def reward_to_go(
    rewards: Tensor,
    dones: Tensor,
    gamma: float | Tensor,
    final_values: Tensor | None,
    last_values: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
    out: Tensor,
) -> None:
    """Write what `vecpg.returns.reward_to_go` describes to `out`; all are (T, N), checked."""
    length, num_envs = rewards.shape
    if length == 0 or num_envs == 0:
        return
    like = LIKE[rewards.dtype]
    marks = 0 if mask is None else mask.data_ptr()
    places = rewards.data_ptr(), dones.data_ptr(), out.data_ptr(), marks
    strides = rewards.stride() + dones.stride() + out.stride()
    strides += (0, 0) if mask is None else mask.stride()
    last, last_stride = (0, 0) if last_values is None else _place(last_values)
    mode = MODES[mask_mode]
    rows, columns = strides[0::2], strides[1::2]
    in_rows = num_envs > 1 and _is_dense(columns, mask)
    if (
        isinstance(gamma, Tensor)
        or final_values is not None
        or not (in_rows or _is_dense(rows, mask))
    ):
        # It is an advantage over values of 0.
        advantages = final_values, last_values, mask, mask_mode, False, False
        cpu_advantages.generalized_advantage(rewards, None, dones, gamma, 1.0, *advantages, out)
        return
    tail = gamma, mode, like
    if in_rows:
        options = tuple(each for pair in zip(places, rows, strict=True) for each in pair)
        in_threads(_rows, (*options, last, last_stride, length), num_envs, tail, length * num_envs)
        return
    if num_envs < 8 and length >= 2 * BLOCK:
        sizes = rewards.itemsize, 1, rewards.itemsize, 1
        for n in range(num_envs):
            moved = [
                place and place + n * step * size
                for place, step, size in zip(places, columns, sizes, strict=True)
            ]
            value = 0.0 if last_values is None else float(last_values[n])
            _in_spans(tuple(moved), length, value, gamma, mode, like)
        return
    # Fewer than eight columns are not stepped like eight.
    given = places, columns, last, last_stride, length
    in_threads(_columns, given, num_envs, tail, length * num_envs, least=8)


def common_reward_to_go(
    rewards: Tensor,
    dones: Tensor,
    gamma: float,
    mask: Tensor | None,
    mask_mode: str,
    out: Tensor,
) -> None:
    """The same of (T, N) or (T,) without further options, at little cost for a small call."""
    if rewards.ndim == 1:
        rewards, dones, out = rewards[:, None], dones[:, None], out[:, None]
        mask = None if mask is None else mask[:, None]
    length, num_envs = rewards.shape
    if 0 < length * num_envs < 2 * THREAD_ELEMENTS:
        marks = 0 if mask is None else mask.data_ptr()
        places = rewards.data_ptr(), dones.data_ptr(), out.data_ptr(), marks
        tail = 0, 0, length, 0, num_envs, gamma, MODES[mask_mode], LIKE[rewards.dtype]
        if (
            rewards.is_contiguous()
            and dones.is_contiguous()
            and out.is_contiguous()
            and (mask is None or mask.is_contiguous())
            and num_envs > 1
        ):
            rewards_at, dones_at, out_at, _ = places
            row = num_envs
            _rows(rewards_at, row, dones_at, row, out_at, row, marks, row, *tail)
            return
        steps = rewards.stride()
        if (
            steps == (1, length)
            and steps == dones.stride()
            and steps == out.stride()
            and (mask is None or steps == mask.stride())
        ):
            _columns(places, (length, length, length, length), *tail)
            return
    reward_to_go(rewards, dones, gamma, None, None, mask, mask_mode, out)


def _is_dense(steps: tuple[int, ...], mask: Tensor | None) -> bool:
    return steps[0] == steps[1] == steps[2] == 1 and (mask is None or steps[3] == 1)


def packed_reward_to_go(
    rewards: Tensor,
    offsets: Tensor,
    gamma: float,
    final_values: Tensor | None,
    out: Tensor,
) -> None:
    """Write what `vecpg.returns.packed_reward_to_go` describes to `out`; checked."""
    if rewards.shape[0] == 0:
        return
    like, total, count = LIKE[rewards.dtype], rewards.shape[0], offsets.shape[0] - 1
    values = (0, 0) if final_values is None else _place(final_values)
    if final_values is None and rewards.stride(0) == out.stride(0) == 1:
        ends = kept.vector(total, torch.uint8)
        _mark_ends(*_place(offsets), count, ends.data_ptr())
        places = rewards.data_ptr(), ends.data_ptr(), out.data_ptr(), 0
        _in_spans(places, total, 0.0, gamma, _CUT, like)
        return
    longer = kept.vector(total + count, rewards.dtype)
    results = kept.vector(total + count, rewards.dtype)
    ends = kept.vector(total + count, torch.uint8)
    places = longer.data_ptr(), ends.data_ptr(), results.data_ptr(), 0
    length = _lengthen(*_place(rewards), *_place(offsets), count, *values, *places[:2], like)
    _in_spans(places, length, 0.0, gamma, _CUT, like)
    has_values = int(final_values is not None)
    _shorten(places[2], *_place(offsets), count, has_values, *_place(out), like)


def masked_packed_reward_to_go(
    rewards: Tensor,
    offsets: Tensor,
    gamma: float,
    final_values: Tensor | None,
    mask: Tensor,
    mask_mode: str,
    out: Tensor,
) -> None:
    """The same with a mask, and one gamma."""
    if rewards.shape[0] == 0:
        return
    like, total, count = LIKE[rewards.dtype], rewards.shape[0], offsets.shape[0] - 1
    mode = MODES[mask_mode]
    if final_values is None and rewards.stride(0) == mask.stride(0) == out.stride(0) == 1:
        ends = kept.vector(total, torch.uint8)
        _mark_real_ends(*_place(offsets), count, mask.data_ptr(), ends.data_ptr())
        places = rewards.data_ptr(), ends.data_ptr(), out.data_ptr(), mask.data_ptr()
        _in_spans(places, total, 0.0, gamma, mode, like)
        return
    # A row behind each episode, which is real and ends it, whatever of the episode is masked.
    values = torch.zeros_like(rewards[:1]).expand(count) if final_values is None else final_values
    real = torch.ones(1, dtype=torch.bool, device="cpu").expand(count)
    longer = kept.vector(total + count, rewards.dtype)
    results = kept.vector(total + count, rewards.dtype)
    marks, ends = (kept.vector(total + count, torch.uint8) for _ in range(2))
    places = longer.data_ptr(), ends.data_ptr(), results.data_ptr(), marks.data_ptr()
    bounds = *_place(offsets), count
    _lengthen(*_place(mask), *bounds, *_place(real), places[3], places[1], _BOOL)
    length = _lengthen(*_place(rewards), *bounds, *_place(values), *places[:2], like)
    _in_spans(places, length, 0.0, gamma, mode, like)
    _shorten(places[2], *bounds, 1, *_place(out), like)


def is_partition(offsets: Tensor, total: int) -> bool:
    """Whether offsets go from 0 to `total` and never fall."""
    right: bool = _is_partition(*_place(offsets), offsets.shape[0], total)
    return right


def _place(vector: Tensor) -> tuple[int, int]:
    return vector.data_ptr(), vector.stride(0)


def _in_spans(
    places: tuple[int, ...], length: int, last: float, gamma: float, mode: int, like: Any
) -> None:
    """A sequence that lies in one piece, shared by threads where that pays."""
    blocks = length // BLOCK
    parts = min(blocks, threads.count()) if blocks > 1 else 1
    if parts == 1:
        step_sequence(*places, length, last, gamma, mode, like)
        return
    bounds = [blocks * i // parts for i in range(parts + 1)]
    sums, through = np.empty(8 * blocks), np.empty(8 * blocks)
    given = gamma, mode, sums
    threads.run(
        lambda i: begin_spans(*places, length, bounds[i], bounds[i + 1], *given, through, like),
        parts,
    )
    following = step_rest(*places, length, last, gamma, mode, like)
    join_spans(0, blocks, following, gamma, sums, through)
    threads.run(lambda i: end_spans(*places, length, bounds[i], bounds[i + 1], *given, like), parts)


@jit
def _first_carry(carry, last, last_stride, start, count, like):
    """The values after the last row of some columns; 0 where there are none."""
    if last == 0:
        for j in range(count):
            carry[j] = 0.0
    else:
        values = elements(last, like, (start + count - 1) * last_stride + 1)
        for j in range(count):
            carry[j] = widen(values[(start + j) * last_stride])


@jit
def _rows(
    rewards,
    rewards_row,
    dones,
    dones_row,
    out,
    out_row,
    mask,
    mask_row,
    last,
    last_stride,
    length,
    start,
    stop,
    gamma,
    mode,
    like,
):
    """Columns `start` to `stop`, whose elements lie one after the other in every row.

    Of rewards, dones, out and mask the address, 0 for no mask, and the elements from row to row.
    """
    paid = elements(rewards, like, (length - 1) * rewards_row + stop)
    ends = elements(dones, _BOOL, (length - 1) * dones_row + stop)
    result = elements(out, like, (length - 1) * out_row + stop)
    masked = mask != 0
    real = elements(mask, _BOOL, (length - 1) * mask_row + stop if masked else 0)
    carry = np.empty(_COLUMNS)
    width = _COLUMNS
    if 8 <= stop - start <= _NARROW:
        width = 32 if stop - start >= 32 else 8
    for begin in range(start, stop, width):
        if width != _COLUMNS:
            # The last ones may be done again: they are written as they were.
            column = min(begin, stop - width)
            _first_carry(carry, last, last_stride, column, width, like)
            given = (
                rewards + column * paid.itemsize,
                rewards_row,
                dones + column,
                dones_row,
                out + column * paid.itemsize,
                out_row,
                mask + column,
                mask_row,
                carry.ctypes.data,
                length,
                gamma,
                1.0 if mode == _SKIP else gamma,
                mode != _CUT,
                like,
            )
            if masked and width == 32:
                masked_steps_of_32(*given)
            elif masked:
                masked_steps_of_8(*given)
            elif width == 32:
                steps_of_32(*given)
            else:
                steps_of_8(*given)
            continue
        column = begin
        count = min(_COLUMNS, stop - column)
        _first_carry(carry, last, last_stride, column, count, like)
        t = length - 1
        if masked:
            while t >= 0:
                _masked_step(
                    _row(paid, t * rewards_row + column, count),
                    _row(ends, t * dones_row + column, count),
                    _row(result, t * out_row + column, count),
                    _row(real, t * mask_row + column, count),
                    carry,
                    gamma,
                    mode,
                    like,
                )
                t -= 1
            continue
        if length % 2 == 1:
            _step(
                _row(paid, t * rewards_row + column, count),
                _row(ends, t * dones_row + column, count),
                _row(result, t * out_row + column, count),
                carry,
                gamma,
                like,
            )
            t -= 1
        while t > 0:  # two rows at a time: the carries are read and written half as often
            row_paid = _row(paid, t * rewards_row + column, count)
            row_ends = _row(ends, t * dones_row + column, count)
            row_result = _row(result, t * out_row + column, count)
            before_paid = _row(paid, (t - 1) * rewards_row + column, count)
            before_ends = _row(ends, (t - 1) * dones_row + column, count)
            before_result = _row(result, (t - 1) * out_row + column, count)
            for j in range(count):
                following = carry[j]
                following = widen(row_paid[j]) + gamma * (0.0 if row_ends[j] else following)
                row_result[j] = narrow(following, like)
                before = widen(before_paid[j])
                following = before + gamma * (0.0 if before_ends[j] else following)
                before_result[j] = narrow(following, like)
                carry[j] = following
            t -= 2


@jit
def _row(flat, start, count):
    return flat[start : start + count]


@jit
def _step(paid, ends, result, carry, gamma, like):
    """One step back in every column."""
    for j in range(len(paid)):
        following = carry[j]
        # Selected before it is multiplied, here and below: 0 times infinity is NaN.
        following = widen(paid[j]) + gamma * (0.0 if ends[j] else following)
        result[j] = narrow(following, like)
        carry[j] = following


@jit
def _masked_step(paid, ends, result, real, carry, gamma, mode, like):
    """One step back in every column, of which some are masked."""
    cut, skip = mode == _CUT, mode == _SKIP
    for j in range(len(paid)):
        following = carry[j]
        here = widen(paid[j]) + gamma * (0.0 if ends[j] else following)
        passed = 0.0 if cut else (following if skip else gamma * following)
        counted = real[j]
        result[j] = narrow(here if counted else 0.0, like)
        carry[j] = here if counted else passed


@jit
def _columns(places, strides, last, last_stride, length, start, stop, gamma, mode, like):
    """As `_rows`, of columns that lie in one piece each; strides from column to column."""
    carry = np.empty(8)
    bases = np.zeros((4, 8), np.int64)
    if stop - start < 8:
        for column in range(start, stop):
            _place_lanes(bases, carry, places, strides, last, last_stride, column, 1, 1, like)
            step_sequence(
                bases[0, 0],
                bases[1, 0],
                bases[2, 0],
                bases[3, 0],
                length,
                carry[0],
                gamma,
                mode,
                like,
            )
        return
    # Lanes lie `apart` columns from each other, so that each walks through memory without a jump;
    # an odd number, so that they do not all fall on the same few lines of the cache.
    apart = (stop - start) // 8
    apart -= 1 - apart % 2
    for first in range(start + apart - 1, start - 1, -1):
        _place_lanes(bases, carry, places, strides, last, last_stride, first, apart, 8, like)
        step_lanes(bases, carry, 8, length, gamma, mode, like)
    for begin in range(start + 8 * apart, stop, 8):
        first = min(begin, stop - 8)  # the last may be done again: they are written as they were
        _place_lanes(bases, carry, places, strides, last, last_stride, first, 1, 8, like)
        step_lanes(bases, carry, 8, length, gamma, mode, like)


@jit
def _place_lanes(bases, carry, places, strides, last, last_stride, first, apart, count, like):
    """Addresses and carries of the columns `first`, `first + apart`, ... for `step_lanes`."""
    size = np.full(1, like).itemsize
    for lane in range(count):
        column = first + lane * apart
        _first_carry(carry[lane : lane + 1], last, last_stride, column, 1, like)
        bases[0, lane] = places[0] + column * strides[0] * size
        bases[1, lane] = places[1] + column * strides[1]
        bases[2, lane] = places[2] + column * strides[2] * size
        if places[3] != 0:
            bases[3, lane] = places[3] + column * strides[3]


@jit
def _is_partition(offsets, stride, count, total):
    bounds = elements(offsets, np.int64(0), (count - 1) * stride + 1)
    falls = 0
    if stride == 1:
        before, after = bounds[:-1], bounds[1:]
        for i in range(count - 1):  # all of them: a loop that may stop early is not vectorized
            falls += after[i] < before[i]
    else:
        for i in range(1, count):
            falls += bounds[i * stride] < bounds[(i - 1) * stride]
    return falls == 0 and bounds[0] == 0 and bounds[(count - 1) * stride] == total


@jit
def _mark_ends(offsets, offsets_stride, count, ends):
    """A flag for each element, set where it is the last of its episode."""
    bounds = elements(offsets, np.int64(0), count * offsets_stride + 1)
    flags = elements(ends, _BOOL, bounds[count * offsets_stride])
    flags[:] = 0
    for episode in range(count):
        first, after = bounds[episode * offsets_stride], bounds[(episode + 1) * offsets_stride]
        if after > first:
            flags[after - 1] = 1


@jit
def _mark_real_ends(offsets, offsets_stride, count, mask, ends):
    """A flag for each element, set where it is the last of its episode that is real."""
    bounds = elements(offsets, np.int64(0), count * offsets_stride + 1)
    real = elements(mask, _BOOL, bounds[count * offsets_stride])
    flags = elements(ends, _BOOL, bounds[count * offsets_stride])
    flags[:] = 0
    for episode in range(count):
        first, t = bounds[episode * offsets_stride], bounds[(episode + 1) * offsets_stride] - 1
        while t >= first and not real[t]:
            t -= 1
        if t >= first:
            flags[t] = 1


@jit
def _lengthen(
    rewards, stride, offsets, offsets_stride, count, values, values_stride, longer, ends, like
):
    """Rewards in one piece, with each episode's final value behind it, where there are some.

    Returns how many elements that is. What is behind an episode is the reward of an end.
    """
    bounds = elements(offsets, np.int64(0), count * offsets_stride + 1)
    total = bounds[count * offsets_stride]
    paid = elements(rewards, like, max(0, (total - 1) * stride + 1))
    into = elements(longer, like, total + count)
    flags = elements(ends, _BOOL, total + count)
    flags[:] = 0
    place = 0
    for episode in range(count):
        first, after = bounds[episode * offsets_stride], bounds[(episode + 1) * offsets_stride]
        if after == first:
            continue
        _copy(paid, first, stride, into, place, 1, after - first)
        place += after - first
        if values != 0:
            into[place] = elements(values, like, episode * values_stride + 1)[-1]
            place += 1
        flags[place - 1] = 1
    return place


@jit
def _shorten(longer, offsets, offsets_stride, count, has_values, out, stride, like):
    """Of the results of what `_lengthen` wrote, those of the rewards."""
    bounds = elements(offsets, np.int64(0), count * offsets_stride + 1)
    total = bounds[count * offsets_stride]
    source = elements(longer, like, total + count)
    into = elements(out, like, max(0, (total - 1) * stride + 1))
    place = 0
    for episode in range(count):
        first, after = bounds[episode * offsets_stride], bounds[(episode + 1) * offsets_stride]
        if after > first:
            _copy(source, place, 1, into, first, stride, after - first)
            place += after - first + has_values


@jit
def _copy(source, start, stride, into, into_start, into_stride, count):
    if stride == 1 and into_stride == 1:
        read, written = source[start : start + count], into[into_start : into_start + count]
        for k in range(count):
            written[k] = read[k]
    else:
        for k in range(count):
            into[(into_start + k) * into_stride] = source[(start + k) * stride]
