"""The policy gradient of rows in a `Memory`, by one Triton kernel that recomputes the network.

Importing this needs triton, running it a CUDA GPU.
"""

import math

import torch
import triton
import triton.language as tl

from vecpg.fused.memory import Memory, Setting, Stamp, Tally
from vecpg.kernels.cuda import _growth, _power, exp, log
from vecpg.policy.distributions import LOG_STD_RANGE
from vecpg.policy.shape import MOST_OUTPUTS, Shape

# Rows that go through the network together, and tiles of them that are added in float32.
_ROWS, _TILES = tl.constexpr(64), tl.constexpr(16)
_WARPS = 4
# Numbers of blocks that are read at a time.
_MANY = tl.constexpr(1024)
# Parts of a shard: enough programs, and few to add in the end. What a part has at least: rows of a
# block.
_MOST_PARTS, _LEAST_ROWS = 256, 32

_OUTPUTS = tl.constexpr(MOST_OUTPUTS)
_TALLIES, _COUNTED = tl.constexpr(len(Tally)), tl.constexpr(int(Tally.COUNTED))
_SETTINGS = tl.constexpr(len(Setting))
_ENT_COEF, _DIVISOR = tl.constexpr(int(Setting.ENT_COEF)), tl.constexpr(int(Setting.DIVISOR))
_STAMPS, _UPDATE = tl.constexpr(len(Stamp)), tl.constexpr(int(Stamp.UPDATE))
_LOW, _HIGH = (tl.constexpr(each) for each in LOG_STD_RANGE)
# As `distributions._inside` moves a parameter: 0 is a standard deviation of 1.
_SHIFT = tl.constexpr(math.log(-LOG_STD_RANGE[0] / LOG_STD_RANGE[1]))
_HALF_LOG_TURN = tl.constexpr(0.5 * math.log(2 * math.pi))

_SIZES = ["num_slots", "num_blocks", "num_envs", "envs_of_shard", "capacity"]


