"""A row's actions drawn by one Triton kernel, from what a policy's network gives.

Uniform numbers are made where they are used: each is a function of (seed, iteration, environment,
step, purpose), as in `vecpg.noise`. The step is a counter on the device.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vecpg.kernels.cuda import as_uniform, cos, exp, log, sin, uniform, words
from vecpg.noise import Purpose
from vecpg.policy import Policy
from vecpg.policy.distributions import LOG_STD_RANGE, Categorical, DiagonalGaussian

# Environments of a program.
_BLOCK = 128
_ACTION = tl.constexpr(int(Purpose.ACTION))
_LOW, _HIGH = (tl.constexpr(each) for each in LOG_STD_RANGE)
# As `distributions._inside` moves a parameter: 0 is a standard deviation of 1.
_SHIFT = tl.constexpr(math.log(-LOG_STD_RANGE[0] / LOG_STD_RANGE[1]))
_TURN = tl.constexpr(2 * math.pi)


def why_not(policy: Policy) -> str | None:
    """Why the kernels of this file do not draw a policy's actions; None if they do."""
    distribution = policy.distribution
    if type(policy).sample is not Policy.sample or "sample" in vars(policy):
        return f"{type(policy).__name__} draws in its own way"
    if type(distribution) is Categorical:
        return None
    if type(distribution) is not DiagonalGaussian:
        return "its actions are neither Discrete nor a Box"
    if distribution.raw_log_std is None:
        return "its standard deviation comes from the network"
    return None


def make_draw(policy: Policy) -> Callable[..., None]:
    """What draws a row's actions, in one launch, for a policy that `why_not` has nothing against.

        draw(parameters, copies, rows, offset)

    It draws those of row t = copies.t[0] + offset, from parameters (P, N) float32, as
    `Policy.forward` gives them; t is read on the device, and so are standard deviations, whenever
    it is called. They are the actions of `Policy.sample`, but where rounding decides.

    Of `copies`, as `vecpg.rollout.cuda.make_step` has them, `acted` (N, A) is written, inside the
    bounds of a Box; of `rows`, row t of actions: (R, N) int64, or (R, N, A) float32 as drawn.
    """
    distribution: Any = policy.distribution
    if isinstance(distribution, Categorical):

        def draw(parameters: Tensor, copies: Any, rows: Any, offset: int) -> None:
            _draw_categorical(parameters, distribution.first_action, copies, rows, offset)

    else:

        def draw(parameters: Tensor, copies: Any, rows: Any, offset: int) -> None:
            _draw_gaussian(parameters, distribution, copies, rows, offset)

    return draw


def uniforms(out: Tensor, copies: Any, purpose: Purpose, offset: int) -> None:
    """Write what `Stream.uniforms_at` gives to `out` (count, K, N), float32, in one launch.

    Row k is that of step copies.t[0] + offset + k; the copies are all N of the stream.

    Args:
        out: contiguous.
        copies: as `vecpg.rollout.cuda.make_step` has them; `t` and `key` are read.
        purpose: what the numbers are for.
        offset: of the first step.
    """
    count, num_steps, num_envs = out.shape
    with torch.cuda.device_of(out):
        _uniforms[(triton.cdiv(num_envs, _BLOCK), num_steps, triton.cdiv(count, 4))](
            num_envs,
            out,
            copies.t,
            copies.key,
            count,
            num_steps,
            offset,
            PURPOSE=int(purpose),
            BLOCK=_BLOCK,
            num_warps=4,
        )


def prepare(policy: Policy) -> None:
    """Compile, or load, what draws the actions of a policy, by drawing one.

    A policy that `why_not` has something against takes its numbers from `uniforms`.
    """
    device, distribution = policy.device, policy.distribution

    def zeros(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=of, device=device)

    copies = SimpleNamespace(
        acted=zeros(1, math.prod(distribution.shape)),
        t=zeros(1, of=torch.int64),
        key=zeros(6, of=torch.int64),
    )
    if why_not(policy) is None:
        rows = SimpleNamespace(actions=zeros(1, 1, *distribution.shape, of=distribution.dtype))
        make_draw(policy)(zeros(distribution.num_parameters, 1), copies, rows, 0)
    else:
        uniforms(zeros(policy.num_uniforms, 1, 1), copies, Purpose.ACTION, 0)
    if policy.dropout_units:
        uniforms(zeros(policy.dropout_units, 1, 1), copies, Purpose.DROPOUT, 0)


def _draw_categorical(
    logits: Tensor, first_action: int, copies: Any, rows: Any, offset: int
) -> None:
    num_actions, num_envs = logits.shape
    with torch.cuda.device_of(logits):
        _categorical[(triton.cdiv(num_envs, _BLOCK),)](
            num_envs,
            logits.contiguous(),  # a forward of the user's own need not keep to it
            rows.actions,
            copies.acted,
            copies.t,
            copies.key,
            first_action,
            offset,
            ACTIONS=num_actions,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )


def _draw_gaussian(means: Tensor, distribution: Any, copies: Any, rows: Any, offset: int) -> None:
    size, num_envs = means.shape
    with torch.cuda.device_of(means):
        _gaussian[(triton.cdiv(num_envs, _BLOCK),)](
            num_envs,
            means.contiguous(),
            distribution.raw_log_std.detach(),
            distribution.low,
            distribution.high,
            rows.actions,
            copies.acted,
            copies.t,
            copies.key,
            offset,
            SIZE=size,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )


