"""Environments in processes of their own, several in each, that fail loudly and end.

What all are told and answer is in shared memory; a message each way is one byte. Any failure names
the environment, ends every worker, and leaves the environments unusable. No constructor runs in
this process, so none can block it.
"""

import contextlib
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection, util
from multiprocessing.process import BaseProcess
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ClosedEnvironmentError
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from vecpg.envs import fork_server, in_worker, shared
from vecpg.envs.answers import mask_sizes
from vecpg.envs.errors import EnvironmentNotMade, SubEnvironmentError, in_words
from vecpg.envs.in_worker import END_SECONDS, Failure, Known
from vecpg.kernels.cores import cores

_log = logging.getLogger(__name__)

# Between two looks for workers that have died, while one is waited for.
_LOOK_SECONDS = 0.5
# What the system takes as a limit is of 32 bits, in milliseconds.
_LONGEST_SECONDS = 1e6
# Of a worker in this process: its socket, its end, and by which it knows of this process's end.
_DESCRIPTORS = 3
# What else this process opens at times: while it starts a worker, or saves.
_SPARE = 16
# What multiprocessing gives as exit status when there is no fork server to tell it.
_UNKNOWN = 255

_Maker = Callable[[], gymnasium.Env[Any, Any]]


class WorkerEnvs(VectorEnv[Any, Any, Any]):
    """N environments in processes that step several each, one after the other, in NEXT_STEP mode.

    The same transitions as in this process, bit for bit. Processes come from a fork server: they
    never inherit this process's threads or locks, and the start method is the same on every Python.
    A worker closes its environments and ends when it is asked to, and when this process has ended,
    however that came about.

    Args:
        env_fns: one maker for each environment; it is called in a worker.
        step_timeout: seconds after which an environment that has not answered counts as hung. For
            constructors: of a core.
        envs_per_worker: how many are stepped in one process; None divides them over the cores that
            this process may use. 1 where they wait for something else than a core, or a process can
            have one only.
        action_masks: whether `reset` and `step` give `infos["action_mask"]`, (N, A) bool, as
            `read_action_mask` finds it, and True everywhere after an episode's end. No other info
            leaves a worker. Not of environments whose actions `mask_sizes` refuses.

    Raises:
        SubEnvironmentError: from `reset`, `step`, `call` and making one: an environment raised,
            died or hung. Every worker has been ended.
        EnvironmentNotMade: no worker can be started from this process, or none can be sent what
            makes the environment.
    """

    def __init__(
        self,
        env_fns: Sequence[_Maker],
        step_timeout: float,
        envs_per_worker: int | None = None,
        action_masks: bool = False,
    ) -> None:
        self.processes: list[BaseProcess] = []
        self._sockets: list[socket.socket] = []
        self._rows: shared.SharedRows | None = None
        self._owner, self._made = os.getpid(), False
        # For a process that exits without closing them, and would wait for its children.
        self._at_exit = util.Finalize(None, _close, (weakref.ref(self),), exitpriority=100)
        self.num_envs, self.step_timeout = len(env_fns), step_timeout
        self._look_seconds = min(_LOOK_SECONDS, step_timeout / 4)
        self._with_masks, self._flags = action_masks, 0
        each = envs_per_worker or -(-self.num_envs // cores())
        firsts = range(0, self.num_envs, each)
        self._blocks = [slice(first, min(first + each, self.num_envs)) for first in firsts]
        self._firsts = np.array(firsts)
        _check_limit(len(firsts))
        makers = [_packed(env_fns[block]) for block in self._blocks]
        with self._watched():
            memory = shared.create(len(makers))
            try:
                self._at = shared.positions(memory, len(makers))
                self._start(makers, memory)
                self._make()
                self._share(memory)
                self._made = True
            finally:
                os.close(memory)

    def reset(
        self,
        *,
        seed: int | list[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """As `SyncVectorEnv.reset`."""
        if seed is None or isinstance(seed, int):
            start = seed
            seed = [None if start is None else start + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"seed: expected one for each of {self.num_envs}, got {len(seed)}")
        chosen, options = self._chosen(options)
        rows = self._usable()
        each = [pickle.dumps((seed[block], options, chosen[block])) for block in self._blocks]
        self._ask(in_worker.RESET, each)
        return rows.obs.copy(), self._infos(rows)

    def step(
        self, actions: Any
    ) -> tuple[
        NDArray[Any], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]
    ]:
        """As `SyncVectorEnv.step`.

        Raises:
            ValueError: actions of another shape, or that the action space's dtype cannot hold. No
                environment has been stepped.
        """
        rows = self._usable()
        found = np.asarray(actions)
        if found.shape != rows.actions.shape:
            raise ValueError(f"expected actions of shape {rows.actions.shape}, got {found.shape}")
        if found.dtype != rows.actions.dtype:
            found = _as_type(found, rows.actions.dtype)
        rows.actions[...] = found
        self._ask(in_worker.STEP)
        return (
            rows.obs.copy(),
            rows.rewards.copy(),
            rows.terminations.copy(),
            rows.truncations.copy(),
            self._infos(rows),
        )

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """As `SyncVectorEnv.call`."""
        return self._call(name, [args] * self.num_envs, kwargs)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """As `SyncVectorEnv.get_attr`."""
        return self.call(name)

    def set_attr(self, name: str, values: Any) -> None:
        """As `SyncVectorEnv.set_attr`."""
        if not isinstance(values, list | tuple):
            values = [values] * self.num_envs
        if len(values) != self.num_envs:
            raise ValueError(f"{name}: expected {self.num_envs} values, got {len(values)}")
        self._call("set_wrapper_attr", [(name, value) for value in values], {})

    def render(self) -> tuple[Any, ...]:
        """As `SyncVectorEnv.render`."""
        return self.call("render")

    @property
    def np_random_seed(self) -> Any:
        """As `SyncVectorEnv.np_random_seed`."""
        return self.get_attr("np_random_seed")

    @property  # type: ignore[misc]
    def np_random(self) -> Any:
        """As `SyncVectorEnv.np_random`, of copies."""
        return self.get_attr("np_random")

    def close_extras(self, **kwargs: Any) -> None:
        """Have every worker close its environments; kill one that takes two seconds for one.

        What was not closed for that reason is warned of.
        """
        if os.getpid() != self._owner:  # a fork of the process whose workers they are
            return
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._end()
        for each in self._sockets:
            each.close()
        self._rows = None
        self._at_exit.cancel()

    def __del__(self) -> None:
        self.close()

    # -- Making them -------------------------------------------------------------------------------

    def _start(self, makers: list[bytes], memory: int) -> None:
        """Start the workers: first one alone, since what keeps it from starting keeps all."""
        try:
            # In a thread, where no signal's handler runs: one that raises in half a start would
            # leave a process that nobody knows of.
            with ThreadPoolExecutor(1) as starter:
                starter.submit(fork_server.start).result()
                for number in range(len(makers)):
                    self._start_one(starter, makers, number, memory)
            self._answers(range(1, len(makers)), making=True)
        except ConnectionError:  # of a worker that died
            raise
        except ChildProcessError as error:
            raise EnvironmentNotMade(
                "--vectorization async: this process is a fork of one that had workers;"
                ' start it by multiprocessing.get_context("spawn"), or use --vectorization sync'
            ) from error
        except (OSError, MemoryError) as error:
            raise EnvironmentNotMade(
                f"--vectorization async: {len(makers)} processes could not be started:"
                f" {in_words(error)}; try a larger --envs-per-worker"
            ) from error

    def _start_one(
        self, starter: ThreadPoolExecutor, makers: list[bytes], number: int, memory: int
    ) -> None:
        """Start a worker; if it is the first, wait until it has begun."""
        context = multiprocessing.get_context("forkserver")
        ours, theirs = socket.socketpair()
        self._sockets.append(ours)
        ours.settimeout(self._look_seconds)
        self._at[number] = self._firsts[number]
        process = context.Process(
            target=in_worker.work,
            args=(theirs, makers[number], int(self._firsts[number]), number, len(makers)),
            daemon=True,
        )
        self.processes.append(process)
        try:
            starter.submit(_start, process, theirs).result()
            socket.send_fds(ours, [in_worker.MEMORY], [memory])
            if number == 0:
                self._answers(range(1), making=True)
        except (EOFError, ConnectionError):
            if number > 0:
                raise
            if process.pid is not None:
                process.join(END_SECONDS)
            # Without a process, the fork server died of it.
            if process.pid is None or process.exitcode == fork_server.UNGUARDED:
                raise EnvironmentNotMade(
                    "--vectorization async: no worker could start: each imports the script that"
                    " was run, so what trains in it has to stand under"
                    ' `if __name__ == "__main__":`'
                ) from None
            raise

    def _make(self) -> None:
        """Have every worker make its environments, all at once, and learn their spaces."""
        answers = self._answers(range(len(self._sockets)), making=True)
        known: list[Known] = [in_worker.unpacked(each) for each in answers if each is not None]
        for first, other in zip(self._firsts, known, strict=True):
            try:
                in_worker.check_equal(known[0], other)
            except ValueError as error:
                raise SubEnvironmentError.raised_in_making(int(first), error) from None
        self.single_observation_space = known[0].observation_space
        self.single_action_space = known[0].action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.metadata = known[0].metadata | {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.render_mode = known[0].render_mode

    def _share(self, memory: int) -> None:
        """Make the rows of all environments, if their spaces are such that there are any."""
        spaces = self.single_observation_space, self.single_action_space
        if self._with_masks:
            # Whoever asks for masks of others refuses them.
            with contextlib.suppress(ValueError):
                self._flags = sum(mask_sizes(spaces[1]))
        if all(map(shared.can_be_shared, spaces)):
            number = len(self._sockets)
            self._rows = shared.SharedRows(memory, number, self.num_envs, *spaces, self._flags)
            self._ask(in_worker.SHARE, [pickle.dumps((self.num_envs, self._flags))] * number)

    # -- Asking them -------------------------------------------------------------------------------

    def _usable(self) -> shared.SharedRows:
        self._check_open()
        if self._rows is None:
            spaces = self.single_observation_space, self.single_action_space
            raise TypeError(
                "--vectorization async: expected observations and actions of Box, Discrete,"
                f" MultiBinary or MultiDiscrete, got {spaces[0]} and {spaces[1]}; for other"
                " observations give --wrappers gymnasium.wrappers:FlattenObservation"
            )
        return self._rows

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError("the environments have been closed")

    def _chosen(self, options: dict[str, Any] | None) -> tuple[list[bool], dict[str, Any] | None]:
        """Which environments to reset, and the options that each of them gets."""
        if options is None or "reset_mask" not in options:
            return [True] * self.num_envs, options
        mask = options["reset_mask"]
        known = isinstance(mask, np.ndarray) and mask.dtype == np.bool_
        if not (known and mask.shape == (self.num_envs,) and mask.any()):
            raise ValueError(
                f"reset_mask: expected an array of {self.num_envs} booleans, one True, got {mask!r}"
            )
        others = {name: option for name, option in options.items() if name != "reset_mask"}
        return mask.tolist(), others

    def _infos(self, rows: shared.SharedRows) -> dict[str, Any]:
        return {"action_mask": rows.action_masks.copy()} if self._with_masks else {}

    def _call(
        self, name: str, args: Sequence[tuple[Any, ...]], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        self._check_open()
        try:
            each = [in_worker.packed((name, args[block], kwargs)) for block in self._blocks]
        # Whatever pickling of a user's object raises.
        except Exception as error:
            raise TypeError(
                f"{name}: expected arguments that can be sent to another process, got one that"
                f" cannot: {in_words(error)}; no environment was called"
            ) from error
        answers = self._ask(in_worker.CALL, each)
        return tuple(
            pickle.loads(one) for answer in answers if answer for one in pickle.loads(answer)
        )

    def _ask(self, command: bytes, given: Sequence[bytes] | None = None) -> list[bytearray | None]:
        """Have every worker do something, each with what it is given, pickled; what they answer."""
        with self._watched():
            self._tell(command, given)
            return self._answers(range(len(self._sockets)))

    def _tell(self, command: bytes, given: Sequence[bytes] | None = None) -> None:
        self._at[:] = self._firsts
        for number, each in enumerate(self._sockets):
            # There is room: of a worker that is told something, all answers have been read.
            os.write(each.fileno(), command)
            if given is not None:
                with self._patient(number):
                    in_worker.send(each, given[number])

    def _answers(self, numbers: range, *, making: bool = False) -> list[bytearray | None]:
        """What these workers answer, in their order, which costs the fewest calls of the system.

        Raises:
            SubEnvironmentError: an environment failed, died or hung.
            EOFError: a worker's connection ended.
        """
        answers: list[bytearray | None] = []
        seen = None
        for number in numbers:
            each = self._sockets[number]
            while True:
                try:
                    # With a limit that signals do not extend, which they would that of `os.read`.
                    kind = each.recv(1)
                except TimeoutError:
                    seen = self._look(range(number, numbers.stop), seen, making)
                else:
                    break
            if kind == b"":
                raise EOFError
            answer = None if kind == in_worker.DONE else self._object(number)
            if answer is not None and kind == in_worker.FAILED:
                failure: Failure = pickle.loads(answer)
                raise SubEnvironmentError(self._advised(failure) if making else failure)
            answers.append(answer)
        return answers

    def _advised(self, failure: Failure) -> Failure:
        """Of a constructor that fails only where there is another copy in its process."""
        index, verb, detail, trace = failure
        if index not in self._firsts:
            detail += "; if a process can have one copy only, give --envs-per-worker 1"
        return index, verb, detail, trace

    def _object(self, number: int) -> bytearray:
        """What follows an answer's first byte."""
        with self._patient(number):
            return in_worker.receive(self._sockets[number])

    @contextlib.contextmanager
    def _patient(self, number: int) -> Iterator[None]:
        """Give a worker the time of a step for every part of a message; then it hangs."""
        each = self._sockets[number]
        each.settimeout(min(self.step_timeout, _LONGEST_SECONDS))
        try:
            yield
        except TimeoutError:
            raise SubEnvironmentError(self._hang([number])) from None
        finally:
            each.settimeout(self._look_seconds)

    # -- When they do not answer -------------------------------------------------------------------

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """After any exception nothing can be trusted any more: end every worker."""
        try:
            yield
        except (EOFError, ConnectionError):
            # The end of a connection comes a moment before that of its process.
            deadline = time.monotonic() + END_SECONDS
            while not (failure := self._death()) and time.monotonic() < deadline:
                time.sleep(0.01)
            failure = failure or (0, "failed", "its connection was lost", "")
            self.close()
            raise SubEnvironmentError(failure) from None
        except BaseException:
            self.close()
            raise

    def _look(
        self, numbers: range, seen: tuple[Any, Any] | None, making: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Look after workers that have not answered for a while.

        Args:
            numbers: of workers whose answers have not been read.
            seen: what the last look returned.
            making: whether they make environments.

        Returns:
            which environment each worker is at, and since when.

        Raises:
            SubEnvironmentError: one has died, or was at one environment for too long.
        """
        if failure := self._death():
            raise SubEnvironmentError(failure)
        now, at = time.monotonic(), self._at.copy()
        since = np.full(len(at), now) if seen is None else np.where(at != seen[0], now, seen[1])
        answered = connection.wait([self._sockets[number] for number in numbers], 0)
        silent = [number for number in numbers if self._sockets[number] not in answered]
        patience = self.step_timeout
        if making:
            # They share the cores, and a constructor may take all the time on one.
            patience *= -(-len(silent) // cores())
        if hung := [number for number in silent if now - since[number] >= patience]:
            slow = _slow_constructor(int(at[hung[0]]), patience)
            raise SubEnvironmentError(slow if making else self._hang(hung))
        return at, since

    def _death(self) -> Failure | None:
        """The first worker that is not alive, and what is known of its end."""
        for number, process in enumerate(self.processes):
            if process.pid is not None and process.exitcode is not None:
                held, detail = self._blocks[number], _cause(process.exitcode)
                if held.stop - held.start > 1:
                    detail += f"; environments {held.start} to {held.stop - 1} were in it"
                return int(self._at[number]), "died", detail, ""
        return None

    def _hang(self, numbers: list[int]) -> Failure:
        others = f", nor did {len(numbers) - 1} others" if len(numbers) > 1 else ""
        detail = f"it did not answer within {self.step_timeout:g} s{others}"
        advice = "raise --step-timeout if a step may take longer"
        return int(self._at[numbers[0]]), "hung", f"{detail}; {advice}", ""

    # -- The end -----------------------------------------------------------------------------------

    def _end(self) -> None:
        """Wait for the workers; kill those that are late, with what they started."""
        started = {n: process for n, process in enumerate(self.processes) if process.pid}
        awaited = {n: in_worker.Patience(self._at[n : n + 1]) for n in started}
        unclosed: list[int] = []
        while awaited:
            connection.wait([started[n].sentinel for n in awaited], END_SECONDS / 8)
            for n, patience in list(awaited.items()):
                if started[n].exitcode is not None:
                    del awaited[n]
                elif patience.is_over(END_SECONDS):
                    del awaited[n]
                    unclosed += self._unclosed(n)
        for process in started.values():
            if process.exitcode != 0 and process.pid:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
        for process in started.values():
            process.join(END_SECONDS)
        if unclosed and self._made:
            first, others = unclosed[0], len(unclosed) - 1
            _log.warning(
                "environment %d was not closed within %g s, and its process was killed%s",
                first,
                END_SECONDS,
                f"; nor were {others} more" if others else "",
            )

    def _unclosed(self, number: int) -> range:
        """Of a worker, the environments that it has not closed."""
        at, held = int(self._at[number]), self._blocks[number]
        return range(~at if at < 0 else held.start, held.stop)


def _close(envs: "weakref.ref[WorkerEnvs]") -> None:
    if (still_there := envs()) is not None:
        still_there.close()


def _start(process: BaseProcess, theirs: socket.socket) -> None:
    """Start a worker; from then on its end of the connection is its alone."""
    with theirs:
        process.start()


def _check_limit(num_workers: int) -> None:
    """Refuse more workers than this process may have descriptors for.

    The fork server would die of it, of which only its traceback would tell.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(os.listdir("/proc/self/fd"))
    needed = held + _DESCRIPTORS * num_workers + _SPARE
    if limit != resource.RLIM_INFINITY and needed > limit:
        raise EnvironmentNotMade(
            f"--vectorization async: {num_workers} processes need {needed} open files, with the"
            f" {held} that are open, and the limit is {limit}; raise it (ulimit -n {needed}), or"
            " --envs-per-worker"
        )


def _packed(makers: Sequence[_Maker]) -> bytes:
    """The makers of environments, as they are sent to a worker."""
    try:
        return in_worker.packed(makers)
    # Whatever pickling of a user's object raises.
    except Exception as error:
        raise EnvironmentNotMade(
            "--vectorization async: what makes the environment cannot be sent to another process:"
            f' {in_words(error)}; register it by name, as "module:Class", with arguments that can'
            " be pickled, or use --vectorization sync"
        ) from error


def _as_type(actions: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Actions as numbers of another type, that hold the same."""
    whole = dtype.kind in "biu"
    if actions.dtype.kind in ("biu" if whole else "biuf"):
        found = actions.astype(dtype)
        if not whole or np.array_equal(found, actions):
            return found
    raise ValueError(f"expected actions of dtype {dtype}, got {actions!r}")


def _slow_constructor(index: int, timeout: float) -> Failure:
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
