"""What may be left out, given as numbers, or packed with a mask: the same as written out."""

import itertools
import math
import re

import pytest
import torch
from pairs import pairwise

from vecpg.returns import (
    generalized_advantage,
    packed_generalized_advantage,
    packed_reward_to_go,
    reward_to_go,
)

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-7, torch.bfloat16: 5e-3, torch.float16: 6e-4}
DTYPES = [torch.float64, torch.float32]
MODES = ("cut", "skip", "decay", "zero")
BACKENDS = ("reference", "cpu")
LENGTHS = [
    [5],
    [3, 0, 4, 1, 3],
    [0, 0],
    [1] * 50,
    [7] * 20 + [0, 130],
    [1 + i * i % 31 for i in range(50)],
    [700, 0, 1, 1300],  # long ones are split
]


def passing(real, gamma, mode):
    """What a row multiplies what follows it by, for the rows before it."""
    masked = {"cut": torch.zeros_like(gamma), "skip": torch.ones_like(gamma)}.get(mode, gamma)
    return torch.where(real, gamma, masked)


def weighted_sums(terms, factors, last):
    """sum over k >= t of terms[k] * factors[t] ... factors[k - 1], and of `last` behind them.

    A table of all products, not a recurrence.
    """
    length = len(terms)
    table = torch.zeros(length, length + 1, dtype=torch.float64)
    for t in range(length):
        table[t, t] = 1.0
        table[t, t + 1 :] = factors[t:].cumprod(0)
    every = torch.cat([terms, torch.as_tensor(last, dtype=torch.float64).reshape(1)])
    return torch.where(table != 0, table * every, 0.0).sum(1)


def summed_returns(rewards, gamma, real, mode, last):
    """Of one sequence, in float64."""
    paid = torch.where(real, rewards.double(), 0.0)
    return torch.where(real, weighted_sums(paid, passing(real, gamma, mode), last), 0.0)


def summed_advantages(rewards, values, gamma, gae_lambda, real, mode, last):
    """Of one sequence, in float64."""
    paid, known = (torch.where(real, each.double(), 0.0) for each in (rewards, values))
    if mode == "zero":  # rows like all others
        every = torch.ones_like(real)
        sums = summed_advantages(paid, known, gamma, gae_lambda, every, "cut", last)
        return torch.where(real, sums, 0.0)
    delta = torch.zeros(len(rewards), dtype=torch.float64)
    between = passing(torch.zeros_like(real), gamma, mode)
    for t in range(len(rewards)):
        factor, k = gamma[t].item(), t + 1
        while k < len(rewards) and not real[k]:
            factor, k = factor * between[k].item(), k + 1
        following = (known[k] if k < len(rewards) else last).item() if factor else 0.0
        delta[t] = paid[t] + (factor * following if factor else 0.0) - known[t]
    delta = torch.where(real, delta, 0.0)
    return torch.where(real, weighted_sums(delta, passing(real, gamma * gae_lambda, mode), 0.0), 0)


def make_packed(lengths, dtype, masked=0.4):
    """Poisoned where nothing may be read."""
    g = torch.Generator().manual_seed(sum(lengths) + len(lengths))
    total = sum(lengths)
    mask = torch.rand(total, generator=g) >= masked
    case = {
        "rewards": torch.randn(total, generator=g).to(dtype).masked_fill(~mask, math.nan),
        "values": torch.randn(total, generator=g).to(dtype).masked_fill(~mask, math.nan),
        "offsets": torch.tensor([0, *lengths]).cumsum(0),
        "gamma": torch.rand(total, generator=g, dtype=torch.float64),
        "gae_lambda": torch.rand(total, generator=g, dtype=torch.float64),
        "final_values": torch.randn(len(lengths), generator=g).to(dtype),
        "mask": mask,
    }
    case["final_values"][torch.tensor(lengths) == 0] = math.nan
    return case


def each_sequence(case):
    for i, (start, stop) in enumerate(itertools.pairwise(case["offsets"].tolist())):
        rows = {
            name: value[start:stop]
            for name, value in case.items()
            if name not in ("offsets", "final_values")
        }
        yield rows, case["final_values"][i]


