"""Sums by age on a GPU: whoever has an age looks its rows up, so that nothing is added atomically.

The row of age a in an environment's k-th episode is starts[k] + a. So a program that has some ages
of some environments finds all their rows, k after k, and nobody else has them. Of a rollout of
T x N rows, with few episodes in each environment:

| launch       | what it does                              | bytes a row                        |
|--------------|-------------------------------------------|------------------------------------|
| `_find`      | where each environment's episodes lie     | 2: both flags                      |
| `_add`       | sums of each part of the environments     | 4: the weight                      |
| `_add_parts` | the parts' sums, in order                 | 16 of a part's 32 or more rows     |
| `_find`      | again, to subtract                        | 2                                  |
| `_subtract`  | the means, and what is left               | 9: mask, weight read and written   |

Where environments have many short episodes, neighbours in memory are not read together, and up to
eight times as much is moved. How the sums are cut and added depends on T and N alone, not on the
GPU. Importing this needs triton, running it a CUDA GPU.

Of runs that go on side by side `subtract_mean_of_runs` does the same, where their episodes have
been found. Each has programs of its own, which do what those of that run alone would.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vecpg.kernels.cuda import stamp

# What a program holds at a time, of each age of a block of environments: 4 numbers a thread.
_AGES, _ENVS, _WARPS = 32, 32, 8
# Rows in which episodes are looked for at a time.
_ROWS = 64
# As many groups of environments have their own sums: enough programs, and few to add in the end.
_PARTS = 256

# Integer arguments: Triton would compile anew for a 1 or a multiple of 16 among them.
_SIZES = ["num_rows", "num_envs", "num_ages", "num_parts", "capacity", "window", "shards", "slots"]
_SIZES += ["of_slot", "of_run"]
# And for an address that is a multiple of 16, of which a kernel that knows no size makes no use.
_PLACES = ["weights", "mask", "dones", "starts", "stops", "numbers", "longest", "parts", "sums"]
_PLACES += ["at", "stamps"]


class Found(NamedTuple):
    """Where the episodes of each environment lie: its first `numbers` of each column are there.

    starts:  (T, N) int32, the first row of the k-th episode.
    stops:   (T, N) int32, the row after its last.
    numbers: (N,) int32.
    longest: (N,) int32, the rows of the longest.
    """

    starts: Tensor
    stops: Tensor
    numbers: Tensor
    longest: Tensor


def sums_by_age(weights: Tensor, mask: Tensor, dones: Tensor) -> Tensor:
    """See `vecpg.advantage.ages.sums_by_age`. Nothing waits for the GPU."""
    return add_parts(add(weights.contiguous(), find(mask.contiguous(), dones.contiguous())))


def subtract_mean_by_age(
    weights: Tensor, mask: Tensor, dones: Tensor, sums: Tensor, others: bool
) -> None:
    """See `vecpg.advantage.ages.subtract_mean_by_age`. Nothing waits for the GPU."""
    rows, mask = weights.contiguous(), mask.contiguous()
    subtract(rows, mask, find(mask, dones.contiguous()), sums.contiguous(), others)
    if rows is not weights:
        weights.copy_(rows)


def subtract_mean_of_runs(
    weights: Tensor,
    found: Found,
    num_ages: int,
    *,
    others: bool,
    shards: int = 1,
    at: Tensor | None = None,
    stamps: Tensor | None = None,
) -> None:
    """Subtract from weights of R runs, in place, the mean over a run's counted rows of one age.

    Rows that belong to no episode are neither read nor written. Each run comes to the bits that it
    would alone. Nothing waits for the GPU.

    Args:
        weights: (R, C, N), contiguous.
        found: of all runs, contiguous: starts and stops (R, E, N), numbers and longest (R, N).
        num_ages: no episode has more rows.
        others: as in `vecpg.advantage.ages.subtract_mean_by_age`.
        shards: groups of environments, each of which has sums of its own, added in their order.
        at: (1,) int64, which iteration this is; needed for `stamps`.
        stamps: (slots, R) int64, any strides: slot `at` modulo their number is given the time of
            the GPU's clock at which this begins. None: nobody asks.
    """
    parts = _add_of_runs(weights, found, num_ages, shards, at, stamps)
    _subtract_of_runs(weights, None, found, _add_parts_of_runs(parts), num_ages, shards, others)


def prepare(device: torch.device, others: bool) -> None:
    """Compile, or load, what rollouts of any size need: no kernel depends on it."""
    weights = torch.zeros(1, 1, device=device)
    flags = torch.zeros(1, 1, dtype=torch.bool, device=device)
    sums = sums_by_age(weights, flags, flags)
    subtract_mean_by_age(weights, flags, flags, sums, others)


# -- Launches, one in each, of contiguous rows ----------------------------------------------------


def find(mask: Tensor, dones: Tensor) -> Found:
    """Where the episodes of each environment lie."""
    num_rows, num_envs = mask.shape
    shapes = (num_rows, num_envs), (num_rows, num_envs), (num_envs,), (num_envs,)
    found = Found(*(mask.new_empty(shape, dtype=torch.int32) for shape in shapes))
    with torch.cuda.device_of(mask):
        _find[(triton.cdiv(num_envs, _ENVS),)](
            mask.view(torch.uint8),
            dones.view(torch.uint8),
            *found,
            num_rows,
            num_envs,
            ROWS=_ROWS,
            ENVS=_ENVS,
            num_warps=_WARPS,
        )
    return found


def add(weights: Tensor, found: Found) -> Tensor:
    """(2, parts, T) float64: sums by age, and numbers, of each part of the environments."""
    return _add_of_runs(weights[None], found, len(weights), 1, None, None)[0, 0]


def add_parts(parts: Tensor) -> Tensor:
    """(2, T) float64: the parts' sums."""
    return _add_parts_of_runs(parts[None, None])[0]


