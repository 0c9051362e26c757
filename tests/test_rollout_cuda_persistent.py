import functools
import math
import re

import numpy as np
import pytest
import torch
from gymnasium import spaces
from on_tensors import Dock, Fading, Track

triton = pytest.importorskip("triton", reason="needs triton, which is for Linux")

import gpu_kernels  # noqa: E402

from vecpg.envs import ops  # noqa: E402
from vecpg.envs.acrobot import Acrobot  # noqa: E402
from vecpg.envs.cartpole import CartPole  # noqa: E402
from vecpg.envs.mountain_car_continuous import MountainCarContinuous  # noqa: E402
from vecpg.envs.pendulum import Pendulum  # noqa: E402
from vecpg.envs.tensor import TensorVectorEnv  # noqa: E402
from vecpg.kernels import iteration as memories  # noqa: E402
from vecpg.kernels.iteration import Setting, Shape, Tally, make_memory  # noqa: E402
from vecpg.noise import WORD, Purpose, Stream  # noqa: E402
from vecpg.policy import Policy  # noqa: E402
from vecpg.policy.shape import MOST_FEATURES, MOST_OUTPUTS, in_a_row, shape_of  # noqa: E402
from vecpg.returns import reward_to_go  # noqa: E402
from vecpg.rollout import collect  # noqa: E402
from vecpg.rollout.cuda import persistent  # noqa: E402
from vecpg.rollout.statistics import episode_statistics  # noqa: E402

CPU = torch.device("cpu")
GAMMA = 0.97
POISON = {torch.float32: math.nan, torch.float64: math.nan}


class Runs:
    """Of each run the environments, its policy and what it collects on the CPU; then in a memory.

    Args:
        definition: of the environments.
        seeds: one for each run.
        num_envs: of each run.
    """

    def __init__(
        self,
        definition,
        num_envs,
        num_steps,
        limit,
        *,
        seeds=(3,),
        shards=1,
        hidden=(5, 18),
        activation="tanh",
        first_env=0,
        scale=1.0,
        backend="cpu",
    ):
        self.definition, self.num_steps, self.limit = definition, num_steps, limit
        self.shards = shards
        self.wanted, self.policies, self.streams = [], [], []
        for seed in seeds:
            envs = TensorVectorEnv(definition, num_envs, max_episode_steps=limit)
            torch.manual_seed(seed % 1000)
            policy = Policy(
                envs.single_observation_space,
                envs.single_action_space,
                hidden_sizes=hidden,
                activation=activation,
            )
            with torch.no_grad():
                policy.network[-1].weight.mul_(scale)
                for each in policy.parameters():
                    if each.ndim == 1:  # biases and standard deviations, which all begin as 0
                        each.uniform_(-0.5, 0.5)
            given = {"num_steps": num_steps, "seed": seed, "iteration": 2, "first_env": first_env}
            self.wanted.append(collect(envs, policy, **given, backend=backend))
            self.policies.append(policy)
            self.streams.append(Stream(seed, 2, first_env, num_envs))
        self.num_variables = envs.dynamics.num_variables
        self.shape = shape_of(policy)

    def play(self, runs=None, **options):
        """A memory that was poisoned, as it is then."""
        runs = [*range(len(self.wanted))] if runs is None else runs
        shape, num_envs = self.shape, self.streams[0].num_envs
        memory = make_memory(
            shape,
            runs=len(runs),
            num_envs=num_envs,
            shards=self.shards,
            num_steps=self.num_steps,
            max_episode_steps=self.limit,
            slots=3,
            parts=1,
            device=CPU,
        )
        for each in memory:
            each.fill_(POISON.get(each.dtype, 99))
        memory.at.fill_(7)
        slot = 7 % 3
        for r, run in enumerate(runs):
            stream, policy = self.streams[run], self.policies[run]
            common = stream.common_seed(Purpose.TRAINING_RESET)
            seed = stream.seed & WORD, stream.seed >> 32, stream.iteration
            start = common & WORD, common >> 32, stream.first_env
            memory.keys[slot, r] = torch.tensor([*seed, *start])
            memory.settings[r, Setting.GAMMA] = GAMMA ** (1 + run)
            row = torch.cat([each.detach().reshape(-1) for each in in_a_row(policy)])
            memory.states[slot, r, 0, : shape.size] = row
            if shape.gaussian:
                memory.bounds[0] = policy.distribution.low.reshape(-1)
                memory.bounds[1] = policy.distribution.high.reshape(-1)
            if options.get("given"):
                actions = self.wanted[run].actions
                memory.actions[r, : len(actions)] = self.numbers(actions)
        sizes = {"num_steps": self.num_steps, "max_episode_steps": self.limit}
        persistent.play(memory, self.definition, self.num_variables, shape, **sizes, **options)
        return memory

    def numbers(self, actions):
        """Actions as they lie in a memory."""
        if self.shape.gaussian:
            return actions.reshape(*actions.shape[:2], -1)
        return (actions - self.shape.first_action).to(torch.int8)


