"""The recurrence as one Triton kernel.

    x[t] = b[t] + a[t] * x[t + 1]

For returns x[T] = last_values, and in a real row b = r + gamma * final_value and a = 0 at an end,
b = r and a = gamma elsewhere. For advantages x[T] = 0, b = r + gamma * V' - V and a = gamma *
lambda, or 0 at an end, where V', the value behind the row, is final_value or that of the next row:
read beside it, or, where masked rows let values through, scanned like x.

A program holds a tile of (time, environments) in registers, scans it with `_combine` in float64,
latest row first, and carries x to the tile before it. Kernels differ in the tile only (`_choose`).
Importing this needs triton, running it a CUDA GPU.
"""

import functools
import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if not hasattr(tl, "gather"):
    raise RuntimeError(
        f"returns on cuda: expected triton 3.3 or newer, got {triton.__version__}; install torch"
        ' 2.7 or newer, which brings it, or pass backend="reference"'
    )

# Which tile a shape takes, by the name of the GPU: rows of "layout" and "tile", and of the most
# rows and the least environments that they are for. The first that fits is taken, those of the GPU
# itself before the default ones. `benchmarks/first_hour.py --record` writes what it measured.
_SHAPES = Path(__file__).with_name("cuda.json")

# Elements that have to be on their way to keep a large GPU's memory busy (3 MB at 5 bytes each).
_IN_FLIGHT = 1 << 19
# Splitting time costs a launch and a second reading: not worth it for so few tiles.
_FEW_TILES = 8

# Integer arguments: Triton would compile anew for a 1 or a multiple of 16 among them.
_SIZES = ["num_rows", "num_envs", "span", "r_t", "r_n", "v_t", "v_n", "d_t", "d_n", "g_t", "g_n"]
_SIZES += ["k_t", "k_n", "f_t", "f_n", "l_n", "m_t", "m_n", "o_t", "o_n", "episodes", "total"]
_SIZES += ["gamma", "gae_lambda"]
# And for a pointer to a multiple of 16 bytes: how many are read together is VECTOR's to say.
_PLACES = ["rewards", "values", "dones", "gammas", "lambdas", "final_values", "last_values"]
_PLACES += ["mask", "out", "totals", "after", "shown"]


class _Inputs(NamedTuple):
    """What `reward_to_go` is given, or with values `generalized_advantage`."""

    rewards: Tensor
    dones: Tensor
    gamma: float | Tensor
    final_values: Tensor | None = None
    last_values: Tensor | None = None
    mask: Tensor | None = None
    mask_mode: str = "cut"
    values: Tensor | None = None
    gae_lambda: float | Tensor = 1.0
    plus_values: bool = False


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


# A serial program has all rows of its environments after each other, and passes nothing between
# threads; the others have threads that follow in time.
_SERIAL = {"wide": 4, "narrow": 2}  # environments of a thread
# What a shape's memory may be like, and the tiles that can be taken then.
TILES = {
    "time": ("wide", "narrow", "short", "tall"),
    "batch": ("few", "many"),
    "column": ("one",),
}


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
    _write(_Inputs(rewards, dones, gamma, final_values, last_values, mask, mask_mode), out)


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
    out: Tensor,
) -> None:
    """See `vecpg.returns.generalized_advantage`; the same, and lambda is given as gamma is.

    With `plus_values` the values are added before it is rounded. Without values they are 0.
    """
    if values is None:
        values = rewards.new_zeros(()).expand(rewards.shape)
    inputs = _Inputs(rewards, dones, gamma, final_values, last_values, mask, mask_mode)
    _write(inputs._replace(values=values, gae_lambda=gae_lambda, plus_values=plus_values), out)


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
        _write(inputs, out.unsqueeze(1))


