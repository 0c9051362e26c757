import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vecpg.returns import group_advantage

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-7, torch.bfloat16: 5e-3, torch.float16: 6e-4}
KINDS = ("rloo", "grpo")


def definition(rewards, ids, kind, mask):
    """In fractions, which do not round, for each completion by itself."""
    ids, real = ids.tolist(), mask.tolist()
    exact = [
        Fraction(reward) if counts else None
        for reward, counts in zip(rewards.tolist(), real, strict=True)
    ]
    out = []
    for i, own in enumerate(exact):
        others = [exact[k] for k in range(len(ids)) if real[k] and ids[k] == ids[i] and k != i]
        if not real[i]:
            out.append(0.0)
        elif kind == "rloo":
            out.append(float(own - (sum(others) / len(others) if others else 0)))
        else:
            mean = sum([own, *others]) / (len(others) + 1)
            squares = sum((number - mean) ** 2 for number in (own, *others))
            out.append(float(own - mean) / math.sqrt(squares / len(others)) if squares else 0.0)
    return torch.tensor(out, dtype=torch.float64)


def assert_is_definition(result, rewards, ids, kind, mask):
    expected = definition(rewards, ids, kind, mask)
    scale = max(1.0, expected.abs().max().item()) if len(expected) else 1.0
    atol = TOLERANCE[rewards.dtype] * scale
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=atol)


