"""The step of an iteration on a GPU: from sums over parts of its rows to the next state.

| launch    | programs                 | what it does                               |
|-----------|--------------------------|--------------------------------------------|
| `_add`    | for some numbers of runs | the sums of all parts                      |
| `_step`   | one a run                | its entry; clips; Adam, into the next slot |
| `_finish` | one                      | stamps of the end; counts the iteration    |

Importing this needs triton, running it a CUDA GPU.
"""

import torch
import triton
import triton.language as tl

from vecpg.kernels.cuda import is_finite, stamp
from vecpg.kernels.iteration import Entry, Memory, Scalar, Setting, Shape, Stamp, Tally

# What a program that adds has at a time: of some parts some numbers.
_PARTS, _SUMS, _ADDING_WARPS = 32, 64, 4
# And one that makes a step: numbers, and blocks of environments.
_NUMBERS, _BLOCKS, _WARPS = 2048, 512, 16

# Integer arguments: Triton would compile anew for a 1 or a multiple of 16 among them.
_SIZES = ["size", "stride", "num_parts", "shards", "blocks", "slots", "runs"]

_TALLIES, _ENTRIES = tl.constexpr(len(Tally)), tl.constexpr(len(Entry))
_SCALARS, _SETTINGS = tl.constexpr(len(Scalar)), tl.constexpr(len(Setting))
_STAMPS, _END = tl.constexpr(len(Stamp)), tl.constexpr(int(Stamp.END))
_MAX_GRAD_NORM = tl.constexpr(int(Setting.MAX_GRAD_NORM))
_STEP_SIZE, _ROOT = tl.constexpr(int(Scalar.STEP_SIZE)), tl.constexpr(int(Scalar.ROOT))
_IN_COUNTED, _IN_EPISODES = tl.constexpr(int(Tally.COUNTED)), tl.constexpr(int(Tally.EPISODES))
_IN_SUM, _IN_FINITE = tl.constexpr(int(Tally.RETURN_SUM)), tl.constexpr(int(Tally.FINITE))
_IN_LOW, _IN_HIGH = tl.constexpr(int(Tally.RETURN_LOW)), tl.constexpr(int(Tally.RETURN_HIGH))
_COUNTED, _ROWS = tl.constexpr(int(Entry.COUNTED)), tl.constexpr(int(Entry.ROWS))
_EPISODES, _SUM = tl.constexpr(int(Entry.EPISODES)), tl.constexpr(int(Entry.RETURN_SUM))
_LOW, _HIGH = tl.constexpr(int(Entry.RETURN_LOW)), tl.constexpr(int(Entry.RETURN_HIGH))
_LOSS, _ENTROPY = tl.constexpr(int(Entry.POLICY_LOSS)), tl.constexpr(int(Entry.ENTROPY))
_NORM = tl.constexpr(int(Entry.GRAD_NORM))
_ROLLOUT_FINITE = tl.constexpr(int(Entry.ROLLOUT_FINITE))
_UPDATE_FINITE = tl.constexpr(int(Entry.UPDATE_FINITE))


