"""(a) Every kernel on the device against its reference: in float64 on the host, by another way."""

import functools
import importlib.util
import itertools
import math
import random

import torch

from hour.job import Wrong, say
from hour.parts import COLLECTING
from vecpg.returns import cuda, generalized_advantage, packed_reward_to_go, reward_to_go

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
DISCOUNTS = (0.9, None, 1.0, 0.0)  # None: one for each element
# Every tile has one of these at least that it does not fill.
SHAPES = [(130, 1000), (16, 5000), (4100, 2), (63, 33), (300, 33000), (1, 1), (2049, 130)]
_DRAWN = 84


def measure(job):
    if job.miniature:
        shapes, drawn, totals = [(9, 5), (13, 3), (1, 1)], 4, (23,)
        small = {"copies": 5, "envs": ("CartPole-v1",), "window": 2}
        smaller = {"copies": (5,), "envs": ("CartPole-v1",), "window": 2, "iterations": 1}
        smaller["limit"] = 20
    else:
        shapes, drawn, totals = SHAPES, _DRAWN, (1, 23, 9001, 200_000)
        small = {}
        smaller = {}
    usual, others = usual_cases(shapes, job.device), drawn_cases(shapes, drawn, job.device)
    usual += packed_cases(totals, job.device)
    if all(importlib.util.find_spec(name) for name in COLLECTING):
        from hour import collecting, iterating

        usual += iterating.cases(job.device, **smaller)
        usual += collecting.cases(job.device, **small)
    else:
        say("the kernels that collect need Gymnasium and Numba: not looked at")
    job.run(usual + others)


def usual_cases(shapes, device):
    """Pairs of a name and what checks it: the usual calls at every shape."""
    usual = torch.float32, "cut", "plain", (), 0.9
    names = ("returns", "advantages")
    return [_named(device, name, shape, *usual) for shape in shapes for name in names]


def drawn_cases(shapes, drawn, device):
    """Cases of all there are, the same in every process."""
    g = random.Random(0)
    chosen = [
        (
            name,
            shape,
            g.choice(list(TOLERANCE)),
            g.choice([*MODES, "zero"] if name == "advantages" else MODES),
            g.choice(LAYOUTS),
            tuple(each for each in OPTIONAL if g.random() < 0.5),
            g.choice(DISCOUNTS),
        )
        for _, name, shape in zip(
            range(drawn),
            itertools.cycle(("returns", "advantages")),
            (shape for shape in itertools.cycle(shapes) for _ in range(2)),
            strict=False,
        )
    ]
    return [_named(device, *case) for case in dict.fromkeys(chosen)]


def _named(device, *case):
    return _name(*case), functools.partial(_check_returns, device, *case)


def packed_cases(totals, device):
    """Episodes one behind the other."""
    return [
        (
            f"returns of {total} packed rows{', with final values' * with_final}",
            functools.partial(_check_packed, device, total, with_final),
        )
        for total in totals
        for with_final in (False, True)
    ]


def _name(name, shape, dtype, mode, layout, given, discount):
    words = [f"{name} {shape[0]} x {shape[1]}", str(dtype).removeprefix("torch."), layout]
    words += [f"{each} ({mode})" if each == "mask" else each for each in given]
    words.append("a discount for each" if discount is None else f"discount {discount:g}")
    return ", ".join(words)


def _check_returns(device, name, shape, dtype, mode, layout, given, discount):
    g = torch.Generator().manual_seed(shape[0])
    case = {
        "rewards": torch.randn(shape, generator=g).to(dtype),
        "dones": torch.rand(shape, generator=g) < 0.05,
        "final_values": torch.randn(shape, generator=g).to(dtype),
        "last_values": torch.randn(shape[1], generator=g).to(dtype),
        "mask": torch.rand(shape, generator=g) < 0.7,
        "values": torch.randn(shape, generator=g).to(dtype),
    }
    for each in {*OPTIONAL} - {*given}:
        del case[each]
    if name == "returns":
        del case["values"]
    real = case.get("mask", torch.tensor(True))
    # Nothing may be read where it does not count.
    for each in {"rewards", "values"} & {*case}:
        case[each] = case[each].masked_fill(~real, math.nan)
    if "final_values" in given:
        case["final_values"] = case["final_values"].masked_fill(~(case["dones"] & real), math.inf)
    case["gamma"] = discount
    if discount is None:
        case["gamma"] = torch.rand(shape, generator=g, dtype=torch.float64)
    if name == "advantages":
        case["gae_lambda"] = 0.8

    def each(of):
        return {n: of(v) if isinstance(v, torch.Tensor) else v for n, v in case.items()}

    wide = each(lambda value: value.double() if value.is_floating_point() else value)
    function = reward_to_go if name == "returns" else generalized_advantage
    expected = function(**wide, mask_mode=mode, backend="reference")
    there = each(lambda value: _laid_out(value.to(device), layout))

    def call():
        out = _laid_out(torch.full(shape, math.nan, dtype=dtype, device=device), layout)
        options = [there.get(each) for each in OPTIONAL]
        if name == "returns":
            cuda.reward_to_go(there["rewards"], there["dones"], there["gamma"], *options, mode, out)
        else:
            given = [there[n] for n in ("rewards", "values", "dones", "gamma", "gae_lambda")]
            cuda.generalized_advantage(*given, *options, mode, False, out)
        return out

    result = call()
    row = checked(result, expected, TOLERANCE[dtype])
    check_again(result, call())
    return {**row, "kernel": name, "dtype": str(dtype).removeprefix("torch.")}


def _check_packed(device, total, with_final):
    """Episodes one behind the other, some of them empty, beside a loop over each."""
    g = torch.Generator().manual_seed(total)
    cuts = torch.randint(0, total + 1, (max(5, total // 40),), generator=g)
    ends = torch.tensor([0, 0, total, total])
    offsets = torch.cat([ends, cuts, cuts[:3]]).sort().values
    rewards = torch.randn(total, generator=g)
    final_values = torch.randn(len(offsets) - 1, generator=g) if with_final else None
    expected = packed_reward_to_go(
        rewards.double(),
        offsets,
        0.9,
        final_values=None if final_values is None else final_values.double(),
        backend="reference",
    )
    there = rewards.to(device), offsets.to(device)
    final_values = None if final_values is None else final_values.to(device)

    def call():
        out = torch.full((total,), math.nan, device=device)
        cuda.packed_reward_to_go(*there, 0.9, final_values, out)
        return out

    result = call()
    row = checked(result, expected, TOLERANCE[torch.float32])
    check_again(result, call())
    return {**row, "kernel": "packed returns", "dtype": "float32"}


def checked(result, expected, tolerance):
    """The largest error, in parts of the largest number or of 1.

    Raises:
        Wrong: it is beyond the tolerance.
    """
    scale = max(1.0, expected.abs().max().item())
    error = (result.cpu().double() - expected).abs().max().item() / scale
    if not error <= tolerance:
        raise Wrong(f"expected an error of at most {tolerance:g}, got {error:.3g}")
    return {"error": error, "tolerance": tolerance}


def check_again(result, again):
    """Refuse another call of the same that gave other bits."""
    if not torch.equal(result, again):
        raise Wrong("the same call gave other bits")


def _laid_out(value, layout):
    """The same numbers, differently in memory."""
    if layout == "transposed" and value.ndim == 2:
        return value.t().contiguous().t()
    if layout == "sliced":
        return torch.stack([value, torch.zeros_like(value)], dim=-1)[..., 0]
    return value
