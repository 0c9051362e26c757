"""Checkpoints: whole or not there, verified, and nothing in them executed."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import about, digest, save_policy
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from vecpg.policy import Policy
from vecpg.run import checkpoint
from vecpg.run.checkpoint import BEST, MANIFEST, STATE, CheckpointError, load_policy
from vecpg.run.directory import TEMPORARY, WriteFailure

CONFIG = about()["config"]
CONTENT = {"numbers": [1, 2.5, None, "x"], "tensor": torch.arange(6.0).reshape(2, 3), "a": {"b": 1}}


def save(folder, content=CONTENT):
    folder.parent.mkdir(exist_ok=True)
    counters = about()["counters"] | {"iteration": int(folder.name)}
    content = content | {"counters": counters}
    checkpoint.save(folder, about() | {"counters": counters}, {STATE: content, BEST: {"best": 1}})


def read(folder):
    """Everything in a checkpoint, as one hash."""
    found = checkpoint.opened(folder)
    contents = [found.read(name) for name in (STATE, BEST)]
    return digest([json.dumps(found.manifest, sort_keys=True), contents])


def test_what_was_saved_is_loaded(tmp_path):
    save(tmp_path / "checkpoints" / "12")
    found, content = checkpoint.load(tmp_path / "checkpoints" / "12")
    del content["counters"]
    assert digest(content) == digest(CONTENT)
    assert digest(checkpoint.load(tmp_path)[1]) == digest({"best": 1})
    content = checkpoint.load(tmp_path / "checkpoints" / "12" / STATE)[1]
    assert content["tensor"].tolist() == CONTENT["tensor"].tolist()
    assert found.manifest["config"]["env_id"] == "CartPole-v1"
    assert os.listdir(tmp_path / "checkpoints") == ["12"]
    assert {path.name for path in found.folder.iterdir()} == {STATE, BEST, MANIFEST}


def test_everything_is_on_the_disk_before_it_is_there(tmp_path, monkeypatch):
    """Every file, then the manifest, then the folder's name, then the folder above."""
    calls, names = [], {}
    opened, fsync, replace = os.open, os.fsync, os.replace

    def recorded_open(path, *args, **kwargs):
        names[found := opened(path, *args, **kwargs)] = str(path)
        return found

    def recorded_fsync(number):
        name = names.get(number) or os.readlink(f"/proc/self/fd/{number}")
        calls.append(f"fsync {Path(name).name}")
        fsync(number)

    def recorded_replace(one, other):
        calls.append(f"replace {Path(other).name}")
        replace(one, other)

    monkeypatch.setattr(os, "open", recorded_open)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    (tmp_path / "checkpoints").mkdir()
    save(tmp_path / "checkpoints" / "12")
    temporary = f"{TEMPORARY}{os.getpid()}-12"
    assert calls == [
        f"fsync {STATE}",
        f"fsync {BEST}",
        f"fsync {MANIFEST}",
        f"fsync {temporary}",
        "replace 12",
        "fsync checkpoints",
    ]


@pytest.mark.parametrize("step", ["mkdir", "fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_checkpoint_and_no_rest(tmp_path, monkeypatch, step):
    save(tmp_path / "checkpoints" / "1")
    before = read(tmp_path / "checkpoints" / "1")

    def fails(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fails)
        with pytest.raises(WriteFailure, match=r"points/2 cannot be written: No space left"):
            save(tmp_path / "checkpoints" / "2", {"other": 1})
    assert read(tmp_path / "checkpoints" / "1") == before
    assert os.listdir(tmp_path / "checkpoints") == ["1"]


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("cannot be saved")


def test_what_cannot_be_pickled_leaves_no_rest(tmp_path):
    with pytest.raises(RuntimeError, match="cannot be saved"):
        save(tmp_path / "checkpoints" / "2", {"x": Unpicklable()})
    assert os.listdir(tmp_path / "checkpoints") == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint, and its files' bytes."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "12"
    policy = Policy(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), hidden_sizes=(4,))
    save(folder, {"policy": checkpoint.policy_state(policy), "numbers": CONTENT})
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}, read(folder)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_noticed_and_named(whole, data):
    """Bytes flipped, cut, doubled: what is loaded is what was saved, or one error with the file."""
    folder, files, right = whole
    name = data.draw(st.sampled_from(sorted(files)))
    damaged = bytearray(files[name])
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    try:
        (folder / name).write_bytes(damaged)
        try:
            assert read(folder) == right
        except CheckpointError as error:
            assert name in str(error)  # noqa: PT017
    finally:
        (folder / name).write_bytes(files[name])


