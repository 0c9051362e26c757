import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import pairwise

from vecpg.returns import generalized_advantage, ranges, reward_to_go, trace, vtrace
from vecpg.returns.checks import _MASK_MODES as MODES

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-7, torch.bfloat16: 5e-3, torch.float16: 6e-4}
BACKENDS = ("reference", "cpu")


class Definition:
    """Equation 1 of the paper as a sum over what follows a row, in float64: not a recurrence."""

    def __init__(self, case, mode, rho_bar, c_bar):
        self.mode, self.rho_bar, self.c_bar = mode, rho_bar, c_bar
        self.length, self.num_envs = case["rewards"].shape
        for name, value in case.items():
            setattr(self, name, value.double().tolist())

    def ratio(self, t, n, bound):
        return min(bound, math.exp(self.log_ratios[t][n])) if self.mask[t][n] else min(bound, 1.0)

    def traced(self, t, n):
        return self.gamma[t][n] * self.lam[t][n] * self.ratio(t, n, self.c_bar)

    def value_from(self, t, n):
        """The value of the state before row t, as the row before it sees it."""
        factor = 1.0
        for k in range(t, self.length):
            if self.mask[k][n]:
                return factor * self.values[k][n]
            if self.mode in ("cut", "zero"):
                return 0.0
            factor *= self.gamma[k][n] if self.mode == "decay" else 1.0
        return factor * self.last_values[n]

    def delta(self, t, n):
        real = self.mask[t][n]
        ends = real and self.dones[t][n]
        after = self.final_values[t][n] if ends else self.value_from(t + 1, n)
        own = self.rewards[t][n] - self.values[t][n] if real else 0.0
        return own + self.gamma[t][n] * after

    def error_from(self, t, n):
        """The sum of discounted, weighted errors from row t on."""
        factor, terms = 1.0, []
        for k in range(t, self.length):
            real = self.mask[k][n]
            if not real and self.mode == "cut":
                break
            if real or self.mode == "zero":
                terms.append(factor * self.ratio(k, n, self.rho_bar) * self.delta(k, n))
            if real and self.dones[k][n]:
                break
            if real or self.mode != "skip":
                factor *= self.traced(k, n)
        return math.fsum(terms)

    def __call__(self):
        targets = torch.zeros(self.length, self.num_envs, dtype=torch.float64)
        advantages = torch.zeros_like(targets)
        for t in range(self.length):
            for n in range(self.num_envs):
                if self.mask[t][n]:
                    targets[t, n] = self.values[t][n] + self.error_from(t, n)
                    behind = 0.0 if self.dones[t][n] else self.error_from(t + 1, n)
                    error = self.delta(t, n) + self.gamma[t][n] * behind
                    advantages[t, n] = self.ratio(t, n, self.rho_bar) * error
        return targets, advantages


def make_case(seed, length, num_envs, dtype=torch.float32, done=0.2, masked=0.3, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    shape = (length, num_envs)
    case = {
        "rewards": torch.randn(shape, generator=g).to(dtype),
        "values": torch.randn(shape, generator=g).to(dtype),
        "log_ratios": (spread * torch.randn(shape, generator=g)).to(dtype),
        "dones": torch.rand(shape, generator=g) < done,
        "gamma": torch.rand(shape, generator=g, dtype=torch.float64),
        "lam": torch.rand(shape, generator=g, dtype=torch.float64),
        "final_values": torch.randn(shape, generator=g).to(dtype),
        "last_values": torch.randn(num_envs, generator=g).to(dtype),
        "mask": torch.rand(shape, generator=g) >= masked,
    }
    return poisoned(case)


def poisoned(case):
    """NaN and infinity wherever nothing may be read."""
    for name in ("rewards", "values", "log_ratios"):
        case[name] = case[name].masked_fill(~case["mask"], math.nan)
    unread = ~case["mask"] | ~case["dones"]
    case["final_values"] = case["final_values"].masked_fill(unread, math.inf)
    return case


def assert_equals_definition(result, case, mode, rho_bar=1.0, c_bar=1.0):
    for ours, expected in zip(result, Definition(case, mode, rho_bar, c_bar)(), strict=True):
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        tolerance = TOLERANCE[ours.dtype] * scale
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance)


