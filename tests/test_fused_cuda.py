import math
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, which is for Linux")

from gpu_kernels import compiling, resources  # noqa: E402
from gpu_kernels import interpret as in_interpreter  # noqa: E402
from test_returns_cuda import Recorder, needs_gpu  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from vecpg.adam import Adam  # noqa: E402
from vecpg.fused import cuda  # noqa: E402
from vecpg.kernels.iteration import Entry, Memory, Scalar, Setting, Stamp, Tally, make_memory  # noqa: E402
from vecpg.policy.shape import Shape  # noqa: E402

TINY, ODD, USUAL = (
    Shape(1, (1, 1), 1, True, False, 0),
    Shape(3, (5, 7), 2, False, True, 0),
    Shape(4, (64, 64), 2, True, False, 0),
)
SLOTS, KERNELS = 3, ("_add", "_step", "_finish")


def memory_of(shape, *, runs=1, shards=1, num_envs=40, parts=5, device="cpu"):
    """NaN wherever nothing was written; all averages are 0."""
    memory = make_memory(
        shape,
        runs=runs,
        num_envs=num_envs,
        shards=shards,
        num_steps=2,
        max_episode_steps=3,
        slots=SLOTS,
        parts=parts,
        device=torch.device(device),
    )
    for each in (memory.states, memory.parts, memory.sums, memory.entries, memory.scalars):
        each.fill_(math.nan)
    memory.settings.fill_(math.nan)
    memory.settings[:, Setting.MAX_GRAD_NORM] = math.inf
    memory.states[0, :, 1:, : shape.size] = 0.0
    return memory


def give_iteration(memory, shape, g, size=1.0, *, lr=0.01, t=1):
    """What the kernels before it leave, whose gradients are of such a size."""
    runs, shards, parts, _ = memory.parts.shape
    numbers = torch.randn(runs, shards, parts, shape.size + 2, generator=g, dtype=torch.float64)
    memory.parts[..., : shape.size + 2] = size * numbers
    tallies = torch.randint(1, 100, memory.tallies.shape, generator=g).double()
    tallies[..., Tally.RETURN_SUM] += torch.rand(tallies.shape[:2], generator=g)
    sign = torch.randint(0, 2, (), generator=g) * 2 - 1
    tallies[..., [Tally.RETURN_LOW, Tally.RETURN_HIGH]] *= sign
    tallies[..., Tally.FINITE] = 1
    memory.tallies.copy_(tallies)
    memory.last.copy_(torch.randint(1, 6, memory.last.shape, generator=g))
    beta1, beta2 = Adam([]).betas
    scalars = memory.scalars[memory.at.item() % SLOTS]
    scalars[:, Scalar.STEP_SIZE] = lr / (1 - beta1**t)
    scalars[:, Scalar.ROOT] = (1 - beta2**t) ** 0.5


@contextmanager
def nearest_roots():
    """Torch's own root, on a CPU, need not be the float32 that is nearest to it."""

    def root(tensors):
        return [each.double().sqrt().float() for each in tensors]

    with mock.patch.object(torch, "_foreach_sqrt", root):
        yield


class Alone:
    """A run on the CPU, by `vecpg.adam.Adam`."""

    def __init__(self, numbers, lr):
        self.numbers = numbers.clone().requires_grad_()
        self.adam = Adam([self.numbers], lr)

    def step(self, gradient, norm, longest):
        scale = (longest / (norm + 1e-6)).clamp(max=1.0)
        self.numbers.grad = gradient * scale
        with nearest_roots():
            self.adam.step()

    def state(self):
        return torch.stack([self.numbers.detach(), *self.adam.averages()])


