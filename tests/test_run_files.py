"""A run that was stopped and goes on is the run that was never stopped."""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from conftest import digest, last
from environments import Constant
from gymnasium import spaces
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from vecpg import begin as begin_module
from vecpg import train as train_module
from vecpg.config import Config, ConfigError
from vecpg.envs import EnvironmentFailure
from vecpg.envs.in_process import InProcessEnvs
from vecpg.run import checkpoint, directory, files
from vecpg.run.directory import TEMPORARY
from vecpg.run.interrupts import Interrupted
from vecpg.run.metrics import Metrics
from vecpg.run.resume import stored_config
from vecpg.train import train


def short(out_dir, **settings):
    given = {"num_envs": 4, "hidden_sizes": (8,), "eval_episodes": 2, "total_iterations": 6}
    given |= {"return_window": 10, "out_dir": str(out_dir), "progress": False}
    return Config(**given | settings)


def rows(run_dir):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k != "charts/SPS" and not k.startswith("perf/")}
        for row in lines
    ]


def curves(run_dir):
    """Every point of every event file, in order, without the clock's."""
    points = []
    for path in sorted(run_dir.glob("events.*")):
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            points += [
                (event.step, value.tag, value.simple_value)
                for value in event.summary.value
                if value.HasField("simple_value")
                and value.tag != "charts/SPS"
                and not value.tag.startswith("perf/")
            ]
    return points


CLOCK = {"wall_seconds", "compile_seconds", "steps_per_second", "solved_seconds", "run_dir"}
CLOCK |= {"collect_seconds", "returns_seconds", "update_seconds"}


def left_behind(run_dir):
    """All that must not depend on whether a run was stopped."""
    state = last(run_dir)
    del state["seconds"]
    best = checkpoint.load(run_dir)[1]
    summary = json.loads((run_dir / "summary.json").read_text())
    summary = {k: v for k, v in summary.items() if k not in CLOCK}
    return digest(state), digest(best), rows(run_dir), curves(run_dir), summary


def typed_again(config):
    """Names of modules, which no file is trusted with."""
    names = {"env_id": config.env_id, "network": config.network}
    return {name: value for name, value in names.items() if ":" in value}


def the_run(out_dir):
    (run_dir,) = out_dir.iterdir()
    return run_dir


@pytest.fixture
def stopped(monkeypatch):
    """Train until something happens, in the collection after so many iterations."""

    def stop(config, iterations, how):
        calls, real = [], train_module.collect

        def collect(*args, **kwargs):
            calls.append(1)
            if len(calls) == iterations + 1:
                how()
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(train_module, "collect", collect)
            with pytest.raises((EnvironmentFailure, Interrupted)):
                train(config)

    return stop


def fails():
    raise EnvironmentFailure("on purpose")


def terminated():
    os.kill(os.getpid(), signal.SIGTERM)


CASES = {
    "tensor": {"vectorization": "tensor"},
    "sync, value": {"vectorization": "sync", "baseline": "value", "value_steps": 3},
    "vector entry point, normalized, dropout": {
        "vectorization": "vector_entry_point",
        "normalize_obs": True,
        "dropout": 0.3,
    },
    "tensor, everything": {
        "env_id": "Pendulum-v1",
        "max_episode_steps": 7,
        "baseline": "value",
        "weights": "gae",
        "bootstrap_truncations": True,
        "normalize_obs": True,
        "normalize": True,
        "max_grad_norm": 0.5,
        "dropout": 0.2,
        "shards": 2,
        "value_steps": 2,
    },
    "async": {"vectorization": "async", "num_envs": 2},
    "discrete, some steps": {"env_id": "FrozenLake-v1", "num_steps": 30},
    "pictures, value": {
        "env_id": "environments:Catch-v0",
        "max_episode_steps": 7,
        "normalize_obs": True,
        "baseline": "value",
        "bootstrap_truncations": True,
        "value_steps": 2,
        "shards": 2,
    },
    "network of the user's own": {
        "env_id": "environments:Catch-v0",
        "network": "networks:small",
        "baseline": "value",
        "value_steps": 2,
    },
    "masked": {"env_id": "Masked-v0", "action_masks": True, "num_steps": 20, "ent_coef": 0.01},
    # Reached by the window of several iterations, some of them before the stop and some after.
    "solved": {"target_return": 30.0, "return_window": 20, "total_iterations": 60},
}


