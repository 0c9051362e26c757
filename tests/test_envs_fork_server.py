"""Which processes can have workers, and how those start."""

import multiprocessing
import os
import subprocess
import sys

import psutil
import pytest

from vecpg.envs import EnvironmentNotMade, fork_server, make_envs


def test_a_daemonic_process_hears_that_it_may_have_no_children():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        said = pool.apply(refusal)
    assert "daemonic processes may have no children; use --vectorization sync" in said


def refusal():
    try:
        make_envs("environments:Constant-v0", 2, vectorization="async")
    except EnvironmentNotMade as error:
        return str(error)


def test_a_script_that_is_no_file_is_named(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/tmp/<stdin>", raising=False)
    with pytest.raises(EnvironmentNotMade, match="/tmp/<stdin> is no file; put it in one, or use"):
        make_envs("environments:Constant-v0", 2, vectorization="async")


def test_a_worker_loads_no_torch_and_has_one_thread():
    modules = [sys.executable, "-c", "import sys, vecpg.envs.in_worker; print(*sys.modules)"]
    loaded = subprocess.run(modules, capture_output=True, text=True, check=True).stdout.split()
    assert "gymnasium" in loaded
    assert not {"torch", "numba", "scipy"} & set(loaded)
    envs = make_envs("environments:Constant-v0", 2, vectorization="async")
    for process in envs.processes:
        environ = psutil.Process(process.pid).environ()
        assert [environ[name] for name in fork_server._ONE_THREAD] == ["1"] * 3
    assert not set(fork_server._ONE_THREAD) & set(os.environ)
    envs.close()
