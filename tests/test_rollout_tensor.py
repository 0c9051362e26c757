"""Collecting on the device against collecting step by step."""

import math

import pytest
import torch
from conftest import apart, by_stepping
from on_tensors import Fading, Panel
from pairs import pairwise

from vecpg.envs import EnvironmentFailure, make_envs, ops
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.policy import Policy
from vecpg.rollout import collect
from vecpg.rollout import tensor as module


class Plain(Policy):
    """Not a Policy itself, so that its actions are drawn in torch everywhere."""


def make_policy(envs, **settings):
    torch.manual_seed(0)
    policy = Plain(envs.single_observation_space, envs.single_action_space, **settings)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return policy


def same(one, other):
    for name in ("mask", "rewards", "terminations", "truncations", "final_obs", "final_rows"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("obs", "actions"):
        assert torch.equal(getattr(one, name)[one.mask], getattr(other, name)[other.mask]), name
    assert one.stream == other.stream


@pairwise(
    num_steps=[1, 2, 7, 40],
    which=["CartPole-v1", "Pendulum-v1", "fading", "several"],
    between=[1, 5, 16],
)
def test_a_rollout_is_that_of_stepping(monkeypatch, which, num_steps, between):
    def make():
        if which == "fading":
            return TensorVectorEnv(Fading, 9, max_episode_steps=5)
        if which == "several":
            return TensorVectorEnv(Panel, 9, max_episode_steps=5)
        return make_envs(which, 9, vectorization="tensor", max_episode_steps=30)

    monkeypatch.setattr(module, "_ROWS_BETWEEN_LOOKS", {"cpu": between})
    envs = make()
    policy = make_policy(envs, dropout=0.3 if which == "CartPole-v1" else 0.0)
    for iteration in range(2):
        arguments = {"num_steps": num_steps, "seed": 3, "iteration": iteration}
        on_device = collect(envs, policy, **arguments)
        stepped = by_stepping(make(), policy, **arguments)
        same(on_device, stepped)
        assert on_device.mask[-1].any()
        # Fewer episodes than rows: something was cut, something reset, something masked.
        assert on_device.dones.sum() >= 9


def test_an_environment_elsewhere_than_the_policy_is_refused():
    envs = make_envs("CartPole-v1", 2, vectorization="tensor", device="cpu")
    policy = make_policy(envs).to("meta")
    with pytest.raises(ValueError, match="envs: expected them on meta like the policy, got cpu"):
        collect(envs, policy, num_steps=1, seed=1, iteration=0)


@pytest.mark.parametrize(
    ("what", "backend"),
    [
        ("reward", "reference"),
        ("observation", "reference"),
        pytest.param("reward", "cpu", marks=pytest.mark.slow),
        ("observation", "cpu"),
    ],
)
def test_numbers_that_are_not_finite_are_named(what, backend):
    """The second environment to start is the only one of the three that starts above 0.5."""
    nan = math.nan
    in_reward, in_observation = float(what == "reward"), float(what == "observation")

    class Broken(Fading):
        @staticmethod
        def start(uniforms):
            return 0.0, uniforms[0] + 4.0

        @staticmethod
        def observation(state):
            now = in_observation * state[0] * ops.where(state[1] > limit, 1.0, 0.0) > 0.0
            return state[0], ops.where(now, nan, state[1])

        @staticmethod
        def reward(state, action, following):
            now = in_reward * following[0] * ops.where(state[1] > limit, 1.0, 0.0) > 0.0
            return ops.where(now, nan, action)

    limit = 99.0
    envs = TensorVectorEnv(Broken, 3, max_episode_steps=5)
    firsts = collect(envs, make_policy(envs), num_steps=1, seed=1, iteration=0).obs[0, :, 1]
    order = firsts.argsort().tolist()
    limit = (firsts[order[1]] + firsts[order[2]]).item() / 2
    step = 0 if what == "reward" else 1
    envs = TensorVectorEnv(Broken, 3, max_episode_steps=5)
    policy = make_policy(envs)
    if backend == "cpu":
        policy = Policy(envs.single_observation_space, envs.single_action_space)
    with pytest.raises(
        EnvironmentFailure, match=f"environment {order[2]} returned the {what} .* at step {step} of"
    ):
        collect(envs, policy, num_steps=1, seed=1, iteration=0, backend=backend)


def lengths_of(vectorization, policy, iterations):
    envs = make_envs("CartPole-v1", 64, vectorization=vectorization)
    found = []
    for iteration in range(iterations):
        rollout = collect(envs, policy, num_steps=1, seed=5, iteration=iteration)
        found.append(rollout.mask.sum(dim=0))
    envs.close()
    return torch.cat(found)


@pytest.mark.slow
def test_episodes_of_a_policy_are_as_long_as_in_gymnasiums_own():
    """The test of Kolmogorov and Smirnov, two samples, at one in a thousand."""
    envs = make_envs("CartPole-v1", 1)
    policy = make_policy(envs)
    ours, theirs = lengths_of("tensor", policy, 80), lengths_of("sync", policy, 80)
    assert len(ours) == len(theirs) == 5120
    limit = 1.95 * (2 / 5120) ** 0.5
    assert apart(ours, theirs) < limit
    # Lengths of which each is 5 % longer would be seen.
    assert apart((ours * 1.05).round(), theirs) > limit


def pushing(env_id, strength):
    """Pushes along with the movement, more or less often: it reaches the goal in some episodes."""
    envs = make_envs(env_id, 1)
    spaces = envs.single_observation_space, envs.single_action_space
    policy = Policy(*spaces, hidden_sizes=())
    with torch.no_grad():
        layer = policy.network[0]
        layer.bias.zero_()
        layer.weight.zero_()
        layer.weight[:, -1] = (
            strength * torch.linspace(-1, 1, 3) if len(layer.bias) > 1 else strength
        )
    return policy


def ends_of(env_id, policy, limit, vectorization, backend):
    """Lengths of 1280 episodes, and the share of those that reached the goal."""
    envs = make_envs(env_id, 64, vectorization=vectorization, max_episode_steps=limit)
    lengths, reached = [], 0
    for iteration in range(20):
        given = {"num_steps": 1, "seed": 5, "iteration": iteration}
        rollout = collect(envs, policy, **given, backend=backend)
        lengths.append(rollout.mask.sum(dim=0))
        reached += rollout.terminations.sum().item()
    envs.close()
    return torch.cat(lengths), reached / 1280


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env_id", "strength", "limit"),
    [("Acrobot-v1", 0.5, 130), ("MountainCarContinuous-v0", 30.0, 200)],
)
def test_goals_are_reached_as_often_and_as_soon_as_in_gymnasiums_own(env_id, strength, limit):
    policy = pushing(env_id, strength)
    theirs, share = ends_of(env_id, policy, limit, "sync", "auto")
    assert 0.3 < share < 0.8
    most = 1.95 * (2 / 1280) ** 0.5
    for backend in ("cpu", "reference"):
        ours, reached = ends_of(env_id, policy, limit, "tensor", backend)
        assert abs(reached - share) < 3.3 * (share * (1 - share) * 2 / 1280) ** 0.5
        assert apart(ours, theirs) < most
        assert apart((ours * 1.05).round(), theirs) > most


@pytest.mark.parametrize("vectorization", ["tensor", "vector_entry_point"])
def test_an_environment_on_tensors_is_trained_and_evaluated(tmp_path, vectorization):
    from vecpg.config import Config
    from vecpg.train import train

    env_id = "CartPole-v1" if vectorization == "tensor" else "vecpg/CartPole-v1"
    config = Config(
        env_id=env_id,
        vectorization=vectorization,
        num_envs=8,
        total_iterations=3,
        eval_episodes=3,
        out_dir=str(tmp_path),
        progress=False,
    )
    summary = train(config).summary
    assert (summary["iterations"], summary["episodes"]) == (3, 24)
    assert summary["vectorization"] == vectorization
    assert summary["eval_return_mean"] > 5