LONG = ("pictures, value", "tensor, everything", "vector entry point, normalized, dropout", "async")


@pytest.mark.parametrize(
    "which",
    [pytest.param(which, marks=pytest.mark.slow) if which in LONG else which for which in CASES],
)
def test_a_run_that_was_stopped_goes_on_as_if_it_never_was(tmp_path, stopped, which):
    config = short(tmp_path / "whole", **CASES[which])
    whole = train(config)
    expected = left_behind(whole.run_dir)
    number = len(expected[2])
    assert number > 3
    if which == "solved":
        assert whole.summary["solved"]
        assert number < config.total_iterations
    stops = [1, number - 1] if which == "async" else [0, 1, number // 2, number - 1]
    for at, how in zip(stops, (fails, terminated, fails, terminated), strict=False):
        out_dir = tmp_path / f"at {at}"
        stopped(dataclasses.replace(config, out_dir=str(out_dir)), at, how)
        run_dir = the_run(out_dir)
        assert len(rows(run_dir)) == at
        again = train(stored_config(run_dir, **typed_again(config)))
        assert again.run_dir == run_dir
        assert left_behind(again.run_dir) == expected
        assert not list(run_dir.glob("**/.tmp*"))
    if which == "network of the user's own":  # what has come to its end asks for the name too
        finished = train(stored_config(run_dir, **typed_again(config)))
        assert finished.policy.encoder.network == config.network
        with pytest.raises(ConfigError, match="pass network='networks:small'"):
            train(stored_config(run_dir, env_id=config.env_id))


def test_every_stop_of_many_leaves_the_same_run(tmp_path, stopped):
    config = short(tmp_path / "whole", save_every=1e-9)
    expected = left_behind(train(config).run_dir)
    config = dataclasses.replace(config, out_dir=str(tmp_path / "parts"))
    stopped(config, 0, fails)
    run_dir = the_run(tmp_path / "parts")
    for _ in range(5):
        stopped(stored_config(run_dir), 1, terminated)
    assert left_behind(train(stored_config(run_dir)).run_dir) == expected


def test_a_limit_that_is_raised_goes_on_too(tmp_path):
    whole = train(short(tmp_path / "whole", total_iterations=7))
    part = train(short(tmp_path / "part", total_iterations=3))
    assert (part.run_dir / "summary.json").exists()
    again = train(stored_config(part.run_dir, total_iterations=7))
    assert left_behind(again.run_dir) == left_behind(whole.run_dir)
    assert json.loads((part.run_dir / "config.json").read_text())["total_iterations"] == 7


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, caplog):
    result = train(short(tmp_path))
    before = {p: p.read_bytes() for p in result.run_dir.rglob("*") if p.is_file()}
    with caplog.at_level(logging.INFO, logger="vecpg"):
        again = train(stored_config(result.run_dir))
    assert again.summary == result.summary
    assert f"already at its end, after 6 iterations, {result.summary['env_steps']:,}" in caplog.text
    assert {p: p.read_bytes() for p in result.run_dir.rglob("*") if p.is_file()} == before


def test_what_is_finished_depends_on_the_checkpoint_and_the_target(tmp_path):
    solved = train(short(tmp_path, target_return=5.0, confirm=False, save_every=1e-9))
    run_dir, number = solved.run_dir, solved.summary["iterations"]
    again = train(stored_config(run_dir, target_return=400.0, total_iterations=number))
    assert again.summary["solved"] is False
    more = train(stored_config(run_dir, total_iterations=6))
    assert more.summary["iterations"] == 6
    # An earlier checkpoint is where it goes on, whatever the summary says of a later one.
    back = train(stored_config(run_dir / "checkpoints" / "4", total_iterations=4))
    assert back.summary["iterations"] == 4
    assert checkpoint.folders(run_dir)[0].name == "4"