def assert_close(result, expected, dtype):
    expected = torch.cat(expected) if expected else torch.zeros(0, dtype=torch.float64)
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    assert result.dtype == dtype
    assert result.shape == expected.shape
    torch.testing.assert_close(
        result.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale, equal_nan=False
    )


@pairwise(
    lengths=LENGTHS,
    dtype=DTYPES,
    mode=MODES,
    backend=BACKENDS,
    options=["scalar", "tensors", "no values", "nothing", "apart", "mask apart"],
)
def test_packed_with_a_mask_is_the_double_sum_of_each_sequence(
    lengths, dtype, mode, backend, options
):
    case = make_packed(lengths, dtype)
    passed = dict(case)
    if options not in ("tensors", "no values"):
        case["gamma"].fill_(0.9)
        case["gae_lambda"].fill_(0.8)
        passed |= {"gamma": 0.9, "gae_lambda": 0.8}
    if "apart" in options:
        names = ("rewards", "values", "mask", "final_values")
        for name in ("mask",) if options == "mask apart" else names:
            passed[name] = torch.stack([case[name], case[name]], -1)[:, 0]
    if options in ("no values", "nothing", "mask apart"):
        case["final_values"] = torch.zeros_like(case["final_values"])
        del passed["final_values"]
    given = {name: passed[name] for name in passed if name not in ("values", "gae_lambda")}
    result = packed_reward_to_go(**given, mask_mode=mode, backend=backend)
    expected = [
        summed_returns(rows["rewards"], rows["gamma"], rows["mask"], mode, last)
        for rows, last in each_sequence(case)
    ]
    assert_close(result, expected, dtype)

    result = packed_generalized_advantage(**passed, mask_mode=mode, backend=backend)
    expected = [
        summed_advantages(
            rows["rewards"],
            rows["values"],
            rows["gamma"],
            rows["gae_lambda"],
            rows["mask"],
            mode,
            last,
        )
        for rows, last in each_sequence(case)
    ]
    assert_close(result, expected, dtype)


@pairwise(lengths=LENGTHS, dtype=DTYPES, backend=BACKENDS, gamma=["scalar", "tensor"])
def test_packed_advantages_are_the_double_sum_of_each_sequence(lengths, dtype, backend, gamma):
    case = make_packed(lengths, dtype, masked=0.0)
    passed = dict(case)
    del passed["mask"]
    if gamma == "scalar":
        case["gamma"].fill_(0.9)
        case["gae_lambda"].fill_(0.8)
        passed |= {"gamma": 0.9, "gae_lambda": 0.8}
    result = packed_generalized_advantage(**passed, backend=backend)
    expected = [
        summed_advantages(*(rows[name] for name in ADVANTAGE), rows["mask"], "skip", last)
        for rows, last in each_sequence(case)
    ]
    assert_close(result, expected, dtype)


@pytest.mark.slow  # each has machine code of its own, which takes its time to compile
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_sixteen_bits_too(lengths, dtype):
    options = lengths, dtype
    test_packed_with_a_mask_is_the_double_sum_of_each_sequence(*options, "skip", "cpu", "tensors")
    test_packed_advantages_are_the_double_sum_of_each_sequence(*options, "cpu", "scalar")


ADVANTAGE = ("rewards", "values", "gamma", "gae_lambda")


def padded(values, lengths, side, width):
    """(B, width), a row for each sequence, NaN where there is nothing."""
    out = torch.full((len(lengths), width), math.nan, dtype=values.dtype)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for i, rows in enumerate(values.split(lengths)):
        start = width - len(rows) if side == "left" else 0
        out[i, start : start + len(rows)] = rows
        mask[i, start : start + len(rows)] = True
    return out, mask


