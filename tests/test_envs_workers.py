"""Every way a worker can fail: named, ended in time, and no process left."""

import contextlib
import multiprocessing
import os
import re
import signal
import socket
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
from gymnasium.error import ClosedEnvironmentError

from vecpg.config import Config, ConfigError
from vecpg.envs import (
    EnvironmentNotMade,
    SubEnvironmentError,
    in_worker,
    make_envs,
)
from vecpg.envs import workers as workers_module
from vecpg.train import train

ACTIONS = np.zeros(4, np.int64)
EACH_WAY = pytest.mark.parametrize("each", [1, 2, 4], indirect=True)


@pytest.fixture
def each(request):
    """How many copies there are in a process."""
    return getattr(request, "param", 1)


@pytest.fixture
def envs(request, each):
    """Four copies in processes; whatever the test did, none may be left."""
    before = workers()
    made = make_envs(
        "environments:Misbehaving-v0",
        4,
        vectorization="async",
        env_kwargs=getattr(request, "param", {}),
        step_timeout=1.5,
        envs_per_worker=each,
    )
    assert len(made.processes) == 4 // each
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


@pytest.fixture
def soon(monkeypatch):
    """What does not close is killed sooner."""
    monkeypatch.setattr(workers_module, "END_SECONDS", 0.2)


