import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from on_tensors import Dock, Fading, Panel, Track

triton = pytest.importorskip("triton", reason="needs triton, which is for Linux")

import gpu_kernels  # noqa: E402

from vecpg.envs import ops  # noqa: E402
from vecpg.envs.acrobot import Acrobot  # noqa: E402
from vecpg.envs.cartpole import CartPole  # noqa: E402
from vecpg.envs.definition import num_components, num_observations  # noqa: E402
from vecpg.envs.mountain_car_continuous import MountainCarContinuous  # noqa: E402
from vecpg.envs.pendulum import Pendulum  # noqa: E402
from vecpg.envs.tensor import TensorVectorEnv  # noqa: E402
from vecpg.noise import WORD, Purpose, Stream  # noqa: E402
from vecpg.policy import Policy  # noqa: E402
from vecpg.rollout import collect, cuda  # noqa: E402
from vecpg.rollout.data import FINISHED, PLAYING, RESETTING  # noqa: E402

VARIABLES = {CartPole: 4, Pendulum: 2, Acrobot: 4, MountainCarContinuous: 2}
VARIABLES |= {Track: 1, Dock: 7, Panel: 3, Fading: 2}
POISON = {torch.float32: math.nan, torch.bool: True}


def filled(*shape, of=torch.float32):
    return torch.full(shape, POISON.get(of, 99), dtype=of)


def copies_of(definition, num_envs, key=(0, 0, 0, 0, 0, 0)):
    return SimpleNamespace(
        state=filled(VARIABLES[definition], num_envs),
        **{
            name: filled(num_envs, of=torch.int32)
            for name in ("lengths", "steps", "episodes", "cut")
        },
        now=filled(num_envs, of=torch.int8),
        bad=filled(num_envs, of=torch.bool),
        seen=filled(num_envs, num_observations(definition)),
        acted=filled(num_envs, num_components(definition)),
        t=filled(1, of=torch.int64),
        key=torch.tensor(key),
    )


def rows_of(definition, capacity, num_envs):
    box = isinstance(definition.action_space, spaces.Box)
    of = torch.float32 if box else torch.int64
    return SimpleNamespace(
        obs=filled(capacity + 1, num_envs, num_observations(definition)),
        actions=filled(capacity, num_envs, num_components(definition), of=of),
        rewards=filled(capacity, num_envs),
        **{
            name: filled(capacity, num_envs, of=torch.bool)
            for name in ("terminations", "truncations", "mask")
        },
    )


@pytest.mark.slow
def test_interpreted():
    gpu_kernels.interpret("test_rollout_cuda")


def interpret():
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    cuda._BLOCK = 4
    check_rollout(CartPole, num_envs=6, num_steps=14, limit=13, first_env=7)
    check_rollout(Fading, num_envs=8, num_steps=1, limit=5)
    check_rollout(Pendulum, num_envs=5, num_steps=7, limit=5, first_env=1000)
    check_rollout(Acrobot, num_envs=3, num_steps=6, limit=4, seed=2**40 + 5)
    check_rollout(MountainCarContinuous, num_envs=3, num_steps=6, limit=4)
    check_rollout(Track, num_envs=5, num_steps=9, limit=6, first_env=1)
    check_rollout(Panel, num_envs=5, num_steps=8, limit=4, first_env=1)
    check_rollout(Fading, num_envs=5, num_steps=9, limit=5, first_env=4)
    # Logarithms and the like are others than the CPU's.
    check_rollout(Dock, num_envs=5, num_steps=12, limit=9, first_env=2, close=1e-6)
    check_what_is_not_finite()
    check_nothing_else_is_written()