@pairwise(side=["left", "right"], mode=MODES, dtype=DTYPES)
def test_padded_on_either_side_is_packed(side, mode, dtype):
    """Holes too: packed sequences have a mask of their own."""
    lengths = [5, 1, 33, 12, 40]
    case = make_packed(lengths, dtype)
    rewards, shown = padded(case["rewards"], lengths, side, 40)
    values, _ = padded(case["values"], lengths, side, 40)
    holes, _ = padded(case["mask"].float(), lengths, side, 40)
    mask = shown & (holes == 1)
    given = {"gamma": 0.97, "mask": mask.mT.int(), "mask_mode": mode}
    result = reward_to_go(rewards.mT, **given).mT
    packed = {"offsets": case["offsets"].int(), "mask": case["mask"].float(), "mask_mode": mode}
    flat = packed_reward_to_go(case["rewards"], gamma=0.97, **packed)
    torch.testing.assert_close(result[shown], flat, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(result[~mask], torch.zeros_like(result[~mask]))

    result = generalized_advantage(rewards.mT, values.mT, gae_lambda=0.9, **given).mT
    flat = packed_generalized_advantage(
        case["rewards"], case["values"], gamma=0.97, gae_lambda=0.9, **packed
    )
    torch.testing.assert_close(result[shown], flat, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pairwise(
    mask=[
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
    ],
    layout=["rows", "columns", "apart"],
    mode=MODES,
    backend=BACKENDS,
)
def test_a_mask_may_be_of_numbers(mask, layout, mode, backend):
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 33, 9, generator=g)
    real = torch.rand(33, 9, generator=g) < 0.6
    numbers = real.to(mask)
    if layout == "columns":
        numbers = numbers.t().contiguous().t()
    if layout == "apart":
        numbers = torch.stack([numbers, numbers + numbers], -1)[..., 0]
    options = {"mask_mode": mode, "backend": backend}
    none = torch.zeros_like(real)
    expected = reward_to_go(rewards, none, 0.9, mask=real, **options)
    assert torch.equal(reward_to_go(rewards, none, 0.9, mask=numbers, **options), expected)
    expected = generalized_advantage(rewards, values, none, 0.9, 0.8, mask=real, **options)
    result = generalized_advantage(rewards, values, none, 0.9, 0.8, mask=numbers, **options)
    assert torch.equal(result, expected)


def test_what_else_a_mask_of_numbers_may_be():
    """Minus zero, strides that no matrix has, a dtype without a kernel, and no memory at all."""
    rewards = torch.randn(6, 3, 4)
    real = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(4)) < 0.6
    expected = reward_to_go(rewards, None, 0.9, mask=real)
    for numbers in (
        torch.where(real, 1.0, -0.0),
        real.long().transpose(1, 2).contiguous().transpose(1, 2),
        real.to(torch.uint16),
        torch.complex(-real.float(), -real.float()).conj().imag,
    ):
        assert torch.equal(reward_to_go(rewards, None, 0.9, mask=numbers), expected)
    nothing = torch._efficientzerotensor((6, 3, 4))
    assert not reward_to_go(rewards, None, 0.9, mask=nothing).any()
    with pytest.raises(ValueError, match="mask: expected 0 or 1, got -1"):
        reward_to_go(rewards, None, 0.9, mask=torch._neg_view(real.float()))


@pairwise(
    shape=[(33,), (1, 1), (33, 9), (1025, 2), (2, 1025), (7, 3, 4), (0, 4), (5, 0), (0,)],
    layout=["rows", "columns", "apart"],
    options=["nothing", "mask", "values"],
    backend=BACKENDS,
)
def test_no_dones_are_dones_that_are_all_false(shape, layout, options, backend):
    g = torch.Generator().manual_seed(1)

    def laid_out(tensor):
        if layout == "columns":
            return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
        return torch.stack([tensor, tensor], -1)[..., 0] if layout == "apart" else tensor

    rewards, values = (laid_out(torch.randn(shape, generator=g)) for _ in range(2))
    given = {"backend": backend}
    if options == "mask":
        given["mask"] = laid_out(torch.rand(shape, generator=g) < 0.7)
        given["mask_mode"] = "skip"
    if options == "values":
        given["last_values"] = torch.randn(shape[1:], generator=g)
    none = torch.zeros(shape, dtype=torch.bool)
    expected = reward_to_go(rewards, none, 0.9, **given)
    assert torch.equal(reward_to_go(rewards, None, 0.9, **given), expected)
    assert torch.equal(reward_to_go(rewards, gamma=0.9, **given), expected)
    expected = generalized_advantage(rewards, values, none, 0.9, 0.8, **given)
    result = generalized_advantage(rewards, values, gamma=0.9, gae_lambda=0.8, **given)
    assert torch.equal(result, expected)


