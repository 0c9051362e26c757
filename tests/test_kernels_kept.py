import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch

from vecpg.kernels import kept
from vecpg.returns import packed_reward_to_go, reward_to_go


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(kept, "_LARGE", 1)
    monkeypatch.setattr(kept, "_free", {})
    monkeypatch.setattr(kept, "_in_use", {})


def result_of(shape=(40, 30), value=1.0, **options):
    rewards = torch.full(shape, value, **options)
    return reward_to_go(rewards, torch.ones(shape, dtype=torch.bool), 0.5)


def poison_free():
    """NaN in everything that may be handed out; how many bytes that is."""
    for buffer in kept._free.values():
        buffer[:] = 255
    return sum(buffer.nbytes for buffer in kept._free.values())


def numpy_array(result):
    return result.numpy()


def view_of_a_part(result):
    return result[3:, ::2]


def other_dtype(result):
    return result.view(torch.int32)


def storage(result):
    return result.untyped_storage()


def detached(result):
    return result.detach()


def graph(result):
    return result.clone().requires_grad_() * result  # keeps it for the gradient


def through_dlpack(result):
    return torch.utils.dlpack.from_dlpack(result)


def memory_view(result):
    return memoryview(result.numpy())


def parameter(result):
    return torch.nn.Parameter(result)


HOLDERS = [numpy_array, view_of_a_part, other_dtype, storage, detached, graph, through_dlpack]
HOLDERS += [memory_view, parameter]


@pytest.mark.parametrize("hold", HOLDERS)
def test_memory_is_reused_only_when_nobody_refers_to_it(hold):
    result = result_of()
    place = result.data_ptr()
    held = hold(result)
    del result
    assert poison_free() == 0
    others = [result_of(value=2.0) for _ in range(3)]
    assert place not in [other.data_ptr() for other in others]
    if hold is graph:
        (grad,) = torch.autograd.grad(held.sum(), held.grad_fn.next_functions[0][0].variable)
        assert torch.equal(grad, torch.ones(40, 30))
        del grad
    del held, others
    assert poison_free() == 4 * 40 * 30 * 4
    results = [result_of(value=2.0) for _ in range(4)]
    assert place in [each.data_ptr() for each in results]
    assert torch.equal(torch.stack(results), torch.full((4, 40, 30), 2.0))


def test_a_gradient_keeps_what_it_needs():
    rewards = torch.ones(40, 30, dtype=torch.float64, requires_grad=True)
    dones = torch.zeros(40, 30, dtype=torch.bool)
    (reward_to_go(rewards, dones, 0.5) ** 2).sum().backward()
    expected = rewards.grad.clone()
    rewards.grad = None
    loss = (reward_to_go(rewards, dones, 0.5) ** 2).sum()
    poison_free()
    others = [reward_to_go(torch.zeros_like(rewards), dones, 0.5) for _ in range(5)]
    loss.backward()
    assert torch.equal(rewards.grad, expected)
    assert torch.equal(torch.stack(others), torch.zeros(5, 40, 30, dtype=torch.float64))


@pytest.mark.parametrize(
    "shaped",
    [
        torch.zeros(0, 4),
        torch.zeros(5),
        torch.zeros(5, 1),
        torch.zeros(1, 5),
        torch.zeros(5, 7).t(),
        torch.zeros(5, 14)[:, ::2],
        torch.zeros(5, 7, 3).permute(2, 0, 1),
        torch.zeros(5, 7, 3, dtype=torch.float64).permute(1, 0, 2)[::2],
        torch.zeros(3, 1).expand(3, 4),
        torch.zeros(5, 7, dtype=torch.bfloat16),
        torch.as_strided(torch.zeros(100), (1, 5), (77, 1)),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_a_result_is_like_what_torch_makes(shaped, inference):
    with torch.inference_mode(inference):
        ours, torchs = kept.empty_like(shaped), torch.empty_like(shaped)
    for about in ("shape", "dtype", "device", "is_leaf", "_base", "grad_fn", "requires_grad"):
        assert getattr(ours, about) == getattr(torchs, about)
    assert ours.stride() == torchs.stride()
    assert ours.untyped_storage().nbytes() == torchs.untyped_storage().nbytes()
    assert ours.storage_offset() == 0
    assert ours._is_view() is False
    assert ours.is_inference() == torchs.is_inference()


def test_a_result_does_what_tensors_do():
    result = result_of()
    ones = torch.ones(40, 30)
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result), torch.load(file)):
        assert torch.equal(other, ones)
        assert other.data_ptr() != result.data_ptr()
    assert torch.equal(result.requires_grad_().mul(2).detach(), 2 * ones)
    result = result_of().resize_(20, 30)  # to fewer
    assert torch.equal(result, ones[:20])
    with pytest.raises(RuntimeError, match="not resizable"):
        result.resize_(80, 30)