def test_each_damage_has_its_words(tmp_path):
    folder = tmp_path / "checkpoints" / "3"
    save(folder)
    state = (folder / STATE).read_bytes()

    def said(change):
        kept = {path.name: path.read_bytes() for path in folder.iterdir()}
        change()
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(folder)
        for name, content in kept.items():
            (folder / name).write_bytes(content)
        return str(caught.value)

    size = len(state)
    assert said(lambda: (folder / STATE).write_bytes(state[:-1])).startswith(
        f"{folder / STATE}: truncated (expected {size} bytes, found {size - 1})"
    )
    # One bit of a tensor's data, which torch itself does not notice.
    place = state.index(CONTENT["tensor"].numpy().tobytes()) + 5
    flipped = state[:place] + bytes([state[place] ^ 1]) + state[place + 1 :]
    assert "does not match its digest" in said(lambda: (folder / STATE).write_bytes(flipped))
    assert "No such file" in said(lambda: (folder / STATE).unlink())
    assert "without manifest.json" in said(lambda: (folder / MANIFEST).unlink())
    assert "expected a JSON object" in said(lambda: (folder / MANIFEST).write_bytes(b"hello"))
    assert "expected a JSON object" in said(lambda: (folder / MANIFEST).write_text("[" * 100_000))
    other = json.dumps({"kind": "of something else"})
    assert "is not of a vecpg checkpoint" in said(lambda: (folder / MANIFEST).write_text(other))


