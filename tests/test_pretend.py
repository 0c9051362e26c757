import copy
import io
import pickle
import types

import numpy as np
import pytest
import torch
from pretend import launch_as, place_of, pretended
from recorder import record
from torch import nn

from vecpg.adam import Adam
from vecpg.returns import reference, reward_to_go


@pytest.fixture
def device():
    with pretended() as made:
        yield made


def test_tensors_say_where_they_are_and_so_does_what_comes_of_them(device):
    made = torch.zeros(2, 3, device="cuda")
    generator = torch.Generator(device="cuda")
    for each in (
        made,
        made[1:].T,
        made + 1,
        made > 0,
        made.to(torch.int64),
        made.cpu().cuda(),
        torch.ones(2).to("cuda:0", torch.float64),
        torch.ones(2).to(made),
        torch.full((2,), 3, device=torch.device("cuda")),
        torch.tensor([1, 2], device="cuda"),
        torch.as_tensor(np.ones(3), device="cuda:0"),
        torch.arange(3, device=made.device),
        torch.rand(3, device="cuda", generator=generator),
        torch.empty_like(made),
        torch.zeros_like(torch.ones(1), device="cuda"),
        made.new_ones(3),
        torch.where(made > 0, made, 1.0),
        copy.deepcopy(made),
        nn.Parameter(made),
    ):
        assert each.device == torch.device("cuda", 0)
        assert each.is_cuda
        assert not each.is_cpu
    for each in (
        torch.zeros(2),
        made.cpu(),
        made.to("cpu"),
        torch.zeros_like(made, device="cpu"),
        made.new_zeros(2, device="cpu"),
        made.cpu().pin_memory(),
        torch.zeros(2, device="meta"),
    ):
        assert not each.is_cuda
    assert torch.zeros(2, device="meta").is_meta
    assert generator.device.type == "cuda"


def test_torch_is_as_before_afterwards():
    with pytest.raises(ZeroDivisionError), pretended():
        inside = torch.zeros(1, device="cuda")
        raise ZeroDivisionError
    assert inside.device.type == "cpu"
    assert not torch.cuda.is_available()
    assert "device" not in torch.Tensor.__dict__
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_there_is_one_device(device):
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    assert torch.cuda.current_device() == 0
    assert torch.cuda.get_device_name() == "Pretended"
    free, total = torch.cuda.mem_get_info()
    assert 0 < free < total
    with torch.cuda.device_of(torch.zeros(1, device="cuda")):
        pass
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() is stream
    assert torch.cuda.current_stream() is not stream
    torch.manual_seed(3)
    assert device.seeds == [3]


@pytest.mark.parametrize(
    "mixes",
    [
        lambda cuda, host: cuda + host,
        lambda cuda, host: host * cuda,
        lambda cuda, host: host.add_(cuda),
        lambda cuda, host: host.add_(cuda[0]),
        lambda cuda, host: host[0].add_(cuda[0]),
        lambda cuda, host: cuda @ host,
        lambda cuda, host: torch.cat([cuda, host]),
        lambda cuda, host: torch.stack([cuda[0], host[0]]),
        lambda cuda, host: torch.where(cuda > 0, cuda, host),
        lambda cuda, host: host[cuda.long()],
        lambda cuda, host: cuda.index_select(0, host.long()),
        lambda cuda, host: cuda.index_put_((cuda.long(),), host),
        lambda cuda, host: torch.add(cuda, 1, out=host),
        lambda cuda, host: torch._foreach_add([cuda], [host]),
        lambda cuda, host: nn.functional.linear(cuda, host[None]),
        lambda cuda, host: cuda.normal_(generator=torch.Generator()),
        lambda cuda, host: torch.rand(2, device="cuda", generator=torch.Generator()),
    ],
)
def test_tensors_on_two_devices_are_refused(device, mixes):
    with pytest.raises(RuntimeError, match="on the same device|device type for generator"):
        mixes(torch.ones(2, device="cuda"), torch.ones(2))


def test_a_number_of_the_host_is_none_of_another_device(device):
    cuda, number = torch.ones(2, device="cuda"), torch.tensor(3.0)
    assert (cuda * number).cpu().tolist() == [3, 3]
    cuda.fill_(number)
    cuda[0] = number
    cuda[cuda > 9] = 0.0
    device.clear()
    cuda.add_(number)
    assert device.waits.of() == 0
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([cuda, number[None]])


