"""Sequences that lie in one piece each step side by side: eight of them, or eight spans of one.

A step waits for the one before it, so that a sequence alone takes several times as long. What
follows a span is not known when it begins. So first the value at the start of each is found: from
its first end, or, where it has none, as if nothing followed, with how much of what follows comes
through. Then, from the last span to the first, what follows each is known, and all step from
that, each element by the plain recurrence.
"""

import numpy as np

from vecpg.kernels.jit import jit
from vecpg.returns.columns import steps_of_32
from vecpg.returns.halves import narrow, widen
from vecpg.returns.lanes import eight_masked_steps, eight_steps
from vecpg.returns.ranges import MODES
from vecpg.returns.tiles import elements

_CUT, _SKIP = MODES["cut"], MODES["skip"]
# Eight spans of a longer sequence have so many elements, whatever the number of threads: a result
# does not depend on it.
BLOCK = 2**18
# A shorter sequence is done sooner step by step.
_SHORT = 128
_CLOSED = -1.0
_BOOL = np.uint8(0)


@jit
def step_lanes(bases, carry, count, length, gamma, mode, like):
    """`length` steps back from a carry in each of `count` lanes, at most eight.

    `bases` holds the addresses of the first rewards, dones, results and mask of every lane.
    """
    t = length
    masked = bases[3, 0] != 0
    if count == 8:
        while t >= 8:
            t -= 8
            if masked:
                eight_masked_steps(
                    bases.ctypes.data,
                    t,
                    carry.ctypes.data,
                    gamma,
                    1.0 if mode == _SKIP else gamma,
                    0 if mode == _CUT else -1,
                    like,
                )
            else:
                eight_steps(bases.ctypes.data, t, carry.ctypes.data, gamma, like)
    for lane in range(count):
        paid = elements(bases[0, lane], like, t)
        ends = elements(bases[1, lane], _BOOL, t)
        result = elements(bases[2, lane], like, t)
        following = carry[lane]
        for k in range(t - 1, -1, -1):
            if masked and not elements(bases[3, lane], _BOOL, t)[k]:
                result[k] = narrow(0.0, like)
                if mode == _CUT:
                    following = 0.0
                elif mode != _SKIP:
                    following *= gamma
            else:
                following = widen(paid[k]) + gamma * (0.0 if ends[k] else following)
                result[k] = narrow(following, like)
        carry[lane] = following