def rows_of(memory, r, length):
    """(length, N) of a run: whether a row of the memory was written."""
    blocks = memory.last[r].reshape(memory.parts.shape[1], -1)
    envs_of_shard = memory.flags.shape[2] // len(blocks)
    lasts = blocks.repeat_interleave(memory.block, dim=1)[:, :envs_of_shard].reshape(-1)
    return torch.arange(length)[:, None] < lasts


@pytest.mark.slow
def test_interpreted():
    gpu_kernels.interpret("test_rollout_cuda_persistent")


def interpret():
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    memories._SMALL_BLOCK = 4
    # Blocks of shards are ragged, environments begin anew, and some are cut.
    check_given(Runs(CartPole, 10, 10, 10, shards=2, first_env=7, scale=30.0))
    check_given(Runs(Pendulum, 5, 7, 5, seeds=(2**40 + 5,), activation="relu", hidden=(17, 3)))
    check_given(Runs(Acrobot, 3, 6, 4, hidden=(16, 16)))
    check_given(Runs(MountainCarContinuous, 6, 6, 4, shards=2, hidden=(33, 2)))
    check_given(Runs(Track, 5, 9, 6, first_env=1), full_return=True)
    # Logarithms and the like are others than the CPU's.
    check_given(Runs(Dock, 5, 12, 9, first_env=2), close=1e-6)
    check_given(Runs(Fading, 9, 1, 5))
    check_categorical(Runs(CartPole, 6, 5, 5, seeds=(3, 2**33), shards=2, scale=30.0))
    check_categorical(Runs(Track, 6, 9, 6, activation="relu", hidden=(20, 7)))
    check_first_actions(Runs(Pendulum, 5, 2, 3))
    check_first_actions(Runs(Dock, 6, 1, 1, hidden=(4, 9), shards=2))
    check_widest()
    check_what_is_not_finite()
    memories._SMALL_BLOCK = 512
    check_lengths()


def check_given(runs, close=0.0, full_return=False):
    """What the CPU collects from the same actions."""
    memory = runs.play(given=True, full_return=full_return)
    check_rows(memory, 0, runs.wanted[0], close, full_return)
    assert runs.num_steps == 1 or (memory.numbers > 1).any()
    assert (memory.flags[rows_of(memory, 0, memory.flags.shape[1])[None]] >= 4).any()


def check_rows(memory, r, wanted, close=0.0, full_return=False):
    def equal(one, other):
        torch.testing.assert_close(one, other, rtol=0, atol=close)

    length, num_envs = wanted.mask.shape
    assert length == memory.last[r].max()
    written = rows_of(memory, r, length)
    assert not wanted.mask[~written].any()
    flags = wanted.mask + 2 * wanted.terminations.to(torch.int8) + 4 * wanted.truncations
    assert torch.equal(memory.flags[r, :length][written], flags.to(torch.int8)[written])
    equal(memory.rewards[r, :length][written], wanted.rewards[written])
    seen = wanted.obs.reshape(length, num_envs, -1)
    equal(memory.obs[r, :length][wanted.mask], seen[wanted.mask])
    t, n = wanted.final_rows.unbind(1)
    equal(memory.obs[r, t + 1, n], wanted.final_obs.flatten(1))
    weights = reward_to_go(wanted.rewards, wanted.dones, GAMMA ** (1 + r), mask=wanted.mask)
    if full_return:
        for n in range(num_envs):
            for first, after in episodes_of(wanted, n):
                weights[first:after, n] = weights[first, n]
    torch.testing.assert_close(
        memory.weights[r, :length][written], weights[written], rtol=0, atol=10 * close
    )
    # Rows from `last` on are as they were.
    after = ~rows_of(memory, r, len(memory.flags[r]))
    assert (memory.flags[r][after] == 99).all()
    assert memory.rewards[r][after].isnan().all()
    assert memory.weights[r][after].isnan().all()
    assert memory.obs[r, 1:][after].isnan().all()

    for n in range(num_envs):
        episodes = episodes_of(wanted, n)
        assert memory.numbers[r, n] == len(episodes)
        assert memory.longest[r, n] == max(after - first for first, after in episodes)
        found = zip(memory.starts[r, :, n].tolist(), memory.stops[r, :, n].tolist(), strict=True)
        assert [*found][: len(episodes)] == episodes
    of_blocks = memory.tallies[r].reshape(memory.parts.shape[1], -1, len(Tally))
    for envs, tallies in blocks_of(memory, of_blocks):
        part = wanted.mask[:, envs]
        returns = episode_statistics(in_part(wanted, envs)).returns
        counts = [part.sum(), len(returns), returns.sum(), returns.min(), returns.max(), 1]
        torch.testing.assert_close(
            tallies, torch.tensor(counts, dtype=torch.float64), rtol=1e-14, atol=10 * close
        )


