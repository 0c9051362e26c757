import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces

triton = pytest.importorskip("triton", reason="needs triton, which is for Linux")

import gpu_kernels  # noqa: E402
import triton.language as tl  # noqa: E402

from vecpg.noise import WORD, Purpose, Stream  # noqa: E402
from vecpg.policy import Policy, cuda  # noqa: E402

OBS = spaces.Box(-1, 1, (3,))
STREAM = Stream(2**40 + 17, 5, 1000, 131)


def policy_of(actions, **settings):
    return Policy(OBS, actions, hidden_sizes=[8], **settings)


def box(size):
    high = np.arange(1, size + 1) / 2
    return spaces.Box((-high).astype(np.float32), high.astype(np.float32))


def copies_of(size, t, num_envs=STREAM.num_envs):
    key = [STREAM.seed & WORD, STREAM.seed >> 32, STREAM.iteration, 99, 99, STREAM.first_env]
    return SimpleNamespace(
        acted=torch.full((num_envs, size), math.nan),
        t=torch.tensor([t]),
        key=torch.tensor(key),
    )


def rows_of(policy, num_rows, num_envs=STREAM.num_envs):
    shape = num_rows, num_envs, *policy.action_shape
    return SimpleNamespace(actions=torch.full(shape, 99, dtype=policy.action_dtype))


def draw(policy, parameters, t):
    """Row t, of t + 2, and what it is for the environment."""
    copies, rows = copies_of(math.prod(policy.action_shape), t - 3), rows_of(policy, t + 2)
    cuda.make_draw(policy)(parameters, copies, rows, 3)
    assert (rows.actions[:t] == 99).all()
    assert (rows.actions[t + 1 :] == 99).all()
    return rows.actions[t], copies.acted


def turned(parameters):
    """The same numbers, with those of one environment next to each other."""
    return parameters.mT.contiguous().mT


def uniforms_of(t, count):
    return STREAM.uniforms_at(
        torch.full((STREAM.num_envs,), t), torch.arange(STREAM.num_envs), Purpose.ACTION, count
    )


@pytest.mark.slow
def test_interpreted():
    gpu_kernels.interpret("test_policy_cuda")


def interpret():
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    torch.manual_seed(1)
    check_categorical()
    check_extreme_logits()
    check_bounds_between_actions()
    check_gaussian()
    check_uniforms()


def check_categorical():
    for number, start in ((2, 0), (3, -1), (18, 5), (1, 0)):
        policy = policy_of(spaces.Discrete(number, start=start))
        undecided = 0
        for t in range(2):
            logits = 3 * torch.randn(number, STREAM.num_envs)
            drawn, acted = draw(policy, logits, t)
            uniforms = uniforms_of(t, 1)
            wanted = policy.distribution.sample(logits, uniforms)
            below = torch.softmax(logits.double(), dim=0).cumsum(dim=0)
            decided = ((below - uniforms).abs() > 1e-6).all(dim=0)
            assert torch.equal(drawn[decided], wanted[decided])
            assert torch.equal(acted[:, 0], drawn.float())
            assert torch.equal(draw(policy, turned(logits), t)[0], drawn)
            assert ((drawn >= start) & (drawn < start + number)).all()
            assert number == 18 or len(drawn.unique()) == number
            undecided += int((~decided).sum())
        assert undecided <= 2


def check_extreme_logits():
    """What is ruled out is never drawn, and a difference beyond float32's range is no overflow."""
    policy = policy_of(spaces.Discrete(3))
    logits = torch.full((3, STREAM.num_envs), -math.inf)
    logits[1] = 0.0
    assert (draw(policy, logits, 0)[0] == 1).all()
    logits = torch.tensor([[3e38], [-3e38], [3e38]]).repeat(1, STREAM.num_envs)
    assert sorted(draw(policy, logits, 0)[0].unique().tolist()) == [0, 2]


@triton.jit
def choose(logits, uniforms, chosen, NUMBER: tl.constexpr):
    n = tl.arange(0, 8)
    number = tl.load(uniforms + n)
    tl.store(chosen + n, cuda.choose(logits + n, 8, number, n < 8, NUMBER))


