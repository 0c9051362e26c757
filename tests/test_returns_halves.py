import math

import numba
import pytest
import torch

from vecpg.returns import halves, packed_reward_to_go, reward_to_go

SIXTEEN = [torch.bfloat16, torch.float16]
# As everywhere, as this processor does it, and with numbers near 0 flushed.
WAYS = ["portable", "native", "flushed"]


@pytest.fixture(params=WAYS)
def compiled(request, monkeypatch):
    """`widen` and `narrow` over arrays, in code of their own."""
    if request.param == "portable":
        monkeypatch.setattr(halves, "_has_float16", lambda target: False)
    widen, narrow = halves.widen, halves.narrow

    @numba.njit
    def widen_all(source, into):
        for i in range(len(source)):
            into[i] = widen(source[i])

    @numba.njit
    def narrow_all(source, into, like):
        for i in range(len(source)):
            into[i] = narrow(source[i], like)

    flushes = request.param == "flushed" and torch.set_flush_denormal(True)
    yield widen_all, narrow_all
    if flushes:
        torch.set_flush_denormal(False)


def every(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def bits(tensor, dtype):
    """As what kernels read it as."""
    return tensor.view(torch.int16).numpy().view(type(halves.LIKE[dtype]))


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_every_pattern_is_widened_and_narrowed_as_torch_does(compiled, dtype):
    widen_all, narrow_all = compiled
    patterns = every(dtype)
    expected = patterns.float()
    found = torch.empty(len(patterns))
    widen_all(bits(patterns, dtype), found.numpy())
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(found[number].view(torch.int32), expected[number].view(torch.int32))

    # Each number, those halfway between two, and those next to halfway.
    finite = expected[expected.isfinite()].sort().values
    overflow = torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps / 4)
    halfway = torch.cat([(finite[1:] + finite[:-1]) / 2, torch.tensor([overflow, -overflow])])
    whole = halfway.double()
    near = [whole * (1 + sign * 2.0**-power) for sign in (1, -1) for power in (22, 23, 40)]
    anything = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    tiny = torch.tensor([0.0, -0.0, 5e-324, -1e-40, 1e300, -1e300])
    wide = torch.cat([expected.double(), whole, *near, anything.double(), tiny.double()])
    result = torch.empty(len(wide), dtype=dtype)
    narrow_all(wide.numpy(), bits(result, dtype), halves.LIKE[dtype])
    torch.set_flush_denormal(False)
    expected = wide.float().to(dtype)
    assert torch.equal(result.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(result[number].view(torch.int16), expected[number].view(torch.int16))


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("layout", ["rows", "columns", "apart", "packed"])
def test_every_loop_reads_and_writes_every_pattern(dtype, layout):
    """A row that ends its episode is its own return."""
    patterns = every(dtype).view(256, 256)
    dones = torch.ones(256, 256, dtype=torch.bool)
    if layout == "packed":
        offsets = torch.arange(2**16 + 1)
        result = packed_reward_to_go(patterns.flatten(), offsets, 0.5).view(256, 256)
    elif layout == "columns":
        result = reward_to_go(patterns.t(), dones, 0.5).t()
    elif layout == "apart":
        result = reward_to_go(torch.stack([patterns, patterns], -1)[..., 0], dones, 0.5)
    else:
        result = reward_to_go(patterns, dones, 0.5)
    assert torch.equal(result.isnan(), patterns.isnan())
    assert torch.equal(result[~result.isnan()], patterns[~patterns.isnan()])


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_sixteen_bits_are_the_rounded_returns_of_the_same_numbers(dtype, columns, masked):
    rewards = torch.randn(77, 41).to(dtype)
    dones, mask = torch.rand(77, 41) < 0.1, torch.rand(77, 41) < 0.8
    given = [rewards, dones, mask]
    if columns:
        given = [each.t().contiguous().t() for each in given]
    rewards, dones, mask = given
    rewards[60, 3] = math.inf
    options = {"mask": mask if masked else None, "mask_mode": "skip"}
    result = reward_to_go(rewards, dones, 0.97, **options)
    assert result.stride() == rewards.stride()
    wide = reward_to_go(rewards.float(), dones, 0.97, **options)
    assert torch.equal(result, wide.to(dtype))
