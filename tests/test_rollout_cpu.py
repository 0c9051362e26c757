"""Whole rollouts in machine code, against the same environments stepped in torch.

Compiling a dozen kernels takes half a minute where there is no machine code from before.
"""

import math
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import apart, by_stepping
from gymnasium import spaces
from on_tensors import Dock, Panel, Track

from vecpg.envs import make_envs
from vecpg.envs.acrobot import Acrobot
from vecpg.envs.cartpole import CartPole
from vecpg.envs.cpu import compiled
from vecpg.envs.mountain_car_continuous import MountainCarContinuous
from vecpg.envs.pendulum import Pendulum
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.kernels import threads
from vecpg.noise import Stream
from vecpg.policy import Policy
from vecpg.rollout import choose_collector, collect, cpu
from vecpg.update import by_machine_code

NAMES = (
    "obs",
    "actions",
    "rewards",
    "terminations",
    "truncations",
    "mask",
    "final_obs",
    "final_rows",
)


def make(num_envs, max_episode_steps=None, **kwargs):
    return make_envs(
        "CartPole-v1",
        num_envs,
        vectorization="tensor",
        max_episode_steps=max_episode_steps,
        env_kwargs=kwargs,
    )


def make_policy(hidden_sizes=(64, 64), activation="tanh", std=None, seed=0):
    envs = make(1)
    torch.manual_seed(seed)
    policy = Policy(
        envs.single_observation_space,
        envs.single_action_space,
        hidden_sizes=hidden_sizes,
        activation=activation,
    )
    if std is not None:
        for parameter in policy.parameters():
            torch.nn.init.normal_(parameter, std=std)
    return policy


def balancing():
    """Pushes to where the pole falls, and hardly ever otherwise."""
    policy = make_policy(hidden_sizes=())
    with torch.no_grad():
        policy.network[0].weight.copy_(torch.tensor([[0.0] * 4, [1.0, 1.0, 40.0, 10.0]]))
        policy.network[0].bias.zero_()
    return policy


def same(one, other):
    for name in NAMES:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("num_envs", [1, 3, 63, 65, 1000])
@pytest.mark.parametrize(
    "policy",
    [
        make_policy(),
        make_policy((7,), "relu", std=0.5),
        make_policy((256, 33), "relu", seed=3),
        balancing(),
    ],
    ids=["tanh", "one layer", "wide", "balancing"],
)
def test_the_first_steps_are_those_of_the_reference(num_envs, policy):
    arguments = {"num_steps": 60, "seed": 2**40 + 5, "iteration": 7}
    ours = collect(make(num_envs), policy, **arguments, backend="cpu")
    expected = collect(make(num_envs), policy, **arguments, backend="reference")
    rows = slice(0, 50)
    counted = expected.mask[rows]
    for name in ("mask", "terminations", "truncations", "rewards"):
        assert torch.equal(getattr(ours, name)[rows], getattr(expected, name)[rows]), name
    assert torch.equal(ours.actions[rows][counted], expected.actions[rows][counted])
    # A step that only resets carries the last observation of the episode before it.
    seen = counted.clone()
    seen[1:] |= expected.dones[rows][:-1]
    assert (ours.obs[rows][seen] - expected.obs[rows][seen]).abs().max() < 1e-5
    assert counted.sum() > 20 * min(num_envs, 3)


@pytest.mark.parametrize("max_episode_steps", [1, 2, 5, 11])
@pytest.mark.parametrize("num_steps", [1, 2, 11, 40])
def test_short_rollouts_are_those_of_the_reference_to_the_end(num_steps, max_episode_steps):
    """Cut by a limit, started anew, masked; little time for rounding to grow."""
    envs, policy = make(19, max_episode_steps), make_policy(std=0.5)
    for iteration in range(2):
        arguments = {"num_steps": num_steps, "seed": 1, "iteration": iteration}
        ours = collect(envs, policy, **arguments, backend="cpu")
        expected = collect(envs, policy, **arguments, backend="reference")
        for name in ("mask", "terminations", "truncations", "rewards", "final_rows"):
            assert torch.equal(getattr(ours, name), getattr(expected, name)), name
        torch.testing.assert_close(ours.final_obs, expected.final_obs, rtol=0, atol=1e-5)
        assert torch.equal(ours.actions[ours.mask], expected.actions[ours.mask])
        assert ours.stream == expected.stream == Stream(1, iteration, 0, 19)
        assert len(ours.final_rows) > 0


