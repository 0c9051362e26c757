"""Every way a worker can fail: named, ended in time, and no process left."""

import multiprocessing
import os
import signal
import time

import numpy as np
import psutil
import pytest

from vecpg.envs import SubEnvironmentError, make_envs
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


@pytest.mark.parametrize("index", [0, 3])
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


def test_workers_leave_ctrl_c_to_this_process(envs):
    for process in envs.processes:
        os.kill(process.pid, signal.SIGINT)
    assert envs.step(ACTIONS)[0].shape == (4, 1)


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


def test_a_constructor_that_fails_only_in_the_worker_is_named():
    with pytest.raises(ValueError, match="could not be made: .*environment . died"):
        make_envs(
            "environments:Misbehaving-v0",
            2,
            vectorization="async",
            env_kwargs={"dies_in_worker": True},
        )
    assert workers() == set()


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
        for name in one.__slots__:
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