def check_iterations(shape, device="cpu", *, longest=math.inf, count=7, seed=0, **sizes):
    """Through the ring more than once, with gradients that are tiny, and huge."""
    g = torch.Generator().manual_seed(seed)
    memory = memory_of(shape, device=device, **sizes)
    runs = memory.states.shape[1]
    memory.settings[:, Setting.MAX_GRAD_NORM] = longest
    memory.states[0, :, 0, : shape.size] = torch.randn(runs, shape.size, generator=g).to(device)
    alone = [Alone(own[0, : shape.size].cpu(), lr=0.01) for own in memory.states[0]]
    clipped = 0
    for k in range(count):
        size = 10.0 ** torch.randint(-24, 16, (), generator=g).item() if k % 2 else 1.0
        give_iteration(memory, shape, g, size, t=k + 1)
        here, following = k % SLOTS, (k + 1) % SLOTS
        memory.states[following] = math.nan
        memory.entries[here] = math.nan
        before = Memory(*(each.clone() for each in memory))
        cuda.step(memory, shape)
        assert memory.at.tolist() == [k + 1]
        check_untouched(memory, before, shape, here, following)
        for r, run in enumerate(alone):
            entry = dict(zip(Entry, memory.entries[here, r].tolist(), strict=True))
            total = check_entry(memory, shape, r, entry)
            gradient = total[: shape.size].float()
            norm = torch.linalg.vector_norm(gradient.double())
            assert entry[Entry.GRAD_NORM] == pytest.approx(norm.item(), rel=1e-7)
            assert entry[Entry.ROLLOUT_FINITE] == entry[Entry.UPDATE_FINITE] == 1.0
            clipped += entry[Entry.GRAD_NORM] > longest
            run.step(gradient, torch.tensor(entry[Entry.GRAD_NORM]), longest)
            check_state(memory.states[following, r, :, : shape.size].cpu(), run.state())
    assert bool(clipped) is (longest < math.inf)


