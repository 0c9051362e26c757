import numpy as np
import pytest
import torch
from torch import nn

from vecpg.kernels.sums import gradient_in_order, in_order


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
