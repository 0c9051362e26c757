import dataclasses

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import vecpg.envs  # noqa: F401  (registers it)
from vecpg.envs.line_world import LEFT, RIGHT, LineWorld
from vecpg.evaluate import evaluate
from vecpg.policy import Policy
from vecpg.recipes import RECIPES
from vecpg.train import train


def play(env, actions):
    """Every (state, reward, terminated, truncated) of these actions."""
    state, info = env.reset(seed=1)
    assert (state, info) == (0, {})
    return [env.step(action)[:4] for action in actions]


def test_gymnasiums_checker_accepts_it():
    check_env(gymnasium.make("vecpg/LineWorld-v0").unwrapped)


def test_the_best_return_is_seven():
    env = gymnasium.make("vecpg/LineWorld-v0")
    rows = play(env, [RIGHT] * 4)
    assert rows == [
        (1, -1.0, False, False),
        (2, -1.0, False, False),
        (3, -1.0, False, False),
        (4, 10.0, True, False),
    ]
    assert sum(reward for _, reward, _, _ in rows) == 7
    assert env.spec.reward_threshold == 7
    assert (env.observation_space.n, env.action_space.n) == (5, 2)


def test_left_of_the_first_state_is_the_first_state():
    rows = play(gymnasium.make("vecpg/LineWorld-v0"), [LEFT, LEFT, RIGHT, RIGHT, LEFT, RIGHT])
    assert [state for state, _, _, _ in rows] == [0, 0, 1, 2, 1, 2]
    assert {row[1:] for row in rows} == {(-1.0, False, False)}


def test_an_episode_is_cut_after_a_hundred_steps():
    rows = play(gymnasium.make("vecpg/LineWorld-v0"), [LEFT] * 100)
    assert [truncated for _, _, _, truncated in rows] == [False] * 99 + [True]
    assert not any(terminated for _, _, terminated, _ in rows)
    assert sum(reward for _, reward, _, _ in rows) == -100


def test_arriving_with_the_last_step_is_both():
    rows = play(gymnasium.make("vecpg/LineWorld-v0"), [LEFT] * 96 + [RIGHT] * 4)
    assert rows[-1] == (4, 10.0, True, True)


def test_every_episode_starts_in_the_first_state():
    env = LineWorld()
    for seed in range(20):
        env.step(RIGHT)
        assert env.reset(seed=seed)[0] == 0


def test_another_length():
    rows = play(LineWorld(goal=1), [LEFT, RIGHT])
    assert rows == [(0, -1.0, False, False), (1, 10.0, True, False)]
    with pytest.raises(ValueError, match="goal: expected at least 1, got 0"):
        LineWorld(goal=0)


def test_evaluation_of_a_policy_that_knows_the_way():
    env = LineWorld()
    policy = Policy(env.observation_space, env.action_space, hidden_sizes=())
    policy.network[0].weight.data.zero_()
    policy.network[0].bias.data[RIGHT] = 1.0
    result = evaluate(policy, "vecpg/LineWorld-v0", 3)
    assert (result.returns, result.lengths) == ((7.0,) * 3, (4,) * 3)


@pytest.mark.slow
def test_its_recipe_learns_to_go_right_everywhere(tmp_path):
    config = dataclasses.replace(
        RECIPES["line-world"][0], out_dir=str(tmp_path), progress=False, eval_episodes=10
    )
    result = train(config)
    assert result.summary["iterations"] == 100
    assert result.policy.act(np.arange(4)).tolist() == [RIGHT] * 4


@pytest.mark.parametrize("action", [-1, 2, 7])
def test_an_action_that_it_does_not_have_is_refused(action):
    env = LineWorld()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=rf"expected 0 \(left\) or 1 \(right\), got {action}"):
        env.step(action)