def test_a_run_goes_on_under_any_name(tmp_path):
    out_dir = tmp_path / "私の　実験\u00a0👩‍🔬"
    whole = train(short(tmp_path / "whole", exp_name="a\u00a0b"))
    part = train(short(out_dir, exp_name="a\u00a0b", total_iterations=3))
    again = train(stored_config(part.run_dir, total_iterations=6))
    assert left_behind(again.run_dir) == left_behind(whole.run_dir)


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/12", "a/checkpoints"])
def test_a_run_goes_on_below_a_folder_named_checkpoints(tmp_path, stopped, place):
    stopped(short(tmp_path / place), 2, fails)
    run_dir = the_run(tmp_path / place)
    assert train(stored_config(run_dir)).summary["iterations"] == 6
    again = train(stored_config(run_dir / "checkpoints" / "2", total_iterations=5))
    assert again.summary["iterations"] == 5


class Callable(Constant):
    def __init__(self, names=(), how=None):
        super().__init__()


def test_an_environment_may_be_registered_in_any_way(tmp_path, stopped):
    """By what has no name of its own, and with what has no order."""
    kwargs = {"names": {"a", "b", "c"}, "how": functools.partial(max, 1)}
    gymnasium.register("Any-v0", functools.partial(Callable), max_episode_steps=4, kwargs=kwargs)
    try:
        stopped(short(tmp_path, env_id="Any-v0"), 2, fails)
        manifest = checkpoint.opened(checkpoint.folders(the_run(tmp_path))[0]).manifest
        assert manifest["environment"]["entry_point"] == "functools:partial"
        expected = {"names": "{'a', 'b', 'c'}", "how": "functools:partial"}
        assert manifest["environment"]["kwargs"] == expected
        assert train(stored_config(the_run(tmp_path))).summary["iterations"] == 6
    finally:
        del gymnasium.registry["Any-v0"]


def test_auto_goes_on_to_mean_what_it_meant(tmp_path, stopped, monkeypatch):
    stopped(short(tmp_path, vectorization="auto"), 2, fails)
    asked = []
    real = begin_module.resolve_vectorization
    monkeypatch.setattr(
        begin_module,
        "resolve_vectorization",
        lambda *a, **kw: (asked.append(a[1]), real(*a, **kw))[1],
    )
    devices = []
    resolve = begin_module.resolve_device
    monkeypatch.setattr(
        begin_module, "resolve_device", lambda *a: (devices.append(a[0]), resolve(*a))[1]
    )
    train(stored_config(the_run(tmp_path)))
    assert asked == ["tensor"]
    assert devices == ["cpu"]


def test_what_cannot_go_on_leaves_no_environment_open(tmp_path, stopped, monkeypatch):
    stopped(short(tmp_path, vectorization="sync"), 2, fails)
    closed = []
    monkeypatch.setattr(InProcessEnvs, "close_extras", lambda self, **kw: closed.append(self))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "Metrics", full)
    with pytest.raises(ConfigError, match="No space left"):
        train(stored_config(the_run(tmp_path)))
    assert len(closed) == 2  # training's and evaluation's
    files.hold(the_run(tmp_path)).close()


def test_what_a_kill_left_is_swept_when_a_run_goes_on(tmp_path, stopped):
    stopped(short(tmp_path), 2, fails)
    run_dir = the_run(tmp_path)
    (run_dir / "checkpoints" / f"{TEMPORARY}1-7").mkdir()
    (run_dir / f"{TEMPORARY}1-config.json").touch()
    train(stored_config(run_dir))
    assert not list(run_dir.rglob(f"{TEMPORARY}*"))


def test_checkpoints_come_no_more_often_than_asked(tmp_path, monkeypatch):
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: next(clock))
    saves, real = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda folder, *args: (saves.append(folder.name), real(folder, *args))
    )
    train(short(tmp_path, save_every=1e6, target_return=None))
    assert saves == ["0", "6"]
    saves.clear()

    class Once:
        """Time that passes a minute between the second look and the third, and never again."""

        def __init__(self):
            self.looks = 0

        def __call__(self):
            self.looks += 1
            return 0.0 if self.looks < 3 else 61.0

    monkeypatch.setattr(checkpoint.time, "perf_counter", Once())
    train(short(tmp_path, target_return=None))
    assert len(saves) == 3


