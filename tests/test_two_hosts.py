"""The commands of docs/distributed.md on two hosts, and what is left where one of them is lost."""

import json
import subprocess
import sys

import pytest
import two_hosts
from conftest import ROOT


@pytest.mark.slow
def test_two_hosts_are_one_process_and_so_is_the_one_that_is_left(tmp_path):
    try:
        two_hosts.how()
    except OSError as error:
        pytest.skip(str(error))
    command = [sys.executable, str(ROOT / "tests" / "two_hosts.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    left = json.loads(done.stdout)
    assert len(left["one"][2]) == 40
    assert left["both"] == left["one"]
    assert left["left"] == left["one"]


def test_where_there_are_no_namespaces_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(two_hosts, "PROGRAMS", ("unshare", "no-such-program"))
    with pytest.raises(OSError, match="need no-such-program$"):
        two_hosts.how()
    refused = subprocess.CompletedProcess([], 1, "", "unshare failed: Operation not permitted\n")
    monkeypatch.setattr(two_hosts, "PROGRAMS", ())
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: refused)
    with pytest.raises(OSError, match="makes no namespaces: unshare failed: Operation not perm"):
        two_hosts.how()