def check_bounds_between_actions():
    """A number at a bound stands for the action above it, as a cumulative sum is reached there."""
    uniforms = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.25 - 2**-24, 0.5 - 2**-24, 0.5, 1 - 2**-24])
    chosen = torch.zeros(8, dtype=torch.int32)
    choose[(1,)](torch.zeros(4, 8), uniforms, chosen, NUMBER=4)
    assert chosen.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def check_gaussian():
    for size in (1, 2, 5):
        policy = policy_of(box(size))
        with torch.no_grad():
            # From one end of what a standard deviation may be to the other.
            policy.distribution.raw_log_std.copy_(torch.linspace(-9, 9, size + 2)[1:-1])
        means = torch.randn(size, STREAM.num_envs)
        drawn, acted = draw(policy, means, 1)
        wanted = policy.distribution.sample(means, uniforms_of(1, policy.num_uniforms)).detach()
        torch.testing.assert_close(drawn, wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(acted, policy.distribution.clipped(drawn))
        assert torch.equal(draw(policy, turned(means), 1)[0], drawn)
        assert (acted != drawn).any()
        assert (acted == drawn).any()
        # The parameters are read anew at every call.
        made = cuda.make_draw(policy)
        with torch.no_grad():
            policy.distribution.raw_log_std.fill_(-100.0)
        copies, rows = copies_of(size, 0), rows_of(policy, 1)
        made(means, copies, rows, 0)
        assert (rows.actions[0] - means.mT).abs().max() < 7 * math.exp(-5)
    copies.acted[:] = 0.0
    made(torch.full_like(means, math.nan), copies, rows, 0)
    assert copies.acted.isnan().all()


def check_uniforms():
    for count in (1, 4, 7):
        out, copies = torch.full((count, 3, STREAM.num_envs), math.nan), copies_of(1, 40)
        cuda.uniforms(out, copies, Purpose.DROPOUT, 2)
        steps = torch.arange(42, 45)[:, None]
        envs = torch.arange(STREAM.num_envs)
        assert torch.equal(out, STREAM.uniforms_at(steps, envs, Purpose.DROPOUT, count))


def test_who_is_served():
    assert cuda.why_not(policy_of(spaces.Discrete(3))) is None
    assert cuda.why_not(policy_of(box(2))) is None
    assert "from the network" in cuda.why_not(policy_of(box(2), log_std="network"))
    several = policy_of(spaces.MultiDiscrete([2, 3]))
    assert "neither Discrete nor a Box" in cuda.why_not(several)

    class Other(Policy):
        def sample(self, *given):
            return super().sample(*given)

    assert "Other draws in its own way" in cuda.why_not(Other(OBS, spaces.Discrete(3)))
    changed = policy_of(spaces.Discrete(3))
    changed.sample = lambda *given: None
    assert "in its own way" in cuda.why_not(changed)


# Compiled, as launched, without a GPU.


def launch(actions, num_envs=1000, num_rows=20, offset=3):
    policy = policy_of(actions)
    copies = copies_of(math.prod(policy.action_shape), 0, num_envs)
    parameters = torch.zeros(policy.distribution.num_parameters, num_envs)
    cuda.make_draw(policy)(parameters, copies, rows_of(policy, num_rows, num_envs), offset)


def launch_uniforms(count=7, num_steps=5, num_envs=1000, offset=3):
    out = torch.zeros(count, num_steps, num_envs)
    cuda.uniforms(out, copies_of(1, 0, num_envs), Purpose.DROPOUT, offset)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled(capability, monkeypatch):
    with gpu_kernels.compiling(monkeypatch, capability) as kernels:
        launch(spaces.Discrete(2))
        launch(spaces.Discrete(18))
        launch(box(1))
        launch(box(6))
        launch_uniforms()
    assert len(kernels) == 5
    for kernel in kernels:
        used = gpu_kernels.resources(kernel)
        assert used["LOCAL"] == used["STACK"] == 0
        assert used["REG"] <= 48
        assert "approx" not in kernel.asm["ptx"]


@pytest.mark.slow
def test_one_kernel_serves_all_sizes_and_rows(monkeypatch):
    with gpu_kernels.compiling(monkeypatch) as kernels:
        for offset in (0, 1, 16, 2**31):
            for num_envs, num_rows in ((1, 1), (16, 16), (33, 57)):
                launch(spaces.Discrete(2), num_envs, num_rows, offset)
                launch(box(1), num_envs, num_rows, offset)
                launch_uniforms(num_rows, num_rows, num_envs, offset)
    assert len(kernels) == 36
    assert len({*map(id, kernels)}) == 3


@pytest.mark.slow
def test_prepared_is_compiled(monkeypatch):
    with gpu_kernels.compiling(monkeypatch) as kernels:
        cuda.prepare(policy_of(spaces.Discrete(2)))
        cuda.prepare(policy_of(box(1), dropout=0.1))
        cuda.prepare(policy_of(spaces.MultiDiscrete([2, 3])))
        prepared = {*map(id, kernels)}
        assert len(kernels) == 4
        launch(spaces.Discrete(2))
        launch(box(1))
        launch_uniforms()
    assert {*map(id, kernels)} == prepared
