"""(a) Every kernel on the device against its reference: in float64 on the host, by another way."""

import functools
import math
import random

import torch

from hour.job import Wrong
from vecpg.returns import cuda, reward_to_go

# The error of rounding the result once, with a little room; in the interpreter, which cuts what
# does not fit into bfloat16 instead of rounding it, twice that.
TOLERANCE = {
    torch.float32: 2e-7,
    torch.float64: 2e-13,
    torch.bfloat16: 1e-2,
    torch.float16: 1.2e-3,
}
MODES = ("cut", "skip", "decay")
LAYOUTS = ("plain", "transposed", "sliced")
OPTIONAL = ("final_values", "last_values", "mask")
GAMMAS = (0.9, None, 1.0, 0.0)  # None: one for each element
# Every kernel has one of these at least, with tiles that are not full.
SHAPES = [(130, 1000), (16, 5000), (4100, 2), (63, 33), (300, 33000), (1, 1), (2049, 130)]
_DRAWN = 60


def measure(job):
    if job.miniature:
        job.run(in_the_interpreter([(9, 5), (13, 3), (1, 1)]))
        return
    job.run(_cases(SHAPES, _DRAWN, "cuda"))


def in_the_interpreter(shapes):
    return _cases(shapes, 6, "cpu")


def _cases(shapes, drawn, device):
    """Pairs of a name and what checks it: the usual call at every shape, then drawn ones."""
    g = random.Random(0)
    usual = torch.float32, "cut", "plain", (), 0.9
    chosen = [(shape, *usual) for shape in shapes]
    for number in range(drawn):
        given = tuple(name for name in OPTIONAL if g.random() < 0.5)
        shape = shapes[number % len(shapes)]
        chosen.append(
            (
                shape,
                g.choice(list(TOLERANCE)),
                g.choice(MODES),
                g.choice(LAYOUTS),
                given,
                g.choice(GAMMAS),
            )
        )
    for case in dict.fromkeys(chosen):
        yield _name(*case), functools.partial(_check_returns, device, *case)


def _name(shape, dtype, mode, layout, given, gamma):
    words = [f"returns {shape[0]} x {shape[1]}", str(dtype).removeprefix("torch."), layout]
    words += [f"{name} ({mode})" if name == "mask" else name for name in given]
    return ", ".join([*words, "gamma for each" if gamma is None else f"gamma {gamma:g}"])


def _check_returns(device, shape, dtype, mode, layout, given, gamma):
    g = torch.Generator().manual_seed(shape[0])
    case = {
        "rewards": torch.randn(shape, generator=g).to(dtype),
        "dones": torch.rand(shape, generator=g) < 0.05,
        "final_values": torch.randn(shape, generator=g).to(dtype),
        "last_values": torch.randn(shape[1], generator=g).to(dtype),
        "mask": torch.rand(shape, generator=g) < 0.7,
    }
    case = {name: case[name] for name in ("rewards", "dones", *given)}
    if "mask" in given:
        case["rewards"] = case["rewards"].masked_fill(~case["mask"], math.nan)
    if "final_values" in given:
        read = case["dones"] & case.get("mask", torch.tensor(True))
        case["final_values"] = case["final_values"].masked_fill(~read, math.inf)
    if gamma is None:
        gamma = torch.rand(shape, generator=g, dtype=torch.float64)
    wide = {n: each.double() if each.is_floating_point() else each for n, each in case.items()}
    expected = reward_to_go(**wide, gamma=gamma, mask_mode=mode, backend="reference")
    there = {name: _laid_out(each.to(device), layout) for name, each in case.items()}
    discount = _laid_out(gamma.to(device), layout) if isinstance(gamma, torch.Tensor) else gamma

    def call():
        out = _laid_out(torch.full(shape, math.nan, dtype=dtype, device=device), layout)
        cuda.reward_to_go(
            there["rewards"],
            there["dones"],
            discount,
            *(there.get(name) for name in OPTIONAL),
            mode,
            out,
        )
        return out

    return {
        "kernel": "returns",
        "dtype": str(dtype).removeprefix("torch."),
        "tolerance": TOLERANCE[dtype],
        "error": _error(call(), expected, TOLERANCE[dtype], call()),
    }


def _error(result, expected, tolerance, again):
    """The largest error, in parts of the largest number or of 1.

    Raises:
        Wrong: it is beyond the tolerance, or the second call gave other bits.
    """
    scale = max(1.0, expected.abs().max().item())
    error = (result.cpu().double() - expected).abs().max().item() / scale
    if not error <= tolerance:
        raise Wrong(f"expected an error of at most {tolerance:g}, got {error:.3g}")
    if not torch.equal(result, again):
        raise Wrong("the same call gave other bits")
    return error


def _laid_out(value, layout):
    """The same numbers, differently in memory."""
    if layout == "transposed" and value.ndim == 2:
        return value.t().contiguous().t()
    if layout == "sliced":
        return torch.stack([value, torch.zeros_like(value)], dim=-1)[..., 0]
    return value
