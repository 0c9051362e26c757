import json
import logging
import math
from contextlib import ExitStack

import gymnasium
import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from vecpg import begin as begin_module
from vecpg.config import Config, ConfigError
from vecpg.distributed import Ranks
from vecpg.envs import find_spec
from vecpg.run.resume import stored_config
from vecpg.torchrun import Place
from vecpg.train import train


def short(tmp_path, **settings):
    given = {"num_envs": 8, "total_iterations": 3, "eval_episodes": 4, "return_window": 10}
    return Config(**given | {"out_dir": str(tmp_path), "progress": False} | settings)


def without_clock(result):
    rows = map(json.loads, (result.run_dir / "metrics.jsonl").read_text().splitlines())
    clock = ("charts/SPS", "perf/")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


def test_one_environment_hears_that_leave_one_out_is_none(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    one = train(short(tmp_path, num_envs=1))
    assert "with one environment it equals none" in caplog.text
    none = train(short(tmp_path, num_envs=1, baseline="none"))
    assert without_clock(one) == without_clock(none)


def test_convolutions_at_a_step_size_that_is_too_long_for_them_are_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    settings = {"env_id": "environments:Catch-v0", "num_envs": 2, "total_iterations": 1}
    said = "network cnn: convolutions seldom learn at --learning-rate 0.012; try 1e-3"
    train(short(tmp_path, **settings))
    assert caplog.text.count(said) == 1
    train(short(tmp_path, learning_rate=1e-3, **settings))
    train(short(tmp_path, network="mlp", **settings))
    assert caplog.text.count("seldom learn") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env_id": "CartPol-v1"}, "Did you mean: `CartPole`"),
        ({"env_id": "environments:Endless-v0"}, "no time limit"),
        ({"env_id": "Blackjack-v1", "max_episode_steps": 9}, "observation space Tuple.*supported:"),
        ({"env_id": "FrozenLake-v1", "normalize_obs": True}, r"expected a Box .*got Discrete\(16"),
        ({"device": "gpu"}, "--device"),
        ({"env_kwargs": {"no_such": 1}}, "could not be made"),
        ({"network": "cnn"}, r"--network cnn: expected images, .* got a Box of shape \(4,\)"),
        (
            {"network": "networks:no_such"},
            "--network networks:no_such: expected no_such in the mod",
        ),
        ({"network": "networks:colours"}, "--network networks:colours: expected it to work on obs"),
        # The value function's is another than the policy's.
        (
            {"network": "networks:shared", "baseline": "value"},
            "--network networks:shared: expected another module at each call, got the same one",
        ),
        (
            {"env_id": "environments:Constant-v0", "action_masks": True},
            "environment 0 failed at its reset .*: expected info.* of 2 booleans, got none; --act",
        ),
        (
            {"env_id": "environments:Constant-v0", "vectorization": "async", "action_masks": True},
            "environment 0 failed at its reset .*: expected info.* of 2 booleans, got none; --act",
        ),
        (
            {"env_id": "Pendulum-v1", "action_masks": True},
            r"--action-masks: expected actions that are Discrete, .* got Box",
        ),
        (
            {"env_id": "environments:Switches-v0", "action_masks": True},
            r"--action-masks: expected actions that are Discrete, .* got MultiBinary",
        ),
        (
            {"vectorization": "tensor", "action_masks": True},
            "--action-masks: environments on tensors give no infos",
        ),
        (
            {
                "env_id": "environments:Masked-v0",
                "env_kwargs": {"fault": "nothing allowed", "at": 0, "after": 0},
                "action_masks": True,
                "vectorization": "async",
            },
            "environment 0 allows no action at its reset",
        ),
    ],
)
def test_what_can_be_known_before_the_first_step_leaves_nothing_behind(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        train(short(tmp_path, **settings))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("threshold", [np.float32(5), np.array(5.0), 5])
def test_a_threshold_of_any_kind_of_number_is_one(tmp_path, registered_as, threshold):
    env_id = registered_as(threshold)
    result = train(short(tmp_path, env_id=env_id, vectorization="sync"))
    assert result.summary["target_return"] == 5.0
    assert json.loads((result.run_dir / "summary.json").read_text())["solved"] is False


@pytest.mark.parametrize("threshold", ["5", math.inf, math.nan, [5], np.zeros(2)])
def test_a_threshold_that_is_no_number_is_named(tmp_path, registered_as, threshold):
    message = "--target-return auto: expected the reward_threshold of Threshold-v0 to be a finite"
    with pytest.raises(ConfigError, match=message):
        train(short(tmp_path, env_id=registered_as(threshold), vectorization="sync"))
    assert list(tmp_path.iterdir()) == []
    given = {"target_return": None, "total_iterations": 1, "vectorization": "sync"}
    train(short(tmp_path, env_id=registered_as(threshold), **given))


@pytest.fixture
def registered_as(monkeypatch):
    monkeypatch.setattr(gymnasium.envs.registration, "registry", {**gymnasium.registry})

    def register(threshold):
        gymnasium.envs.registration.registry["Threshold-v0"] = gymnasium.envs.registration.EnvSpec(
            "Threshold-v0",
            "environments:Constant",
            reward_threshold=threshold,
            max_episode_steps=10,
        )
        return "Threshold-v0"

    return register


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_environment_that_goes_elsewhere_takes_no_run_along(
    tmp_path, monkeypatch, vectorization
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    kwargs = {"to": str(tmp_path)}
    config = short(
        "runs", env_id="environments:Restless-v0", env_kwargs=kwargs, vectorization=vectorization
    )
    result = train(config)
    assert result.run_dir.parent == tmp_path / "here" / "runs"
    assert result.summary["run_dir"] == f"runs/{result.run_dir.name}"
    assert (result.run_dir / "summary.json").exists()
    monkeypatch.chdir(tmp_path / "here")
    typed = {"env_id": "environments:Restless-v0", "env_kwargs": kwargs, "total_iterations": 4}
    again = train(stored_config(result.summary["run_dir"], **typed))
    assert again.summary["iterations"] == 4
    assert again.run_dir == result.run_dir


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_environment_that_leaves_python_when_it_is_closed_loses_nothing(tmp_path, vectorization):
    kwargs = {"leaves": True}
    result = train(
        short(
            tmp_path,
            env_id="environments:Restless-v0",
            env_kwargs=kwargs,
            vectorization=vectorization,
        )
    )
    assert (result.run_dir / "summary.json").exists()


# -- Ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_of_a_run_goes_step_by_step_and_rank_0_evaluates(monkeypatch, rank):
    """Also where a GPU would make whole iterations, which know of no other rank."""
    monkeypatch.setattr(begin_module.fused, "why_not", lambda *_: None)
    ranks = Ranks(Place(rank, 2, rank, 2, 0, 0, "of a test", "localhost", 0), 60.0, HashStore())
    config = Config(num_envs=6, progress=False)
    with ExitStack() as made:
        settled = begin_module._settle(config, ranks.part_of(config, None), None, made, ranks)
        assert settled.envs.num_envs == settled.own.num_envs == 3
        assert settled.why_step_by_step == "it is split over 2 ranks"
        assert (settled.judge is None) == (rank == 1)


@pytest.mark.parametrize(("shards", "vectorization"), [(None, "vector_entry_point"), (2, "sync")])
def test_one_rank_steps_what_may_be_split_as_several_would(shards, vectorization):
    config = Config(num_envs=4, env_kwargs={"sutton_barto_reward": True}, shards=shards)
    found, *_ = begin_module._resolve(config, find_spec("CartPole-v1"), None, 1)
    assert found == vectorization
    several, *_ = begin_module._resolve(config, find_spec("CartPole-v1"), None, 2)
    assert several == "sync"


@pytest.mark.parametrize(("ranks", "device"), [(1, "cuda:1"), (2, "cuda")])
def test_a_run_that_goes_on_over_ranks_takes_each_ranks_own_gpu(monkeypatch, ranks, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(begin_module, "resolve_device", lambda name, *_: (name, ""))
    before = {"vectorization": "tensor", "device": "cuda:1", "shards": 2}
    _, found, reason = begin_module._resolve(Config(), find_spec("CartPole-v1"), before, ranks)
    assert (found, reason) == (device, "as before")
