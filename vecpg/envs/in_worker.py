"""What runs in a worker: copies of an environment, stepped one after the other when it is told.

Whatever fails is reported as plain data, of the copy that the worker is at.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import CloudpickleWrapper
from numpy.typing import NDArray

from vecpg.envs.answers import (
    check_observation,
    read_action_mask,
    read_answer,
    with_typed_observations,
)
from vecpg.envs.errors import SubEnvironmentError, close_env
from vecpg.envs.shared import SharedRows, positions

# How long a worker may take for each environment that it closes, before it is killed.
END_SECONDS = 2.0
# To the whole terminal or job; the main process answers them.
ANSWERED_ABOVE = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# What a worker is told, in one byte; the end of the connection has it close. What a command takes
# follows as an object, but for a step: that is in the shared memory.
STEP, RESET, CALL, SHARE = b"s", b"r", b"c", b"m"
# What it is sent first, with the shared memory.
MEMORY = b"o"
# What it answers: that it is done, or an object follows: its answer, or a `Failure`.
DONE, ANSWER, FAILED = b"d", b"a", b"f"
# How many bytes follow.
_LENGTH = struct.Struct("!Q")

# The index of the environment, a verb, the detail, and its traceback.
Failure = tuple[int, str, str, str]


class Known(NamedTuple):
    """What the main process has to know of the environments."""

    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    metadata: dict[str, Any]
    render_mode: str | None


def check_equal(expected: Known, got: Any) -> None:
    """Refuse an environment, or what is known of one, that has other spaces.

    Raises:
        ValueError: with both.

    Example:
        >>> one, other = (Known(spaces.Discrete(n), spaces.Discrete(2), {}, None) for n in (3, 4))
        >>> check_equal(one, other)
        Traceback (most recent call last):
            ...
        ValueError: expected the observation_space of every copy to be Discrete(3), got Discrete(4)
    """
    for name in ("observation_space", "action_space"):
        wanted, found = getattr(expected, name), getattr(got, name)
        if found != wanted:
            raise ValueError(f"expected the {name} of every copy to be {wanted}, got {found}")


def packed(value: Any) -> bytes:
    """Almost anything, functions and classes of a script's own included, as it travels.

    Example:
        >>> unpacked(packed(lambda: 3))()
        3
    """
    return pickle.dumps(CloudpickleWrapper(lambda: value))


def unpacked(data: bytes | bytearray) -> Any:
    """What was `packed`."""
    return pickle.loads(data)()


def send(end: socket.socket, data: bytes) -> None:
    """Send an object that has been pickled.

    Raises:
        TimeoutError: `end` has a limit, and no part could be sent within it.
    """
    for part in (_LENGTH.pack(len(data)), data):
        rest = memoryview(part)
        while rest:
            rest = rest[end.send(rest) :]


def receive(end: socket.socket) -> bytearray:
    """What `send` sent at the other end.

    Raises:
        EOFError: the connection ended before all had come.
        TimeoutError: `end` has a limit, and no part came within it.

    Example:
        >>> ours, theirs = socket.socketpair()
        >>> send(ours, b"some bytes")
        >>> receive(theirs)
        bytearray(b'some bytes')
        >>> ours.close(), theirs.close()
        (None, None)
    """
    (length,) = _LENGTH.unpack(_exactly(end, _LENGTH.size))
    return _exactly(end, length)


def _exactly(end: socket.socket, length: int) -> bytearray:
    found = bytearray(length)
    rest = memoryview(found)
    while rest:
        came = end.recv_into(rest)
        if came == 0:
            raise EOFError
        rest = rest[came:]
    return found


def work(end: socket.socket, makers: bytes, first: int, number: int, of: int) -> None:
    """Say that it has begun, make the environments, and do what it is told until it is to close.

    Args:
        end: of the connection to the main process, which has sent the shared memory over it.
        makers: a list of what makes an environment each, packed.
        first: the index of the first of them.
        number: the index of this worker.
        of: how many workers there are.
    """
    _settle()
    end.settimeout(None)  # whatever a script has made the default
    try:
        _, memory, *_ = socket.recv_fds(end, len(MEMORY), 1)
    except ConnectionError:
        memory = []
    if not memory:  # the main process has ended, or has closed what it was making
        return
    copies = _Copies(makers, first, memory[0], number, of)
    threading.Thread(target=_follow, args=(copies.at,), daemon=True).start()
    # The end of the main process is the end of this one.
    with contextlib.suppress(ConnectionError):
        end.send(DONE)
        copies.reply(end, copies.make, SubEnvironmentError.raised_in_making)
        answers = {
            STEP: copies.step,
            RESET: lambda: copies.reset(*pickle.loads(receive(end))),
            CALL: lambda: copies.call(*unpacked(receive(end))),
            SHARE: lambda: copies.share(*pickle.loads(receive(end))),
        }
        while command := end.recv(1):
            copies.reply(end, answers[command], SubEnvironmentError.raised)
    copies.close()


def _settle() -> None:
    """Leave the terminal's signals to the main process."""
    # With what an environment starts it can be ended as a group, to which no terminal sends.
    os.setpgid(0, 0)
    # A job's signals come to every process. A handler, since what is started here would inherit
    # that they are ignored.
    for signum in (*ANSWERED_ABOVE, signal.SIGTERM):
        signal.signal(signum, _leave_it)
    # As they are in the fork server.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ANSWERED_ABOVE)


def _leave_it(signum: int, frame: Any) -> None:
    pass