def test_a_full_disk_for_rows_still_saves_what_was_committed(tmp_path, monkeypatch):
    real = Metrics.log

    def log(metrics, row):
        if row["iteration"] == 4:
            lines = metrics._lines

            class Full:
                def write(self, data):
                    lines.write(data[:7])
                    raise OSError(28, "No space left on device")

                def __getattr__(self, name):
                    return getattr(lines, name)

            metrics._lines = Full()
        real(metrics, row)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "log", log)
        with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: No space left"):
            train(short(tmp_path))
    run_dir = the_run(tmp_path)
    assert checkpoint.folders(run_dir)[0].name == "3"
    assert [row["iteration"] for row in rows(run_dir)] == [1, 2, 3]
    assert train(stored_config(run_dir)).summary["iterations"] == 6


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "checkpoints", "summary.json"])
def test_a_link_is_not_followed(tmp_path, stopped, name):
    stopped(short(tmp_path / "runs"), 2, fails)
    run_dir = the_run(tmp_path / "runs")
    (tmp_path / "victim").write_text("mine")
    if (run_dir / name).exists():
        (run_dir / name).rename(tmp_path / "moved")
    (run_dir / name).symlink_to(tmp_path / ("moved" if name == "checkpoints" else "victim"))
    with pytest.raises(ConfigError, match=f"{name}: expected a file or a folder, got a link"):
        train(stored_config(run_dir, total_iterations=9))
    assert (tmp_path / "victim").read_text() == "mine"


def test_keyword_arguments_are_as_a_file_has_them(tmp_path, stopped):
    settings = {"env_id": "FrozenLake-v1", "env_kwargs": {"desc": ("SF", "FG")}}
    config = short(tmp_path, **settings, target_return=None)
    stopped(config, 2, fails)
    assert train(dataclasses.replace(config, resume="auto")).summary["iterations"] == 6