def blocks_of(memory, of_blocks):
    """The environments of each block, and what is known of it."""
    envs_of_shard = memory.flags.shape[2] // len(of_blocks)
    for shard, blocks in enumerate(of_blocks):
        for b, each in enumerate(blocks):
            stop = min((b + 1) * memory.block, envs_of_shard)
            yield shard * envs_of_shard + torch.arange(b * memory.block, stop), each


def in_part(rollout, envs):
    """A rollout of some environments, for what needs no observations."""
    from dataclasses import replace

    names = "obs", "actions", "rewards", "terminations", "truncations", "mask"
    return replace(
        rollout, **{name: getattr(rollout, name)[:, envs].contiguous() for name in names}
    )


def episodes_of(rollout, n):
    """First row and the one after the last, of each episode of an environment."""
    ends = (rollout.dones[:, n] & rollout.mask[:, n]).nonzero()[:, 0].tolist()
    found, first = [], 0
    for end in ends:
        while not rollout.mask[first, n]:
            first += 1
        found.append((first, end + 1))
        first = end + 1
    return found


def check_categorical(runs):
    """Drawn actions are the CPU's up to where a number is next to a boundary. Few are."""
    memory, near = runs.play(), 0
    for r, (wanted, policy) in enumerate(zip(runs.wanted, runs.policies, strict=True)):
        length = min(len(wanted.mask), memory.flags.shape[1])
        numbers = runs.numbers(wanted.actions)
        other = (memory.actions[r, :length] != numbers) & wanted.mask
        for t, n in zip(*other.nonzero(as_tuple=True), strict=True):
            if not other[:t, n].any():
                assert distance(policy, runs.streams[r], wanted.obs[t, n], t, n) < 1e-6
                near += 1
        if not other.any():
            check_rows(memory, r, wanted)
        assert 0 < numbers[wanted.mask].float().mean() < runs.shape.outputs - 1
    assert near <= 1
    # A run is as it is alone.
    for r in range(len(runs.wanted)):
        alone = runs.play([r])
        for name in memory._fields:
            both, one = getattr(memory, name), getattr(alone, name)
            if name in ("keys", "scalars", "states", "entries", "stamps"):
                both, one = both[:, r], one[:, 0]
            elif name not in ("at", "bounds"):
                both, one = both[r], one[0]
            torch.testing.assert_close(both, one, rtol=0, atol=0, equal_nan=True)


def distance(policy, stream, obs, t, n):
    """From a uniform number to the nearest cumulative probability, in float64."""
    wide = obs.double()
    for layer in policy.network:
        if isinstance(layer, torch.nn.Linear):
            wide = torch.nn.functional.linear(wide, layer.weight.double(), layer.bias.double())
        else:
            wide = layer(wide)
    cumulative = wide.softmax(dim=-1).cumsum(dim=-1)
    number = stream.uniforms_at(t[None], n[None], Purpose.ACTION, 1).double()
    return (cumulative - number).abs().min().item()


