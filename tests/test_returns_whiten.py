import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vecpg.returns import masked_whiten, ranges

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-7, torch.bfloat16: 5e-3, torch.float16: 6e-4}


def definition(x, mask, dims, ddof):
    """In fractions, which do not round, for each element by itself."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    places = list(itertools.product(*map(range, x.shape)))
    for place in places:
        if not mask[place]:
            continue
        together = [
            Fraction(x[other].item())
            for other in places
            if mask[other] and all(other[i] == place[i] for i in range(x.ndim) if i not in dims)
        ]
        mean = sum(together) / len(together)
        squares = sum((number - mean) ** 2 for number in together)
        if len(together) > ddof and squares:
            std = math.sqrt(squares / (len(together) - ddof))
            out[place] = float(Fraction(x[place].item()) - mean) / std
    return out


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(0, 4), max_size=3),
    reduced=st.integers(0, 7),
    form=st.sampled_from(["all", "tuple", "negative", "one"]),
    ddof=st.sampled_from([0, 1, 2]),
    masked=st.sampled_from([None, 0.0, 0.4, 1.0]),
    flags=st.sampled_from([torch.bool, torch.int32, torch.float64]),
    broadcast=st.booleans(),
    choice=st.sampled_from(["any", "few", "equal", "large"]),
    strided=st.booleans(),
    gradients=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_any_combination_is_the_definition(
    seed, shape, reduced, form, ddof, masked, flags, broadcast, choice, strided, gradients, dtype
):
    g = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=g, dtype=torch.float64)
    x = {
        "any": numbers,
        "few": numbers.round(),
        "equal": torch.full_like(numbers, 0.1),
        "large": 1e8 + 64 * numbers.round() if dtype != torch.float16 else 1e4 + numbers,
    }[choice].to(dtype)
    dims = tuple(i for i in range(x.ndim) if reduced >> i & 1) or tuple(range(x.ndim))
    dim = {"all": None, "tuple": dims, "negative": tuple(i - x.ndim for i in dims), "one": dims}[
        form
    ]
    if form == "all" or not dims:
        dim, dims = None, tuple(range(x.ndim))
    elif form == "one":
        dim, dims = dims[0], dims[:1]
    flat = (1, *shape[1:]) if broadcast and x.ndim else shape
    mask = torch.rand(flat, generator=g) >= (masked or 0.0)
    whole = mask.expand(x.shape)
    passed = torch.stack([x, x], -1)[..., 1] if strided else x
    passed = passed.masked_fill(~whole, math.nan) if masked is not None else passed
    if strided and x.ndim > 1:
        passed = passed.mT.contiguous().mT
    passed = passed.requires_grad_(gradients)  # then by torch's operations
    result = masked_whiten(passed, None if masked is None else mask.to(flags), dim=dim, ddof=ddof)
    assert result.dtype == dtype
    expected = definition(x, whole, dims, ddof)
    torch.testing.assert_close(
        result.detach().double(), expected, rtol=0, atol=2 * TOLERANCE[dtype]
    )


def test_hand_computed():
    """1, 2, 3 and 6: mean 3, squares 4 + 1 + 0 + 9."""
    x = torch.tensor([[1.0, 2.0, math.nan], [3.0, math.inf, 6.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    result = masked_whiten(x, mask)
    expected = torch.tensor([[-2.0, -1.0, 0.0], [0.0, 0.0, 3.0]])
    torch.testing.assert_close(result, expected / (14 / 3) ** 0.5)
    torch.testing.assert_close(masked_whiten(x, mask, ddof=0), expected / (14 / 4) ** 0.5)
    several = torch.stack([x, 2.0 * x, x - 1.0])
    last = masked_whiten(several, mask, dim=-1)
    torch.testing.assert_close(last, torch.stack([masked_whiten(x, mask, dim=1)] * 3))
    rows = torch.tensor([[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]) * 0.5**0.5
    torch.testing.assert_close(masked_whiten(x, mask, dim=1), rows)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equal_elements_are_exactly_zero_and_one_too(dtype):
    for number, size in itertools.product([0.1, 1 / 3, -1e4, 0.0], [1, 7, 1000, 5000]):
        x = torch.full((size,), number, dtype=dtype)
        assert torch.equal(masked_whiten(x, None), torch.zeros_like(x))
        assert torch.equal(masked_whiten(x, None, ddof=0), torch.zeros_like(x))
    assert torch.equal(masked_whiten(torch.tensor([1.0, 3.0]), None, ddof=2), torch.zeros(2))
    below = masked_whiten(torch.full((9,), -0.1, dtype=dtype), torch.arange(9) < 7)
    assert torch.equal(below, torch.zeros(9, dtype=dtype))
    token = masked_whiten(torch.randn(2, 9, dtype=dtype), torch.eye(2, 9), dim=1)
    assert torch.equal(token, torch.zeros(2, 9, dtype=dtype))


def test_large_and_many_elements_keep_their_digits():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1025, 33, generator=g, dtype=torch.float64).round(decimals=3)
    mask = torch.rand(1025, 33, generator=g) < 0.6
    counted = x[mask]
    expected = torch.where(mask, (x - counted.mean()) / counted.std(), 0.0)
    torch.testing.assert_close(masked_whiten(x, mask), expected, rtol=1e-12, atol=1e-12)
    far = masked_whiten((1024 * x).round() + 2.0**40, mask)
    torch.testing.assert_close(far, masked_whiten((1024 * x).round(), mask), rtol=1e-12, atol=1e-12)


def in_order(x, mask, dims):
    """By sums of Python's that do not round, for each group of elements."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    kept = [i for i in range(x.ndim) if i not in dims]
    for index in itertools.product(*(range(x.shape[i]) for i in kept)):
        place = [slice(None)] * x.ndim
        for i, number in zip(kept, index, strict=True):
            place[i] = number
        numbers = x[tuple(place)].double()
        counted = numbers[mask[tuple(place)]].tolist()
        mean = math.fsum(counted) / len(counted)
        std = math.sqrt(math.fsum((each - mean) ** 2 for each in counted) / (len(counted) - 1))
        out[tuple(place)] = torch.where(mask[tuple(place)], (numbers - mean) / std, 0.0)
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shape", "dims", "order"),
    [
        ((9000,), (0,), (0,)),
        ((3, 4099), (1,), (0, 1)),
        ((4099, 3), (0,), (1, 0)),
        ((3, 4099), (0, 1), (1, 0)),
        ((2, 65, 3, 33), (1, 3), (0, 2, 1, 3)),
        ((2048, 3), (0,), (0, 1)),
    ],
)
def test_many_elements_and_many_that_do_not_count(shape, dims, order, dtype):
    """Of which whole stretches do not; in the order of memory that the last numbers say."""
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(shape, generator=g) < 0.7
    mask.view(-1)[:2100] = False
    mask.view(-1)[2090 % mask.numel()] = True
    mask[tuple(slice(-2, None) if i in dims else slice(None) for i in range(len(shape)))] = True
    x = (3.0 + torch.randn(shape, generator=g)).to(dtype).masked_fill(~mask, math.nan)
    x = x.permute(order).contiguous().permute([order.index(i) for i in range(len(order))])
    expected = in_order(x, mask, dims)
    result = masked_whiten(x, mask, dim=dims)
    assert result.stride() == x.stride()
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=16 * TOLERANCE[dtype])