def check_rollout(definition, num_envs, num_steps, limit, first_env=0, seed=3, close=0.0):
    """What the CPU collects, step by step, from the actions that it took."""
    envs = TensorVectorEnv(definition, num_envs, max_episode_steps=limit)
    torch.manual_seed(1)
    spaces = envs.single_observation_space, envs.single_action_space
    policy = Policy(*spaces, hidden_sizes=[8])
    wanted = collect(envs, policy, num_steps=num_steps, seed=seed, iteration=2, first_env=first_env)
    common = Stream(seed, 2, 0, num_envs).common_seed(Purpose.TRAINING_RESET)
    key = seed & WORD, seed >> 32, 2, common & WORD, common >> 32, first_env
    length, capacity = len(wanted.mask), len(wanted.mask) + 3
    copies, rows = copies_of(definition, num_envs, key), rows_of(definition, capacity, num_envs)
    rows.actions[:length] = wanted.actions.reshape(length, num_envs, -1)
    rows.actions[length:] = 0

    cuda.make_start(definition, len(copies.state))(copies, rows)
    step = cuda.make_step(definition, len(copies.state))
    assert copies.t.item() == 0
    for t in range(capacity):
        drawn = rows.actions[t].reshape(-1, *policy.action_shape)
        copies.acted.copy_(policy.distribution.clipped(drawn).reshape(num_envs, -1))
        assert torch.equal(copies.seen, rows.obs[t])
        step(copies, rows, t % 3, num_steps=num_steps, max_episode_steps=limit)
        copies.t += 3 * (t % 3 == 2)

    def equal(one, other):
        torch.testing.assert_close(one, other, rtol=0, atol=close)

    assert torch.equal(rows.mask[:length], wanted.mask)
    assert torch.equal(rows.terminations[:length], wanted.terminations)
    assert torch.equal(rows.truncations[:length], wanted.truncations)
    equal(rows.rewards[:length], wanted.rewards)
    for name in ("mask", "terminations", "truncations", "rewards"):
        assert not getattr(rows, name)[length:].any()
    seen = wanted.obs.reshape(length, num_envs, -1)
    equal(rows.obs[:length][wanted.mask], seen[wanted.mask])
    t, n = wanted.final_rows.unbind(1)
    equal(rows.obs[t + 1, n], wanted.final_obs.reshape(len(t), -1))
    assert (copies.now == FINISHED).all()
    assert torch.equal(copies.steps, wanted.mask.sum(dim=0))
    assert torch.equal(copies.episodes, wanted.dones.sum(dim=0))
    assert torch.equal(copies.cut, wanted.truncations.sum(dim=0))
    assert not copies.bad.any()
    # Some begin anew, and some are cut.
    assert num_steps == 1 or (copies.episodes > 1).any()
    assert (copies.cut > 0).any()


class Echo:
    """Adds the action to its place; the reward is the other variable. It ends beyond 50."""

    observation_space = spaces.Box(-9, 9, (1,))
    action_space = spaces.Box(-1, 1, (1,))
    num_uniforms = 1

    @staticmethod
    def start(uniforms):
        return uniforms[0], 0.0

    @staticmethod
    def transition(state, action):
        return state[0] + action[0], state[1]

    @staticmethod
    def observation(state):
        return (state[0],)

    @staticmethod
    def terminated(state):
        return state[0] > 50.0

    @staticmethod
    def reward(state, action, following):
        return state[1] + ops.where(action[0] > 9.0, 1.0, 0.0)


VARIABLES[Echo] = 2


def check_what_is_not_finite():
    """Of what counts alone: that row's reward and action, and an observation that is used."""
    nan, inf = math.nan, math.inf
    cases = [
        # now, place, reward, action, length, whether something is bad
        (PLAYING, 1.0, 1.0, 0.5, 3, False),
        (PLAYING, 1.0, nan, 0.5, 3, True),
        (PLAYING, 1.0, -inf, 0.5, 3, True),
        (RESETTING, nan, nan, 0.5, 0, False),
        (FINISHED, nan, nan, 0.5, 0, False),
        (PLAYING, inf, 1.0, 0.5, 3, False),  # it ends there, and nobody sees it
        (PLAYING, inf, 1.0, 0.5, 9, True),  # as the observation after a truncation
        (PLAYING, nan, 1.0, 0.5, 3, True),
        (PLAYING, 1.0, 1.0, inf, 3, True),
        (RESETTING, 1.0, 1.0, nan, 0, False),
        (FINISHED, 3.0, 1.0, 0.5, 0, False),
        (PLAYING, 2.0, 1.0, 0.5, 3, True),  # from before
    ]
    now, place, reward, action, length, bad = zip(*cases, strict=True)
    copies, rows = copies_of(Echo, len(cases)), rows_of(Echo, 3, len(cases))
    copies.state[0], copies.state[1] = torch.tensor(place), torch.tensor(reward)
    copies.now[:] = torch.tensor(now)
    copies.lengths[:], copies.steps[:] = torch.tensor(length), 20
    copies.episodes[:], copies.cut[:] = 4, 2
    copies.bad[:] = False
    copies.bad[-1] = True
    copies.t[:] = 1
    rows.actions[1, :, 0] = torch.tensor(action)
    copies.acted[:, 0] = torch.tensor(action).clamp(-1, 1)
    cuda.make_step(Echo, 2)(copies, rows, 0, num_steps=20, max_episode_steps=10)
    assert copies.bad.tolist() == [*bad]
    playing = torch.tensor(now) == PLAYING
    assert torch.equal(rows.mask[1], playing)
    assert rows.rewards[1][~playing].tolist() == [0] * 4
    assert rows.terminations[1].nonzero()[:, 0].tolist() == [5, 6]
    assert rows.truncations[1].nonzero()[:, 0].tolist() == [6]
    goes_on = [PLAYING] * 4 + [FINISHED] * 3 + [PLAYING] * 3 + [FINISHED, PLAYING]
    assert copies.now.tolist() == goes_on
    assert copies.lengths.tolist() == [4, 4, 4, 0, 0, 0, 0, 4, 4, 0, 0, 4]
    assert copies.episodes.tolist() == [4 + (n in (5, 6)) for n in range(12)]
    assert copies.cut.tolist() == [2 + (n == 6) for n in range(12)]
    # A copy that has finished stays as it is.
    assert copies.state[0, [0, 10]].tolist() == [1.5, 3.0]

    cuda.make_start(Echo, 2)(copies, rows)
    assert not copies.bad.any()


