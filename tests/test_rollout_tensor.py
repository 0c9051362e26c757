"""Collecting on the device against collecting step by step."""

import pytest
import torch
from conftest import apart, by_stepping
from environments import Counting  # noqa: F401 - registers the small ones
from gymnasium import spaces
from pairs import pairwise

from vecpg.envs import EnvironmentFailure, make_envs
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


class Fading:
    """Ends by rule, by limit or both; the reward is the action, the observation the length."""

    observation_space = spaces.Box(0, 100, (2,))
    action_space = spaces.Discrete(3)
    num_uniforms = 1

    def start(self, uniforms):
        return torch.stack([torch.zeros_like(uniforms[0]), (uniforms[0] * 8).floor() + 1])

    def transition(self, state, actions):
        return torch.stack([state[0] + 1, state[1]])

    def observation(self, state):
        return state.mT

    def terminated(self, state):
        return state[0] >= state[1]

    def reward(self, state, actions, following):
        return actions.to(state.dtype)


def same(one, other):
    for name in ("mask", "rewards", "terminations", "truncations", "final_obs", "final_rows"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("obs", "actions"):
        assert torch.equal(getattr(one, name)[one.mask], getattr(other, name)[other.mask]), name
    assert one.stream == other.stream


@pairwise(
    num_steps=[1, 2, 7, 40],
    which=["CartPole-v1", "Pendulum-v1", "fading"],
    between=[1, 5, 16],
)
def test_a_rollout_is_that_of_stepping(monkeypatch, which, num_steps, between):
    def make():
        if which == "fading":
            return TensorVectorEnv(Fading(), 9, max_episode_steps=5)
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


@pytest.mark.parametrize("what", ["reward", "observation"])
def test_numbers_that_are_not_finite_are_named(what):
    class Broken(Fading):
        def reward(self, state, actions, following):
            paid = super().reward(state, actions, following)
            return torch.where(self._now(following), torch.nan, paid) if what == "reward" else paid

        def observation(self, state):
            seen = super().observation(state)
            return (
                torch.where(self._now(state)[:, None], torch.inf, seen)
                if what != "reward"
                else seen
            )

        def _now(self, state):
            now = torch.zeros(state.shape[1], dtype=torch.bool)
            now[1] = True
            return now & (state[0] >= 1)

    step = 0 if what == "reward" else 1
    envs = TensorVectorEnv(Broken(), 3, max_episode_steps=5)
    envs.dynamics.start = lambda uniforms: torch.stack([uniforms[0] * 0, uniforms[0] * 0 + 4])
    with pytest.raises(
        EnvironmentFailure, match=f"environment 1 returned the {what} .* at step {step} of"
    ):
        collect(envs, make_policy(envs), num_steps=1, seed=1, iteration=0)


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