def subtract(weights: Tensor, mask: Tensor, found: Found, sums: Tensor, others: bool) -> None:
    """Subtract the means of (2, ages) `sums`, in place; `ages` may be more than T."""
    _subtract_of_runs(weights[None], mask, found, sums[None], len(weights), 1, others)


def _add_of_runs(
    weights: Tensor,
    found: Found,
    num_ages: int,
    shards: int,
    at: Tensor | None,
    stamps: Tensor | None,
) -> Tensor:
    """(R, shards, 2, parts, ages) float64."""
    runs, capacity, columns = weights.shape
    num_envs = columns // shards
    num_parts = min(_PARTS, triton.cdiv(num_envs, _ENVS))
    parts = weights.new_empty((runs, shards, 2, num_parts, num_ages), dtype=torch.float64)
    slots, *strides = (0, 0, 0) if stamps is None else (len(stamps), *stamps.stride())
    with torch.cuda.device_of(weights):
        _add[(triton.cdiv(num_ages, _AGES), num_parts, runs * shards)](
            weights,
            *found,
            parts,
            at,
            stamps,
            num_ages,
            num_envs,
            num_parts,
            capacity,
            found.starts.shape[-2],
            shards,
            slots,
            *strides,
            CLOCK=stamps is not None and isinstance(_add, triton.JITFunction),
            AGES=_AGES,
            ENVS=_ENVS,
            num_warps=_WARPS,
        )
    return parts


def _add_parts_of_runs(parts: Tensor) -> Tensor:
    """(R, 2, ages) float64, of (R, shards, 2, parts, ages)."""
    runs, shards, _, num_parts, num_ages = parts.shape
    sums = parts.new_empty((runs, 2, num_ages))
    with torch.cuda.device_of(parts):
        _add_parts[(triton.cdiv(num_ages, _AGES), 2, runs)](
            parts, sums, num_ages, num_parts, shards, AGES=_AGES, PARTS=_ENVS, num_warps=_WARPS
        )
    return sums


def _subtract_of_runs(
    weights: Tensor,
    mask: Tensor | None,
    found: Found,
    sums: Tensor,
    num_rows: int,
    shards: int,
    others: bool,
) -> None:
    """As `subtract`, of (R, 2, ages); without a mask rows that belong to no episode stay."""
    runs, capacity, columns = weights.shape
    num_envs = columns // shards
    with torch.cuda.device_of(weights):
        _subtract[(triton.cdiv(num_envs, _ENVS) * triton.cdiv(num_rows, _AGES), runs * shards)](
            weights,
            None if mask is None else mask.view(torch.uint8),
            *found,
            sums,
            num_rows,
            num_envs,
            sums.shape[-1],
            capacity,
            found.starts.shape[-2],
            shards,
            OTHERS=others,
            AGES=_AGES,
            ENVS=_ENVS,
            num_warps=_WARPS,
        )


