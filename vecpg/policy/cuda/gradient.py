"""The policy gradient of the rows of a `Memory`, by one Triton kernel that recomputes the network.

What it needs of a row is read once: the observation, the action, the weight and a byte of flags.
Activations stay on the chip, and so do gradients until 64 rows have been added to float64.
Importing this needs triton, running it a CUDA GPU.
"""

import inspect
import math

import torch
import triton
import triton.language as tl

from vecpg.kernels.cuda import exp, fast_tanh, log, stamp
from vecpg.kernels.iteration import Memory, Setting, Shape, Stamp, Tally
from vecpg.policy.distributions import LOG_STD_RANGE
from vecpg.policy.shape import MOST_OUTPUTS

# Rows that go through the network together.
_ROWS = tl.constexpr(64)
_WARPS = 4
# Numbers of an observation that go into a product together.
_FEATURES = tl.constexpr(16)
# Numbers of blocks that are read at a time.
_MANY = tl.constexpr(1024)
# Parts of a shard: enough programs, and few to add in the end; and the rows of blocks that are
# worth a part of their own.
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
# Whether a loop can be told to compute its addresses where they are used. Else there are more than
# registers, and it is slower.
_IN_PLACE = tl.constexpr("disable_licm" in inspect.signature(tl.range).parameters)

# Integer arguments: Triton would compile anew for a 1 or a multiple of 16 among them.
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


