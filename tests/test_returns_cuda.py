import itertools
import json
import math
import random
import re
import types

import numpy as np
import pytest
import torch
from pairs import pairs, pairwise
from test_returns import MODES, TOLERANCE, definition, make_case, poison

triton = pytest.importorskip("triton", reason="needs triton, which is for Linux")

from gpu_kernels import interpret as in_interpreter  # noqa: E402
from gpu_kernels import resources  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from vecpg.returns import (  # noqa: E402
    cuda,
    generalized_advantage,
    operator,
    packed_reward_to_go,
    reference,
    reward_to_go,
)
from vecpg.returns.checks import check_gamma  # noqa: E402

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# Tiles that small tensors fill more than once, and the rows of a program (None: all).
KERNELS = [
    (cuda._Tile(False, 4, 1, 4, 1, 1), None),  # serial
    (cuda._Tile(False, 2, 4, 2, 1, 1), None),  # runs of rows
    (cuda._Tile(True, 2, 2, 4, 1, 1), None),  # time is contiguous, twice
    (cuda._Tile(True, 1, 4, 2, 1, 1), None),
    (cuda._Tile(False, 2, 1, 4, 1, 1), 4),  # spans, twice
    (cuda._Tile(True, 2, 2, 4, 1, 1), 4),
]
ADVANTAGE_MODES = (*MODES, "zero")
OPTIONAL = ("final_values", "last_values", "mask")
LAYOUTS = ("plain", "transposed", "sliced")


# In the interpreter, which has to be chosen before the kernels are read: in a process of its own.


@pytest.mark.slow
@pytest.mark.parametrize("function", ["interpret", "fuzz"])
def test_interpreted(function):
    in_interpreter(__name__, function)


def interpret():
    torch.set_num_threads(1)
    check_public()
    check_packed("cpu", (23, 24))
    check_offsets_out_of_bounds()
    check_span_by_span()
    cases = pairs(
        KERNELS,
        [(9, 5), (7, 4), (2, 3), (1, 1)],
        list(TOLERANCE),
        list(MODES),
        [set(OPTIONAL), set(), *({name} for name in OPTIONAL)],
        [None, 0.9, 1.0, 0.0],
        LAYOUTS,
    )
    for seed, (kernel, *case) in enumerate(cases):
        check_case(*kernel, seed, *case)
    for kernel in KERNELS:
        check_nothing_passes_an_end(*kernel)


def fuzz():
    """Advantages and returns beside the float64 reference, of whatever is drawn."""
    torch.set_num_threads(1)
    pick = random.Random(0)
    for seed in range(120):
        check_drawn(seed, pick, *pick.choice(KERNELS))


def check_drawn(seed, pick, tile, span):
    shape = length, num_envs = pick.choice([(9, 3), (7, 4), (5, 1), (1, 3)])
    dtype, mode = pick.choice(list(TOLERANCE)), pick.choice(ADVANTAGE_MODES)
    done, masked = pick.choice([0.0, 0.1, 0.5]), pick.choice([0.0, 0.4, 0.9])
    case = make_case(seed, length, num_envs, dtype, done=done, masked=masked)
    case["values"] = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    poison(case)
    case["values"] = case["values"].masked_fill(~case["mask"], math.nan)
    for name in OPTIONAL:
        if pick.random() < 0.4:
            case[name] = None
    if case["mask"] is None:  # then every row is read
        for name in ("rewards", "values"):
            case[name] = case[name].nan_to_num(0.5)
        if case["final_values"] is not None:
            case["final_values"] = case["final_values"].masked_fill(case["dones"], 0.25)
    case["gae_lambda"] = pick.choice([0.9, 0.0, 1.0, torch.rand(shape, dtype=torch.float64)])
    if pick.random() < 0.6:
        case["gamma"] = pick.choice([0.9, 0.0, 1.0])
    options = {"plus_values": pick.random() < 0.5, "mask_mode": mode}
    is_advantage = pick.random() < 0.75
    if not is_advantage:
        del case["values"], case["gae_lambda"], options["plus_values"]

    wide = {name: widened(value) for name, value in case.items()}
    loop = reference.generalized_advantage if is_advantage else reference.reward_to_go
    expected = loop(**wide, **options)
    passed = {
        name: laid_out(value, pick.choice([*LAYOUTS, "shifted"]))
        if isinstance(value, torch.Tensor)
        else value
        for name, value in case.items()
    }
    out = laid_out(torch.full(shape, math.nan, dtype=dtype), pick.choice(LAYOUTS))
    cuda._scan(cuda._Inputs(**passed, **options), out, tile, span or length)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2 * TOLERANCE[dtype]
    error = (out.double() - expected).abs().max().item()
    scale = max(1.0, expected.abs().max().item())
    assert error <= tolerance * scale, (seed, tile, span, shape, dtype, options, error)