class Patience:
    """With a worker that is to close its environments: for each, and to begin, so many seconds.

    Args:
        position: (1,) int64, as `shared.positions` has it.
    """

    def __init__(self, position: NDArray[np.int64]) -> None:
        self.position, self.seen, self.since = position, 0, time.monotonic()

    def is_over(self, seconds: float) -> bool:
        """Whether it has taken longer. Only who asks now and then sees it move on."""
        now, at = time.monotonic(), int(self.position[0])
        if at < 0 and at != self.seen:
            self.seen, self.since = at, now
        return now - self.since >= seconds


def _follow(position: NDArray[np.int64]) -> None:
    """End a little later than the main process, whatever the environments do."""
    main = multiprocessing.parent_process()
    if main is not None:
        main.join()
        patience = Patience(position)
        while not patience.is_over(END_SECONDS):
            time.sleep(END_SECONDS / 8)
        os.killpg(0, signal.SIGKILL)


class _Copies:
    """The environments of one worker, in NEXT_STEP mode.

    Args:
        makers: a list of what makes an environment each, packed.
        first: the index of the first of them.
        memory: as `shared.create` gives it.
        number: the index of this worker.
        of: how many workers there are.
    """

    def __init__(self, makers: bytes, first: int, memory: int, number: int, of: int) -> None:
        self.makers, self.first = makers, first
        self.memory, self.of = memory, of
        self.envs: list[gymnasium.Env[Any, Any]] = []
        self.ended: list[bool] = []
        # Of this worker alone: which environment it is at, for whoever waits for it.
        self.at = positions(memory, of)[number : number + 1]

    def reply(
        self,
        end: socket.socket,
        work: Callable[[], bytes | None],
        failed: Callable[[int, BaseException], SubEnvironmentError],
    ) -> None:
        """Do the work, and tell the main process what came of it."""
        try:
            answer = work()
            kind = DONE if answer is None else ANSWER
        # Whatever an environment raises: as plain data, since it might not travel itself.
        except BaseException as error:
            failure: Failure = failed(int(self.at[0]), error).args[0]
            kind, answer = FAILED, pickle.dumps(failure)
        end.send(kind)
        if answer is not None:
            send(end, answer)

    def make(self) -> bytes:
        """Make the environments; what is known of them."""
        for index, make in enumerate(unpacked(self.makers), self.first):
            self.at[0] = index
            env = with_typed_observations(make())
            self.envs.append(env)
            if index == self.first:
                known = Known(
                    env.observation_space, env.action_space, dict(env.metadata), env.render_mode
                )
            check_equal(known, env)
        self.ended = [False] * len(self.envs)
        return packed(known)

    def share(self, num_envs: int, flags: int) -> None:
        """Find the rows of all environments in the memory, and keep this worker's."""
        env = self.envs[0]
        self.observation_space, self.action_space = env.observation_space, env.action_space
        rows = SharedRows(
            self.memory, self.of, num_envs, self.observation_space, self.action_space, flags
        )
        os.close(self.memory)
        own = slice(self.first, self.first + len(self.envs))
        self.actions, self.obs, self.rewards = rows.actions[own], rows.obs[own], rows.rewards[own]
        self.terminations, self.truncations = rows.terminations[own], rows.truncations[own]
        self.masks = rows.action_masks[own] if flags else None

    def reset(
        self, seeds: list[int | None], options: dict[str, Any] | None, chosen: list[bool]
    ) -> None:
        """Reset those that are chosen, each with its seed."""
        for k, env in enumerate(self.envs):
            self.at[0] = self.first + k
            if chosen[k]:
                obs, info = env.reset(seed=seeds[k], options=options)
                self.ended[k] = False
                self._keep(k, obs, info)

    def step(self) -> None:
        """Step each, or reset it where it has ended; its action is then ignored."""
        # An environment may keep its action, or write into it.
        actions = self.actions.copy()
        at, first, ended = self.at, self.first, self.ended
        rewards = [0.0] * len(ended)
        truncations = [False] * len(ended)
        terminations = truncations.copy()
        for k, env in enumerate(self.envs):
            at[0] = first + k
            if ended[k]:
                obs, info = env.reset()
                ended[k] = False
            else:
                obs, reward, terminated, truncated, info = env.step(actions[k])
                rewards[k], terminated, truncated = read_answer(reward, terminated, truncated)
                terminations[k], truncations[k] = terminated, truncated
                ended[k] = terminated or truncated
            self._keep(k, obs, info)
        self.rewards[:], self.terminations[:], self.truncations[:] = (
            rewards,
            terminations,
            truncations,
        )

    def call(self, name: str, args: list[tuple[Any, ...]], kwargs: dict[str, Any]) -> bytes:
        """Of each environment an attribute, or what it returns if called with its arguments."""
        answers = []
        for k, env in enumerate(self.envs):
            self.at[0] = self.first + k
            found = env.get_wrapper_attr(name)
            answers.append(pickle.dumps(found(*args[k], **kwargs) if callable(found) else found))
        return pickle.dumps(answers)

    def close(self) -> None:
        """Close the environments; one that cannot be closed is named."""
        for index, env in enumerate(self.envs, self.first):
            self.at[0] = ~index
            close_env(env, index)
        self.at[0] = ~(self.first + len(self.envs))

    def _keep(self, k: int, obs: Any, info: Any) -> None:
        """Write an observation, and a mask, where the main process finds them."""
        row = self.obs[k]
        if type(obs) is not np.ndarray or obs.dtype != row.dtype or obs.shape != row.shape:
            check_observation(obs, self.observation_space)
        self.obs[k] = obs
        if not isinstance(info, dict):
            raise TypeError(f"expected an info that is a dict, got {info!r}")
        if self.masks is not None:
            # After an end no action is taken.
            self.masks[k] = self.ended[k] or read_action_mask(info, self.action_space)