def sum_gradient(memory: Memory, shape: Shape, *, precision: str = "tf32x3") -> None:
    """Write to `memory.parts` the gradient of a sum over the counted rows of each part of a shard.

        sum of -log pi(a|s) * weight / divisor - ent_coef / count * entropy(s)

    And beside it two sums over them: of -log pi(a|s) * weight / divisor, and of the entropy in
    nats. The count is that of all counted rows of the run. One launch; nothing waits for the GPU.

    A tile is 64 rows of a block, and a part has every P-th tile of a shard, in the order of time.
    Nothing else decides what is added to what: a run has the same bits alone and among others.

    Args:
        memory: rows before `last` of their blocks are read, and of those that do not count the
            flags alone. `parts` is written, as far as a row of it is used, and the stamp of the
            update's begin.
        shape: of the policy.
        precision: of products: "tf32x3", three of tensor cores, which leave out 2**-23 of a
            number; or "ieee".
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
            SLICE=_slice(),
            PRECISION=precision,
            CLOCK=isinstance(_sum_gradient, triton.JITFunction),
            num_warps=_WARPS,
            num_stages=1,
        )


def _slice() -> int:
    """Units of the first layer that are taken at a time.

    All, where products of whole warp groups read shared memory. Elsewhere each warp has a matrix in
    its registers, and more than 16 columns of it do not fit. The interpreter takes all.
    """
    if not isinstance(_sum_gradient, triton.JITFunction):
        return 64
    arch = triton.runtime.driver.active.get_current_target().arch
    return 64 if 90 <= arch < 120 else 16


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
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
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
    CLOCK: tl.constexpr,
):
    part, shard, run = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_parts, shards, runs = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    slot = tl.load(at) % num_slots
    if part + shard == 0:
        stamp(stamps + (slot * runs + run) * _STAMPS + _UPDATE, CLOCK)

    count = tl.maximum(_total(tallies + run * num_blocks * _TALLIES + _COUNTED, num_blocks), 1.0)
    divisor = tl.load(settings + run * _SETTINGS + _DIVISOR)
    scale = (1.0 / tl.where(divisor == 0.0, count, divisor)).to(tl.float32)
    bonus = (tl.load(settings + run * _SETTINGS + _ENT_COEF) / count).to(tl.float32)

    states += (slot * runs + run) * 3 * STRIDE
    rows = run * capacity * num_envs + shard * envs_of_shard
    obs += (rows + run * num_envs) * FEATURES
    actions += rows * (ACTIONS if GAUSSIAN else 1)
    flags += rows
    weights += rows
    parts += ((run * shards + shard) * num_parts + part) * STRIDE
    WHOLE: tl.constexpr = triton.next_power_of_2(STRIDE)
    number = tl.arange(0, WHOLE)
    tl.store(parts + number, tl.zeros(number.shape, tl.float64), mask=number < STRIDE)
    tl.debug_barrier()

    blocks = (num_blocks // shards).to(tl.int32)
    last += run * num_blocks + shard * blocks
    tiles = tl.cdiv(_largest(last, blocks), _ROWS // BLOCK) * blocks
    if _IN_PLACE:
        for tile in tl.range(part, tiles, num_parts, disable_licm=True):
            _add_tile(
                tile // blocks,
                tile % blocks,
                tl.load(last + tile % blocks),
                num_envs,
                envs_of_shard,
                scale,
                bonus,
                states,
                obs,
                actions,
                flags,
                weights,
                parts,
                FEATURES,
                FIRST,
                SECOND,
                ACTIONS,
                TANH,
                GAUSSIAN,
                BLOCK,
                SLICE,
                PRECISION,
            )
    else:
        for tile in range(part, tiles, num_parts):
            _add_tile(
                tile // blocks,
                tile % blocks,
                tl.load(last + tile % blocks),
                num_envs,
                envs_of_shard,
                scale,
                bonus,
                states,
                obs,
                actions,
                flags,
                weights,
                parts,
                FEATURES,
                FIRST,
                SECOND,
                ACTIONS,
                TANH,
                GAUSSIAN,
                BLOCK,
                SLICE,
                PRECISION,
            )


@triton.jit  # type: ignore[untyped-decorator]
def _add_tile(
    group,
    block,
    stop,
    num_envs,
    envs_of_shard,
    scale,
    bonus,
    states,
    obs,
    actions,
    flags,
    weights,
    parts,
    FEATURES: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ACTIONS: tl.constexpr,
    TANH: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what 64 rows of a block give to a part: the group-th ones, of those before `stop`."""
    DEEP: tl.constexpr = _ROWS // BLOCK
    if group * DEEP < stop:
        # Layers are padded to 16, 32 or 64, with zeros; the first has its bias as one more input.
        LOWER: tl.constexpr = 16 * (1 + (FIRST > 16) + 2 * (FIRST > 32))
        UPPER: tl.constexpr = 16 * (1 + (SECOND > 16) + 2 * (SECOND > 32))
        WIDTH: tl.constexpr = LOWER if LOWER < SLICE else SLICE
        B1: tl.constexpr = FIRST * FEATURES
        W2: tl.constexpr = B1 + FIRST
        B2: tl.constexpr = W2 + SECOND * FIRST
        W3: tl.constexpr = B2 + SECOND
        B3: tl.constexpr = W3 + ACTIONS * SECOND
        LOG_STD: tl.constexpr = B3 + ACTIONS
        SUMS: tl.constexpr = LOG_STD + ACTIONS * GAUSSIAN
        a, above = tl.arange(0, _OUTPUTS), tl.arange(0, UPPER)
        k = above[:, None]
        in_w3, is_w3 = W3 + a * SECOND + k, (k < SECOND) & (a < ACTIONS)
        # A 0 of which the compiler knows nothing. So parameters are read where they are used, from
        # the nearest cache, and do not stand in registers from one tile to the next.
        states += tl.where(stop < 0, 1, 0)

        r = tl.arange(0, _ROWS)
        t, n = group * DEEP + r // BLOCK, block * BLOCK + r % BLOCK
        place = t.to(tl.int64) * num_envs + n
        counts = (tl.load(flags + place, mask=(t < stop) & (n < envs_of_shard), other=0) & 1) != 0
        weight = tl.load(weights + place, mask=counts, other=0.0) * scale
        counted = counts[:, None]
        seen = obs + place[:, None] * FEATURES

        z = tl.zeros((_ROWS, UPPER), tl.float32)
        z += tl.load(states + B2 + above, mask=above < SECOND, other=0.0)
        y = tl.zeros((_ROWS, WIDTH), tl.float32)
        for first in range(0, LOWER, WIDTH):
            j = first + tl.arange(0, WIDTH)
            y = _lower(seen, counted, states, j[:, None], FEATURES, FIRST, TANH, PRECISION)
            yh, yl = _split(y, PRECISION)
            in_w2, is_w2 = W2 + k * FIRST + j, (k < SECOND) & (j < FIRST)
            w2h, w2l = _split(tl.load(states + in_w2, mask=is_w2, other=0.0), PRECISION)
            z = _add_product(z, yh, yl, tl.trans(w2h), tl.trans(w2l), PRECISION)
        z = _activation(z, TANH)
        zh, zl = _split(z, PRECISION)
        turned_zh, turned_zl = tl.trans(zh), tl.trans(zl)
        w3h, w3l = _split(tl.load(states + in_w3, mask=is_w3, other=0.0), PRECISION)
        out = _product(zh, zl, w3h, w3l, PRECISION)
        out += tl.load(states + B3 + a, mask=a < ACTIONS, other=0.0)
        if GAUSSIAN:
            taken = tl.load(
                actions + place[:, None] * ACTIONS + a, mask=counted & (a < ACTIONS), other=0.0
            )
            raw = tl.load(states + LOG_STD + a, mask=a < ACTIONS, other=0.0)
            minus_log_pi, entropy, d, spread = _of_box(
                out, taken, raw, weight[:, None], bonus, ACTIONS
            )
            spread = tl.sum(tl.where(counted, spread, 0.0), 0)
            _add(parts + LOG_STD + a, spread, a < ACTIONS)
        else:
            taken = tl.load(actions + place, mask=counts, other=0)[:, None]
            minus_log_pi, entropy, d = _of_numbers(out, taken, weight[:, None], bonus, ACTIONS)
        d = tl.where(counted, d, 0.0)
        sums = tl.where(a == 0, weight[:, None] * minus_log_pi, tl.where(a == 1, entropy, 0.0))
        _add(parts + SUMS + a, tl.sum(tl.where(counted, sums, 0.0), 0), a < 2)

        # From here on d is what the sum gains from a layer's outputs, the highest layer first.
        _add(parts + B3 + a, tl.sum(d, 0), a < ACTIONS)
        dh, dl = _split(d, PRECISION)
        if WIDTH < LOWER:
            # Split anew, and so not kept until here.
            zh, zl = _split(z + tl.where(stop < -2, 1.0, 0.0), PRECISION)
            turned_zh, turned_zl = tl.trans(zh), tl.trans(zl)
        _add(parts + in_w3, _product(turned_zh, turned_zl, dh, dl, PRECISION), is_w3)
        states += tl.where(stop < -1, 1, 0)
        w3h, w3l = _split(tl.load(states + in_w3, mask=is_w3, other=0.0), PRECISION)
        d = _slope(_product(dh, dl, tl.trans(w3h), tl.trans(w3l), PRECISION), z, TANH)
        dh, dl = _split(d, PRECISION)
        turned_dh, turned_dl = tl.trans(dh), tl.trans(dl)
        if WIDTH < LOWER:
            _add(parts + B2 + above, tl.sum(d, 0), above < SECOND)
        else:
            ones, column = tl.full((_ROWS, 16), 1.0, tl.float32), tl.arange(0, 16)
            b2 = _product(turned_dh, turned_dl, ones, ones * 0.0, PRECISION)
            _add(parts + B2 + k + column * 0, b2, (k < SECOND) & (column == 0))
        for first in range(0, LOWER, WIDTH):
            j = first + tl.arange(0, WIDTH)
            below = j[:, None]
            in_w2, is_w2 = W2 + k * FIRST + j, (k < SECOND) & (j < FIRST)
            # Another such 0. What a slice needs is not made for all of them beforehand.
            none = tl.where(first < -stop, 1, 0)
            if WIDTH < LOWER:
                y = _lower(seen + none, counted, states, below, FEATURES, FIRST, TANH, PRECISION)
                # In slices it takes no more than the others, and comes when y is at hand.
                yh, yl = _split(y, PRECISION)
                _add(parts + in_w2, _product(turned_dh, turned_dl, yh, yl, PRECISION), is_w2)
                own_dh, own_dl = _split(d + none.to(tl.float32), PRECISION)
            else:
                own_dh, own_dl = dh, dl
            w2h, w2l = _split(tl.load(states + in_w2, mask=is_w2, other=0.0), PRECISION)
            e = _slope(_product(own_dh, own_dl, w2h, w2l, PRECISION), y, TANH)
            eh, el = _split(e, PRECISION)
            for feature in range(0, FEATURES + 1, _FEATURES):
                i = feature + tl.arange(0, _FEATURES)
                xh, xl = _split(_observed(seen + none, counted, i, FEATURES), PRECISION)
                in_w1 = tl.where(i == FEATURES, B1 + below, below * FEATURES + i)
                is_w1 = (below < FIRST) & (i <= FEATURES)
                w1 = _product(tl.trans(eh), tl.trans(el), xh, xl, PRECISION)
                _add(parts + in_w1, w1, is_w1)
            # The largest comes last, when the fewest registers are taken.
            if WIDTH == LOWER:
                yh, yl = _split(y, PRECISION)
                _add(parts + in_w2, _product(turned_dh, turned_dl, yh, yl, PRECISION), is_w2)
        # What one thread wrote another may read for the next tile.
        tl.debug_barrier()


