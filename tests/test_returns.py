import itertools
import logging
import math
import multiprocessing
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import pairwise

from vecpg.kernels.announce import anew
from vecpg.returns import generalized_advantage, packed_reward_to_go, ranges, reward_to_go

# The error of rounding the result once, with a little room.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-7, torch.bfloat16: 5e-3, torch.float16: 6e-4}
# float16 has machine code of its own, which takes its time to compile: slow tests have it.
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
MODES = ("cut", "skip", "decay")
BACKENDS = ("reference", "cpu")


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


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_float16_too(mode):
    test_it_is_the_definition((63, 33), torch.float16, mode, "cpu")
    test_packed_episodes_are_the_padded_ones([3, 0, 4, 300], torch.float16, "cpu")


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


@pairwise(shape=[(1, 1), (2, 3), (63, 33), (130, 2)], dtype=DTYPES, mode=MODES, backend=BACKENDS)
def test_it_is_the_definition(shape, dtype, mode, backend):
    case = poison(make_case(shape[0], *shape, dtype))
    assert_equals_definition(reward_to_go(**case, mask_mode=mode, backend=backend), case, mode)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 20),  # more than eight steps of eight environments: a loop of its own
    num_envs=st.integers(1, 18),
    mode=st.sampled_from(MODES),
    done=st.sampled_from([0.0, 0.3, 1.0]),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    given=st.sets(st.sampled_from(["final_values", "last_values", "mask"])),
    gamma=st.one_of(st.none(), st.floats(0, 1)),
    layout=st.sampled_from(["plain", "transposed", "sliced", "flipped", "mixed"]),
    backend=st.sampled_from(BACKENDS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_combination_is_the_definition(
    seed, length, num_envs, mode, done, masked, given, gamma, layout, backend, dtype
):
    case = make_case(seed, length, num_envs, dtype, done=done, masked=masked)
    for name in {"final_values", "last_values"} - given:
        case[name] = torch.zeros_like(case[name])
    if "mask" not in given:
        case["mask"] = torch.ones_like(case["mask"])
    if gamma is not None:
        case["gamma"] = torch.full((length, num_envs), gamma, dtype=torch.float64)
    poison(case)

    def laid_out(value):
        if layout == "transposed" or (layout == "mixed" and value.dtype != torch.bool):
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
    result = reward_to_go(**passed, mask_mode=mode, backend=backend)
    assert_equals_definition(result, case, mode)


def laid_out(values, layout):
    """The same numbers, differently in memory."""
    if layout == "rows":
        return values.contiguous()
    if layout == "columns":
        return values.t().contiguous().t()
    wide = torch.full((values.shape[0] * 2, values.shape[1] * 3), True).to(values.dtype)
    wide[::2, 1::3] = values
    return wide[::2, 1::3]


@pairwise(
    # Around what is done two, eight, 32 and a block at a time.
    shape=[
        (1, 8),
        (2, 7),
        (7, 9),
        (8, 8),
        (16, 16),
        (17, 24),
        (1025, 8),
        (9, 31),
        (9, 33),
        (4, 100),
        (3, 256),
        (3, 1025),
        (2, 4100),
        (5, 4097),
    ],
    loop=list(itertools.product(["rows", "columns", "apart"], [False, True])),
    dtype=[torch.float32, torch.float64],
)
def test_every_loop_is_the_reference(shape, loop, dtype):
    (length, num_envs), (layout, masked) = shape, loop
    case = poison(make_case(length + num_envs, length, num_envs, dtype))
    del case["final_values"], case["gamma"]
    if not masked:
        del case["mask"]
        case["rewards"] = torch.where(case["rewards"].isnan(), 0.5, case["rewards"])
    given = {
        name: laid_out(value, layout) if name != "last_values" else value
        for name, value in case.items()
    }
    for mode in MODES if masked else ("cut",):
        out = laid_out(torch.full((length, num_envs), math.nan, dtype=dtype), layout)
        result = reward_to_go(**given, gamma=0.97, mask_mode=mode, out=out, backend="cpu")
        expected = reward_to_go(**case, gamma=0.97, mask_mode=mode, backend="reference")
        torch.testing.assert_close(result, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("masked", [False, True])
def test_infinity_and_nan_stay_in_their_episode(layout, masked):
    rewards = torch.ones(32, 16)
    rewards[20, 3], rewards[21, 4] = math.inf, math.nan
    dones = torch.zeros(32, 16, dtype=bool)
    dones[15], dones[28] = True, True
    mask = torch.ones(32, 16, dtype=bool) if masked else None
    result = reward_to_go(
        laid_out(rewards, layout),
        laid_out(dones, layout),
        0.9,
        mask=None if mask is None else laid_out(mask, layout),
    )
    assert not result[16:21, 3].isfinite().any()
    assert result[16:22, 4].isnan().all()
    rest = result.clone()
    rest[16:21, 3], rest[16:22, 4] = 0, 0
    assert rest.isfinite().all()


@pairwise(gamma=[0.9, 0.999, 1.0], length=[1000, 100_000], backend=BACKENDS)
def test_long_returns_keep_their_digits(length, gamma, backend):
    """Against sums of the definition in float64, at some places of one long episode."""
    rewards = torch.rand(length, 2, generator=torch.Generator().manual_seed(length))
    none = torch.zeros(length, 2, dtype=bool)
    result = reward_to_go(rewards, none, gamma, backend=backend)
    scale = result.abs().max().item()
    for t in (0, 1, length // 3, length - 2, length - 1):
        powers = torch.full((length - t,), gamma, dtype=torch.float64).pow(
            torch.arange(length - t, dtype=torch.float64)
        )
        exact = (powers[:, None] * rewards[t:].double()).sum(0)
        assert (result[t] - exact).abs().max().item() <= 1e-7 * scale


def test_a_result_does_not_depend_on_threads_or_repetition(monkeypatch):
    monkeypatch.setattr(ranges, "THREAD_ELEMENTS", 100)
    case = poison(make_case(0, 50, 33))
    plain = {name: case[name] for name in ("rewards", "dones", "mask")}
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append((reward_to_go(**case), reward_to_go(**plain, gamma=0.9)))
    torch.set_num_threads(before)
    for general, rows in results[1:]:
        assert torch.equal(general, results[0][0])
        assert torch.equal(rows, results[0][1])


def in_child(queue):
    rewards = torch.ones(100, 100)
    queue.put(reward_to_go(rewards, torch.zeros(100, 100, dtype=bool), 0.5)[0, 0].item())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_threads_do_not_outlive_a_fork(monkeypatch):
    """A child of fork has a pool without threads; waiting for it would never end."""
    monkeypatch.setattr(ranges, "THREAD_ELEMENTS", 100)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        in_child(multiprocessing.SimpleQueue())  # the pool is there now
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=in_child, args=(queue,))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert queue.get() == pytest.approx(2.0)
    finally:
        if child.is_alive():
            child.kill()
        torch.set_num_threads(before)


def test_strides_that_no_matrix_has():
    wide = make_case(5, 11, 24)
    shaped = {
        name: value.reshape(*value.shape[:-1], 4, 6).transpose(-1, -2)
        for name, value in wide.items()
    }
    assert not shaped["rewards"].is_contiguous()
    with pytest.raises(RuntimeError):
        shaped["rewards"].view(11, 24)
    result = reward_to_go(**shaped).transpose(-1, -2).reshape(11, 24)
    assert torch.equal(result, reward_to_go(**wide))


@pytest.mark.parametrize("function", [reward_to_go, generalized_advantage])
def test_gradients_where_last_values_lie_as_no_vector_does(function):
    """Parts of (T, 3, 2, 4) are matrices, but those of the (3, 2, 4) last values no vectors."""
    g = torch.Generator().manual_seed(0)
    rewards, values = (
        torch.randn(2, 5, 3, 4, generator=g, dtype=torch.float64).permute(1, 2, 0, 3)
        for _ in range(2)
    )
    dones = (torch.rand(2, 5, 3, 4, generator=g) < 0.1).permute(1, 2, 0, 3)
    last = torch.randn(3, 2, 4, generator=g, dtype=torch.float64, requires_grad=True)
    given = (
        (rewards, dones, 0.9) if function is reward_to_go else (rewards, values, dones, 0.9, 0.8)
    )
    found = []
    for backend in BACKENDS:
        result = function(*given, last_values=last, backend=backend)
        found.append([result, *torch.autograd.grad(result.sum(), last)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("num_envs", [5, 40, 4100])
def test_last_values_may_lie_apart(layout, num_envs):
    rewards = laid_out(torch.rand(9, num_envs), layout)
    dones = laid_out(torch.rand(9, num_envs) < 0.1, layout)
    apart = torch.rand(num_envs, 3)[:, 1]
    expected = reward_to_go(rewards, dones, 0.9, last_values=apart.clone())
    assert torch.equal(reward_to_go(rewards, dones, 0.9, last_values=apart), expected)


def test_expanded_rewards_are_read_in_place():
    rewards = torch.tensor(2.0).expand(9, 5)
    dones = torch.tensor(False).expand(9, 5)
    expected = reward_to_go(rewards.clone(), dones.clone(), 0.5)
    assert torch.equal(reward_to_go(rewards, dones, 0.5), expected)


@pairwise(
    lengths=[
        [3, 0, 4, 3],
        [0, 0],
        [1] * 50,
        [300],
        [7] * 40 + [0, 1000],
        [1 + i * i % 31 for i in range(50)],  # eight runs of it differ in length, none is short
    ],
    dtype=DTYPES,
    backend=BACKENDS,
)
def test_packed_episodes_are_the_padded_ones(lengths, dtype, backend):
    g = torch.Generator().manual_seed(len(lengths))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    rewards = torch.randn(sum(lengths), generator=g).to(dtype)
    values = torch.randn(len(lengths), generator=g).to(dtype)
    values[torch.tensor(lengths) == 0] = math.nan
    gammas = torch.rand(sum(lengths), generator=g, dtype=torch.float64)
    for gamma in (0.9, gammas):
        for final in (None, values):
            result = packed_reward_to_go(
                rewards, offsets, gamma, final_values=final, backend=backend
            )
            assert result.dtype == dtype
            for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
                one = reward_to_go(
                    rewards[start:stop, None],
                    torch.zeros(lengths[i], 1, dtype=bool),
                    gamma if isinstance(gamma, float) else gamma[start:stop, None],
                    last_values=None if final is None else final[i : i + 1],
                    backend="reference",
                )[:, 0]
                torch.testing.assert_close(
                    result[start:stop], one, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
                )


def test_packed_with_gaps_and_gradients():
    rewards = torch.randn(20, dtype=torch.float64)
    offsets = torch.tensor([0, 4, 4, 10])
    apart = rewards[::2]
    assert torch.equal(
        packed_reward_to_go(apart, offsets, 0.9), packed_reward_to_go(apart.clone(), offsets, 0.9)
    )
    inputs = (
        rewards[:10].clone().requires_grad_(),
        torch.randn(3, dtype=torch.float64, requires_grad=True),
        torch.rand(10, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(
        lambda r, v, g: packed_reward_to_go(r, offsets, g, final_values=v), inputs
    )


@pytest.mark.parametrize(
    ("error", "message", "offsets"),
    [
        (TypeError, "offsets: expected a tensor, got list", [0, 3]),
        (
            TypeError,
            "offsets: expected int64 or int32, got int16; pass offsets.long",
            torch.tensor([0, 3]).short(),
        ),
        (ValueError, r"offsets: expected shape \(B \+ 1,\), got \(0,\)", torch.tensor([]).long()),
        (ValueError, "offsets: expected numbers from 0 to 3.* got 1 to 3", torch.tensor([1, 3])),
        (ValueError, "offsets: expected numbers from 0 to 3.* got 0 to 4", torch.tensor([0, 4])),
        (ValueError, "never decrease, got 2 and then 1 at place 2", torch.tensor([0, 2, 1, 3])),
    ],
)
def test_bad_offsets_are_named(error, message, offsets):
    with pytest.raises(error, match=message):
        packed_reward_to_go(torch.zeros(3), offsets, 0.9)


def test_bad_packed_input_is_named():
    with pytest.raises(ValueError, match=r"rewards: expected \(total,\), got shape \(3, 1\)"):
        packed_reward_to_go(torch.zeros(3, 1), torch.tensor([0, 3]), 0.9)
    with pytest.raises(ValueError, match=r"final_values: expected shape \(1,\), got \(3,\)"):
        packed_reward_to_go(torch.zeros(3), torch.tensor([0, 3]), 0.9, final_values=torch.zeros(3))


def monte_carlo(case, mode):
    """Returns of every real row, walked forwards, episode by episode."""
    length, num_envs = case["rewards"].shape
    out = torch.zeros(length, num_envs, dtype=torch.float64)
    for n in range(num_envs):
        for start in range(length):
            if not case["mask"][start, n]:
                continue
            factor, t = 1.0, start
            while t < length:
                real = bool(case["mask"][t, n])
                if not real and mode == "cut":
                    break
                if real:
                    out[start, n] += factor * case["rewards"][t, n].item()
                if real or mode == "decay":
                    factor *= case["gamma"][t, n].item()
                if real and case["dones"][t, n]:
                    out[start, n] += factor * case["final_values"][t, n].item()
                    break
                t += 1
            else:
                out[start, n] += factor * case["last_values"][n].item()
    return out


@pairwise(masked=[0.0, 0.4], mode=MODES, backend=BACKENDS)
def test_advantages_with_lambda_one_are_monte_carlo_returns_minus_values(mode, masked, backend):
    case = poison(make_case(7, 40, 6, torch.float64, masked=masked))
    values = torch.randn(40, 6, dtype=torch.float64).masked_fill(~case["mask"], math.nan)
    result = generalized_advantage(
        values=values, gae_lambda=1.0, mask_mode=mode, backend=backend, **case
    )
    expected = torch.where(case["mask"], monte_carlo(case, mode) - values, 0.0)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_advantages_are_the_sum_of_discounted_errors(backend):
    """No mask: A[t] = sum of (gamma lambda)^k delta[t + k], summed term by term."""
    case = poison(make_case(8, 30, 4, masked=0.0))
    values = torch.randn(30, 4)
    lambdas = torch.rand(30, 4, dtype=torch.float64)
    arguments = {name: case[name] for name in case if name != "mask"}
    result = generalized_advantage(values=values, gae_lambda=lambdas, backend=backend, **arguments)
    for n in range(4):
        for start in range(30):
            total, factor = 0.0, 1.0
            for t in range(start, 30):
                g = case["gamma"][t, n].item()
                if case["dones"][t, n]:
                    following = case["final_values"][t, n].item()
                else:
                    after = values[t + 1, n] if t < 29 else case["last_values"][n]
                    following = after.item()
                delta = case["rewards"][t, n].item() + g * following - values[t, n].item()
                total += factor * delta
                factor *= g * lambdas[t, n].item()
                if case["dones"][t, n]:
                    break
            assert result[start, n].item() == pytest.approx(total, abs=1e-6)


def test_advantages_are_differentiable_and_write_to_out():
    case = make_case(9, 6, 2, torch.float64)
    values = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    rewards = case.pop("rewards").requires_grad_()
    for mode in MODES:
        assert torch.autograd.gradcheck(
            lambda r, v, mode=mode: generalized_advantage(
                r, v, gae_lambda=0.9, mask_mode=mode, **case
            ),
            (rewards, values),
        )
    out = torch.full((6, 2), math.nan, dtype=torch.float64)
    rewards, values = rewards.detach(), values.detach()
    assert generalized_advantage(rewards, values, gae_lambda=0.9, out=out, **case) is out
    assert torch.equal(out, generalized_advantage(rewards, values, gae_lambda=0.9, **case))
    with pytest.raises(ValueError, match="out: .*may overlap values"):
        generalized_advantage(rewards, values, gae_lambda=0.9, out=values, **case)
    with pytest.raises(ValueError, match=r"gae_lambda: expected a number in \[0, 1\], got 2"):
        generalized_advantage(rewards, values, gae_lambda=2, **case)
    with pytest.raises(ValueError, match=r"values: expected shape \(6, 2\), got \(2, 6\)"):
        generalized_advantage(rewards, values.t(), gae_lambda=1, **case)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (5, 0)])
def test_empty_advantages_are_legal(shape):
    empty = torch.zeros(shape)
    result = generalized_advantage(empty, empty, torch.zeros(shape, dtype=bool), 0.9, 0.9)
    assert result.shape == shape
    assert packed_reward_to_go(torch.zeros(0), torch.tensor([0]), 0.9).shape == (0,)
    assert packed_reward_to_go(torch.zeros(0), torch.tensor([0, 0, 0]), 0.9).shape == (0,)


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives(mode):
    case = make_case(4, 5, 2, torch.float64)
    names = ("rewards", "gamma", "last_values")
    inputs = tuple(case.pop(name).requires_grad_() for name in names)
    assert torch.autograd.gradgradcheck(
        lambda r, g, v: reward_to_go(r, gamma=g, last_values=v, mask_mode=mode, **case), inputs
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_operator_keeps_torchs_rules(mode):
    case = make_case(6, 9, 3)
    arguments = (
        case["rewards"],
        case["dones"],
        0.9,
        case["gamma"],
        case["final_values"],
        case["last_values"],
        case["mask"],
        mode,
    )
    torch.library.opcheck(torch.ops.vecpg.reward_to_go.default, arguments)
    nothing = (case["rewards"], case["dones"], 0.9, None, None, None, None, mode)
    torch.library.opcheck(torch.ops.vecpg.reward_to_go.default, nothing)


# torch's compiler trips over a warning of torch's own.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("gradients", [False, True])
def test_it_compiles_as_one_graph(gradients):
    case = make_case(6, 9, 3)
    values = torch.randn(9, 3)
    offsets = torch.tensor([0, 4, 9])
    rewards = case.pop("rewards").requires_grad_(gradients)

    def function(rewards):
        returns = reward_to_go(rewards, mask_mode="skip", **case)
        packed = packed_reward_to_go(rewards[:, 0], offsets, 0.9)
        return (
            returns
            + packed[:, None]
            + generalized_advantage(rewards, values, gae_lambda=0.95, **case)
        )

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rewards), function(rewards))
    if gradients:
        ours = torch.autograd.grad(compiled(rewards).square().sum(), rewards)
        plain = torch.autograd.grad(function(rewards).square().sum(), rewards)
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("in_dims", [(0, None), (2, 1)])
def test_it_can_be_mapped_over_another_dimension(in_dims):
    rewards = torch.randn(5, 9, 3).movedim(0, in_dims[0])
    last = torch.randn(5, 3).movedim(0, in_dims[1] or 0)
    last = last if in_dims[1] is not None else last[0]
    case = make_case(6, 9, 3)

    def one(rewards, last):
        return reward_to_go(rewards, case["dones"], 0.9, last_values=last, mask=case["mask"])

    mapped = torch.vmap(one, in_dims=in_dims)(rewards, last)
    for i in range(5):
        own = last if in_dims[1] is None else last.select(in_dims[1], i)
        torch.testing.assert_close(mapped[i], one(rewards.select(in_dims[0], i), own))
    grads = torch.vmap(torch.func.grad(lambda r, v: one(r, v).square().sum()), in_dims=in_dims)(
        rewards, last
    )
    own = last if in_dims[1] is None else last.select(in_dims[1], 0)
    first = rewards.select(in_dims[0], 0).clone().requires_grad_()
    (expected,) = torch.autograd.grad(one(first, own).square().sum(), first)
    torch.testing.assert_close(grads[0], expected)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_torchs_defaults_do_not_matter(dtype):
    case = make_case(1, 20, 3, dtype)
    offsets = torch.tensor([0, 7, 20])
    expected = reward_to_go(**case), packed_reward_to_go(case["rewards"][:, 0], offsets, 0.9)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            results = reward_to_go(**case), packed_reward_to_go(case["rewards"][:, 0], offsets, 0.9)
    finally:
        torch.set_default_dtype(torch.float32)
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


def test_autograd_hears_of_a_written_out():
    rewards, dones = torch.ones(4, 2), torch.zeros(4, 2, dtype=bool)
    mask = torch.ones(4, 2, dtype=bool)
    for options in ({}, {"mask": mask}):
        weight, out = torch.ones(4, 2, requires_grad=True), torch.ones(4, 2)
        total = (weight * out).sum()
        reward_to_go(rewards, dones, 0.5, out=out, **options)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
        with pytest.raises(ValueError, match="out: expected a tensor without gradients"):
            reward_to_go(rewards, dones, 0.5, out=torch.ones(4, 2, requires_grad=True), **options)


def test_tensors_that_are_views_with_a_sign():
    numbers = torch.randn(6, 3, dtype=torch.complex64)
    negated = numbers.conj().imag
    assert negated.is_neg()
    dones = torch.zeros(6, 3, dtype=bool)
    expected = reward_to_go(negated.clone(), dones, 0.5)
    torch.testing.assert_close(reward_to_go(negated, dones, 0.5), expected)
    place = torch.zeros(6, 3, dtype=torch.complex64).conj().imag
    reward_to_go(negated.clone(), dones, 0.5, out=place)
    torch.testing.assert_close(place.clone(), expected)


def test_an_out_that_is_no_plain_tensor_is_copied_to():
    from torch.testing._internal.two_tensor import TwoTensor  # its memory is elsewhere

    out = TwoTensor(torch.zeros(4, 2), torch.zeros(4, 2))
    result = reward_to_go(torch.ones(4, 2), torch.zeros(4, 2, dtype=bool), 0.5, out=out)
    assert result is out
    assert out.a[0, 0] == out.b[0, 0] == 1.875


def test_tracing_records_the_operator():
    from torch.fx.experimental.proxy_tensor import make_fx

    dones = torch.zeros(4, 2, dtype=bool)
    graph = make_fx(lambda rewards: reward_to_go(rewards, dones, 0.5))(torch.ones(4, 2))
    rewards = torch.randn(4, 2)
    assert torch.equal(graph(rewards), reward_to_go(rewards, dones, 0.5))


def test_gamma_can_be_mapped():
    rewards, dones = torch.randn(5, 3), torch.rand(5, 3) < 0.3
    gammas = torch.tensor([0.5, 0.9])
    mapped = torch.vmap(lambda gamma: reward_to_go(rewards, dones, gamma))(gammas)
    lambdas = torch.vmap(lambda each: generalized_advantage(rewards, rewards, dones, each, each))(
        gammas
    )
    for i in range(2):
        torch.testing.assert_close(mapped[i], reward_to_go(rewards, dones, gammas[i]))
        one = generalized_advantage(rewards, rewards, dones, gammas[i], gammas[i])
        torch.testing.assert_close(lambdas[i], one)


@pytest.mark.parametrize("mode", MODES)
def test_advantages_keep_nan_out_of_every_gradient(mode):
    case = poison(make_case(3, 9, 4))
    values = torch.randn(9, 4).masked_fill(~case["mask"], math.nan).requires_grad_()
    case["mask"][-1], case["dones"][-1] = False, False
    case["last_values"].fill_(math.nan if mode == "cut" else 1.0)
    inputs = [case[name].requires_grad_() for name in ("rewards", "final_values", "gamma")]
    result = generalized_advantage(values=values, gae_lambda=0.9, mask_mode=mode, **case)
    assert result.isfinite().all()
    result.sum().backward()
    for value in (values, *inputs):
        assert value.grad.isfinite().all()


def test_what_auto_chose_is_said_once(caplog):
    with anew(), caplog.at_level(logging.INFO, "vecpg"):
        for _ in range(2):
            reward_to_go(torch.ones(3), torch.zeros(3, dtype=bool), 0.9)
    assert [record.message for record in caplog.records] == ["returns on cpu: machine code"]


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
        (TypeError, "mask: expected bool, or integers or floats.*complex64", {"mask": R.cfloat()}),
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
        (ValueError, "out: .*may overlap rewards", {"out": R}),
        (ValueError, "out: .*one place for each", {"out": torch.zeros(4, 1).expand(4, 3)}),
        (ValueError, "out: .*one place", {"out": torch.as_strided(torch.zeros(9), (4, 3), (1, 1))}),
        (TypeError, "out: .*got float64; pass torch.empty_like", {"out": R.double()}),
        (TypeError, "rewards: expected a dense tensor.*to_dense", {"rewards": R.to_sparse()}),
        (TypeError, "rewards: .*complex64; pass rewards.real", {"rewards": R.cfloat()}),
        (ValueError, "backend: expected one of auto", {"backend": "gpu"}),
        (RuntimeError, "expected one for cpu tensors, got 'cuda'", {"backend": "cuda"}),
    ],
)
def test_bad_input_is_named_with_what_was_expected(error, message, arguments):
    with pytest.raises(error, match=message):
        reward_to_go(**{"rewards": R, "dones": D, "gamma": 0.9} | arguments)


@pytest.mark.parametrize(("begin", "out_begin"), [(0, 11), (11, 0)])
def test_an_out_that_overlaps_an_input_in_part_is_refused(begin, out_begin):
    memory = torch.zeros(24)
    rewards, out = (memory[start : start + 12].view(4, 3) for start in (begin, out_begin))
    with pytest.raises(ValueError, match="out: .*may overlap rewards"):
        reward_to_go(rewards, D, 0.9, out=out)


def test_out_and_gradients_do_not_go_together():
    rewards = torch.zeros(4, 3, requires_grad=True)
    with pytest.raises(ValueError, match="no gradients"):
        reward_to_go(rewards, D, 0.9, out=torch.empty(4, 3))


def test_zeros_without_memory_are_read_as_zeros():
    """As autograd makes them: their address is 0."""
    nothing = torch._efficientzerotensor((3, 4))
    dones = torch.zeros(3, 4, dtype=torch.bool)
    reward_to_go(torch.zeros(3, 4), dones, 0.9)
    assert torch.equal(reward_to_go(nothing, dones, 0.9), torch.zeros(3, 4))
    last = torch.ones(4)
    found = reward_to_go(torch.zeros(3, 4), dones, 0.5, final_values=nothing, last_values=last)
    assert found[:, 0].tolist() == [0.125, 0.25, 0.5]
    flat = torch._efficientzerotensor((5,))
    assert torch.equal(packed_reward_to_go(flat, torch.tensor([0, 5]), 0.9), torch.zeros(5))
