"""Advantages and lambda-returns: every loop, layout, mode and derivative of them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import pairwise
from test_returns import TOLERANCE, laid_out, make_case, poison

from vecpg.returns import (
    cpu_advantages,
    generalized_advantage,
    lambda_returns,
    operator,
    packed_generalized_advantage,
    packed_reward_to_go,
    ranges,
    reward_to_go,
)

MODES = ("cut", "skip", "decay", "zero")
NAMES = ("rewards", "values", "final_values", "last_values")
# 16 bits have machine code of their own, which takes its time to compile: slow tests have it.
DTYPES = [torch.float64, torch.float32]


# Which torch's own forward mode uses.
of_forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def definition(case, mode):
    """The sum over what follows of discounted errors, term by term, in float64: no recurrence."""
    r, v, dones, real = (case[name] for name in ("rewards", "values", "dones", "mask"))
    gamma, decay = case["gamma"].expand(r.shape), case["gae_lambda"].expand(r.shape)
    out = torch.zeros(r.shape, dtype=torch.float64)
    length = len(r)

    def shown(t, n):
        """The value after row t, by what masked rows let through."""
        factor = 1.0
        for after in range(t + 1, length):
            if real[after, n]:
                return factor * v[after, n].item()
            if mode in ("cut", "zero"):
                return 0.0
            factor *= gamma[after, n].item() if mode == "decay" else 1.0
        return factor * case["last_values"][n].item()

    for n, start in itertools.product(range(r.shape[1]), range(length)):
        if not real[start, n]:
            continue
        weight, total = 1.0, 0.0
        for t in range(start, length):
            g, k = gamma[t, n].item(), decay[t, n].item()
            if real[t, n]:
                following = case["final_values"][t, n].item() if dones[t, n] else shown(t, n)
                total += weight * (r[t, n].item() + g * following - v[t, n].item())
                if dones[t, n]:
                    break
                weight *= g * k
            elif mode == "cut":
                break
            elif mode == "zero":
                total += weight * g * shown(t, n)
                weight *= g * k
            elif mode == "decay":
                weight *= g * k
        out[start, n] = total
    return out


def make(seed, length, num_envs, dtype=torch.float32, done=0.2, masked=0.3):
    case = make_case(seed, length, num_envs, dtype, done=done, masked=masked)
    g = torch.Generator().manual_seed(seed + 1)
    case["values"] = torch.randn(length, num_envs, generator=g).to(dtype)
    case["values"].masked_fill_(~case["mask"], math.nan)
    case["gae_lambda"] = torch.rand(num_envs, generator=g, dtype=torch.float64)
    return poison(case)


def arranged(case, layout):
    return {
        name: laid_out(value, layout)
        if isinstance(value, torch.Tensor) and value.ndim == 2
        else value
        for name, value in case.items()
    }


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 18),
    num_envs=st.integers(1, 20),
    mode=st.sampled_from(MODES),
    done=st.sampled_from([0.0, 0.3, 1.0]),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    given=st.sets(st.sampled_from(["final_values", "last_values", "mask"])),
    gamma=st.one_of(st.none(), st.floats(0, 1)),
    gae_lambda=st.one_of(st.none(), st.floats(0, 1)),
    layout=st.sampled_from(["rows", "columns", "apart"]),
    backend=st.sampled_from(["reference", "cpu"]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_combination_is_the_definition(
    seed,
    length,
    num_envs,
    mode,
    done,
    masked,
    given,
    gamma,
    gae_lambda,
    layout,
    backend,
    dtype,
):
    masked = masked if "mask" in given else 0.0
    case = make(seed, length, num_envs, dtype, done=done, masked=masked)
    for name in {"final_values", "last_values"} - given:
        case[name] = torch.zeros_like(case[name])
    if gamma is not None:
        case["gamma"] = torch.full((length, num_envs), gamma, dtype=torch.float64)
    if gae_lambda is not None:
        case["gae_lambda"] = torch.full((num_envs,), gae_lambda, dtype=torch.float64)
    passed = arranged(case, layout)
    for name in {"final_values", "last_values", "mask"} - given:
        del passed[name]
    passed["gamma"] = passed["gamma"] if gamma is None else gamma
    passed["gae_lambda"] = passed["gae_lambda"] if gae_lambda is None else gae_lambda
    expected = definition(case, mode)
    result = generalized_advantage(**passed, mask_mode=mode, backend=backend)
    known = torch.where(case["mask"], case["values"], 0.0).double()
    passed["lam"] = passed.pop("gae_lambda")
    returns = lambda_returns(**passed, mask_mode=mode, backend=backend)
    for ours, exact in ((result, expected), (returns, expected + known)):
        assert ours.dtype == dtype
        scale = max(1.0, expected.abs().max().item(), known.abs().max().item())
        assert (ours.double() - exact).abs().max().item() <= TOLERANCE[dtype] * scale


def options(case, kind):
    """What a call is given, so that it runs on one of the three loops; "final": on the last too."""
    passed = dict(case)
    if kind != "general":
        passed["gamma"], passed["gae_lambda"] = 0.97, 0.9
    if kind in ("plain", "masked"):
        del passed["final_values"]
    if kind == "plain":
        del passed["mask"]
        for name in ("rewards", "values"):
            passed[name] = torch.where(passed[name].isnan(), 0.5, passed[name])
    return passed


# Around what is done together: 16 environments, 8 rows; and a tile of 256 rows, or 1024 columns.
SHAPES = [(1, 16), (7, 17), (8, 15), (9, 33), (16, 32), (255, 3), (257, 18), (2, 1041), (530, 16)]
KINDS = ["plain", "masked", "general"]


@pairwise(
    shape=SHAPES,
    kind=KINDS,
    layout=["rows", "columns", "apart"],
    mode=MODES,
    dtype=DTYPES,
)
def test_every_loop_is_the_reference_with_its_gradients(shape, kind, layout, mode, dtype):
    check_with_gradients(shape, kind, layout, mode, dtype)


def check_with_gradients(shape, kind, layout, mode, dtype):
    passed = arranged(options(make(sum(shape), *shape, dtype), kind), layout)
    weight = laid_out(torch.randn(shape).to(dtype), layout)
    names = [name for name in NAMES if name in passed]
    found = []
    for backend in ("reference", "cpu"):
        inputs = {name: passed[name].detach().clone().requires_grad_() for name in names}
        result = generalized_advantage(**(passed | inputs), mask_mode=mode, backend=backend)
        found.append([result, *torch.autograd.grad((result * weight).sum(), inputs.values())])
    for exact, ours in zip(*found, strict=True):
        assert ours.dtype == dtype
        bound = 3 * TOLERANCE[dtype]
        torch.testing.assert_close(ours, exact, rtol=bound, atol=bound * exact.abs().max().item())
    out = laid_out(torch.full(shape, math.nan, dtype=dtype), layout)
    generalized_advantage(**passed, mask_mode=mode, out=out)
    assert torch.equal(out, found[1][0])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_the_reference_with_their_gradients(kind, layout, dtype):
    check_with_gradients((40, 35), kind, layout, "skip", dtype)


@of_forward_mode
# A tensor of gamma has derivatives of another way, in forward mode.
@pairwise(
    kind=[*KINDS, "final"],
    mode=MODES,
    layout=["rows", "columns"],
    function=["gae", "lambda"],
)
def test_derivatives_of_every_kind(kind, mode, layout, function):
    case = arranged(options(make(3, 5, 3, torch.float64, masked=0.2), kind), layout)
    case = {
        name: torch.nan_to_num(value, 0.5, 0.5) if name in NAMES else value
        for name, value in case.items()
    }
    names = [name for name in NAMES if name in case]

    def call(*inputs):
        passed = case | dict(zip(names, inputs, strict=True))
        if function == "gae":
            return generalized_advantage(**passed, mask_mode=mode)
        lam = passed.pop("gae_lambda")
        return lambda_returns(**passed, lam=lam, mask_mode=mode)

    inputs = [case[name].requires_grad_() for name in names]
    torch.autograd.gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(call, inputs, check_fwd_over_rev=True)


@of_forward_mode
@pytest.mark.parametrize("mode", MODES)
def test_derivatives_of_gamma_and_lambda(mode):
    case = make(4, 5, 2, torch.float64)
    case["dones"][1, 1] = case["dones"][3, 0] = True
    assert (case["dones"] & case["mask"]).sum() == 2
    case["final_values"] = torch.nan_to_num(case["final_values"], 0.5, 0.5, 0.5)
    for name in ("rewards", "values"):
        case[name] = torch.nan_to_num(case[name], 0.5)
    names = (*NAMES, "gamma", "gae_lambda")
    inputs = [case.pop(name).requires_grad_() for name in names]

    def call(*inputs):
        return generalized_advantage(
            **dict(zip(names, inputs, strict=True)), mask_mode=mode, **case
        )

    torch.autograd.gradcheck(call, inputs, check_forward_ad=True)

    def returns(rewards, final_values, last_values, gamma):
        return reward_to_go(
            rewards,
            case["dones"],
            gamma,
            final_values=final_values,
            last_values=last_values,
            mask=case["mask"],
            mask_mode=mode,
        )

    few = [inputs[0], *inputs[2:5]]
    torch.autograd.gradcheck(returns, few, check_forward_ad=True)
    torch.autograd.gradgradcheck(returns, few, check_fwd_over_rev=True)


@of_forward_mode
@pytest.mark.parametrize("function", [generalized_advantage, reward_to_go])
def test_forward_mode_is_what_the_function_makes_of_a_direction(function):
    """It is linear in the rewards: its derivative along a direction is itself, of the direction."""
    dones, direction = torch.rand(9, 4) < 0.2, torch.randn(9, 4)
    values = torch.zeros(9, 4)

    def call(rewards):
        if function is reward_to_go:
            return reward_to_go(rewards, dones, 0.9)
        return generalized_advantage(rewards, values, dones, 0.9, 0.8)

    _, along = torch.func.jvp(call, (torch.randn(9, 4),), (direction,))
    torch.testing.assert_close(along, call(direction))
    hessian = torch.func.jacfwd(torch.func.grad(lambda r: call(r).square().sum()))
    rewards = torch.randn(9, 4)
    backwards = torch.func.jacrev(torch.func.grad(lambda r: call(r).square().sum()))
    torch.testing.assert_close(hessian(rewards), backwards(rewards))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_they_compile_with_their_gradients_and_can_be_mapped():
    case = make(6, 9, 3)
    for name in ("rewards", "values"):
        case[name] = torch.nan_to_num(case[name], 0.5)
    rewards, values = (case.pop(name).requires_grad_() for name in ("rewards", "values"))
    del case["final_values"]

    def function(rewards, values):
        first = generalized_advantage(rewards, values, mask_mode="zero", **case)
        lam = case["gae_lambda"]
        rest = {name: case[name] for name in case if name != "gae_lambda"}
        return first + lambda_returns(rewards, values, lam=lam, mask_mode="skip", **rest)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rewards, values), function(rewards, values))
    inputs = rewards, values
    ours = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    torch.testing.assert_close(ours, torch.autograd.grad(function(*inputs).square().sum(), inputs))
    several = torch.randn(4, 9, 3)
    mapped = torch.vmap(torch.func.grad(lambda r: function(r, values).square().sum()))(several)
    for one, found in zip(several, mapped, strict=True):
        one.requires_grad_()
        (expected,) = torch.autograd.grad(function(one, values).square().sum(), one)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("everything", [False, True])
def test_the_operators_keep_torchs_rules(everything):
    case = make(6, 9, 3)
    r, v, dones = case["rewards"].nan_to_num(0.5), case["values"].nan_to_num(0.5), case["dones"]
    rest = (None,) * 3
    factors = 0.9, None, 0.8, None
    if everything:
        rest = case["final_values"], case["last_values"], case["mask"]
        factors = 0.9, case["gamma"], 0.8, case["gae_lambda"].expand(9, 3)
    torch.library.opcheck(
        torch.ops.vecpg.generalized_advantage.default,
        (r, v if everything else None, dones, *factors, *rest, "skip", everything, False),
    )
    torch.library.opcheck(
        torch.ops.vecpg.advantage_adjoint.default,
        (
            torch.randn(9, 3),
            dones,
            *factors,
            rest[-1],
            "skip",
            everything,
            False,
            everything,
            everything,
        ),
    )


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("kind", KINDS)
def test_infinity_and_nan_stay_in_their_episode(kind, layout):
    case = make(5, 40, 18, done=0.0, masked=0.0)
    case["dones"][20] = True
    case["final_values"][20] = 0.0
    case["rewards"][30, 3], case["values"][31, 4] = math.inf, math.nan
    passed = arranged(options(case, kind), layout)
    if kind == "plain":
        passed["values"][31, 4] = math.nan
    result = generalized_advantage(**passed)
    assert not result[21:31, 3].isfinite().any()
    assert result[21:32, 4].isnan().all()
    rest = result.clone()
    rest[21:31, 3], rest[21:32, 4] = 0, 0
    assert rest.isfinite().all()


def test_lambda_returns_do_not_look_at_their_own_value():
    rewards, dones = torch.rand(6, 20), torch.zeros(6, 20, dtype=bool)
    values = torch.rand(6, 20)
    expected = lambda_returns(rewards, values, dones, 0.9, 0.7)
    values[0] = 1e30
    assert torch.equal(lambda_returns(rewards, values, dones, 0.9, 0.7), expected)
    values[0] = math.nan
    assert torch.equal(lambda_returns(rewards, values, dones, 0.9, 0.7), expected)


def test_a_result_does_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(ranges, "THREAD_ELEMENTS", 100)
    case = make(0, 50, 53)
    plain = options(case, "plain")
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((generalized_advantage(**case), generalized_advantage(**plain)))
    torch.set_num_threads(before)
    for general, rows in results[1:]:
        assert torch.equal(general, results[0][0])
        assert torch.equal(rows, results[0][1])


def test_the_last_digit_does_not_depend_on_threads(monkeypatch):
    # Rows that are left over of eights step one by one, and which they are depends on the columns.
    generator = torch.Generator().manual_seed(0)
    rewards, values = (
        torch.randn(257, 400, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    dones = torch.rand(257, 400, generator=generator) < 0.01
    monkeypatch.setattr(ranges, "THREAD_ELEMENTS", 100)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(generalized_advantage(rewards, values, dones, 0.97, 0.9, backend="cpu"))
    torch.set_num_threads(before)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


@pairwise(
    total=[200, 997],
    sequences=[1, 2, 40],
    mode=[None, *MODES],
    factors=["numbers", "tensors"],
    dtype=DTYPES,
)
def test_long_columns_go_by_spans(total, sequences, mode, factors, dtype, monkeypatch):
    """Of packed sequences, whose last row may be masked: what flows on is cut there nonetheless."""
    monkeypatch.setattr(cpu_advantages, "_LONG", 200)
    g = torch.Generator().manual_seed(total + sequences)
    cuts = torch.randint(0, total + 1, (sequences - 1,), generator=g).sort().values
    offsets = torch.tensor([0, *cuts.tolist(), total])
    case = make(total, total, 1, dtype, masked=0.3 if mode else 0.0)
    rewards, values, mask = (case[name][:, 0] for name in ("rewards", "values", "mask"))
    final = torch.randn(sequences, generator=g).to(dtype)
    given = {"mask": mask, "mask_mode": mode} if mode else {}
    gamma, gae_lambda = 0.99, 0.95
    if factors == "tensors":
        gamma, gae_lambda = case["gamma"][:, 0], torch.rand(total, dtype=torch.float64)
    weight = torch.randn(total, generator=g).to(dtype)
    found = []
    for backend in ("reference", "cpu"):
        inputs = [each.detach().clone().requires_grad_() for each in (rewards, values, final)]
        advantages = packed_generalized_advantage(
            *inputs[:2],
            offsets,
            gamma,
            gae_lambda,
            final_values=inputs[2],
            backend=backend,
            **given,
        )
        returns = packed_reward_to_go(
            inputs[0], offsets, gamma, final_values=inputs[2], backend=backend, **given
        )
        total_ = ((advantages + returns) * weight).sum()
        found.append([advantages, returns, *torch.autograd.grad(total_, inputs)])
    for exact, ours in zip(*found, strict=True):
        bound = 3 * TOLERANCE[dtype]
        torch.testing.assert_close(ours, exact, rtol=bound, atol=bound * exact.abs().max().item())


@pytest.mark.parametrize("gamma", [0.9, 1e-200])  # of which ten make 0
def test_what_is_infinite_flows_no_further_than_its_episode(gamma, monkeypatch):
    monkeypatch.setattr(cpu_advantages, "_LONG", 200)
    rewards, dones = torch.ones(640, 1), torch.zeros(640, 1, dtype=bool)
    dones[300] = True  # inside a span; and what flows into the spans before it depends on it
    rewards[500] = math.inf
    result = generalized_advantage(rewards, torch.zeros(640, 1), dones, gamma, 1.0)[:, 0]
    assert result[:301].isfinite().all()
    assert result[301:501].isinf().all()
    assert result[501:].isfinite().all()
    expected = reward_to_go(rewards, dones, gamma, backend="reference")[:, 0]
    torch.testing.assert_close(result, expected)
    # Times a lambda of 0 it is no number: so many are in a short column, and so many here.
    result = generalized_advantage(rewards, torch.zeros(640, 1), dones, gamma, 0.0)[:, 0]
    assert torch.equal(result.isnan(), (torch.arange(640) > 300) & (torch.arange(640) < 500))


@pairwise(
    mode=MODES,
    given=[(), ("mask",), ("mask", "final_values"), ("mask", "last_values"), ("final_values",)],
    function=[generalized_advantage, lambda_returns],
)
def test_with_gradients_of_gamma_it_is_the_same(mode, given, function):
    """It is composed of other calls then, as it is on CUDA."""
    case = make(11, 23, 5, torch.float64, masked=0.4 if "mask" in given else 0.0)
    case = {name: case[name] for name in ("rewards", "values", "dones", "gamma", *given)}
    decay = {"lam" if function is lambda_returns else "gae_lambda": 0.9}
    expected = function(**case, **decay, mask_mode=mode)
    case["gamma"].requires_grad_()
    result = function(**case, **decay, mask_mode=mode)
    assert result.requires_grad
    torch.testing.assert_close(result.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [None, *MODES])
def test_spans_of_a_long_column_that_all_end_early(mode, monkeypatch):
    """Then only the rows that something flows into are done again."""
    monkeypatch.setattr(cpu_advantages, "_LONG", 200)
    case = options(make(12, 64 * 20 + 5, 1, torch.float64), "masked" if mode else "final")
    places = torch.arange(len(case["dones"]))[:, None] % 20  # in a span
    case["dones"] = (places == 8) | (places == 11)
    masked = ~case["mask"] & ~case["dones"] | (places == 2) | (places == 17)
    case["mask"] = ~masked if mode else torch.ones_like(masked)
    case["dones"] = case["dones"] | ~case["mask"]  # masked ones end nothing
    case |= {name: case[name].nan_to_num(0.5) for name in case if name in NAMES}
    names = [name for name in NAMES if name in case]
    found = []
    for backend in ("reference", "cpu"):
        inputs = {name: case[name].detach().clone().requires_grad_() for name in names}
        result = generalized_advantage(**(case | inputs), mask_mode=mode or "cut", backend=backend)
        weight = torch.linspace(-1, 2, len(result), dtype=torch.float64)[:, None]
        found.append([result, *torch.autograd.grad((result * weight).sum(), inputs.values())])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pairwise(
    shape=[(20, 33), (9, 1041), (300, 5)],
    kind=KINDS,
    layout=["rows", "columns"],
    mode=["skip", "zero"],
)
def test_factors_for_each_environment_are_those_of_each_alone(shape, kind, layout, mode):
    """A gamma and a lambda that are the same in all rows, with gradients."""
    case = options(make(sum(shape), *shape), kind)
    g = torch.Generator().manual_seed(shape[1])
    factors = {name: torch.rand(shape[1], generator=g).double() for name in ("gamma", "gae_lambda")}
    names = [name for name in NAMES if name in case]

    def found(case):
        case = case | {name: case[name].detach().requires_grad_() for name in names}
        result = generalized_advantage(**case, mask_mode=mode)
        return [result, *torch.autograd.grad(result.sum(), [case[name] for name in names])]

    whole = found(arranged(case | factors, layout))
    for n in range(0, shape[1], 37):
        alone = {
            name: value[..., n : n + 1] if isinstance(value, torch.Tensor) else value
            for name, value in case.items()
        }
        alone |= {name: factors[name][n].item() for name in factors}
        for ours, expected in zip(whole, found(alone), strict=True):
            torch.testing.assert_close(ours[..., n : n + 1], expected, rtol=1e-6, atol=1e-6)


@pairwise(
    mode=["cut", "skip", "decay", "zero"],
    masked=[False, True],
    with_tensors=[False, True],
    plus_values=[False, True],
    shape=[(9, 3), (1, 2), (7, 2, 2), (0, 3)],
)
def test_the_adjoint_by_returns_is_that_of_machine_code(
    mode, masked, with_tensors, plus_values, shape
):
    g = torch.Generator().manual_seed(5)
    wide = {"generator": g, "dtype": torch.float64}
    grad, dones = torch.randn(shape, **wide), torch.rand(shape, generator=g) < 0.3
    mask = torch.rand(shape, generator=g) < 0.6 if masked else None
    gammas, lambdas = (torch.rand(shape, **wide) if with_tensors else None for _ in range(2))
    if mask is not None:
        grad = grad.masked_fill(~mask, math.nan)
    arguments = grad, dones, 0.9, gammas, 0.8, lambdas, mask, mode, plus_values
    expected = operator._adjoint(*arguments, False, True, True)
    found = operator.adjoint_by_returns(*arguments, True, True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    few = operator.adjoint_by_returns(*arguments, False, False)
    assert [each.numel() > 0 for each in few[1:3]] == [False, False]
    assert torch.equal(few[0], found[0])
