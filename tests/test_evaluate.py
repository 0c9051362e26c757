import math
import os
from contextlib import closing

import environments
import gymnasium
import numpy as np
import on_tensors  # noqa: F401 - registers its environments
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.classic_control.acrobot import AcrobotEnv

from vecpg import evaluate as evaluate_module
from vecpg.config import Config, ConfigError
from vecpg.envs import EnvironmentFailure, make_envs, registered
from vecpg.envs import workers as workers_module
from vecpg.envs.answers import mask_sizes
from vecpg.evaluate import EvalResult, evaluate, evaluate_in, make_judge
from vecpg.noise import Purpose, Stream
from vecpg.policy import Policy
from vecpg.policy.sampling import greedily
from vecpg.train import train


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


@pytest.mark.parametrize(
    ("vectorization", "kind", "copies"),
    [
        ("auto", "CartPoleVectorEnv", 128),
        ("tensor", "CartPoleVectorEnv", 128),
        ("vector_entry_point", "CartPoleVectorEnv", 128),
        ("sync", "InProcessEnvs", 3),
        ("async", "WorkerEnvs", 3),
    ],
)
def test_copies_are_stepped_as_in_training(vectorization, kind, copies):
    settings = {"vectorization": vectorization, "max_episode_steps": 7, "step_timeout": 9.0}
    judge = make_judge(policy(inputs=4), "CartPole-v1", 200, num_envs=3, **settings)
    with closing(judge):
        assert (type(judge).__name__, judge.num_envs) == (kind, copies)
        assert getattr(judge, "step_timeout", 9.0) == 9.0
        result = evaluate_in(judge, policy(inputs=4), 200)
        assert (len(result.lengths), max(result.lengths)) == (200, 7)
    few = make_judge(policy(inputs=4), "CartPole-v1", 2, num_envs=3, **settings)
    with closing(few):
        assert few.num_envs == 2


def test_sync_and_async_play_the_same_episodes():
    found = [
        evaluate(policy(2, 5), "environments:Counting-v0", 20, num_envs=3, vectorization=each)
        for each in ("sync", "async")
    ]
    assert found[0] == found[1]
    assert len(set(found[0].lengths)) > 1


def test_what_is_kept_plays_what_is_made_anew():
    """Other evaluations between change nothing, whichever copies were in the midst of episodes."""
    settings = {"vectorization": "sync", "num_envs": 3}
    plays = policy(2, 5)
    judge = make_judge(plays, "environments:Counting-v0", 20, **settings)
    for draw in (4, 5, 4):
        kept = evaluate_in(judge, plays, 20, draw=draw)
        assert kept == evaluate(plays, "environments:Counting-v0", 20, draw=draw, **settings)


def test_one_copy_is_made_in_each_process_and_closed_once(tmp_path):
    diary = tmp_path / "diary"
    settings = {"vectorization": "async", "num_envs": 3, "env_kwargs": {"diary": str(diary)}}
    settings |= {"envs_per_worker": 1}
    judge = make_judge(policy(), "environments:Alone-v0", 10, **settings)
    for draw in range(3):
        assert evaluate_in(judge, policy(), 10, draw=draw).lengths == (5,) * 10
    judge.close()
    written = diary.read_text().split("\n")[:-1]
    processes = {line.split()[1] for line in written}
    assert len(processes) == 3
    assert str(os.getpid()) not in processes
    assert sorted(written) == sorted(
        f"{what} {p}" for p in processes for what in ("made", "closed")
    )


def test_an_environment_that_hangs_is_given_so_long(monkeypatch):
    monkeypatch.setattr(workers_module, "END_SECONDS", 0.2)
    hanging = {"how": "hang", "at": 3}
    settings = {"vectorization": "async", "num_envs": 2, "env_kwargs": hanging}
    with pytest.raises(EnvironmentFailure, match=r"environment 0 hung at step 2 .* within 0\.5 s"):
        evaluate(policy(), "environments:Mortal-v0", 2, step_timeout=0.5, **settings)