def widened(value):
    if isinstance(value, torch.Tensor):
        return value if value.dtype == torch.bool else value.double()
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else value


def check_span_by_span():
    """A span's second pass reads on to its last end, and no further, and leaves the rest alone."""
    tile, length = cuda._Tile(True, 2, 2, 2, 1, 1), 32
    rewards = torch.randn(length, 2)
    dones = torch.zeros(length, 2, dtype=torch.bool)
    dones[[13, 21]] = True
    inputs = cuda._Inputs(rewards, dones, 0.9)
    whole, out = torch.empty(length, 2), torch.full((length, 2), math.nan)
    cuda._scan(inputs, whole, tile, length)
    totals = torch.empty((2, 2, 2), dtype=torch.float64)
    cuda._launch(inputs, out, tile, 16, totals=totals)
    # Of the first span, the tile that holds its end is written later; the one before it at once.
    assert out[:12].isfinite().all()
    assert out[12:16].isnan().all()
    assert out[16:].isfinite().all()
    first = rewards.clone()
    first[:12] = math.nan
    cuda._launch(inputs._replace(rewards=first), out, tile, 16, after=totals)
    torch.testing.assert_close(out, whole, rtol=1e-6, atol=1e-6)


def check_public():
    case = poison(make_case(1, 9, 5))
    out = torch.full((9, 5), math.nan)
    cuda.reward_to_go(**case, mask_mode="skip", out=out)
    torch.testing.assert_close(out, definition(**case, mode="skip").float(), atol=1e-6, rtol=0)


def laid_out(value, layout):
    if layout == "transposed" and value.ndim == 2:
        return value.t().contiguous().t()
    if layout == "sliced":
        return torch.stack([value, torch.zeros_like(value)], dim=-1)[..., 0]
    if layout == "shifted":  # no longer a multiple of 16 bytes
        return torch.cat([value.reshape(-1)[:1], value.reshape(-1)])[1:].view(value.shape)
    return value


def check_case(tile, span, seed, shape, dtype, mode, given, gamma, layout):
    case = make_case(seed, *shape, dtype, done=0.3, masked=0.4)
    for name in {"final_values", "last_values"} - given:
        case[name] = torch.zeros_like(case[name])
    if "mask" not in given:
        case["mask"] = torch.ones_like(case["mask"])
    if gamma is not None:
        case["gamma"] = torch.full(shape, gamma, dtype=torch.float64)
    poison(case)
    passed = {name: laid_out(value, layout) for name, value in case.items()}
    passed |= dict.fromkeys(set(OPTIONAL) - given)
    if gamma is not None:
        passed["gamma"] = gamma
    out = laid_out(torch.full(shape, math.nan, dtype=dtype), layout)
    cuda._scan(cuda._Inputs(**passed, mask_mode=mode), out, tile, span or len(out))

    expected = definition(**case, mode=mode)
    error = (out.double() - expected).abs().max().item()
    # The interpreter cuts what does not fit into bfloat16, instead of rounding it.
    tolerance = 1e-2 if dtype == torch.bfloat16 else TOLERANCE[dtype]
    what = (tile, span, seed, shape, dtype, mode, given, gamma, layout, error)
    assert error <= tolerance * max(1.0, expected.abs().max().item()), what


def check_nothing_passes_an_end(tile, span):
    """What follows an end may be NaN or infinite."""
    case = make_case(0, 11, 3, masked=0.0)
    case["dones"][:] = False
    case["dones"][4] = True
    case["rewards"][5:] = math.nan
    case["last_values"][:] = math.inf
    out = torch.empty(11, 3)
    cuda._scan(cuda._Inputs(**case), out, tile, span or 11)
    expected = definition(**case, mode="cut").float()
    assert expected[:5].isfinite().all()
    torch.testing.assert_close(out, expected, equal_nan=True, atol=1e-6, rtol=0)


