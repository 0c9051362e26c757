"""Every way a worker can fail: named, ended in time, and no process left."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium
import numpy as np
import psutil
import pytest
from conftest import ROOT
from environments import Constant
from gymnasium.vector import AsyncVectorEnv

from vecpg.envs import EnvironmentNotMade, SubEnvironmentError, make_envs
from vecpg.envs import workers as workers_module
from vecpg.policy import Policy
from vecpg.rollout import collect

ACTIONS = np.zeros(4, np.int64)


@pytest.fixture
def envs(request):
    """Four copies, each in its own process; whatever the test did, none may be left."""
    before = workers()
    made = make_envs(
        "environments:Misbehaving-v0",
        4,
        vectorization="async",
        env_kwargs=getattr(request, "param", {}),
        step_timeout=1.5,
    )
    made.reset(seed=[1, 2, 3, 4])
    yield made
    made.close()
    assert workers() - before == set()


def workers():
    """Processes below this one, without the fork server and its resource tracker."""
    below = psutil.Process().children(recursive=True)
    return {p.pid for p in below if p.is_running() and p.ppid() != os.getpid()}


def fails(envs, call):
    """The error of `call`; every worker is gone by then, and within 5 seconds."""
    pids = [process.pid for process in envs.processes]
    begun = time.monotonic()
    with pytest.raises(SubEnvironmentError) as caught:
        call()
    assert time.monotonic() - begun < 5
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert envs.closed
    return caught.value


@pytest.mark.parametrize(
    ("index", "moment"),
    [(0, "between steps"), (2, "between steps"), (0, "during a step"), (3, "during a step")],
)
def test_a_killed_worker_is_named(envs, index, moment):
    victim = envs.processes[index].pid
    if moment == "between steps":
        os.kill(victim, signal.SIGKILL)
        error = fails(envs, lambda: envs.step(ACTIONS))
    else:
        # Copy 1 sleeps for 3 s, so that the signal comes while it is waited for.
        envs.step_timeout = 4.0
        killer = multiprocessing.get_context("fork").Process(target=kill_later, args=(victim,))
        killer.start()
        actions = ACTIONS.copy()
        actions[1] = 1
        error = fails(envs, lambda: envs.step(actions))
        killer.join()
    assert (error.index, error.verb) == (index, "died")
    assert "killed by SIGKILL, perhaps by the system for want of memory" in error.detail


def kill_later(pid):
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("index", [2])
def test_a_stopped_worker_is_named_after_the_timeout(envs, index):
    os.kill(envs.processes[index].pid, signal.SIGSTOP)
    error = fails(envs, lambda: envs.step(ACTIONS))
    assert (error.index, error.verb) == (index, "hung")
    assert "did not answer within 1.5 s; raise --step-timeout" in error.detail


@pytest.mark.parametrize("index", [3])
def test_a_worker_stopped_between_steps_and_at_reset_is_named(envs, index):
    envs.step(ACTIONS)
    os.kill(envs.processes[index].pid, signal.SIGSTOP)
    error = fails(envs, lambda: envs.reset(seed=[1, 2, 3, 4]))
    assert (error.index, error.verb) == (index, "hung")


@pytest.mark.parametrize(
    ("index", "action", "verb", "words"),
    [
        (0, 2, "failed", "ValueError: 100% wrong"),
        (2, 3, "failed", "Local: cannot be pickled"),
        (3, 4, "died", "its process ended by itself with exit status 7"),
        (2, 5, "failed", "SystemExit: 3"),
    ],
    ids=["raises", "raises unpicklable", "os._exit", "sys.exit"],
)
def test_a_worker_that_raises_or_leaves_is_named(envs, index, action, verb, words):
    actions = ACTIONS.copy()
    actions[index] = action
    error = fails(envs, lambda: envs.step(actions))
    assert (error.index, error.verb) == (index, verb)
    assert words in error.detail
    assert ("environments.py" in error.trace) == (verb == "failed")


def test_several_that_raise_are_one_error(envs):
    error = fails(envs, lambda: envs.step(np.full(4, 2)))
    assert error.verb == "failed"


@pytest.mark.parametrize("envs", [{"at_reset": 2}], indirect=True)
def test_a_worker_that_raises_at_reset_is_named(envs):
    fails(envs, lambda: [envs.reset(seed=[9, 9, 9, 9]) for _ in range(3)])


def test_closing_in_the_middle_of_a_step_ends_every_worker(envs):
    pids = [process.pid for process in envs.processes]
    envs.step_async(np.ones(4, np.int64))
    begun = time.monotonic()
    envs.close()
    assert time.monotonic() - begun < 5
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_closing_stopped_workers_ends_them(envs):
    pids = [process.pid for process in envs.processes]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    begun = time.monotonic()
    envs.close()
    assert time.monotonic() - begun < 5
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_an_interrupt_while_waiting_ends_every_worker(envs):
    pids = [process.pid for process in envs.processes]
    killer = multiprocessing.get_context("fork").Process(
        target=lambda pid: (time.sleep(0.3), os.kill(pid, signal.SIGINT)), args=(os.getpid(),)
    )
    killer.start()
    envs.step_timeout = 4.0
    with pytest.raises(KeyboardInterrupt):
        envs.step(np.ones(4, np.int64))
    killer.join()
    assert not any(psutil.pid_exists(pid) for pid in pids)


# -- Constructors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 2], ids=["the first", "a later copy"])
@pytest.mark.parametrize(
    ("how", "verb", "words"),
    [
        ("raise", "failed", "ValueError: 100% wrong"),
        ("raise what cannot be pickled", "failed", "Local: ('cannot be pickled', <function"),
        ("sys.exit", "failed", "SystemExit: no licence"),
        ("os._exit", "died", "its process ended by itself with exit status 5"),
        ("kill", "died", "its process was killed by SIGKILL, perhaps by the system for want of"),
        ("hang", "hung", "its constructor did not return within "),
    ],
)
def test_a_constructor_that_fails_is_named_with_its_reason(tmp_path, how, verb, words, at):
    begun = time.monotonic()
    with pytest.raises(
        EnvironmentNotMade, match="^environments:Stillborn-v0 could not be"
    ) as caught:
        make_envs(
            "environments:Stillborn-v0",
            3,
            vectorization="async",
            env_kwargs={"how": how, "counter": str(tmp_path / "counter"), "at": at},
            step_timeout=1.0,
        )
    assert time.monotonic() - begun < 8
    assert workers() == set()
    message = str(caught.value)
    # The first is one that is only looked at; what it raises all would raise.
    which = f"(environment [0-2] {verb}: )" + ("?" if verb == "failed" else "")
    assert re.search(f"could not be made: {which}{re.escape(words)}", message), message
    assert (verb == "hung") == ("raise --step-timeout if it may take longer" in message)
    own = 'environments.py", line ' in caught.value.trace and "in __init__" in caught.value.trace
    assert own == (verb == "failed")


def test_what_a_user_gets_wrong_about_a_constructor_has_no_traceback():
    for vectorization in ("sync", "async"):
        with pytest.raises(EnvironmentNotMade, match="TypeError.*no_such") as caught:
            make_envs(
                "environments:Bandit-v0",
                2,
                vectorization=vectorization,
                env_kwargs={"no_such": 1},
            )
        assert caught.value.trace == ""
        message = r'could not be made: run `pip install "gymnasium\[x\]"`$'
        with pytest.raises(EnvironmentNotMade, match=message) as caught:
            make_envs(
                "environments:Stillborn-v0",
                2,
                vectorization=vectorization,
                env_kwargs={"how": "not installed"},
            )
        assert caught.value.trace == ""


def test_copies_that_differ_in_their_spaces_are_named(tmp_path):
    settings = {"how": "other spaces", "counter": str(tmp_path / "counter"), "at": 2}
    message = r"could not be made: .*action_space of every copy to be Discrete\(2\), got Discrete"
    with pytest.raises(EnvironmentNotMade, match=message):
        make_envs("environments:Stillborn-v0", 3, vectorization="async", env_kwargs=settings)
    assert workers() == set()


def test_constructors_that_share_few_cores_are_given_their_time(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    patience = []
    wait = workers_module.connection.wait

    def noticed(pipes, timeout):
        patience.append((len(pipes), timeout))
        return wait(pipes, timeout)

    monkeypatch.setattr(workers_module.connection, "wait", noticed)
    make_envs("environments:Constant-v0", 3, vectorization="async", step_timeout=0.125).close()
    assert (3, 0.375) in patience


def test_what_cannot_be_sent_to_a_worker_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(gymnasium.envs.registration, "registry", {**gymnasium.registry})
    monkeypatch.setattr(gymnasium, "registry", gymnasium.envs.registration.registry)
    lock = threading.Lock()

    def entry_point(**kwargs):
        with lock:
            return Constant()

    gymnasium.register("Locked-v0", entry_point, max_episode_steps=10)
    with pytest.raises(
        EnvironmentNotMade,
        match="cannot be sent to another process: TypeError: cannot pickle.*lock.*"
        'register it by name, as "module:Class".*or use --vectorization sync',
    ):
        make_envs("Locked-v0", 2, vectorization="async")
    make_envs("Locked-v0", 2, vectorization="sync").close()


def test_processes_that_cannot_be_started_are_counted(monkeypatch):
    def full(*args, **kwargs):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(AsyncVectorEnv, "__init__", full)
    with pytest.raises(
        EnvironmentNotMade, match="3 processes could not be started: .*Resource temp"
    ):
        make_envs("environments:Constant-v0", 3, vectorization="async")


def test_more_processes_than_may_have_descriptors_are_refused_before_any_is_made(monkeypatch):
    monkeypatch.setattr(workers_module.resource, "getrlimit", lambda which: (1024, 4096))
    with pytest.raises(
        EnvironmentNotMade,
        match=r"331 processes need 1025 open files, .* limit is 1024; raise it \(ulimit -n 1025\)",
    ):
        make_envs("environments:Constant-v0", 331, vectorization="async")


def test_a_worker_has_three_descriptors_of_this_process(envs):
    before = psutil.Process().num_fds()
    envs.close()
    envs.processes.clear()
    assert before - psutil.Process().num_fds() == 4 * workers_module._DESCRIPTORS


# -- Processes ------------------------------------------------------------------------------------


def test_a_daemonic_process_hears_that_it_may_have_no_children():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        said = pool.apply(refusal)
    assert "daemonic processes may have no children; use --vectorization sync" in said


@pytest.mark.parametrize(
    ("method", "said"),
    [("spawn", "made"), ("fork", "this process is a fork of one that had workers")],
)
def test_a_process_of_its_own_may_have_workers_and_need_not_close_them(envs, method, said):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context(method).Process(target=leave_open, args=(theirs,))
    process.start()
    assert ours.poll(30)
    assert said in ours.recv()
    process.join(10)
    exitcode = process.exitcode
    process.kill()
    assert exitcode == 0


def leave_open(pipe):
    global left_open
    try:
        left_open = make_envs("environments:Constant-v0", 2, vectorization="async")
        pipe.send("made")
    except EnvironmentNotMade as error:
        pipe.send(str(error))


def refusal():
    try:
        make_envs("environments:Constant-v0", 2, vectorization="async")
    except EnvironmentNotMade as error:
        return str(error)


def run(code, *, cwd):
    """Python in a process of its own, with the environments at hand."""
    path = cwd / "script.py"
    path.write_text(code)
    return subprocess.Popen(
        [sys.executable, path],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_script_without_a_main_guard_hears_of_it_once(tmp_path):
    code = (
        "from vecpg.envs import make_envs\n"
        "make_envs('environments:Constant-v0', 3, vectorization='async')\n"
    )
    process = run(code, cwd=tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.count("Traceback") == 1, err
    assert 'stand under `if __name__ == "__main__":`' in err.splitlines()[-1]


def test_a_script_that_is_no_file_is_named(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/tmp/<stdin>", raising=False)
    with pytest.raises(EnvironmentNotMade, match="/tmp/<stdin> is no file; put it in one, or use"):
        make_envs("environments:Constant-v0", 2, vectorization="async")


def test_an_environment_that_cannot_be_closed_is_named_and_its_worker_ends(tmp_path):
    code = (
        "from vecpg.envs import make_envs\n"
        "if __name__ == '__main__':\n"
        "    envs = make_envs('environments:Unclosable-v0', 2, vectorization='async')\n"
        "    envs.close()\n"
        "    print([process.exitcode for process in envs.processes])\n"
    )
    process = run(code, cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert out == "[0, 0]\n"
    # One more was made for its spaces.
    assert sorted(err.splitlines()) == [
        f"closing environment {index} failed: RuntimeError: close broke" for index in (0, 0, 1)
    ]


LIFE = """
import multiprocessing, os, signal, sys, time
import numpy as np
from vecpg.envs import make_envs

