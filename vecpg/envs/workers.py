"""One process per environment, on Gymnasium's AsyncVectorEnv, made to fail loudly and to end.

Gymnasium's own waits hang when a worker dies, stops or raises what cannot be pickled, and after a
timeout its replies are one step late. Here any failure names the environment, ends every worker,
and leaves the environments unusable. No constructor runs in this process, so none can block it.
"""

import contextlib
import functools
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, forkserver, util
from multiprocessing.process import BaseProcess
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.utils import CloudpickleWrapper

from vecpg.envs.answers import read_answer, with_typed_observations
from vecpg.envs.errors import EnvironmentNotMade, SubEnvironmentError, in_words

_log = logging.getLogger(__name__)

# Between two looks for workers that have died, while one is waited for.
_LOOK_SECONDS = 0.5
# How long a worker may take to close its environment, before it is killed.
_END_SECONDS = 2.0
# Of a worker's `info`: its environment failed, in plain words.
_FAILURE = "vecpg.failure"
# The exit status of a process that cannot become a worker, since the script that it imports starts
# some. It is what the fork server makes of any.
_UNGUARDED = 1
# Of a worker in this process: its pipe, its end, and by which it knows of this process's end.
_DESCRIPTORS = 3
# What multiprocessing gives as exit status when there is no fork server to tell it.
_UNKNOWN = 255
# To the whole terminal or job; the main process answers them.
_ANSWERED_ABOVE = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

_Maker = Callable[[], gymnasium.Env[Any, Any]]