def check_first_actions(runs):
    memory, wanted = runs.play(), runs.wanted[0]
    drawn = runs.numbers(wanted.actions)
    torch.testing.assert_close(memory.actions[0, 0], drawn[0], rtol=0, atol=1e-6)
    assert drawn[0].std() > 0.1
    assert (memory.tallies[0, :, Tally.FINITE] == 1).all()


class Wide:
    """As many observations as there may be, and components of an action."""

    observation_space = spaces.Box(-9, 9, (MOST_FEATURES,))
    action_space = spaces.Box(-1, 1, (MOST_OUTPUTS,))
    num_uniforms = 1

    @staticmethod
    def start(uniforms):
        return (uniforms[0],)

    @staticmethod
    def transition(state, action):
        return (0.5 * state[0] + action[3],)

    @staticmethod
    def observation(state):
        x = state[0]
        return seven(x) + seven(2.0 * x) + seven(x * x) + seven(-x) + seven(1.0 - x) + others(x)

    @staticmethod
    def terminated(state):
        return abs(state[0]) > 9.0

    @staticmethod
    def reward(state, action, following):
        return action[0] + action[MOST_OUTPUTS - 1]


def seven(x):
    return x, 0.1 * x, 0.3 * x, 0.5 * x, 0.7 * x, 0.9 * x, 1.1 * x


def others(x):
    return seven(x * x * x) + seven(0.5 - x) + seven(2.0 - x) + seven(x * x - 1.0)


def check_widest():
    runs = Runs(Wide, 3, 1, 2, hidden=(64, 64), backend="reference")
    check_first_actions(runs)
    check_given(runs, close=1e-6)


class Falling:
    """Its second row pays NaN to environments that began in the upper half."""

    observation_space = spaces.Box(-9, 9, (1,))
    action_space = spaces.Discrete(2)
    num_uniforms = 1

    @staticmethod
    def start(uniforms):
        return uniforms[0], 0.0

    @staticmethod
    def transition(state, action):
        return state[0], state[1] + 1.0

    @staticmethod
    def observation(state):
        return (state[0],)

    @staticmethod
    def terminated(state):
        return state[1] > 2.5

    @staticmethod
    def reward(state, action, following):
        bad = (state[0] > 0.5) & (state[1] == 1.0)
        return ops.where(bad, float("nan"), 1.0)


class Rising(Falling):
    """What is seen at the end is not finite there; that counts after a truncation alone."""

    @staticmethod
    def observation(state):
        return (ops.where((state[0] > 0.5) & (state[1] > 2.5), float("inf"), state[0]),)

    @staticmethod
    def reward(state, action, following):
        return 1.0


class Beginning(Rising):
    """There it is what is seen first."""

    @staticmethod
    def observation(state):
        return (ops.where((state[0] > 0.5) & (state[1] < 0.5), float("inf"), state[0]),)


def check_what_is_not_finite():
    """That is said of a block where something is not that counts."""
    cases = (Falling, 9, True), (Rising, 3, True), (Rising, 9, False), (Beginning, 9, True)
    for definition, limit, told in cases:
        memory, upper = of_parts(definition, limit)
        # Lanes of a block beyond its shard's one environment are none, whatever begins there.
        assert upper.tolist() == [False, False, True, True]
        finite = memory.tallies[0, :, Tally.FINITE].tolist()
        assert finite == [float(not (told and each)) for each in upper]
    # A drawn action that is infinite is held inside the bounds, and is wrong all the same.
    runs = Runs(Pendulum, 2, 1, 2)
    runs.policies[0].network[-1].bias.data.fill_(math.inf)
    assert runs.play().tallies[0, 0, Tally.FINITE] == 0


def of_parts(definition, limit):
    """A memory of a block in each shard, and which environments began in the upper half."""
    shape = Shape(1, (4, 4), 2, tanh=True, gaussian=False, first_action=0)
    sizes = {"num_steps": 1, "max_episode_steps": limit}
    one = {"runs": 1, "num_envs": 4, "shards": 4, "slots": 1, "parts": 1, "device": CPU}
    memory = make_memory(shape, **one, **sizes)
    memory.keys[0, 0] = torch.tensor([3, 0, 2, 2, 0, 0])
    persistent.play(memory, definition, 2, shape, **sizes)
    return memory, memory.obs[0, 0, :, 0] > 0.5