@pytest.mark.parametrize(
    ("method", "when"), [("reset", "its reset"), ("step", "step 0"), ("__init__", "")]
)
def test_a_judge_that_fails_is_known_before_the_first_step(tmp_path, monkeypatch, method, when):
    """Of what is trained on tensors, nothing else has tried it."""

    def fails(*args, **kwargs):
        raise ValueError("100% wrong")

    monkeypatch.setattr(AcrobotEnv, method, fails)
    config = Config(env_id="Acrobot-v1", num_envs=2, out_dir=str(tmp_path), progress=False)
    with pytest.raises(ConfigError, match=f"{when}.*: ValueError: 100% wrong"):
        train(config)
    assert list(tmp_path.iterdir()) == []


def test_a_judge_with_other_spaces_is_known_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(registered._stand_ins, "CartPole-v1", "Track-v0")
    config = Config(env_id="CartPole-v1", num_envs=2, out_dir=str(tmp_path), progress=False)
    with pytest.raises(
        ConfigError, match=r"CartPole-v1: expected observations of Box\(.*, got Box"
    ):
        train(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize(
    ("inputs", "actions", "start", "hidden_sizes", "rows"),
    [
        ((4,), 2, 0, (64, 64), 100),
        ((3, 1), 3, -1, (), 1),
        ((5,), 18, 7, (63,), 65),
        ((1,), 1, 2, (5, 130, 3), 129),
    ],
)
def test_machine_code_takes_the_most_probable_action(
    activation, inputs, actions, start, hidden_sizes, rows
):
    torch.manual_seed(rows)
    observations = spaces.Box(-1, 1, inputs)
    plays = Policy(
        observations,
        spaces.Discrete(actions, start=start),
        hidden_sizes=hidden_sizes,
        activation=activation,
    )
    for parameter in plays.network[-1].parameters():
        torch.nn.init.normal_(parameter)
    # As Gymnasium's vectorized CartPole returns them: of another order in memory.
    obs = np.asfortranarray(np.random.default_rng(0).normal(size=(rows, *inputs)))
    chosen = greedily(plays)(obs)
    with torch.no_grad():
        logits = plays.double()(torch.from_numpy(obs.copy()).float().double())
    best = logits.topk(min(2, actions), dim=0).values
    apart = (best[0] - best[-1] > 1e-5) | torch.tensor(actions == 1)
    assert apart.float().mean() > 0.9
    expected = plays.distribution.mode(logits)
    assert torch.equal(torch.from_numpy(chosen)[apart], expected[apart])
    assert chosen.dtype == np.int64


def test_of_equal_logits_it_takes_the_first_as_torch_does():
    equal = policy(inputs=4, actions=7, start=3)
    with torch.no_grad():
        equal.network[-1].weight.zero_()
        equal.network[-1].bias.copy_(torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0, -1.0, 0.0]))
    obs = np.ones((70, 4), np.float32)
    assert greedily(equal)(obs).tolist() == equal.mode(torch.from_numpy(obs)).tolist() == [4] * 70


def test_machine_code_plays_what_torch_plays(monkeypatch):
    cartpole = policy(inputs=4)
    with torch.no_grad():
        cartpole.network[-1].weight.copy_(torch.randn(2, 64))
    ours = evaluate(cartpole, "CartPole-v1", 50)
    monkeypatch.setattr(evaluate_module.sampling, "why_not", lambda policy: "as asked")
    monkeypatch.setattr(evaluate_module, "greedily", None)
    assert evaluate(cartpole, "CartPole-v1", 50) == ours
    assert len(set(ours.lengths)) > 5


def test_a_policy_that_was_changed_meanwhile_plays_as_it_is_now():
    shaped = Policy(spaces.Box(-1, 1, (2, 3)), spaces.Discrete(2, start=3))
    judge = make_judge(shaped, "environments:Bandit-v0", 5, vectorization="sync")
    for better in (0, 1):
        with torch.no_grad():
            shaped.network[-1].weight.zero_()
            shaped.network[-1].bias.copy_(torch.eye(2)[better])
        assert evaluate_in(judge, shaped, 5).return_mean == 3.0 + better


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
    with pytest.raises(ValueError, match="num_envs: expected at least 1, got 0"):
        evaluate(policy(), "CartPole-v1", 1, num_envs=0)