def check_nothing_else_is_written():
    """A block may be larger than what is left, and a row is not the only one."""
    copies, rows = copies_of(Echo, 5, (1, 0, 0, 1, 0, 0)), rows_of(Echo, 4, 5)
    behind = {}
    for name, each in [*vars(copies).items()]:
        room = torch.cat([each.reshape(-1), filled(8, of=each.dtype)])
        vars(copies)[name], behind[name] = room[:-8].view(each.shape), room[-8:]
    cuda.make_start(Echo, 2)(copies, rows)
    copies.acted[:], copies.t[:] = 0.5, 2
    rows.actions[:] = 0.5
    rows.obs[0] = math.nan
    cuda.make_step(Echo, 2)(copies, rows, -1, num_steps=20, max_episode_steps=10)
    for each in behind.values():
        kept = filled(8, of=each.dtype)
        torch.testing.assert_close(each, kept, rtol=0, atol=0, equal_nan=True)
    for name in ("rewards", "mask"):
        each = getattr(rows, name)
        others = each[[0, 2, 3]]
        assert others.isnan().all() if each.is_floating_point() else others.all()
    assert rows.rewards[1].tolist() == [0.0] * 5
    assert rows.obs[2].isfinite().all()
    assert rows.obs[[0, 1, 3, 4]].isnan().all()


# Compiled, as launched, without a GPU.


def launch(definition, num_envs=1000, capacity=20, offset=3, num_steps=10, limit=20):
    copies = copies_of(definition, num_envs)
    rows = rows_of(definition, capacity, num_envs)
    cuda.make_start(definition, len(copies.state))(copies, rows)
    step = cuda.make_step(definition, len(copies.state))
    step(copies, rows, offset, num_steps=num_steps, max_episode_steps=limit)


# The most registers that leave two thirds of a processor's threads at work.
REGISTERS = 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("definition", "capability"),
    [
        (CartPole, 80),
        (CartPole, 90),
        (CartPole, 100),
        (Pendulum, 90),
        (Acrobot, 80),
        (Acrobot, 100),
        (MountainCarContinuous, 90),
        (Dock, 100),
        (Panel, 80),
    ],
)
def test_compiled(definition, capability, monkeypatch):
    with gpu_kernels.compiling(monkeypatch, capability) as kernels:
        launch(definition)
    assert len(kernels) == 2
    for kernel in kernels:
        used = gpu_kernels.resources(kernel)
        assert used["LOCAL"] == used["STACK"] == 0
        assert used["REG"] <= REGISTERS
        # Nothing is contracted or approximated.
        assert not re.search(r"\b(fma|mad)\S*\.f32|approx|div\.full", kernel.asm["ptx"])


@pytest.mark.slow
def test_one_kernel_serves_all_sizes_and_rows(monkeypatch):
    """Other rows, and other numbers of rows and environments, do not compile anew."""
    with gpu_kernels.compiling(monkeypatch) as kernels:
        launch(Track)
        for offset in (0, 1, 15, 16, 2**31):
            for num_envs, capacity in ((1, 1), (16, 16), (33, 57)):
                launch(Track, num_envs, capacity, offset, num_steps=offset + 1, limit=capacity)
    assert len(kernels) == 2 * 16
    assert len({*map(id, kernels)}) == 2


@pytest.mark.slow
def test_prepared_is_compiled(monkeypatch):
    with gpu_kernels.compiling(monkeypatch) as kernels:
        cuda.prepare(Track, 1, torch.device("cpu"))
        cuda.prepare(Pendulum, 2, torch.device("cpu"))
        prepared = {*map(id, kernels)}
        launch(Track)
        launch(Pendulum)
    assert len(kernels) == 8
    assert {*map(id, kernels)} == prepared


def test_an_environment_has_one_pair_of_kernels():
    assert cuda._kernels(Track, 1) is cuda._kernels(Track, 1)
    assert cuda._source(Track, 1) != cuda._source(Fading, 2)