@EACH_WAY
@pytest.mark.parametrize(
    ("index", "moment"),
    [
        (0, "between steps"),
        (2, "between steps"),
        pytest.param(0, "during a step", marks=pytest.mark.slow),
        (3, "during a step"),
    ],
)
def test_a_killed_worker_is_named(envs, each, index, moment, soon):
    victim = envs.processes[index // each].pid
    # Where it was: at its first, in copy 1 that sleeps, or at the end.
    first = index // each * each
    at = {(1, 0): 0, (2, 0): 1, (4, 0): 1, (1, 3): 3, (2, 3): 3, (4, 3): 1}.get((each, index))
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
    assert (error.index, error.verb) == (first if moment == "between steps" else at, "died")
    assert "killed by SIGKILL, perhaps by the system for want of memory" in error.detail
    together = f"; environments {first} to {first + each - 1} were in it" if each > 1 else ""
    assert error.detail.endswith(f"(then try fewer --num-envs){together}")


def kill_later(pid):
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("each", "index"),
    [pytest.param(1, 2, marks=pytest.mark.slow), (2, 3)],
    indirect=["each"],
)
def test_a_stopped_worker_is_named_after_the_timeout(envs, each, index, soon):
    envs.step_timeout = 0.7
    os.kill(envs.processes[index // each].pid, signal.SIGSTOP)
    error = fails(envs, lambda: envs.step(ACTIONS))
    assert (error.index, error.verb) == (index // each * each, "hung")
    assert "did not answer within 0.7 s; raise --step-timeout" in error.detail


@pytest.mark.slow
@pytest.mark.parametrize("index", [3])
def test_a_worker_stopped_between_steps_and_at_reset_is_named(envs, index, soon):
    envs.step(ACTIONS)
    envs.step_timeout = 0.7
    os.kill(envs.processes[index].pid, signal.SIGSTOP)
    error = fails(envs, lambda: envs.reset(seed=[1, 2, 3, 4]))
    assert (error.index, error.verb) == (index, "hung")


@pytest.mark.parametrize(
    ("each", "index"),
    [
        pytest.param(1, 3, marks=pytest.mark.slow),
        pytest.param(2, 2, marks=pytest.mark.slow),
        (4, 1),
    ],
    indirect=["each"],
)
def test_the_copy_that_hangs_is_named_wherever_it_is(envs, index, soon):
    actions = ACTIONS.copy()
    actions[index] = 1
    envs.step_timeout = 0.5
    error = fails(envs, lambda: envs.step(actions))
    assert (error.index, error.verb) == (index, "hung")
    assert "within 0.5 s; raise" in error.detail


@pytest.fixture
def many_signals():
    """One that is handled arrives ten times a second, as a profiler's does; after 4 s it raises."""
    arrived = []

    def handle(signum, frame):
        arrived.append(signum)
        if len(arrived) == 40:
            raise AssertionError("nobody looked")

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_a_worker_that_hangs_is_named_while_signals_keep_arriving(envs, soon, many_signals):
    envs.step_timeout = 0.7
    os.kill(envs.processes[2].pid, signal.SIGSTOP)
    error = fails(envs, lambda: envs.step(ACTIONS))
    assert (error.index, error.verb) == (2, "hung")


BIG = np.arange(10**6)


def in_the_middle_of_an_answer(envs, monkeypatch, signum):
    """Have every worker begin with an answer that is too large to be sent at once."""
    envs.set_attr("big", BIG)
    tell = envs._tell

    def tell_and_send(*told):
        tell(*told)
        time.sleep(0.3)
        os.kill(envs.processes[2].pid, signum)

    monkeypatch.setattr(envs, "_tell", tell_and_send)


@pytest.mark.parametrize(
    ("signum", "verb"),
    [
        pytest.param(signal.SIGKILL, "died", id="dies"),
        pytest.param(signal.SIGSTOP, "hung", id="hangs", marks=pytest.mark.slow),
    ],
)
def test_what_ends_in_the_middle_of_an_answer_is_named(
    envs, monkeypatch, soon, many_signals, signum, verb
):
    envs.step_timeout = 0.7
    in_the_middle_of_an_answer(envs, monkeypatch, signum)
    error = fails(envs, lambda: envs.get_attr("big"))
    assert (error.index, error.verb) == (2, verb)


@pytest.mark.slow
def test_an_answer_in_parts_may_take_its_time(envs, monkeypatch):
    in_the_middle_of_an_answer(envs, monkeypatch, signal.SIGSTOP)
    # Later than who waits for workers looks after them.
    later = threading.Timer(1.1, os.kill, (envs.processes[2].pid, signal.SIGCONT))
    later.start()
    assert all(np.array_equal(each, BIG) for each in envs.get_attr("big"))


@pytest.mark.slow
def test_a_worker_that_hangs_before_it_has_read_what_it_is_told_is_named(envs, soon, many_signals):
    envs.step_timeout = 0.7
    os.kill(envs.processes[2].pid, signal.SIGSTOP)
    error = fails(envs, lambda: envs.set_attr("big", BIG))
    assert (error.index, error.verb) == (2, "hung")


def test_workers_wait_whatever_the_default_of_sockets_is():
    socket.setdefaulttimeout(0.1)
    try:
        envs = make_envs("environments:Constant-v0", 2, vectorization="async")
        time.sleep(0.3)
        envs.reset(seed=1)
        envs.close()
    finally:
        socket.setdefaulttimeout(None)


@pytest.mark.slow
def test_closing_does_not_wait_for_who_reads_nothing(soon):
    envs = make_envs("environments:Misbehaving-v0", 2, vectorization="async", step_timeout=3)
    os.kill(envs.processes[1].pid, signal.SIGSTOP)
    assert fails(envs, lambda: envs.set_attr("big", BIG)).verb == "hung"


def test_a_timeout_may_be_longer_than_the_system_can_wait():
    envs = make_envs("environments:Misbehaving-v0", 2, vectorization="async", step_timeout=1e20)
    envs.set_attr("big", BIG)
    assert all(np.array_equal(each, BIG) for each in envs.get_attr("big"))
    envs.close()


def test_several_that_hang_are_counted(envs, soon):
    envs.step_timeout = 0.7
    error = fails(envs, lambda: envs.step(np.array([0, 1, 1, 1])))
    assert (error.index, error.verb) == (1, "hung")
    assert "within 0.7 s, nor did 2 others; raise" in error.detail


@pytest.mark.slow
def test_copies_that_take_their_time_one_after_the_other_do_not_hang():
    """Each is given its time, however many there are in a process, also while they are made."""
    settings = {"making": 0.25, "stepping": 0.25}
    envs = make_envs(
        "pool_environments:Sleeping-v0",
        3,
        vectorization="async",
        env_kwargs=settings,
        step_timeout=0.6,
        envs_per_worker=3,
    )
    envs.reset(seed=1)
    assert envs.step(ACTIONS[:3])[1].tolist() == [1.0] * 3
    envs.close()


@EACH_WAY
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
    assert (error.index, error.verb) == (0, "failed")


@EACH_WAY
@pytest.mark.parametrize("index", [0, 3])
def test_a_worker_that_raises_at_reset_is_named(envs, index):
    envs.set_attr("at_reset", [2 if copy >= index else None for copy in range(4)])
    error = fails(envs, lambda: envs.reset(seed=[9, 9, 9, 9]))
    assert (error.index, error.verb) == (index, "failed")
    assert "OSError: the simulator did not start" in error.detail


def test_what_has_failed_or_is_closed_takes_no_more(envs):
    fails(envs, lambda: envs.step(np.full(4, 2)))
    for _ in range(2):
        envs.close()
        for call in (envs.reset, lambda: envs.step(ACTIONS), lambda: envs.call("spec")):
            with pytest.raises(ClosedEnvironmentError, match="have been closed"):
                call()


@EACH_WAY
def test_closing_in_the_middle_of_a_step_ends_every_worker(envs, soon):
    pids = [process.pid for process in envs.processes]
    envs._rows.actions[:] = 1
    envs._tell(in_worker.STEP)
    begun = time.monotonic()
    envs.close()
    assert time.monotonic() - begun < 5
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_closing_stopped_workers_ends_them(envs, soon):
    pids = [process.pid for process in envs.processes]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    begun = time.monotonic()
    envs.close()
    assert time.monotonic() - begun < 5
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_an_interrupt_while_waiting_ends_every_worker(envs, soon):
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


@pytest.mark.parametrize(("at", "each"), [(0, 1), (2, 1), (2, 3)])
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
def test_a_constructor_that_fails_is_named_with_its_reason(
    tmp_path, soon, how, verb, words, at, each
):
    begun = time.monotonic()
    with pytest.raises(
        EnvironmentNotMade, match="^environments:Stillborn-v0 could not be"
    ) as caught:
        make_envs(
            "environments:Stillborn-v0",
            3,
            vectorization="async",
            env_kwargs={"how": how, "counter": str(tmp_path / "counter"), "at": at},
            step_timeout=0.5 if how == "hang" else 5.0,
            envs_per_worker=each,
        )
    assert time.monotonic() - begun < 8
    assert workers() == set()
    message = str(caught.value)
    # In one process they are made in their order. What the first raises all would raise.
    which = f"environment {at if each == 3 else '[0-2]'} {verb}: "
    which = f"({which})?" if verb == "failed" and (at == 0 or each == 1) else which
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


@pytest.mark.parametrize("each", [1, 3])
def test_copies_that_differ_in_their_spaces_are_named(tmp_path, each):
    settings = {"how": "other spaces", "counter": str(tmp_path / "counter"), "at": 2}
    message = r"could not be made: .*action_space of every copy to be Discrete\(.\), got Discrete"
    with pytest.raises(EnvironmentNotMade, match=message):
        make_envs(
            "environments:Stillborn-v0",
            3,
            vectorization="async",
            env_kwargs=settings,
            envs_per_worker=each,
        )
    assert workers() == set()


@pytest.mark.slow
@pytest.mark.parametrize("cores", [1, 3])
def test_constructors_that_share_few_cores_are_given_their_time(monkeypatch, soon, cores):
    """Three that take 1.2 s each could have been 0.4 s at work on one core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    raises = pytest.raises(EnvironmentNotMade, match=r"0 hung: its constructor .* within 0\.6 s")
    with contextlib.nullcontext() if cores == 1 else raises:
        make_envs(
            "pool_environments:Sleeping-v0",
            3,
            vectorization="async",
            env_kwargs={"making": 1.2},
            step_timeout=0.6,
            envs_per_worker=1,
        ).close()


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

    monkeypatch.setattr(multiprocessing.context.ForkServerProcess, "start", full)
    with pytest.raises(
        EnvironmentNotMade, match="3 processes could not be started: .*Resource temp"
    ):
        make_envs("environments:Constant-v0", 3, vectorization="async", envs_per_worker=1)


def test_more_processes_than_may_have_descriptors_are_refused_before_any_is_made(monkeypatch):
    """With those that are open: of other environments, say."""
    opened = [os.dup(0) for _ in range(50)]
    limit = len(os.listdir("/proc/self/fd")) + 3 * 2 + 20
    monkeypatch.setattr(workers_module.resource, "getrlimit", lambda which: (limit, limit))
    settings = {"vectorization": "async", "envs_per_worker": 2}
    envs = make_envs("environments:Constant-v0", 4, **settings)
    for fd in opened[:3]:
        os.close(fd)  # for the fork server's
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(
        EnvironmentNotMade,
        match=rf": 2 processes need {before + 22} open files, with the {before} that are open, and"
        rf" the limit is {limit}; raise it \(ulimit -n {before + 22}\), or --envs-per-worker$",
    ):
        make_envs("environments:Constant-v0", 4, **settings)
    envs.close()
    make_envs("environments:Constant-v0", 4, **settings).close()
    for fd in opened[3:]:
        os.close(fd)


@EACH_WAY
def test_a_worker_has_three_descriptors_of_this_process(envs, each):
    before = psutil.Process().num_fds()
    envs.close()
    envs.processes.clear()
    # And one for what is shared.
    assert before - psutil.Process().num_fds() == 4 // each * workers_module._DESCRIPTORS + 1


# -- Processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "said"),
    [
        pytest.param("spawn", "made", marks=pytest.mark.slow),
        ("fork", "this process is a fork of one that had workers"),
    ],
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


def test_an_environment_that_cannot_be_closed_is_named_and_its_worker_ends(tmp_path):
    code = (
        "from vecpg.envs import make_envs\n"
        "if __name__ == '__main__':\n"
        "    envs = make_envs('environments:Unclosable-v0', 3, vectorization='async',\n"
        "                     envs_per_worker=2)\n"
        "    envs.close()\n"
        "    print([process.exitcode for process in envs.processes])\n"
    )
    process = run(code, cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert out == "[0, 0]\n"
    assert sorted(err.splitlines()) == [
        f"closing environment {index} failed: RuntimeError: close broke" for index in (0, 1, 2)
    ]


def lasting(tmp_path, num_envs, each, hanging=-1):
    """Environments whose closing takes half as long as a worker may take; and who has closed."""
    noted = tmp_path / "closed"
    envs = make_envs(
        "pool_environments:Lasting-v0",
        num_envs,
        vectorization="async",
        env_kwargs={"closing": 0.3, "noted": str(noted), "hanging": hanging},
        envs_per_worker=each,
    )
    envs.reset(seed=0)
    return envs, lambda: sorted(map(int, noted.read_text().split()))


@pytest.mark.slow
def test_each_environment_in_a_worker_is_given_its_time_to_close(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(workers_module, "END_SECONDS", 0.6)
    envs, closed = lasting(tmp_path, 4, 4)
    envs.close()
    assert closed() == [0, 1, 2, 3]
    assert [process.exitcode for process in envs.processes] == [0]
    assert caplog.messages == []


def test_what_hangs_while_it_is_closed_is_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(workers_module, "END_SECONDS", 0.6)
    envs, closed = lasting(tmp_path, 5, 4, hanging=1)
    envs.close()
    assert closed() == [0, 4]
    assert [process.exitcode for process in envs.processes] == [-signal.SIGKILL, 0]
    assert caplog.messages == [
        "environment 1 was not closed within 0.6 s, and its process was killed; nor were 2 more"
    ]


@pytest.mark.slow
def test_each_environment_is_given_its_time_to_close_also_where_its_process_was_killed(tmp_path):
    code = (
        "import os\n"
        "from test_envs_workers import lasting\n"
        "if __name__ == '__main__':\n"
        "    from pathlib import Path\n"
        "    envs, _ = lasting(Path('.'), 9, 9, hanging=8)\n"
        "    print(envs.processes[0].pid, flush=True)\n"
        "    os._exit(0)\n"
    )
    process = run(code, cwd=tmp_path)
    worker = psutil.Process(int(process.stdout.readline()))
    process.communicate(timeout=60)
    assert psutil.wait_procs([worker], timeout=10)[1] == []
    assert sorted((tmp_path / "closed").read_text().split()) == list("01234567")


LIFE = """
import multiprocessing, os, signal, sys, time
import numpy as np
from vecpg.envs import make_envs

def main():
    global envs
    envs = make_envs("environments:Simulated-v0", 3, vectorization="async", step_timeout=100,
                     envs_per_worker={each})
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


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("end", [pytest.param(end, marks=pytest.mark.slow) for end in ENDS])
def test_however_a_process_ends_nothing_is_left(tmp_path, end, each):
    """No worker, no program of an environment, no shared memory, and no word from any of them."""
    what, signum, status, traceback = ENDS[end]
    process = run(LIFE.format(what=what, each=each), cwd=tmp_path)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    below = psutil.Process(process.pid).children(recursive=True)
    if signum is not None:
        # What has no name any more cannot be left behind.
        maps = shared_memory([process.pid, *(one.pid for one in below)])
        assert "/memfd:vecpg" in maps
        assert all(line.endswith("(deleted)") for line in maps.splitlines())
        # Fork server, resource tracker, workers, three programs.
        assert len(below) == 2 + -(-3 // each) + 3
        time.sleep(0.3)
        process.send_signal(signum)
    begun = time.monotonic()
    out, err = process.communicate(timeout=60)
    _, left = psutil.wait_procs(below, timeout=max(0.1, begun + 5 - time.monotonic()))
    assert [one for one in left if one.status() != psutil.STATUS_ZOMBIE] == []
    assert (process.returncode, out) == (status, "")
    assert err.count("Traceback") == traceback, err
    said = ""
    if what == STOP:
        said = f"environment {each} was not closed within 2 s, and its process was killed\n"
    assert traceback or err == said


def shared_memory(pids):
    maps = [(Path("/proc") / str(pid) / "maps").read_text().splitlines() for pid in pids]
    return "\n".join(
        line for each in maps for line in each if "/memfd:" in line or "/dev/shm/" in line
    )


@pytest.mark.slow
def test_a_worker_that_is_killed_takes_its_environments_programs_along(soon):
    envs = make_envs("environments:Simulated-v0", 2, vectorization="async", step_timeout=0.5)
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


@EACH_WAY
def test_a_worker_that_raises_when_it_is_called_is_named(envs):
    envs.set_attr("at_reset", [None, None, None, 2])
    error = fails(envs, lambda: envs.call("reset", seed=9))
    assert (error.index, error.verb) == (3, "failed")


@EACH_WAY
def test_calls_are_answered_or_named(envs):
    assert [spec.id for spec in envs.get_attr("spec")] == ["Misbehaving-v0"] * 4
    envs.set_attr("at_reset", [None, 7, 8, 9])
    assert envs.get_attr("at_reset") == (None, 7, 8, 9)
    envs.set_attr("at_reset", None)
    assert envs.get_attr("at_reset") == (None,) * 4
    envs.reset(seed=[5, 6, 7, 8])
    assert envs.np_random_seed == (5, 6, 7, 8)
    with pytest.raises(ValueError, match="at_reset: expected 4 values, got 2"):
        envs.set_attr("at_reset", [1, 2])
    error = fails(envs, lambda: envs.call("no_such_thing"))
    assert (error.index, error.verb) == (0, "failed")
    assert "AttributeError" in error.detail


def test_functions_of_a_scripts_own_can_be_sent(envs):
    envs.set_attr("big", [lambda: 1, 2, lambda: 3, 4])
    assert envs.get_attr("big") == (1, 2, 3, 4)


def test_what_cannot_be_sent_is_refused_before_anything_is(envs):
    message = "^set_wrapper_attr: expected arguments that can be sent.*TypeError: cannot pickle"
    with pytest.raises(TypeError, match=message):
        envs.set_attr("at_reset", [1, 2, 3, threading.Lock()])
    assert envs.get_attr("at_reset") == (None,) * 4
    with pytest.raises(TypeError, match="cannot pickle"):
        envs.reset(options={"lock": threading.Lock()})
    assert envs.step(ACTIONS)[0].shape == (4, 1)


@EACH_WAY
def test_what_a_step_returned_stays(envs):
    before = envs.reset(seed=1)[0]
    kept = [each.copy() for each in (before, *envs.step(ACTIONS)[:4])]
    returned = [before, *envs.step(ACTIONS)[:4]]
    for rows in (envs._rows.obs, envs._rows.rewards):
        rows[:] = np.nan
    envs._rows.terminations[:] = True
    for one, other in zip(kept, returned, strict=True):
        assert np.array_equal(one, other)
    assert [each.dtype for each in returned[1:]] == [np.float32, np.float64, np.bool_, np.bool_]


@pytest.mark.parametrize(
    "actions",
    [
        np.zeros(3, np.int64),
        np.zeros((4, 1), np.int64),
        0,
        np.zeros(4),
        ["0"] * 4,
        np.full(4, 2**63, np.uint64),
    ],
    ids=["three", "two dimensions", "one", "floating-point", "text", "beyond"],
)
def test_actions_that_do_not_fit_are_refused_before_any_is_sent(envs, actions):
    with pytest.raises(ValueError, match="expected actions of (shape|dtype)"):
        envs.step(actions)
    assert envs.step([0, 0, 0, 0])[1].tolist() == [1.0] * 4
    assert envs.step(ACTIONS.astype(np.uint8))[1].tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": [1, 2]}, "seed: expected one for each of 4, got 2"),
        ({"options": {"reset_mask": [True] * 4}}, "reset_mask: expected an array of 4 booleans"),
        ({"options": {"reset_mask": np.zeros(4, bool)}}, "reset_mask: expected"),
    ],
)
def test_what_cannot_be_reset_is_refused_before_any_is(envs, wrong, message):
    with pytest.raises(ValueError, match=message):
        envs.reset(**wrong)
    assert envs.step(ACTIONS)[0].shape == (4, 1)


def test_observations_that_are_no_arrays_are_told_as_in_sync(tmp_path):
    said = []
    for how in ("sync", "async"):
        config = Config(
            env_id="pool_environments:Keyed-v0",
            vectorization=how,
            num_envs=2,
            out_dir=str(tmp_path),
            progress=False,
        )
        with pytest.raises(ConfigError) as caught:
            train(config)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "--wrappers gymnasium.wrappers:FlattenObservation" in said[0]
    envs = make_envs("pool_environments:Keyed-v0", 2, vectorization="async")
    with pytest.raises(TypeError, match="got Dict.*--wrappers gymnasium.wrappers:FlattenObs"):
        envs.reset(seed=1)
    envs.close()


@pytest.mark.parametrize("each", [0, -1])
def test_a_process_has_a_copy_at_least(each):
    with pytest.raises(ValueError, match=f"^envs_per_worker: expected at least 1, got {each}$"):
        make_envs("environments:Constant-v0", 2, vectorization="async", envs_per_worker=each)


def test_copies_are_divided_over_the_cores(monkeypatch):
    for cores, num_envs, first in (
        (2, 5, [0, 3]),
        (4, 5, [0, 2, 4]),
        (4, 2, [0, 1]),
        (1, 3, [0]),
    ):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        envs = make_envs("environments:Constant-v0", num_envs, vectorization="async")
        assert len(envs.processes) == len(first)
        # Who is in one process is reset after the others there.
        os.kill(envs.processes[-1].pid, signal.SIGKILL)
        with pytest.raises(SubEnvironmentError) as caught:
            envs.reset(seed=1)
        assert caught.value.index == first[-1]