def episodes(offsets, rewards, gamma, final_values):
    """Each episode's definition, by itself."""
    ends = offsets.tolist()
    parts = []
    for i, (start, stop) in enumerate(itertools.pairwise(ends)):
        shape = (stop - start, 1)
        none = torch.zeros(shape, dtype=bool)
        last = torch.tensor([0.0 if final_values is None else final_values[i].item()])
        rows = (rewards[start:stop].reshape(shape), none, gamma[start:stop].reshape(shape))
        parts.append(definition(*rows, torch.zeros(shape), last, ~none, "cut")[:, 0])
    return torch.cat(parts)


def check_packed(device, totals):
    """Zero-length episodes at both ends and within, with odd and even totals."""
    for total, with_final, with_gammas in itertools.product(totals, (False, True), (False, True)):
        g = torch.Generator().manual_seed(total)
        cuts = torch.randint(0, total + 1, (max(5, total // 40),), generator=g)
        offsets = torch.cat([torch.tensor([0, 0]), cuts, cuts[:3], torch.tensor([total, total])])
        offsets = offsets.sort().values
        rewards = torch.randn(total, generator=g)
        final_values = torch.randn(len(offsets) - 1, generator=g) if with_final else None
        gamma = torch.full((total,), 0.9, dtype=torch.float64)
        if with_gammas:
            gamma = torch.rand(total, generator=g, dtype=torch.float64)
        out = torch.full((total,), math.nan, device=device)
        cuda.packed_reward_to_go(
            rewards.to(device),
            offsets.to(device),
            gamma.to(device) if with_gammas else 0.9,
            None if final_values is None else final_values.to(device),
            out,
        )
        expected = episodes(offsets, rewards, gamma, final_values)
        torch.testing.assert_close(out.cpu().double(), expected, atol=1e-6, rtol=1e-6)


def check_offsets_out_of_bounds():
    offsets = torch.tensor([0, 3, 100, -7, 5, 5])
    dones, _ = cuda._ends(offsets, None, 6)
    assert dones.tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (0, 0)])
def test_nothing_to_do_is_not_launched(shape):
    empty = torch.zeros(shape)
    cuda.reward_to_go(empty, empty.bool(), 0.9, None, None, None, "cut", empty)
    flat, none = torch.zeros(0), torch.zeros(1, dtype=torch.int64)
    cuda.packed_reward_to_go(flat, none, 0.9, None, flat)


# The combine, apart: the interpreter scans from first to last, and would take any function.


@pytest.mark.parametrize("special", [0.5, math.nan, math.inf])
def test_the_combine_is_associative(special):
    with np.errstate(invalid="ignore"):
        for factors in itertools.product([0.0, 0.5, 1.0], repeat=3):
            one, two, three = zip(factors, [special, 2.0, -3.0], strict=True)
            left = combine(combine(one, two), three)
            right = combine(one, combine(two, three))
            np.testing.assert_equal(left, right)
            # Where a factor is 0, nothing of what lies beyond it is left.
            if factors[1] == 0 or factors[2] == 0:
                assert math.isfinite(left[1])


def combine(after, before):
    """The kernels' own text, on numbers."""

    class Numbers:
        where = staticmethod(lambda condition, yes, no: yes if condition else no)

    names = {"tl": Numbers}
    for function in (cuda._follow, cuda._combine):
        exec(function.src, names)
    return names["_combine"](*map(np.float64, (*after, *before)))


# What a call asks of the device before its kernel.


def operations(call):
    with torch.autograd.profiler.profile() as found:
        call()
    return {event.name for event in found.function_events}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gamma_on_the_host_is_a_number(dtype):
    """One that is a tensor would be copied to the device, and the copy waited for."""
    gamma, rewards = torch.tensor(0.75, dtype=dtype), unfilled((4, 3))
    seen = operations(lambda: check_gamma("gamma", gamma, rewards))
    assert check_gamma("gamma", gamma, rewards) == (0.75, None)
    assert not seen & {"aten::_to_copy", "aten::copy_", "aten::to"}
    # With gradients it has to stay a tensor; on the device it costs no look.
    assert check_gamma("gamma", gamma.clone().requires_grad_(), rewards)[1] is not None
    assert check_gamma("gamma", unfilled(()), rewards)[1].shape == (4, 3)
    with pytest.raises(ValueError, match="expected numbers in"):
        check_gamma("gamma", torch.tensor(1.5), rewards)


def test_a_number_is_written_on_the_device():
    """What `torch.tensor` makes is made on the host, and copied."""
    rewards, flags = unfilled((4, 3), torch.float64), unfilled((4, 3), torch.bool)
    seen = operations(lambda: reward_to_go(rewards, flags, 0.9))
    seen |= operations(lambda: generalized_advantage(rewards, rewards, flags, 0.9, 0.8))
    assert "aten::full" in seen
    assert "aten::lift_fresh" not in seen


class OnCuda(torch.Tensor):
    """Says where it is, and is not there."""

    is_cuda = True


def test_advantages_are_one_launch(monkeypatch):
    calls = []
    kernels = types.SimpleNamespace(generalized_advantage=lambda *given: calls.append(given))
    monkeypatch.setattr(operator, "_kernels", lambda on_cuda: kernels if on_cuda else None)
    rewards, values, out = (torch.zeros(4, 3, 2).as_subclass(OnCuda) for _ in range(3))
    dones, last = torch.zeros(4, 3, 2, dtype=torch.bool), torch.ones(3, 2)
    operator.write_advantage(
        *(rewards, values, dones, 0.9, None, 0.8, None, None, last, None, "cut", True, False, out)
    )
    (given,) = calls
    assert [tuple(given[i].shape) for i in (0, 1, 2, 6, 10)] == [(4, 6)] * 3 + [(6,), (4, 6)]
    assert given[3:6] == (0.9, 0.8, None)
    assert given[7:10] == (None, "cut", True)


# Compiled, as launched, without a GPU.


class Recorder:
    """Stands in for a kernel, and keeps what it was launched with."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((args, kwargs))

    def bound(self, target):
        """Of each launch: what the compiler is given."""
        backend = make_backend(target)
        kernel = self.kernel
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        for args, kwargs in self.launches:
            arguments, specialization, options = bind(*args, **kwargs)
            yield kernel._pack_args(backend, kwargs, arguments, specialization, options)


def launched(monkeypatch, call):
    recorders = {name: Recorder(getattr(cuda, name)) for name in ("_kernel", "_mark_ends")}
    with monkeypatch.context() as patch:
        for name, recorder in recorders.items():
            patch.setattr(cuda, name, recorder)
        call()
    return [recorder for recorder in recorders.values() if recorder.launches]


def unfilled(shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(shape, env_major=False, everything=False, advantage=False):
    def tensor(dtype=torch.float32):
        return unfilled(shape[::-1], dtype).t() if env_major else unfilled(shape, dtype)

    options = (tensor(), unfilled(shape[1]), tensor(torch.bool)) if everything else (None,) * 3
    mode, flags, out = "skip" if everything else "cut", tensor(torch.bool), tensor()
    if advantage:
        given = tensor(), tensor(), flags, 0.99, 0.95, *options, mode, everything
        cuda.generalized_advantage(*given, out)
    else:
        cuda.reward_to_go(tensor(), flags, 0.99, *options, mode, out)


def launch_packed(_, everything, advantage):
    final_values = unfilled(99) if everything else None
    offsets = unfilled(100, torch.int64)
    cuda.packed_reward_to_go(unfilled(100_000), offsets, 0.99, final_values, unfilled(100_000))


# A shape of each tile, and whether time is contiguous; the most registers that any variant needs.
SHAPES = {
    "wide": ((128, 131072), False, 240),
    "narrow": ((128, 32768), False, 240),
    "short": ((512, 16384), False, 160),
    "tall": ((128, 4096), False, 160),
    "few": ((32, 8192), True, 96),
    "many": ((500, 8192), True, 96),
    "tall in spans": ((65536, 64), False, 232),
    "many in spans": ((65536, 64), True, 128),
    "one in spans": ((5000, 1), False, 128),
    "packed": (None, False, 128),
}


@pairwise(name=SHAPES, capability=[80, 90, 100], given=["bare", "all"], advantage=[False, True])
@pytest.mark.slow
def test_compiled(name, capability, given, advantage, monkeypatch):
    shape, env_major, most = SHAPES[name]
    target = GPUTarget("cuda", capability, 32)
    everything = given == "all"

    def call():
        if shape is None:
            launch_packed(None, everything, advantage)
        else:
            launch(shape, env_major, everything, advantage)

    sources = [
        (ASTSource(recorder.kernel, signature, constants, attributes), options.__dict__)
        for recorder in launched(monkeypatch, call)
        for options, signature, constants, attributes in recorder.bound(target)
    ]
    carried = everything and advantage
    assert len(sources) == {"packed": 3}.get(name, 2 + carried if "spans" in name else 1)
    for source, options in sources:
        compiled = triton.compile(source, target=target, options=options)
        used = resources(compiled)
        assert used["LOCAL"] == 0
        assert used["REG"] <= most
        # A word or two that a program needs once, behind its last tile.
        assert used["STACK"] <= 16
        if name in ("wide", "narrow"):
            assert used["STACK"] == 0
            assert everything or "shfl" not in compiled.asm["ptx"]
            # Fours, or twos, of floats; as many flags in one load.
            together = "v4.b32" if name == "wide" else "v2.b32"
            assert compiled.asm["ptx"].count(f"ld.global.{together}") >= 4
            assert "ld.global.b8" not in compiled.asm["ptx"]


def keys(monkeypatch, call):
    """What the compiler is given that depends on a launch's arguments, for each launch."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    found = []
    for recorder in launched(monkeypatch, call):
        kernel = recorder.kernel
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        found += [repr(bind(*args, **kwargs)[1:]) for args, kwargs in recorder.launches]
    return found


def test_sizes_and_gamma_are_arguments(monkeypatch):
    """Other sizes and another gamma do not compile anew, and gamma is not rounded to float32.

    Not every Triton hands a float on as it is.
    """
    first = keys(monkeypatch, lambda: launch((128, 4096)))
    assert "'*fp32'" in first[0]
    assert not re.search(r"'(fp|bf)\d+'", first[0])
    assert first == keys(monkeypatch, lambda: launch((77, 33)))
    assert keys(monkeypatch, lambda: launch((128, 40000))) == keys(
        monkeypatch, lambda: launch((999, 65532))
    )


def test_where_memory_begins_is_no_reason_to_compile(monkeypatch):
    """Blocks of environments, as slices are, begin anywhere; the kernel is that of odd strides."""
    store = torch.empty(100, 4099)
    flags = torch.empty(100, 4099, dtype=torch.bool)
    found = {
        key
        for first in range(6)
        for key in keys(
            monkeypatch,
            lambda first=first: cuda.reward_to_go(
                *(store[:, first : first + 4000], flags[:, first : first + 4000], 0.9, None, None),
                *(None, "cut", torch.empty(100, 4000)),
            ),
        )
    }
    assert len(found) == 1


def test_what_is_not_aligned_is_read_one_by_one():
    def vector(dtype, first):
        whole, ends = torch.empty(8009, dtype=dtype), torch.empty(8009, dtype=torch.bool)
        rewards, dones = (each[first : first + 8000].view(2, 4000) for each in (whole, ends))
        return cuda._vector(cuda._Inputs(rewards, dones, 0.9), torch.empty_like(rewards), 1)

    found = {
        dtype: [vector(dtype, first) for first in (0, 1, 2, 4)]
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    }
    assert found == {
        torch.float32: [4, 1, 1, 4],
        torch.float64: [2, 1, 2, 2],
        torch.bfloat16: [4, 1, 1, 4],
    }


@pairwise(
    num_envs=[1, 3, 64, 16384, 40001, 65536, 131072],
    with_final=[False, True],
    advantage=[False, True],
)
def test_what_is_prepared_is_all_that_a_run_needs(num_envs, with_final, advantage, monkeypatch):
    """200 rollouts of changing length compile nothing that was not prepared, and all of that."""
    longest, device = 3000, torch.device("meta")
    prepare = cuda.prepare_generalized_advantage if advantage else cuda.prepare_reward_to_go

    def roll_out(num_rows):
        shape = num_rows, num_envs
        rewards, flags, out = unfilled(shape), unfilled(shape, torch.bool), unfilled(shape)
        options = rewards if with_final else None, None, flags, "cut"
        if advantage:
            given = rewards, rewards, flags, 0.99, 0.95
            cuda.generalized_advantage(*given, *options, False, out)
        else:
            cuda.reward_to_go(rewards, flags, 0.99, *options, out)

    lengths = [1, 2, longest, *torch.randint(1, longest, (195,)).tolist(), 13, 64]
    prepared = keys(monkeypatch, lambda: prepare(num_envs, longest, device, with_final=with_final))
    needed = keys(monkeypatch, lambda: [roll_out(num_rows) for num_rows in lengths])
    assert len(needed) >= 200
    assert set(needed) == set(prepared)


@pytest.mark.parametrize(
    ("shape", "env_major", "tile", "is_split"),
    [
        ((16, 64), False, (False, 16, 1, 64, 2, 1), False),
        ((1000, 131072), False, (False, 16, 1, 128, 4, 1), False),
        ((1000, 32768), False, (False, 16, 1, 64, 2, 1), False),
        ((1000, 32769), False, (False, 16, 1, 32, 1, 1), False),
        ((512, 16384), False, (False, 8, 4, 32, 1, 4), False),
        ((64, 4096), False, (False, 8, 4, 32, 1, 4), False),
        ((128, 4096), False, (False, 16, 8, 32, 1, 8), False),
        ((10_000, 4096), False, (False, 16, 8, 32, 1, 8), False),
        ((500, 64), False, (False, 16, 8, 32, 1, 8), False),
        ((65536, 64), False, (False, 16, 8, 32, 1, 8), True),
        ((32, 8), True, (True, 4, 8, 16, 4, 4), False),
        ((2048, 8192), True, (True, 4, 32, 4, 4, 4), False),
        ((131_072, 8), True, (True, 4, 32, 4, 4, 4), True),
        ((512, 1), False, (True, 4, 128, 1, 4, 4), False),
        ((5001, 1), False, (True, 1, 512, 1, 1, 4), True),
    ],
)
def test_dispatch(shape, env_major, tile, is_split):
    value = unfilled(shape[::-1]).t() if env_major else unfilled(shape)
    chosen, span = cuda._choose(cuda._Inputs(value, value.bool(), 0.9), value, shape[0])
    assert chosen == tile
    assert (span < shape[0]) == is_split
    assert span == shape[0] or span % chosen.rows == 0


def test_every_shape_takes_a_tile_that_there_is():
    table = json.loads(cuda._SHAPES.read_text(encoding="utf-8"))
    for rows in table.values():
        for row in rows:
            assert row["tile"] in cuda.TILES[row["layout"]]
            assert row.keys() <= {"layout", "tile", "max_rows", "min_envs"}
    # What fits whatever comes.
    last = {row["layout"]: row for row in table["default"]}
    assert all(row.keys() == {"layout", "tile"} for row in last.values())
    assert last.keys() == cuda.TILES.keys()


def test_what_was_measured_on_a_gpu_comes_first(tmp_path, monkeypatch):
    own = {"layout": "time", "max_rows": 100, "min_envs": 1000, "tile": "tall"}
    table = json.loads(cuda._SHAPES.read_text(encoding="utf-8")) | {"Some GPU": [own]}
    (tmp_path / "cuda.json").write_text(json.dumps(table))
    monkeypatch.setattr(cuda, "_SHAPES", tmp_path / "cuda.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    rows = cuda._shapes.__wrapped__(torch.device("cuda", 0))
    assert rows == [own, *table["default"]]
    assert cuda._shapes.__wrapped__(torch.device("meta")) == table["default"]


# On a GPU.


GPU_SHAPES = [(1, 1), (63, 33), (130, 1000), (16, 5000), (300, 33000), (4100, 2), (70001, 1)]


@needs_gpu
@pairwise(shape=GPU_SHAPES, dtype=TOLERANCE, layout=LAYOUTS, mode=MODES)
def test_on_a_gpu_it_is_the_reference(shape, dtype, layout, mode):
    case = poison(make_case(1, *shape, dtype, done=0.02))
    expected = reference.reward_to_go(**case, mask_mode=mode)
    passed = {name: laid_out(value.cuda(), layout) for name, value in case.items()}
    out = laid_out(torch.full(shape, math.nan, dtype=dtype, device="cuda"), layout)
    cuda.reward_to_go(**passed, mask_mode=mode, out=out)
    scale = max(1.0, expected.abs().max().item())
    error = (out.cpu().double() - expected.double()).abs().max().item()
    assert error <= 2 * TOLERANCE[dtype] * scale
    again = laid_out(torch.full_like(out, math.nan), layout)
    cuda.reward_to_go(**passed, mask_mode=mode, out=again)
    assert torch.equal(out, again)


@needs_gpu
@pytest.mark.parametrize("length", [1, 4, 31, 128, 513, 2049])
@pytest.mark.parametrize(("num_envs", "layout"), [(1, "plain"), (5, "transposed"), (33, "plain")])
def test_on_a_gpu_it_is_the_definition(length, num_envs, layout):
    case = poison(make_case(length, length, num_envs, torch.float64, done=0.1))
    passed = {name: laid_out(value.cuda(), layout) for name, value in case.items()}
    out = torch.empty_like(passed["rewards"])
    cuda.reward_to_go(**passed, mask_mode="skip", out=out)
    expected = definition(**case, mode="skip")
    torch.testing.assert_close(out.cpu(), expected, atol=1e-12, rtol=0)


@needs_gpu
@pytest.mark.parametrize("total", [1, 23, 4096, 9001])
def test_on_a_gpu_packed(total):
    check_packed("cuda", (total,))


@needs_gpu
@pytest.mark.parametrize("shape", [(128, 1000), (5000, 4)])
def test_captured_in_a_graph(shape):
    case = {name: value.cuda() for name, value in make_case(3, *shape).items()}
    flat, offsets = torch.randn(5000, device="cuda"), torch.tensor([0, 7, 7, 5000], device="cuda")
    out, packed = torch.empty(shape, device="cuda"), torch.empty(5000, device="cuda")

    def call():
        cuda.reward_to_go(**case, mask_mode="cut", out=out)
        cuda.packed_reward_to_go(flat, offsets, 0.9, None, packed)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    case["rewards"].normal_()
    flat.normal_()
    graph.replay()
    replayed, replayed_packed = out.clone(), packed.clone()
    call()
    assert torch.equal(replayed, out)
    assert torch.equal(replayed_packed, packed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_the_public_functions_are_those_of_the_cpu(backend):
    case = poison(make_case(1, 100, 33))
    values = torch.randn(100, 33).masked_fill(~case["mask"], math.nan)
    offsets = torch.tensor([0, 10, 10, 90, 100])
    on_gpu = {name: value.cuda() for name, value in case.items()}
    options = {"gae_lambda": 0.9, "mask_mode": "skip"}
    pairs = [
        (
            reward_to_go(**on_gpu, backend=backend),
            reward_to_go(**case),
        ),
        (
            generalized_advantage(values=values.cuda(), **on_gpu, **options, backend=backend),
            generalized_advantage(values=values, **case, **options),
        ),
        (
            packed_reward_to_go(values.nan_to_num()[:, 0].cuda(), offsets.cuda(), 0.9),
            packed_reward_to_go(values.nan_to_num()[:, 0], offsets, 0.9),
        ),
        (
            reward_to_go(
                on_gpu["rewards"], on_gpu["dones"], torch.tensor(0.5), mask=on_gpu["mask"]
            ),
            reward_to_go(case["rewards"], case["dones"], 0.5, mask=case["mask"]),
        ),
    ]
    for ours, expected in pairs:
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gradients_mapping_and_compiling_on_a_gpu():
    case = make_case(2, 40, 7)
    on_gpu = {name: value.cuda() for name, value in case.items()}
    grads = []
    for each in (case, on_gpu):
        inputs = [each[name].requires_grad_() for name in ("rewards", "gamma", "last_values")]
        total = reward_to_go(**each, mask_mode="decay").square().sum()
        grads.append([grad.cpu() for grad in torch.autograd.grad(total, inputs)])
    for ours, expected in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    grads = []
    for each in (case, on_gpu):
        values = each["rewards"].detach().flip(0).requires_grad_()
        given = each["rewards"], values, each["dones"], 0.9, 0.8
        options = {"mask": each["mask"], "mask_mode": "skip", "last_values": each["last_values"]}
        total = generalized_advantage(*given, **options).square().sum()
        inputs = each["rewards"], values, each["last_values"]
        grads.append([grad.cpu() for grad in torch.autograd.grad(total, inputs)])
    for ours, expected in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    rewards, dones = on_gpu["rewards"].detach(), on_gpu["dones"]
    plain = reward_to_go(rewards, dones, 0.9)
    stacked = torch.stack([rewards, 2 * rewards])
    mapped = torch.vmap(lambda each: reward_to_go(each, dones, 0.9))(stacked)
    torch.testing.assert_close(mapped, torch.stack([plain, 2 * plain]))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda each: reward_to_go(each, dones, 0.9), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(rewards), plain)