@jit
def divide(length):
    """How many blocks of eight spans a sequence has, and how many elements a span; some are left.

    A long span is an odd number of lines of the cache, or eight would fall on the same few places
    in it.
    """
    blocks = max(1, length // BLOCK)
    eights = length // (64 * blocks)
    if eights > 64 and eights % 2 == 0:
        eights -= 1
    return blocks, 8 * eights


@jit
def begin_spans(rewards, dones, out, mask, length, start, stop, gamma, mode, sums, through, like):
    """Step the spans of blocks `start` to `stop` once, as if nothing followed them.

    Addresses are those of the sequence. Of each span the value at its start goes to `sums`, what a
    value that follows is multiplied by on its way there to `through`. Writes to `out` what
    `end_spans` writes again.
    """
    span = divide(length)[1]
    size = elements(rewards, like, 1).itemsize
    # A small gamma has powers that are 0, and 0 times infinity is NaN.
    summed = mask == 0 and gamma > 0.5
    bases = np.zeros((4, 8), np.int64)
    carry = np.zeros(8)
    for block in range(start, stop):
        reach = 0
        for lane in range(8):
            number = 8 * block + lane
            ends = elements(dones + number * span, _BOOL, span)
            real = elements(mask + number * span, _BOOL, span if mask != 0 else 0)
            first = _first_closed(ends, real, mode)
            if first < span:
                through[number] = _CLOSED
            else:
                rows = span
                if mask != 0 and mode == _SKIP:
                    rows = 0
                    for k in range(span):
                        rows += real[k] != 0
                through[number] = gamma**rows
            # Nobody asks for the value at the start of all.
            if number > 0 and (first < span or not summed):
                reach = max(reach, min(first + 1, span))
        _place(bases, rewards, dones, out, mask, 8 * block, span, like)
        carry[:] = 0.0
        step_lanes(bases, carry, 8, reach, gamma, mode, like)
        sums[8 * block : 8 * block + 8] = carry
        for number in range(8 * block, 8 * block + 8):
            if summed and through[number] != _CLOSED:
                begin = number * span
                sums[number] = _first_return(
                    rewards + begin * size, dones + begin, out + begin * size, span, gamma, like
                )


@jit
def _first_return(rewards, dones, out, length, gamma, like):
    """The return of the first row, where no row is an end: of rows of 32, and then of the first.

    All rows of 32 are written to the first elements of `out`, which are written again.
    """
    rows = length // 32
    paid = elements(rewards, like, length)
    carry = np.zeros(32)
    power = gamma**32
    steps_of_32(
        rewards, 32, dones, 32, out, 0, 0, 0, carry.ctypes.data, rows, power, power, True, like
    )
    rest = 0.0
    for t in range(length - 1, 32 * rows - 1, -1):
        rest = widen(paid[t]) + gamma * rest
    total = 0.0
    for j in range(31, -1, -1):
        total = carry[j] + gamma * total
    # A power of gamma may be too small to be held: infinity comes through all the same.
    return total + (gamma ** (32 * rows) * rest if np.isfinite(rest) else rest)


@jit
def step_rest(rewards, dones, out, mask, length, last, gamma, mode, like):
    """Step what is left behind the spans, from the value `last`; returns what follows them."""
    blocks, span = divide(length)
    bases = np.zeros((4, 8), np.int64)
    carry = np.full(8, last)
    _place(bases, rewards, dones, out, mask, 8 * blocks, span, like)
    step_lanes(bases, carry, 1, length - 8 * blocks * span, gamma, mode, like)
    return carry[0]


@jit
def join_spans(start, stop, following, gamma, sums, through):
    """Turn `sums` of blocks `start` to `stop` into what follows each span; `following` follows all.

    Returns what follows the spans before them.
    """
    for number in range(8 * stop - 1, 8 * start - 1, -1):
        value = sums[number]
        if through[number] != _CLOSED:
            passed = through[number] * following
            # A power of gamma may be too small to be held: infinity comes through all the same.
            value += following if gamma > 0.0 and not np.isfinite(following) else passed
        sums[number] = following
        following = value
    return following


@jit
def end_spans(rewards, dones, out, mask, length, start, stop, gamma, mode, sums, like):
    """Step the spans of blocks `start` to `stop` from what follows each."""
    span = divide(length)[1]
    bases = np.zeros((4, 8), np.int64)
    carry = np.zeros(8)
    for block in range(start, stop):
        _place(bases, rewards, dones, out, mask, 8 * block, span, like)
        carry[:] = sums[8 * block : 8 * block + 8]
        step_lanes(bases, carry, 8, span, gamma, mode, like)


@jit
def step_sequence(rewards, dones, out, mask, length, last, gamma, mode, like):
    """A whole sequence back from the value `last`, in spans where it is not short."""
    if length < _SHORT:
        bases = np.zeros((4, 8), np.int64)
        carry = np.full(8, last)
        _place(bases, rewards, dones, out, mask, 0, 0, like)
        step_lanes(bases, carry, 1, length, gamma, mode, like)
        return
    blocks = divide(length)[0]
    sums, through = np.empty(8 * blocks), np.empty(8 * blocks)
    following = step_rest(rewards, dones, out, mask, length, last, gamma, mode, like)
    for block in range(blocks - 1, -1, -1):  # one by one: what was read once is in a cache still
        begin_spans(
            rewards, dones, out, mask, length, block, block + 1, gamma, mode, sums, through, like
        )
        following = join_spans(block, block + 1, following, gamma, sums, through)
        end_spans(rewards, dones, out, mask, length, block, block + 1, gamma, mode, sums, like)


@jit
def _place(bases, rewards, dones, out, mask, number, span, like):
    """Addresses of the span with that number, and of those behind it, for `step_lanes`."""
    size = elements(rewards, like, 1).itemsize
    for lane in range(8):
        skipped = (number + lane) * span
        bases[0, lane] = rewards + skipped * size
        bases[1, lane] = dones + skipped
        bases[2, lane] = out + skipped * size
        bases[3, lane] = mask + skipped if mask != 0 else 0


@jit
def _first_closed(ends, real, mode):
    """The first row that nothing behind it comes through; the number of rows if there is none."""
    length = len(ends)
    masked = len(real) > 0
    through = mode != _CUT  # a masked row
    for start in range(0, length, 64):
        some = ends[start : start + 64]
        closed = np.uint8(0)
        # All of them: a loop that may stop early is not vectorized.
        if masked:
            marks = real[start : start + 64]
            for k in range(len(some)):
                closed |= some[k] if marks[k] else np.uint8(not through)
        else:
            for k in range(len(some)):
                closed |= some[k]
        if closed:
            for k in range(len(some)):
                if some[k] if not masked or real[start + k] else not through:
                    return start + k
    return length