# -- Kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PLACES)  # type: ignore[untyped-decorator]
def _find(
    mask,
    dones,
    starts,
    stops,
    numbers,
    longest,
    num_rows: tl.int64,
    num_envs: tl.int64,
    ROWS: tl.constexpr,
    ENVS: tl.constexpr,
):
    """A row begins an episode if it counts and none goes on from the row before; ends likewise."""
    n = tl.program_id(0).to(tl.int64) * ENVS + tl.arange(0, ENVS)[None, :]
    number = tl.zeros((1, ENVS), tl.int32)
    most = tl.zeros((1, ENVS), tl.int32)
    last = tl.zeros((1, ENVS), tl.int32)  # where the episode at hand began
    for first in range(0, num_rows, ROWS):
        t = first + tl.arange(0, ROWS)[:, None]
        here = (t < num_rows) & (n < num_envs)
        place = t * num_envs + n
        counted = tl.load(mask + place, mask=here, other=0) != 0
        ends = tl.load(dones + place, mask=here, other=0) != 0
        before = here & (t > 0)
        follows = tl.load(mask + place - num_envs, mask=before, other=0) != 0
        follows &= tl.load(dones + place - num_envs, mask=before, other=1) == 0
        after = here & (t + 1 < num_rows)
        goes_on = tl.load(mask + place + num_envs, mask=after, other=0) != 0
        begins = counted & ~follows
        stopping = counted & (ends | ~goes_on)
        # The episode of a counted row is the one that began last.
        begun = tl.cumsum(begins.to(tl.int32), 0) + number
        place = (begun - 1) * num_envs + n
        row = t.to(tl.int32)
        tl.store(starts + place, row, mask=begins)
        tl.store(stops + place, row + 1, mask=stopping)
        start = tl.associative_scan(tl.where(begins, row, last), 0, _larger)
        most = tl.maximum(most, tl.max(tl.where(stopping, row + 1 - start, 0), 0)[None, :])
        last = tl.max(start, 0)[None, :]
        number += tl.sum(begins.to(tl.int32), 0)[None, :]
    tl.store(numbers + n, number, mask=n < num_envs)
    tl.store(longest + n, most, mask=n < num_envs)


@triton.jit
def _larger(one, other):
    return tl.maximum(one, other)


@triton.jit
def _first(own, num_envs, shards, rows):
    """Where the columns of a shard begin, of so many rows of each run; it is `own` of all runs'."""
    return own // shards * rows * shards * num_envs + own % shards * num_envs


@triton.jit
def _look_up(numbers, longest, n, age, num_envs):
    """In how many episodes of each environment to look for some ages: in none if all are short."""
    number = tl.load(numbers + n, mask=n < num_envs, other=0)
    reached = tl.load(longest + n, mask=n < num_envs, other=0) > tl.min(age)
    return tl.where(reached, number, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _of_each(
    weights, starts, stops, number, n, age, columns, AGES: tl.constexpr, ENVS: tl.constexpr
):
    """Sum and number of the weights of each (age, environment), one episode after the other."""
    total = tl.zeros((AGES, ENVS), tl.float64)
    count = tl.zeros((AGES, ENVS), tl.int32)
    for k in range(0, tl.max(number)):
        there = k < number
        start = tl.load(starts + k * columns + n, mask=there, other=0)
        stop = tl.load(stops + k * columns + n, mask=there, other=0)
        counted = start + age < stop
        place = (start + age).to(tl.int64) * columns + n
        total += tl.load(weights + place, mask=counted, other=0.0).to(tl.float64)
        count += counted.to(tl.int32)
    return total, count


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PLACES)  # type: ignore[untyped-decorator]
def _add(
    weights,
    starts,
    stops,
    numbers,
    longest,
    parts,
    at,
    stamps,
    num_rows: tl.int64,
    num_envs: tl.int64,
    num_parts: tl.int64,
    capacity: tl.int64,
    window: tl.int64,
    shards: tl.int64,
    slots: tl.int64,
    of_slot: tl.int64,
    of_run: tl.int64,
    CLOCK: tl.constexpr,
    AGES: tl.constexpr,
    ENVS: tl.constexpr,
):
    """A part has every `num_parts`-th block of a shard's environments."""
    ages = tl.program_id(0) * AGES + tl.arange(0, AGES)
    part = tl.program_id(1).to(tl.int64)
    own = tl.program_id(2).to(tl.int64)
    if CLOCK:  # noqa: SIM102 - known when it is compiled
        if (tl.program_id(0) == 0) & (part == 0) & (own % shards == 0):
            stamp(stamps + tl.load(at) % slots * of_slot + own // shards * of_run, CLOCK)
    columns = shards * num_envs
    weights += _first(own, num_envs, shards, capacity)
    starts += _first(own, num_envs, shards, window)
    stops += _first(own, num_envs, shards, window)
    numbers += own * num_envs
    longest += own * num_envs
    parts += own * 2 * num_parts * num_rows
    total = tl.zeros((AGES, ENVS), tl.float64)
    count = tl.zeros((AGES, ENVS), tl.int64)
    for first in range(part * ENVS, num_envs, num_parts * ENVS):
        n = first + tl.arange(0, ENVS)[None, :]
        number = _look_up(numbers, longest, n, ages, num_envs)
        own_total, own_count = _of_each(
            weights, starts, stops, number, n, ages[:, None], columns, AGES, ENVS
        )
        total += own_total
        count += own_count
    place = parts + part * num_rows + ages
    tl.store(place, tl.sum(total, 1), mask=ages < num_rows)
    counts = tl.sum(count, 1).to(tl.float64)
    tl.store(place + num_parts * num_rows, counts, mask=ages < num_rows)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PLACES)  # type: ignore[untyped-decorator]