def test_a_result_does_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(ranges, "THREAD_ELEMENTS", 100)
    x, mask = torch.randn(7, 5000, dtype=torch.float64), torch.rand(7, 5000) < 0.7
    before = torch.get_num_threads()
    for dim in (None, 1):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(masked_whiten(x, mask, dim=dim))
        torch.set_num_threads(before)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_a_nan_stays_with_those_it_is_compared_with():
    x = torch.tensor([[1.0, math.nan, 3.0, 0.0], [1.0, 2.0, 3.0, 0.0], [1.0, math.inf, 0.0, 0.0]])
    mask = torch.tensor([True, True, True, False])
    result = masked_whiten(x, mask, dim=-1)
    assert not masked_whiten(x, None).isfinite().any()
    assert not result[0, :3].isfinite().any()
    assert not result[2, :3].isfinite().any()
    assert result[1].isfinite().all()
    assert torch.equal(result[:, 3], torch.zeros(3))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # forward mode's own
@pytest.mark.parametrize("dim", [None, 0, (0, 1), -1])
def test_gradients(dim):
    x = torch.tensor([[1.0, 4.0, -2.0], [0.5, 9.0, 3.0], [2.0, 0.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 1]])
    given = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: masked_whiten(x, mask, dim=dim), given, check_forward_ad=True
    )
    assert torch.autograd.gradgradcheck(lambda x: masked_whiten(x, mask, dim=dim), given)
    poisoned = x.masked_fill(mask == 0, math.nan).requires_grad_()
    slopes = [
        torch.autograd.grad(masked_whiten(each, mask, dim=dim).pow(3).sum(), each)[0]
        for each in (given, poisoned)
    ]
    assert torch.equal(*slopes)
    equal = torch.ones(3, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(masked_whiten(equal, mask, dim=dim)[0, 0], equal)
    assert torch.equal(slope, torch.zeros(3, 3))


# torch's compiler trips over a warning of torch's own.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles_as_one_graph_and_maps():
    x, mask = torch.randn(3, 5, 4), torch.rand(3, 5, 4) < 0.7
    torch._dynamo.reset()
    for dim in (None, 1):
        expected = torch.stack(
            [masked_whiten(*each, dim=dim) for each in zip(x, mask, strict=True)]
        )
        mapped = torch.vmap(lambda x, mask, dim=dim: masked_whiten(x, mask, dim=dim))(x, mask)
        torch.testing.assert_close(mapped, expected)
        compiled = torch.compile(masked_whiten, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x[0], mask[0], dim=dim), expected[0])


