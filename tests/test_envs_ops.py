"""The operations of definitions: on numbers, on tensors and in machine code."""

import math

import numpy as np
import pytest
import torch

from vecpg.envs import ops
from vecpg.envs.ops import cpu
from vecpg.envs.ops.tensor import TensorOps
from vecpg.kernels.jit import jit

OF_ONE = ("sin", "cos", "exp", "log", "sqrt", "tanh", "floor")
OF_TWO = ("minimum", "maximum")
NUMBERS = (-3.5, -1.0, -0.25, -0.0, 0.0, 0.5, 1.0, 2.75, 40.0, math.inf, -math.inf, math.nan)


@jit(as_written=True)
def many(x, sines, cosines):
    for i in range(len(x)):
        sines[i], cosines[i] = cpu.sin(x[i]), cpu.cos(x[i])


def in_machine_code(x):
    sines, cosines = np.full((2, len(x)), np.nan, np.float32)
    many(x, sines, cosines)
    return sines, cosines


@pytest.mark.parametrize(("most", "tolerance"), [(1, 8e-8), (10, 1e-7), (300, 1e-7), (6000, 1e-7)])
def test_sine_and_cosine_keep_their_digits_at_any_angle(most, tolerance):
    x = np.random.default_rng(0).uniform(-most, most, 200_001).astype(np.float32)
    quarters = np.arange(-most, most + 1) * (np.pi / 2)
    x = np.concatenate([x, quarters[np.abs(quarters) <= most].astype(np.float32)])
    sines, cosines = in_machine_code(x)
    exact = x.astype(np.float64)
    assert np.abs(sines - np.sin(exact)).max() < tolerance
    assert np.abs(cosines - np.cos(exact)).max() < tolerance


def test_small_angles_go_through_the_polynomials_alone():
    """As CartPole's were before there was a reduction, bit for bit."""
    x = np.linspace(-math.pi / 4, math.pi / 4, 100_001).astype(np.float32)[1:-1]
    f, square = np.float32, x * x
    cosine = f(-1 / 3628800) * square + f(1 / 40320)
    for term in (-1 / 720, 1 / 24, -1 / 2, 1.0):
        cosine = cosine * square + f(term)
    sine = f(1 / 362880) * square - f(1 / 5040)
    for term in (1 / 120, -1 / 6):
        sine = sine * square + f(term)
    sines, cosines = in_machine_code(x)
    assert np.array_equal(cosines, cosine)
    assert np.array_equal(sines, sine * (square * x) + x)


def test_an_angle_that_is_no_number_gives_none_and_any_other_a_sine():
    none = in_machine_code(np.array([math.nan, math.inf, -math.inf], np.float32))
    assert np.isnan(none).all()
    far = np.float32(10.0) ** np.arange(4, 39).astype(np.float32)
    assert np.abs(in_machine_code(np.concatenate([far, -far]))).max() <= 1


@jit(as_written=True)
def _of_one(x):
    return (
        cpu.sin(x),
        cpu.cos(x),
        cpu.exp(x),
        cpu.log(x),
        cpu.sqrt(x),
        cpu.tanh(x),
        cpu.floor(x),
    )


@jit(as_written=True)
def _of_more(x, y, low, high):
    chosen = cpu.where(x < y, x, y)
    return cpu.minimum(x, y), cpu.maximum(x, y), cpu.clip(x, low, high), chosen


def same(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_of_one_number_are_the_same_everywhere(dtype):
    tolerance = 2e-7 if dtype == torch.float32 else 1e-15
    bound = TensorOps(dtype)
    for number in NUMBERS:
        rounded = torch.tensor(number, dtype=dtype).item()
        expected = []
        with np.errstate(all="ignore"):
            expected = [float(getattr(np, name)(np.float64(rounded))) for name in OF_ONE]
        tensor = torch.full((3,), number, dtype=dtype)
        for name, value in zip(OF_ONE, expected, strict=True):
            found = getattr(bound, name)(tensor)
            assert found.dtype == dtype
            same(found.numpy(), np.full(3, value), tolerance)
        if dtype == torch.float32:
            same(_of_one(np.float32(number)), expected, tolerance)
        if 0 < number < math.inf:
            same([getattr(ops, name)(number) for name in OF_ONE], expected, 1e-15)
            # A plain number stays one, in full precision.
            same([getattr(bound, name)(number) for name in OF_ONE], expected, 1e-15)


def test_functions_of_more_are_the_same_everywhere():
    bound = TensorOps(torch.float32)
    for x in NUMBERS:
        for y in NUMBERS:
            with np.errstate(all="ignore"):
                least, most = float(np.minimum(x, y)), float(np.maximum(x, y))
                inside = float(np.clip(x, -0.75, 2.0))
            chosen = x if x < y else y
            expected = (least, most, inside, chosen)
            low, high = np.float32(-0.75), np.float32(2.0)
            same(_of_more(np.float32(x), np.float32(y), low, high), expected, 0)
            same([ops.minimum(x, y), ops.maximum(x, y), ops.clip(x, -0.75, 2.0)], expected[:3], 0)
            a, b = (torch.full((2,), value) for value in (x, y))
            ends = torch.full((2,), -0.75), torch.full((2,), 2.0)
            for one, other in ((a, b), (a, y), (x, b)):
                same(bound.minimum(one, other), np.full(2, least), 0)
                same(bound.maximum(one, other), np.full(2, most), 0)
                same(bound.where(a < b, one, other), np.full(2, chosen), 0)
            for low, high in ((-0.75, 2.0), (ends[0], 2.0), (-0.75, ends[1]), ends):
                same(bound.clip(a, low, high), np.full(2, inside), 0)
            same([bound.minimum(x, y), bound.maximum(x, y)], [least, most], 0)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_two_plain_numbers_are_chosen_from_in_the_dtype_of_the_environment(default):
    torch.set_default_dtype(default)
    try:
        for dtype in (torch.float32, torch.float64):
            bound = TensorOps(dtype)
            flag = torch.tensor([True, False])
            for one, other in ((0.1, 0.3), (0.0, 1.0), (-0.0, 1.0)):
                found = bound.where(flag, one, other)
                assert found.dtype == dtype
                assert torch.equal(found, torch.tensor([one, other], dtype=dtype))
                assert math.copysign(1, found[0]) == math.copysign(1, one)
    finally:
        torch.set_default_dtype(torch.float32)