def main():
    global envs
    envs = make_envs("environments:Simulated-v0", 3, vectorization="async", step_timeout=100)
    envs.reset(seed=[1, 2, 3])
    envs.step(np.zeros(3, int))
    print("ready", flush=True)
    sys.stdin.close()
    {what}

if __name__ == "__main__":
    main()
"""
LONG = "envs.step(np.array([0, 1, 0]))"
STOP = "os.kill(envs.processes[1].pid, signal.SIGSTOP)"
# What the process does, the signal it gets, its exit status, and whether it has a traceback.
ENDS = {
    "closed": ("envs.close(); envs.close()", None, 0, False),
    "not closed": ("pass", None, 0, False),
    "collected": (
        "del globals()['envs']; assert not multiprocessing.active_children()",
        None,
        0,
        False,
    ),
    "not closed, one stopped": (STOP, None, 0, False),
    "an exception": ("raise ValueError('of its own')", None, 1, True),
    "sys.exit": ("sys.exit(3)", None, 3, False),
    "os._exit": ("os._exit(4)", None, 4, False),
    "Ctrl-C": (LONG, signal.SIGINT, -signal.SIGINT, True),
    "SIGTERM": ("time.sleep(1000)", signal.SIGTERM, -signal.SIGTERM, False),
    "SIGKILL": ("time.sleep(1000)", signal.SIGKILL, -signal.SIGKILL, False),
    "SIGKILL in a step": (LONG, signal.SIGKILL, -signal.SIGKILL, False),
}


@pytest.mark.parametrize("end", [pytest.param(end, marks=pytest.mark.slow) for end in ENDS])
def test_however_a_process_ends_nothing_is_left(tmp_path, end):
    """No worker, no program of an environment, no shared memory, and no word from any of them."""
    what, signum, status, traceback = ENDS[end]
    process = run(LIFE.format(what=what), cwd=tmp_path)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    below = psutil.Process(process.pid).children(recursive=True)
    if signum is not None:
        # What has no name any more cannot be left behind.
        assert "/dev/shm/" in (maps := shared_memory([process.pid, *(one.pid for one in below)]))
        assert all(line.endswith("(deleted)") for line in maps.splitlines())
        # Fork server, resource tracker, three workers, three programs.
        assert len(below) == 8
        time.sleep(0.3)
        process.send_signal(signum)
    begun = time.monotonic()
    out, err = process.communicate(timeout=60)
    _, left = psutil.wait_procs(below, timeout=max(0.1, begun + 5 - time.monotonic()))
    assert [one for one in left if one.status() != psutil.STATUS_ZOMBIE] == []
    assert (process.returncode, out) == (status, "")
    assert err.count("Traceback") == traceback, err
    assert traceback or err == ""


def shared_memory(pids):
    maps = [(Path("/proc") / str(pid) / "maps").read_text().splitlines() for pid in pids]
    return "\n".join(line for each in maps for line in each if "/dev/shm/" in line)


def test_a_worker_that_is_killed_takes_its_environments_programs_along():
    envs = make_envs("environments:Simulated-v0", 2, vectorization="async", step_timeout=1.0)
    envs.reset(seed=[1, 2])
    programs = [
        child
        for process in envs.processes
        for child in psutil.Process(process.pid).children(recursive=True)
    ]
    assert len(programs) == 2
    error = fails(envs, lambda: envs.step(np.array([0, 1])))
    assert (error.index, error.verb) == (1, "hung")
    assert psutil.wait_procs(programs, timeout=5)[1] == []


def test_signals_to_a_whole_job_are_the_main_processs_to_answer(envs):
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        for process in envs.processes:
            os.kill(process.pid, signum)
        assert envs.step(ACTIONS)[0].shape == (4, 1)


def test_a_fork_of_the_process_leaves_the_workers_alone(envs):
    child = multiprocessing.get_context("fork").Process(target=envs.close)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert envs.step(ACTIONS)[0].shape == (4, 1)


def test_calls_are_answered_or_named(envs):
    assert [spec.id for spec in envs.get_attr("spec")] == ["Misbehaving-v0"] * 4
    error = fails(envs, lambda: envs.call("no_such_thing"))
    assert (error.index, error.verb) == (0, "failed")
    assert "AttributeError" in error.detail


def test_sync_and_async_collect_the_same_bit_for_bit():
    rollouts = []
    for vectorization in ("sync", "async"):
        envs = make_envs("environments:Counting-v0", 5, vectorization=vectorization)
        policy = Policy(envs.single_observation_space, envs.single_action_space)
        for parameter in policy.parameters():
            parameter.data.fill_(0.1)
        rollouts.append([collect(envs, policy, num_steps=9, seed=4, iteration=i) for i in range(3)])
        envs.close()
    for one, other in zip(*rollouts, strict=True):
        for name in set(one.__slots__) - {"action_masks"}:
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