@pytest.mark.parametrize("content", ["", "[1]", "[" * 100_000, "\xff", '{"a": NaN}'])
def test_a_finished_run_whose_summary_is_damaged_is_named(tmp_path, content):
    result = train(short(tmp_path))
    (result.run_dir / "summary.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"summary\.json: expected a JSON object"):
        train(stored_config(result.run_dir))


def test_another_target_is_judged_anew(tmp_path):
    solved = train(short(tmp_path, target_return=5.0, confirm=False))
    assert solved.summary["solved"]
    assert solved.summary["iterations"] < 6
    again = train(stored_config(solved.run_dir, target_return=400.0))
    assert again.summary["iterations"] == 6
    assert again.summary["solved"] is False
    assert again.summary["solved_env_steps"] is None


def test_an_earlier_checkpoint_goes_on_from_there(tmp_path):
    result = train(short(tmp_path, save_every=1e-9))
    expected = left_behind(result.run_dir)
    again = train(stored_config(result.run_dir / "checkpoints" / "4"))
    assert again.run_dir == result.run_dir
    assert left_behind(again.run_dir) == expected


def test_auto_takes_the_newest_that_is_unfinished(tmp_path, stopped, caplog):
    caplog.set_level(logging.INFO, logger="vecpg")
    config = short(tmp_path, save_every=1e-9, resume="auto")
    expected = left_behind(train(dataclasses.replace(config, resume=None)).run_dir)
    finished = the_run(tmp_path)
    for other in ({"seed": 2}, {"exp_name": "other"}, {"env_id": "Acrobot-v1"}):
        stopped(short(tmp_path, **other), 1, fails)
    stopped(config, 4, fails)
    assert "no unfinished run of CartPole-v1, reinforce, seed 1 in" in caplog.text
    (run_dir,) = set(tmp_path.glob("CartPole-v1__reinforce__1__*")) - {finished}
    newest = run_dir / "checkpoints" / "4"
    (newest / "state.pt").write_bytes(b"")
    caplog.clear()
    again = train(config)
    assert again.run_dir == run_dir
    assert f"skipped: {newest / 'state.pt'}: truncated" in caplog.text
    assert "going on after iteration 3" in caplog.text
    assert left_behind(again.run_dir) == expected


def test_auto_without_a_right_checkpoint_is_an_error(tmp_path, stopped):
    stopped(short(tmp_path), 2, fails)
    for path in the_run(tmp_path).glob("checkpoints/*/manifest.json"):
        path.unlink()
    with pytest.raises(ConfigError, match="expected a checkpoint to go on from, found .*2.*0"):
        train(short(tmp_path, resume="auto"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.5}, r"--learning-rate: expected 0\.012, .*got 0\.5; leave it out"),
        ({"hidden_sizes": (9,)}, r"--hidden-sizes: expected \[8\], .* got \[9\]"),
        ({"max_grad_norm": 1.0}, r"--max-grad-norm: expected none, .* got 1\.0"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_changed(tmp_path, stopped, settings, message):
    config = short(tmp_path)
    stopped(config, 2, fails)
    run_dir = the_run(tmp_path)
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(config, resume=str(run_dir), **settings))
    # By hand, in the file that says what the run is.
    content = json.loads((run_dir / "config.json").read_text())
    changed = json.loads(json.dumps(settings))
    (run_dir / "config.json").write_text(json.dumps(content | changed))
    with pytest.raises(ConfigError, match=message):
        train(stored_config(run_dir))
    (run_dir / "config.json").write_bytes(before[run_dir / "config.json"])
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before


class Resized(Constant):
    size = 3

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Box(-1, 1, (self.size,), np.float32)

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return np.zeros(self.size, np.float32), {}

    def step(self, action):
        return np.zeros(self.size, np.float32), *super().step(action)[1:]


def test_another_environment_is_refused(tmp_path, stopped, monkeypatch):
    gymnasium.register("Resized-v0", Resized, max_episode_steps=4)
    try:
        stopped(short(tmp_path, env_id="Resized-v0"), 2, fails)
        run_dir = the_run(tmp_path)
        before = digest(last(run_dir))
        monkeypatch.setattr(Resized, "size", 4)
        with pytest.raises(ConfigError, match=r"the observation_space .*\(3,\).* got .*\(4,\)"):
            train(stored_config(run_dir))
        monkeypatch.undo()
        gymnasium.registry["Resized-v0"].max_episode_steps = 5
        with pytest.raises(ConfigError, match=r"the max_episode_steps .*, 4, got 5"):
            train(stored_config(run_dir))
        gymnasium.registry["Resized-v0"].max_episode_steps = 4
        assert digest(last(run_dir)) == before
        assert train(stored_config(run_dir)).summary["iterations"] == 6
    finally:
        del gymnasium.registry["Resized-v0"]


def test_another_build_is_a_warning(tmp_path, stopped, caplog, monkeypatch):
    stopped(short(tmp_path), 2, fails)
    other = begin_module.versions() | {"torch": "9.9"}
    monkeypatch.setattr(begin_module, "versions", lambda: other)
    monkeypatch.setattr(begin_module, "hardware", lambda: {"cpu": "abacus", "cores": 1})
    train(stored_config(the_run(tmp_path)))
    (said,) = [each.message for each in caplog.records if each.levelno == logging.WARNING]
    assert "cpu abacus instead of " in said
    assert "torch 9.9 instead of " in said
    assert "cores" not in said
    assert "not bit for bit" in said


def test_a_run_that_somebody_trains_is_left_alone(tmp_path, stopped):
    stopped(short(tmp_path), 2, fails)
    run_dir = the_run(tmp_path)
    with files.hold(run_dir), pytest.raises(ConfigError, match=f"process {os.getpid()} trains"):
        train(stored_config(run_dir))
    train(stored_config(run_dir))


def test_a_run_is_held_until_its_summary_is_there(tmp_path, monkeypatch):
    real = train_module.write_json

    def write(path, content):
        with pytest.raises(ValueError, match="trains"):
            files.hold(path.parent)
        real(path, content)

    monkeypatch.setattr(train_module, "write_json", write)
    result = train(short(tmp_path))
    files.hold(result.run_dir).close()


@pytest.mark.parametrize("step", ["remove", "write_json", "Metrics"])
def test_a_crash_while_it_begins_again_loses_nothing(tmp_path, stopped, monkeypatch, step):
    config = short(tmp_path / "whole", save_every=1e-9)
    expected = left_behind(train(config).run_dir)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    run_dir = the_run(tmp_path / "part")
    where = checkpoint if step == "remove" else files

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, step, crash)
        with pytest.raises(KeyboardInterrupt):
            train(stored_config(run_dir / "checkpoints" / "4"))
    auto = dataclasses.replace(config, out_dir=str(tmp_path / "part"), resume="auto")
    assert left_behind(train(auto).run_dir) == expected
    assert the_run(tmp_path / "part") == run_dir