def test_both_ends_and_both_at_once():
    """The same episodes with the limit where one of them ends by itself."""
    policy, arguments = make_policy(std=1.0), {"num_steps": 1, "seed": 4, "iteration": 0}
    free = collect(make(8), policy, **arguments, backend="cpu")
    assert not free.truncations.any()
    limit = int(free.mask.sum(dim=0).median())
    cut = collect(make(8, limit), policy, **arguments, backend="cpu")
    lengths = free.mask.sum(dim=0)
    assert torch.equal(cut.mask.sum(dim=0), lengths.clamp(max=limit))
    assert torch.equal(cut.truncations[limit - 1], lengths >= limit)
    assert torch.equal(cut.terminations[limit - 1], lengths == limit)
    assert torch.equal(free.obs[: limit - 1], cut.obs[: limit - 1])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_balanced_pole_lasts_to_the_limit(backend):
    rollout = collect(make(3), balancing(), num_steps=1, seed=1, iteration=0, backend=backend)
    assert rollout.mask.sum(dim=0).tolist() == [500] * 3
    assert rollout.truncations[499].all()
    assert not rollout.terminations.any()
    assert rollout.final_obs.shape == (3, 4)
    assert rollout.final_obs.abs().max() < 2.4
    # The observation after the cut is one step on from the last that was acted on.
    velocity = rollout.obs[499, :, 1]
    moved = rollout.final_obs[:, 0] - rollout.obs[499, :, 0]
    torch.testing.assert_close(moved, 0.02 * velocity, rtol=0, atol=1e-5)


def test_masked_rows_hold_nothing():
    rollout = collect(make(9), make_policy(), num_steps=30, seed=1, iteration=0, backend="cpu")
    masked = ~rollout.mask
    assert masked.any()
    assert not rollout.rewards[masked].any()
    assert not rollout.dones[masked].any()
    assert rollout.mask[-1].any()


@pytest.mark.parametrize("hidden_sizes", [(64, 64), (33,), ()])
def test_no_bit_depends_on_threads_blocks_or_neighbours(hidden_sizes):
    policy, arguments = make_policy(hidden_sizes), {"num_steps": 50, "seed": 3, "iteration": 1}
    rollouts = []
    for number in (1, 2, 3, 9, 65):
        with threads.using(number):
            rollouts.append(collect(make(65), policy, **arguments, backend="cpu"))
    for other in rollouts[1:]:
        same(rollouts[0], other)
    fewer = collect(make(5), policy, **arguments, backend="cpu")
    length = len(fewer.mask)
    for name in NAMES[:6]:
        assert torch.equal(getattr(rollouts[0], name)[:length, :5], getattr(fewer, name)), name


def test_memory_that_grows_changes_nothing(monkeypatch):
    policy, arguments = make_policy(), {"num_steps": 60, "seed": 3, "iteration": 1}
    expected = collect(make(9), policy, **arguments, backend="cpu")
    for steps in (9, 70, 400):
        monkeypatch.setattr(cpu, "_FIRST_STEPS", steps)
        same(collect(make(9), policy, **arguments, backend="cpu"), expected)


def test_transitions_are_gymnasiums():
    """Every row of whole rollouts, replayed from its own state in float64."""
    policy = make_policy(std=0.7)
    rollout = collect(make(20), policy, num_steps=100, seed=2, iteration=0, backend="cpu")
    env = gymnasium.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    for t, n in rollout.mask[:-1].nonzero().tolist():
        env.state, env.steps_beyond_terminated = rollout.obs[t, n].double().numpy(), None
        obs, reward, terminated, _, _ = env.step(int(rollout.actions[t, n]))
        assert reward == rollout.rewards[t, n]
        assert terminated == rollout.terminations[t, n]
        if not terminated:
            np.testing.assert_allclose(rollout.obs[t + 1, n], obs, rtol=0, atol=1e-6)


