import math

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, which is for Linux")

from gpu_kernels import compiling, resources  # noqa: E402
from gpu_kernels import interpret as in_interpreter  # noqa: E402
from test_advantage import RAGGED, by_hand, make_rollout  # noqa: E402
from test_returns_cuda import Recorder, needs_gpu, unfilled  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from twins import ADVANTAGE  # noqa: E402

import vecpg.returns.cuda  # noqa: E402
from vecpg import advantage  # noqa: E402
from vecpg.advantage import ages, cuda, reference  # noqa: E402
from vecpg.config import Config  # noqa: E402

KERNELS = ("_find", "_add", "_add_parts", "_subtract")


def by_loop(weights, mask, dones):
    """All weights of each (age, environment), row by row in Python."""
    rows = {}
    for n in range(mask.shape[1]):
        age = 0
        for t in range(len(mask)):
            if not mask[t, n]:
                age = 0
                continue
            rows.setdefault(age, {}).setdefault(n, []).append((t, weights[t, n].item()))
            age = 0 if dones[t, n] else age + 1
    return rows


def turn(rows):
    """The same, with time contiguous in memory."""
    return rows.mT.contiguous().mT


def longest_of(rows, num_envs):
    """How many ages each environment has."""
    return [sum(n in by_env for by_env in rows.values()) for n in range(num_envs)]


def check_case(device, length, num_envs, dtype, seed, masked=0.1, done=0.1, turned=False):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(length, num_envs, generator=g) >= masked
    dones = torch.rand(length, num_envs, generator=g) < done  # some where nothing counts
    weights = torch.randn(length, num_envs, generator=g, dtype=torch.float64).to(dtype)
    weights = (weights * 10.0 ** (seed % 5)).masked_fill(~mask, math.nan)
    rows = by_loop(weights, mask, dones)
    given = [each.to(device) for each in (weights, mask, dones)]
    found = cuda.find(*given[1:])
    assert found.longest.tolist() == longest_of(rows, num_envs)
    if turned:
        given = [turn(each) for each in given]
    sums = cuda.sums_by_age(*given)
    assert torch.equal(sums, cuda.sums_by_age(*given)), "the same bits twice"
    for age in range(length):
        own = [w for many in rows.get(age, {}).values() for _, w in many]
        total, count = sums[:, age].tolist()
        assert count == len(own)
        assert abs(total - math.fsum(own)) <= 1e-13 * math.fsum(map(abs, own))
    # Rows in which nothing counts, at the end.
    later = [torch.cat([each, each.new_zeros(5, num_envs)]) for each in given]
    if turned:
        later = [turn(each) for each in later]
    more = cuda.sums_by_age(*later)
    assert torch.equal(more[:, :length], sums)
    assert not more[:, length:].any()
    for others in (True, False):
        result = later[0].clone()
        assert result.is_contiguous() is not turned
        cuda.subtract_mean_by_age(result, *later[1:], more, others)
        assert not result[length:].any()
        # Those of longer episodes elsewhere, which lie in the middle of other numbers.
        elsewhere = torch.nn.functional.pad(sums, (1, 4), value=7.0)[:, 1:-1]
        again = given[0].clone()
        cuda.subtract_mean_by_age(again, *given[1:], elsewhere, others)
        assert torch.equal(again, result[:length])
        expected = torch.zeros(length, num_envs, dtype=torch.float64)
        for by_env in rows.values():
            for n, own in by_env.items():
                kept = [many for m, many in by_env.items() if not (others and m == n)]
                kept = [w for many in kept for _, w in many]
                mean = math.fsum(kept) / len(kept) if kept else 0.0
                for t, weight in own:
                    expected[t, n] = weight - mean
        close = 1e-12 if dtype == torch.float64 else 1e-6
        scale = max(1.0, expected.abs().max().item())
        error = (result[:length].cpu().double() - expected).abs().max().item()
        assert error <= close * scale, (length, num_envs, dtype, seed, others, error)