def step(
    memory: Memory, shape: Shape, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> None:
    """From `parts` and `tallies` of the iteration at hand to its entry, and the state it leaves.

    The gradient is the sum of all parts as float32; it is clipped as `vecpg.update`
    does, and followed as `vecpg.adam.Adam` follows it. The state is that with which the iteration
    began, where a number of the rollout, the loss, the entropy, the gradient's norm, or a parameter
    after the step is not finite: the entry says so. Then the next iteration is at hand.

    For equal gradients, and a first beta above 0.5, parameters and averages have the bits of
    `vecpg.adam.Adam` on a CPU, but for its square roots. Here they are the nearest numbers; on a
    CPU torch may leave them to a library that is one bit off here and there, and on one without
    fused multiplication and addition it rounds more often.

    Three launches. Nothing waits for the GPU.

    Args:
        memory: of two slots or more. `sums`, and of its rings what is the iteration's, are written.
        shape: of the policy.
        betas: Adam's.
        eps: Adam's.
    """
    slots, runs = memory.scalars.shape[:2]
    _, shards, num_parts, stride = memory.parts.shape
    beta1, beta2 = betas
    with torch.cuda.device_of(memory.at):
        _add[(triton.cdiv(stride, _SUMS), runs)](
            memory.parts,
            memory.sums,
            shape.size,
            stride,
            shards,
            num_parts,
            PARTS=_PARTS,
            SUMS=_SUMS,
            num_warps=_ADDING_WARPS,
        )
        _step[(runs,)](
            memory.at,
            memory.scalars,
            memory.settings,
            memory.states,
            memory.last,
            memory.tallies,
            memory.sums,
            memory.entries,
            shape.size,
            stride,
            shards,
            memory.last.shape[1] // shards,
            slots,
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            NUMBERS=_NUMBERS,
            BLOCKS=_BLOCKS,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
        _finish[(1,)](
            memory.at,
            memory.stamps,
            slots,
            runs,
            CLOCK=isinstance(_finish, triton.JITFunction),
            num_warps=1,
        )


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def _add(
    parts,
    sums,
    size: tl.int64,
    stride: tl.int64,
    shards: tl.int64,
    num_parts: tl.int64,
    PARTS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Of each shard the sum, and then of one shard after the other."""
    n = tl.program_id(0).to(tl.int64) * SUMS + tl.arange(0, SUMS)[None, :]
    run = tl.program_id(1).to(tl.int64)
    total = tl.zeros((1, SUMS), tl.float64)
    for shard in range(0, shards):
        rows = parts + (run * shards + shard) * num_parts * stride
        own = tl.zeros((PARTS, SUMS), tl.float64)
        for first in range(0, num_parts, PARTS):
            part = first + tl.arange(0, PARTS)[:, None]
            there = (part < num_parts) & (n < size + 2)
            own += tl.load(rows + part * stride + n, mask=there, other=0.0)
        total += tl.sum(own, 0)[None, :]
    tl.store(sums + run * stride + n, total, mask=n < size + 2)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def _step(
    at,
    scalars,
    settings,
    states,
    last,
    tallies,
    sums,
    entries,
    size: tl.int64,
    stride: tl.int64,
    shards: tl.int64,
    blocks: tl.int64,
    slots: tl.int64,
    to_gradient,
    beta2,
    to_square,
    eps,
    NUMBERS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A program has all numbers of a run."""
    run, runs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    iteration = tl.load(at)
    here = iteration % slots * runs + run
    scalars += here * _SCALARS
    entry = entries + here * _ENTRIES
    old = states + here * 3 * stride
    new = states + ((iteration + 1) % slots * runs + run) * 3 * stride
    sums += run * stride
    tallies += run * shards * blocks * _TALLIES
    last += run * shards * blocks

    counted, finite = _write_rollout(tallies, last, entry, shards, blocks, BLOCKS)
    loss = tl.load(sums + size)
    entropy = tl.load(sums + size + 1) / tl.maximum(counted, 1.0)
    norm = _norm(sums, size, NUMBERS)
    tl.store(entry + _LOSS, loss)
    tl.store(entry + _ENTROPY, entropy)
    tl.store(entry + _NORM, norm)

    longest = tl.load(settings + run * _SETTINGS + _MAX_GRAD_NORM).to(tl.float32)
    scale = tl.minimum(tl.div_rn(1.0, norm + 1e-6) * longest, 1.0)
    step_size = tl.load(scalars + _STEP_SIZE).to(tl.float32)
    root = tl.load(scalars + _ROOT).to(tl.float32)
    wrong = tl.zeros((NUMBERS,), tl.int32)
    for first in range(0, size, NUMBERS):
        n = first + tl.arange(0, NUMBERS)
        there = n < size
        gradient = tl.load(sums + n, mask=there, other=0.0).to(tl.float32) * scale
        mean = tl.load(old + stride + n, mask=there, other=0.0)
        square = tl.load(old + 2 * stride + n, mask=there, other=0.0)
        # Torch rounds these two once, after the sum.
        mean = tl.fma(gradient - mean, to_gradient, mean)
        square = tl.fma(gradient * to_square, gradient, square * beta2)
        divisor = tl.div_rn(tl.sqrt_rn(square), root) + eps
        parameter = tl.load(old + n, mask=there, other=0.0)
        parameter += tl.div_rn(mean * -step_size, divisor)
        wrong |= (there & ~is_finite(parameter)).to(tl.int32)
        tl.store(new + n, parameter, mask=there)
        tl.store(new + stride + n, mean, mask=there)
        tl.store(new + 2 * stride + n, square, mask=there)

    well = (tl.max(wrong) == 0) & is_finite(loss) & is_finite(entropy) & is_finite(norm)
    tl.store(entry + _UPDATE_FINITE, well.to(tl.float64))
    if (well & (finite == 1.0)) == 0:
        for first in range(0, size, NUMBERS):
            n = first + tl.arange(0, NUMBERS)
            for which in tl.static_range(3):
                kept = tl.load(old + which * stride + n, mask=n < size, other=0.0)
                tl.store(new + which * stride + n, kept, mask=n < size)


@triton.jit  # type: ignore[untyped-decorator]
def _write_rollout(tallies, last, entry, shards, blocks, BLOCKS: tl.constexpr):
    """Of an entry what blocks tell of their rows; the number of counted ones, and 1 for finite."""
    counted = tl.zeros((BLOCKS,), tl.float64)
    episodes = tl.zeros((BLOCKS,), tl.float64)
    low = tl.full((BLOCKS,), float("inf"), tl.float64)
    high = tl.full((BLOCKS,), float("-inf"), tl.float64)
    finite = tl.full((BLOCKS,), 1.0, tl.float64)
    rows = tl.zeros((BLOCKS,), tl.int32)
    total = tl.sum(counted)
    for shard in range(0, shards):
        own = tl.zeros((BLOCKS,), tl.float64)
        for first in range(0, blocks, BLOCKS):
            b = first + tl.arange(0, BLOCKS)
            there = b < blocks
            row = tallies + (shard * blocks + b) * _TALLIES
            counted += tl.load(row + _IN_COUNTED, mask=there, other=0.0)
            episodes += tl.load(row + _IN_EPISODES, mask=there, other=0.0)
            own += tl.load(row + _IN_SUM, mask=there, other=0.0)
            low = tl.minimum(low, tl.load(row + _IN_LOW, mask=there, other=float("inf")))
            high = tl.maximum(high, tl.load(row + _IN_HIGH, mask=there, other=float("-inf")))
            finite = tl.minimum(finite, tl.load(row + _IN_FINITE, mask=there, other=1.0))
            rows = tl.maximum(rows, tl.load(last + shard * blocks + b, mask=there, other=0))
        total += tl.sum(own)
    all_counted, all_finite = tl.sum(counted), tl.min(finite)
    tl.store(entry + _COUNTED, all_counted)
    tl.store(entry + _ROWS, tl.max(rows).to(tl.float64))
    tl.store(entry + _EPISODES, tl.sum(episodes))
    tl.store(entry + _SUM, total)
    tl.store(entry + _LOW, tl.min(low))
    tl.store(entry + _HIGH, tl.max(high))
    tl.store(entry + _ROLLOUT_FINITE, all_finite)
    return all_counted, all_finite


@triton.jit  # type: ignore[untyped-decorator]
def _norm(sums, size, NUMBERS: tl.constexpr):
    """The length of what they are as float32."""
    squares = tl.zeros((NUMBERS,), tl.float64)
    for first in range(0, size, NUMBERS):
        n = first + tl.arange(0, NUMBERS)
        gradient = tl.load(sums + n, mask=n < size, other=0.0).to(tl.float32).to(tl.float64)
        squares += gradient * gradient
    square = tl.sum(squares)
    # Adam's averages are float32, of squares too.
    return tl.where(square > 3.4028234663852886e38, float("inf"), tl.sqrt(square)).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def _finish(at, stamps, slots: tl.int64, runs: tl.int64, CLOCK: tl.constexpr):
    iteration = tl.load(at)
    for run in range(0, runs):
        stamp(stamps + (iteration % slots * runs + run) * _STAMPS + _END, CLOCK)
    tl.store(at, iteration + 1)
