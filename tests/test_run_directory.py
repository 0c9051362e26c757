import json
import os

import pytest

from vecpg.config import Config
from vecpg.run.directory import make_run_directory


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