def test_shared_memory_is_not_kept():
    result = result_of()
    place = result.data_ptr()
    result.share_memory_()
    assert result.is_shared()
    assert [buffer.ctypes.data for buffer in kept._free.values()] == [place]
    poison_free()
    assert torch.equal(result, torch.ones(40, 30))
    del result
    assert len(kept._free) == 1


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(kept, "_LIMIT", 10_000)
    sizes = [4 * n for n in (500, 600, 700, 800, 900)]
    results = [result_of((size // 4, 1)) for size in sizes]
    while results:
        results.pop(0)
        assert poison_free() <= 10_000
    # The last that fit; one that is too large is not.
    assert [buffer.nbytes for buffer in kept._free.values()] == sizes[2:]
    del results
    result_of((2501, 1))
    assert poison_free() <= 10_000


def test_a_buffer_serves_sizes_near_its_own():
    place = result_of((100, 1)).data_ptr()
    assert result_of((81, 1)).data_ptr() == place
    assert result_of((79, 1)).data_ptr() != place
    assert result_of((101, 1)).data_ptr() != place


def test_no_two_results_share_a_line_of_the_cache():
    results = [result_of((n, 7)) for n in range(1, 40)]
    assert {result.data_ptr() % 64 for result in results} == {0}


def test_threads_share_what_is_kept_and_no_result():
    wrong = []

    def work(number):
        rewards = torch.full((50, 40), float(number))
        dones = torch.ones(50, 40, dtype=torch.bool)
        mine = []
        for step in range(100):
            mine.append(reward_to_go(rewards, dones, 0.5))
            if len(mine) > 1 + step % 4:
                taken = mine.pop(0)
                if not torch.equal(taken, rewards):
                    wrong.append(number)
                taken.fill_(-1.0)
                if step % 50 == 0:
                    cycle = [taken]
                    cycle.append(cycle)
                    del cycle
                    if number == 0:
                        gc.collect()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    gc.collect()
    assert wrong == []
    assert len(kept._in_use) == 0
    # A thread holds seven at once, and two in cycles; 400 were made.
    assert 4 <= len(kept._free) <= 4 * (7 + 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_of_fork_has_memory_of_its_own():
    result, free = result_of(), result_of(value=2.0)
    del free
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        found = b"wrong"
        try:
            result.fill_(7.0)
            of_child = result_of(value=3.0)
            if torch.equal(of_child, torch.full((40, 30), 3.0)):
                found = b"right"
        finally:
            os.write(writer, found)
            os._exit(0)
    assert os.read(reader, 5) == b"right"
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    assert torch.equal(result, torch.ones(40, 30))


def test_results_may_outlive_the_interpreter():
    """Those that die when modules have gone, in whatever order; a fault would be a signal."""
    text = """
import sys, torch
from vecpg.kernels import kept
held = [kept.empty_like(torch.zeros(300_000)) for _ in range(3)]
sys.held = kept.empty_like(torch.zeros(300_000))
torch.held = kept.empty_like(torch.zeros(300_000))
class Late:
    def __init__(self): self.held = kept.empty_like(torch.zeros(300_000))
    def __del__(self): del self.held
sys.late = Late()
held.append(held)
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_packed_and_the_differentiable_result_are_kept_too():
    rewards, offsets = torch.ones(1000), torch.tensor([0, 500, 1000])
    place = packed_reward_to_go(rewards, offsets, 0.0).data_ptr()
    assert packed_reward_to_go(rewards, offsets, 0.0).data_ptr() == place
    rewards.requires_grad_()
    dones = torch.ones(1000, dtype=torch.bool)
    assert reward_to_go(rewards, dones, 0.5).data_ptr() == place
