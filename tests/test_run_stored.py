"""Settings from a file: checked like those that are typed, and what they name is not trusted."""

import json
import shlex

import pytest

from vecpg.config import Config, ConfigError, to_dict
from vecpg.run.stored import config_of, names_to_type, read_object, trusted_names

# Settings that name nothing.
PLAIN = {"wrappers": [], "network": "mlp"}


def test_what_was_stored_is_what_is_read():
    config = Config(env_kwargs={"a": [1, {"b": None}]}, hidden_sizes=(3, 4), target_return=None)
    stored = json.loads(json.dumps(to_dict(config)))
    assert config_of(stored, "config.json") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_env": 3}, "'num_env' is no setting; did you mean 'num_envs'?"),
        ({"zzz\x1b": 3}, r"'zzz\x1b' is no setting; another vecpg may have written it"),
        ({3: 3}, "3 is no setting"),
        ({"num_envs": None}, "--num-envs: expected a whole number, got None"),
        ({"num_envs": 0}, "--num-envs: expected at least 1, got 0"),
        ({"num_envs": True}, "--num-envs: expected a whole number, got True"),
        ({"num_envs": "3"}, "--num-envs: expected a whole number, got '3'"),
        ({"hidden_sizes": [1.5]}, "--hidden-sizes: expected whole numbers"),
        ({"hidden_sizes": [[1]]}, "--hidden-sizes: expected whole numbers"),
        ({"activation": ["tanh"]}, "--activation: expected tanh or relu"),
        ({"gamma": float("nan")}, "--gamma: expected a number in [0, 1], got nan"),
        ({"learning_rate": float("inf")}, "--learning-rate: expected a finite number"),
        ({"target_return": 10**400}, "too large"),
        ({"env_kwargs": {"a": float("nan")}}, "--env-kwargs: expected JSON types"),
        ({"env_kwargs": [1]}, "--env-kwargs: expected a dictionary"),
        ({"exp_name": "../x"}, "--exp-name: expected a name without /"),
        (
            {"exp_name": "\x1b[2Jx"},
            r"without control characters, got '\x1b[2Jx'",
        ),
        (
            {"env_id": "CartPole-v1\nrm"},
            r"can be printed, got 'CartPole-v1\nrm",
        ),
        (
            {"env_id": "\u202e1v-elop"},
            r"can be printed, got '\u202e1v-elop'",
        ),
    ],
    ids=lambda given: str(given)[:40],
)
def test_a_stored_setting_is_checked_like_one_that_is_typed(change, message):
    with pytest.raises(ValueError) as caught:
        config_of(to_dict(Config()) | change, "config.json")
    assert str(caught.value).startswith("config.json: ")
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_setting_that_is_missing_is_named():
    stored = to_dict(Config())
    del stored["gamma"]
    with pytest.raises(ValueError, match=r"^config.json: expected the setting gamma, got none$"):
        config_of(stored, "config.json")
    for other in (None, [], "text", 3):
        with pytest.raises(ValueError, match=r"^config.json: expected the settings of a run, got"):
            config_of(other, "config.json")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'{"a": 1} more',
        b"\xff\xfe\x00",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"a": NaN}',
        b'{"a": ' + b'{"a":' * 200 + b"1" + b"}" * 201,
    ],
    ids=lambda data: repr(data)[:20],
)
def test_what_is_no_json_object_is_one_error(data):
    with pytest.raises(ValueError, match=r"^x.json: expected a JSON object \(\d+ bytes\): "):
        read_object(data, "x.json")


