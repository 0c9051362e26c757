"""Random numbers and elementary functions on float32, as parts of Triton kernels.

They round like the CPU's where a kernel is compiled with `enable_fp_fusion=False`. CUDA's own
functions are not called: their bits are others, and Triton's interpreter has none of them.
"""

import triton
import triton.language as tl

from vecpg.kernels.jit import hear_triton

hear_triton(triton)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: four words for four counters and two words of a key, (BLOCK,) uint32 all.

    Source: Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3", section 3.
    """
    first = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    second = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high_0, low_0 = tl.umulhi(c0, first), c0 * first
        high_1, low_1 = tl.umulhi(c2, second), c2 * second
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 += tl.full(c0.shape, 0x9E3779B9, tl.uint32)
        k1 += tl.full(c0.shape, 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def words(low, high, iteration, step, env, purpose):
    """The four words that a `Stream` has for a step and environments.

    Args:
        low: the lower word of its seed, an integer as the next three.
        high: the upper word.
        iteration: the stream's.
        step: in [0, 2**32).
        env: (BLOCK,) indices in the whole run.
        purpose: a `Purpose`, and for the numbers from 4 i on 256 i more.
    """
    zero = tl.zeros(env.shape, tl.uint32)
    return philox(
        zero + step.to(tl.uint32),
        env.to(tl.uint32),
        zero + iteration.to(tl.uint32),
        zero + purpose,
        zero + low.to(tl.uint32),
        zero + high.to(tl.uint32),
    )


@triton.jit
def as_uniform(word):
    """A word as a number in [0, 1), a multiple of 2**-24."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit  # type: ignore[untyped-decorator]
def uniform(low, high, iteration, step, env, PURPOSE: tl.constexpr, INDEX: tl.constexpr):
    """Number `INDEX` of `Stream.uniforms_at`; `PURPOSE` alone, and the rest as in `words`."""
    w0, w1, w2, w3 = words(low, high, iteration, step, env, PURPOSE + INDEX // 4 * 256)
    if INDEX % 4 == 0:
        word = w0
    elif INDEX % 4 == 1:
        word = w1
    elif INDEX % 4 == 2:
        word = w2
    else:
        word = w3
    return as_uniform(word)


@triton.jit
def sin(x):
    """As `vecpg.envs.ops.cpu.sin`, the same bits."""
    rest, quadrant = _reduced(x)
    cosine, sine = _cos_sin(rest)
    found = tl.where((quadrant == 1.0) | (quadrant == 3.0), cosine, sine)
    return tl.where(quadrant >= 2.0, found * -1.0, found)


@triton.jit
def cos(x):
    """As `vecpg.envs.ops.cpu.cos`, the same bits."""
    rest, quadrant = _reduced(x)
    cosine, sine = _cos_sin(rest)
    found = tl.where((quadrant == 1.0) | (quadrant == 3.0), sine, cosine)
    return tl.where((quadrant == 1.0) | (quadrant == 2.0), found * -1.0, found)


@triton.jit
def _reduced(angle):
    """The angle less n quarter turns, between -pi/4 and pi/4, and n modulo 4.

    Source: Cody & Waite (1980), "Software manual for the elementary functions".
    """
    n = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = angle - n * 1.5703125
    rest = rest - n * 4.838705062866211e-4
    rest = rest + n * 4.371139000186243e-8
    rest = tl.where(rest > 1.0, 1.0, rest)
    rest = tl.where(rest < -1.0, -1.0, rest)
    return rest, n - 4.0 * tl.floor(n * 0.25)


@triton.jit
def _cos_sin(angle):
    """Within 1e-7 up to an angle of 1."""
    square = angle * angle
    cosine = square * (-1.0 / 3628800.0) + 1.0 / 40320.0
    cosine = cosine * square - 1.0 / 720.0
    cosine = cosine * square + 1.0 / 24.0
    cosine = cosine * square - 0.5
    cosine = cosine * square + 1.0
    sine = square * (1.0 / 362880.0) - 1.0 / 5040.0
    sine = sine * square + 1.0 / 120.0
    sine = sine * square - 1.0 / 6.0
    return cosine, sine * (square * angle) + angle


@triton.jit
def exp(x):
    """E to the power of x, within 2e-7 of itself where that is a normal number."""
    inside = tl.where(x > 89.0, 89.0, x)
    inside = tl.where(inside < -104.0, -104.0, inside)
    n, grown = _growth(inside)
    half = n >> 1
    # 2**n itself need not be a number.
    return (grown + 1.0) * _power(half) * _power(n - half)


@triton.jit
def tanh(x):
    """Within 2e-7 of itself, and exactly 1 far out, as `vecpg.kernels.matrix.tanh`.

    With e = exp(2|x|) - 1, it is e / (e + 2), and errors of a large e do not show.
    """
    e = _growth_of_twice(x)
    return _with_sign(tl.div_rn(e, e + 2.0), x)


@triton.jit
def fast_tanh(x):
    """Within 4e-7 of itself: `tanh` with a division that a GPU has, and bits of its own."""
    e = _growth_of_twice(x)
    return _with_sign(e / (e + 2.0), x)


@triton.jit
def exp2_tanh(x):
    """Within 2.1e-7, and exactly 1 far out: few instructions, and bits of its own.

    With e = exp(-2|x|) it is (1 - e) / (1 + e). A GPU's own power of 2 is within 2**-22 of itself,
    which is 1e-7 of the error.
    """
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)
    above, below = 1.0 - e, 1.0 + e
    # The polynomial of least relative error for 1 / y on [1, 2], and a step of Newton's method.
    inverse = tl.fma(tl.fma(below, 0.32323232, -1.45454545), below, 2.12121212)
    inverse = tl.fma(inverse, tl.fma(-below, inverse, 1.0), inverse)
    found = above * inverse
    return _with_sign(tl.fma(tl.fma(-below, found, above), inverse, found), x)