def _add_parts(
    parts,
    sums,
    num_rows: tl.int64,
    num_parts: tl.int64,
    shards: tl.int64,
    AGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The sums, and in other programs the numbers: of each shard, and then of one after another."""
    ages = tl.program_id(0) * AGES + tl.arange(0, AGES)[None, :]
    which = tl.program_id(1).to(tl.int64)
    run = tl.program_id(2).to(tl.int64)
    result = tl.zeros((1, AGES), tl.float64)
    for shard in range(0, shards):
        total = tl.zeros((PARTS, AGES), tl.float64)
        row = ((run * shards + shard) * 2 + which) * num_parts
        for first in range(0, num_parts, PARTS):
            part = first + tl.arange(0, PARTS)[:, None]
            place = parts + (row + part) * num_rows + ages
            total += tl.load(place, mask=(part < num_parts) & (ages < num_rows), other=0.0)
        result += tl.sum(total, 0)[None, :]
    tl.store(sums + (run * 2 + which) * num_rows + ages, result, mask=ages < num_rows)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PLACES)  # type: ignore[untyped-decorator]
def _subtract(
    weights,
    mask,
    starts,
    stops,
    numbers,
    longest,
    sums,
    num_rows: tl.int64,
    num_envs: tl.int64,
    num_ages: tl.int64,
    capacity: tl.int64,
    window: tl.int64,
    shards: tl.int64,
    OTHERS: tl.constexpr,
    AGES: tl.constexpr,
    ENVS: tl.constexpr,
):
    """Of some ages the weights; with a mask, of as many rows those that do not count."""
    own = tl.program_id(1).to(tl.int64)
    columns = shards * num_envs
    weights += _first(own, num_envs, shards, capacity)
    starts += _first(own, num_envs, shards, window)
    stops += _first(own, num_envs, shards, window)
    numbers += own * num_envs
    longest += own * num_envs
    sums += own // shards * 2 * num_ages
    blocks = tl.cdiv(num_envs, ENVS)
    n = tl.program_id(0) % blocks * ENVS + tl.arange(0, ENVS)[None, :]
    age = (tl.program_id(0) // blocks * AGES).to(tl.int32) + tl.arange(0, AGES)[:, None]
    if mask is not None:
        here = (age < num_rows) & (n < num_envs)
        rows = age.to(tl.int64) * columns + n
        counted = tl.load(mask + rows, mask=here, other=1) != 0
        tl.store(weights + rows, tl.zeros((AGES, ENVS), tl.float32), mask=~counted)

    number = _look_up(numbers, longest, n, age, num_envs)
    total = tl.load(sums + age, mask=age < num_rows, other=0.0)
    count = tl.load(sums + num_ages + age, mask=age < num_rows, other=0.0)
    if OTHERS:
        own_total, own_count = _of_each(weights, starts, stops, number, n, age, columns, AGES, ENVS)
        total = total - own_total
        count = count - own_count.to(tl.float64)
    mean = tl.where(count > 0.0, total / tl.where(count > 0.0, count, 1.0), 0.0)
    for k in range(0, tl.max(number)):
        there = k < number
        start = tl.load(starts + k * columns + n, mask=there, other=0)
        stop = tl.load(stops + k * columns + n, mask=there, other=0)
        counted = start + age < stop
        place = weights + (start + age).to(tl.int64) * columns + n
        weight = tl.load(place, mask=counted, other=0.0).to(tl.float64)
        tl.store(place, (weight - mean).to(weights.dtype.element_ty), mask=counted)
