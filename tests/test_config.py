import dataclasses
import itertools
import json
import math
import subprocess
import sys

import pytest

from vecpg.config import Config, ConfigError, check_ranks, flag, to_dict


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("num_envs", [0, -1], "--num-envs: expected at least 1, got"),
        ("num_envs", [1.5, "8", True, None], "--num-envs: expected a whole number, got"),
        ("num_steps", [0], "--num-steps: expected at least 1"),
        ("num_envs", [2**63, 10**30], r"--num-envs: expected a number below 2\*\*63, got"),
        ("max_episode_steps", [10**19], r"--max-episode-steps: expected a number below 2\*\*63"),
        ("threads", [0], "--threads: expected at least 1, or none"),
        ("threads", [10**12], "--threads: expected at most 4,096, got 1000000000000"),
        ("activation_memory", [-1], "--activation-memory: expected at least 0, got -1"),
        ("total_timesteps", [0, -5], "--total-timesteps: expected at least 1, or none"),
        ("total_episodes", [0], "--total-episodes"),
        ("total_iterations", [0], "--total-iterations"),
        ("max_episode_steps", [0], "--max-episode-steps"),
        ("gamma", [-0.1, 1.1, math.nan], r"--gamma: expected a number in \[0, 1\], got"),
        ("learning_rate", [0.0, -1.0, math.nan, math.inf], "--learning-rate: expected a finite"),
        ("ent_coef", [-1.0, math.nan], "--ent-coef"),
        ("max_grad_norm", [0.0, -1.0, math.nan], "--max-grad-norm"),
        ("hidden_sizes", [(0,), (64, -1), "64", (1.5,), 64], "--hidden-sizes"),
        ("activation", ["gelu"], "--activation: expected tanh or relu, got 'gelu'"),
        ("weights", ["td"], "--weights: expected reward_to_go or full_return or gae, got 'td'"),
        ("weights", ["gae"], "--weights gae: expected --baseline value, .*, got --baseline leave"),
        ("gae_lambda", [-0.1, 2, math.nan], r"--gae-lambda: expected a number in \[0, 1\], got"),
        ("baseline", ["critic"], "--baseline: expected none or mean or .* or value, got 'critic'"),
        ("bootstrap_truncations", [True], "--bootstrap-truncations: expected --baseline value"),
        ("bootstrap_truncations", [1], "--bootstrap-truncations: expected true or false, got 1"),
        ("value_steps", [0, -1], "--value-steps: expected at least 1, got"),
        ("value_steps", [10**6 + 1, 10**12], "--value-steps: expected at most 1,000,000, got"),
        ("value_learning_rate", [0.0, math.nan], "--value-learning-rate: expected a finite"),
        ("dropout", [1, 1.5, -0.1, math.nan], r"--dropout: expected a number in \[0, 1\), got"),
        ("embedding_size", [0], "--embedding-size: expected at least 1, got 0"),
        ("normalize_obs", ["yes"], "--normalize-obs: expected true or false, got 'yes'"),
        ("log_std", ["free"], "--log-std: expected parameter or network, got 'free'"),
        ("reduction", ["mean"], "--reduction"),
        ("vectorization", ["fast"], "--vectorization"),
        ("target_return", ["high", math.nan, math.inf], "--target-return"),
        ("return_window", [0], "--return-window"),
        ("eval_episodes", [0], "--eval-episodes"),
        ("seed", [-1, 2**64], "--seed"),
        ("shards", [0, -1], "--shards: expected at least 1, or none, got"),
        ("shards", [7], "divides --num-envs 64, got 7; nearest: 4 and 8"),
        ("shards", [63, 65, 1000], "divides --num-envs 64, got .*; nearest: "),
        ("save_every", [0.0], "--save-every"),
        ("log_every", [-1.0], "--log-every"),
        ("env_kwargs", ["{}"], "--env-kwargs: expected a dictionary"),
        ("env_id", [""], "--env-id"),
        ("exp_name", ["", "a/b"], "--exp-name"),
    ],
)
def test_a_value_outside_its_range_is_named_with_the_range(name, values, message):
    for value in values:
        with pytest.raises(ConfigError, match=message):
            Config(**{name: value})