def test_a_discount_and_a_lambda_for_each_sequence():
    """(B,), which broadcasts to a (B, T) batch that is passed as `.mT`; packed, one a reward."""
    rewards, values = torch.randn(2, 3, 20)
    gammas, lambdas = torch.tensor([0.5, 0.9, 1.0]), torch.tensor([0.0, 0.7, 1.0])
    every = generalized_advantage(rewards.mT, values.mT, None, gammas, lambdas).mT
    offsets = torch.tensor([0, 20, 40, 60])
    flat = packed_generalized_advantage(
        rewards.flatten(),
        values.flatten(),
        offsets,
        gammas.repeat_interleave(offsets.diff()),
        lambdas.repeat_interleave(offsets.diff()),
    )
    torch.testing.assert_close(flat.view(3, 20), every)
    for i in range(3):
        one = generalized_advantage(
            rewards[i], values[i], None, gammas[i].item(), lambdas[i].item()
        )
        torch.testing.assert_close(every[i], one)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_packed_calls_with_a_mask(mode):
    lengths = [3, 0, 4, 1]
    case = make_packed(lengths, torch.float64)
    names = ("rewards", "values", "gamma", "gae_lambda", "final_values")
    real = case["mask"].int()
    inputs = [case[name].nan_to_num().requires_grad_() for name in names]

    def function(rewards, values, gamma, gae_lambda, final_values):
        options = {"final_values": final_values, "mask": real, "mask_mode": mode}
        return (
            packed_reward_to_go(rewards, case["offsets"], gamma, **options),
            packed_generalized_advantage(
                rewards, values, case["offsets"], gamma, gae_lambda, **options
            ),
        )

    assert torch.autograd.gradcheck(function, inputs)
    poisoned = [case[name].clone().requires_grad_() for name in names]
    returns, advantages = function(*poisoned)
    (returns.sum() + advantages.sum()).backward()
    for value in poisoned:
        assert value.grad.isfinite().all()


def test_gradients_without_dones_and_with_a_mask_of_numbers():
    real = torch.rand(6, 3, generator=torch.Generator().manual_seed(2)) < 0.6
    inputs = [torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def function(rewards, values):
        options = {"gamma": 0.9, "mask": real.double(), "mask_mode": "skip"}
        return (
            reward_to_go(rewards, **options),
            generalized_advantage(rewards, values, gae_lambda=0.8, **options),
        )

    assert torch.autograd.gradcheck(function, inputs)


def token_calls(rewards, values, numbers, offsets):
    """Every call that leaves something out or gives numbers for flags."""
    options = {"gamma": 0.9, "mask": numbers.mT, "mask_mode": "skip"}
    flat = {"mask": numbers[:, 0], "mask_mode": "decay"}
    return (
        reward_to_go(rewards.mT, **options),
        generalized_advantage(rewards.mT, values.mT, gae_lambda=0.8, **options),
        packed_reward_to_go(rewards[:, 0], offsets, 0.9, **flat),
        packed_generalized_advantage(rewards[:, 0], values[:, 0], offsets, 0.9, 0.8, **flat),
    )


# torch's compiler trips over a warning of torch's own.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_they_compile_as_one_graph():
    rewards, values = torch.randn(2, 9, 3)
    numbers = torch.randint(2, (9, 3))
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    torch._dynamo.reset()
    compiled = torch.compile(token_calls, fullgraph=True, backend="aot_eager")
    results = compiled(rewards, values, numbers, offsets)
    expected = token_calls(rewards, values, numbers, offsets)
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value)


def test_they_can_be_mapped():
    rewards, values = torch.randn(2, 5, 9, 3)
    numbers = torch.randint(2, (5, 9, 3)).float()
    offsets = torch.tensor([0, 4, 9])
    results = torch.vmap(token_calls, in_dims=(0, 0, 0, None))(rewards, values, numbers, offsets)
    for i in range(5):
        expected = token_calls(rewards[i], values[i], numbers[i], offsets)
        for result, value in zip(results, expected, strict=True):
            torch.testing.assert_close(result[i], value)