def rewritten(folder, **changes):
    """A manifest with a right digest, and other content."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    manifest |= changes
    manifest["sha256"] = checkpoint._digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99, "versions": {"vecpg": "7.8"}}, "format 5, got 99; use a newer vecpg, 7.8"),
        ({"format": 4}, "format 5, got 4; use the vecpg that wrote it"),
        ({"format": "5"}, "format 5, got 5; use the vecpg that wrote it"),
        ({"counters": []}, "counters: expected dict, got list"),
        ({"counters": {"iteration": 1.5}}, r"counters\.iteration: expected int, got float"),
        ({"counters": about()["counters"] | {"x": 1}}, r"counters\.'x' is not known"),
        ({"files": {}}, r"files\.state\.pt is missing"),
        ({"files": {"state.pt": {}, "best.pt": {}, "/dev/zero": {}}}, "'/dev/zero' is not known"),
        ({"files": {"state.pt": {}, "best.pt": {}}}, r"files\.state\.pt\.bytes is missing"),
        ({"config": None}, "config: expected dict, got NoneType"),
        ({"config": CONFIG | {"env_id": ["os:x"]}}, "--env-id: expected text, got"),
        ({"config": CONFIG | {"network": 5}}, "--network: expected text, got 5"),
        ({"config": CONFIG | {"wrappers": 0}}, "--wrappers: expected module:callable ..., got 0"),
        ({"config": CONFIG | {"wrappers": [5]}}, "--wrappers: expected module:callable ..., got"),
        ({"config": CONFIG | {"wrappers": ""}}, "--wrappers: expected module:callable ..., got"),
        ({"config": CONFIG | {"action_masks": "no"}}, "--action-masks: expected true or false"),
        ({"config": CONFIG | {"envs_per_worker": 0}}, "--envs-per-worker: expected at least 1"),
        ({"config": CONFIG | {"x": 1}}, "config: 'x' is no setting"),
        (
            {"config": CONFIG | {"max_episode_steps": -5}},
            "--max-episode-steps: expected at least 1, or none, got -5",
        ),
        ({"config": CONFIG | {"num_envs": 0}}, "--num-envs: expected at least 1, got 0"),
        ({"config": CONFIG | {"step_timeout": -1.0}}, "--step-timeout: expected a finite number"),
        (
            {"config": {k: v for k, v in CONFIG.items() if k != "num_envs"}},
            "config: expected the setting num_envs, got none",
        ),
        ({"resolved": about()["resolved"] | {"device": "evil"}}, "--device: expected auto, cpu"),
        ({"resolved": about()["resolved"] | {"shards": True}}, "shards: expected int, got bool"),
        ({"solved": 1}, "solved: expected bool, got int"),
        ({"machine": 3}, "machine: expected dict, got int"),
    ],
)
def test_a_right_digest_is_not_yet_a_manifest(tmp_path, changes, message):
    save(tmp_path / "checkpoints" / "3")
    rewritten(tmp_path / "checkpoints" / "3", **changes)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path)


def test_an_explicit_path_that_is_bad_says_what_else_there_is(tmp_path):
    for number in (2, 5, 11):
        save(tmp_path / "checkpoints" / str(number))
    (tmp_path / "checkpoints" / "11" / STATE).write_bytes(b"")
    (tmp_path / "checkpoints" / "2" / MANIFEST).unlink()
    # Its best policy is whole, and nobody asked for more.
    checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"11/state.pt: truncated .*; \S+/5 can be loaded$"):
        checkpoint.load(tmp_path / "checkpoints" / "11")
    with pytest.raises(CheckpointError, match=r"11/state.pt: truncated .*; \S+/5 can be loaded$"):
        checkpoint.chosen(tmp_path, tmp_path)
    assert checkpoint.chosen(tmp_path / "checkpoints" / "5", tmp_path).iteration == 5
    near = str(tmp_path)[:-1]
    with pytest.raises(CheckpointError, match=f"got nothing of that name; did you mean {tmp_path}"):
        checkpoint.load(near)
    for path in (tmp_path.parent, tmp_path / "checkpoints" / "2" / BEST, Path(__file__)):
        with pytest.raises(CheckpointError, match=r"expected a|cannot be read"):
            checkpoint.load(path)


def test_a_run_without_any_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for choose in (
        lambda: checkpoint.chosen(tmp_path, tmp_path),
        lambda: checkpoint.newest_valid(tmp_path),
    ):
        with pytest.raises(CheckpointError, match="to go on from, found none at all"):
            choose()


def test_the_newest_that_is_right_is_taken_and_the_others_are_named(tmp_path, caplog):
    for number in (2, 9, 10, 11):
        save(tmp_path / "checkpoints" / str(number))
    (tmp_path / "checkpoints" / "11" / BEST).unlink()
    (tmp_path / "checkpoints" / "10" / MANIFEST).write_text("{}")
    (tmp_path / "checkpoints" / f"{TEMPORARY}1-12").mkdir()
    assert checkpoint.newest_valid(tmp_path).folder.name == "9"
    assert [record.message[:9] for record in caplog.records] == ["skipped: "] * 2
    assert "11/best.pt cannot be read" in caplog.text
    assert "10/manifest.json is not of a vecpg checkpoint" in caplog.text
    for number in (2, 9):
        shutil.rmtree(tmp_path / "checkpoints" / str(number))
    with pytest.raises(CheckpointError, match=r"to go on from, found .*11.*10"):
        checkpoint.newest_valid(tmp_path)


def test_a_run_of_an_older_version_is_named(tmp_path):
    """As vecpg 0.1.0 left it."""
    (tmp_path / "checkpoints").mkdir()
    for name in ("last.pt", "best.pt"):
        torch.save({"kind": "vecpg checkpoint", "format": 2}, tmp_path / "checkpoints" / name)
    for path in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(CheckpointError, match=r"format 5, got that of vecpg 0\.1; use the vec"):
            checkpoint.load(path)


def test_a_checkpoint_of_another_place_is_none_to_go_on_from(tmp_path):
    """A renamed folder, and a manifest beside a state of another moment."""
    for number in (2, 5, 11):
        save(tmp_path / "checkpoints" / str(number))
    (tmp_path / "checkpoints" / "11").rename(tmp_path / "checkpoints" / "60")
    for name in ("009", "x", "-1", "1e3", "7" * 30):
        (tmp_path / "checkpoints" / name).mkdir()
    checkpoint.load(tmp_path / "checkpoints" / "60")
    with pytest.raises(CheckpointError, match="60: expected the name 11, after the iteration"):
        checkpoint.chosen(tmp_path, tmp_path)
    assert checkpoint.newest_valid(tmp_path).iteration == 5
    rewritten(tmp_path / "checkpoints" / "5", counters=about()["counters"] | {"iteration": 4})
    with pytest.raises(CheckpointError, match="are of different moments"):
        checkpoint.chosen(tmp_path / "checkpoints" / "5", tmp_path)
    assert checkpoint.newest_valid(tmp_path).iteration == 2


@pytest.mark.parametrize("name", [STATE, BEST, MANIFEST])
def test_what_is_no_file_is_not_read(tmp_path, name):
    """A pipe would keep the reader waiting for ever."""
    folder = tmp_path / "checkpoints" / "2"
    save(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: expected a file, got something else"):
        checkpoint.chosen(tmp_path, tmp_path)


def test_a_folder_whose_name_may_not_be_on_the_disk_is_not_written_again(tmp_path, monkeypatch):
    class Nothing:
        def flush(self):
            pass

    class State:
        stopping = type("Stopping", (), {"solved": False, "best": None})

        def state_dict(self):
            return {"counters": about()["counters"], "policy": {}, "stopping": {}}

    (tmp_path / "checkpoints").mkdir()
    saver = checkpoint.Saver(tmp_path, about(), 60.0, Nothing())
    real = checkpoint.sync_directory

    def fails(path):
        if path.name == "checkpoints":
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(checkpoint, "sync_directory", fails)
    with pytest.raises(WriteFailure, match="Input/output error"):
        saver.save(State())
    saver.save(State())
    assert checkpoint.opened(tmp_path / "checkpoints" / "0").iteration == saver.iteration == 0


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "checkpoints" / "1", {"state": Evil()})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path / "checkpoints" / "1")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "evil").exists()


def test_what_cannot_be_pruned_is_a_warning(tmp_path, monkeypatch, caplog):
    class Nothing:
        def flush(self):
            pass

    class State:
        def __init__(self, iteration):
            self.content = {
                "counters": about()["counters"] | {"iteration": iteration},
                "policy": {"parameters": 1},
                "stopping": {"best_parameters": iteration},
            }
            self.stopping = type("Stopping", (), {"solved": False, "best": iteration})

        def state_dict(self):
            return self.content

    (tmp_path / "checkpoints").mkdir()
    saver = checkpoint.Saver(tmp_path, about(), 60.0, Nothing())
    for iteration in (7, 8, 9, 10):
        saver.save(State(iteration))
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["10", "9", "8"]

    def fails(path):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "remove", fails)
    saver.save(State(11))
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["11", "10", "9", "8"]
    assert "8 cannot be removed: Permission denied" in caplog.text
    # One manifest: the best that belongs to it, whatever was written before or after.
    assert checkpoint.load(tmp_path)[1]["policy"]["parameters"] == 11


def test_load_policy_takes_a_run_directory_or_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    best, newest = (
        Policy(spaces.Box(-1, 1, (4,)), spaces.Discrete(3), hidden_sizes=(5,)) for _ in range(2)
    )
    folder = tmp_path / "checkpoints" / "4"
    folder.parent.mkdir()
    contents = {STATE: newest, BEST: best}
    checkpoint.save(
        folder,
        about(),
        {name: {"policy": checkpoint.policy_state(policy)} for name, policy in contents.items()},
    )
    obs = np.random.default_rng(0).normal(size=(100, 4))
    played = [policy.act(obs).tolist() for policy in (best, newest)]
    assert played[0] != played[1]
    assert checkpoint.load_policy(tmp_path).act(obs).tolist() == played[0]
    assert checkpoint.load_policy(str(folder / BEST)).act(obs).tolist() == played[0]
    for path in (folder, str(folder / STATE)):
        assert checkpoint.load_policy(path).act(obs).tolist() == played[1]
    assert not checkpoint.load_policy(folder).training


def test_load_policy_wants_a_network_of_the_users_own_by_name(tmp_path):
    box = spaces.Box(-1, 1, (3,))
    policy = Policy(box, spaces.Discrete(2), network="networks:small")
    save_policy(tmp_path / "checkpoints" / "1", policy, network="networks:small")
    with pytest.raises(ValueError, match=f"^{tmp_path}.*pass network='networks:small'"):
        load_policy(tmp_path)
    with pytest.raises(ValueError, match="expected 'networks:small', .* got 'networks:other'"):
        load_policy(tmp_path, network="networks:other")
    loaded = load_policy(tmp_path, network="networks:small")
    assert not loaded.training
    obs = np.random.default_rng(0).standard_normal((9, 3))
    assert np.array_equal(loaded.act(obs), policy.act(obs))
