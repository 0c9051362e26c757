"""Cores that this process may use, not those of the machine."""

import os
import subprocess
import sys

from conftest import ROOT

from vecpg.kernels.cores import cores


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3, 4}, raising=False)
    assert cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == 5


def test_ranks_of_torchrun_share_them(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(9)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores() == 9, "of another launcher"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert cores() == 1


def test_asking_loads_no_torch():
    code = "import sys, vecpg.kernels.cores; print('torch' in sys.modules)"
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