# -- Action masks --------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("of", ["Discrete", "MultiDiscrete"])
def test_evaluation_takes_only_what_is_allowed(of, greedy, vectorization):
    """The environment raises for anything else; it pays most for the first that is allowed."""
    space = environments.MASKED[of]
    sizes = mask_sizes(space)
    torch.manual_seed(0)
    first = Policy(spaces.Box(0, 1, (sum(sizes),)), space)
    with torch.no_grad():
        first.network[-1].weight.zero_()
        falling = [-3.0 * number for size in sizes for number in range(size)]
        first.network[-1].bias.copy_(torch.tensor(falling))
    settings = {"env_kwargs": {"of": of}, "vectorization": vectorization, "num_envs": 3}
    found = evaluate(
        first, "environments:Masked-v0", 30, greedy=greedy, action_masks=True, **settings
    )
    assert len(found.returns) == 30
    best = 0.0
    stream = Stream(1, 0, 0, 3)
    for seed in stream.reset_seeds(Purpose.EVALUATION_RESET):
        env = environments.Masked(of=of)
        env.reset(seed=seed)
        for _ in range(10):
            over = False
            while not over:
                numbers = [int(each.argmax()) for each in env.allowed]
                action = np.array(numbers) + space.start if of != "Discrete" else numbers[0] - 1
                _, reward, over, _, _ = env.step(action)
                best += reward
            env.reset()
    assert sum(found.returns) == pytest.approx(best) if greedy else sum(found.returns) < best


def test_a_judge_without_masks_is_known_before_the_first_step():
    inputs = policy(inputs=1)
    given = {"vectorization": "sync", "action_masks": True}
    with pytest.raises(EnvironmentFailure, match="environment 0 failed at its reset .* got none"):
        make_judge(inputs, "environments:Constant-v0", 2, **given)
    with pytest.raises(ValueError, match="--action-masks: environments on tensors"):
        evaluate(policy(inputs=4), "CartPole-v1", 2, vectorization="tensor", action_masks=True)


def test_pictures_are_judged_as_the_policy_sees_them():
    """As a plain loop over Gymnasium's own environment, and `Policy.act`, plays."""
    envs = make_envs("environments:Catch-v0", 1)
    torch.manual_seed(1)
    policy = Policy(envs.single_observation_space, envs.single_action_space)
    for parameter in policy.network.parameters():
        torch.nn.init.normal_(parameter)
    found = evaluate(policy, "environments:Catch-v0", 8, num_envs=4)
    assert set(found.lengths) == {9}
    seeds = Stream(1, 0, 0, 4).reset_seeds(Purpose.EVALUATION_RESET)
    expected, taken = [], set()
    for seed in seeds:
        env = gymnasium.make("environments:Catch-v0")
        obs, _ = env.reset(seed=seed)
        for _ in range(2):
            total, over = 0.0, False
            while not over:
                action = policy.act(obs)
                taken.add(int(action))
                obs, reward, over, _, _ = env.step(action)
                total += reward
            expected.append(total)
            obs, _ = env.reset()
    assert list(found.returns) == expected
    assert len(taken) > 1


def test_a_judge_of_real_numbers_shows_them_whole():
    """A policy of uint8 pictures, judged where they are real: nothing is cut off."""
    box = spaces.Box(0, 3, (9, 8), np.uint8)
    torch.manual_seed(0)
    policy = Policy(box, spaces.Discrete(30))
    for parameter in policy.network.parameters():
        torch.nn.init.normal_(parameter)
    obs = np.random.default_rng(0).random((20, 9, 8)) * 3
    act = evaluate_module._acting(
        policy, Stream(0, 0, 0, 20), Purpose.EVALUATION_RESET, True, False
    )
    with torch.inference_mode():
        assert np.array_equal(act(0, obs), policy.act(obs))
        whole = obs.astype(np.uint8)
        assert np.array_equal(act(0, whole), policy.act(whole))
    assert not np.array_equal(policy.act(whole), policy.act(obs))
