"""Which processes can have workers, and how those start."""

import multiprocessing
import os
import subprocess
import sys

import pytest
from conftest import ROOT

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


THREADS = """
import os, psutil
from vecpg.envs import make_envs
if __name__ == "__main__":
    before = dict(os.environ)
    envs = make_envs("CartPole-v1", 2, vectorization="async", envs_per_worker=1)
    assert dict(os.environ) == before
    for process in envs.processes:
        worker = psutil.Process(process.pid)
        print(worker.environ().get("OMP_NUM_THREADS"), worker.environ().get("MKL_NUM_THREADS"),
              worker.num_threads())
    envs.close()
"""


@pytest.mark.parametrize(("given", "said"), [({}, "1 1"), ({"OMP_NUM_THREADS": "3"}, "3 None")])
def test_a_worker_has_one_thread_unless_the_user_says_otherwise(tmp_path, given, said):
    script = tmp_path / "script.py"
    script.write_text(THREADS)
    plain = {name: each for name, each in os.environ.items() if name not in fork_server._ONE_THREAD}
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=plain | {"PYTHONPATH": str(ROOT)} | given,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert [line.rsplit(" ", 1)[0] for line in lines] == [said] * 2
    if not given:
        # Beside its own, one that follows the main process.
        assert [line.rsplit(" ", 1)[1] for line in lines] == ["2"] * 2


def test_a_worker_loads_no_torch():
    command = [sys.executable, "-c", "import sys, vecpg.envs.in_worker; print(*sys.modules)"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert "gymnasium" in done.stdout.split(), done.stderr
    assert not {"torch", "numba", "scipy"} & set(done.stdout.split())