def test_the_host_has_no_memory_of_the_device(device):
    made = torch.zeros(2, device="cuda")
    for reads in (lambda: made.numpy(), lambda: np.asarray(made)):
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            reads()
    assert made.cpu().numpy().tolist() == [0, 0]


WAITS = [
    ("item", lambda x: x[0].item()),
    ("item", lambda x: bool((x > 0).any())),
    ("item", lambda x: int(x[1])),
    ("item", lambda x: [0, 1, 2][x.long()[0]]),
    ("item", lambda x: x.masked_fill_(x > 0, x[0])),
    ("tolist", lambda x: x.tolist()),
    ("nonzero", lambda x: x.nonzero()),
    ("nonzero", lambda x: torch.where(x > 0)),
    ("boolean index", lambda x: x[x > 0]),
    ("boolean index", lambda x: x.__setitem__(x > 0, torch.ones(2, device="cuda"))),
    ("boolean index", lambda x: x.__setitem__(x > 0, x[0])),
    ("masked_select", lambda x: x.masked_select(x > 0)),
    ("equal", lambda x: torch.equal(x, x)),
    ("repeat_interleave", lambda x: torch.repeat_interleave(x, x.long())),
    ("_unique2", lambda x: x.unique()),
    ("copy to the host", lambda x: x.cpu()),
    ("copy to the host", lambda x: x.to("cpu")),
    ("copy to the host", lambda x: torch.empty(3).copy_(x)),
    ("copy to the host", lambda x: torch.empty(3).copy_(x, non_blocking=True)),
    ("copy to the host", lambda x: torch.empty(3, pin_memory=True).copy_(x)),
    ("copy to the device", lambda x: torch.ones(3).to("cuda")),
    ("copy to the device", lambda x: torch.ones(3).to("cuda", non_blocking=True)),
    ("copy to the device", lambda x: torch.ones(3).pin_memory().cuda()),
    ("copy to the device", lambda x: torch.tensor([1, 2], device="cuda")),
    ("copy to the device", lambda x: torch.tensor(1.0, device="cuda")),
    ("copy to the device", lambda x: torch.as_tensor(np.ones(2), device="cuda")),
    ("copy to the device", lambda x: x.new_tensor([1.0])),
    ("copy to the device", lambda x: x.copy_(torch.ones(3))),
    ("copy to the device", lambda x: torch.where(x > 0, x, torch.tensor(1.0))),
    ("copy to the device", lambda x: x.__setitem__(torch.zeros_like(x).long(), 1.0)),
    ("index from the host", lambda x: x[torch.tensor([0, 1])]),
    ("synchronize", lambda x: torch.cuda.synchronize()),
    ("synchronize", lambda x: torch.cuda.current_stream().synchronize()),
    ("pickle", lambda x: pickle.dumps(x)),
    ("pickle", lambda x: torch.save({"x": x}, io.BytesIO())),
]


@pytest.mark.parametrize(("kind", "waits"), WAITS)
def test_what_the_host_waits_for_is_counted(device, kind, waits):
    numbers = torch.tensor([0.0, 1.0, 2.0], device="cuda")
    device.clear()
    with device.phase("read"):
        waits(numbers)
    assert device.waits.of("read", kind, "tests/test_pretend.py:") == 1
    assert device.waits.of() == 1
    assert device.looks.of() == 0


def test_what_does_not_wait_is_not_counted_as_if_it_did(device):
    numbers, pinned = torch.ones(3, device="cuda"), torch.ones(3).pin_memory()
    at = torch.zeros(1, dtype=torch.int64, device="cuda")
    device.clear()
    pinned.to("cuda", non_blocking=True)
    numbers.copy_(pinned, non_blocking=True)
    numbers.to("cpu", non_blocking=True)
    numbers[at], numbers[0], numbers[:2]
    numbers[numbers > 0] = 1.0
    torch.where(numbers > 0, numbers, 0.0)
    torch.full((3,), 2.0, device="cuda")
    numbers.index_select(0, at), numbers.take(at), numbers.gather(0, at)
    numbers.cumsum(0), numbers.sort(), numbers.max(dim=0)
    torch.repeat_interleave(numbers, numbers.long(), output_size=3)
    len(numbers), numbers.shape, numbers.numel()
    assert device.waits.of() == device.looks.of() == 0


