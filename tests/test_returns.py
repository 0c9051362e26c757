import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vecpg.returns import reward_to_go

# The error of rounding the result once, with a little room.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-7, torch.bfloat16: 5e-3, torch.float16: 6e-4}
MODES = ("cut", "skip", "decay")


def definition(rewards, dones, gamma, final_values, last_values, mask, mode):
    """G[t] as a double sum over what follows, for each environment: not a recurrence."""
    length, num_envs = rewards.shape
    out = torch.zeros(length, num_envs, dtype=torch.float64)
    for n in range(num_envs):
        for t in range(length):
            if not mask[t, n]:
                continue
            discount, total, k = 1.0, 0.0, t
            while True:
                if mask[k, n]:
                    total += discount * rewards[k, n].item()
                    discount *= gamma[k, n].item()
                    if dones[k, n]:
                        total += discount * final_values[k, n].item()
                        break
                elif mode == "cut":
                    break
                elif mode == "decay":
                    discount *= gamma[k, n].item()
                k += 1
                if k == length:
                    total += discount * last_values[n].item()
                    break
            out[t, n] = total
    return out


def make_case(seed, length, num_envs, dtype=torch.float32, done=0.2, masked=0.3):
    g = torch.Generator().manual_seed(seed)
    shape = (length, num_envs)
    case = {
        "rewards": torch.randn(shape, generator=g).to(dtype),
        "dones": torch.rand(shape, generator=g) < done,
        "gamma": torch.rand(shape, generator=g, dtype=torch.float64),
        "final_values": torch.randn(shape, generator=g).to(dtype),
        "last_values": torch.randn(num_envs, generator=g).to(dtype),
        "mask": torch.rand(shape, generator=g) >= masked,
    }
    return case


def poison(case):
    """NaN wherever nothing may be read."""
    unread = ~case["mask"]
    case["rewards"] = case["rewards"].masked_fill(unread, math.nan)
    case["final_values"] = case["final_values"].masked_fill(unread | ~case["dones"], math.inf)
    return case


def assert_equals_definition(result, case, mode):
    expected = definition(**case, mode=mode)
    scale = max(1.0, expected.abs().max().item())
    error = (result.double() - expected).abs().max().item()
    assert error <= TOLERANCE[result.dtype] * scale


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("length", "num_envs"), [(1, 1), (2, 3), (63, 33), (130, 2)])
def test_it_is_the_definition(length, num_envs, dtype, mode):
    case = poison(make_case(length, length, num_envs, dtype))
    assert_equals_definition(reward_to_go(**case, mask_mode=mode), case, mode)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 12),
    num_envs=st.integers(1, 5),
    mode=st.sampled_from(MODES),
    done=st.sampled_from([0.0, 0.3, 1.0]),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    given=st.sets(st.sampled_from(["final_values", "last_values", "mask"])),
    gamma=st.one_of(st.none(), st.floats(0, 1)),
    layout=st.sampled_from(["plain", "transposed", "sliced", "flipped"]),
)
def test_any_combination_is_the_definition(
    seed, length, num_envs, mode, done, masked, given, gamma, layout
):
    case = make_case(seed, length, num_envs, done=done, masked=masked)
    for name in {"final_values", "last_values"} - given:
        case[name] = torch.zeros_like(case[name])
    if "mask" not in given:
        case["mask"] = torch.ones_like(case["mask"])
    if gamma is not None:
        case["gamma"] = torch.full((length, num_envs), gamma, dtype=torch.float64)
    poison(case)

    def laid_out(value):
        if layout == "transposed":
            return value.t().contiguous().t() if value.ndim == 2 else value
        if layout == "sliced":
            wide = torch.stack([value, torch.zeros_like(value)], dim=-1)
            return wide[..., 0]
        return value.flip(0).contiguous().flip(0) if layout == "flipped" else value

    passed = {name: laid_out(value) for name, value in case.items()}
    for name in {"final_values", "last_values", "mask"} - given:
        del passed[name]
    if gamma is not None:
        passed["gamma"] = gamma
    assert_equals_definition(reward_to_go(**passed, mask_mode=mode), case, mode)


def test_more_batch_dimensions_and_none():
    case = make_case(0, 20, 6)
    flat = reward_to_go(**case)
    wide = {name: value.reshape(*value.shape[:-1], 2, 3) for name, value in case.items()}
    assert torch.equal(reward_to_go(**wide).reshape(20, 6), flat)
    one = {name: value[..., 4] for name, value in case.items()}
    assert torch.equal(reward_to_go(**one), flat[:, 4])


def test_hand_computed():
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0])
    dones = torch.tensor([False, True, False, False])
    values = {"final_values": torch.full((4,), 16.0), "last_values": torch.tensor(32.0)}
    # 1 + 0.5 * (2 + 0.5 * 16), 2 + 0.5 * 16, 4 + 0.5 * (8 + 0.5 * 32), 8 + 0.5 * 32
    assert reward_to_go(rewards, dones, 0.5, **values).tolist() == [6.0, 10.0, 16.0, 24.0]
    masked = torch.tensor([True, True, False, True])
    assert reward_to_go(rewards, torch.zeros(4, dtype=bool), 0.5, mask=masked).tolist() == [
        2.0,
        2.0,
        0.0,
        8.0,
    ]