@pairwise(
    shape=[(1, 1), (2, 3), (63, 33), (5, 300), (130, 2)],
    dtype=[torch.float64, torch.float32],
    mode=MODES,
    how=["reference", "cpu", "composed"],
    bounds=[(1.0, 1.0), (2.0, 0.5), (0.5, 0.25)],
    layout=["rows", "columns", "apart"],
)
def test_it_is_the_definition(shape, dtype, mode, how, bounds, layout):
    case = make_case(shape[0], *shape, dtype)

    def laid_out(value):
        if layout == "rows" or value.ndim == 1:
            return value
        if layout == "columns":
            return value.t().contiguous().t()
        wide = torch.full((2 * shape[0], 3 * shape[1]), True).to(value.dtype)
        wide[::2, 1::3] = value
        return wide[::2, 1::3]

    passed = {name: laid_out(value) for name, value in case.items()}
    if how == "composed":  # where gamma takes part in derivatives
        how, passed["gamma"] = "cpu", passed["gamma"].requires_grad_()
    clipped = dict(zip(("rho_bar", "c_bar"), bounds, strict=True))
    result = vtrace(**passed, **clipped, mask_mode=mode, backend=how)
    assert result.targets.dtype == result.advantages.dtype == dtype
    assert_equals_definition([each.detach() for each in result], case, mode, *bounds)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(0, 12),
    num_envs=st.integers(0, 9),
    mode=st.sampled_from(MODES),
    done=st.sampled_from([0.0, 0.3, 1.0]),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    spread=st.sampled_from([0.0, 0.3, 3.0]),
    rho_bar=st.sampled_from([0.0, 0.5, 1.0, 2.5, math.inf]),
    c_bar=st.sampled_from([0.0, 0.5, 1.0, 2.5]),
    given=st.sets(st.sampled_from(["final_values", "last_values", "mask", "lam", "gamma"])),
    transposed=st.booleans(),
    gradients=st.sampled_from(["none", "own", "composed"]),
    backend=st.sampled_from(BACKENDS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_combination_is_the_definition(
    seed,
    length,
    num_envs,
    mode,
    done,
    masked,
    spread,
    rho_bar,
    c_bar,
    given,
    transposed,
    gradients,
    backend,
    dtype,
):
    masked = masked if "mask" in given else 0.0
    case = make_case(seed, length, num_envs, dtype, done, masked, spread)
    for name in {"final_values", "last_values"} - given:
        case[name] = torch.zeros_like(case[name])
    for name in {"lam", "gamma"} - given:
        case[name] = torch.full_like(case[name], 0.9)
    passed = {
        name: value.t().contiguous().t() if transposed and value.ndim == 2 else value
        for name, value in case.items()
        if name in given or name not in {"final_values", "last_values", "mask", "lam", "gamma"}
    }
    passed.setdefault("gamma", 0.9)
    passed.setdefault("lam", 0.9)
    passed["values"] = passed["values"].clone().requires_grad_(gradients == "own")
    if gradients == "composed":
        passed["gamma"] = (
            torch.as_tensor(passed["gamma"], dtype=torch.float64).clone().requires_grad_()
        )
    result = vtrace(**passed, rho_bar=rho_bar, c_bar=c_bar, mask_mode=mode, backend=backend)
    result = [each.detach() for each in result]
    assert_equals_definition(result, case, mode, rho_bar, c_bar)


@pytest.mark.parametrize("mode", MODES)
def test_on_policy_it_is_generalized_advantage(mode):
    case = make_case(5, 40, 7, torch.float64)
    case["log_ratios"].zero_()
    case["lam"] = 0.9
    targets, advantages = vtrace(**case, mask_mode=mode)
    del case["log_ratios"]
    expected = generalized_advantage(gae_lambda=case.pop("lam"), mask_mode=mode, **case)
    known = torch.where(case["mask"], case["values"], 0.0)
    torch.testing.assert_close(targets - known, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(advantages, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_policy_with_lambda_one_both_are_monte_carlo(backend):
    case = make_case(6, 30, 5, torch.float64, masked=0.0)
    del case["mask"], case["lam"]
    case["log_ratios"].zero_()
    targets, advantages = vtrace(**case, backend=backend)
    del case["log_ratios"]
    values = case.pop("values")
    returns = reward_to_go(**case)
    torch.testing.assert_close(targets, returns, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(advantages, returns - values, rtol=1e-12, atol=1e-12)


def test_hand_computed():
    """Two steps, ratios 1/2 and 4, bounds 1 and 2 apart for the errors and what is traced."""
    rewards, values = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    logs, none = torch.tensor([0.5, 4.0]).log(), torch.tensor([False, False])
    result = vtrace(rewards, values, logs, none, 0.5, c_bar=2.0, last_values=torch.tensor(10.0))
    # delta = (1 + 5/2 - 3, 2 + 10/2 - 5); x[1] = 2, x[0] = 1/2 * 1/2 + 1/2 * 1/2 * 2
    assert result.targets.tolist() == [3.75, 7.0]
    assert result.advantages.tolist() == [0.75, 2.0]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # forward mode's own
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_right_and_free_of_what_is_not_read(mode, backend):
    case = make_case(1, 6, 1, torch.float64, done=1.0, masked=0.0)
    case["mask"][:, 0] = torch.tensor([True, True, False, True, True, False])
    case["dones"][:, 0] = torch.tensor([False, False, True, True, False, True])
    poisoned(case)
    if mode == "cut":
        case["last_values"].fill_(math.nan)
    names = ("rewards", "values", "log_ratios", "gamma", "lam", "final_values", "last_values")
    inputs = [case.pop(name).requires_grad_() for name in names]

    def weighed(*inputs):
        given = dict(zip(names, inputs, strict=True))
        targets, advantages = vtrace(**given, **case, mask_mode=mode, backend=backend)
        return targets.sin().sum() + advantages.cos().sum()

    read = [each.detach().nan_to_num(0.3, 0.3).requires_grad_() for each in inputs]
    assert torch.autograd.gradcheck(weighed, read, check_forward_ad=True)
    assert backend != "cpu" or torch.autograd.gradgradcheck(weighed, read, atol=1e-4)
    found = torch.autograd.grad(weighed(*inputs), inputs)
    expected = torch.autograd.grad(weighed(*read), read)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


NAMES = ("rewards", "values", "log_ratios", "final_values", "last_values")


def gradients_of(case, weights, **options):
    """Of the weighed sums of targets and advantages; weights of None are left out."""
    inputs = {name: case[name].detach().requires_grad_() for name in NAMES if name in case}
    results = vtrace(**case | inputs, **options)
    pairs = [pair for pair in zip(results, weights, strict=True) if pair[1] is not None]
    outputs, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, list(inputs.values()), weights)


@pairwise(
    shape=[(1, 1), (2, 3), (63, 33), (5, 300), (130, 2)],
    dtype=[torch.float64, torch.float32],
    mode=MODES,
    bounds=[(1.0, 1.0), (2.0, 0.25), (0.5, math.inf), (0.0, 0.5)],
    layout=["rows", "columns", "apart"],
    weighed=["both", "targets", "advantages", "expanded"],
)
def test_gradients_are_those_of_the_loop(shape, dtype, mode, bounds, layout, weighed, monkeypatch):
    case = make_case(shape[0], *shape, dtype)
    clipped = dict(zip(("rho_bar", "c_bar"), bounds, strict=True)) | {"mask_mode": mode}
    weights = [torch.randn(shape).to(dtype) for _ in range(2)]
    if weighed == "expanded":  # such as those of a sum
        weights = [torch.full((), 0.5, dtype=dtype).expand(shape)] * 2
    elif weighed != "both":
        weights[weighed == "targets"] = None
    wide = {
        name: value.double().nan_to_num(0.3, 0.3) if value.is_floating_point() else value
        for name, value in case.items()
    }
    doubles = [None if each is None else each.double() for each in weights]
    expected = gradients_of(wide, doubles, **clipped, backend="reference")
    passed = {
        name: {
            "rows": value,
            "columns": value.t().contiguous().t() if value.ndim == 2 else value,
            "apart": torch.stack([value, value], -1)[..., 1],
        }[layout]
        for name, value in case.items()
    }
    monkeypatch.setattr(trace, "composed", None)
    found = gradients_of(passed, weights, **clipped)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        scale = max(1.0, theirs.abs().max().item())
        tolerance = 4 * TOLERANCE[dtype] * scale
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance)


@pytest.mark.slow  # each has machine code of its own, which takes its time to compile
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["rows", "columns", "apart"])
def test_sixteen_bits_too(dtype, layout, monkeypatch):
    options = (63, 33), dtype, "skip"
    test_it_is_the_definition(*options, "cpu", (1.0, 1.0), layout)
    test_gradients_are_those_of_the_loop(*options, (1.0, 1.0), layout, "both", monkeypatch)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # forward mode's own
@pytest.mark.parametrize("mode", MODES)
def test_gradients_have_derivatives_and_can_be_mapped(mode):
    case = make_case(7, 4, 2, torch.float64)
    given = {name: case.pop(name).nan_to_num(0.3, 0.3).requires_grad_() for name in NAMES}

    def both(*inputs):
        return vtrace(**dict(zip(NAMES, inputs, strict=True)), **case, mask_mode=mode)

    inputs = list(given.values())
    assert torch.autograd.gradcheck(both, inputs, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(both, inputs, check_batched_grad=True)

    def curved(values, backend):
        one = {"values": values, "last_values": values[-1] ** 2}
        targets, advantages = vtrace(**given | one, **case, mask_mode=mode, backend=backend)
        return targets.sin().sum() + advantages.cos().sum()

    hessians = [
        torch.autograd.functional.hessian(lambda x, b=backend: curved(x, b), given["values"])
        for backend in BACKENDS
    ]
    torch.testing.assert_close(*hessians)

    def summed(logs, backend):  # whose result's gradient is a constant
        given = {"log_ratios": logs, "mask_mode": mode, "backend": backend}
        return vtrace(**case | plain | given).targets.sum()

    plain = {name: value.detach() for name, value in given.items()}
    hessians = [
        torch.autograd.functional.hessian(lambda x, b=backend: summed(x, b), plain["log_ratios"])
        for backend in BACKENDS
    ]
    torch.testing.assert_close(*hessians)


def test_what_gradients_are_made_of_must_not_change():
    case = make_case(8, 4, 2)
    values = case["values"].clone().requires_grad_()
    targets, _ = vtrace(**case | {"values": values})
    case["log_ratios"].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        targets.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ratios_are_right_wherever_they_lie(dtype):
    around = [0.5, -0.5, 0.3466, 1.0, -3.0, 17.0, -20.0, 87.0, -87.0, 88.8]
    wide = [-700.0, -707.9, 708.9, 709.7, 709.9, 1e4, -709.0, -1e300, 1e300]
    logs = torch.tensor(
        [
            0.0,
            *around,
            *(wide if dtype == torch.float64 else [100.0, -1e30]),
            math.inf,
            -math.inf,
            math.nan,
        ],
        dtype=dtype,
    )[None]
    zeros, ones = torch.zeros_like(logs), torch.ones_like(logs)
    result = vtrace(ones, zeros, logs, zeros.bool(), 0.9, rho_bar=math.inf).targets
    expected = logs.double().exp().to(dtype)
    close = {"rtol": 1e-13 if dtype == torch.float64 else 1e-7, "atol": 1e-307, "equal_nan": True}
    torch.testing.assert_close(result, expected, **close)
    assert result[0, 0] == 1.0
    assert not result[logs < -708.0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ratios_above_their_bounds_have_no_gradient(backend):
    logs = torch.tensor([[-0.5], [0.5], [1e4], [-1e4], [0.0]], requires_grad=True)
    ones, none = torch.ones(5, 1), torch.zeros(5, 1, dtype=bool)
    targets, advantages = vtrace(ones, 0.3 * ones, logs, none, 0.9, backend=backend)
    (slope,) = torch.autograd.grad((targets + advantages).sum(), logs)
    assert slope[:, 0].isfinite().all()
    assert (slope[:, 0] != 0).tolist() == [True, False, False, False, True]
    unbounded = vtrace(ones, ones, logs, none, 0.9, rho_bar=2.0, c_bar=2.0, backend=backend)
    (slope,) = torch.autograd.grad(unbounded.targets.sum(), logs)
    assert slope[1, 0] != 0


def test_a_nan_or_infinity_stays_in_its_episode():
    case = make_case(2, 20, 300, masked=0.0, done=0.0)
    case["dones"][9] = True
    case["rewards"][15, 3], case["values"][15, 4], case["log_ratios"][15, 5] = (math.nan,) * 3
    for result in vtrace(case["rewards"], case["values"], case["log_ratios"], case["dones"], 0.9):
        assert not result[10:16, 3:6].isfinite().any(dim=0).all()
        result[10:, 3:6] = 0
        assert result.isfinite().all()


def test_a_result_does_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(ranges, "THREAD_ELEMENTS", 100)
    case = make_case(3, 20, 301)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(vtrace(**case))
    torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_more_batch_dimensions_none_and_strides_of_no_matrix():
    case = make_case(4, 6, 12)
    expected = vtrace(**case)
    wide = {name: value.reshape(*value.shape[:-1], 3, 4) for name, value in case.items()}
    narrow = {name: value.select(-1, 0) for name, value in case.items()}
    turned = {name: value.transpose(-1, -2) for name, value in wide.items()}
    with pytest.raises(RuntimeError, match="view size"):
        trace._matrix(turned["rewards"])
    for index in range(2):
        given = expected[index]
        tolerance = {"rtol": 1e-6, "atol": 1e-6}
        assert torch.equal(vtrace(**wide)[index], given.reshape(6, 3, 4))
        assert torch.equal(vtrace(**narrow)[index], given[:, 0])
        torch.testing.assert_close(
            vtrace(**turned)[index], given.reshape(6, 3, 4).transpose(-1, -2), **tolerance
        )


# torch's compiler trips over a warning of torch's own.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles_as_one_graph_and_maps():
    case = make_case(6, 9, 3)

    def total(rewards):
        return sum(each.square().sum() for each in vtrace(**case | {"rewards": rewards}))

    rewards = case["rewards"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(rewards), rewards)
    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(rewards), rewards)[0], expected)
    stacked = torch.stack([case["rewards"], 2 * case["rewards"]])
    mapped = torch.vmap(torch.func.grad(total))(stacked)
    torch.testing.assert_close(mapped[0], expected)


def test_what_is_wrong_is_named():
    x, none = torch.zeros(3, 2), torch.zeros(3, 2, dtype=bool)
    with pytest.raises(TypeError, match="log_ratios: expected float32, got bool; pass rewards, v"):
        vtrace(x, x, none, x, 0.9)
    with pytest.raises(TypeError, match="log_ratios: expected float32.*, got float64"):
        vtrace(x, x, x.double(), none, 0.9)
    with pytest.raises(ValueError, match=r"values: expected shape \(3, 2\), got \(2, 3\)"):
        vtrace(x, x.t(), x, none, 0.9)
    with pytest.raises(ValueError, match=r"lam: expected a number in \[0, 1\], got 2; pass"):
        vtrace(x, x, x, none, 0.9, lam=2)
    with pytest.raises(ValueError, match="rho_bar: expected 0 or more, got -1; pass 1.0"):
        vtrace(x, x, x, none, 0.9, rho_bar=-1)
    with pytest.raises(ValueError, match="c_bar: expected 0 or more, got nan; pass 1.0"):
        vtrace(x, x, x, none, 0.9, c_bar=math.nan)
    with pytest.raises(
        TypeError, match="c_bar: expected a float, got Tensor; pass 1.0, or math.inf"
    ):
        vtrace(x, x, x, none, 0.9, c_bar=torch.ones(()))
    with pytest.raises(RuntimeError, match='backend: expected one for cpu tensors, got "?.?cuda'):
        vtrace(x, x, x, none, 0.9, backend="cuda")
