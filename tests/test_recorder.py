import copy

import pytest
import torch
from recorder import record
from torch import nn


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def step_of(model, inputs, averages):
    """Forward, backward and a step in place, as an update has it."""

    def step():
        for parameter in model.parameters():
            parameter.grad.zero_()
        out = model(inputs)
        loss = torch.where(out > 0.0, out, 0.5 * out).max(dim=1).values.square().mean()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        torch._foreach_lerp_(averages, gradients, 0.25)
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), averages, alpha=-0.5)

    return step


def test_a_replay_equals_a_direct_run_with_other_inputs():
    direct = network()
    recorded = copy.deepcopy(direct)
    results = []
    for model, wrapped in ((direct, lambda function: function), (recorded, record)):
        inputs = torch.zeros(4, 3)
        averages = [torch.zeros_like(each) for each in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        step = wrapped(step_of(model, inputs, averages))
        if wrapped is not record:
            step()  # recording it did
        numbers = torch.Generator().manual_seed(1)
        for _ in range(3):
            inputs.normal_(generator=numbers)
            step()
        results.append([*model.parameters(), *averages])
    before = network()
    for mine, theirs, first in zip(*results, before.parameters(), strict=False):
        assert torch.equal(mine, theirs)
        assert not torch.equal(mine, first)


def test_a_counter_of_python_is_frozen_and_one_on_the_device_is_not():
    rows, at, counter = torch.zeros(4, 2), torch.zeros(1, dtype=torch.int64), [0]

    def by_python():
        rows[counter[0]] = 1.0
        counter[0] += 1

    replay = record(by_python)
    replay()
    assert rows.sum(dim=1).tolist() == [2, 0, 0, 0]  # not [2, 2, 0, 0]
    assert counter == [1]

    def by_tensor():
        rows.index_fill_(0, at, 3.0)
        at.add_(1)

    replay = record(by_tensor)
    replay()
    replay()
    assert rows[:, 0].tolist() == [3, 3, 3, 0]


def test_made_results_stay_where_they_were():
    given, kept = torch.tensor([1.0, 2.0]), []

    def function():
        doubled = 2 * given
        kept.append((doubled, doubled[1:], doubled.reshape(2, 1).sum()))

    replay = record(function)
    given.fill_(5.0)
    replay()
    ((doubled, view, total),) = kept
    assert doubled.tolist() == [10, 10]
    assert view.tolist() == [10]
    assert total.item() == 20


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_made_of_other_operations_is_taken_apart(inference):
    layer, given, out = nn.Linear(2, 2), torch.ones(3, 2), torch.zeros(3, 2)

    def function():
        with torch.inference_mode(inference), torch.no_grad():
            out.copy_(layer(given).reshape(2, 3).flatten().view(3, 2))

    replay = record(function)
    given.fill_(2.0)
    replay()
    assert torch.equal(out, layer(given).detach())


def test_random_numbers_are_drawn_anew():
    out = torch.zeros(5)
    replay = record(out.uniform_)
    first = out.clone()
    replay()
    assert not torch.equal(out, first)


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x[0].item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: torch.repeat_interleave(x, x.long()),
        lambda x: x.__setitem__(x > 0, torch.ones(2)),
    ],
)
def test_what_the_host_reads_is_refused(reads):
    numbers = torch.tensor([0.0, 1.0, 2.0])
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        record(lambda: reads(numbers))
    reads(numbers)  # and afterwards it may


def test_a_mask_that_is_filled_with_a_number_is_not_refused():
    numbers = torch.tensor([0.0, 1.0, 2.0])

    def function():
        numbers[numbers > 1] = 0.5

    replay = record(function)
    numbers.fill_(7.0)
    replay()
    assert numbers.tolist() == [0.5] * 3