def random_states(definition, count):
    """States in and beyond the usual range, (V, count) float32."""
    high = {
        CartPole: [2.6, 3.0, 0.25, 3.0],
        Pendulum: [50.0, 8.0],
        Acrobot: [math.pi, math.pi, 4 * math.pi, 9 * math.pi],
        MountainCarContinuous: [1.2, 0.07],
        Track: [1.6],
        Dock: [1.0, 1.0, 1.0, 2.0, 2.0, math.pi, 0.2],
    }[definition]
    g = torch.Generator().manual_seed(0)
    state = (2 * torch.rand(len(high), count, generator=g) - 1) * torch.tensor(high)[:, None]
    uniforms = torch.rand(definition.num_uniforms, count, generator=g)
    definition.action_space.seed(0)
    actions = torch.from_numpy(np.stack([definition.action_space.sample() for _ in range(count)]))
    return state, uniforms, actions


@pytest.mark.parametrize(
    ("definition", "tolerance", "ends"),
    [
        (CartPole, 5e-7, True),
        (Pendulum, 4e-6, False),
        # An acceleration of up to 400, by 0.2 seconds, of terms that cancel.
        (Acrobot, 4e-4, True),
        pytest.param(MountainCarContinuous, 2e-7, True, marks=pytest.mark.slow),
        pytest.param(Track, 1e-7, True, marks=pytest.mark.slow),
        (Dock, 1e-6, True),
    ],
)
def test_the_functions_of_one_copy_are_those_of_the_tensors(definition, tolerance, ends):
    count = 2000
    state, uniforms, actions = random_states(definition, count)
    dynamics = TensorVectorEnv(definition, count, max_episode_steps=1).dynamics
    following, paid, ended = dynamics.step(state, actions)
    seen, fresh = dynamics.observation(state).reshape(count, -1), dynamics.start(uniforms)
    functions = compiled(definition)
    assert not ends or 50 < ended.sum() < count - 50

    def numbers(column):
        return tuple(np.float32(value) for value in column)

    for i in range(count):
        one, after = numbers(state[:, i]), numbers(following[:, i])
        action = numbers(actions[i].reshape(-1))
        action = action[0] if actions.ndim == 1 else action
        np.testing.assert_allclose(
            functions["transition"](one, action), following[:, i], rtol=0, atol=tolerance
        )
        np.testing.assert_allclose(functions["observation"](one), seen[i], rtol=1e-6, atol=1e-6)
        reward = functions["reward"](one, action, after)
        assert reward == pytest.approx(paid[i].item(), rel=1e-6, abs=2e-6)
        assert functions["terminated"](after) == ended[i]
        np.testing.assert_allclose(
            functions["start"](numbers(uniforms[:, i])), fresh[:, i], rtol=0, atol=3e-7
        )


