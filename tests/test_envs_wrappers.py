import json

import gymnasium
import numpy as np
import pytest
import torch
from wrappers import doubled, nothing, raising

from vecpg.config import Config, ConfigError
from vecpg.envs import (
    EnvironmentNotMade,
    judge_of,
    load_wrappers,
    make_envs,
    make_wrapped,
    resolve_vectorization,
)
from vecpg.envs.errors import WrapperFailed
from vecpg.evaluate import evaluate
from vecpg.kernels.announce import anew
from vecpg.look import video
from vecpg.policy import Policy
from vecpg.run.resume import stored_config
from vecpg.train import train

FLATTEN = "gymnasium.wrappers:FlattenObservation"


def rewards(envs):
    envs.reset(seed=[1, 2])
    found = [envs.step(np.zeros(2, np.int64))[1] for _ in range(3)]
    envs.close()
    return np.stack(found)


@pytest.mark.parametrize("vectorization", ["auto", "sync", "async"])
def test_each_goes_around_those_before_it(vectorization):
    names = ["wrappers:doubled", "wrappers:one_more"]
    for wrappers, paid in ((names, 3), (names[::-1], 4), (names[:1], 2), ([], 1)):
        if wrappers or vectorization != "auto":
            envs = make_envs("CartPole-v1", 2, vectorization=vectorization, wrappers=wrappers)
            assert (rewards(envs) == paid).all()


def test_single_copies_only_have_them(caplog):
    caplog.set_level("INFO", logger="vecpg")
    spec = gymnasium.spec("CartPole-v1")
    with anew():
        assert resolve_vectorization(spec, "auto", wrappers=[FLATTEN]) == "sync"
    assert "CartPole-v1 is stepped one by one (sync): --wrappers go around" in caplog.text
    for given in ("tensor", "vector_entry_point"):
        with pytest.raises(
            ValueError, match=f"expected --vectorization sync or async, got {given}"
        ):
            resolve_vectorization(spec, given, wrappers=[FLATTEN])
    spec = gymnasium.spec("vecpg/CartPole-v1")
    with pytest.raises(ValueError, match="vecpg/CartPole-v1, which has no single form"):
        resolve_vectorization(spec, "auto", wrappers=[FLATTEN])
    _, settings = judge_of("CartPole-v1", wrappers=[FLATTEN])
    assert (settings["vectorization"], settings["wrappers"]) == ("sync", [FLATTEN])


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "wrappers:raising",
            "CartPole-v1 could not be made: --wrappers wrappers:raising: RuntimeError: no wrapper",
        ),
        ("wrappers:nothing", "nothing: expected a gymnasium.Env, got NoneType"),
        ("wrappers:absent", "--wrappers wrappers:absent: expected absent in"),
        ("no_such_module:wrap", "--wrappers no_such_module:wrap: expected a module that can be"),
    ],
)
def test_what_is_no_wrapper_is_named(vectorization, name, said):
    with pytest.raises(ValueError) as caught:
        make_envs("CartPole-v1", 2, vectorization=vectorization, wrappers=[name])
    assert said in str(caught.value)
    if name.endswith("raising"):
        assert "in raising" in caught.value.trace


def test_what_was_made_is_closed_where_a_wrapper_fails():
    closed = []

    class Noted(gymnasium.Wrapper):
        def close(self):
            closed.append(True)
            super().close()

    spec = gymnasium.spec("CartPole-v1")
    for last in (raising, nothing):
        with pytest.raises(WrapperFailed, match="--wrappers last: "):
            make_wrapped(spec, [("noted", Noted), ("last", last)])
    assert closed == [True, True]


SHORT = {"num_envs": 2, "total_iterations": 2, "eval_episodes": 3, "progress": False}


@pytest.mark.parametrize("env_id", ["Blackjack-v1", "environments:Nested-v0"])
def test_dictionaries_and_tuples_are_flattened(env_id, tmp_path):
    limit = {"max_episode_steps": 10, "out_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=f"--wrappers {FLATTEN}"):
        train(Config(env_id=env_id, **SHORT, **limit))
    result = train(Config(env_id=env_id, wrappers=(FLATTEN,), **SHORT, **limit))
    assert result.summary["vectorization"] == "sync"
    space = gymnasium.make(env_id.rpartition(":")[2]).observation_space
    width = gymnasium.spaces.flatdim(space)
    assert result.policy.encoder.features == width
    apart = train(
        Config(env_id=env_id, wrappers=[FLATTEN], vectorization="async", **SHORT, **limit)
    )
    for one, other in zip(result.policy.parameters(), apart.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_is_evaluated_and_goes_on_in_its_wrappers(tmp_path):
    names = ("wrappers:doubled", "wrappers:one_more")
    config = Config(wrappers=names, out_dir=str(tmp_path), max_episode_steps=10, **SHORT)
    result = train(config)
    rows = map(json.loads, (result.run_dir / "metrics.jsonl").read_text().splitlines())
    assert all(row["charts/episodic_return"] == 3 * row["charts/episodic_length"] for row in rows)
    assert 10 < result.summary["eval_return_mean"] <= 30
    found = evaluate(result.policy, "CartPole-v1", 2, wrappers=names, max_episode_steps=10)
    assert found.return_mean == 3 * found.length_mean
    stored = json.loads((result.run_dir / "config.json").read_text())
    assert stored["wrappers"] == list(names)
    with pytest.raises(ConfigError, match=r"pass wrappers=\('wrappers:doubled', "):
        stored_config(result.run_dir, total_iterations=3)
    with pytest.raises(ConfigError, match="--wrappers: expected"):
        stored_config(result.run_dir, total_iterations=3, wrappers=names[::-1])
    again = train(stored_config(result.run_dir, total_iterations=3, wrappers=names))
    assert again.summary["iterations"] == 3


def test_a_film_is_made_in_wrappers(tmp_path):
    noted = []

    class Noting(gymnasium.Wrapper):
        def step(self, action):
            noted.append(action)
            return super().step(action)

    globals()["noting"] = Noting
    space = gymnasium.make("CartPole-v1").observation_space
    policy = Policy(space, gymnasium.spaces.Discrete(2))
    settings = {"wrappers": ["test_envs_wrappers:noting"], "max_episode_steps": 5}
    video.record(policy, "CartPole-v1", tmp_path / "film.mp4", **settings)
    assert len(noted) == 5


def test_names_are_loaded_in_order():
    names = [FLATTEN, "wrappers:doubled"]
    assert load_wrappers(names) == [
        (FLATTEN, gymnasium.wrappers.FlattenObservation),
        (names[1], doubled),
    ]


def test_a_failure_in_making_is_no_other_kind_of_error():
    with pytest.raises(EnvironmentNotMade):
        make_envs("CartPole-v1", 1, wrappers=["wrappers:raising"])