def num_parts(capacity: int, blocks: int) -> int:
    """In how many parts `sum_gradient` cuts a shard: whatever the GPU is, so that bits are equal.

    Args:
        capacity: the most rows of a block.
        blocks: of the shard.

    Example:
        >>> num_parts(562, 4), num_parts(562, 1024)
        (71, 256)
    """
    return min(_MOST_PARTS, -(-capacity * blocks // _LEAST_ROWS))


def sum_gradient(memory: Memory, shape: Shape, *, precision: str = "tf32x3", width=64) -> None:
    """Write to `memory.parts` the gradient of a sum over the counted rows of each part of a shard.

        sum of -log pi(a|s) * weight / divisor - ent_coef / count * entropy(s)

    And beside it two sums over them: of -log pi(a|s) * weight / divisor, and of the entropy in
    nats. The count is that of all counted rows of the run. One launch; nothing waits for the GPU.

    A part has every P-th tile of 64 rows, in the order of time, whatever else is computed beside
    it: so it is the same for a run alone and among others.

    Args:
        memory: rows before `last` of their blocks are read, and of those that do not count the
            flags alone. `parts`, and the stamp of the update's begin, are written.
        shape: of the policy.
        precision: of products: "tf32x3", by three of tensor cores, or "ieee".
    """
    runs, capacity, num_envs = memory.flags.shape
    _, shards, parts, stride = memory.parts.shape
    first, second = shape.units
    with torch.cuda.device_of(memory.parts):
        _sum_gradient[(parts, shards, runs)](
            memory.at,
            memory.settings,
            memory.states,
            memory.obs,
            memory.actions,
            memory.flags,
            memory.weights,
            memory.last,
            memory.tallies,
            memory.parts,
            memory.stamps,
            memory.states.shape[0],
            memory.last.shape[1],
            num_envs,
            num_envs // shards,
            capacity,
            FEATURES=shape.features,
            FIRST=first,
            SECOND=second,
            ACTIONS=shape.outputs,
            TANH=shape.tanh,
            GAUSSIAN=shape.gaussian,
            STRIDE=stride,
            BLOCK=memory.block,
            PRECISION=precision,
            CLOCK=isinstance(_sum_gradient, triton.JITFunction),
            WIDTH=min(width, max(16, triton.next_power_of_2(first))),
            num_warps=_WARPS,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _sum_gradient(
    at,
    settings,
    states,
    obs,
    actions,
    flags,
    weights,
    last,
    tallies,
    parts,
    stamps,
    num_slots: tl.int64,
    num_blocks: tl.int64,
    num_envs: tl.int64,
    envs_of_shard: tl.int64,
    capacity: tl.int64,
    FEATURES: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ACTIONS: tl.constexpr,
    TANH: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    CLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    part, shard, run = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = tl.load(at) % num_slots
    if CLOCK and part + shard == 0:
        place = stamps + (slot * tl.num_programs(2) + run) * _STAMPS + _UPDATE
        tl.store(place, tl.extra.cuda.globaltimer())

    blocks = (num_blocks // tl.num_programs(1)).to(tl.int32)
    last += run * num_blocks + shard * blocks
    most = _largest(last, blocks)
    count = tl.maximum(_total(tallies + run * num_blocks * _TALLIES + _COUNTED, num_blocks), 1.0)
    divisor = tl.load(settings + run * _SETTINGS + _DIVISOR)
    scale = (1.0 / tl.where(divisor == 0.0, count, divisor)).to(tl.float32)
    bonus = (tl.load(settings + run * _SETTINGS + _ENT_COEF) / count).to(tl.float32)

    # Layers are padded to whole tiles, with zeros; the first has its bias as one more input.
    INPUTS: tl.constexpr = max(16, triton.next_power_of_2(FEATURES + 1))
    WIDE: tl.constexpr = max(16, triton.next_power_of_2(FIRST))
    HIGH: tl.constexpr = max(16, triton.next_power_of_2(SECOND))
    B1: tl.constexpr = FIRST * FEATURES
    W2: tl.constexpr = B1 + FIRST
    B2: tl.constexpr = W2 + SECOND * FIRST
    W3: tl.constexpr = B2 + SECOND
    B3: tl.constexpr = W3 + ACTIONS * SECOND
    END: tl.constexpr = B3 + ACTIONS
    i, j, k, a = tl.arange(0, INPUTS), tl.arange(0, WIDTH), tl.arange(0, HIGH), tl.arange(0, _OUTPUTS)
    states += (slot * tl.num_programs(2) + run) * 3 * STRIDE
    b3 = tl.load(states + B3 + a, mask=a < ACTIONS, other=0.0)
    if GAUSSIAN:
        raw = tl.load(states + END + a, mask=a < ACTIONS, other=0.0)
        inside = 1.0 / (1.0 + exp((raw + _SHIFT) * -1.0))
        log_std = _LOW + (_HIGH - _LOW) * inside
        inverse = exp(log_std * -1.0)
        falling = exp(tl.abs(raw + _SHIFT) * -1.0)
        slope = (_HIGH - _LOW) * falling / ((1.0 + falling) * (1.0 + falling))

    r = tl.arange(0, _ROWS)
    DEEP: tl.constexpr = _ROWS // BLOCK
    SLICES: tl.constexpr = WIDE // WIDTH
    SIZE: tl.constexpr = END + ACTIONS * GAUSSIAN
    tiles = tl.cdiv(most, DEEP) * blocks
    parts += ((run * tl.num_programs(1) + shard) * tl.num_programs(0) + part) * STRIDE
    number = tl.arange(0, triton.next_power_of_2(STRIDE))
    tl.store(parts + number, tl.zeros(number.shape, tl.float64), mask=number < STRIDE)
    tl.debug_barrier()
    for tile in tl.range(part, tiles, tl.num_programs(0), disable_licm=True):
        block = tile % blocks
        t = tile // blocks * DEEP + r // BLOCK
        n = block * BLOCK + r % BLOCK
        stop = tl.load(last + block)
        if tile // blocks * DEEP < stop:
            place = (run * capacity + t) * num_envs + shard * envs_of_shard + n
            here = (t < stop) & (n < envs_of_shard)
            counts = (tl.load(flags + place, mask=here, other=0) & 1) != 0
            weight = tl.load(weights + place, mask=counts, other=0.0) * scale
            x = tl.load(
                obs + (place + run * num_envs)[:, None] * FEATURES + i,
                mask=counts[:, None] & (i < FEATURES),
                other=0.0,
            )
            x = tl.where(i == FEATURES, 1.0, x)
            xh, xl = _split(x)
            here_states = states + tl.where(stop < 0, 1, 0)
            b2 = tl.load(here_states + B2 + k + i[:, None] * 0, mask=(k < SECOND) & (i == FEATURES)[:, None], other=0.0)
            b2h, b2l = _split(b2)
            z = tl.dot(xh, b2l, input_precision="tf32")
            z = tl.dot(xh, b2h, z, input_precision="tf32")
            y = ()
            for s in tl.static_range(SLICES):
                w1h, w1l = _split(_first(here_states, i, j + s * WIDTH, B1, FEATURES, FIRST))
                w2h, w2l = _split(_second(here_states + W2, j + s * WIDTH, k, FIRST, SECOND))
                own = _activation(_dot(xh, xl, tl.trans(w1h), tl.trans(w1l)), TANH)
                y = y + (own,)
                yh, yl = _split(own)
                z += _dot(yh, yl, tl.trans(w2h), tl.trans(w2l))
            z = _activation(z, TANH)
            zh, zl = _split(z)
            zth, ztl = tl.trans(zh), tl.trans(zl)
            w3 = tl.load(here_states + W3 + a * SECOND + k[:, None], mask=(k < SECOND)[:, None] & (a < ACTIONS), other=0.0)
            w3h, w3l = _split(w3)
            out = _dot(zh, zl, w3h, w3l) + b3
            if GAUSSIAN:
                action = tl.load(
                    actions + place[:, None] * ACTIONS + a,
                    mask=counts[:, None] & (a < ACTIONS),
                    other=0.0,
                )
                distance = tl.where(a < ACTIONS, (action - out) * inverse, 0.0)
                square = distance * distance
                rest = tl.where(a < ACTIONS, log_std + _HALF_LOG_TURN, 0.0)
                minus_log_pi = tl.sum(0.5 * square + rest, 1)
                d = weight[:, None] * distance * inverse * -1.0
                spread = tl.where(
                    counts[:, None], weight[:, None] * (1.0 - square) - bonus, 0.0
                )
                _add(parts + END + a, tl.sum(spread, 0) * slope, a < ACTIONS)
                disorder = tl.sum(rest + tl.where(a < ACTIONS, 0.5, 0.0), 0)
            else:
                out = tl.where(a < ACTIONS, out, float("-inf"))
                out -= tl.max(out, 1)[:, None]
                power = tl.where(a < ACTIONS, exp(out), 0.0)
                out = tl.where(a < ACTIONS, out, 0.0)
                total = tl.sum(power, 1)
                mean = tl.sum(power * out, 1) / total
                action = tl.load(actions + place, mask=counts, other=0)
                taken = a == action[:, None]
                minus_log_pi = log(total) - tl.sum(tl.where(taken, out, 0.0), 1)
                disorder = log(total) - mean
                d = power / total[:, None] * (weight[:, None] + bonus * (out - mean[:, None]))
                d = tl.where(taken, d - weight[:, None], d)
            d = tl.where(counts[:, None], d, 0.0)
            told = tl.where(a == 0, (weight * minus_log_pi)[:, None], tl.where(a == 1, disorder[:, None] if not GAUSSIAN else disorder, 0.0))
            told = tl.where(counts[:, None], told, 0.0)
            _add(parts + SIZE + a, tl.sum(told, 0), a < 2)
            _add(parts + B3 + a, tl.sum(d, 0), a < ACTIONS)
            dh, dl = _split(d)
            _add(
                parts + W3 + a * SECOND + k[:, None],
                _dot(zth, ztl, dh, dl),
                (k < SECOND)[:, None] & (a < ACTIONS),
            )
            d = _slope(_dot(dh, dl, tl.trans(w3h), tl.trans(w3l)), z, TANH)
            dh, dl = _split(d)
            _add(
                parts + B2 + k[:, None] + i * 0,
                _dot(tl.trans(dh), tl.trans(dl), xh, xl),
                (k < SECOND)[:, None] & (i == FEATURES),
            )
            here_states = states + tl.where(stop < -1, 1, 0)
            for s in tl.static_range(SLICES):
                w2h, w2l = _split(_second(here_states + W2, j + s * WIDTH, k, FIRST, SECOND))
                own = y[s]
                e = _slope(_dot(dh, dl, w2h, w2l), own, TANH)
                eh, el = _split(e)
                _add(
                    parts + tl.where(i == FEATURES, B1 + s * WIDTH + j[:, None], (s * WIDTH + j)[:, None] * FEATURES + i),
                    _dot(tl.trans(eh), tl.trans(el), xh, xl),
                    (s * WIDTH + j < FIRST)[:, None] & (i <= FEATURES),
                )
                yh, yl = _split(own)
                _add(
                    parts + W2 + k[:, None] * FIRST + s * WIDTH + j,
                    _dot(tl.trans(dh), tl.trans(dl), yh, yl),
                    (k < SECOND)[:, None] & (s * WIDTH + j < FIRST),
                )
            tl.debug_barrier()


@triton.jit
def _largest(numbers, count):
    """Of int32, 0 at least."""
    found = tl.zeros((_MANY,), tl.int32)
    for first in range(0, count, _MANY):
        n = first + tl.arange(0, _MANY)
        found = tl.maximum(found, tl.load(numbers + n, mask=n < count, other=0))
    return tl.max(found, 0)


@triton.jit
def _total(numbers, count):
    """Of one tally of each block: whole numbers, so the order does not matter."""
    found = tl.zeros((_MANY,), tl.float64)
    for first in range(0, count, _MANY):
        n = first + tl.arange(0, _MANY)
        found += tl.load(numbers + n * _TALLIES, mask=n < count, other=0.0)
    return tl.sum(found, 0)


@triton.jit
def _activation(x, TANH: tl.constexpr):
    if TANH:
        doubled = tl.abs(x) * 2.0
        n, grown = _growth(tl.where(doubled > 20.0, 20.0, doubled))
        power = _power(n)
        e = power * grown + (power - 1.0)
        y = e / (e + 2.0)
        sign = x.to(tl.uint32, bitcast=True) & 0x80000000
        y = (y.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def _slope(d, y, TANH: tl.constexpr):
    if TANH:
        found = d * (1.0 - y * y)
    else:
        found = tl.where(y > 0.0, d, 0.0)
    return found


@triton.jit
def _add(place, number, mask):
    """Add to what is there already."""
    tl.store(place, tl.load(place, mask=mask, other=0.0) + number.to(tl.float64), mask=mask)


@triton.jit
def _split(x):
    big = (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return big, x - big


@triton.jit
def _dot(ah, al, bh, bl):
    c = tl.dot(al, bh, input_precision="tf32")
    c = tl.dot(ah, bl, c, input_precision="tf32")
    return tl.dot(ah, bh, c, input_precision="tf32")


@triton.jit
def _first(states, i, j, B1: tl.constexpr, FEATURES: tl.constexpr, FIRST: tl.constexpr):
    return tl.load(
        states + tl.where(i == FEATURES, B1 + j[:, None], j[:, None] * FEATURES + i),
        mask=(j < FIRST)[:, None] & (i <= FEATURES),
        other=0.0,
    )


@triton.jit
def _second(states, j, k, FIRST: tl.constexpr, SECOND: tl.constexpr):
    return tl.load(states + k[:, None] * FIRST + j, mask=(k < SECOND)[:, None] & (j < FIRST), other=0.0)