R, V = torch.zeros(4, 3), torch.zeros(4, 3)
ONES = torch.ones(4, 3)


def with_one(value, dtype=torch.float32):
    mask = ONES.to(dtype, copy=True)
    mask[2, 1] = value
    return mask


@pytest.mark.parametrize("call", ["reward_to_go", "generalized_advantage", "packed"])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (with_one(0.5), r"mask: expected 0 or 1, got 0.5 at place \(2, 1\); pass a bool mask"),
        (with_one(math.nan), r"mask: expected 0 or 1, got nan at place \(2, 1\)"),
        (with_one(-1, torch.int8), r"mask: expected 0 or 1, got -1 at place \(2, 1\)"),
        (with_one(2, torch.int64), r"mask: expected 0 or 1, got 2 at place \(2, 1\)"),
        (with_one(3, torch.int64).t().contiguous().t(), r"got 3 at place \(2, 1\)"),
        (with_one(math.inf, torch.float16), "mask: expected 0 or 1, got inf"),
    ],
)
def test_a_mask_of_other_numbers_is_named_with_its_place(call, mask, message):
    if call == "packed":
        mask, message = mask.reshape(-1), message.replace(r"\(2, 1\)", "7")
        rewards, offsets = torch.zeros(12), torch.tensor([0, 12])
        with pytest.raises(ValueError, match=message):
            packed_reward_to_go(rewards, offsets, 0.9, mask=mask)
        with pytest.raises(ValueError, match=message):
            packed_generalized_advantage(rewards, rewards, offsets, 0.9, 0.9, mask=mask)
        return
    arguments = (R,) if call == "reward_to_go" else (R, V)
    options = {} if call == "reward_to_go" else {"gae_lambda": 0.9}
    with pytest.raises(ValueError, match=message):
        globals()[call](*arguments, gamma=0.9, mask=mask, **options)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "gamma: expected a float or a tensor, got NoneType", lambda: reward_to_go(R)),
        (
            TypeError,
            "dones: expected a bool tensor or None, got float; pass gamma by name",
            lambda: reward_to_go(R, 0.9),
        ),
        (
            TypeError,
            "gae_lambda: expected a float or a tensor, got NoneType; pass gae_lambda=1.0",
            lambda: generalized_advantage(R, V, None, 0.9),
        ),
        (
            TypeError,
            "dones: expected bool, got int64; pass terminations | truncations, or dones.bool",
            lambda: reward_to_go(R, R.long(), 0.9),
        ),
        (
            TypeError,
            "mask: expected a tensor, got list; pass torch.as_tensor",
            lambda: reward_to_go(R, None, 0.9, mask=[1]),
        ),
        (
            ValueError,
            r"mask: expected shape \(4, 3\), got \(3, 4\); pass mask.mT",
            lambda: reward_to_go(R, None, 0.9, mask=ONES.mT),
        ),
        (
            ValueError,
            "mask_mode: expected one of cut, .* got 'drop'",
            lambda: packed_reward_to_go(R[:, 0], torch.tensor([0, 4]), 0.9, mask_mode="drop"),
        ),
        (
            ValueError,
            r"mask: expected shape \(4,\), got \(4, 3\)",
            lambda: packed_reward_to_go(R[:, 0], torch.tensor([0, 4]), 0.9, mask=ONES),
        ),
        (
            ValueError,
            r"gamma: .*broadcasts to \(4,\), got \(2,\); pass gamma.repeat_interleave",
            lambda: packed_reward_to_go(R[:, 0], torch.tensor([0, 1, 4]), torch.ones(2)),
        ),
        (
            ValueError,
            r"gae_lambda: .*\(4,\), got \(2,\); pass gae_lambda.repeat_interleave",
            lambda: packed_generalized_advantage(
                R[:, 0], R[:, 0], torch.tensor([0, 1, 4]), 0.9, torch.ones(2)
            ),
        ),
        (
            ValueError,
            r"rewards: expected \(total,\), got shape \(4, 3\); .* to generalized_advantage",
            lambda: packed_generalized_advantage(R, V, torch.tensor([0, 4]), 0.9, 0.9),
        ),
        (
            TypeError,
            "values: expected float32, got int64; pass rewards, values, offsets, in this order",
            lambda: packed_generalized_advantage(
                R[:, 0], torch.tensor([0, 4]), V[:, 0], gamma=0.9, gae_lambda=0.9
            ),
        ),
        (
            ValueError,
            r"values: expected shape \(4,\), got \(3,\)",
            lambda: packed_generalized_advantage(
                R[:, 0], torch.zeros(3), torch.tensor([0, 4]), 0.9, 0.9
            ),
        ),
        (
            ValueError,
            r"final_values: expected shape \(1,\), got \(4,\)",
            lambda: packed_generalized_advantage(
                R[:, 0], R[:, 0], torch.tensor([0, 4]), 0.9, 0.9, final_values=R[:, 0]
            ),
        ),
    ],
)
def test_what_is_refused_says_what_to_do(error, message, call):
    with pytest.raises(error, match=message):
        call()


