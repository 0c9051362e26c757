import math

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, which is for Linux")

import gpu_kernels  # noqa: E402
import triton.language as tl  # noqa: E402

from vecpg import noise  # noqa: E402
from vecpg.envs.ops import cpu  # noqa: E402
from vecpg.envs.ops import cuda as ops  # noqa: E402
from vecpg.kernels import cuda  # noqa: E402
from vecpg.kernels.jit import Compilation, jit  # noqa: E402

SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan]


@pytest.mark.slow
def test_interpreted():
    gpu_kernels.interpret("test_kernels_cuda")


@pytest.mark.slow
def test_what_is_compiled_is_counted(monkeypatch):
    """By the hooks that this version of Triton has."""
    given = torch.zeros(5, dtype=torch.int64), torch.zeros(5, 4, dtype=torch.int64), 0
    with gpu_kernels.compiling(monkeypatch) as kernels, Compilation() as compilation:
        write_words[(1,)](*given, BLOCK=4)
        first = compilation.seconds
        assert first > 0
        write_words[(1,)](*given, BLOCK=4)
        assert compilation.seconds == first
    assert kernels[0] is kernels[1]


def interpret():
    np.seterr(all="ignore")
    check_words()
    check_cos_sin()
    check_exp()
    check_log()
    check_tanh()
    check_modulo()
    check_the_rest()