JAGGED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (TypeError, "x: expected a tensor, got float; pass torch.as_tensor", {"x": 1.0}),
        (
            TypeError,
            "x: expected float32.* got complex64; pass x.real",
            {"x": torch.ones(2, 3) + 0j},
        ),
        (TypeError, "x: expected a dense .*pass x.to_dense", {"x": torch.eye(3).to_sparse()}),
        (TypeError, "x: expected a dense .*; pass x.values", {"x": JAGGED}),
        (ValueError, r"mask: expected a shape .*\(2, 3\), got \(2,\)", {"mask": torch.ones(2)}),
        (ValueError, r"mask: expected a shape .*; pass mask.mT", {"mask": torch.ones(3, 2)}),
        (ValueError, "mask: expected 0 or 1, got 2 at place", {"mask": torch.tensor([0, 1, 2])}),
        (ValueError, "dim: expected different dimensions of x, which has 2, got 2", {"dim": 2}),
        (ValueError, r"dim: expected different .* got \(0, -2\)", {"dim": (0, -2)}),
        (ValueError, r"dim: expected different .* got \(\)", {"dim": ()}),
        (TypeError, "dim: expected an int, several, or None, got 'a'", {"dim": "a"}),
        (TypeError, "ddof: expected an int, got float; pass 1 or 0", {"ddof": 1.0}),
        (ValueError, "ddof: expected 0 or more, got -1; pass 1 or 0", {"ddof": -1}),
    ],
)
def test_what_is_wrong_is_named(error, message, given):
    with pytest.raises(error, match=message):
        masked_whiten(**{"x": torch.ones(2, 3), "mask": None} | given)