JAGGED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def to_go(**given):
    return reward_to_go(**{"rewards": R, "gamma": 0.9} | given)


def packed(**given):
    offsets = torch.tensor([0, 1, 4])
    return packed_reward_to_go(**{"rewards": R[:, 0], "offsets": offsets, "gamma": 0.9} | given)


def advantages(**given):
    return generalized_advantage(R, **{"gamma": 0.9, "gae_lambda": 0.9} | given)


@pytest.mark.parametrize(
    ("call", "given", "remedy"),
    [
        (to_go, {"rewards": [R[0], R[1]]}, "torch.stack(rewards, 1), or torch.cat(rewards) to a"),
        (to_go, {"rewards": [1.0, 2.0]}, "torch.as_tensor(rewards)"),
        (to_go, {"rewards": JAGGED}, "rewards.values(), and rewards.offsets(), to a packed"),
        (to_go, {"mask": ONES[..., None]}, "mask[..., 0]"),
        (to_go, {"mask": ONES[:, 0]}, "one for each element of rewards"),
        (to_go, {"last_values": torch.ones(3, 1)}, "last_values[..., 0]"),
        (to_go, {"last_values": V}, "one for each sequence or environment, without time"),
        (to_go, {"final_values": V[-1]}, "one for each row, or what follows the last row as last_"),
        (to_go, {"gamma": torch.ones(3, 1)}, "gamma.mT"),
        (to_go, {"gamma": torch.ones(4)}, "gamma[:, None]"),
        (to_go, {"gamma": torch.ones(2)}, "a number, or one for each row or column"),
        (to_go, {"gamma": [0.9] * 3}, "torch.as_tensor(gamma)"),
        (to_go, {"gamma": "0.9"}, "float(gamma)"),
        (to_go, {"gamma": torch.tensor(1)}, "gamma.float()"),
        (to_go, {"gamma": torch.tensor([0.9, 1.5, 0.9])}, "ones such as 0.99"),
        (to_go, {"out": True}, "torch.empty_like(rewards)"),
        (
            to_go,
            {"rewards": R.clone().requires_grad_(), "out": R.clone()},
            "no out, or call it under torch.no_grad()",
        ),
        (packed, {"rewards": R[:, 0][None]}, "rewards[0]"),
        (packed, {"offsets": 0.9, "gamma": torch.tensor([0, 1, 4])}, "offsets before gamma"),
        (packed, {"offsets": [0, 1, 4]}, "torch.tensor(offsets)"),
        (packed, {"final_values": R[:, 0]}, "one for each row, or, packed, one for each sequence"),
        (advantages, {"values": torch.zeros(5, 3)}, "values[:-1], and values[-1] as last_values"),
        (advantages, {"values": None}, "V of each state, or call reward_to_go or packed_reward_to"),
    ],
)
def test_the_way_out_fits_the_mistake(call, given, remedy):
    with pytest.raises((TypeError, ValueError), match="; pass " + re.escape(remedy)):
        call(**given)