def prepare_reward_to_go(
    num_envs: int, longest: int, device: torch.device, *, with_final: bool
) -> None:
    """Compile what masked rollouts of up to `longest` rows of `num_envs` environments will need.

    That is float32, time-major in memory of its own, with one gamma, cut where masked.
    """
    _prepare(num_envs, longest, device, with_final, with_values=False)


def prepare_generalized_advantage(
    num_envs: int, longest: int, device: torch.device, *, with_final: bool
) -> None:
    """The same of advantages, with one lambda."""
    _prepare(num_envs, longest, device, with_final, with_values=True)


def _prepare(
    num_envs: int, longest: int, device: torch.device, with_final: bool, with_values: bool
) -> None:
    """Run each kernel once: what it is compiled for does not depend on the number of rows."""
    numbers = torch.zeros((8, num_envs), dtype=torch.float32, device=device)
    # One environment's rows are read in fours where there are fours.
    for rows in (8, 7):
        some = numbers[:rows]
        flags, out = torch.zeros_like(some, dtype=torch.bool), torch.empty_like(some)
        inputs = _Inputs(some, flags, 1.0, some if with_final else None, mask=flags)
        if with_values:
            inputs = inputs._replace(values=some)
        variants = {}
        for length in _turning_points(longest, device):
            tile, span = _choose(inputs, out, length)
            variants[tile, span < length] = 4 if span < length else rows
        with torch.cuda.device_of(out):
            for (tile, _), span in variants.items():
                _scan(inputs, out, tile, span)


def _turning_points(longest: int, device: torch.device) -> list[int]:
    """Numbers of rows, the least and the most that take a tile: only the most may be split."""
    ends = [row["max_rows"] for row in _shapes(device) if "max_rows" in row]
    points = {1, longest, *ends, *(end + 1 for end in ends)}
    return sorted(point for point in points if point <= longest)


def _write(inputs: _Inputs, out: Tensor) -> None:
    if out.numel() == 0:
        return
    with torch.cuda.device_of(out):
        _scan(inputs, out, *_choose(inputs, out, len(out)))


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


def _choose(inputs: _Inputs, out: Tensor, num_rows: int) -> tuple[_Tile, int]:
    """The tile, by shape and strides, and the rows of a program (a multiple of the tile's, or all).

    | tile         | of a thread                             | that follow in time            |
    |--------------|-----------------------------------------|--------------------------------|
    | wide, narrow | as many rows as fit, 4 or 2 environments | none                          |
    | short        | 8 rows                                  | 4 warps                        |
    | tall         | 16 rows, or 8                           | 8 warps                        |
    | few, many    | 4 rows, where time is contiguous        | 8 or 32 threads                |
    | one          | 4 rows of the only environment          | 128 threads                    |

    Where there would be few programs, others follow in time. Where neighbours in memory are not in
    aligned fours or twos, they are read one by one.
    """
    rewards = inputs.rewards
    num_envs = rewards.shape[1]
    env_major = num_envs == 1 or rewards.stride(0) == 1 != rewards.stride(1)
    vector = _vector(inputs, out, 0 if env_major else 1)
    layout = "column" if num_envs == 1 else "batch" if env_major else "time"
    name = next(
        row["tile"]
        for row in _shapes(rewards.device)
        if row["layout"] == layout
        and num_rows <= row.get("max_rows", num_rows)
        and num_envs >= row.get("min_envs", 0)
    )
    tile = _tile(name, vector, _load(inputs))
    blocks, tiles = triton.cdiv(num_envs, tile.num_envs), triton.cdiv(num_rows, tile.rows)
    programs = _IN_FLIGHT // (tile.rows * tile.num_envs)
    if name in _SERIAL or tiles <= _FEW_TILES or blocks >= programs:
        return tile, num_rows
    return tile, tile.rows * triton.cdiv(tiles * blocks, 2 * programs)


@functools.cache
def _shapes(device: torch.device) -> list[dict[str, Any]]:
    table: dict[str, list[dict[str, Any]]] = json.loads(_SHAPES.read_text(encoding="utf-8"))
    own = table.get(torch.cuda.get_device_name(device), []) if device.type == "cuda" else []
    return own + table["default"]