@triton.jit  # type: ignore[untyped-decorator]
def choose(logits, stride, uniform_number, inside, ACTIONS: tl.constexpr):
    """The actions that uniform numbers stand for: how many cumulative probabilities they reach.

    As `vecpg.policy.sampling.choose`.

    Args:
        logits: (BLOCK,) pointers to those of the first action.
        stride: from an action to the next.
        uniform_number: (BLOCK,) in [0, 1).
        inside: (BLOCK,), False = nothing is read.
        ACTIONS: how many there are.
    """
    largest = tl.load(logits, mask=inside, other=0.0)
    for a in range(1, ACTIONS):
        logit = tl.load(logits + a * stride, mask=inside, other=0.0)
        largest = tl.where(logit > largest, logit, largest)
    total = tl.zeros(largest.shape, tl.float32)
    for a in range(ACTIONS):
        total += exp(tl.load(logits + a * stride, mask=inside, other=0.0) - largest)
    total *= uniform_number
    below = tl.zeros(largest.shape, tl.float32)
    chosen = tl.zeros(largest.shape, tl.int32)
    for a in range(ACTIONS - 1):
        below += exp(tl.load(logits + a * stride, mask=inside, other=0.0) - largest)
        chosen += (below <= total).to(tl.int32)
    return chosen


@triton.jit
def standard_deviation(raw):
    """What `DiagonalGaussian.mean_and_log_std` makes of its parameter, (BLOCK,)."""
    inside = tl.div_rn(tl.full(raw.shape, 1.0, tl.float32), 1.0 + exp((raw + _SHIFT) * -1.0))
    return exp(inside * (_HIGH - _LOW) + _LOW)


@triton.jit(do_not_specialize=["num_envs", "first_action", "offset"])  # type: ignore[untyped-decorator]
def _categorical(
    num_envs: tl.int64,
    logits,
    actions,
    acted,
    counter,
    key,
    first_action: tl.int64,
    offset: tl.int64,
    ACTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < num_envs
    t = tl.load(counter) + offset
    low, high, iteration = tl.load(key), tl.load(key + 1), tl.load(key + 2)
    env = tl.load(key + 5) + n
    number = uniform(low, high, iteration, t, env, _ACTION, 0)
    action = choose(logits + n, num_envs, number, inside, ACTIONS) + first_action
    tl.store(actions + t * num_envs + n, action, mask=inside)
    tl.store(acted + n, action.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["num_envs", "offset"])  # type: ignore[untyped-decorator]
def _gaussian(
    num_envs: tl.int64,
    means,
    raw_log_std,
    lows,
    highs,
    actions,
    acted,
    counter,
    key,
    offset: tl.int64,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < num_envs
    t = tl.load(counter) + offset
    low, high, iteration = tl.load(key), tl.load(key + 1), tl.load(key + 2)
    env = tl.load(key + 5) + n
    PAIRS: tl.constexpr = (SIZE + 1) // 2
    for a in tl.static_range(SIZE):
        # Two uniform numbers give two normal ones: see `DiagonalGaussian.sample`.
        radius = uniform(low, high, iteration, t, env, _ACTION, a % PAIRS)
        radius = tl.sqrt_rn(log(1.0 - radius) * -2.0)
        angle = uniform(low, high, iteration, t, env, _ACTION, PAIRS + a % PAIRS) * _TURN
        normal = radius * (cos(angle) if a < PAIRS else sin(angle))
        mean = tl.load(means + a * num_envs + n, mask=inside, other=0.0)
        raw = tl.zeros((BLOCK,), tl.float32) + tl.load(raw_log_std + a)
        drawn = mean + standard_deviation(raw) * normal
        tl.store(actions + (t * num_envs + n) * SIZE + a, drawn, mask=inside)
        lowest, highest = tl.load(lows + a), tl.load(highs + a)
        clipped = tl.where(drawn < lowest, lowest, tl.where(drawn > highest, highest, drawn))
        tl.store(acted + n * SIZE + a, clipped, mask=inside)


@triton.jit(do_not_specialize=["num_envs", "count", "num_steps", "offset"])  # type: ignore[untyped-decorator]
def _uniforms(
    num_envs: tl.int64,
    out,
    counter,
    key,
    count: tl.int64,
    num_steps: tl.int64,
    offset: tl.int64,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k, block = tl.program_id(1), tl.program_id(2)
    step = tl.load(counter) + offset + k
    low, high, iteration = tl.load(key), tl.load(key + 1), tl.load(key + 2)
    purpose = PURPOSE + block * 256
    w0, w1, w2, w3 = words(low, high, iteration, step, tl.load(key + 5) + n, purpose)
    first = block.to(tl.int64) * 4
    at = (first * num_steps + k) * num_envs + n
    between = num_steps * num_envs
    inside = n < num_envs
    tl.store(out + at, as_uniform(w0), mask=inside)
    tl.store(out + at + between, as_uniform(w1), mask=inside & (first + 1 < count))
    tl.store(out + at + 2 * between, as_uniform(w2), mask=inside & (first + 2 < count))
    tl.store(out + at + 3 * between, as_uniform(w3), mask=inside & (first + 3 < count))