def test_pendulum_is_that_of_the_reference():
    """An upright pendulum doubles what rounding does every four steps: time is short."""
    envs = make_envs("Pendulum-v1", 65)
    torch.manual_seed(0)
    policy = Policy(envs.single_observation_space, envs.single_action_space)
    with torch.no_grad():
        policy.distribution.raw_log_std.fill_(0.7)
    arguments = {"num_steps": 201, "seed": 5, "iteration": 2}
    ours = collect(envs, policy, **arguments, backend="cpu")
    expected = collect(envs, policy, **arguments, backend="reference")
    for name in ("mask", "terminations", "truncations", "final_rows"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    assert ours.actions.shape == expected.actions.shape == (401, 65, 1)
    for rows, tolerance in ((1, 1e-6), (10, 1e-5), (50, 1e-3)):
        for name in ("obs", "actions", "rewards"):
            difference = (getattr(ours, name) - getattr(expected, name))[:rows].abs().max()
            assert difference < tolerance, (rows, name)
    # Later rows follow from their own states.
    state = torch.stack([torch.atan2(ours.obs[..., 1], ours.obs[..., 0]), ours.obs[..., 2]])
    acted = ours.actions.clamp(-2, 2)
    inside = ours.mask[:-1] & ~ours.dones[:-1]
    assert (ours.actions.abs() > 2).any()
    following, _, _ = envs.dynamics.step(state[:, :-1][:, inside], acted[:-1][inside])
    seen = envs.dynamics.observation(following)
    torch.testing.assert_close(ours.obs[1:][inside], seen, rtol=0, atol=1e-5)
    _, paid, _ = envs.dynamics.step(state[:, ours.mask], acted[ours.mask])
    torch.testing.assert_close(ours.rewards[ours.mask], paid, rtol=1e-5, atol=1e-4)
    normals = (ours.actions[..., 0] - expected_means(policy, ours.obs)) / std(policy)
    assert normals[ours.mask].mean().abs() < 4 / 26000**0.5
    assert (normals[ours.mask].std() - 1).abs() < 4 / 52000**0.5


def expected_means(policy, obs):
    with torch.no_grad():
        return policy.mode(obs.reshape(-1, 3)).reshape(obs.shape[:-1])


def std(policy):
    with torch.no_grad():
        return policy.distribution.mean_and_log_std(torch.zeros(1, 1))[1].exp().item()


@pytest.mark.parametrize(
    ("env_id", "rows"),
    [
        ("Acrobot-v1", 30),
        ("MountainCarContinuous-v0", 60),
        ("on_tensors:Track-v0", 60),
        ("on_tensors:Dock-v0", 20),
    ],
)
@pytest.mark.parametrize("num_envs", [1, 65])
def test_any_environment_is_that_of_the_reference(env_id, rows, num_envs):
    """One state variable and seven, three components of an action, eight of an observation."""
    envs = make_envs(env_id, num_envs, max_episode_steps=40, vectorization="tensor")
    torch.manual_seed(0)
    policy = Policy(envs.single_observation_space, envs.single_action_space, hidden_sizes=(33,))
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for iteration in range(2):
        arguments = {"num_steps": 70, "seed": 2**33 + 1, "iteration": iteration}
        ours = collect(envs, policy, **arguments, backend="cpu")
        expected = collect(envs, policy, **arguments, backend="reference")
        counted = expected.mask[:rows]
        for name in ("mask", "terminations", "truncations"):
            same = torch.equal(getattr(ours, name)[:rows], getattr(expected, name)[:rows])
            assert same, name
        seen = counted.clone()
        seen[1:] |= expected.dones[: rows - 1]
        for name, where in (("obs", seen), ("actions", counted), ("rewards", counted)):
            ours_there, there = (getattr(each, name)[:rows][where] for each in (ours, expected))
            assert (ours_there - there).abs().max() < 2e-4, name
        assert ours.actions.shape[1:] == expected.actions.shape[1:]
        assert ours.final_obs.shape[1:] == expected.final_obs.shape[1:]
        assert counted.sum() > 10 * num_envs


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 5])
def test_normal_numbers_are_those_of_the_distribution(size):
    """However many components: radii are the first half of the uniform numbers, turns the other."""

    high = np.arange(1, size + 1, dtype=np.float32)
    moved = Dock.transition

    class Many(Dock):
        action_space = spaces.Box(-high, high + 1)

        @staticmethod
        def transition(state, action):
            return moved(state, (action[0], action[-1], 0.5))

        @staticmethod
        def reward(state, action, following):
            return action[0] - action[-1]

    envs = TensorVectorEnv(Many, 9, max_episode_steps=6)
    policy = Policy(envs.single_observation_space, envs.single_action_space, hidden_sizes=())
    with torch.no_grad():
        policy.distribution.raw_log_std.copy_(torch.linspace(-1, 1, size))
    arguments = {"num_steps": 1, "seed": 3, "iteration": 4, "first_env": 5}
    ours = collect(envs, policy, **arguments, backend="cpu")
    expected = collect(envs, policy, **arguments, backend="reference")
    assert torch.equal(ours.mask, expected.mask)
    torch.testing.assert_close(ours.actions[0], expected.actions[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(
        ours.actions[ours.mask], expected.actions[ours.mask], rtol=1e-4, atol=1e-3
    )


def lengths(backend, seed, num_envs=64, iterations=80):
    envs, policy = make(num_envs), make_policy()
    every = [
        collect(envs, policy, num_steps=1, seed=seed, iteration=iteration, backend=backend)
        .mask.sum(dim=0)
        .sort()
        .values
        for iteration in range(iterations)
    ]
    return torch.cat(every)


def test_episodes_are_as_long_as_those_of_the_reference():
    """Other seeds, so that only the distributions can agree: 5120 episodes each."""
    ours, theirs = lengths("cpu", 5), lengths("reference", 6)
    limit = 1.95 * (2 / 5120) ** 0.5
    assert apart(ours, theirs) < limit
    assert apart((ours * 1.05).round(), theirs) > limit


def test_what_is_not_served_goes_the_reference_way_and_says_why():
    plain, envs = make_policy(), make(2)
    dropping = Policy(envs.single_observation_space, envs.single_action_space, dropout=0.5)
    swinging = make_envs("Pendulum-v1", 2)
    box = swinging.single_observation_space, swinging.single_action_space
    gaussian, other = Policy(*box), Policy(*box, log_std="network")
    arguments = {"num_steps": 1, "seed": 1, "iteration": 0}
    for made, policy, way in (
        (envs, plain, "in machine code"),
        (envs, dropping, "by stepping, actions drawn in torch: it has dropout"),
        (
            swinging,
            other,
            "by stepping, actions drawn in torch: its standard deviation comes from the network",
        ),
        (swinging, gaussian, "in machine code"),
    ):
        assert str(choose_collector(made, policy)) == way
    stepped = choose_collector(make_envs("CartPole-v1", 2, vectorization="sync"), plain)
    assert str(stepped) == "by stepping: these are no environments on tensors"
    double = gymnasium.make_vec("vecpg/CartPole-v1", num_envs=2, dtype="float64")
    several = TensorVectorEnv(Panel, 2, max_episode_steps=9)
    dialled = Policy(several.single_observation_space, several.single_action_space)

    class Other(TensorVectorEnv):
        pass

    sync = make_envs("CartPole-v1", 2, vectorization="sync")
    for made, policy, reason in (
        (envs, dropping, "it has dropout"),
        (swinging, other, "its standard deviation comes from the network"),
        (Other(CartPole, 2, max_episode_steps=9), plain, "Other may do something else than its"),
        (several, dialled, "its actions are neither Discrete nor a Box"),
        (double, plain, "the environments are not in float32"),
        (sync, plain, "these are no environments on tensors"),
    ):
        with pytest.raises(ValueError, match=f'backend="cpu": {reason}.*; it serves environments'):
            collect(made, policy, **arguments, backend="cpu")
    with pytest.raises(
        ValueError, match="backend: expected one of auto, reference, cpu, cuda, got 'x'"
    ):
        collect(envs, plain, **arguments, backend="x")


@pytest.mark.parametrize(
    ("observations", "actions", "reason"),
    [
        (spaces.Box(-1, 1, (5,)), spaces.Discrete(2), "its observations are not those"),
        (spaces.Box(-1, 1, (3,)), spaces.Discrete(2), "its observations are not those"),
        (spaces.Box(-1, 1, (4,)), spaces.Discrete(5), "its actions are not those"),
        (spaces.Box(-1, 1, (4,)), spaces.Discrete(2, start=-4), "its actions are not those"),
        (spaces.Box(-1, 1, (4,)), spaces.Box(-2, 2, (1,)), "its actions are not those"),
    ],
)
def test_a_policy_for_other_spaces_is_not_served(observations, actions, reason):
    with pytest.raises(ValueError, match=reason):
        other = Policy(observations, actions)
        collect(make(2), other, num_steps=1, seed=1, iteration=0, backend="cpu")
    swinging = make_envs("Pendulum-v1", 2)
    wide = Policy(swinging.single_observation_space, spaces.Box(-9, 9, (1,)))
    assert "its actions are not those" in cpu.why_not(swinging, wide)


@pytest.mark.slow
def test_a_definition_made_of_another_is_played_as_it_is_written():
    """Inherited functions and changed ones, with a number and a function of where it was made."""
    generous = make_generous(5.0)
    envs = TensorVectorEnv(generous, 3, max_episode_steps=500)
    arguments = {"num_steps": 1, "seed": 1, "iteration": 0}
    rollout = collect(envs, make_policy(), **arguments, backend="cpu")
    assert torch.equal(rollout.rewards, 5.0 * rollout.mask)
    other = TensorVectorEnv(make_generous(2.0), 3, max_episode_steps=500)
    again = collect(other, make_policy(), **arguments, backend="cpu")
    assert torch.equal(again.rewards, 2.0 * rollout.mask)
    assert torch.equal(again.obs, rollout.obs)


def make_generous(much):
    paid = CartPole.reward

    class Generous(CartPole):
        @staticmethod
        def reward(state, action, following):
            return much * paid(state, action, following)

    return Generous


def test_a_call_that_returns_early_changes_nothing(monkeypatch):
    policy, arguments = make_policy(), {"num_steps": 60, "seed": 3, "iteration": 1}
    expected = collect(make(9), policy, **arguments, backend="cpu")
    calls, play = [], cpu._kernel(CartPole, 4)

    def counted(*given):
        calls.append(given)
        return play(*given)

    monkeypatch.setattr(cpu, "_CALL_STEPS", 63)
    monkeypatch.setattr(cpu, "_kernel", lambda definition, num_variables: counted)
    with threads.using(1):
        same(collect(make(9), policy, **arguments, backend="cpu"), expected)
    assert len(calls) == -(-len(expected.mask) // 7)


def test_a_wrapper_around_tensors_is_not_passed_by():
    class Half(gymnasium.vector.VectorRewardWrapper):
        def rewards(self, reward):
            return reward / 2

    envs = Half(make(3))
    rollout = collect(envs, make_policy(), num_steps=1, seed=1, iteration=0)
    assert torch.equal(rollout.rewards, 0.5 * rollout.mask)


def test_collecting_leaves_the_environments_alone():
    envs = make(3)
    first = envs.reset(seed=1)[0].clone()
    collect(envs, make_policy(), num_steps=5, seed=1, iteration=0, backend="cpu")
    assert torch.equal(envs.state.mT, first)


def test_a_policy_of_nan_ends_all_the_same():
    policy = make_policy()
    with torch.no_grad():
        policy.network[0].bias.fill_(math.nan)
    rollout = collect(make(3), policy, num_steps=1, seed=1, iteration=0, backend="cpu")
    assert (rollout.dones.sum(dim=0) == 1).all()
    assert rollout.obs.isfinite().all()


def test_collecting_by_stepping_gives_the_same_first_steps():
    policy, arguments = make_policy(), {"num_steps": 20, "seed": 3, "iteration": 2}
    ours = collect(make(7), policy, **arguments)
    stepped = by_stepping(make(7), policy, **arguments)
    assert torch.equal(ours.mask[:20], stepped.mask[:20])
    assert torch.equal(ours.actions[:20][ours.mask[:20]], stepped.actions[:20][ours.mask[:20]])


# -- The start window favours no outcome ----------------------------------------------------------


def scores(policy, rollout, keep=None):
    """The gradient of the sum of log pi times a number that depends on the observation alone."""
    mask = rollout.mask if keep is None else rollout.mask & keep
    b = 1 + 5 * rollout.obs[..., 2].square() + rollout.obs[..., 0]
    by_machine_code(policy, replace(rollout, mask=mask), b, 1, 0.0)
    return torch.cat([p.grad.double().flatten() for p in policy.parameters()])


def deviations(gradients):
    many = torch.stack(gradients)
    error = many.std(dim=0) / len(many) ** 0.5
    return (many.mean(dim=0) / error).abs().max().item()


def test_the_score_of_whole_episodes_is_zero_on_average():
    """E[grad log pi * b(s)] = 0 for any b, over 25,000 episodes: started, played and masked right.

    Were only episodes kept that end inside the window, short ones would be favoured.
    """
    envs, policy = make(64), make_policy((5,), std=0.6)
    whole, favoured = [], []
    for iteration in range(150):
        rollout = collect(envs, policy, num_steps=40, seed=9, iteration=iteration, backend="cpu")
        rows = torch.arange(len(rollout.mask))[:, None]
        last_end = torch.where(rollout.dones & (rows < 40), rows, -1).amax(dim=0)
        whole.append(scores(policy, rollout))
        favoured.append(scores(policy, rollout, rows <= last_end))
    assert deviations(whole) < 4
    assert deviations(favoured) > 6