@pytest.mark.parametrize("shape", [(0,), (0, 4), (5, 0), (0, 0)])
def test_empty_inputs_are_legal(shape):
    result = reward_to_go(torch.zeros(shape), torch.zeros(shape, dtype=bool), 0.9)
    assert result.shape == shape


def test_all_masked_is_all_zero_even_where_everything_is_nan():
    nan = torch.full((6, 2), math.nan)
    none = torch.zeros(6, 2, dtype=bool)
    for mode in MODES:
        result = reward_to_go(nan, ~none, 0.9, final_values=nan, mask=none, mask_mode=mode)
        assert torch.equal(result, torch.zeros(6, 2))


def test_gamma_one_and_zero():
    rewards = torch.randn(50, 3)
    none = torch.zeros(50, 3, dtype=bool)
    assert torch.equal(reward_to_go(rewards, none, 0.0), rewards)
    sums = rewards.double().flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(reward_to_go(rewards, none, 1.0).double(), sums, atol=1e-5, rtol=0)


def test_gamma_is_held_in_float64():
    ones, none = torch.ones(20000, 1), torch.zeros(20000, 1, dtype=bool)
    exact = (1 - 0.9999**20000) / (1 - 0.9999)
    assert reward_to_go(ones, none, 0.9999)[0].item() == pytest.approx(exact, rel=1e-7)


def test_out_is_written_and_returned():
    case = make_case(1, 30, 4)
    out = torch.full((30, 4), math.nan)
    assert reward_to_go(**case, out=out) is out
    assert torch.equal(out, reward_to_go(**case))


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode):
    case = make_case(2, 7, 3, torch.float64)
    names = ("rewards", "final_values", "last_values", "gamma")
    inputs = [case[name].requires_grad_() for name in names]

    def function(*values):
        given = dict(zip(names, values, strict=True))
        return reward_to_go(
            given.pop("rewards"), case["dones"], mask=case["mask"], mask_mode=mode, **given
        )

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_what_is_not_read_are_zero_not_nan(mode):
    case = poison(make_case(3, 9, 4))
    case["dones"][-1] = True
    case["mask"][-1] = True
    case["rewards"][-1] = 1.0
    case["final_values"][-1] = 1.0
    case["last_values"].fill_(math.nan)
    inputs = [case[name].requires_grad_() for name in ("rewards", "final_values", "gamma")]
    reward_to_go(**case, mask_mode=mode).sum().backward()
    assert torch.equal(case["rewards"].grad[~case["mask"]].abs().sum(), torch.tensor(0.0))
    for value in inputs:
        assert value.grad.isfinite().all()


R, D = torch.zeros(4, 3), torch.zeros(4, 3, dtype=bool)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "rewards: expected a tensor, got list", {"rewards": [1.0]}),
        (TypeError, "rewards: expected float32.*got int64", {"rewards": R.long()}),
        (ValueError, "rewards: expected .T, .batch.", {"rewards": torch.tensor(1.0)}),
        (TypeError, "dones: expected bool.*terminations | truncations", {"dones": R}),
        (ValueError, r"dones: expected shape \(4, 3\), got \(3, 4\)", {"dones": D.mT}),
        (ValueError, "dones: expected a tensor on cpu", {"dones": D.to("meta")}),
        (TypeError, "mask: expected bool, got float32; pass mask.bool", {"mask": R}),
        (TypeError, "final_values: expected float32, got float64", {"final_values": R.double()}),
        (ValueError, r"last_values: expected shape \(3,\)", {"last_values": R}),
        (ValueError, "mask_mode: expected one of cut, skip, decay", {"mask_mode": "drop"}),
        (ValueError, r"gamma: expected a number in \[0, 1\], got 1.01", {"gamma": 1.01}),
        (ValueError, "gamma: expected a number", {"gamma": math.nan}),
        (TypeError, "gamma: expected a float or a tensor, got str", {"gamma": "0.9"}),
        (TypeError, "gamma: expected a float tensor, got int64", {"gamma": torch.tensor(1)}),
        (ValueError, r"gamma: expected numbers in \[0, 1\]", {"gamma": torch.tensor([0.5, -1, 1])}),
        (ValueError, "gamma: .*broadcasts to", {"gamma": torch.ones(4)}),
        (ValueError, "out: expected shape", {"out": torch.zeros(3, 4)}),
        (ValueError, "out: .*overlaps rewards", {"out": R}),
        (ValueError, "out: .*expanded", {"out": torch.zeros(4, 1).expand(4, 3)}),
        (ValueError, "backend: expected one of auto", {"backend": "gpu"}),
        (RuntimeError, "backend: .*\"cpu\", which is not|'cpu', which", {"backend": "cpu"}),
        (RuntimeError, "backend", {"backend": "cuda"}),
    ],
)
def test_bad_input_is_named_with_what_was_expected(error, message, arguments):
    with pytest.raises(error, match=message):
        reward_to_go(**{"rewards": R, "dones": D, "gamma": 0.9} | arguments)


def test_out_and_gradients_do_not_go_together():
    rewards = torch.zeros(4, 3, requires_grad=True)
    with pytest.raises(ValueError, match="no gradients"):
        reward_to_go(rewards, D, 0.9, out=torch.empty(4, 3))
