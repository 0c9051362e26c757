import collections
import concurrent.futures
import contextlib
import gc
import importlib.metadata
import json
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
import types

import environments
import gymnasium
import numpy as np
import psutil
import pytest
import torch
from conftest import last
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vecpg import begin as begin_module
from vecpg import train as train_module
from vecpg.config import Config, ConfigError
from vecpg.envs import EnvironmentFailure
from vecpg.envs import workers as workers_module
from vecpg.envs.in_process import InProcessEnvs
from vecpg.evaluate import EvalResult, evaluate
from vecpg.kernels import threads as kernel_threads
from vecpg.noise import Purpose
from vecpg.policy import Policy
from vecpg.run import checkpoint
from vecpg.run import clock as clock_module
from vecpg.run.interrupts import Interrupted
from vecpg.run.metrics import Metrics
from vecpg.train import train

HALVING = WrapperSpec("Halving", "environments:Halving", {})
SUMMARY_KEYS = [
    "env_id",
    "num_envs",
    "num_steps",
    "seed",
    "shards",
    "device",
    "vectorization",
    "recipe",
    "iterations",
    "env_steps",
    "vector_steps",
    "episodes",
    "wall_seconds",
    "compile_seconds",
    "steps_per_second",
    "collect_seconds",
    "returns_seconds",
    "update_seconds",
    "best_return",
    "eval_return_mean",
    "eval_return_std",
    "eval_episodes",
    "target_return",
    "solved",
    "solved_env_steps",
    "solved_seconds",
    "run_dir",
]
TAGS = [
    "charts/episodic_return",
    "charts/best_return",
    "charts/episodic_length",
    "charts/SPS",
    "eval/episodic_return",
    "losses/policy_loss",
    "losses/value_loss",
    "losses/entropy",
    "losses/grad_norm",
    "perf/collect_s",
    "perf/returns_s",
    "perf/update_s",
]


def short(tmp_path, **settings):
    given = {"num_envs": 8, "total_iterations": 3, "eval_episodes": 4, "return_window": 10}
    return Config(**given | {"out_dir": str(tmp_path), "progress": False} | settings)


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows):
    return [
        {k: v for k, v in row.items() if k != "charts/SPS" and not k.startswith("perf/")}
        for row in rows
    ]


@pytest.mark.parametrize("vectorization", ["sync", "vector_entry_point"])
def test_cartpole_is_solved(tmp_path, vectorization):
    result = train(
        Config(vectorization=vectorization, seed=2, out_dir=str(tmp_path), progress=False)
    )
    assert result.summary["solved"] is True
    assert result.summary["eval_return_mean"] >= 475
    assert result.summary["solved_env_steps"] <= 500_000
    env = gymnasium.make("CartPole-v1")
    obs, _ = env.reset(seed=12345)
    total, over = 0.0, False
    while not over:
        obs, reward, terminated, truncated, _ = env.step(result.policy.act(obs))
        total, over = total + reward, terminated or truncated
    assert total >= 475


def test_the_summary_and_the_run_directory_agree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(short("runs"))
    summary = result.summary
    assert list(summary) == SUMMARY_KEYS
    assert str(result.run_dir) == str(tmp_path / result.summary["run_dir"])
    assert json.loads((result.run_dir / "summary.json").read_text()) == summary
    rows = lines(result.run_dir)
    assert list(rows[0]) == ["iteration", "env_steps", "episodes", *TAGS]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    last = rows[-1]
    for key in ("env_steps", "episodes"):
        assert summary[key] == last[key]
    assert summary["iterations"] == 3
    assert summary["vector_steps"] % 8 == 0
    assert summary["vector_steps"] > summary["env_steps"]
    assert summary["best_return"] == max(row["charts/best_return"] or 0 for row in rows)
    speed = summary["env_steps"] / summary["wall_seconds"]
    assert summary["steps_per_second"] == pytest.approx(speed)
    for phase in ("collect", "returns", "update"):
        spent = sum(row[f"perf/{phase}_s"] for row in rows)
        assert summary[f"{phase}_seconds"] == pytest.approx(spent)
    assert summary["eval_episodes"] == 4
    assert (summary["solved"], summary["solved_seconds"]) == (False, None)
    assert summary["target_return"] == 475.0


def test_the_mean_return_of_cartpole_is_its_mean_length(tmp_path):
    rows = lines(train(short(tmp_path)).run_dir)
    steps = episodes = 0
    for row in rows:
        assert row["charts/episodic_return"] == row["charts/episodic_length"]
        new = row["env_steps"] - steps, row["episodes"] - episodes
        assert row["charts/episodic_return"] == pytest.approx(new[0] / new[1])
        steps, episodes = row["env_steps"], row["episodes"]


def test_the_curves_are_over_environment_steps(tmp_path):
    result = train(short(tmp_path))
    events = EventAccumulator(str(result.run_dir))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(TAGS) - {"losses/value_loss"}
    steps = [row["env_steps"] for row in lines(result.run_dir)]
    assert [point.step for point in events.Scalars("losses/entropy")] == steps
    final = events.Scalars("eval/episodic_return")
    assert [point.step for point in final] == steps[-1:]
    assert final[0].value == pytest.approx(result.summary["eval_return_mean"])


@pytest.mark.parametrize("vectorization", ["sync", "vector_entry_point"])
def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path, vectorization):
    settings = {"vectorization": vectorization, "num_steps": 30, "total_iterations": 4}
    torch.manual_seed(1)
    one = train(short(tmp_path, **settings))
    torch.manual_seed(2)
    two = train(short(tmp_path, **settings))
    other = train(short(tmp_path, **settings, seed=5))
    assert without_clock(lines(one.run_dir)) == without_clock(lines(two.run_dir))
    assert without_clock(lines(one.run_dir)) != without_clock(lines(other.run_dir))
    for a, b in zip(one.policy.parameters(), two.policy.parameters(), strict=True):
        assert torch.equal(a, b)


