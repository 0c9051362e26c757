import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from vecpg.kernels.sums import gradient_in_order, here, in_order, merged, moments


def test_numbers_arrays_and_tensors_are_added_from_the_left():
    # Three roundings of which each order makes others.
    parts = [1.0, 2.0**-53, 2.0**-53, -1.0]
    assert in_order(parts) == 0.0
    assert in_order(parts[::-1]) == 2.0**-52
    assert in_order([np.full(3, part) for part in parts]).tolist() == [0.0] * 3
    assert in_order(torch.tensor(parts, dtype=torch.float64)).item() == 0.0


def test_what_one_shard_gives_is_passed_on():
    alone = torch.tensor(-0.0)
    assert in_order([alone]) is alone
    assert in_order(iter([alone])) is alone


class Parts(nn.Module):
    """Of its parameters every shard uses some."""

    def __init__(self):
        super().__init__()
        self.always, self.first, self.last, self.never, self.frozen = (
            nn.Parameter(torch.ones(())) for _ in range(5)
        )
        self.frozen.requires_grad_(False)

    def forward(self, shard, scale):
        used = self.always * self.frozen
        used = used + (self.first if shard == 0 else 0) + (self.last if shard == 2 else 0)
        return used * scale


@pytest.mark.parametrize("kept", [None, 7.0])
def test_gradients_of_shards_are_added_in_their_order(kept):
    module, scales = Parts().double(), [1.0, 2.0**-53, 2.0**-53]
    if kept is not None:
        module.always.grad = torch.tensor(kept, dtype=torch.float64)  # of an earlier update

    def differentiate(shard):
        # In two chunks, which autograd itself adds.
        for part in (0.25, 0.75):
            module(shard, scales[shard] * part).backward()
        return torch.tensor([scales[shard], shard], dtype=torch.float64)

    assert gradient_in_order(module, differentiate, 3).tolist() == [1.0, 3.0]
    assert module.always.grad.item() == 1.0  # 1 + 2**-53 is 1, twice
    assert module.first.grad.item() == 1.0
    assert module.last.grad.item() == 2.0**-53
    assert module.never.grad is None
    assert module.frozen.grad is None
    scales.reverse()
    gradient_in_order(module, differentiate, 3)
    assert module.always.grad.item() == 1.0 + 2.0**-52


def test_one_vector_is_held_at_a_time():
    alive = []

    def vectors():
        for number in range(5):
            vector = torch.full((3,), float(number))
            alive.append(weakref.ref(vector))
            assert sum(each() is not None for each in alive) <= 3  # this, the one before, their sum
            yield vector

    total, kept = here(vectors(), [torch.ones(1)])
    assert (total.tolist(), [each.tolist() for each in kept]) == ([10.0] * 3, [[1.0]])


@pytest.mark.parametrize(("at_hand", "elsewhere"), [([1], [0, 2]), ([0], [1, 1]), ([2, 1], [1])])
def test_a_parameter_that_only_others_use_has_their_gradient(at_hand, elsewhere):
    """And one that nobody uses has none, and so no step of Adam."""

    def differentiating(module, numbers):
        def differentiate(k):
            module(numbers[k], 1.0 + numbers[k]).backward()
            return torch.tensor([numbers[k]], dtype=torch.float64)

        return module, differentiate, len(numbers)

    given = []
    gradient_in_order(
        *differentiating(Parts(), elsewhere), lambda own: in_order(given.extend(own) or given)
    )
    ours, whole = Parts(), Parts()
    sums = gradient_in_order(*differentiating(ours, at_hand), lambda own: in_order([*own, *given]))
    assert torch.equal(sums, gradient_in_order(*differentiating(whole, at_hand + elsewhere)))
    assert sums.tolist() == [sum(at_hand + elsewhere)]
    for (name, own), expected in zip(ours.named_parameters(), whole.parameters(), strict=True):
        of_whom = {"always": {0, 1, 2}, "first": {0}, "last": {2}}.get(name, set())
        used = bool(of_whom & {*at_hand, *elsewhere})
        assert (own.grad is not None) == (expected.grad is not None) == used, name
        assert own.grad is None or torch.equal(own.grad, expected.grad), name
        assert own.grad is None or own.grad.dtype == own.dtype


def test_one_shard_keeps_its_gradient_where_it_is():
    module = Parts()
    left = []

    def differentiate(shard):
        module(shard, 1.0).backward()
        left.append(module.always.grad)
        return torch.zeros(1)

    gradient_in_order(module, differentiate, 1)
    assert module.always.grad is left[0]


@pytest.mark.parametrize("sizes", [[3, 1, 40], [0, 7, 2], [5, 0, 0, 1], [0, 0]])
def test_moments_of_groups_are_those_of_all_rows(sizes):
    rng = np.random.default_rng(1)
    groups = [rng.normal(1e5, [0.5, 2.0], (size, 2)).astype(np.float32) for size in sizes]
    found = moments(torch.from_numpy(groups[0]))
    for group in groups[1:]:
        found = merged(found, moments(torch.from_numpy(group)))
    whole = np.concatenate(groups).astype(np.float64)
    assert found[0] == len(whole)
    if len(whole):
        np.testing.assert_allclose(found[1:3], whole.mean(axis=0), rtol=1e-13)
        np.testing.assert_allclose(found[3:], whole.var(axis=0) * len(whole), rtol=1e-9)
    else:
        assert not found.any()


def test_rows_that_are_none_change_nothing_and_what_is_not_finite_stays():
    some = moments(torch.tensor([[0.1, 7.0], [0.3, -2.0]]))
    assert torch.equal(merged(some, moments(torch.empty(0, 2))), some)
    for wrong in (math.nan, math.inf):
        rows = moments(torch.tensor([[wrong, 1.0]]))
        for found in (merged(some, rows), merged(rows, some)):
            assert not found[1].isfinite()
            assert found[3].isnan()
            assert found[[0, 2, 4]].isfinite().all()