def spread(choice, size, g):
    """Rewards of some kind: any, 0 or 1, all equal, and small differences of a large number."""
    numbers = torch.randn(size, generator=g, dtype=torch.float64)
    return {
        "any": numbers,
        "flags": (numbers > 0).double(),
        "equal": torch.full((size,), 0.1, dtype=torch.float64),
        "large": 1e8 + 64 * numbers.round(),
    }[choice]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(0, 7), max_size=12),
    kind=st.sampled_from(KINDS),
    choice=st.sampled_from(["any", "flags", "equal", "large"]),
    masked=st.sampled_from([None, 0.0, 0.4, 1.0]),
    flags=st.sampled_from([torch.bool, torch.int64, torch.float32]),
    given_as=st.sampled_from(["offsets", "ids", "shuffled", "strided"]),
    whole=st.sampled_from([torch.int32, torch.int64]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_any_combination_is_the_definition(
    seed, sizes, kind, choice, masked, flags, given_as, whole, dtype
):
    g = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    names = torch.randperm(1000, generator=g)[: len(sizes)] - 500
    ids = names.repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    if given_as == "offsets" and len(offsets) == total:
        given_as = "ids"  # see test_what_could_be_either_is_refused
    if given_as == "shuffled":
        ids = ids[torch.randperm(total, generator=g)]
    rewards = spread(choice if dtype != torch.float16 else "any", total, g).to(dtype)
    mask = torch.rand(total, generator=g) >= (masked or 0.0)
    groups = (offsets if given_as == "offsets" else ids).to(whole)
    passed = rewards.masked_fill(~mask, math.nan)
    if given_as == "strided":
        groups, passed = (torch.stack([each, each], 1)[:, 1] for each in (groups, passed))
    result = group_advantage(
        passed, groups, kind=kind, mask=None if masked is None else mask.to(flags)
    )
    assert result.dtype == dtype
    assert_is_definition(result, rewards, ids, kind, mask)


def test_a_large_batch_is_the_definition_in_any_order():
    g = torch.Generator().manual_seed(0)
    ids, rewards = torch.randint(0, 33, (1025,), generator=g), torch.randn(1025, generator=g)
    mask = torch.rand(1025, generator=g) < 0.7
    order = torch.randperm(1025, generator=g)
    for kind in KINDS:
        result = group_advantage(rewards, ids, kind=kind, mask=mask)
        assert_is_definition(result, rewards, ids, kind, mask)
        other = group_advantage(rewards[order], ids[order], kind=kind, mask=mask[order])
        torch.testing.assert_close(other, result[order], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("number", [0.1, -1e4, 1 / 3, 0.0])
def test_equal_rewards_are_exactly_zero(dtype, number):
    """A mean in floats is not the number: 0.1 seven times is not 0.7, and 1e-17 / 1e-17 is 1."""
    rewards = torch.full((21,), number, dtype=dtype)
    for kind in KINDS:
        result = group_advantage(rewards, torch.tensor([0, 7, 21]), kind=kind)
        assert torch.equal(result, torch.zeros_like(rewards))


def test_one_alone_keeps_its_reward_or_has_none():
    rewards, ids = torch.tensor([5.0, 2.0, 4.0, math.nan]), torch.tensor([1, 2, 2, 1])
    mask = torch.tensor([True, True, True, False])
    assert group_advantage(rewards, ids, mask=mask).tolist() == [5.0, -2.0, 2.0, 0.0]
    alone = group_advantage(rewards, ids, kind="grpo", mask=mask).tolist()
    assert alone == pytest.approx([0.0, -(0.5**0.5), 0.5**0.5, 0.0])
    nobody = group_advantage(rewards, ids, mask=torch.zeros(4))
    assert nobody.tolist() == [0.0] * 4


def test_large_rewards_keep_their_digits():
    small = torch.tensor([0.0, 1.0, 3.0, 7.0], dtype=torch.float64)
    for kind in KINDS:
        expected = group_advantage(small, torch.zeros(4).int(), kind=kind)
        large = group_advantage(small + 2.0**40, torch.zeros(4).int(), kind=kind)
        torch.testing.assert_close(large, expected, rtol=1e-14, atol=0)


def test_nothing_is_legal():
    two = torch.tensor([1.0, 2.0])
    assert group_advantage(two, torch.tensor([0, 0, 0, 0, 2, 2])).tolist() == [-1.0, 1.0]
    for groups in (torch.zeros(0).long(), torch.zeros(3).int(), torch.tensor([0])):
        assert group_advantage(torch.zeros(0), groups).shape == (0,)


def test_a_nan_stays_in_its_group():
    rewards = torch.tensor([math.nan, 1.0, math.inf, 2.0, 3.0, 5.0, math.nan, 7.0])
    mask = torch.tensor([True] * 6 + [True, False])
    for kind in KINDS:
        result = group_advantage(rewards, torch.tensor([0, 2, 4, 6, 8]), kind=kind, mask=mask)
        assert not result[:4].isfinite().any()
        assert result[4:6].isfinite().all()
        assert result[7] == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # forward mode's own
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    rewards = torch.tensor([1.0, 4.0, -2.0, 0.5, 9.0, 3.0, 1.0], dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1])
    for groups in (torch.tensor([8, 8, 8, 8, 5, 6, 6]), torch.tensor([0, 4, 4, 5, 7])):

        def whole(rewards, groups=groups):
            return group_advantage(rewards, groups, kind=kind, mask=mask)

        given = rewards.clone().requires_grad_()
        assert torch.autograd.gradcheck(whole, given, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(whole, given)
        poisoned = rewards.masked_fill(mask == 0, math.nan).requires_grad_()
        slopes = [
            torch.autograd.grad(whole(each).square().sum(), each)[0] for each in (given, poisoned)
        ]
        assert torch.equal(*slopes)
    equal = torch.ones(4, requires_grad=True)
    (slope,) = torch.autograd.grad(group_advantage(equal, mask[:4], kind=kind)[0], equal)
    assert slope.isfinite().all()


# torch's compiler trips over a warning of torch's own.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles_as_one_graph_and_maps():
    rewards, mask = torch.randn(3, 6), torch.rand(3, 6) < 0.7
    ids = torch.tensor([[0, 0, 1, 1, 1, 0], [2, 2, 2, 2, 2, 9], [0, 1, 2, 3, 4, 5]])
    offsets = torch.tensor([0, 2, 6])
    torch._dynamo.reset()
    for kind in KINDS:
        expected = [group_advantage(*each, kind=kind) for each in zip(rewards, ids, strict=True)]
        mapped = torch.vmap(lambda r, i, kind=kind: group_advantage(r, i, kind=kind))(rewards, ids)
        torch.testing.assert_close(mapped, torch.stack(expected))

        def both(r, i, m, kind=kind):
            apart = group_advantage(r, offsets, kind=kind, mask=m)
            return group_advantage(r, i, kind=kind, mask=m) + apart

        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        for each in zip(rewards, ids, mask, strict=True):
            torch.testing.assert_close(compiled(*each), both(*each))


def test_what_could_be_either_is_refused():
    """Four numbers for four completions: three groups by offsets, or ids of two groups."""
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0])
    either = torch.tensor([0, 0, 4, 4])
    with pytest.raises(ValueError, match="expected ids or offsets, got 4 numbers that could be ei"):
        group_advantage(rewards, either)
    assert group_advantage(rewards, either + 1).tolist() == [-1.0, 1.0, -4.0, 4.0]
    ids = torch.arange(3).repeat_interleave(either.diff())
    assert group_advantage(rewards, ids).tolist() == [
        pytest.approx(each) for each in (1 - 14 / 3, 2 - 13 / 3, 4 - 11 / 3, 8 - 7 / 3)
    ]
    # Where numbers are not looked at, nobody takes a wrong result for a right one.
    seen = torch.vmap(lambda rewards: group_advantage(rewards, either))(rewards[None])
    assert seen.isnan().all()
    for sure in ([0, 0, 3, 3], [1, 1, 4, 4], [0, 4, 0, 4]):
        assert group_advantage(rewards, torch.tensor(sure)).isfinite().all()


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (TypeError, "rewards: expected a tensor, got list", {"rewards": [1.0]}),
        (TypeError, "rewards: expected float32.* got int64", {"rewards": torch.ones(3).long()}),
        (
            ValueError,
            r"rewards: expected \(B,\), got shape \(3, 2\); .*\.sum\(-1\), or rewards.flatten",
            {"rewards": torch.ones(3, 2)},
        ),
        (TypeError, "groups: expected a tensor, got list.* of names np.unique", {"groups": ["a"]}),
        (TypeError, "groups: expected a tensor, got int.* for groups of n", {"groups": 3}),
        (TypeError, "groups: .*int32, got float32; pass groups.long", {"groups": torch.ones(3)}),
        (ValueError, r"groups: expected shape \(3,\) or", {"groups": torch.ones(3, 1).long()}),
        (ValueError, r"groups: expected shape \(3,\) or", {"groups": torch.ones(0).long()}),
        (ValueError, "3 ids, or offsets from 0 to 3 .* got 2 n", {"groups": torch.tensor([0, 2])}),
        (ValueError, "groups: expected 3 ids, or off", {"groups": torch.tensor([0, 2, 1, 3])}),
        (ValueError, "groups: expected 3 ids, or off", {"groups": torch.tensor([1, 3])}),
        (ValueError, "kind: expected one of rloo, grpo, got 'mean'", {"kind": "mean"}),
        (TypeError, "mask: expected a tensor, got list", {"mask": [True] * 3}),
        (ValueError, r"mask: expected shape \(3,\), got", {"mask": torch.ones(4)}),
        (ValueError, "mask: expected 0 or 1, got 0.5 at place 0", {"mask": torch.full((3,), 0.5)}),
        (TypeError, "mask: expected bool, or integers or", {"mask": torch.ones(3) + 0j}),
    ],
)
def test_what_is_wrong_is_named(error, message, given):
    arguments = {"rewards": torch.ones(3), "groups": torch.tensor([5, 5, 6])} | given
    with pytest.raises(error, match=message):
        group_advantage(**arguments)