class Wander:
    """A place that every action moves, until it is far from 0."""

    observation_space = spaces.Box(-9, 9, (1,))
    action_space = spaces.Box(-1, 1, (1,))
    num_uniforms = 1

    @staticmethod
    def start(uniforms):
        return (uniforms[0] - 0.5,)

    @staticmethod
    def transition(state, action):
        return (state[0] + 0.5 * action[0],)

    @staticmethod
    def observation(state):
        return state

    @staticmethod
    def terminated(state):
        return abs(state[0]) > 1.0

    @staticmethod
    def reward(state, action, following):
        return 1.0


def check_lengths():
    """Lengths of episodes are distributed as the CPU's are, with other random numbers.

    Source: Kolmogorov and Smirnov's test of two samples, at a level of 0.001.
    """
    runs = Runs(Wander, 512, 1, 12, backend="reference")
    wanted = runs.wanted[0]
    runs.streams[0] = Stream(4, 2, 0, 512)
    other = runs.play().longest[0]
    lengths = wanted.mask.sum(dim=0)
    assert lengths.unique().numel() > 8
    ages = torch.arange(14)[:, None]
    apart = ((lengths <= ages).double().mean(1) - (other <= ages).double().mean(1)).abs().max()
    assert apart < 1.95 * math.sqrt(2 / 512)


# Compiled, as launched, without a GPU.


def launch(definition, shape, num_envs, num_variables, runs=1, num_steps=3, limit=7):
    memory = make_memory(
        shape,
        runs=runs,
        num_envs=num_envs,
        shards=1,
        num_steps=num_steps,
        max_episode_steps=limit,
        slots=2,
        parts=1,
        device=CPU,
    )
    sizes = {"num_steps": num_steps, "max_episode_steps": limit}
    persistent.play(memory, definition, num_variables, shape, **sizes)


OF_CARTPOLE = Shape(4, (64, 64), 2, tanh=True, gaussian=False, first_action=0)
OF_PENDULUM = Shape(3, (64, 64), 1, tanh=True, gaussian=True, first_action=0)
OF_CAR = Shape(2, (64, 64), 1, tanh=True, gaussian=True, first_action=0)
MANY, FEW = 4100, 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("definition", "shape", "num_variables", "num_envs", "capability"),
    [
        (CartPole, OF_CARTPOLE, 4, MANY, 80),
        (CartPole, OF_CARTPOLE, 4, FEW, 90),
        (Pendulum, OF_PENDULUM, 2, MANY, 90),
        (MountainCarContinuous, OF_CAR, 2, MANY, 100),
        (CartPole, OF_CARTPOLE._replace(tanh=False, first_action=2**40), 4, MANY, 80),
        (Pendulum, OF_PENDULUM, 2, FEW, 100),
    ],
)
def test_compiled(definition, shape, num_variables, num_envs, capability, monkeypatch):
    """No register is spilled, and one kernel serves all sizes."""
    with gpu_kernels.compiling(monkeypatch, capability) as kernels:
        launch(definition, shape, num_envs, num_variables)
        launch(definition, shape, num_envs + 1, num_variables, runs=16, num_steps=1, limit=16)
    assert kernels[0] is kernels[1]
    used = gpu_kernels.resources(kernels[0])
    assert used["LOCAL"] == used["STACK"] == 0
    assert "globaltimer" in kernels[0].asm["ptx"]
    if num_envs == MANY:
        # Nothing is contracted or approximated.
        assert not re.search(r"\b(fma|mad)\S*\.f32|approx|div\.full", kernels[0].asm["ptx"])


def test_an_environment_and_a_policy_have_one_kernel():
    kernel = functools.partial(persistent._kernel, Track, 1)
    of_track = Shape(2, (8, 8), 3, tanh=True, gaussian=False, first_action=-1)
    assert kernel(of_track) is kernel(of_track)
    assert kernel(of_track) is not kernel(of_track._replace(first_action=0))


@pytest.mark.slow
def test_triton_that_cannot_gather_compiles_it(monkeypatch):
    """As that of torch 2.6 cannot. Numbers are the same wherever they lie."""
    monkeypatch.delattr(persistent.tl, "gather")
    persistent._kernel.cache_clear()
    try:
        with gpu_kernels.compiling(monkeypatch) as kernels:
            launch(CartPole, OF_CARTPOLE, MANY, 4)
    finally:
        persistent._kernel.cache_clear()
    assert "globaltimer" in kernels[0].asm["ptx"]