@triton.jit  # type: ignore[untyped-decorator]
def _observed(seen, counted, i, FEATURES: tl.constexpr):
    """Numbers i of observations, and behind the last a 1, for the bias."""
    x = tl.load(seen + i, mask=counted & (i < FEATURES), other=0.0)
    return tl.where(i == FEATURES, 1.0, x)


@triton.jit  # type: ignore[untyped-decorator]
def _lower(
    seen,
    counted,
    states,
    j,
    FEATURES: tl.constexpr,
    FIRST: tl.constexpr,
    TANH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first layer's units j, (WIDTH, 1)."""
    y = tl.zeros((_ROWS, j.shape[0]), tl.float32)
    for feature in range(0, FEATURES + 1, _FEATURES):
        i = feature + tl.arange(0, _FEATURES)
        xh, xl = _split(_observed(seen, counted, i, FEATURES), PRECISION)
        in_w1 = tl.where(i == FEATURES, FIRST * FEATURES + j, j * FEATURES + i)
        is_w1 = (j < FIRST) & (i <= FEATURES)
        w1h, w1l = _split(tl.load(states + in_w1, mask=is_w1, other=0.0), PRECISION)
        y = _add_product(y, xh, xl, tl.trans(w1h), tl.trans(w1l), PRECISION)
    return _activation(y, TANH)


@triton.jit  # type: ignore[untyped-decorator]
def _of_numbers(out, taken, weight, bonus, ACTIONS: tl.constexpr):
    """Of rows and logits: -log pi, the entropy, and the sum's slopes in the logits.

    Args:
        out: (rows, _OUTPUTS).
        taken: (rows, 1), the number of the action.
        weight: (rows, 1), of -log pi in the sum.
        bonus: what entropy is worth.
        ACTIONS: how many outputs are used.
    """
    a = tl.arange(0, _OUTPUTS)
    out = tl.where(a < ACTIONS, out, float("-inf"))
    out -= tl.max(out, 1)[:, None]
    power = tl.where(a < ACTIONS, exp(out), 0.0)
    out = tl.where(a < ACTIONS, out, 0.0)
    total = tl.sum(power, 1)[:, None]
    mean = tl.sum(power * out, 1)[:, None] / total
    minus_log_pi = log(total) - tl.sum(tl.where(a == taken, out, 0.0), 1)[:, None]
    # out - mean is log pi + entropy: the logarithm of the total is in both.
    d = power / total * (weight + bonus * (out - mean))
    return minus_log_pi, log(total) - mean, tl.where(a == taken, d - weight, d)


@triton.jit  # type: ignore[untyped-decorator]
def _of_box(out, taken, raw, weight, bonus, ACTIONS: tl.constexpr):
    """Of rows and means: -log pi, the entropy, and the sum's slopes in the means and in `raw`.

    Args:
        out: (rows, _OUTPUTS).
        taken: (rows, _OUTPUTS), the actions that were drawn.
        raw: (_OUTPUTS,), the parameter of standard deviations.
        weight: (rows, 1), of -log pi in the sum.
        bonus: what entropy is worth.
        ACTIONS: how many outputs are used.
    """
    used = tl.arange(0, _OUTPUTS) < ACTIONS
    raw += _SHIFT
    log_std = _LOW + (_HIGH - _LOW) / (1.0 + exp(raw * -1.0))
    inverse = exp(log_std * -1.0)
    distance = tl.where(used, (taken - out) * inverse, 0.0)
    square = distance * distance
    rest = tl.where(used, log_std + _HALF_LOG_TURN, 0.0)
    entropy = tl.sum(rest + tl.where(used, 0.5, 0.0), 0)
    # Near an end of the range too, the slope of the standard deviation's logarithm is precise.
    small = exp(tl.abs(raw) * -1.0)
    slope = (_HIGH - _LOW) * small / ((1.0 + small) * (1.0 + small))
    spread = (weight * (1.0 - square) - bonus) * slope
    minus_log_pi = tl.sum(0.5 * square + rest, 1)[:, None]
    return minus_log_pi, entropy, weight * distance * inverse * -1.0, spread


@triton.jit  # type: ignore[untyped-decorator]
def _activation(x, TANH: tl.constexpr):
    return fast_tanh(x) if TANH else tl.where(x < 0.0, 0.0, x)  # NaN stays


@triton.jit  # type: ignore[untyped-decorator]
def _slope(d, y, TANH: tl.constexpr):
    """From what the sum gains from activations y to what it gains from what they are made of."""
    return d * (1.0 - y * y) if TANH else tl.where(y > 0.0, d, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _split(x, PRECISION: tl.constexpr):
    """A float32 in 11 bits, which is what tensor cores read of it, and the rest."""
    if PRECISION == "ieee":
        high, low = x, x
    else:
        # Rounded, not cut off: so the rest is short enough to be read whole, but for its last bit.
        bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
        high = bits.to(tl.float32, bitcast=True)
        low = x - high
    return high, low


@triton.jit  # type: ignore[untyped-decorator]
def _product(high, low, other_high, other_low, PRECISION: tl.constexpr):
    """Of two split matrices."""
    none = tl.zeros((high.shape[0], other_high.shape[1]), tl.float32)
    return _add_product(none, high, low, other_high, other_low, PRECISION)


@triton.jit  # type: ignore[untyped-decorator]
def _add_product(total, high, low, other_high, other_low, PRECISION: tl.constexpr):
    """To a matrix that of two split ones, the smallest parts first: low * low is left out."""
    if PRECISION == "ieee":
        total = tl.dot(high, other_high, total, input_precision="ieee")
    else:
        total = tl.dot(low, other_high, total, input_precision="tf32")
        total = tl.dot(high, other_low, total, input_precision="tf32")
        total = tl.dot(high, other_high, total, input_precision="tf32")
    return total


@triton.jit
def _add(place, number, mask):
    """Add to float64 in memory."""
    tl.store(place, tl.load(place, mask=mask, other=0.0) + number.to(tl.float64), mask=mask)


@triton.jit
def _largest(numbers, count):
    """Of int32, and 0 at least."""
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
