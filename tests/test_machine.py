import getpass
import json
import os
import socket

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