def _tile(name: str, vector: int, load: int) -> _Tile:
    """The tile of that name, of what fits into registers."""
    if name in _SERIAL:
        vector = min(vector, _SERIAL[name])
        elements = 64 if load == 0 else 32 if load <= 3 else 16 if load <= 7 else 8
        return _Tile(False, min(16, elements // vector), 1, 32 * vector, vector, warps=1)
    if name == "short":
        return _Tile(False, 8, 4, 32, 1, warps=4)
    if name == "tall":
        return _Tile(False, 16 if load <= 4 else 8, 8, 32, 1, warps=8)
    if name == "one":
        return _Tile(True, vector, 512 // vector, 1, vector, warps=4)
    return _Tile(True, 4, 8, 16, vector, 4) if name == "few" else _Tile(True, 4, 32, 4, vector, 4)


def _load(inputs: _Inputs) -> int:
    """How much more than rewards and ends an element holds in registers: float32s, roughly."""
    _, _, gamma, final_values, _, mask, _, values, gae_lambda, _ = inputs
    doubles = [isinstance(gamma, Tensor), isinstance(gae_lambda, Tensor), values is not None]
    doubles += [values is not None and _is_carried(inputs)]
    return 2 * sum(doubles) + (mask is not None) + (final_values is not None)


def _vector(inputs: _Inputs, out: Tensor, along: int) -> int:
    """How many neighbours along a dimension can be read together: they are, or 1."""
    vector = min(4, 16 // out.element_size())
    rewards, dones, _, final_values, _, mask, _, values, *_ = inputs
    for tensor in (rewards, dones, final_values, mask, values, out):
        if tensor is not None and (
            tensor.stride(along) != 1
            or tensor.shape[along] % vector
            or (tensor.shape[1 - along] > 1 and tensor.stride(1 - along) % vector)
            or tensor.data_ptr() % (vector * tensor.element_size())
        ):
            return 1
    return vector


def _scan(inputs: _Inputs, out: Tensor, tile: _Tile, span: int) -> None:
    """One launch if a program's span is all rows.

    Otherwise two: what each span makes of the x that follows it, b + a * x, and the rows that
    depend on no x that follows; then the other rows. Where values are shown through masked rows, a
    launch before them says which value follows each span. Always in this order, so repeatable.
    """
    num_rows, num_envs = inputs.rewards.shape
    if span >= num_rows:
        _launch(inputs, out, tile, num_rows)
        return
    spans = triton.cdiv(num_rows, span)

    def pairs() -> Tensor:
        return inputs.rewards.new_empty((2, spans, num_envs), dtype=torch.float64)

    shown = None
    if inputs.values is not None and inputs.mask is not None and _is_carried(inputs):
        shown = pairs()
        # Every real row ends what is shown by those behind it.
        each = _Inputs(
            inputs.values,
            inputs.mask,
            inputs.gamma,
            last_values=inputs.last_values,
            mask=inputs.mask,
            mask_mode=inputs.mask_mode,
        )
        _launch(each, None, tile, span, totals=shown)
    totals = pairs()
    _launch(inputs, out, tile, span, totals=totals, shown=shown)
    _launch(inputs, out, tile, span, after=totals, shown=shown)


def _is_carried(inputs: _Inputs) -> bool:
    """Whether a value may be shown to a row that is not the one before it."""
    return inputs.mask is not None and inputs.mask_mode in ("skip", "decay")


def _launch(
    inputs: _Inputs,
    out: Tensor | None,
    tile: _Tile,
    span: int,
    totals: Tensor | None = None,
    after: Tensor | None = None,
    shown: Tensor | None = None,
) -> None:
    rewards, dones, gamma, final_values, last_values, mask, mask_mode = inputs[:7]
    num_rows, num_envs = rewards.shape
    scalar, gammas = (1.0, gamma) if isinstance(gamma, Tensor) else (gamma, None)
    gae_lambda = inputs.gae_lambda
    decay, lambdas = (1.0, gae_lambda) if isinstance(gae_lambda, Tensor) else (gae_lambda, None)
    spans = triton.cdiv(num_rows, span)

    def strides(tensor: Tensor | None) -> tuple[int, ...]:
        return (0, 0) if tensor is None else tensor.stride()

    # Nothing flows into the last span that is not there in the first pass.
    _kernel[(triton.cdiv(num_envs, tile.num_envs), spans if after is None else spans - 1)](
        rewards,
        inputs.values,
        dones.view(torch.uint8),
        _bits(scalar),
        gammas,
        _bits(decay),
        lambdas,
        final_values,
        last_values,
        None if mask is None else mask.view(torch.uint8),
        out,
        totals,
        after,
        shown,
        num_rows,
        num_envs,
        span,
        *strides(rewards),
        *strides(inputs.values),
        *strides(dones),
        *strides(gammas),
        *strides(lambdas),
        *strides(final_values),
        0 if last_values is None else last_values.stride(0),
        *strides(mask),
        *strides(out),
        MASK_MODE=mask_mode,
        PLUS_VALUES=inputs.plus_values,
        ENV_MAJOR=tile.env_major,
        LENGTH=tile.length,
        RUNS=tile.runs,
        ENVS=tile.num_envs,
        VECTOR=tile.vector,
        num_warps=tile.warps,
    )


def _bits(number: float) -> int:
    """Those of a float64. Before 3.4 Triton hands every number that is no integer on as float32."""
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits


@triton.jit
def _number(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _combine(a_after, b_after, a, b):
    """First x -> b_after + a_after * x, then x -> b + a * x, where a = 0 selects b."""
    return a_after * a, _follow(a, b, b_after)


@triton.jit
def _follow(a, b, x):
    return tl.where(a == 0.0, b, b + a * x)


@triton.jit  # type: ignore[untyped-decorator]
def _at(tensor, top, run_rows, step, n, t_stride, n_stride, VECTOR: tl.constexpr):
    """Places of rows `top - run_rows + step`: what differs within a thread is added last."""
    # As many are read together as are said to be aligned, so that bytes get the layout of floats.
    # Without a dimension of neighbours older compilers have threads follow in time instead.
    BYTES: tl.constexpr = VECTOR * tensor.dtype.element_ty.primitive_bitwidth // 8
    NEIGHBOURS: tl.constexpr = 2 if VECTOR == 1 else VECTOR
    places = tensor + top * t_stride + (n * n_stride - run_rows * t_stride) + step * t_stride
    return tl.max_contiguous(tl.multiple_of(places, (1, 1, BYTES)), (1, 1, NEIGHBOURS))


@triton.jit  # type: ignore[untyped-decorator]
def _scan_tile(
    a, b, x, run, row, ENV_MAJOR: tl.constexpr, LENGTH: tl.constexpr, RUNS: tl.constexpr
):
    """A tile's x in every row, its a as a whole, and the x of its first row; `x` follows it."""
    IN_RUN: tl.constexpr = 2 if ENV_MAJOR else 0
    OVER_RUNS: tl.constexpr = 1 if ENV_MAJOR else 0
    # Rows of a run in the order of the scan: the last one first.
    FIRST: tl.constexpr = LENGTH - 1 if ENV_MAJOR else 0
    each_run = tl.expand_dims(run, IN_RUN)
    following = tl.expand_dims(tl.expand_dims(x, OVER_RUNS), IN_RUN)
    b = tl.where((row == FIRST) & (each_run == 0), _follow(a, b, following), b)
    if ENV_MAJOR:
        a, b = tl.flip(a, 2), tl.flip(b, 2)
    a, b = tl.associative_scan((a, b), IN_RUN, _combine)
    run_a = tl.sum(tl.where(row == LENGTH - 1, a, 0.0), IN_RUN)
    run_x = tl.sum(tl.where(row == LENGTH - 1, b, 0.0), IN_RUN)
    if RUNS > 1:
        run_a, run_x = tl.associative_scan((run_a, run_x), OVER_RUNS, _combine)
        if LENGTH > 1:
            previous = tl.broadcast_to(tl.maximum(run - 1, 0), run_x.shape)
            after = tl.where(run == 0, 0.0, tl.gather(run_x, previous, OVER_RUNS))
            b = _follow(a, b, tl.expand_dims(after, IN_RUN))
        else:
            b = tl.expand_dims(run_x, IN_RUN)
    if ENV_MAJOR:
        b = tl.flip(b, 2)
    total = tl.sum(tl.where(run == RUNS - 1, run_a, 0.0), OVER_RUNS)
    x = tl.sum(tl.where(run == RUNS - 1, run_x, 0.0), OVER_RUNS)
    return b, total, x


@triton.jit
def _x_after(totals, k, spans, env, num_envs):
    """The x that follows span k: later spans' a and b in their order, as far as anything flows."""
    SPANS: tl.constexpr = 16  # at a time
    later = (SPANS - 1 - tl.arange(0, SPANS))[:, None]
    a = tl.where(env < num_envs, 1.0, 0.0).to(tl.float64)
    x = tl.zeros_like(a)
    j = k + 1
    while (j < spans) & (tl.max(a) > 0.0):
        place = totals + (j + later) * num_envs + env[None, :]
        inside = (j + later < spans) & (env < num_envs)[None, :]
        its_a = tl.load(place, mask=inside, other=1.0)
        its_b = tl.load(place + spans * num_envs, mask=inside, other=0.0)
        its_a, its_b = tl.associative_scan((its_a, its_b), 0, _combine)
        x = _follow(a, x, tl.sum(tl.where(later == 0, its_b, 0.0), 0))
        a *= tl.sum(tl.where(later == 0, its_a, 0.0), 0)
        j += SPANS
    return x


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PLACES)  # type: ignore[untyped-decorator]
def _kernel(
    rewards,
    values,
    dones,
    gamma: tl.int64,
    gammas,
    gae_lambda: tl.int64,
    lambdas,
    final_values,
    last_values,
    mask,
    out,
    totals,
    after,
    shown,
    num_rows: tl.int64,
    num_envs: tl.int64,
    span: tl.int64,
    r_t: tl.int64,
    r_n: tl.int64,
    v_t: tl.int64,
    v_n: tl.int64,
    d_t: tl.int64,
    d_n: tl.int64,
    g_t: tl.int64,
    g_n: tl.int64,
    k_t: tl.int64,
    k_n: tl.int64,
    f_t: tl.int64,
    f_n: tl.int64,
    l_n: tl.int64,
    m_t: tl.int64,
    m_n: tl.int64,
    o_t: tl.int64,
    o_n: tl.int64,
    MASK_MODE: tl.constexpr,
    PLUS_VALUES: tl.constexpr,
    ENV_MAJOR: tl.constexpr,
    LENGTH: tl.constexpr,
    RUNS: tl.constexpr,
    ENVS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Rows [k * span, (k + 1) * span) of a block of environments, k the program's second number.

    `totals` gets, per span and environment, a and b of the x before the span as b + a * (the x that
    follows); then `out` gets the rows that no x that follows reaches. Given those as `after`, it
    gets the others. `shown` is the same of the values that masked rows let through. `gamma` and
    `gae_lambda` are the bits of a float64.
    """
    # A tile's dimensions: a thread's rows, runs of such rows, environments; or in reverse order.
    # The last one is contiguous in memory. `later` counts rows from the last, as the scan goes.
    ROWS: tl.constexpr = RUNS * LENGTH
    IN_RUN: tl.constexpr = 2 if ENV_MAJOR else 0
    OVER_RUNS: tl.constexpr = 1 if ENV_MAJOR else 0
    # Of the rows behind them, environments are still neighbours; rows begin elsewhere.
    ENV_VECTOR: tl.constexpr = 1 if ENV_MAJOR else VECTOR
    CARRIED: tl.constexpr = MASK_MODE == "skip" or MASK_MODE == "decay"
    env = tl.program_id(0).to(tl.int64) * ENVS + tl.arange(0, ENVS)
    run = tl.arange(0, RUNS)
    row = tl.arange(0, LENGTH)
    if ENV_MAJOR:
        n = env[:, None, None]
        row = row[None, None, :]
        later = run[None, :, None] * LENGTH + (LENGTH - 1 - row)
        run_rows = (run[None, :, None] * LENGTH + (LENGTH - 1)).to(tl.int64)
        step = row.to(tl.int64)
    else:
        n = env[None, None, :]
        row = row[:, None, None]
        later = run[None, :, None] * LENGTH + row
        run_rows = (run[None, :, None] * LENGTH).to(tl.int64)
        step = -row.to(tl.int64)
    run = tl.expand_dims(run, 1 - OVER_RUNS)

    spans = tl.cdiv(num_rows, span)
    k = tl.program_id(1).to(tl.int64)
    start = k * span
    stop = tl.minimum(start + span, num_rows)
    is_env = env < num_envs
    # What follows the span; it is not known yet where totals are asked for.
    x = tl.full((ENVS,), 0.0, tl.float64)
    value = tl.full((ENVS,), 0.0, tl.float64)
    total = tl.full((ENVS,), 1.0, tl.float64)
    if last_values is not None:
        at_end = is_env & (stop == num_rows)
        value += tl.load(last_values + env * l_n, mask=at_end, other=0.0).to(tl.float64)
        if values is None:
            x += value
    if totals is not None:
        total = tl.where(stop == num_rows, 0.0, total)
    if after is not None:
        x = _x_after(after, k, spans, env, num_envs)
        total = tl.where(is_env, 1.0, 0.0).to(tl.float64)
    if shown is not None:
        value += _x_after(shown, k, spans, env, num_envs)

    i = stop * 0
    tiles = tl.cdiv(stop - start, ROWS)
    while i < tiles:
        top = stop - 1 - i * ROWS
        left = tl.minimum(top + 1 - start, ROWS).to(tl.int32)
        valid = (later < left) & tl.expand_dims(tl.expand_dims(is_env, OVER_RUNS), IN_RUN)
        if after is not None:
            valid = valid & tl.expand_dims(tl.expand_dims(total > 0.0, OVER_RUNS), IN_RUN)
        valid = tl.max_constancy(valid, (1, 1, VECTOR))
        paid = tl.load(
            _at(rewards, top, run_rows, step, n, r_t, r_n, VECTOR), mask=valid, other=0.0
        )
        real = valid
        if mask is not None:
            place = _at(mask, top, run_rows, step, n, m_t, m_n, VECTOR)
            real = tl.load(place, mask=valid, other=0) != 0
            paid = tl.where(real, paid, 0.0)
        b = paid.to(tl.float64)
        if gammas is None:
            discount = tl.full(valid.shape, 0.0, tl.float64) + _number(gamma)
        else:
            place = _at(gammas, top, run_rows, step, n, g_t, g_n, 1)
            discount = tl.load(place, mask=valid, other=0.0)
        place = _at(dones, top, run_rows, step, n, d_t, d_n, VECTOR)
        flag = tl.load(place, mask=valid, other=0)
        closed = (flag != 0) & real
        a = discount
        if values is None:
            if final_values is not None:
                place = _at(final_values, top, run_rows, step, n, f_t, f_n, VECTOR)
                final = tl.load(place, mask=closed, other=0.0).to(tl.float64)
                b = tl.where(closed, b + discount * final, b)
        else:
            if lambdas is None:
                a = discount * _number(gae_lambda)
            else:
                place = _at(lambdas, top, run_rows, step, n, k_t, k_n, 1)
                a = discount * tl.load(place, mask=valid, other=0.0)
            own = tl.load(
                _at(values, top, run_rows, step, n, v_t, v_n, VECTOR), mask=valid, other=0.0
            )
            # The row behind each: the one that is read before, if it is not the last.
            end = stop if (mask is not None and CARRIED) else num_rows
            behind = tl.minimum(top + 1 - end, 0).to(tl.int32)
            inside = valid & (later > behind)
            place = _at(values, top + 1, run_rows, step, n, v_t, v_n, ENV_VECTOR)
            following = tl.load(place, mask=inside, other=0.0)
            if mask is not None:
                own = tl.where(real, own, 0.0)
                place = _at(mask, top + 1, run_rows, step, n, m_t, m_n, ENV_VECTOR)
                is_shown = tl.load(place, mask=inside, other=0) != 0
                following = tl.where(is_shown, following, 0.0)
            following = following.to(tl.float64)
            if mask is not None and CARRIED:
                through = tl.full(valid.shape, 1.0, tl.float64)
                if MASK_MODE == "decay":
                    if gammas is None:
                        through = tl.where(inside, discount, 1.0)
                    else:
                        place = _at(gammas, top + 1, run_rows, step, n, g_t, g_n, 1)
                        through = tl.load(place, mask=inside, other=1.0)
                through = tl.where(is_shown, 0.0, through)
                following, _, value = _scan_tile(
                    through, following, value, run, row, ENV_MAJOR, LENGTH, RUNS
                )
            elif last_values is not None:
                last = tl.expand_dims(tl.expand_dims(value, OVER_RUNS), IN_RUN)
                following = tl.where(later == behind, last, following)
            if final_values is None:
                following = tl.where(closed, 0.0, following)
            else:
                place = _at(final_values, top, run_rows, step, n, f_t, f_n, VECTOR)
                final = tl.load(place, mask=closed, other=0.0).to(tl.float64)
                following = tl.where(closed, final, following)
            if mask is not None and MASK_MODE != "zero":
                following = tl.where(real, following, 0.0)
            b = b - own.to(tl.float64) + discount * following
        if mask is not None and MASK_MODE == "cut":
            a = tl.where(real & (flag == 0), a, 0.0)
        else:
            a = tl.where(closed, 0.0, a)
        if mask is not None and MASK_MODE == "skip":
            a = tl.where(real, a, 1.0)
        if totals is not None:
            a = tl.where(valid, a, 1.0)
            if values is not None:
                b = tl.where(valid, b, 0.0)

        b, its_a, x = _scan_tile(a, b, x, run, row, ENV_MAJOR, LENGTH, RUNS)
        if out is not None:
            if PLUS_VALUES:
                b += own.to(tl.float64)
            if out.dtype.element_ty != tl.float64:
                # As torch rounds to 16 bits; the interpreter has no other way to bfloat16.
                b = b.to(tl.float32)
            if mask is not None:
                b = tl.where(real, b, 0.0)
            if totals is not None:
                known = tl.expand_dims(tl.expand_dims(total == 0.0, OVER_RUNS), IN_RUN)
                valid = tl.max_constancy(valid & known, (1, 1, VECTOR))
            tl.store(_at(out, top, run_rows, step, n, o_t, o_n, VECTOR), b, mask=valid)
        if totals is not None or after is not None:
            total *= its_a
        i += 1
        if after is not None:
            # The rest has been written.
            i = tl.where(tl.max(total) > 0.0, i, tiles)

    if totals is not None:
        place = totals + k * num_envs + env
        tl.store(place, total, mask=is_env)
        tl.store(place + spans * num_envs, x, mask=is_env)


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