EVERYTHING = {
    "num_envs": 3,
    "num_steps": 12,
    "hidden_sizes": (8, 6),
    "dropout": 0.25,
    "baseline": "value",
    "weights": "gae",
    "bootstrap_truncations": True,
    "value_steps": 3,
    "normalize_obs": True,
    "ent_coef": 0.01,
}
KINDS = {
    "box action": {"env_id": "Pendulum-v1", "max_episode_steps": 9},
    "box action, 2-D": {"env_id": "environments:Pay-v0", "log_std": "network"},
    "multi-discrete action": {"env_id": "environments:Dials-v0"},
    "discrete observation": {
        "env_id": "FrozenLake-v1",
        "env_kwargs": {"is_slippery": False},
        "max_episode_steps": 6,
        "normalize_obs": False,
        "embedding_size": 3,
    },
    "multi-discrete observation": {
        "env_id": "environments:Dials-v0",
        "env_kwargs": {"observed": True},
        "normalize_obs": False,
    },
    "multi-binary action and observation": {"env_id": "environments:Switches-v0"},
    "multi-binary observation": {
        "env_id": "environments:Switches-v0",
        "env_kwargs": {"alone": True},
        "normalize_obs": False,
    },
    "offset unsigned action and observation": {
        "env_id": "environments:Offset-v0",
        "env_kwargs": {"of": "uint8"},
        "normalize_obs": False,
    },
    "picture": {"env_id": "environments:Catch-v0", "max_episode_steps": 7},
    "picture, channels first, real": {
        "env_id": "environments:Catch-v0",
        "env_kwargs": {"channels": "first", "of": "float32"},
        "network": "cnn",
    },
    "uint8 without convolutions": {"env_id": "environments:Catch-v0", "network": "mlp"},
    "network of the user's own": {
        "env_id": "environments:Catch-v0",
        "network": "networks:small",
        "max_episode_steps": 7,
    },
    "discrete observation in a network of the user's own": {
        "env_id": "environments:Offset-v0",
        "env_kwargs": {"of": "uint8"},
        "network": "networks:small",
        "normalize_obs": False,
    },
    "masked action": {
        "env_id": "environments:Masked-v0",
        "env_kwargs": {"of": "MultiDiscrete", "gives": "components"},
        "action_masks": True,
    },
    "discrete observation, nothing truncated": {
        "env_id": "vecpg/LineWorld-v0",
        "normalize_obs": False,
        "seed": 3,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_space_is_trained_saved_and_evaluated(tmp_path, kind):
    settings = EVERYTHING | KINDS[kind] | {"env_kwargs": KINDS[kind].get("env_kwargs", {})}
    runs = [
        train(short(tmp_path, vectorization=vectorization, return_window=1, **settings))
        for vectorization in ("sync", "async")
    ]
    rows = lines(runs[0].run_dir)
    assert len(rows) == 3
    assert without_clock(rows) == without_clock(lines(runs[1].run_dir))
    for row in rows:
        assert row["losses/value_loss"] > 0
        assert row["losses/grad_norm"] > 0
    points = EventAccumulator(str(runs[0].run_dir)).Reload().Scalars("losses/value_loss")
    assert [one.value for one in points] == pytest.approx([r["losses/value_loss"] for r in rows])

    network = settings.get("network")
    policy, again = runs[0].policy, checkpoint.load_policy(runs[1].run_dir, network=network)
    saved = checkpoint.load(runs[0].run_dir)[1]["policy"]["parameters"]
    for name, value in saved.items():
        assert torch.equal(value, policy.state_dict()[name])
        assert torch.equal(value, again.state_dict()[name])
    assert saved.keys() == policy.state_dict().keys()
    env = gymnasium.make(settings["env_id"], **settings["env_kwargs"])
    env.observation_space.seed(0)
    batch = np.stack([env.reset(seed=seed)[0] for seed in range(20)])
    for greedy in (True, False):
        drawn = [
            each.act(batch, greedy, generator=torch.Generator().manual_seed(1))
            for each in (policy, again)
        ]
        assert np.array_equal(*drawn)
        assert all(env.action_space.contains(action) for action in drawn[0])
        assert env.action_space.contains(again.act(batch[0], greedy))
    state = last(runs[0].run_dir)
    if settings["normalize_obs"]:
        counted = rows[-1]["env_steps"]
        assert state["policy"]["parameters"]["encoder.normalizer.count"] == counted
        assert state["critic"]["parameters"]["encoder.normalizer.count"] == counted

    played = evaluate(
        again,
        settings["env_id"],
        4,
        env_kwargs=settings["env_kwargs"],
        max_episode_steps=settings.get("max_episode_steps"),
        greedy=False,
        action_masks=settings.get("action_masks", False),
    )
    assert len(played.returns) == 4
    assert runs[0].summary["eval_episodes"] == 4


def test_a_fresh_critic_leaves_the_policys_first_parameters_as_they_are(tmp_path):
    first = []
    for baseline in ("none", "value"):
        # The first iteration's collector: the policy before any update.
        settings = {"baseline": baseline, "total_iterations": 1, "return_window": 1}
        first.append(train(short(tmp_path, **settings)).policy.state_dict())
    assert all(torch.equal(first[0][name], first[1][name]) for name in first[0])


def test_dropout_changes_what_is_trained_and_nothing_of_evaluation(tmp_path):
    runs = {p: train(short(tmp_path, dropout=p, return_window=1)) for p in (0.0, 0.5)}
    rows = {p: lines(run.run_dir) for p, run in runs.items()}
    assert rows[0.0][0]["losses/entropy"] != rows[0.5][0]["losses/entropy"]
    assert rows[0.0][-1]["charts/episodic_return"] != rows[0.5][-1]["charts/episodic_return"]
    policy = runs[0.5].policy
    assert policy.dropout == 0.5
    obs = np.random.default_rng(0).normal(size=(30, 4))
    plain = Policy(policy.encoder.space, policy.distribution.space)
    plain.load_state_dict(policy.state_dict())
    assert np.array_equal(plain.act(obs), policy.act(obs))
    assert evaluate(plain, "CartPole-v1", 5) == evaluate(policy, "CartPole-v1", 5)


@pytest.mark.parametrize("seed", [1, 2])
def test_sync_and_async_give_identical_metrics(tmp_path, seed):
    """However many copies share a process; and the same policy, to the last bit."""
    ways = {"sync": "auto"}, {"async": "auto"}, {"async": 1}, {"async": 3}
    runs = [
        train(
            short(
                tmp_path,
                vectorization=vectorization,
                envs_per_worker=each,
                num_steps=40,
                seed=seed,
                exp_name=f"{vectorization} {each}",
            )
        )
        for way in ways
        for vectorization, each in way.items()
    ]
    rows, *others = [without_clock(lines(run.run_dir)) for run in runs]
    assert others == [rows] * 3
    for run in runs[1:]:
        for one, other in zip(runs[0].policy.parameters(), run.policy.parameters(), strict=True):
            assert torch.equal(one, other)
        for name in ("eval_return_mean", "env_steps", "best_return"):
            assert run.summary[name] == runs[0].summary[name]


def test_threads_of_the_caller_change_nothing(tmp_path):
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs.append(train(short(tmp_path, total_iterations=2, hidden_sizes=(128, 128))))
    assert without_clock(lines(runs[0].run_dir)) == without_clock(lines(runs[1].run_dir))
    for a, b in zip(runs[0].policy.parameters(), runs[1].policy.parameters(), strict=True):
        assert torch.equal(a, b)


def in_no_grad(work):
    with torch.no_grad():
        return work()


def with_gradients_off(work):
    torch.set_grad_enabled(False)
    try:
        return work()
    finally:
        assert not torch.is_grad_enabled()
        torch.set_grad_enabled(True)


def in_inference_mode(work):
    with torch.inference_mode():
        result = work()
        assert torch.is_inference_mode_enabled()
    return result


def under(dtype):
    def call(work):
        torch.set_default_dtype(dtype)
        try:
            result = work()
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(torch.float32)
        return result

    return call


CALLERS = {
    "no_grad": in_no_grad,
    "gradients off": with_gradients_off,
    "inference mode": in_inference_mode,
    "float64": under(torch.float64),
    "bfloat16": under(torch.bfloat16),
}
STEPWISE = {"normalize": True, "reduction": "step", "ent_coef": 0.01, "max_grad_norm": 0.5}
WAYS = {
    "machine code": STEPWISE,
    "everything": {**EVERYTHING, "shards": 3},
    "discrete observation": {**KINDS["discrete observation"], **STEPWISE, "dropout": 0.1},
    "box action in machine code": {"env_id": "Pendulum-v1", "max_episode_steps": 9},
}


@pytest.fixture(scope="module")
def as_usual(tmp_path_factory):
    return {
        way: train(short(tmp_path_factory.mktemp("runs"), return_window=1, **settings))
        for way, settings in WAYS.items()
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("caller", CALLERS)
def test_what_the_caller_has_set_in_torch_changes_no_bit(tmp_path, as_usual, caller, way):
    expected = as_usual[way]
    policy, other = expected.policy, Policy.from_description(expected.policy.description())

    def work():
        result = train(short(tmp_path, return_window=1, **WAYS[way]))
        loaded = checkpoint.load_policy(result.run_dir)
        other.load_state_dict(loaded.state_dict())
        obs = np.full((2, *policy.obs_shape), 1)
        generator = torch.Generator().manual_seed(1)
        return result, loaded, loaded.act(obs), loaded.act(obs, greedy=False, generator=generator)

    found, loaded, greedy, drawn = CALLERS[caller](work)
    assert without_clock(lines(found.run_dir)) == without_clock(lines(expected.run_dir))
    assert found.summary["eval_return_mean"] == expected.summary["eval_return_mean"]
    for name, value in policy.state_dict().items():
        assert torch.equal(value, found.policy.state_dict()[name])
        assert torch.equal(value, loaded.state_dict()[name])
        assert value.dtype == found.policy.state_dict()[name].dtype
        assert not loaded.state_dict()[name].is_inference()
    obs, generator = np.full((2, *policy.obs_shape), 1), torch.Generator().manual_seed(1)
    assert np.array_equal(greedy, policy.act(obs))
    assert np.array_equal(drawn, policy.act(obs, greedy=False, generator=generator))


def in_a_fork(work):
    """Whether `work` says yes in a forked child; its processes end with this, whatever it does."""
    child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(not work()))
    child.start()
    child.join(60)
    if child.exitcode is None:
        child.kill()
    return child.exitcode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * (way != "everything")) for way in WAYS]
)
def test_a_forked_child_trains_and_loads_as_its_parent_does(tmp_path, way):
    """It has none of torch's threads, which the parent may have used before."""
    torch.set_num_threads(2)
    with torch.random.fork_rng():
        torch.linalg.qr(torch.randn(100, 100) @ torch.randn(100, 100))  # starts them
    settings = {"hidden_sizes": (128, 128), **WAYS[way]}
    parents = train(short(tmp_path, **settings))
    assert torch.get_num_threads() == 2

    def work():
        own = train(short(tmp_path, **settings))
        again = checkpoint.load_policy(own.run_dir)
        return (
            without_clock(lines(own.run_dir)) == without_clock(lines(parents.run_dir))
            and all(map(torch.equal, again.parameters(), parents.policy.parameters()))
            and torch.get_num_threads() == 2
        )

    assert in_a_fork(work)


