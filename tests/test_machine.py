import getpass
import json
import os
import socket
from importlib import metadata

import pytest

from vecpg import machine
from vecpg.machine import system


def test_the_machine_is_described_without_names_or_paths():
    text = json.dumps(system())
    assert socket.gethostname() not in text
    assert os.sep + "home" not in text
    assert f'"{getpass.getuser()}"' not in text


def test_a_commit_is_named_only_in_its_own_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "vecpg" / "machine.py"))
    assert machine.commit() == {"commit": None, "dirty": None}
    with pytest.raises(ValueError, match="installed without its repository"):
        machine.checkout()


def test_a_package_that_is_missing_has_no_version(monkeypatch):
    def version(package):
        if package in ("gymnasium", "numba", "tensorboard"):
            raise metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    machine.package_version.cache_clear()
    try:
        found = system()
    finally:
        machine.package_version.cache_clear()
    assert (found["torch"], found["numpy"]) == ("1.0", "1.0")
    assert found["gymnasium"] is found["numba"] is found["tensorboard"] is None


def test_results_lie_beside_the_package_also_where_there_is_no_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "vecpg" / "machine.py"))
    with pytest.raises(ValueError, match="with its benchmarks beside it"):
        machine.results_folder({"cpu": "C", "cores": 2, "gpu": "G"})
    (tmp_path / "benchmarks").mkdir()
    folder = machine.results_folder({"cpu": "C", "cores": 2, "gpu": "G"})
    assert folder == tmp_path / "benchmarks" / "results" / "C-2-cores-G"
    assert folder.is_dir()