def test_operations_are_counted_and_views_and_memory_are_not(device):
    numbers = torch.ones(2, 3, device="cuda")
    layer = nn.Linear(3, 4).to("cuda")
    device.clear()
    with device.phase("none"):
        numbers[0], numbers.T, numbers.reshape(3, 2), numbers.detach(), numbers.expand(2, 2, 3)
        torch.empty(3, device="cuda"), torch.empty_like(numbers), torch.ones(3) + 1
        numbers[:0] + 1  # of nothing
    assert device.operations.of("none") == 0
    for count, operates in (
        (1, lambda: numbers + 1),
        (1, lambda: numbers.add_(1)),
        (1, lambda: layer(numbers)),
        (1, lambda: numbers.T.contiguous()),
        (1, lambda: torch._foreach_add([numbers, numbers], 1)),
        (1, lambda: torch.zeros(3, device="cuda")),
        (2, lambda: (numbers > 0) & True),
        (3, lambda: torch.where(numbers > 0, numbers, 0.0)),  # the number is a tensor first
    ):
        device.clear()
        operates()
        assert device.operations.of() == count
    device.clear()
    with torch.inference_mode():
        layer(numbers)
    assert [each.kind for each in device.operations] == ["addmm"]
    assert "addmm" in device.report()


def test_a_look_is_apart_and_what_it_shows_was_not_there_before(device):
    for kind in (torch.float32, torch.int64, torch.bool):
        numbers = torch.ones(3, device="cuda").to(kind)
        arrived = torch.zeros(3, dtype=kind, pin_memory=True)
        event = torch.cuda.Event()
        device.clear()
        arrived.copy_(numbers, non_blocking=True)
        event.record()
        numbers.zero_()
        assert not torch.equal(arrived, torch.ones(3).to(kind))
        event.synchronize()
        assert torch.equal(arrived, torch.ones(3).to(kind))
        assert device.looks.of() == 1
        assert device.waits.of() == 0


def test_an_event_says_nothing_of_what_came_after_it(device):
    numbers, arrived = torch.ones(3, device="cuda"), torch.zeros(3, pin_memory=True)
    event = torch.cuda.Event()
    event.record()
    arrived.copy_(numbers, non_blocking=True)
    event.synchronize()
    assert arrived.isnan().all()
    numbers.sum().item()
    assert arrived.tolist() == [1, 1, 1]


def test_pinned_memory_is_left_alone_while_it_is_read(device):
    pinned = torch.ones(3).pin_memory()
    pinned.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    pinned.fill_(2.0)
    pinned.to("cuda", non_blocking=True)
    pinned.numpy()[0] = 5.0
    with pytest.raises(RuntimeError, match="written to while a copy"):
        torch.cuda.synchronize()


def test_events_have_times(device):
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    last.record()
    assert last.query()
    assert first.elapsed_time(last) >= 0