@pytest.mark.parametrize(
    ("env_id", "env_kwargs", "names"),
    [
        ("CartPole-v1", {}, []),
        ("ALE/Pong-v5", {"frameskip": 4, "repeat": 0.25, "full": True, "none": None}, []),
        ("FrozenLake-v1", {"map_name": "8x8", "desc": ["SFFF", "FHFH"]}, []),
        ("mine:CartPole-v1", {}, ["env_id"]),
        (":CartPole-v1", {}, ["env_id"]),
        ("mine:CartPole-v1", {"a": "b:c"}, ["env_id", "env_kwargs"]),
        ("vecpg/CartPole-v1", {"definition": "mine:Cart"}, ["env_kwargs"]),
        ("Ant-v5", {"xml_file": "/tmp/ant.xml"}, ["env_kwargs"]),
        ("Ant-v5", {"xml_file": "ant.xml"}, ["env_kwargs"]),
        ("Ant-v5", {"xml_file": "~me"}, ["env_kwargs"]),
        ("Ant-v5", {"xml_file": "a\\b"}, ["env_kwargs"]),
        ("Ant-v5", {"a": [1, {"b": [["c:d"]]}]}, ["env_kwargs"]),
        ("Ant-v5", {"a": {"b/c": 1}}, ["env_kwargs"]),
        ("Ant-v5", {"reward": "package.module"}, ["env_kwargs"]),
    ],
)
def test_what_may_import_or_open_something_has_to_be_typed(env_id, env_kwargs, names):
    stored = PLAIN | {"env_id": env_id, "env_kwargs": env_kwargs}
    assert names_to_type(stored) == names
    typed = {"env_id": env_id, "env_kwargs": json.loads(json.dumps(env_kwargs))}
    trusted_names(stored, typed, "vecpg evaluate x")
    for name in typed:
        given = typed | {name: None}
        if name in names:
            with pytest.raises(ConfigError, match="imported or opened only if you name it too"):
                trusted_names(stored, given, "vecpg evaluate x")
        else:
            trusted_names(stored, given, "vecpg evaluate x")


def test_the_command_is_what_a_shell_needs():
    stored = PLAIN | {"env_id": "my mod:$(x)'", "env_kwargs": {"b": "~", "a": 'x:"y"'}}
    with pytest.raises(ConfigError) as caught:
        trusted_names(stored, {}, "vecpg evaluate x")
    _, command = str(caught.value).split(", type: ")
    *called, first, env_id, second, env_kwargs = shlex.split(command)
    assert (called, first, second) == (["vecpg", "evaluate", "x"], "--env-id", "--env-kwargs")
    assert env_id == stored["env_id"]
    assert json.loads(env_kwargs) == stored["env_kwargs"]
    with pytest.raises(ConfigError) as caught:
        trusted_names(stored, {"env_id": stored["env_id"]}, "vecpg evaluate x")
    assert "--env-id" not in str(caught.value)


def test_what_differs_is_named_with_both():
    stored = PLAIN | {"env_id": "mine:Ball-v0", "env_kwargs": {"a": 1}}
    with pytest.raises(ConfigError) as caught:
        trusted_names(stored, {"env_id": "yours:Ball-v0"}, "vecpg evaluate x")
    assert str(caught.value) == (
        "--env-id: expected mine:Ball-v0, with which it was trained, got yours:Ball-v0"
    )
    for other in ({}, {"a": 2}, {"a": True}, {"a": 1.0}, {"a": 1, "b": None}):
        with pytest.raises(ConfigError, match=r'--env-kwargs: expected {"a": 1}, .*, got {'):
            typed = {"env_id": "mine:Ball-v0", "env_kwargs": other}
            trusted_names(stored, typed, "vecpg evaluate x")


@pytest.mark.parametrize(
    ("name", "value", "words", "others"),
    [
        (
            "wrappers",
            ["mine:a", "mine:b"],
            ["mine:a", "mine:b"],
            [["mine:b", "mine:a"], ["mine:a"], []],
        ),
        ("network", "mine:net", ["mine:net"], ["mine:other", "cnn", "auto"]),
    ],
)
def test_wrappers_and_networks_have_to_be_typed(name, value, words, others):
    stored = PLAIN | {"env_id": "Ball-v0", "env_kwargs": {}, name: value}
    assert names_to_type(stored) == [name]
    typed = {name: tuple(value) if name == "wrappers" else value}
    trusted_names(stored, typed, "vecpg evaluate x")
    with pytest.raises(ConfigError) as caught:
        trusted_names(stored, {}, "vecpg evaluate x")
    command = shlex.split(str(caught.value).partition(", type: ")[2])
    assert command == ["vecpg", "evaluate", "x", f"--{name}", *words]
    for other in others:
        with pytest.raises(ConfigError, match=f"--{name}: expected {' '.join(words)}, with which"):
            trusted_names(stored, {name: other}, "vecpg evaluate x")