def test_before_and_after_the_run_torch_is_on_one_thread_too(tmp_path, monkeypatch):
    numbers = []

    def noting(real):
        def call(*args, **kwargs):
            numbers.append(torch.get_num_threads())
            return real(*args, **kwargs)

        return call

    for module, name in (
        (begin_module, "choose_collector"),
        (begin_module, "prepare_statistics"),
        (train_module, "_summary"),
    ):
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    torch.set_num_threads(2)
    train(short(tmp_path, threads=2))
    assert numbers == [1, 1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_hears_that_torch_has_one_thread(tmp_path):
    def refused():
        with pytest.raises(ConfigError, match="--threads: expected 1 in a process made by fork"):
            train(short(tmp_path, baseline="value", threads=2))
        # Kernels have threads of their own.
        return train(short(tmp_path, threads=2)).summary["iterations"] == 3

    assert in_a_fork(refused)


def test_two_trainings_at_once_are_those_of_one_after_the_other(tmp_path):
    configs = [
        short(tmp_path / str(seed), total_iterations=6, seed=seed, **settings)
        for seed, settings in enumerate(
            [{"threads": 2}, EVERYTHING | {"threads": 1}, {"hidden_sizes": (128, 128)}, EVERYTHING]
        )
    ]
    expected = [train(config) for config in configs]
    torch.set_num_threads(2)
    begin = threading.Barrier(len(configs))

    def work(config):
        begin.wait()
        return train(config)

    with concurrent.futures.ThreadPoolExecutor(len(configs)) as pool:
        found = list(pool.map(work, configs))
    for one, other in zip(expected, found, strict=True):
        assert one.run_dir != other.run_dir
        assert without_clock(lines(one.run_dir)) == without_clock(lines(other.run_dir))
        assert all(map(torch.equal, one.policy.parameters(), other.policy.parameters()))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2
        assert pool.submit(kernel_threads.count).result() == 2
    assert torch.get_num_threads() == kernel_threads.count() == 2


@pytest.mark.parametrize(
    "settings", [{"num_envs": 65}, {"vectorization": "sync"}, {"env_id": "Pendulum-v1"}]
)
def test_the_number_of_threads_changes_no_bit(tmp_path, settings):
    settings = {"num_steps": 300, "total_iterations": 4, "num_envs": 8} | settings
    runs = [train(short(tmp_path, threads=threads, **settings)) for threads in (1, 2, 5, None)]
    first = runs[0]
    assert first.summary["env_steps"] > 4096 * 2  # more than one slab of an update
    for other in runs[1:]:
        assert without_clock(lines(first.run_dir)) == without_clock(lines(other.run_dir))
        for a, b in zip(first.policy.parameters(), other.policy.parameters(), strict=True):
            assert torch.equal(a, b)


def test_settings_reach_the_policy_the_optimizer_and_the_collector(tmp_path):
    settings = {"hidden_sizes": (3, 5), "activation": "relu", "learning_rate": 0.125}
    result = train(short(tmp_path, **settings, num_steps=50, total_iterations=1))
    assert [p.shape[0] for p in result.policy.parameters()][::2] == [3, 5, 2]
    assert any(isinstance(layer, torch.nn.ReLU) for layer in result.policy.network)
    state = last(result.run_dir)
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.125
    # Adam's first moment is (1 - 0.9) x the gradient, whose norm was logged.
    moments = [each["exp_avg"] for each in state["optimizer"]["state"].values()]
    norm = torch.cat([m.flatten() for m in moments]).norm().item() / (1 - 0.9)
    assert norm == pytest.approx(lines(result.run_dir)[0]["losses/grad_norm"], rel=1e-4)
    assert result.summary["episodes"] > 8, "a window of 50 steps holds several episodes"
    other = train(short(tmp_path, total_iterations=1, seed=9)).policy
    assert not torch.equal(other.network[0].weight, train(short(tmp_path)).policy.network[0].weight)


def test_evaluation_uses_the_settings_of_the_environment(tmp_path):
    settings = {"env_id": "environments:Bandit-v0", "env_kwargs": {"start": 7}}
    summary = train(short(tmp_path, **settings, total_iterations=1)).summary
    assert summary["eval_return_mean"] in (7.0, 8.0)
    settings = {"env_id": "environments:Constant-v0", "max_episode_steps": 2}
    assert train(short(tmp_path, **settings)).summary["eval_return_mean"] == -2.0


@pytest.mark.parametrize("vectorization", ["sync", "async", "auto"])
@pytest.mark.parametrize(
    ("point", "wrappers", "paid"),
    [
        ("environments:Unused", (), 1.0),
        ("no_such_module:Envs", (), 1.0),
        (None, (HALVING,), 0.5),
        ("gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv", (HALVING,), 0.5),
    ],
)
def test_what_is_trained_is_what_is_judged(
    tmp_path, monkeypatch, vectorization, point, wrappers, paid
):
    monkeypatch.setitem(
        gymnasium.registry,
        "Both-v0",
        EnvSpec(
            "Both-v0",
            entry_point="gymnasium.envs.classic_control.cartpole:CartPoleEnv",
            vector_entry_point=point,
            max_episode_steps=3,
            additional_wrappers=wrappers,
        ),
    )
    settings = {"vectorization": vectorization, "env_id": "Both-v0", "total_iterations": 1}
    result = train(short(tmp_path, **settings))
    assert result.summary["vectorization"] == ("async" if vectorization == "async" else "sync")
    assert lines(result.run_dir)[0]["charts/episodic_return"] == 3 * paid
    assert result.summary["eval_return_mean"] == 3 * paid


def test_a_run_needs_no_more_copies_than_at_its_start(tmp_path):
    """Two for training and two for evaluation, however often it evaluates."""
    licences = tmp_path / "licences"
    settings = {"env_id": "environments:Licensed-v0", "vectorization": "sync", "num_envs": 2}
    settings |= {"env_kwargs": {"licences": str(licences)}, "target_return": -5.0}
    settings |= {"eval_episodes": 5, "return_window": 2}
    licences.write_text("4")
    assert train(short(tmp_path / "runs", **settings)).summary["solved"]
    assert licences.read_text().strip() == "0"
    # One less, and it is known at once.
    licences.write_text("3")
    with pytest.raises(ConfigError, match=r"environment 1 failed: PermissionError: no licence"):
        train(short(tmp_path / "more", **settings))
    assert not (tmp_path / "more").exists()


def test_of_what_there_is_one_of_in_a_process_async_makes_one(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    diary = tmp_path / "diary"
    settings = {"env_id": "environments:Alone-v0", "vectorization": "async", "num_envs": 3}
    settings |= {"env_kwargs": {"diary": str(diary)}, "total_iterations": 2, "eval_episodes": 5}
    settings |= {"envs_per_worker": 1}
    assert train(short(tmp_path / "runs", **settings)).summary["eval_return_mean"] == -5.0
    written = [line.split() for line in diary.read_text().splitlines()]
    made, closed = ([p for what, p in written if what == name] for name in ("made", "closed"))
    # More than cores: divided over them, they would share some.
    assert len(made) == len(set(made)) == 6
    assert sorted(made) == sorted(closed)
    assert not set(made) & {str(each.pid) for each in psutil.Process().children(recursive=True)}
    # Two in one, and the remedy is named.
    message = "environment 1 failed: .* already; if a process can have one copy .* --envs-per-work"
    with pytest.raises(ConfigError, match=message):
        train(short(tmp_path / "runs", **settings | {"envs_per_worker": 2}))


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_run_in_which_evaluation_fails_is_saved(tmp_path, vectorization):
    """At its twelfth step, which training does not come to, and evaluation does in its third."""
    settings = {"env_id": "environments:Mortal-v0", "vectorization": vectorization, "num_envs": 2}
    settings |= {"env_kwargs": {"how": "raise", "at": 12}, "eval_episodes": 6}
    with pytest.raises(EnvironmentFailure, match=r"environment 0 failed at step 1\d .*100% wrong"):
        train(short(tmp_path, **settings, total_iterations=2))
    (run_dir,) = tmp_path.iterdir()
    assert last(run_dir)["counters"]["iteration"] == 2


def test_seconds_and_speeds_leave_evaluations_out(tmp_path, monkeypatch):
    real, now, later = train_module.evaluate_in, time.perf_counter, [0.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: now() + sum(later))

    def slow(*args, **kwargs):
        later.append(1000.0)
        return real(*args, **kwargs)

    monkeypatch.setattr(train_module, "evaluate_in", slow)
    settings = {"env_id": "environments:Constant-v0", "target_return": -5.0}
    summary = train(short(tmp_path, **settings)).summary
    assert summary["solved"]
    assert 1000 < summary["solved_seconds"] < 2000
    assert summary["wall_seconds"] < 1000
    assert summary["vector_steps"] == 2 * 5 * 8


def test_every_confirmation_plays_other_episodes_and_none_of_trainings(tmp_path, monkeypatch):
    seen = []
    real = train_module.evaluate_in

    def noticed(*args, **kwargs):
        seen.append((kwargs["purpose"], kwargs["draw"], kwargs["seed"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(train_module, "evaluate_in", noticed)
    train(short(tmp_path, target_return=1.0, eval_episodes=1, max_episode_steps=3, seed=6))
    settings = {"env_id": "environments:Constant-v0", "target_return": -4.5}
    train(short(tmp_path, **settings))
    assert {purpose for purpose, _, _ in seen} == {Purpose.CONFIRMATION_RESET}
    assert [seed for _, _, seed in seen] == [6, 1]


def test_a_video_of_the_best_policy_is_recorded_at_the_end(tmp_path, monkeypatch):
    recorded = []
    monkeypatch.setattr(
        train_module.video, "record", lambda *args, **kwargs: recorded.append((args, kwargs))
    )
    config = short(tmp_path, total_iterations=2, capture_video=True, max_episode_steps=7)
    result = train(config)
    ((policy, env_id, path), rest) = recorded[0]
    assert policy is result.policy
    assert (env_id, path) == ("CartPole-v1", result.run_dir / "videos" / "best.mp4")
    assert rest == {
        "env_kwargs": {},
        "max_episode_steps": 7,
        "seed": config.seed,
        "wrappers": (),
        "action_masks": False,
    }
    train(short(tmp_path / "without", total_iterations=1))
    assert len(recorded) == 1


def test_a_film_that_fails_does_not_lose_the_run(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(train_module.video, "record", fail)
    with caplog.at_level(logging.WARNING, logger="vecpg"):
        result = train(short(tmp_path, total_iterations=1, capture_video=True))
    assert result.summary["iterations"] == 1
    assert "no film: the disk is full" in caplog.text


def test_what_cannot_be_filmed_is_known_before_the_first_step(tmp_path):
    config = short(tmp_path / "new", env_id="environments:Constant-v0", capture_video=True)
    with pytest.raises(ConfigError, match="Constant-v0 cannot be rendered"):
        train(config)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_frozen_lake_is_solved(tmp_path):
    config = Config(
        env_id="FrozenLake-v1",
        env_kwargs={"is_slippery": False},
        out_dir=str(tmp_path),
        progress=False,
    )
    summary = train(config).summary
    assert summary["solved"]
    assert summary["eval_return_mean"] == 1.0


def test_the_environments_are_closed(tmp_path, monkeypatch):
    closed = []
    real = begin_module.make_envs

    def make(*args, **kwargs):
        envs = real(*args, **kwargs)
        monkeypatch.setattr(envs, "close_extras", lambda **kw: closed.append(True))
        return envs

    monkeypatch.setattr(begin_module, "make_envs", make)
    train(short(tmp_path, vectorization="sync"))
    assert closed == [True]


def test_torchs_own_generator_and_threads_are_left_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    torch.set_num_threads(2)
    train(short(tmp_path, total_iterations=1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("limits", "reached"),
    [
        ({"total_timesteps": 300, "total_iterations": None}, lambda row: row["env_steps"] >= 300),
        ({"total_timesteps": 1, "total_iterations": None}, lambda row: row["env_steps"] >= 8),
        ({"total_episodes": 17, "total_iterations": None}, lambda row: row["episodes"] >= 17),
        ({"total_iterations": 2}, lambda row: row["iteration"] >= 2),
    ],
)
def test_the_run_ends_with_the_iteration_that_reaches_a_limit(tmp_path, limits, reached):
    rows = lines(train(short(tmp_path, **limits)).run_dir)
    assert [reached(row) for row in rows] == [False] * (len(rows) - 1) + [True]


def test_checkpoints_are_there_before_the_first_iteration(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise EnvironmentFailure("at once")

    monkeypatch.setattr(train_module, "collect", fails)
    with pytest.raises(EnvironmentFailure):
        train(short(tmp_path))
    (run_dir,) = tmp_path.iterdir()
    assert last(run_dir)["counters"]["iteration"] == 0
    assert checkpoint.load_policy(run_dir).distribution.num_actions == 2


def test_last_is_the_state_after_the_last_update_and_best_the_best_collector(tmp_path):
    collected, updated = [], []
    real_collect, real_update = train_module.collect, train_module.update

    def collect(envs, policy, **kwargs):
        collected.append([p.detach().clone() for p in policy.parameters()])
        return real_collect(envs, policy, **kwargs)

    def update(policy, *args, **kwargs):
        stats = real_update(policy, *args, **kwargs)
        updated.append([p.detach().clone() for p in policy.parameters()])
        return stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "collect", collect)
        patch.setattr(train_module, "update", update)
        result = train(short(tmp_path, return_window=1, total_iterations=6))
    rows = lines(result.run_dir)
    means = [row["charts/episodic_return"] for row in rows]
    best = means.index(max(means))
    state = last(result.run_dir)
    after = checkpoint.policy_of(state, "state.pt")

    def equal(policy, parameters):
        return all(torch.equal(a, b) for a, b in zip(policy.parameters(), parameters, strict=True))

    assert equal(after, updated[-1])
    assert equal(result.policy, collected[best])
    assert equal(checkpoint.load_policy(result.run_dir), collected[best])
    assert state["counters"]["env_steps"] == result.summary["env_steps"]
    assert state["optimizer"]["state"]


def test_a_solved_run_keeps_the_policy_that_was_confirmed(tmp_path):
    settings = {"env_id": "environments:Constant-v0", "total_iterations": 9}
    result = train(short(tmp_path, **settings, target_return=-5.0))
    assert result.summary["solved"] is True
    # 8 episodes each: the window of 10 is full after two iterations.
    assert result.summary["iterations"] == 2
    assert result.summary["solved_env_steps"] == 2 * 8 * 5
    assert result.summary["solved_seconds"] > 0
    assert lines(result.run_dir)[-1]["eval/episodic_return"] == -5.0


def test_without_confirmation_the_window_is_enough_and_the_final_policy_is_evaluated(tmp_path):
    settings = {"env_id": "environments:Constant-v0", "total_iterations": 9, "confirm": False}
    result = train(short(tmp_path, **settings, target_return=-5.0))
    assert result.summary["solved"] is True
    assert result.summary["eval_return_mean"] == -5.0
    assert lines(result.run_dir)[-1]["eval/episodic_return"] is None


def test_no_target_never_stops_and_solved_is_null(tmp_path):
    settings = {"env_id": "environments:Constant-v0", "total_iterations": 4}
    for target in (None, "auto"):
        summary = train(short(tmp_path, **settings, target_return=target)).summary
        assert (summary["target_return"], summary["solved"]) == (None, None)
        assert summary["iterations"] == 4


def test_a_stuck_run_says_so_in_one_line(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(short(tmp_path, env_id="environments:Constant-v0", total_iterations=8))
    assert caplog.text.count("every episode has returned -5 for 5 iterations") == 1


def test_before_the_return_window_is_full_there_is_no_best_return(tmp_path):
    result = train(short(tmp_path, return_window=10**6))
    assert result.summary["best_return"] is None
    newest = checkpoint.load_policy(checkpoint.folders(result.run_dir)[0])
    for a, b in zip(result.policy.parameters(), newest.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_faulty_environment_ends_the_run_with_a_checkpoint(tmp_path):
    with pytest.raises(EnvironmentFailure, match="environment . failed at step 3"):
        train(short(tmp_path, env_id="environments:Faulty-v0"))
    (run_dir,) = tmp_path.iterdir()
    assert last(run_dir)["counters"]["iteration"] == 0
    assert not (run_dir / "summary.json").exists()


@pytest.mark.parametrize("moment", ["collect", "update"])
def test_a_signal_drops_a_collection_but_finishes_an_update(tmp_path, monkeypatch, moment):
    calls = []
    real = getattr(train_module, moment)

    def interrupted(*args, **kwargs):
        calls.append(moment)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(train_module, moment, interrupted)
    with pytest.raises(Interrupted):
        train(short(tmp_path))
    (run_dir,) = tmp_path.iterdir()
    finished = 1 if moment == "collect" else 2
    state = last(run_dir)
    assert state["counters"]["iteration"] == finished
    assert len(lines(run_dir)) == finished
    reference = train(short(tmp_path / "other", total_iterations=finished))
    other = last(reference.run_dir)
    for name, value in other["policy"]["parameters"].items():
        assert torch.equal(state["policy"]["parameters"][name], value)


def test_an_environment_that_cannot_be_closed_loses_nothing(tmp_path, monkeypatch, caplog):
    at = []

    def broken(self, **kwargs):
        (run_dir,) = tmp_path.iterdir()
        state = last(run_dir)
        at.append(state["counters"]["iteration"])
        raise RuntimeError("close broke")

    monkeypatch.setattr(InProcessEnvs, "close_extras", broken)
    config = short(tmp_path, vectorization="sync", total_iterations=6, target_return=None)
    monkeypatch.setattr(train_module, "evaluate_in", lambda *args, **kw: EvalResult((1.0,), (1,)))
    result = train(config)
    assert at == [6, 6]  # saved first; then training's and evaluation's, whatever the other does
    assert "closing the environments failed: RuntimeError: close broke" in caplog.text
    assert last(result.run_dir)["counters"]["iteration"] == 6
    assert len(lines(result.run_dir)) == 6
    assert (result.run_dir / "summary.json").exists()


@pytest.mark.parametrize("closing", ["the checkpoint", "the metrics"])
def test_what_cannot_be_saved_keeps_nothing_from_being_closed(tmp_path, monkeypatch, closing):
    gc.collect()  # environments that another test has left are closed now
    closed = []
    real = Metrics.close
    monkeypatch.setattr(InProcessEnvs, "close_extras", lambda self, **kw: closed.append("envs"))

    def full(*args):
        raise OSError("the disk is full")

    def close(metrics):
        real(metrics)
        (run_dir,) = tmp_path.iterdir()
        state = last(run_dir)
        closed.append(f"metrics after {state['counters']['iteration']}")
        if closing == "the metrics":
            full()

    monkeypatch.setattr(Metrics, "close", close)
    calls = []
    if closing == "the checkpoint":
        save = checkpoint.save
        monkeypatch.setattr(
            checkpoint,
            "save",
            lambda *args: calls.append(1) or (full if calls[1:] else save)(*args),
        )
    with pytest.raises(OSError, match="the disk is full"):
        train(short(tmp_path, vectorization="sync", total_iterations=1))
    # Saved before anything is closed, where it could be.
    saved = 1 if closing == "the metrics" else 0
    assert closed == [f"metrics after {saved}", "envs", "envs"]  # evaluation's, and training's


@pytest.mark.parametrize("when", ["entering", "leaving", "making the draft"])
def test_what_comes_between_still_saves_and_closes(tmp_path, monkeypatch, when):
    """A signal before the first line that is guarded, or just before the last save is held."""
    gc.collect()  # environments that another test has left are closed now
    closed = []
    monkeypatch.setattr(InProcessEnvs, "close_extras", lambda self, **kw: closed.append(True))
    raised = Interrupted
    if when == "entering":

        def enter(progress):
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(train_module.Progress, "__enter__", enter)
    elif when == "leaving":
        held = train_module.Interrupts.held
        calls = []

        def late(interrupts):
            calls.append(True)
            if len(calls) == 10:  # after three iterations, of three each
                os.kill(os.getpid(), signal.SIGTERM)
            return held(interrupts)

        monkeypatch.setattr(train_module.Interrupts, "held", late)
    else:
        raised = MemoryError

        def draft(state):
            raise MemoryError

        monkeypatch.setattr(train_module.TrainState, "draft", draft)
    with pytest.raises(raised):
        train(short(tmp_path, vectorization="sync"))
    assert closed == [True, True]  # evaluation's, and training's
    (run_dir,) = tmp_path.iterdir()
    state = last(run_dir)
    assert state["counters"]["iteration"] == (3 if when == "leaving" else 0)


def test_a_manifest_knows_the_environment_and_what_was_resolved(tmp_path):
    def about(**settings):
        result = train(short(tmp_path, total_iterations=1, **settings))
        manifest = checkpoint.load(result.run_dir)[0].manifest
        return manifest["environment"]["spaces"], manifest

    spaces_, manifest = about(shards=4)
    assert manifest["resolved"] == {
        "vectorization": "tensor",
        "device": "cpu",
        "shards": 4,
        "target": 475.0,
    }
    assert manifest["versions"]["torch"] == importlib.metadata.version("torch")
    assert manifest["counters"]["iteration"] == 1
    # Another observation space, and another action space alone.
    line = {"env_id": "vecpg/LineWorld-v0", "max_episode_steps": 5}
    others = [about(**line), about(**line, env_kwargs={"goal": 5}), about(env_id="Pendulum-v1")]
    assert len({spaces_, *(other[0] for other in others)}) == 4
    assert about(seed=2)[0] == spaces_


def test_a_signal_while_saving_waits_until_it_is_done(tmp_path, monkeypatch):
    saves = []
    real = checkpoint.Saver.save

    def save(saver, state):
        saves.append(state)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        real(saver, state)

    monkeypatch.setattr(checkpoint.Saver, "save", save)
    with pytest.raises(Interrupted):
        train(short(tmp_path, total_iterations=6))
    (run_dir,) = tmp_path.iterdir()
    assert last(run_dir)["counters"]["iteration"] == 6
    assert len(lines(run_dir)) == 6


def test_a_second_run_says_again_which_way_it_goes(tmp_path, caplog):
    for settings in ({}, {}, {"dropout": 0.5}):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="vecpg"):
            train(short(tmp_path, total_iterations=1, **settings))
        said = [record.message for record in caplog.records]
        ways = [line for line in said if line.startswith(("collecting", "gradient", "returns"))]
        how = ["in machine code"] * 2
        if settings:
            drawn = "by stepping, actions drawn in torch: it has dropout"
            how = [drawn, "by autograd: it has dropout"]
        assert ways == [
            f"collecting: {how[0]}",
            f"gradient: {how[1]}",
            "returns on cpu: machine code",
        ]


def test_checkpoints_come_as_often_as_asked_and_the_newest_stay(tmp_path, monkeypatch):
    saves = []
    real = checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda folder, *args: (saves.append(folder.name), real(folder, *args))
    )
    result = train(short(tmp_path, total_iterations=5, save_every=1e-9))
    # Before the first iteration, after four of five, at the end.
    assert saves == ["0", "1", "2", "3", "4", "5"]
    names = {path.name for path in (result.run_dir / "checkpoints").iterdir()}
    assert names == {"3", "4", "5"}


def test_numbers_that_are_no_numbers_stay_out_of_the_metrics(tmp_path):
    for row in lines(train(short(tmp_path, num_envs=1, normalize=True)).run_dir):
        assert all(value is None or math.isfinite(value) for value in row.values())


@pytest.mark.slow
def test_pictures_are_learnt(tmp_path):
    """Of 10 x 10 x 3 in uint8, by convolutions: 5 of 5 seeds took 44 to 50 iterations."""
    config = Config(
        env_id="environments:Catch-v0",
        vectorization="sync",
        learning_rate=1e-3,
        target_return=0.95,
        total_timesteps=100_000,
        progress=False,
        out_dir=str(tmp_path),
    )
    result = train(config)
    assert result.policy.encoder.network == "cnn"
    assert result.summary["solved"]


@pytest.mark.slow
def test_acrobot_is_learnt_with_the_same_settings(tmp_path):
    summary = train(Config(env_id="Acrobot-v1", seed=3, out_dir=str(tmp_path))).summary
    assert summary["eval_return_mean"] >= -120


def test_solved_seconds_do_not_lose_what_is_compiled_later(tmp_path, monkeypatch):
    """Compiling after the run was solved is no part of the time until then."""

    def slow(*args, **kwargs):
        clock.seconds += 1000.0

    clock = types.SimpleNamespace(seconds=0.0)
    compilation = contextlib.nullcontext(clock)
    monkeypatch.setattr(begin_module, "Compilation", lambda: compilation)
    monkeypatch.setattr(train_module.Progress, "show", slow)
    summary = train(short(tmp_path, target_return=1.0, return_window=1, confirm=False)).summary
    assert summary["solved"]
    assert 0 < summary["solved_seconds"] < 100


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "failed at step 1 .*ValueError: 100% wrong"),
        ("kill", "died at step 1 .*its process was killed by SIGKILL, perhaps by the system for"),
        ("hang", "hung at step 1 .*it did not answer within 1 s"),
    ],
)
def test_a_worker_that_fails_loses_nothing_that_was_committed(tmp_path, monkeypatch, how, message):
    """Episodes of five steps, and one reset each: the twelfth step is in the third iteration."""
    monkeypatch.setattr(workers_module, "END_SECONDS", 0.2)
    saved = []
    real = checkpoint.Saver.save
    monkeypatch.setattr(
        checkpoint.Saver,
        "save",
        lambda saver, state: (saved.append(state.counters.iteration), real(saver, state)),
    )
    below = {child.pid for child in psutil.Process().children(recursive=True)}
    settings = {"env_id": "environments:Mortal-v0", "env_kwargs": {"how": how}, "num_steps": 1}
    begun = time.monotonic()
    with pytest.raises(EnvironmentFailure, match=rf"environment \d {message}"):
        train(
            short(
                tmp_path,
                num_envs=3,
                vectorization="async",
                step_timeout=1.0,
                total_iterations=9,
                **settings,
            )
        )
    assert time.monotonic() - begun < 10
    (run_dir,) = tmp_path.iterdir()
    assert saved[-1] == 2
    assert [row["iteration"] for row in lines(run_dir)] == [1, 2]
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in below]
    assert len(left) <= 2  # the fork server and the resource tracker serve the next run too
    assert all("multiprocessing" in " ".join(child.cmdline()) for child in left)
    assert not any(child.children() for child in left)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_constructor_that_raises_leaves_nothing_behind(tmp_path, vectorization):
    with pytest.raises(ConfigError, match="Stillborn-v0 could not be made: ValueError: 100% wrong"):
        train(short(tmp_path, env_id="environments:Stillborn-v0", vectorization=vectorization))
    assert list(tmp_path.iterdir()) == []


def held():
    """What this process holds: descriptors, threads, processes, handlers, memory, objects."""
    gc.collect()
    process = psutil.Process()
    kinds = collections.Counter(
        f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects()
    )
    counted = {
        "descriptors": process.num_fds(),
        "threads": threading.active_count(),
        "native threads": process.num_threads(),
        "processes": len(process.children(recursive=True)),
        "shared memory": sum("/dev/shm/" in each.path for each in process.memory_maps()),
        "handlers": [signal.getsignal(each) for each in signal.valid_signals()],
        "log handlers": len(logging.getLogger("vecpg").handlers),
    }
    libraries = ("vecpg", "gymnasium", "torch", "tensorboard", "multiprocessing", "threading")
    return process.memory_info().rss, counted | {
        kind: number for kind, number in kinds.items() if kind.startswith(libraries)
    }


@pytest.mark.slow
def test_a_hundred_trainings_in_one_process_leave_nothing_behind(tmp_path):
    ways = ("tensor", "sync", "async", "sync", "async")

    def one(number):
        settings = {"num_envs": 4, "max_episode_steps": 9, "vectorization": ways[number % 5]}
        fails = number % 5 > 2
        if fails:
            settings |= {
                "env_id": "environments:Mortal-v0",
                "env_kwargs": {"how": "raise", "at": 7},
            }
        raises = pytest.raises(EnvironmentFailure) if fails else contextlib.nullcontext()
        with raises:
            train(short(tmp_path, exp_name=str(number), **settings))

    for number in range(10):
        one(number)
    memory, before = held()
    for number in range(10, 110):
        one(number)
    memory_now, now = held()
    assert {k: (before.get(k), n) for k, n in now.items() if n != before.get(k)} == {}
    assert memory_now - memory < 20 * 2**20


# -- Action masks --------------------------------------------------------------------------------


def test_taxi_is_trained_under_its_own_masks(tmp_path, caplog):
    taxi = max(env_id for env_id in gymnasium.registry if env_id.startswith("Taxi-v"))
    config = short(tmp_path, env_id=taxi, action_masks=True, total_iterations=2, save_every=1e-9)
    with caplog.at_level(logging.INFO, "vecpg"):
        result = train(config)
    assert "actions drawn in torch: its actions are masked" in caplog.text
    assert "gradient: by autograd: its actions are masked" in caplog.text
    assert result.summary["iterations"] == 2
    assert result.summary["vectorization"] == "sync"
    stored = json.loads((result.run_dir / "config.json").read_text())
    assert stored["action_masks"] is True
    # Of six actions four and fewer are allowed: a uniform draw of them has no more entropy.
    for row in lines(result.run_dir):
        assert 0 < row["losses/entropy"] < math.log(5)


@pytest.mark.parametrize("vectorization", ["auto", "async"])
def test_a_wrapper_may_give_masks(tmp_path, vectorization):
    """Pushed where it leans, a pole stands for some hundreds of steps whatever else is done."""
    config = short(
        tmp_path,
        wrappers=("environments:Forbidding",),
        action_masks=True,
        vectorization=vectorization,
    )
    result = train(config)
    assert result.summary["vectorization"] == {"auto": "sync"}.get(vectorization, vectorization)
    assert all(row["charts/episodic_return"] > 30 for row in lines(result.run_dir))
    assert result.summary["eval_return_mean"] > 30


def test_an_environment_that_allows_nothing_ends_the_run_with_a_checkpoint(tmp_path):
    environments.Masked.made = 0
    config = short(
        tmp_path,
        env_id="environments:Masked-v0",
        env_kwargs={"fault": "nothing allowed", "at": 2},
        action_masks=True,
        vectorization="sync",
        eval_episodes=1,
    )
    named = r"^environment 3 allows no action at step 1 \(reset with seed \d+\): no value is 1 in"
    with pytest.raises(EnvironmentFailure, match=named):
        train(config)
    (run_dir,) = tmp_path.iterdir()
    assert last(run_dir)["counters"]["iteration"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("of", ["Discrete", "MultiDiscrete"])
def test_a_masked_world_is_learnt(tmp_path, of):
    """The first of what is allowed is best, which is another one at each step."""
    config = Config(
        env_id="environments:Masked-v0",
        env_kwargs={"of": of},
        action_masks=True,
        total_timesteps=100_000,
        target_return=None,
        eval_episodes=400,
        out_dir=str(tmp_path),
        progress=False,
    )
    result = train(config)
    rows = lines(result.run_dir)
    best, length, env = [], [], environments.Masked(of=of)
    for seed in range(400):
        env.reset(seed=seed)
        paid, over = 0.0, False
        while not over:
            numbers = [int(each.argmax()) for each in env.allowed]
            action = numbers[0] - 1 if of == "Discrete" else env.action_space.start + numbers
            _, reward, over, _, _ = env.step(action)
            paid += reward
        best.append(paid)
        length.append(env.steps)
    error = np.std(best) / 20 * 2**0.5
    assert rows[0]["charts/episodic_return"] < np.mean(best) - 6 * error
    assert abs(result.summary["eval_return_mean"] - np.mean(best)) < 4 * error
