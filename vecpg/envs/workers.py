"""One process per environment, on Gymnasium's AsyncVectorEnv, made to fail loudly and to end.

Gymnasium's own waits hang when a worker dies, stops or raises what cannot be pickled, and after a
timeout its replies are one step late. Here any failure names the environment, ends every worker,
and leaves the environments unusable.
"""

import contextlib
import functools
import multiprocessing
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from vecpg.envs.errors import SubEnvironmentError

# Between two looks for workers that have died, while one is waited for.
_LOOK_SECONDS = 0.5
# How long a worker may take to end, after SIGTERM.
_END_SECONDS = 1.0


class WorkerEnvs(AsyncVectorEnv):
    """N environments in N processes, in NEXT_STEP mode.

    Processes come from a fork server: they never inherit this process's threads or locks, and the
    start method is the same on every Python. Observations come back through shared memory.

    Args:
        env_fns: one maker for each environment; the first is also called here, for its spaces.
        step_timeout: seconds after which a worker that has not answered counts as hung.

    Raises:
        SubEnvironmentError: from `reset` and `step`: an environment raised, died or hung. Every
            worker has been ended.
    """

    def __init__(
        self, env_fns: Sequence[Callable[[], gymnasium.Env[Any, Any]]], step_timeout: float
    ) -> None:
        self.step_timeout = step_timeout
        _start_fork_server()
        with self._watched():
            super().__init__(
                [
                    functools.partial(_make_in_worker, make, index)
                    for index, make in enumerate(env_fns)
                ],
                shared_memory=True,
                context="forkserver",
                autoreset_mode=AutoresetMode.NEXT_STEP,
            )

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
            return self.reset_wait()

    def step(self, actions: Any) -> Any:
        """As `AsyncVectorEnv.step`, watched."""
        with self._watched():
            self.step_async(actions)
            self._wait_for_answers()
            return self.step_wait()

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """End every worker within about two seconds, whatever state it is in."""
        for process in self.processes:
            process.terminate()
        deadline = time.monotonic() + _END_SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self.processes:
            # A stopped process keeps SIGTERM for later; SIGKILL it cannot keep.
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self.parent_pipes:
            if pipe is not None:
                pipe.close()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """After any exception nothing can be trusted any more: end every worker."""
        level = gymnasium.logger.min_level
        # It would print the error once more, and itself fails on a traceback that holds a %.
        gymnasium.logger.min_level = gymnasium.logger.ERROR + 1
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
        finally:
            gymnasium.logger.min_level = level

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
            if process.exitcode is not None:
                return index, "died", _cause(process.exitcode), ""
        return None

    def _hang(self) -> tuple[int, str, str, str]:
        silent = [index for index, pipe in enumerate(self.parent_pipes) if not pipe.poll()]
        others = f", nor did {len(silent) - 1} others" if len(silent) > 1 else ""
        detail = f"it did not answer within {self.step_timeout:g} s{others}"
        return silent[0], "hung", f"{detail}; raise --step-timeout if a step may take longer", ""


def _cause(exitcode: int) -> str:
    """An exit status in words, with the likely reason."""
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
    """Start it while Ctrl-C is ignored: its children will ignore it from their first moment.

    Ctrl-C goes to every process of the terminal, and is the main process's to answer.
    """
    if threading.current_thread() is not threading.main_thread():
        forkserver.ensure_running()
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _make_in_worker(
    make: Callable[[], gymnasium.Env[Any, Any]], index: int
) -> gymnasium.Env[Any, Any]:
    # The fork server may have been started before, by somebody else.
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return _Numbered(make(), index)


class _Numbered(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Says which copy raised, in a form that passes between processes."""

    def __init__(self, env: gymnasium.Env[Any, Any], index: int) -> None:
        super().__init__(env)
        self.index = index

    def step(self, action: Any) -> Any:
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            self._check(obs)
            # What is no number, or cannot travel, fails here rather than nameless on its way.
            pickle.dumps(info)
            return obs, float(reward), bool(terminated), bool(truncated), info
        except (Exception, SystemExit) as error:
            raise SubEnvironmentError.raised(self.index, error) from None

    def reset(self, **kwargs: Any) -> Any:
        try:
            obs, info = self.env.reset(**kwargs)
            self._check(obs)
            pickle.dumps(info)
            return obs, info
        except (Exception, SystemExit) as error:
            raise SubEnvironmentError.raised(self.index, error) from None

    def _check(self, obs: Any) -> None:
        expected = self.observation_space.shape
        if expected is not None and np.shape(obs) != expected:
            raise ValueError(f"expected an observation of shape {expected}, got {np.shape(obs)}")