@pytest.mark.parametrize(
    ("place", "step"),
    [
        (files, "Metrics"),
        (files, "write_json"),
        (files, "Saver"),
        (directory, "write_json"),
        (directory, "sync_directory"),
    ],
    ids=str,
)
def test_what_cannot_begin_leaves_no_directory(tmp_path, monkeypatch, place, step):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, step, full)
    with pytest.raises(ConfigError, match="No space left"):
        train(short(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_best_belongs_to_the_state_it_was_written_with(tmp_path, monkeypatch):
    """A crash between the files of a checkpoint leaves the one before, with its own best."""
    real, names = checkpoint.write_file, []

    def crash(path, data):
        names.append(path.name)
        if len(names) == 8:  # the third checkpoint's best
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_file", crash)
    with pytest.raises(KeyboardInterrupt):
        train(short(tmp_path, save_every=1e-9, return_window=1))
    monkeypatch.undo()
    run_dir = the_run(tmp_path)
    assert names[7] == "best.pt"
    for folder in checkpoint.folders(run_dir):
        state = checkpoint.load(folder)[1]
        best = checkpoint.load(folder / "best.pt")[1]["policy"]["parameters"]
        expected = state["stopping"]["best_parameters"] or state["policy"]["parameters"]
        assert digest(best) == digest(expected)


def test_what_is_said_to_be_saved_is_on_the_disk(tmp_path, monkeypatch, stopped):
    """Rows, each file, the manifest, the folder's name, that name; and then the message."""
    calls = []

    def record(place, name, words):
        real = getattr(place, name)

        def run(*args, **kwargs):
            result = real(*args, **kwargs)
            calls.append(words(*args))
            return result

        monkeypatch.setattr(place, name, run)

    def named(number):
        return Path(os.readlink(f"/proc/self/fd/{number}")).name

    class Messages(logging.Handler):
        def emit(self, record):
            calls.append(record.getMessage().partition(";")[0])

    record(os, "fsync", lambda number: f"fsync {named(number)}")
    record(os, "replace", lambda one, other: f"replace {Path(other).name}")
    handler = Messages(logging.INFO)
    log = logging.getLogger("vecpg")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        stopped(short(tmp_path), 2, terminated)
    finally:
        log.removeHandler(handler)
    temporary = f"{TEMPORARY}{os.getpid()}-2"
    assert calls[-8:] == [
        "fsync metrics.jsonl",
        "fsync state.pt",
        "fsync best.pt",
        "fsync manifest.json",
        f"fsync {temporary}",
        "replace 2",
        "fsync checkpoints",
        "saved after iteration 2",
    ]


def test_what_was_saved_on_a_gpu_goes_on_on_a_cpu(tmp_path, stopped, caplog):
    """The manifest of such a run, and tensors that say they were on one."""
    config = short(tmp_path, vectorization="sync")
    stopped(config, 2, fails)
    run_dir = the_run(tmp_path)
    folder = checkpoint.folders(run_dir)[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["resolved"]["device"] = "cuda:0"
    state = (folder / "state.pt").read_bytes()
    data = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(state)) as old, zipfile.ZipFile(data, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in content
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(entry.filename, content)
    (folder / "state.pt").write_bytes(data.getvalue())
    sha256 = hashlib.sha256(data.getvalue()).hexdigest()
    manifest["files"]["state.pt"] = {"bytes": len(data.getvalue()), "sha256": sha256}
    del manifest["sha256"]
    manifest["sha256"] = checkpoint._digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    again = train(stored_config(run_dir))
    assert again.summary["device"] == "cpu"
    assert "device cpu instead of cuda: from here on not bit for bit" in caplog.text
    whole = train(dataclasses.replace(config, out_dir=str(tmp_path / "whole")))
    assert left_behind(again.run_dir) == left_behind(whole.run_dir)


@pytest.mark.slow
def test_fifty_kills_at_any_moment_leave_the_same_runs(tmp_path):
    killed = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, str(killed), str(tmp_path), "50"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == 50
    assert found["while saving"] >= 5
    for killed_often, never in found["runs"]:
        assert killed_often == never
        assert never[-1]["solved"]
        assert never[-1]["solved_env_steps"] > 0