def training(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(device)
    first = model[0].weight
    optimizer = Adam(model.parameters(), 0.1)
    inputs = torch.arange(12.0, device=device).reshape(4, 3) / 10
    at = torch.tensor([1, 0, 1, 1], device=device)
    for _ in range(3):
        optimizer.zero_grad()
        out = model(inputs)
        best = out.max(dim=1).values + out.gather(1, at[:, None])[:, 0]
        chosen = torch.where(best > 0, best, 0.5 * best) + out[at, 0] + out[:, 1].cumsum(0)
        chosen.square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert model[0].weight is first
    return model, copy.deepcopy(optimizer)


def test_gradients_and_numbers_are_those_of_the_host(device):
    (mine, _), (theirs, _) = training("cuda:0"), training("cpu")
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert one.is_cuda
        assert one.grad.is_cuda
        assert not other.is_cuda
        assert torch.equal(one.cpu(), other)
        assert torch.equal(one.grad.cpu(), other.grad)
    mine.register_buffer("shift", torch.ones(2, device="cuda"))
    copied = copy.deepcopy(mine)
    assert copied.shift.is_cuda
    assert all(each.is_cuda for each in copied.parameters())


def test_a_gradient_goes_back_to_where_it_belongs(device):
    host = torch.ones(2, requires_grad=True)
    (3 * host.to("cuda")).sum().backward()
    assert not host.grad.is_cuda
    (host.to("cuda") * torch.ones(2, device="cuda")).sum().cpu().backward()
    assert not host.grad.is_cuda
    assert host.grad.tolist() == [4, 4]


def test_additions_in_any_order_are_told(device):
    numbers = torch.ones(4, device="cuda")
    at = torch.tensor([0, 0, 1, 2], device="cuda")
    for told, adds in (
        (1, lambda: torch.zeros_like(numbers).scatter_add_(0, at, numbers)),
        (0, lambda: torch.zeros_like(at).scatter_add_(0, at, at)),
        (1, lambda: torch.zeros_like(numbers).index_add_(0, at, numbers)),
        (0, lambda: torch.zeros_like(numbers).index_add_(0, at[1:], numbers[1:])),
        (1, lambda: numbers.cumsum(0)),
        (0, lambda: numbers.reshape(2, 2).cumsum(0)),
    ):
        device.clear()
        adds()
        assert device.unordered.of() == told


def scan(rows, out):
    """What a kernel would do, one row after another."""
    for row in range(len(rows)):
        out[row] = rows[: row + 1].sum()


def test_a_launch_is_one_operation_and_recorded_as_one(device):
    module = types.ModuleType("cuda")
    module.scan = None
    rows, out = torch.ones(3, device="cuda"), torch.empty(3, device="cuda")
    with launch_as(module, "scan", scan):
        device.clear()
        module.scan(rows, out)
        assert device.operations.of(kind="scan") == device.operations.of() == 1
        assert out.cpu().tolist() == [1, 2, 3]
        replay = record(lambda: module.scan(rows, out), "cuda")
        rows.fill_(2.0)
        device.clear()
        replay()
        assert device.operations.of(kind="scan") == 1
        assert out.cpu().tolist() == [2, 4, 6]
    assert module.scan is None


def test_a_graph_has_no_effect_until_it_is_replayed(device):
    total, given = torch.zeros(2, device="cuda"), torch.ones(2, device="cuda")
    arrived = torch.zeros(2, pin_memory=True)
    graph = torch.cuda.CUDAGraph()
    device.clear()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        doubled = 2 * given
        total += doubled
        arrived.copy_(total, non_blocking=True)
    assert device.operations.of() == 0
    assert total.cpu().tolist() == [0, 0]
    assert doubled.cpu().isnan().all()
    given.fill_(4.0)
    device.clear()
    graph.replay()
    graph.replay()
    assert device.operations.of() == device.operations.of(kind="graph") == 2
    assert total.cpu().tolist() == arrived.tolist() == [16, 16]
    assert doubled.cpu().tolist() == [8, 8]


@pytest.mark.parametrize(("kind", "waits"), WAITS)
def test_a_graph_refuses_what_waits(device, kind, waits):
    numbers = torch.tensor([0.0, 1.0, 2.0], device="cuda")
    with (
        pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        waits(numbers)
    assert not torch.cuda.is_current_stream_capturing()


def returns(rewards, dones, gamma, final, last, mask, mode, out):
    if not isinstance(gamma, torch.Tensor):
        gamma = torch.full((), gamma, dtype=torch.float64, device=out.device)
    out.copy_(reference.reward_to_go(rewards, dones, gamma, final, last, mask, mode))


def test_an_operator_of_ours_is_what_it_does(device):
    kernels = pytest.importorskip("vecpg.returns.cuda")
    given = torch.arange(6.0, device="cuda").reshape(3, 2)
    rewards = given.clone().requires_grad_()
    ends = torch.zeros(3, 2, dtype=torch.bool, device="cuda")
    with launch_as(kernels, "reward_to_go", returns):
        device.clear()
        found = reward_to_go(rewards, ends, 0.5)
        assert [each.kind for each in device.operations] == ["reward_to_go"]
        found.sum().backward()
    assert found.is_cuda
    assert found.tolist() == [[2, 3.75], [4, 5.5], [4, 5]]
    assert rewards.grad.cpu()[:, 0].tolist() == [1, 1.5, 1.75]


def test_memory_has_a_place(device):
    assert place_of(torch.zeros(1, device="cuda")) == "cuda"
    assert torch.zeros(1).pin_memory().is_pinned()
    assert torch.zeros(1, pin_memory=True).is_pinned()
    assert not torch.zeros(1).is_pinned()
