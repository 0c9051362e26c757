import dataclasses
import json

import pytest

from vecpg.config import Config, ConfigError, to_dict
from vecpg.run.resume import check_settings, find_run, read_config, resume_command, stored_config


def make(out_dir, name, finished=False, **settings):
    run_dir = out_dir / name
    run_dir.mkdir(parents=True)
    config = Config(out_dir=str(out_dir), **settings)
    (run_dir / "config.json").write_text(json.dumps(to_dict(config)))
    if finished:
        (run_dir / "summary.json").write_text("{}")
    return run_dir


def test_a_path_stands_for_its_run(tmp_path, monkeypatch):
    run_dir = make(tmp_path, "run")
    (run_dir / "checkpoints" / "12").mkdir(parents=True)
    (run_dir / "checkpoints" / "12" / "state.pt").touch()
    monkeypatch.chdir(run_dir / "checkpoints")
    for path in (run_dir, run_dir / "checkpoints" / "12", "12", "12/state.pt", ".."):
        assert find_run(Config(resume=str(path))).resolve() == run_dir
    assert find_run(Config()) is None


def test_what_is_no_run_is_named_with_those_there_are(tmp_path):
    make(tmp_path, "run-a")
    make(tmp_path, "run-b")
    with pytest.raises(ConfigError, match=r"got nothing of that name; there are run-a, run-b"):
        find_run(Config(resume=str(tmp_path / "run-c")))
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"got one without config.json: it was stopped before"):
        find_run(Config(resume=str(tmp_path / "other")))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"got something else"):
        find_run(Config(resume=str(tmp_path / "file")))
    # A config.json of something else, above.
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="got nothing of that name"):
        find_run(Config(resume=str(tmp_path / "run-c")))


def test_auto_means_the_newest_unfinished_of_the_same(tmp_path):
    auto = Config(resume="auto", out_dir=str(tmp_path))
    assert find_run(auto) is None
    make(tmp_path, "CartPole-v1__reinforce__1__50", finished=True)
    make(tmp_path, "CartPole-v1__reinforce__2__90", seed=2)
    make(tmp_path, "CartPole-v1__x__1__91", exp_name="x")
    make(tmp_path, "Acrobot-v1__reinforce__1__92", env_id="Acrobot-v1")
    (tmp_path / "Acrobot-v1__reinforce__3__99").mkdir()
    (tmp_path / "Acrobot-v1__reinforce__3__99" / "config.json").write_text("{")
    assert find_run(auto) is None
    older = make(tmp_path, "CartPole-v1__reinforce__1__9")
    assert find_run(auto) == older
    for name in ("CartPole-v1__reinforce__1__10", "CartPole-v1__reinforce__1__10-2"):
        assert find_run(auto) != make(tmp_path, name)
        assert find_run(auto).name == name
    make(tmp_path, "CartPole-v1__reinforce__1__10-10")
    assert find_run(auto).name == "CartPole-v1__reinforce__1__10-10"
    (find_run(auto) / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"10-10/config\.json: expected a JSON object"):
        find_run(auto)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a JSON object"),
        ('{"seed": 1}', "expected the setting recipe, got none"),
        (json.dumps(to_dict(Config()) | {"magic": 1}), "'magic' is no setting"),
        (json.dumps(to_dict(Config()) | {"seed": -1}), "--seed: expected"),
        (json.dumps(to_dict(Config()) | {"hidden_sizes": "64"}), "--hidden-sizes: expected"),
        (json.dumps(to_dict(Config()) | {"env_id": 7}), "--env-id: expected text"),
    ],
)
def test_settings_in_a_file_are_checked(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


def test_only_limits_and_the_like_may_be_given_anew(tmp_path):
    run_dir = make(tmp_path, "run", learning_rate=0.5, total_iterations=7)
    anew = {
        "total_timesteps": None,
        "total_episodes": 9,
        "total_iterations": 8,
        "target_return": 3.0,
        "save_every": 5.0,
        "device": "cuda:1",
        "progress": True,
    }
    config = stored_config(run_dir, **anew)
    stored = read_config(run_dir)
    expected = dataclasses.replace(stored, resume=str(run_dir), **anew)
    assert config == expected
    check_settings(dataclasses.replace(config, out_dir="elsewhere"), stored)
    # Each of the others is refused when it differs, whatever it is.
    other = {
        "recipe": "vpg",
        "env_id": "Acrobot-v1",
        "env_kwargs": {"a": 1},
        "baseline": "value",
        "vectorization": "sync",
        "shards": 2,
        "exp_name": "b",
        "log_every": 9.0,
        "capture_video": True,
        "seed": 4,
        "threads": 1,
    }
    for name, value in other.items():
        with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')}: expected .*, got"):
            stored_config(run_dir, **{name: value})


@pytest.mark.parametrize(
    "settings", [{"env_id": "mine:Ball-v0"}, {"env_kwargs": {"definition": "mine:Ball"}}]
)
def test_what_may_import_something_is_taken_from_no_file(tmp_path, settings):
    run_dir = make(tmp_path, "run", **settings)
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError, match=f"if you trust it, pass {name}=.*mine:Ball"):
        stored_config(run_dir)
    assert getattr(stored_config(run_dir, **settings), name) == value
    with pytest.raises(ConfigError, match="expected .*mine:Ball.*, with which the run was begun"):
        stored_config(run_dir, **{name: "other" if name == "env_id" else {}})


def test_the_command_that_goes_on_can_be_typed(tmp_path):
    said = resume_command("runs/a b", Config())
    assert said.endswith("train --resume 'runs/a b'")
    said = resume_command("runs/a", Config(env_id="mine:Ball-v0"))
    assert said.endswith("train --resume runs/a --env-id mine:Ball-v0")