@triton.jit
def apply(function: tl.constexpr, x, y, out, count, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    one = tl.load(x + n, mask=n < count, other=1.0)
    other = tl.load(y + n, mask=n < count, other=1.0)
    if function == "sin":
        found = ops.sin(one)
    elif function == "cos":
        found = ops.cos(one)
    elif function == "exp":
        found = ops.exp(one)
    elif function == "log":
        found = ops.log(one)
    elif function == "tanh":
        found = ops.tanh(one)
    elif function == "fast_tanh":
        found = cuda.fast_tanh(one)
    elif function == "exp2_tanh":
        found = cuda.exp2_tanh(one)
    elif function == "sqrt":
        found = ops.sqrt(one)
    elif function == "floor":
        found = ops.floor(one)
    elif function == "modulo":
        found = ops.modulo(one, other)
    elif function == "divide":
        found = ops.divide(one, other)
    elif function == "minimum":
        found = ops.minimum(one, other)
    elif function == "maximum":
        found = ops.maximum(one, other)
    else:
        found = ops.where(cuda.is_finite(one), one, other)
    tl.store(out + n, found, mask=n < count)


def applied(function, x, y=None):
    given = [torch.tensor(np.asarray(each, np.float32)) for each in (x, x if y is None else y)]
    out = torch.full((len(given[0]),), math.nan)
    block = 1 << 14
    apply[(triton.cdiv(len(out), block),)](function, *given, out, len(out), BLOCK=block)
    return out.numpy()


def on_cpu(function, *given):
    """The same in machine code."""
    one, other = given[0], given[-1]

    @jit(as_written=True)
    def loop(one, other, out):
        for i in range(len(out)):
            out[i] = function(one[i], other[i])

    @jit(as_written=True)
    def loop_of_one(one, other, out):
        for i in range(len(out)):
            out[i] = function(one[i])

    out = np.empty_like(one)
    (loop if len(given) == 2 else loop_of_one)(one, other, out)
    return out


def same_bits(one, other):
    """NaN is as good as another."""
    return ((one.view(np.int32) == other.view(np.int32)) | (np.isnan(one) & np.isnan(other))).all()


def error(function, exact, x):
    """The largest one, relative to the result."""
    x = np.asarray(x, np.float32)
    wanted = exact(x.astype(np.float64))
    return (np.abs(applied(function, x) - wanted) / np.abs(wanted)).max()


@triton.jit
def write_words(key, out, number, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    low, high, iteration = tl.load(key), tl.load(key + 1), tl.load(key + 2)
    step, env = tl.load(key + 3), tl.load(key + 4) + n
    w0, w1, w2, w3 = cuda.words(low, high, iteration, step, env, 6 + number * 256)
    tl.store(out + n, w0)
    tl.store(out + BLOCK + n, w1)
    tl.store(out + 2 * BLOCK + n, w2)
    tl.store(out + 3 * BLOCK + n, w3)
    sixth = cuda.uniform(low, high, iteration, step, env, 6, 5)
    tl.store(out + 4 * BLOCK + n, (sixth * 16777216.0).to(tl.int64))


def check_words():
    for key in ([0] * 5, [2**32 - 1] * 4 + [2**32 - 64], [2**31, 2**31 + 5, 7, 12345, 1000]):
        for number in (0, 1, 300):
            out = torch.zeros(5, 64, dtype=torch.int64)
            write_words[(1,)](torch.tensor(key), out, number, BLOCK=64)
            low, high, iteration, step, first = key
            counter = [
                torch.full((64,), step),
                torch.arange(64) + first,
                iteration,
                6 | number << 8,
            ]
            assert torch.equal(out[:4], torch.stack(noise.philox(counter, (low, high))))
            counter[3] = 6 | 1 << 8
            assert torch.equal(out[4], noise.philox(counter, (low, high))[1] >> 8)


def check_cos_sin():
    g = np.random.default_rng(1)
    x = np.concatenate([g.uniform(-4, 4, 20000), g.uniform(-1000, 1000, 20000), [1e30], SPECIAL])
    x = x.astype(np.float32)
    for name in ("cos", "sin"):
        found = applied(name, x)
        assert same_bits(found, on_cpu(getattr(cpu, name), x))
        assert np.abs(found[:40000] - getattr(np, name)(x[:40000].astype(np.float64))).max() < 1e-7


def check_exp():
    g = np.random.default_rng(2)
    assert error("exp", np.exp, g.uniform(-87, 88.7, 40000)) < 1.5e-7
    assert error("exp", np.exp, g.uniform(-1, 1, 40000)) < 1e-7
    assert applied("exp", [*SPECIAL[:4], 88.8, -110, 1e30]).tolist() == [
        1.0, 1.0, math.inf, 0.0, math.inf, 0.0, math.inf,
    ]  # fmt: skip
    assert math.isnan(applied("exp", [math.nan])[0])
    assert abs(applied("exp", [-90])[0] - math.exp(-90)) < 2**-149


def check_log():
    g = np.random.default_rng(3)
    assert error("log", np.log, np.exp(g.uniform(-87, 88, 40000))) < 1.5e-7
    assert error("log", np.log, g.uniform(0.4, 0.99, 40000)) < 1.5e-7
    # What a normal number is made from.
    assert error("log", np.log, 1 - np.arange(1, 2**24, 999) * 2.0**-24) < 1.5e-7
    assert error("log", np.log, [1e-40, 1e-45]) < 1e-6
    assert applied("log", [0.0, -0.0, math.inf, 1.0]).tolist() == [
        -math.inf,
        -math.inf,
        math.inf,
        0,
    ]
    assert np.isnan(applied("log", [-1.0, -math.inf, math.nan])).all()


def check_tanh():
    assert same_bits(applied("fast_tanh", [0.0, -0.0, 30.0]), np.array([0.0, -0.0, 1.0], "f4"))
    g = np.random.default_rng(4)
    x = np.concatenate([g.uniform(-12, 12, 40000), np.exp(g.uniform(-20, 0, 40000))])
    assert error("tanh", np.tanh, x) < 2e-7
    assert error("fast_tanh", np.tanh, x) < 2e-7  # here divisions are exact
    assert applied("tanh", [math.inf, -math.inf, 30.0]).tolist() == [1.0, -1.0, 1.0]
    assert same_bits(applied("tanh", [0.0, -0.0]), np.array([0.0, -0.0], np.float32))
    assert math.isnan(applied("tanh", [math.nan])[0])
    # Powers of 2 are more exact here than a GPU's, which add 1e-7.
    x = np.concatenate([x, -x]).astype(np.float32)
    found = applied("exp2_tanh", x)
    assert np.abs(found - np.tanh(x.astype(np.float64))).max() < 1.5e-7
    assert same_bits(found[: len(x) // 2], -found[len(x) // 2 :])
    far = [0.0, -0.0, 30.0, math.inf, -math.inf]
    wanted = np.array([0.0, -0.0, 1.0, 1.0, -1.0], np.float32)
    assert same_bits(applied("exp2_tanh", far), wanted)
    assert math.isnan(applied("exp2_tanh", [math.nan])[0])


def check_modulo():
    g = np.random.default_rng(5)
    x = np.concatenate([g.uniform(-100, 100, 20000), g.uniform(-1e6, 1e6, 20000), [1e-30, -1e-30]])
    y = np.concatenate([np.full(20000, 2 * math.pi), g.uniform(0.01, 9, 20000), [2.0, 2.0]])
    x, y = x.astype(np.float32), np.where(np.arange(40002) % 3, y, -y).astype(np.float32)
    wanted = on_cpu(modulo, x, y)
    assert np.array_equal(applied("modulo", x, y), wanted)
    assert ((wanted * y >= 0) & (np.abs(wanted) <= np.abs(y))).all()


@jit(as_written=True, inlined=True)
def modulo(x, y):
    return x % y


def check_the_rest():
    pairs = np.array([[x, y] for x in [*SPECIAL, 2.5, -7.0] for y in [*SPECIAL, 2.5]], np.float32)
    x, y = np.ascontiguousarray(pairs.T)
    for name in ("minimum", "maximum"):
        assert same_bits(applied(name, x, y), on_cpu(getattr(cpu, name), x, y))
    assert same_bits(applied("divide", x, y), x / y)
    assert same_bits(applied("sqrt", x), np.sqrt(x))
    assert same_bits(applied("floor", x), np.floor(x))
    assert same_bits(applied("is_finite", x, y), np.where(np.isfinite(x), x, y))