class WorkerEnvs(AsyncVectorEnv):
    """N environments in N processes, in NEXT_STEP mode.

    Processes come from a fork server: they never inherit this process's threads or locks, and the
    start method is the same on every Python. Observations come back through shared memory. A worker
    closes its environment and ends when it is asked to, and when this process has ended, however
    that came about.

    Args:
        env_fns: one maker for each environment; it is called in a worker. The first is called in
            one more, for its spaces.
        step_timeout: seconds after which a worker that has not answered counts as hung. For
            constructors: of a core.

    Raises:
        SubEnvironmentError: from `reset`, `step`, `call` and making one: an environment raised,
            died or hung. Every worker has been ended.
        EnvironmentNotMade: no worker can be started from this process, or none can be sent what
            makes the environment.
    """

    def __init__(self, env_fns: Sequence[_Maker], step_timeout: float) -> None:
        self.step_timeout = step_timeout
        self.processes, self.parent_pipes = [], []
        self._owner = os.getpid()
        _check_limit(len(env_fns))
        makers = [_pickled(make) for make in env_fns]
        # For a process that exits without closing them, and would wait for its children.
        self._at_exit = util.Finalize(None, _close, (weakref.ref(self),), exitpriority=100)
        with self._watched():
            try:
                spaces = _learn_spaces(makers[0], step_timeout)
                super().__init__(
                    [
                        functools.partial(_begin, make, index, spaces, self._owner)
                        for index, make in enumerate(makers)
                    ],
                    shared_memory=True,
                    context="forkserver",
                    autoreset_mode=AutoresetMode.NEXT_STEP,
                )
            except ConnectionError:  # of a worker that died
                raise
            except ChildProcessError as error:
                raise EnvironmentNotMade(
                    "--vectorization async: this process is a fork of one that had workers;"
                    ' start it by multiprocessing.get_context("spawn"), or use --vectorization sync'
                ) from error
            except (OSError, MemoryError) as error:
                raise EnvironmentNotMade(
                    f"--vectorization async: {len(env_fns)} processes could not be started:"
                    f" {in_words(error)}; try fewer --num-envs"
                ) from error
            # Failures come another way. Its semaphores have names, which a killed process leaves.
            del self.error_queue
            self._make()

    def reset(
        self,
        *,
        seed: int | list[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> Any:
        """As `AsyncVectorEnv.reset`, watched."""
        with self._watched():
            self.reset_async(seed=seed, options=options)
            self._wait_for_answers()
            obs, infos = self.reset_wait()
            _check(infos)
            return obs, infos

    def step(self, actions: Any) -> Any:
        """As `AsyncVectorEnv.step`, watched."""
        with self._watched():
            self.step_async(actions)
            self._wait_for_answers()
            row = self.step_wait()
            _check(row[-1])
            return row

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """As `AsyncVectorEnv.call`, watched."""
        with self._watched():
            self.call_async("answer", name, args, kwargs)
            self._wait_for_answers()
            answers, failures = zip(*self.call_wait(), strict=True)
            for failure in filter(None, failures):
                raise SubEnvironmentError(failure)
            return tuple(answers)

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Have every worker close its environment; after two seconds kill those that have not."""
        if os.getpid() != self._owner:  # a fork of the process whose workers they are
            return
        for pipe in filter(None, self.parent_pipes):
            with contextlib.suppress(OSError):
                pipe.send(("close", None))
        _end(self.processes)
        for pipe in filter(None, self.parent_pipes):
            pipe.close()
        self._at_exit.cancel()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """After any exception nothing can be trusted any more: end every worker."""
        try:
            yield
        except (EOFError, ConnectionError):
            # The end of a connection comes a moment before that of its process.
            deadline = time.monotonic() + _END_SECONDS
            while not (failure := self._death()) and time.monotonic() < deadline:
                time.sleep(0.01)
            failure = failure or (0, "failed", "its connection was lost", "")
            self.close()
            raise SubEnvironmentError(failure) from None
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        """Have every worker make its environment, all at once."""
        silent = {pipe: index for index, pipe in enumerate(self.parent_pipes)}
        self.call_async("make")
        cores = len(os.sched_getaffinity(0))
        heard = time.monotonic()
        while silent:
            # They share the cores, and a constructor may take all the time on one.
            patience = self.step_timeout * -(-len(silent) // cores)
            for pipe in connection.wait(silent, min(_LOOK_SECONDS, patience)):
                del silent[pipe]  # type: ignore[arg-type]
                heard = time.monotonic()
            if silent and (failure := self._death()):
                raise SubEnvironmentError(failure)
            if silent and time.monotonic() - heard >= patience:
                raise SubEnvironmentError(_slow_constructor(min(silent.values()), patience))
        for failure in filter(None, self.call_wait()):
            raise SubEnvironmentError(failure)

    def _wait_for_answers(self) -> None:
        """Until every worker has answered, one has died, or the time is over."""
        deadline = time.monotonic() + self.step_timeout
        for pipe in self.parent_pipes:
            while not pipe.poll(min(_LOOK_SECONDS, max(0.0, deadline - time.monotonic()))):
                if failure := self._death():
                    raise SubEnvironmentError(failure)
                if time.monotonic() >= deadline:
                    raise SubEnvironmentError(self._hang())

    def _death(self) -> tuple[int, str, str, str] | None:
        """The first worker that is not alive, and what is known of its end."""
        for index, process in enumerate(self.processes):
            if process.pid is not None and process.exitcode is not None:
                return index, "died", _cause(process.exitcode), ""
        return None

    def _hang(self) -> tuple[int, str, str, str]:
        silent = [index for index, pipe in enumerate(self.parent_pipes) if not pipe.poll()]
        others = f", nor did {len(silent) - 1} others" if len(silent) > 1 else ""
        detail = f"it did not answer within {self.step_timeout:g} s{others}"
        return silent[0], "hung", f"{detail}; raise --step-timeout if a step may take longer", ""

    def _raise_if_errors(self, successes: Any) -> None:
        """What a worker cannot say in its answer; Gymnasium would ask the queue that is gone."""
        for index, success in enumerate(successes):
            if not success:
                detail = "it cannot do what it was asked"
                raise SubEnvironmentError((index, "failed", detail, ""))


def _close(envs: "weakref.ref[WorkerEnvs]") -> None:
    if (still_there := envs()) is not None:
        still_there.close()


def check_process() -> None:
    """Refuse to start workers from a process that cannot have any.

    Raises:
        EnvironmentNotMade: it is daemonic.
        SystemExit: it is itself about to become a worker, and imports a script that starts some.
            The process that waits for it raises `EnvironmentNotMade`.
    """
    process = multiprocessing.current_process()
    if process.daemon:
        raise EnvironmentNotMade(
            "--vectorization async: this process is daemonic, and daemonic processes may have no"
            " children; use --vectorization sync here, or start this process by"
            " concurrent.futures.ProcessPoolExecutor in place of multiprocessing.Pool"
        )
    if getattr(process, "_inheriting", False):
        raise SystemExit(_UNGUARDED)
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    if main.__spec__ is None and script is not None and not os.path.exists(script):
        raise EnvironmentNotMade(
            f"--vectorization async: each worker imports the script that was run, and {script} is"
            " no file; put it in one, or use --vectorization sync"
        )


def _check_limit(num_envs: int) -> None:
    """Refuse more workers than this process may have descriptors for.

    The fork server would die of it, of which only its traceback would tell.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _DESCRIPTORS * num_envs + 32
    if limit != resource.RLIM_INFINITY and needed > limit:
        raise EnvironmentNotMade(
            f"--vectorization async: {num_envs} processes need {needed} open files, and the limit"
            f" is {limit}; raise it (ulimit -n {needed}), or try fewer --num-envs"
        )


def _pickled(make: _Maker) -> bytes:
    """The maker of an environment, as it is sent to a worker."""
    try:
        made = pickle.dumps(CloudpickleWrapper(make))
    # Whatever pickling of a user's object raises.
    except Exception as error:
        raise EnvironmentNotMade(
            "--vectorization async: what makes the environment cannot be sent to another process:"
            f' {in_words(error)}; register it by name, as "module:Class", with arguments that can'
            " be pickled, or use --vectorization sync"
        ) from error
    return made


def _learn_spaces(make: bytes, timeout: float) -> "_Spaces":
    """Make one environment in a worker of its own, and look at it.

    Shared memory needs the spaces before there are workers that share it.
    """
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(
        target=_tell_spaces, args=(theirs, make), daemon=True
    )
    answer = None
    with contextlib.closing(ours):
        try:
            with contextlib.closing(theirs):
                _start_fork_server()
                process.start()
            if begun := _heard(ours, process, timeout):
                answer = _heard(ours, process, timeout)
        except (EOFError, ConnectionError):
            begun = None  # the fork server died of it
        finally:
            if process.pid is not None:
                _end([process])
    exitcode = None if process.pid is None else process.exitcode
    if begun is None and exitcode in (None, _UNGUARDED):
        raise EnvironmentNotMade(
            "--vectorization async: no worker could start: each imports the script that was run, so"
            ' what trains in it has to stand under `if __name__ == "__main__":`'
        )
    if answer is None:
        raise SubEnvironmentError((0, "died", _cause(exitcode or 0), ""))
    if isinstance(answer, SubEnvironmentError):
        raise answer
    spaces: _Spaces = pickle.loads(answer)()
    return spaces


def _heard(pipe: "connection.Connection[Any, Any]", process: BaseProcess, timeout: float) -> Any:
    """What the process sends next, or None if it ended before.

    Raises:
        SubEnvironmentError: it did neither in time.
    """
    ready = connection.wait([pipe, process.sentinel], timeout)
    if not ready:
        raise SubEnvironmentError(_slow_constructor(0, timeout))
    with contextlib.suppress(EOFError, ConnectionError):
        return pipe.recv() if pipe in ready else None
    return None


def _end(processes: Sequence[BaseProcess]) -> None:
    """Wait two seconds for all of them; kill those that take longer, with what they started."""
    started = [process for process in processes if process.pid is not None]
    deadline = time.monotonic() + _END_SECONDS
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in started:
        if process.exitcode != 0 and process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
    for process in started:
        process.join(_END_SECONDS)


def _check(infos: dict[str, Any]) -> None:
    """Raise for the first environment that has failed."""
    if _FAILURE in infos:
        raise SubEnvironmentError(next(filter(None, infos[_FAILURE])))


def _slow_constructor(index: int, timeout: float) -> tuple[int, str, str, str]:
    detail = f"its constructor did not return within {timeout:g} s"
    return index, "hung", f"{detail}; raise --step-timeout if it may take longer", ""


def _cause(exitcode: int) -> str:
    """An exit status in words, with the likely reason."""
    if exitcode == _UNKNOWN:
        return (
            "its process ended with exit status 255, or the fork server of all did, perhaps since"
            " there are too many processes (then try fewer --num-envs)"
        )
    if exitcode >= 0:
        return f"its process ended by itself with exit status {exitcode}"
    name = signal.Signals(-exitcode).name
    likely = {
        "SIGKILL": ", perhaps by the system for want of memory (then try fewer --num-envs)",
        "SIGSEGV": ", a fault in the environment's native code",
        "SIGABRT": ", a fault in the environment's native code",
    }
    return f"its process was killed by {name}{likely.get(name, '')}"


def _start_fork_server() -> None:
    """Start it while it would ignore the signals that its children leave to this process.

    What ends it would make all its children look dead.
    """
    multiprocessing.set_forkserver_preload(["__main__", __name__])
    if threading.current_thread() is not threading.main_thread():
        forkserver.ensure_running()
        return
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in _ANSWERED_ABOVE}
    try:
        forkserver.ensure_running()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# -- In a worker ----------------------------------------------------------------------------------


def _tell_spaces(pipe: "connection.Connection[Any, Any]", make: bytes) -> None:
    """Send that it has begun, then what is known of the environment, or why it cannot be made."""
    _settle()
    pipe.send("begun")
    try:
        env = pickle.loads(make)()
        spaces = _Spaces(env)
        answer = pickle.dumps(CloudpickleWrapper(lambda: spaces))
    except BaseException as error:
        pipe.send(SubEnvironmentError.raised_in_making(0, error))
    else:
        pipe.send(answer)
        _close_env(env, 0)


def _begin(make: bytes, index: int, spaces: "_Spaces", owner: int) -> "_Copy":
    """What stands for a copy of the environment until it is made.

    Gymnasium calls it in each worker, and once in the process that owns them.
    """
    if os.getpid() != owner:
        _settle()
    return _Copy(make, index, spaces)


def _settle() -> None:
    """Leave the terminal's signals to the main process, and end when that does."""
    # With what an environment starts it can be ended as a group, to which no terminal sends.
    os.setpgid(0, 0)
    # A job's signals come to every process. A handler, since what is started here would inherit
    # that they are ignored.
    for signum in (*_ANSWERED_ABOVE, signal.SIGTERM):
        signal.signal(signum, _leave_it)
    threading.Thread(target=_follow, daemon=True).start()


def _leave_it(signum: int, frame: Any) -> None:
    pass


def _follow() -> None:
    """End a little later than the main process, whatever the environment does."""
    main = multiprocessing.parent_process()
    if main is not None:
        main.join()
        time.sleep(_END_SECONDS)
        os.killpg(0, signal.SIGKILL)


def _close_env(env: gymnasium.Env[Any, Any], index: int) -> None:
    try:
        env.close()
    except Exception as error:
        _log.warning("closing environment %d failed: %s", index, in_words(error))


class _Spaces(gymnasium.Env[Any, Any]):
    """What has to be known of an environment that is not made yet."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        self.observation_space = env.observation_space
        self.action_space = env.action_space
        self.metadata = env.metadata
        self.render_mode = env.render_mode


class _Copy(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One copy in its worker. It reports what fails as plain data, whatever was raised."""

    def __init__(self, make: bytes, index: int, spaces: _Spaces) -> None:
        super().__init__(spaces)
        self.maker, self.index, self.spaces = make, index, spaces

    def make(self) -> tuple[int, str, str, str] | None:
        """Make the environment; what failed, if anything did."""
        try:
            self.env = with_typed_observations(pickle.loads(self.maker)())
            for name in ("observation_space", "action_space"):
                expected, got = getattr(self.spaces, name), getattr(self.env, name)
                if got != expected:
                    raise ValueError(
                        f"expected the {name} of every copy to be {expected}, got {got}"
                    )
        except BaseException as error:
            return _plain(SubEnvironmentError.raised_in_making(self.index, error))
        return None

    def step(self, action: Any) -> Any:
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            self._check(obs, info)
            return obs, *read_answer(reward, terminated, truncated), info
        except BaseException as error:
            return self.observation_space.sample(), 0.0, False, False, self._failed(error)

    def reset(self, **kwargs: Any) -> Any:
        try:
            obs, info = self.env.reset(**kwargs)
            self._check(obs, info)
            return obs, info
        except BaseException as error:
            return self.observation_space.sample(), self._failed(error)

    def answer(
        self, name: str, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[int, str, str, str] | None]:
        """An attribute of the environment, or what it returns; and what failed, if anything did."""
        try:
            found = self.get_wrapper_attr(name)
            value = found(*args, **kwargs) if callable(found) else found
            pickle.dumps(value)
            return value, None
        except BaseException as error:
            return None, _plain(SubEnvironmentError.raised(self.index, error))

    def close(self) -> None:
        """Close the environment, and leave the worker in which it was made."""
        if self.env is not self.spaces:
            _close_env(self.env, self.index)
            # Gymnasium may be about to raise that the main process cannot be reached.
            raise SystemExit(0)

    def _failed(self, error: BaseException) -> dict[str, Any]:
        return {_FAILURE: _plain(SubEnvironmentError.raised(self.index, error))}

    def _check(self, obs: Any, info: Any) -> None:
        space = self.spaces.observation_space
        if space.shape is not None and np.shape(obs) != space.shape:
            raise ValueError(f"expected an observation of shape {space.shape}, got {np.shape(obs)}")
        if space.dtype is not None:
            dtype = np.asarray(obs).dtype
            if not np.can_cast(dtype, space.dtype, "same_kind"):
                raise TypeError(f"expected an observation of dtype {space.dtype}, got {dtype}")
        if not isinstance(info, dict):
            raise TypeError(f"expected an info that is a dict, got {info!r}")
        # What cannot travel fails here rather than nameless on its way.
        pickle.dumps(info)


def _plain(error: SubEnvironmentError) -> tuple[int, str, str, str]:
    plain: tuple[int, str, str, str] = error.args[0]
    return plain
