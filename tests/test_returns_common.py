"""Calls that ask for nothing special take a short way; they mean what all others mean."""

import math

import pytest
import torch
from pairs import pairwise

from vecpg.returns import (
    checks,
    cpu,
    cpu_advantages,
    generalized_advantage,
    lambda_returns,
    operator,
    packed_reward_to_go,
    reward_to_go,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def laid_out(values, layout):
    """The same numbers, differently in memory."""
    if layout == "columns":
        return values.mT.contiguous().mT if values.ndim == 2 else values
    if layout == "apart":
        return torch.stack([values, torch.ones_like(values)], -1)[..., 0]
    return values


@pairwise(
    shape=[(1,), (9,), (300,), (1, 1), (6, 1), (1, 6), (20, 33), (33, 12), (4, 300)],
    layout=["rows", "columns", "apart", "mixed"],
    dtype=DTYPES,
    mode=[None, "cut", "skip", "decay", "zero"],
    given_out=[False, True],
)
def test_a_common_call_is_the_reference(shape, layout, dtype, mode, given_out, monkeypatch):
    g = torch.Generator().manual_seed(len(shape) + shape[0])
    rewards = torch.randn(shape, generator=g).to(dtype)
    dones = torch.rand(shape, generator=g) < 0.2
    mask = torch.rand(shape, generator=g) < 0.7
    options = {} if mode is None else {"mask": mask, "mask_mode": mode}
    expected = reward_to_go(rewards, dones, 0.9, backend="reference", **options)
    if mode is not None:
        rewards = rewards.masked_fill(~mask, math.nan)
        options["mask"] = laid_out(mask, "rows" if layout == "mixed" else layout)
    layouts = ("columns", "rows") if layout == "mixed" else (layout, layout)
    rewards, dones = laid_out(rewards, layouts[0]), laid_out(dones, layouts[1])
    if given_out:
        options["out"] = laid_out(torch.full(shape, math.nan, dtype=dtype), layouts[0])
    short = []
    monkeypatch.setattr(
        operator,
        "write_common",
        lambda *given: short.append(1) or cpu.common_reward_to_go(*given),
    )
    result = reward_to_go(rewards, dones, 0.9, **options)
    assert len(short) == (0 if given_out and layout == "apart" else 1)
    if given_out:
        assert result is options["out"]
    else:
        assert result.stride() == torch.empty_like(rewards).stride()
    torch.testing.assert_close(result, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.slow  # it has machine code of its own, which takes its time to compile
@pytest.mark.parametrize("shape", [(9,), (20, 33)])
def test_a_common_call_of_float16_is_the_reference(shape, monkeypatch):
    for layout in ("rows", "columns"):
        test_a_common_call_is_the_reference(shape, layout, torch.float16, "skip", True, monkeypatch)


@pairwise(
    shape=[(24,), (6, 4)],
    layout=["rows", "columns"],
    dtype=[torch.float32, torch.bfloat16],
    shift=[-23, -1, 0, 1, 23],
    name=["rewards", "dones", "mask"],
)
def test_an_out_that_overlaps_is_refused_and_one_beside_is_not(shape, layout, dtype, shift, name):
    size = torch.tensor([], dtype=dtype).element_size()
    memory = torch.zeros(300, dtype=torch.uint8)

    def placed(begin, dtype):
        count = 24 * torch.tensor([], dtype=dtype).element_size()
        flat = memory[begin : begin + count].view(dtype)
        if len(shape) == 2 and layout == "columns":
            return flat.view(shape[::-1]).t()
        return flat.view(shape)

    given = {
        "rewards": torch.ones(shape, dtype=dtype),
        "dones": torch.zeros(shape, dtype=torch.bool),
        "mask": torch.ones(shape, dtype=torch.bool),
    }
    given = {each: laid_out(value, layout) for each, value in given.items()}
    of_name = given[name]
    step = of_name.element_size()
    begin = 104 + shift * step if shift < 0 else 104
    begin = begin - begin % size if shift >= 0 else begin
    out = placed(104, dtype)
    given[name] = placed(begin + max(shift, 0) * step, of_name.dtype).copy_(of_name)
    with pytest.raises(ValueError, match=f"out: .*may overlap {name}"):
        reward_to_go(**given, gamma=0.5, out=out)
    # Right behind it, and right before it.
    for begin in (104 + 24 * size, 104 - 24 * step):
        given[name] = placed(begin, of_name.dtype).copy_(of_name)
        assert checks.is_common(
            given["rewards"], given["dones"], 0.5, given["mask"], "cut", out.zero_()
        )
        reward_to_go(**given, gamma=0.5, out=out)
        assert torch.equal(given[name], of_name)


def test_an_out_between_the_elements_of_an_input_is_refused():
    memory = torch.zeros(100)
    rewards = memory[:48].view(6, 4, 2)[..., 0]
    dones = torch.zeros(6, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="out: .*may overlap rewards"):
        reward_to_go(rewards, dones, 0.5, out=memory[40:64].view(6, 4))
    reward_to_go(rewards, dones, 0.5, out=memory[47:71].view(6, 4))


def test_what_is_not_common_takes_the_long_way():
    rewards, dones = torch.ones(4, 3), torch.zeros(4, 3, dtype=torch.bool)
    common = {
        "rewards": rewards,
        "dones": dones,
        "gamma": 0.5,
        "mask": dones,
        "mask_mode": "cut",
        "out": torch.ones(4, 3),
    }
    assert checks.is_common(**common)
    numbers = torch.randn(4, 3, dtype=torch.complex64).conj()
    nothing = torch._efficientzerotensor((4, 3))
    for name, value in [
        ("rewards", [1.0]),
        ("rewards", rewards.clone().requires_grad_()),
        ("rewards", torch.nn.Parameter(rewards, requires_grad=False)),
        ("rewards", numbers.imag),
        ("rewards", nothing),
        ("rewards", rewards.to_sparse()),
        ("rewards", rewards.to("meta")),
        ("rewards", rewards.long()),
        ("rewards", rewards.double()),
        ("rewards", rewards[:, :2]),
        ("rewards", rewards[None]),
        ("dones", dones.int()),
        ("dones", dones.mT),
        ("dones", dones.to_sparse()),
        ("dones", dones.to("meta")),
        ("dones", None),
        ("mask", rewards),
        ("mask", dones[:2]),
        ("mask", dones.to_sparse()),
        ("mask_mode", "none"),
        ("gamma", 1.5),
        ("gamma", math.nan),
        ("gamma", 1),
        ("gamma", torch.tensor(0.5)),
        ("out", rewards),
        ("out", rewards[0].expand(4, 3)),
        ("out", rewards.double()),
        ("out", torch.ones(4, 3, requires_grad=True)),
        ("out", numbers.imag),
        ("out", torch.ones(4, 6)[:, ::2]),
        ("out", torch.ones(3, 4)),
    ]:
        assert not checks.is_common(**(common | {name: value})), (name, value)
    with torch.autograd.forward_ad.dual_level():
        assert not checks.is_common(**common)
    seen = []
    torch.vmap(lambda each: seen.append(checks.is_common(**common)) or each)(rewards)
    assert seen == [False]


@pairwise(
    shape=[(5, 3), (8, 16), (9, 17), (7, 33), (2, 1041)],
    layout=["rows", "columns", "apart"],
    mode=[None, "cut", "skip", "decay", "zero"],
    function=[generalized_advantage, lambda_returns],
    given_out=[False, True],
)
def test_a_common_advantage_is_the_reference(shape, layout, mode, function, given_out, monkeypatch):
    g = torch.Generator().manual_seed(sum(shape))
    rewards, values = torch.randn(2, *shape, generator=g)
    dones = torch.rand(shape, generator=g) < 0.2
    mask = torch.rand(shape, generator=g) < 0.7
    options = {} if mode is None else {"mask": mask, "mask_mode": mode}
    expected = function(rewards, values, dones, 0.9, 0.8, backend="reference", **options)
    if mode is not None:
        rewards, values = (each.masked_fill(~mask, math.nan) for each in (rewards, values))
        options["mask"] = laid_out(mask, layout)
    if given_out:
        options["out"] = torch.full(shape, math.nan)
    rewards, values, dones = (laid_out(each, layout) for each in (rewards, values, dones))
    short = []
    monkeypatch.setattr(
        operator,
        "write_common_advantage",
        lambda *given: short.append(1) or cpu_advantages.common_advantage(*given),
    )
    result = function(rewards, values, dones, 0.9, 0.8, **options)
    assert short == [1]
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_what_is_not_a_common_advantage_takes_the_long_way():
    rewards, dones = torch.ones(4, 3), torch.zeros(4, 3, dtype=torch.bool)
    common = {"rewards": rewards, "values": torch.ones(4, 3), "dones": dones, "gamma": 0.5}
    common |= {"gae_lambda": 0.5, "mask": None, "mask_mode": "cut", "out": None}
    assert checks.is_common_advantage(**common)
    for name, value in [
        ("rewards", rewards[0]),
        ("values", rewards[0]),
        ("values", rewards[None]),
        ("values", rewards.mT),
        ("values", rewards.double()),
        ("values", rewards.clone().requires_grad_()),
        ("values", torch._neg_view(rewards)),
        ("values", torch._efficientzerotensor((4, 3))),
        ("values", None),
        ("dones", None),
        ("gae_lambda", 1.5),
        ("gae_lambda", math.nan),
        ("gae_lambda", torch.tensor(0.5)),
        ("out", common["values"]),
        ("out", rewards),
    ]:
        assert not checks.is_common_advantage(**(common | {name: value})), (name, value)


def test_what_is_not_commonly_packed_takes_the_long_way():
    rewards, offsets = torch.ones(4), torch.tensor([0, 1, 4])
    common = {"rewards": rewards, "offsets": offsets, "gamma": 0.5}
    assert checks.is_commonly_packed(**common)
    for name, value in [
        ("rewards", rewards[None]),
        ("rewards", rewards.clone().requires_grad_()),
        ("rewards", rewards.long()),
        ("offsets", [0, 1, 4]),
        ("offsets", offsets.int()),
        ("offsets", offsets[None]),
        ("offsets", offsets[:0]),
        ("offsets", offsets.to("meta")),
        ("offsets", offsets.to_sparse()),
        ("offsets", torch._neg_view(offsets)),
        ("offsets", torch._efficientzerotensor((3,), dtype=torch.int64)),
        ("gamma", 1.5),
        ("gamma", torch.tensor(0.5)),
    ]:
        assert not checks.is_commonly_packed(**(common | {name: value})), (name, value)
    nothing = torch._efficientzerotensor((3,), dtype=torch.int64)
    with pytest.raises(ValueError, match="offsets: expected numbers from 0 to 4"):
        packed_reward_to_go(rewards, nothing, 0.5)
