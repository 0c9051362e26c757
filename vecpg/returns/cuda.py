"""The recurrence as one Triton kernel.

    x[t] = b[t] + a[t] * x[t + 1],   x[T] = last_values

with, in a real row, b = r + gamma * final_value and a = 0 at an end, b = r and a = gamma elsewhere.
A program holds a tile of (time, environments) in registers, scans it with `_combine` in float64,
latest row first, and carries x to the tile before it. Kernels differ in the tile only (`_choose`).
Importing this needs triton, running it a CUDA GPU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements that have to be on their way to keep a large GPU's memory busy (3 MB at 5 bytes each).
_IN_FLIGHT = 1 << 19
# Splitting time costs two launches and a second reading: not worth it for so few tiles.
_FEW_TILES = 8

# Integer arguments: Triton would compile anew for a 1 or a multiple of 16 among them.
_SIZES = ["num_rows", "num_envs", "span", "r_t", "r_n", "d_t", "d_n", "g_t", "g_n"]
_SIZES += ["f_t", "f_n", "l_n", "m_t", "m_n", "o_t", "o_n", "episodes", "total"]


class _Inputs(NamedTuple):
    """What `reward_to_go` is given."""

    rewards: Tensor
    dones: Tensor | None
    gamma: float | Tensor
    final_values: Tensor | None = None
    last_values: Tensor | None = None
    mask: Tensor | None = None
    mask_mode: str = "cut"


class _Tile(NamedTuple):
    """What a program holds at a time: `runs` runs of `length` rows of `num_envs` environments.

    env_major: a run's rows are neighbours in memory; else environments are.
    vector:    neighbours that are read together.
    """

    env_major: bool
    length: int
    runs: int
    num_envs: int
    vector: int
    warps: int

    @property
    def rows(self) -> int:
        return self.length * self.runs


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
    """See `vecpg.returns.reward_to_go`; `gamma` is a float, or float64 expanded to `rewards`.

    All are (T, N), `last_values` (N,), with any strides; `out` is written. Nothing is checked, and
    nothing waits for the GPU. A discount of 0 cuts like an end: what follows it may be NaN.
    """
    if out.numel() == 0:
        return
    inputs = _Inputs(rewards, dones, gamma, final_values, last_values, mask, mask_mode)
    with torch.cuda.device_of(rewards):
        _scan(inputs, out, *_choose(inputs, out))


def packed_reward_to_go(
    rewards: Tensor,
    offsets: Tensor,
    gamma: float | Tensor,
    final_values: Tensor | None,
    out: Tensor,
) -> None:
    """See `vecpg.returns.packed_reward_to_go`; `gamma` is a float, or float64 (total,).

    Episodes follow one another: this is one environment, whose episodes end where `offsets` say.
    """
    if out.numel() == 0:
        return
    with torch.cuda.device_of(rewards):
        dones, values = _ends(offsets, final_values, len(rewards))
        inputs = _Inputs(
            rewards.unsqueeze(1),
            dones.unsqueeze(1),
            gamma.unsqueeze(1) if isinstance(gamma, Tensor) else gamma,
            None if values is None else values.unsqueeze(1),
        )
        _scan(inputs, out.unsqueeze(1), *_choose(inputs, out.unsqueeze(1)))


def _ends(offsets: Tensor, final_values: Tensor | None, total: int) -> tuple[Tensor, Tensor | None]:
    """(total,) `dones`, and final values at them; elsewhere those are undefined, and not read."""
    dones = torch.zeros(total, dtype=torch.bool, device=offsets.device)
    values = None
    if final_values is not None:
        values = torch.empty(total, dtype=final_values.dtype, device=offsets.device)
    episodes, block = len(offsets) - 1, 256
    _mark_ends[(triton.cdiv(episodes, block),)](
        offsets,
        final_values,
        dones.view(torch.uint8),
        values,
        offsets.stride(0),
        0 if final_values is None else final_values.stride(0),
        episodes,
        total,
        BLOCK=block,
    )
    return dones, values


def _choose(inputs: _Inputs, out: Tensor) -> tuple[_Tile, int]:
    """The tile, by shape and strides, and the rows of a program (a multiple of the tile's, or all).

    | kernel | taken                     | a tile                                         |
    |--------|---------------------------|------------------------------------------------|
    | A      | T <= 16 or N >= 32768     | a thread has 16 or 8 rows of 4 environments    |
    | B      | otherwise                 | a thread has 16 rows, 8 warps follow in time   |
    | C      | where time is contiguous  | a thread has 4 rows, 8 to 128 follow in time   |
    | D      | B, C with few programs    | theirs, and other programs follow in time      |

    Where neighbours in memory are not in aligned fours, A and C have single ones instead.
    """
    rewards, dones, gamma, final_values, last_values, mask, _ = inputs
    num_rows, num_envs = rewards.shape
    env_major = num_envs == 1 or rewards.stride(0) == 1 != rewards.stride(1)
    along = 0 if env_major else 1
    vector = min(4, 16 // rewards.element_size())
    for tensor in (rewards, dones, final_values, mask, out):
        if tensor is not None and (
            tensor.stride(along) != 1
            or tensor.shape[along] % vector
            or (tensor.shape[1 - along] > 1 and tensor.stride(1 - along) % vector)
        ):
            vector = 1
    if last_values is not None and not env_major and last_values.stride(0) != 1:
        vector = 1

    if env_major:
        rows = 512 if num_envs == 1 else 32 if num_rows <= 32 else 128
        tile = _Tile(True, vector, rows // vector, 512 // rows, vector, warps=4)
    elif num_rows <= 16 or num_envs >= 32768:
        # The most that fits into registers.
        more = mask is not None or final_values is not None or isinstance(gamma, Tensor)
        return _Tile(False, 8 if more else 16, 1, 32 * vector, vector, warps=1), num_rows
    else:
        tile = _Tile(False, 16, 8, 32, 1, warps=8)

    programs = _IN_FLIGHT // (tile.rows * tile.num_envs)
    blocks, tiles = triton.cdiv(num_envs, tile.num_envs), triton.cdiv(num_rows, tile.rows)
    if tiles <= _FEW_TILES or blocks >= programs:
        return tile, num_rows
    return tile, tile.rows * triton.cdiv(tiles * blocks, 2 * programs)


def _scan(inputs: _Inputs, out: Tensor, tile: _Tile, span: int) -> None:
    """One launch if a program's span is all rows.

    Otherwise three: what each span makes of the x that follows it, b + a * x; the x that follows
    each, by the same recurrence over spans; the returns. Always in this order, so repeatable.
    """
    num_rows, num_envs = inputs.rewards.shape
    if span >= num_rows:
        _launch(inputs, out, tile, num_rows)
        return
    spans = triton.cdiv(num_rows, span)
    a, b, x = inputs.rewards.new_empty((3, spans, num_envs), dtype=torch.float64)
    over_spans = _Inputs(b, None, a, last_values=inputs.last_values)
    _launch(inputs, None, tile, span, totals=(a, b))
    _launch(over_spans, x, _choose(over_spans, x)[0], spans)
    _launch(inputs, out, tile, span, carries=x)


def _launch(
    inputs: _Inputs,
    out: Tensor | None,
    tile: _Tile,
    span: int,
    totals: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    carries: Tensor | None = None,
) -> None:
    rewards, dones, gamma, final_values, last_values, mask, mask_mode = inputs
    num_rows, num_envs = rewards.shape
    scalar, gammas = (1.0, gamma) if isinstance(gamma, Tensor) else (gamma, None)

    def strides(tensor: Tensor | None) -> tuple[int, ...]:
        return (0, 0) if tensor is None else tensor.stride()

    _kernel[(triton.cdiv(num_envs, tile.num_envs), triton.cdiv(num_rows, span))](
        rewards,
        None if dones is None else dones.view(torch.uint8),
        scalar,
        gammas,
        final_values,
        last_values,
        None if mask is None else mask.view(torch.uint8),
        out,
        *totals,
        carries,
        num_rows,
        num_envs,
        span,
        *strides(rewards),
        *strides(dones),
        *strides(gammas),
        *strides(final_values),
        0 if last_values is None else last_values.stride(0),
        *strides(mask),
        *strides(out),
        MASK_MODE=mask_mode,
        ENV_MAJOR=tile.env_major,
        LENGTH=tile.length,
        RUNS=tile.runs,
        ENVS=tile.num_envs,
        VECTOR=tile.vector,
        num_warps=tile.warps,
    )


@triton.jit
def _combine(a_after, b_after, a, b):
    """First x -> b_after + a_after * x, then x -> b + a * x, where a = 0 selects b."""
    return a_after * a, _follow(a, b, b_after)


@triton.jit
def _follow(a, b, x):
    return b + tl.where(a == 0.0, 0.0, a * x)


@triton.jit  # type: ignore[untyped-decorator]
def _at(tensor, t, n, t_stride, n_stride, VECTOR: tl.constexpr):
    # Says no more than VECTOR, lest bytes get another layout than floats and have to be exchanged.
    offsets = t * t_stride + n * n_stride
    return tensor + tl.max_contiguous(tl.multiple_of(offsets, (1, 1, VECTOR)), (1, 1, VECTOR))


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def _kernel(
    rewards,
    dones,
    gamma: tl.float64,
    gammas,
    final_values,
    last_values,
    mask,
    out,
    totals_a,
    totals_b,
    carries,
    num_rows: tl.int64,
    num_envs: tl.int64,
    span: tl.int64,
    r_t: tl.int64,
    r_n: tl.int64,
    d_t: tl.int64,
    d_n: tl.int64,
    g_t: tl.int64,
    g_n: tl.int64,
    f_t: tl.int64,
    f_n: tl.int64,
    l_n: tl.int64,
    m_t: tl.int64,
    m_n: tl.int64,
    o_t: tl.int64,
    o_n: tl.int64,
    MASK_MODE: tl.constexpr,
    ENV_MAJOR: tl.constexpr,
    LENGTH: tl.constexpr,
    RUNS: tl.constexpr,
    ENVS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Rows [k * span, (k + 1) * span) of a block of environments, k the program's second number.

    Writes `out`, from the x that follows (`carries`, `last_values`); or to `totals_*`, per span and
    environment, a and b of the x before the span as b + a * (the x that follows).
    """
    # A tile's dimensions: a thread's rows, runs of such rows, environments; or in reverse order.
    # The last one is contiguous in memory. `later` counts rows from the last, as the scan goes.
    ROWS: tl.constexpr = RUNS * LENGTH
    IN_RUN: tl.constexpr = 2 if ENV_MAJOR else 0
    OVER_RUNS: tl.constexpr = 1 if ENV_MAJOR else 0
    ENV_VECTOR: tl.constexpr = 1 if ENV_MAJOR else VECTOR
    env = tl.program_id(0).to(tl.int64) * ENVS + tl.arange(0, ENVS)
    run = tl.arange(0, RUNS)
    row = tl.arange(0, LENGTH)
    if ENV_MAJOR:
        n = env[:, None, None]
        later = run[None, :, None] * LENGTH + (LENGTH - 1 - row)[None, None, :]
        end_of_run = (row == LENGTH - 1)[None, None, :]
    else:
        n = env[None, None, :]
        later = run[None, :, None] * LENGTH + row[:, None, None]
        end_of_run = (row == LENGTH - 1)[:, None, None]
    run = tl.expand_dims(run, 1 - OVER_RUNS)

    k = tl.program_id(1).to(tl.int64)
    start = k * span
    stop = tl.minimum(start + span, num_rows)
    x = tl.full((ENVS,), 0.0, tl.float64)
    if last_values is not None and totals_a is None:
        place = tl.max_contiguous(tl.multiple_of(env * l_n, ENV_VECTOR), ENV_VECTOR)
        at_end = tl.max_constancy((env < num_envs) & (stop == num_rows), ENV_VECTOR)
        x += tl.load(last_values + place, mask=at_end, other=0.0).to(tl.float64)
    if carries is not None:
        place = (k + 1) * num_envs + env
        inside = (env < num_envs) & (stop < num_rows)
        x += tl.load(carries + place, mask=inside, other=0.0)
    total = tl.full((ENVS,), 1.0, tl.float64)

    for i in range(0, tl.cdiv(stop - start, ROWS)):
        t = stop - 1 - i * ROWS - later
        valid = tl.max_constancy((t >= start) & (n < num_envs), (1, 1, VECTOR))
        b = tl.load(_at(rewards, t, n, r_t, r_n, VECTOR), mask=valid, other=0.0).to(tl.float64)
        real = valid
        if mask is not None:
            real = tl.load(_at(mask, t, n, m_t, m_n, VECTOR), mask=valid, other=0) != 0
        if gammas is None:
            a = tl.full(valid.shape, 0.0, tl.float64) + gamma
        else:
            a = tl.load(gammas + t * g_t + n * g_n, mask=valid, other=0.0)
        if dones is not None:
            ends = tl.load(_at(dones, t, n, d_t, d_n, VECTOR), mask=valid, other=0) != 0
            ends = ends & real
            if final_values is not None:
                value = tl.load(_at(final_values, t, n, f_t, f_n, VECTOR), mask=ends, other=0.0)
                b = tl.where(ends, b + a * value.to(tl.float64), b)
            a = tl.where(ends, 0.0, a)
        if mask is not None:
            b = tl.where(real, b, 0.0)
            if MASK_MODE == "cut":
                a = tl.where(real, a, 0.0)
            elif MASK_MODE == "skip":
                a = tl.where(real, a, 1.0)
        a = tl.where(valid, a, 1.0)

        following = tl.expand_dims(tl.expand_dims(x, OVER_RUNS), IN_RUN)
        b = tl.where(later == 0, _follow(a, b, following), b)

        if ENV_MAJOR:
            a, b = tl.flip(a, 2), tl.flip(b, 2)
        a, b = tl.associative_scan((a, b), IN_RUN, _combine)
        run_a = tl.sum(tl.where(end_of_run, a, 0.0), IN_RUN)
        run_x = tl.sum(tl.where(end_of_run, b, 0.0), IN_RUN)
        if RUNS > 1:
            run_a, run_x = tl.associative_scan((run_a, run_x), OVER_RUNS, _combine)
            if LENGTH > 1:
                previous = tl.broadcast_to(tl.maximum(run - 1, 0), run_x.shape)
                after = tl.where(run == 0, 0.0, tl.gather(run_x, previous, OVER_RUNS))
                b = _follow(a, b, tl.expand_dims(after, IN_RUN))
            else:
                b = tl.expand_dims(run_x, IN_RUN)
        x = tl.sum(tl.where(run == RUNS - 1, run_x, 0.0), OVER_RUNS)
        if totals_a is not None:
            total *= tl.sum(tl.where(run == RUNS - 1, run_a, 0.0), OVER_RUNS)
        else:
            if ENV_MAJOR:
                b = tl.flip(b, 2)
            b = tl.where(real, b, 0.0)
            if out.dtype.element_ty != tl.float64:
                # As torch rounds to 16 bits; the interpreter has no other way to bfloat16.
                b = b.to(tl.float32)
            tl.store(_at(out, t, n, o_t, o_n, VECTOR), b, mask=valid)

    if totals_a is not None:
        place = k * num_envs + env
        tl.store(totals_a + place, total, mask=env < num_envs)
        tl.store(totals_b + place, x, mask=env < num_envs)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def _mark_ends(
    offsets,
    final_values,
    dones,
    values,
    o_t: tl.int64,
    f_t: tl.int64,
    episodes: tl.int64,
    total: tl.int64,
    BLOCK: tl.constexpr,
):
    """At the last row of every episode that has one: mark it, and put its final value there."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(offsets + i * o_t, mask=i < episodes, other=0)
    stop = tl.load(offsets + (i + 1) * o_t, mask=i < episodes, other=0)
    # The bounds hold whatever the offsets are: nothing is written elsewhere.
    found = (start < stop) & (stop > 0) & (stop <= total)
    tl.store(dones + stop - 1, 1, mask=found)
    if final_values is not None:
        value = tl.load(final_values + i * f_t, mask=found, other=0.0)
        tl.store(values + stop - 1, value, mask=found)