@triton.jit
def _growth_of_twice(x):
    """Exp(2|x|) - 1, of |x| up to 10."""
    doubled = tl.abs(x) * 2.0
    n, grown = _growth(tl.where(doubled > 20.0, 20.0, doubled))
    power = _power(n)
    return power * grown + (power - 1.0)


@triton.jit
def _with_sign(y, x):
    """The positive y with the sign of x."""
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    return (y.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _growth(x):
    """N and exp(r) - 1, for x = n log(2) + r with r near 0.

    Coefficients: of the least error of exp(r) - 1, 3e-8 of itself, for |r| <= log(2) / 2.
    """
    # Beside 1.5 * 2**23 a float32 has room for whole numbers alone; its last bits are theirs.
    near = x * 1.4426950408889634 + 12582912.0
    whole = near - 12582912.0
    r = x - whole * 0.693359375
    r = r + whole * 2.12194440e-4
    grown = r * 1.37144e-3 + 8.36935e-3
    grown = grown * r + 4.167039e-2
    grown = grown * r + 0.16666517
    grown = grown * r + 0.49999984
    return near.to(tl.int32, bitcast=True) - 0x4B400000, grown * (r * r) + r


@triton.jit
def _power(n):
    """2**n, for whole n from -126 to 127."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def log(x):
    """The natural logarithm, within 2e-7 of itself.

    Coefficients: Cephes, `logf`.
    """
    tiny = x < 1.1754943508222875e-38
    bits = tl.where(tiny, x * 8388608.0, x).to(tl.int32, bitcast=True)
    over = bits - 0x3F3504F3  # sqrt(1/2)
    n = (over >> 23).to(tl.float32)
    n = tl.where(tiny, n - 23.0, n)
    z = ((over & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    y = z * 7.0376836292e-2 - 1.1514610310e-1
    y = y * z + 1.1676998740e-1
    y = y * z - 1.2420140846e-1
    y = y * z + 1.4249322787e-1
    y = y * z - 1.6668057665e-1
    y = y * z + 2.0000714765e-1
    y = y * z - 2.4999993993e-1
    y = y * z + 3.3333331174e-1
    square = z * z
    found = n * 0.6931471805599453 + (z - square * (0.5 - y * z))
    # Infinity and NaN are their own logarithms; those below 0 have none.
    found = tl.where(x < float("inf"), found, x)
    found = tl.where(x == 0.0, float("-inf"), found)
    return tl.where(x < 0.0, float("nan"), found)


@triton.jit
def is_finite(x):
    """Whether a number is neither NaN nor infinite."""
    return tl.abs(x) < float("inf")


@triton.jit  # type: ignore[untyped-decorator]
def stamp(place, CLOCK: tl.constexpr):
    """Store at a place, int64, when this is: nanoseconds of the GPU's clock.

    Without `CLOCK` nothing is stored: Triton's interpreter has none.
    """
    if CLOCK:
        tl.store(place, tl.extra.cuda.globaltimer())