def check_state(found, expected):
    """The same bits, where torch rounds sums of products as it does nearly everywhere: once."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)


def check_untouched(memory, before, shape, here, following):
    """Nothing is written but what an iteration leaves, and of its rows nothing beyond the last."""
    allowed = {"at", "sums", "states", "entries", "stamps"}
    others = [slot for slot in range(SLOTS) if slot != following]
    assert same(memory.states[others], before.states[others])
    assert memory.states[following, ..., shape.size :].isnan().all()
    assert memory.sums[:, shape.size + 2 :].isnan().all()
    others = [slot for slot in range(SLOTS) if slot != here]
    assert same(memory.entries[others], before.entries[others])
    for name in set(Memory._fields) - allowed:
        assert same(getattr(memory, name), getattr(before, name)), name


def same(one, other):
    return torch.equal(one.nan_to_num(1e30), other.nan_to_num(1e30))


def check_entry(memory, shape, run, entry):
    """What is told of a run, from what the kernels before left; the sums of its parts."""
    parts = memory.parts[run, ..., : shape.size + 2].flatten(0, 1).cpu()
    total = memory.sums[run, : shape.size + 2].cpu()
    exact = parts.sum(dim=0)
    assert ((total - exact).abs() <= 1e-14 * parts.abs().sum(dim=0)).all()
    tallies = memory.tallies[run].cpu().T
    counted = tallies[Tally.COUNTED].sum().item()
    assert entry[Entry.COUNTED] == counted
    assert entry[Entry.ROWS] == memory.last[run].max().item()
    assert entry[Entry.EPISODES] == tallies[Tally.EPISODES].sum().item()
    returns = math.fsum(tallies[Tally.RETURN_SUM].tolist())
    assert entry[Entry.RETURN_SUM] == pytest.approx(returns, rel=1e-14)
    assert entry[Entry.RETURN_LOW] == tallies[Tally.RETURN_LOW].min().item()
    assert entry[Entry.RETURN_HIGH] == tallies[Tally.RETURN_HIGH].max().item()
    assert entry[Entry.POLICY_LOSS] == total[shape.size].item()
    assert entry[Entry.ENTROPY] == total[shape.size + 1].item() / counted
    return total


def check_runs_are_as_alone(shape, device="cpu"):
    g = torch.Generator().manual_seed(3)
    runs = 3
    memory = memory_of(shape, runs=runs, shards=2, device=device)
    memory.settings[1, Setting.MAX_GRAD_NORM] = 0.1
    memory.states[0, :, 0, : shape.size] = 1.0
    give_iteration(memory, shape, g)
    memory.scalars[0, :, Scalar.STEP_SIZE] *= torch.arange(1, runs + 1, device=device)
    single = [memory_of(shape, shards=2, device=device) for _ in range(runs)]
    for r, one in enumerate(single):
        for name in ("settings", "parts", "tallies", "last"):
            getattr(one, name).copy_(getattr(memory, name)[r : r + 1])
        for name in ("states", "scalars"):
            getattr(one, name).copy_(getattr(memory, name)[:, r : r + 1])
    cuda.step(memory, shape)
    for r, one in enumerate(single):
        cuda.step(one, shape)
        assert same(memory.states[:, r], one.states[:, 0])
        assert same(memory.entries[:, r], one.entries[:, 0])
        assert same(memory.sums[r], one.sums[0])


def check_not_finite(shape, device="cpu"):
    """A run whose numbers are not finite stays where it is, and says so; the others go on."""

    def gradient(memory):
        memory.parts[1, 1, 2, shape.size - 1] = math.nan

    def cancelling(memory):
        memory.parts[1, 0, 0, 0], memory.parts[1, 1, 0, 0] = math.inf, -math.inf

    def squares(memory):
        memory.parts[1, 0, 0, 0] = 2e19
        memory.settings[1, Setting.MAX_GRAD_NORM] = 1.0

    def large(memory):
        memory.parts[1, 0, 0, 0] = 1e200

    def loss(memory):
        memory.parts[1, 0, 0, shape.size] = math.inf

    def entropy(memory):
        memory.parts[1, 0, 0, shape.size + 1] = math.nan

    def parameter(memory):
        against = memory.parts[1, ..., shape.size - 1].sum().sign()
        memory.states[0, 1, 0, shape.size - 1] = -3.4e38 * against
        memory.scalars[0, 1, Scalar.STEP_SIZE] = 3e38

    def step_size(memory):
        memory.scalars[0, 1, Scalar.STEP_SIZE] = 1e39

    def rollout(memory):
        memory.tallies[1, -1, Tally.FINITE] = 0

    norms = {gradient: math.nan, cancelling: math.nan, squares: math.inf, large: math.inf}
    for spoil in (*norms, loss, entropy, parameter, step_size, rollout):
        memory = memory_of(shape, runs=3, shards=2, device=device)
        memory.states[0, :, 0, : shape.size] = 0.5
        give_iteration(memory, shape, torch.Generator().manual_seed(4))
        spoil(memory)
        cuda.step(memory, shape)
        assert memory.at.item() == 1
        old, new = memory.states[:2, ..., : shape.size]
        flags = memory.entries[0, :, [Entry.ROLLOUT_FINITE, Entry.UPDATE_FINITE]].tolist()
        wrong = [0.0, 1.0] if spoil is rollout else [1.0, 0.0]
        assert flags == [[1.0, 1.0], wrong, [1.0, 1.0]], spoil.__name__
        assert torch.equal(new[1], old[1])
        assert new.isfinite().all()
        assert (new[::2] != old[::2]).all()
        norm = memory.entries[0, 1, Entry.GRAD_NORM].item()
        assert norm == pytest.approx(norms[spoil], nan_ok=True) if spoil in norms else norm < 1e9


def check_nothing_counted(shape, device="cpu"):
    memory = memory_of(shape, device=device)
    memory.states[0, :, 0, : shape.size] = 0.5
    give_iteration(memory, shape, torch.Generator().manual_seed(5), 0.0)
    memory.tallies[..., Tally.COUNTED] = 0
    cuda.step(memory, shape)
    told = memory.entries[0, 0]
    assert (
        told[[Entry.COUNTED, Entry.POLICY_LOSS, Entry.ENTROPY, Entry.GRAD_NORM]].tolist() == [0] * 4
    )
    assert told[[Entry.ROLLOUT_FINITE, Entry.UPDATE_FINITE]].tolist() == [1, 1]


# In the interpreter, which has to be chosen before the kernels are read: in a process of its own.


@pytest.mark.slow
def test_interpreted():
    in_interpreter(__name__)


def interpret():
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fused(self, x, y, z):
        """The interpreter's own rounds twice; a GPU, and this, once."""
        exact = x.data.astype(np.longdouble) * y.data + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.create_fma = fused
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    check_iterations(USUAL, parts=3)
    check_iterations(USUAL, longest=20.0, seed=1, count=4)
    # Tiles that little fills more than once.
    cuda._PARTS, cuda._SUMS, cuda._NUMBERS, cuda._BLOCKS = 4, 64, 32, 2
    check_iterations(TINY, runs=2, parts=1, seed=2)
    check_iterations(ODD, runs=3, shards=2, num_envs=96, longest=0.7, seed=3)
    check_iterations(ODD, shards=3, num_envs=3 * 17, parts=8, seed=4, count=15)
    check_runs_are_as_alone(ODD)
    check_not_finite(ODD)
    check_nothing_counted(ODD)


