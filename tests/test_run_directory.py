import errno
import fcntl
import json
import multiprocessing
import os
import re
import signal
from pathlib import Path

import pytest

from vecpg.config import Config
from vecpg.run import directory
from vecpg.run.directory import (
    TEMPORARY,
    WriteFailure,
    hold,
    make_run_directory,
    sweep,
    write_json,
    writing,
)


def test_it_holds_the_settings_and_the_machine(tmp_path):
    config = Config(out_dir=str(tmp_path / "new" / "runs"), exp_name="trial", seed=7)
    run_dir = make_run_directory(config)
    assert run_dir.parent == tmp_path / "new" / "runs"
    assert run_dir.name.startswith("CartPole-v1__trial__7__")
    assert run_dir.name.rpartition("__")[2].isdigit()
    assert not (run_dir / "config.json").exists(), "it comes with the first checkpoint"
    assert json.loads((run_dir / "system.json").read_text())["cores"] == os.cpu_count()


def test_two_runs_in_the_same_second_do_not_meet(tmp_path):
    config = Config(out_dir=str(tmp_path))
    assert len({make_run_directory(config) for _ in range(3)}) == 3


def test_slashes_and_colons_of_an_id_stay_out_of_the_path(tmp_path):
    run_dir = make_run_directory(Config(out_dir=str(tmp_path), env_id="module:ALE/Pong-v5"))
    assert run_dir.parent == tmp_path
    assert run_dir.name.startswith("module-ALE-Pong-v5__")


def test_a_place_that_cannot_be_written_raises(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        make_run_directory(Config(out_dir=str(tmp_path / "file" / "runs")))


def test_a_new_directory_is_on_the_disk_with_the_way_to_it(tmp_path, monkeypatch):
    synced = []
    real = directory.sync_directory
    monkeypatch.setattr(
        directory, "sync_directory", lambda path: (synced.append(Path(path)), real(path))
    )
    run_dir = make_run_directory(Config(out_dir=str(tmp_path / "runs")))
    assert synced == [tmp_path / "runs", run_dir]


def test_one_directory_is_trained_in_by_one(tmp_path):
    with hold(tmp_path):
        with pytest.raises(ValueError, match=f"one that process {os.getpid()} trains; end that"):
            hold(tmp_path)
        # Another process, and who holds it is still named.
        holder, (ours, theirs) = os.getpid(), multiprocessing.Pipe()

        def try_it():
            with pytest.raises(ValueError, match=f"process {holder} trains"):
                hold(tmp_path)
            theirs.send("refused")

        other = multiprocessing.get_context("fork").Process(target=try_it)
        other.start()
        assert ours.poll(30)
        assert ours.recv() == "refused"
        other.join()
    # What a process left that has ended holds nothing.
    (tmp_path / ".lock").write_text("999999\n")
    with hold(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_forked_child_keeps_no_directory_held(tmp_path):
    lock = hold(tmp_path)
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        lock.close()
        hold(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuses(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuses)
    with pytest.raises(WriteFailure, match=r"\.lock cannot be locked: No locks available; give"):
        hold(tmp_path)


def test_rests_are_swept_and_nothing_else(tmp_path):
    (tmp_path / "checkpoints" / f"{TEMPORARY}7-12").mkdir(parents=True)
    (tmp_path / "checkpoints" / f"{TEMPORARY}7-12" / "state.pt").touch()
    (tmp_path / "checkpoints" / "11").mkdir()
    for name in (f"{TEMPORARY}7-config.json", "config.json", ".lock"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "config.json", ".lock"}
    assert os.listdir(tmp_path / "checkpoints") == ["11"]


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.ENOSPC, "make some room"), (errno.EFBIG, "ulimit -f"), (errno.EIO, "on /")],
)
def test_what_cannot_be_written_is_named_with_its_mount(tmp_path, number, hint):
    path = tmp_path / "a" / "b"
    with pytest.raises(WriteFailure) as caught, writing(path):
        raise OSError(number, os.strerror(number))
    said = str(caught.value)
    assert said.startswith(f"{path} cannot be written: {os.strerror(number)} (")
    assert re.search(r" \([\d,]+ MB free on /\S*\)", said)
    assert hint in said


def test_json_is_whole_or_as_it_was(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": 1})

    def fails(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(WriteFailure, match=r"x\.json cannot be written: No space left"):
            write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]
