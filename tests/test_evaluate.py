import math

import pytest
import torch
from gymnasium import spaces

from vecpg import evaluate as evaluate_module
from vecpg.evaluate import EvalResult, evaluate
from vecpg.noise import Purpose, Stream
from vecpg.policy import Policy


def policy(inputs=1, actions=2, start=0):
    torch.manual_seed(0)
    return Policy(spaces.Box(-1, 1, (inputs,)), spaces.Discrete(actions, start=start))


def test_widely_mixed_lengths_have_their_true_mean():
    result = evaluate(policy(), "environments:CoinLength-v0", 2000)
    assert len(result.lengths) == 2000
    assert set(result.lengths) == {2, 200}
    # A fair coin between 2 and 200: mean 101, standard deviation 99.
    assert abs(result.length_mean - 101) < 3.5 * 99 / math.sqrt(2000)
    assert result.return_mean == result.length_mean


@pytest.mark.parametrize("episodes", [1, 2, 127, 128, 129, 300])
def test_it_plays_exactly_the_episodes_asked_for(episodes):
    result = evaluate(policy(), "environments:Constant-v0", episodes)
    assert result.returns == (-5.0,) * episodes
    assert result.lengths == (5,) * episodes


def test_greedy_takes_the_best_action_and_stochastic_draws():
    best = policy(inputs=6, start=3)
    with torch.no_grad():
        best.network[-1].weight.zero_()
        best.network[-1].bias.copy_(torch.tensor([0.0, math.log(3)]))
    shaped = Policy(spaces.Box(-1, 1, (2, 3)), spaces.Discrete(2, start=3))
    shaped.load_state_dict(best.state_dict())
    assert evaluate(shaped, "environments:Bandit-v0", 50).return_mean == 4.0
    drawn = evaluate(shaped, "environments:Bandit-v0", 2000, greedy=False)
    # Action 4 with probability 3/4.
    assert abs(drawn.return_mean - 3.75) < 4 * math.sqrt(3 / 16 / 2000)


def test_the_same_seed_plays_the_same_episodes():
    cartpole = policy(inputs=4)
    one = evaluate(cartpole, "CartPole-v1", 40, greedy=False, seed=3)
    assert evaluate(cartpole, "CartPole-v1", 40, greedy=False, seed=3) == one
    assert evaluate(cartpole, "CartPole-v1", 40, greedy=False, seed=4) != one
    assert evaluate(cartpole, "CartPole-v1", 40, greedy=False, seed=3, draw=1) != one


def test_start_states_are_none_of_trainings(monkeypatch):
    asked = []
    real = Stream.reset_seeds

    def noticed(*args):
        asked.append(args)
        return real(*args)

    monkeypatch.setattr(Stream, "reset_seeds", noticed)
    evaluate(policy(), "environments:Constant-v0", 3, seed=4, draw=2)
    assert asked == [(Stream(4, 2, 0, 3), Purpose.EVALUATION_RESET)]


def test_it_runs_in_the_environments_own_vectorized_form(monkeypatch):
    made = []
    real = evaluate_module.make_envs

    def noticed(*args, **kwargs):
        made.append(real(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(evaluate_module, "make_envs", noticed)
    evaluate(policy(inputs=4), "CartPole-v1", 3)
    assert type(made[0]).__name__ == "CartPoleVectorEnv"


def test_settings_of_the_environment_are_used():
    result = evaluate(policy(), "environments:Constant-v0", 3, max_episode_steps=2)
    assert result.lengths == (2, 2, 2)


def test_hand_computed_statistics():
    result = EvalResult((1.0, 3.0, 8.0), (1, 2, 6))
    assert (result.return_mean, result.length_mean) == (4.0, 3.0)
    assert result.return_std == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert EvalResult((1.0,), (1,)).return_std == 0.0


def test_no_episodes_are_refused():
    with pytest.raises(ValueError, match="episodes: expected at least 1, got 0"):
        evaluate(policy(), "CartPole-v1", 0)