def test_shards_that_cannot_be_are_answered_with_the_nearest_that_can():
    answers = []
    for num_envs, shards in ((64, 7), (64, 33), (64, 65), (6, 5), (7, 3), (1, 2), (10**6, 999)):
        with pytest.raises(ConfigError, match=f"--num-envs {num_envs}, got {shards}; ") as caught:
            Config(num_envs=num_envs, shards=shards)
        answers.append(str(caught.value).split("nearest: ")[1])
    assert answers == ["4 and 8", "32 and 64", "64", "3 and 6", "1 and 7", "1", "800 and 1000"]


def test_of_numbers_of_any_size_divisors_are_found_at_once():
    for num_envs, shards, nearest in (
        (10**9 + 7, 2, "1 and 1000000007"),
        (10**9, 10**9 - 1, "500000000 and 1000000000"),
        (2**62, 3, "2 and 4"),
        (2**62, 2**61 + 1, f"{2**61} and {2**62}"),
    ):
        with pytest.raises(ConfigError, match=f"nearest: {nearest}$"):
            Config(num_envs=num_envs, shards=shards)


def test_what_ranks_cannot_divide_is_answered_with_the_nearest_that_they_can():
    """Found by trying every number."""
    for num_envs, shards, ranks in itertools.product(
        range(1, 25), (None, *range(1, 25)), (1, 3, 4)
    ):
        if num_envs % (shards or 1):
            continue
        if num_envs % ranks:
            name, got = "num_envs", num_envs
            valid = range(ranks, 100, ranks)
        elif shards is not None and shards % ranks:
            name, got = "shards", shards
            valid = [each for each in range(ranks, 25, ranks) if num_envs % each == 0]
        else:
            check_ranks(Config(num_envs=num_envs, shards=shards), ranks)
            continue
        below, above = [n for n in valid if n < got][-1:], [n for n in valid if n > got][:1]
        nearest = " and ".join(map(str, below + above))
        with pytest.raises(ConfigError) as caught:
            check_ranks(Config(num_envs=num_envs, shards=shards), ranks)
        assert str(caught.value).startswith(f"{flag(name)}: expected a ")
        assert str(caught.value).endswith(f", got {got}; nearest: {nearest}")


def test_real_numbers_may_be_given_as_whole_ones_of_any_size():
    assert Config(target_return=10**20, ent_coef=2**64).target_return == 10**20


def test_without_shards_there_is_one():
    assert Config().resolved_shards == Config(shards=1).resolved_shards == 1
    assert Config(shards=8).resolved_shards == 8


def test_a_run_needs_an_end():
    with pytest.raises(ConfigError, match="a run needs an end"):
        Config(total_timesteps=None)
    assert Config(total_timesteps=None, total_episodes=5).total_episodes == 5


def test_what_needs_a_value_function_is_taken_with_one():
    config = Config(baseline="value", weights="gae", bootstrap_truncations=True, gae_lambda=1.0)
    assert (config.weights, config.bootstrap_truncations, config.gae_lambda) == ("gae", True, 1.0)


def test_json_and_back():
    config = Config(hidden_sizes=(3, 4), env_kwargs={"a": [1]}, target_return=None)
    assert Config(**json.loads(json.dumps(to_dict(config)))) == config


def test_every_setting_says_what_it_is():
    import inspect

    source = inspect.getsource(Config)
    for field in dataclasses.fields(Config):
        after = source.split(f"    {field.name}: ", 1)[1].split("\n", 1)[1].lstrip()
        assert after.startswith('"""'), field.name


def test_the_standard_library_is_enough():
    code = "import sys, vecpg.config; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.strip() == b"[]"