# Compiled, as launched, without a GPU.


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled(capability, monkeypatch):
    memory = memory_of(USUAL, device="meta")
    with compiling(monkeypatch, capability) as kernels:
        cuda.step(memory, USUAL)
    assert len(kernels) == len(KERNELS)
    assert "%globaltimer" in kernels[-1].asm["ptx"]
    for kernel in kernels:
        used = resources(kernel)
        assert (used["LOCAL"], used["STACK"]) == (0, 0)
        # Of what a multiprocessor has no program takes all.
        assert used["REG"] * 32 * kernel.metadata.num_warps <= 2**16
        assert "atom" not in kernel.asm["ptx"]
        assert "red.global" not in kernel.asm["ptx"]


def test_sizes_are_arguments(monkeypatch):
    """Whatever is trained, nothing is compiled anew."""

    def given(shape, **sizes):
        recorders = {name: Recorder(getattr(cuda, name)) for name in KERNELS}
        with monkeypatch.context() as patch:
            for name, recorder in recorders.items():
                patch.setattr(cuda, name, recorder)
            cuda.step(memory_of(shape, device="meta", **sizes), shape)
        target = GPUTarget("cuda", 90, 32)
        return [list(recorder.bound(target)) for recorder in recorders.values()]

    first = given(TINY)
    assert [len(launches) for launches in first] == [1, 1, 1]
    assert given(USUAL, runs=16, shards=2, num_envs=64, parts=16) == first
    assert given(ODD, shards=3, num_envs=48, parts=1) == first


# On a GPU.


@needs_gpu
def test_on_a_gpu_steps_are_adams():
    check_iterations(USUAL, "cuda", count=30)
    check_iterations(USUAL, "cuda", runs=3, shards=2, num_envs=96, longest=20.0, parts=100)
    check_iterations(TINY, "cuda", parts=1)


@needs_gpu
def test_on_a_gpu_runs_are_each_as_alone():
    check_runs_are_as_alone(USUAL, "cuda")


@needs_gpu
def test_on_a_gpu_what_is_not_finite_is_not_followed():
    check_not_finite(ODD, "cuda")
    check_nothing_counted(ODD, "cuda")


@needs_gpu
def test_on_a_gpu_the_end_is_stamped():
    memory = memory_of(ODD, runs=2, device="cuda")
    memory.states[0, :, 0, : ODD.size] = 0.5
    give_iteration(memory, ODD, torch.Generator().manual_seed(6))
    cuda.step(memory, ODD)
    assert memory.stamps[0, :, Stamp.END].all()
    assert memory.stamps.count_nonzero() == 2
