"""Which processes can have workers, and how those start."""

import multiprocessing
import os
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT

from vecpg.envs import EnvironmentNotMade, fork_server, in_worker, make_envs


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


SIGNALS = """
import faulthandler, os, signal, sys, time
from multiprocessing import forkserver, resource_tracker
import numpy as np
from vecpg.envs import make_envs

def blocked(pid):
    with open(f"/proc/{pid}/status") as status:
        (found,) = [int(line.split()[1], 16) for line in status if line.startswith("SigBlk")]
    return sorted(signum for signum in signal.Signals if found >> signum - 1 & 1)

def main():
    faulthandler.register(signal.SIGUSR1, file=sys.stderr)
    signal.signal(signal.SIGINT, lambda signum, frame: print("own handler"))
    envs = make_envs("CartPole-v1", 2, vectorization="async", envs_per_worker=1)
    envs.reset(seed=1)
    for pid in (forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid):
        print([signum.name for signum in blocked(pid)])
        for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(pid, signum)
    time.sleep(0.3)
    envs.step(np.zeros(2, int))
    make_envs("CartPole-v1", 2, vectorization="async").close()
    assert [blocked(process.pid) for process in envs.processes] == [[], []]
    envs.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    main()
"""


def test_signals_to_a_whole_job_do_not_end_it_and_handlers_stay(tmp_path):
    """Also one that was set from C, of which Python does not know."""
    script = tmp_path / "script.py"
    script.write_text(SIGNALS)
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    # The resource tracker ignores Ctrl-C by itself.
    blocked = ["['SIGHUP', 'SIGINT', 'SIGUSR1']", "['SIGHUP', 'SIGUSR1']"]
    assert done.stdout.splitlines() == [*blocked, "own handler"]
    assert "most recent call first" in done.stderr


INTERRUPTED = """
import os, random, signal, sys, threading, time
from vecpg.envs import make_envs

def main():
    made = make_envs("CartPole-v1", 2, vectorization="async", envs_per_worker=1)
    made.close()
    for k in range(40):
        timer = threading.Timer(0.002 * k, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            make_envs("CartPole-v1", 8, vectorization="async", envs_per_worker=1).close()
            time.sleep(1)
        except KeyboardInterrupt:
            pass
        timer.join()
    print("done", flush=True)
    sys.stdin.read()

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_interrupts_while_workers_start_leave_no_process_and_no_word(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    process = subprocess.Popen(
        [sys.executable, script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = process.stdout.readline()
    time.sleep(3)
    below = psutil.Process(process.pid).children(recursive=True)
    _, err = process.communicate("")
    assert (said, err) == ("done\n", "")
    # Fork server, resource tracker.
    assert len(below) == 2


def test_what_fails_in_a_worker_before_it_begins_is_not_the_scripts_fault(monkeypatch):
    monkeypatch.setattr(in_worker, "work", gone)
    with pytest.raises(EnvironmentNotMade, match="its process ended by itself with exit status 1"):
        make_envs("environments:Constant-v0", 2, vectorization="async")


def gone(*args):
    raise SystemExit(1)