def make_runs(runs, length, num_envs, seed, masked=0.2, done=0.2):
    """Weights, mask, and ends, NaN where masked."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(runs, length, num_envs, generator=g) >= masked
    dones = torch.rand(runs, length, num_envs, generator=g) < done
    weights = 10 * torch.randn(runs, length, num_envs, generator=g)
    return weights.masked_fill(~mask, math.nan), mask, dones


def found_of_runs(mask, dones, device="cpu"):
    """As `find` gives it, of each run; behind that are places that are none."""
    each = [cuda.find(*pair) for pair in zip(mask.to(device), dones.to(device), strict=True)]
    starts, stops, numbers, longest = (torch.stack(all_of) for all_of in zip(*each, strict=True))
    none = torch.arange(starts.shape[1], device=device)[:, None] >= numbers[:, None]
    window = int(numbers.max())
    columns = [one.masked_fill(none, 10**6)[:, :window].contiguous() for one in (starts, stops)]
    return cuda.Found(*columns, numbers, longest)


def check_runs(device, runs, length, num_envs, shards, seed, others, **kinds):
    weights, mask, dones = make_runs(runs, length, num_envs, seed, **kinds)
    found = found_of_runs(mask, dones, device)
    num_ages = int(found.longest.max()) + seed % 3
    result = weights.to(device, copy=True)
    cuda.subtract_mean_of_runs(result, found, num_ages, others=others, shards=shards)
    result = result.cpu()
    assert result[~mask].isnan().all()
    for r in range(runs):
        own = [each[r].chunk(shards, dim=1) for each in (weights, mask, dones)]
        exact = [(w.clone(), m, e) for w, m, e in zip(*own, strict=True)]
        sums = ages.add_by_age([reference.sums_by_age(*each) for each in exact])
        alone = [tuple(each.to(device, copy=True) for each in one) for one in exact]
        same = ages.add_by_age([cuda.sums_by_age(*each) for each in alone])
        for one, other in zip(exact, alone, strict=True):
            reference.subtract_mean_by_age(*one, sums, others)
            cuda.subtract_mean_by_age(*other, same, others)
        found_of_run, counted = result[r], mask[r]
        expected, bits = (torch.cat([w for w, _, _ in many], dim=1) for many in (exact, alone))
        torch.testing.assert_close(found_of_run[counted], expected[counted], rtol=1e-6, atol=1e-5)
        assert torch.equal(found_of_run[counted], bits.cpu()[counted])


# In the interpreter, which has to be chosen before the kernels are read: in a process of its own.


@pytest.mark.slow
def test_interpreted():
    in_interpreter(__name__)


def interpret():
    torch.set_num_threads(1)
    # What was not written is found.
    torch.Tensor.new_empty = poisoned
    # Tiles that small tensors fill more than once, and parts that have several blocks.
    cuda._AGES, cuda._ENVS, cuda._ROWS, cuda._PARTS = 4, 2, 4, 2
    check_case("cpu", 1, 1, torch.float32, 0, masked=0.0)
    check_case("cpu", 1, 3, torch.float32, 1, masked=1.0)
    check_case("cpu", 9, 1, torch.float64, 2)
    check_case("cpu", 5, 3, torch.float32, 3, turned=True)
    check_case("cpu", 13, 9, torch.float32, 4)
    check_case("cpu", 12, 5, torch.float32, 6, masked=0.0, done=0.0)
    check_case("cpu", 8, 5, torch.float32, 7, done=1.0)
    check_runs("cpu", 2, 6, 10, 2, 9, others=True)
    check_runs("cpu", 2, 7, 9, 1, 10, others=False, masked=0.0)
    check_runs("cpu", 1, 5, 6, 3, 11, others=True)
    check_runs("cpu", 1, 2, 1, 1, 12, others=True, done=1.0)
    cuda._AGES, cuda._ENVS, cuda._ROWS = 32, 32, 64
    check_case("cpu", 70, 35, torch.float32, 8)


def poisoned(self, *size, dtype=None, device=None):
    size = size[0] if isinstance(size[0], tuple) else size
    dtype = dtype or self.dtype
    return torch.full(tuple(size), math.nan if dtype.is_floating_point else 99, dtype=dtype)


# Compiled, as launched, without a GPU.


def launched(monkeypatch, call):
    recorders = {name: Recorder(getattr(cuda, name)) for name in KERNELS}
    with monkeypatch.context() as patch:
        for name, recorder in recorders.items():
            patch.setattr(cuda, name, recorder)
        call()
    return recorders


def launch(length, num_envs, offset=0):
    """Of rows that begin so many elements behind where memory was allocated."""
    size = length * num_envs
    weights, flags = (
        unfilled(offset + size, dtype)[offset:].reshape(length, num_envs)
        for dtype in (torch.float32, torch.bool)
    )
    sums = cuda.sums_by_age(weights, flags, flags)
    assert sums.shape == (2, length)
    for others in (True, False):
        cuda.subtract_mean_by_age(weights, flags, flags, sums, others)


def given(recorders, capability=90):
    """What the compiler is given, of every kernel."""
    target = GPUTarget("cuda", capability, 32)
    return [
        (name, signature, constants, attributes, options)
        for name, recorder in recorders.items()
        for options, signature, constants, attributes in recorder.bound(target)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled(capability, monkeypatch):
    target = GPUTarget("cuda", capability, 32)
    recorders = launched(monkeypatch, lambda: launch(500, 4096))
    compiled = {}
    for name, *source, options in given(recorders, capability):
        if str((name, source)) in compiled:
            continue
        kernel = triton.compile(
            ASTSource(recorders[name].kernel, *source), target=target, options=options.__dict__
        )
        compiled[str((name, source))] = kernel
        used = resources(kernel)
        assert used["LOCAL"] == 0
        assert used["STACK"] == 0
        # Two thousand threads' worth of registers is what an SM has 32 of.
        assert used["REG"] <= 128
        # Nothing is added by several programs.
        assert "atom" not in kernel.asm["ptx"]
        assert "red.global" not in kernel.asm["ptx"]
    assert len(compiled) == 5


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_runs_are_compiled(capability, monkeypatch):
    weights = unfilled((3, 600, 4096))
    episodes, numbers = unfilled((3, 100, 4096), torch.int32), unfilled((3, 4096), torch.int32)
    found = cuda.Found(episodes, episodes, numbers, numbers)
    clock = dict(at=unfilled(1, torch.int64), stamps=unfilled((8, 3, 4), torch.int64)[..., 1])
    with compiling(monkeypatch, capability) as kernels:
        cuda.subtract_mean_of_runs(weights, found, 500, others=True, shards=2, **clock)
    assert len(kernels) == 3
    assert "%globaltimer" in kernels[0].asm["ptx"]
    for kernel in kernels:
        used = resources(kernel)
        assert (used["LOCAL"], used["STACK"]) == (0, 0)
        assert used["REG"] <= 128
        assert "atom" not in kernel.asm["ptx"]
        assert "red.global" not in kernel.asm["ptx"]


@pytest.mark.parametrize("shards", [1, 4])
def test_runs_are_three_launches_of_any_size(monkeypatch, shards):
    """And of which kind depends on no size, and on none of the addresses."""

    def launch(runs, capacity, num_envs, num_ages, others=False):
        weights = unfilled((runs, capacity, num_envs))
        episodes = unfilled((runs, capacity, num_envs), torch.int32)
        numbers = unfilled((runs, num_envs), torch.int32)
        found = cuda.Found(episodes, episodes, numbers, numbers)
        cuda.subtract_mean_of_runs(weights, found, num_ages, others=others, shards=shards)

    first = given(launched(monkeypatch, lambda: launch(1, 500, 4096, 200)))
    assert [name for name, *_ in first] == ["_add", "_add_parts", "_subtract"]
    for other in ((64, 16, 16, 1), (2, 17, 36, 5)):
        assert given(launched(monkeypatch, lambda other=other: launch(*other))) == first


def test_sizes_are_arguments(monkeypatch):
    """Rollouts of other lengths, or elsewhere in memory, do not compile anew."""
    first = given(launched(monkeypatch, lambda: launch(500, 4096)))
    for other in ((1, 1), (17, 33), (501, 4096), (16, 64), (400, 2**24), (500, 4096, 3)):
        assert given(launched(monkeypatch, lambda other=other: launch(*other))) == first


def test_how_sums_are_cut_depends_on_the_shape_alone(monkeypatch):
    recorders = {}
    for shape in ((5, 1), (500, 33), (7, 10**7)):
        grids = []

        class Grids(Recorder):
            def __getitem__(self, grid, grids=grids):
                grids.append(grid)
                return super().__getitem__(grid)

        with monkeypatch.context() as patch:
            for name in KERNELS:
                patch.setattr(cuda, name, Grids(getattr(cuda, name)))
            cuda.sums_by_age(
                *(unfilled(shape, each) for each in (torch.float32, *[torch.bool] * 2))
            )
        recorders[shape] = grids
    assert recorders == {
        (5, 1): [(1,), (1, 1, 1), (1, 2, 1)],
        (500, 33): [(2,), (16, 2, 1), (16, 2, 1)],
        (7, 10**7): [(312500,), (1, 256, 1), (1, 2, 1)],
    }


# -- Which way it goes ---------------------------------------------------------------------------


@pytest.fixture
def pretending(monkeypatch):
    """Kernels serve every tensor; each launch is noted, and its twin is called."""
    launches = []

    def noted(name, twin):
        def call(*arguments):
            launches.append(name)
            return twin(*arguments)

        return call

    monkeypatch.setattr(ages, "_on_host", lambda weights: False)
    monkeypatch.setattr(ages, "on_gpu", lambda device: True)
    monkeypatch.setattr(advantage, "on_gpu", lambda device: True)
    for name, twin in ADVANTAGE.items():
        monkeypatch.setattr(cuda, name, noted(name, twin))
    return launches


@pytest.mark.parametrize("baseline", ["timestep_mean", "leave_one_out"])
def test_sums_by_age_are_five_launches(pretending, baseline):
    rollout, config = make_rollout(RAGGED), Config(baseline=baseline, gamma=0.9)
    result = advantage.advantages(rollout, config)
    torch.testing.assert_close(result.double(), by_hand(rollout, config), atol=2e-6, rtol=1e-5)
    assert pretending == ["find", "add", "add_parts", "find", "subtract"]


@pytest.mark.parametrize("with_triton", [True, False])
def test_kernels_serve_a_gpu_if_triton_is_there(monkeypatch, with_triton):
    found = triton.__spec__ if with_triton else None
    monkeypatch.setattr(ages.importlib.util, "find_spec", lambda name: found)
    ages._has_triton.cache_clear()
    try:
        assert ages.on_gpu(torch.device("cuda", 1)) is with_triton
        assert not ages.on_gpu(torch.device("cpu"))
    finally:
        ages._has_triton.cache_clear()


@pytest.mark.parametrize(
    ("settings", "num_envs", "with_final"),
    [
        ({"baseline": "none"}, 64, False),
        ({"baseline": "mean", "shards": 4}, 16, False),
        ({"baseline": "value", "bootstrap_truncations": True}, 64, True),
        ({"baseline": "value", "weights": "gae"}, 64, False),
        ({"baseline": "timestep_mean"}, 64, False),
        ({"baseline": "leave_one_out", "shards": 2}, 32, False),
    ],
)
def test_what_is_prepared_is_what_a_run_uses(monkeypatch, settings, num_envs, with_final):
    """Of the returns their variant for this shape; of the sums every kernel, as it is launched."""
    device, prepared = torch.device("meta"), []

    def returns(name):
        def prepare(num_envs, longest, on, with_final):
            assert (longest, on) == (1000, device)
            prepared.append((name, num_envs, with_final))

        return prepare

    monkeypatch.setattr(advantage, "on_gpu", lambda device: True)
    monkeypatch.setattr(ages, "on_gpu", lambda device: True)
    for name in ("prepare_reward_to_go", "prepare_generalized_advantage"):
        monkeypatch.setattr(vecpg.returns.cuda, name, returns(name), raising=False)
    config = Config(num_envs=64, **settings)
    by_age = given(
        launched(monkeypatch, lambda: advantage.prepare_advantages(device, config, 1000))
    )
    expected = [("prepare_reward_to_go", num_envs, with_final)]
    if config.weights == "gae":
        expected.append(("prepare_generalized_advantage", num_envs, with_final))
    assert prepared == expected
    others = config.baseline == "leave_one_out"

    def of_a_run():
        if config.baseline in ("timestep_mean", "leave_one_out"):
            weights, flags = unfilled((292, 32)), unfilled((292, 32), torch.bool)
            sums = ages.sums_by_age(weights, flags, flags)
            ages.subtract_mean_by_age(weights, flags, flags, sums, others=others)

    assert by_age == given(launched(monkeypatch, of_a_run))


# On a GPU.


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (40, 3), (130, 33), (300, 65)])
def test_on_a_gpu_they_are_their_definition(shape, dtype):
    check_case("cuda", *shape, dtype, seed=1)


@needs_gpu
@pytest.mark.parametrize("shape", [(500, 4096), (33, 70_000), (20_000, 64)])
def test_on_a_gpu_they_are_the_reference(shape):
    g = torch.Generator("cuda").manual_seed(0)
    mask, ends = torch.rand(2, *shape, generator=g, device="cuda")
    mask, dones = mask < 0.95, ends < 0.02
    weights = torch.randn(shape, generator=g, device="cuda").masked_fill(~mask, math.nan)
    sums = cuda.sums_by_age(weights, mask, dones)
    expected = reference.sums_by_age(weights, mask, dones)
    torch.testing.assert_close(sums, expected, rtol=1e-9, atol=1e-9)
    ours, theirs = weights.clone(), weights.clone()
    cuda.subtract_mean_by_age(ours, mask, dones, sums, True)
    reference.subtract_mean_by_age(theirs, mask, dones, sums, True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(sums, cuda.sums_by_age(weights, mask, dones))
    assert torch.equal(expected, reference.sums_by_age(weights, mask, dones))


@needs_gpu
@pytest.mark.parametrize("others", [True, False])
def test_on_a_gpu_runs_are_each_as_alone(others):
    check_runs("cuda", 3, 130, 132, 2, 1, others)
    stamps, at = torch.zeros(4, 3, 2, dtype=torch.int64, device="cuda"), torch.tensor([6])
    mask, dones = make_runs(3, 40, 33, 2)[1:]
    found = found_of_runs(mask, dones, "cuda")
    weights = torch.ones(3, 40, 33, device="cuda")
    cuda.subtract_mean_of_runs(
        weights, found, 40, others=others, at=at.cuda(), stamps=stamps[..., 1]
    )
    assert stamps[2, :, 1].all()
    assert stamps.count_nonzero() == 3
