"""Ranks as torchrun starts them, made quickly: forked from a process that has imported everything.

    ended = in_ranks(2, train_here, settings, folder=folder)

A rank has torchrun's environment variables, a session and a working directory of its own, and the
store of an agent that outlives it: so it may be started again there, with others. `Torchrun` is the
real thing, ten times as slow.
"""

import functools
import importlib
import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent


class Ended(NamedTuple):
    """What came of a rank.

    code:   its exit status; of a signal's number the negative.
    result: what the function returned; None where it did not.
    """

    code: int
    result: Any
    stdout: str
    stderr: str


class Hung(AssertionError):
    """Ranks that had not ended in time; they were killed."""


# -- What forks ----------------------------------------------------------------------------------


class _Forks:
    """A process with all modules and one thread; others are forked from it."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        path = [str(HERE), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self._process = subprocess.Popen(
            # Not as a script: workers of its children would import that.
            [sys.executable, "-c", f"import ranks; ranks._serve({theirs.fileno()})"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._codes = {}

    def _ask(self, *request):
        self._connection.send(request)
        return self._connection.recv()

    def fork(self, environment, folder, function, args):
        """Returns its process id."""
        # In bytes: the connection's own way would share the memory of tensors.
        return self._ask("fork", environment, str(folder), pickle.dumps((function, args)))

    def ended(self):
        """Exit statuses by process id, of those that have ended."""
        self._codes |= self._ask("ended")
        return self._codes


_forks = None


def _fork(*given):
    global _forks
    _forks = _forks or _Forks()
    return _forks.fork(*given)


def _serve(descriptor):
    """Fork as asked, until whoever asks is gone."""
    import environments  # noqa: F401
    import pytest  # noqa: F401

    from vecpg.config import Config
    from vecpg.train import train

    connection = Connection(descriptor)
    # Load the machine code.
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        train(_warm(Config, folder))
    assert len(os.listdir("/proc/self/task")) == 1
    alive = set()
    while True:
        try:
            what, *given = connection.recv()
        except EOFError:
            break
        if what == "fork":
            child = os.fork()
            if child == 0:
                connection.close()
                _be_a_rank(*given)
            alive.add(child)
            connection.send(child)
            continue
        ended = {}
        for child in alive:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                ended[child] = os.waitstatus_to_exitcode(status)
        alive -= ended.keys()
        connection.send(ended)
    for child in alive:
        os.kill(child, signal.SIGKILL)


def _warm(config, folder):
    return config(
        num_envs=4,
        shards=2,
        threads=1,
        max_episode_steps=5,
        total_iterations=2,
        eval_episodes=1,
        target_return=None,
        progress=False,
        out_dir=folder,
    )


def _be_a_rank(environment, folder, called):
    code = 1
    try:
        os.setsid()
        os.environ.update(environment)
        os.chdir(folder)
        name = f"rank {environment.get('RANK', 'none')}"
        for descriptor, stream in ((1, "stdout"), (2, "stderr")):
            file = os.open(f"{name} {stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, descriptor)
        function, args = pickle.loads(called)
        result = function(*args)
        Path(f"{name} result").write_bytes(pickle.dumps(result))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


# -- What torchrun's agent does ------------------------------------------------------------------


class Agent:
    """Starts ranks, again and again if need be, and keeps the store that they share.

    Args:
        folder: their working directory; new.
        max_restarts: what they are told.
        stops_others: whether a rank that fails has the others sent SIGTERM, as those on the same
            machine are; those on another are not.
    """

    def __init__(self, folder, *, max_restarts=0, stops_others=False):
        from torch.distributed import TCPStore

        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.max_restarts, self.stops_others = folder, max_restarts, stops_others
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._starts = 0
        self.pids, self._codes = [], {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill_all()

    def start(self, world_size, function, *args, restarts=0, only=None, **variables):
        """Start ranks; those of before have ended.

        Args:
            world_size: how many; None: one process that torchrun did not start.
            function: what each calls, of a module that can be imported.
            args: what with.
            restarts: what they are told.
            only: the ranks that are started; None: all.
            variables: others than torchrun's.
        """
        self._starts += 1
        self._now = self.folder / f"start {self._starts}"
        self._now.mkdir()
        self._codes = {}
        self.pids = []
        ranks = range(world_size or 1) if only is None else only
        for rank in ranks:
            torchruns = {
                "TORCHELASTIC_RUN_ID": "of a test",
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world_size),
                "TORCHELASTIC_RESTART_COUNT": str(restarts),
                "TORCHELASTIC_MAX_RESTARTS": str(self.max_restarts),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(self._store.port),
            }
            environment = variables if world_size is None else torchruns | variables
            self.pids.append(_fork(environment, self._now, function, args))
        self._names = ["none"] if world_size is None else [str(k) for k in ranks]

    def wait(self, seconds=60.0, but=()):
        """What came of each rank, in their order.

        Args:
            seconds: how long they may take.
            but: ranks that are killed when all others have ended.

        Raises:
            Hung: one had not ended in time.
        """
        deadline = time.monotonic() + seconds
        told = False
        awaited = {pid for k, pid in enumerate(self.pids) if k not in but}
        while not self._all_ended() and not awaited <= self._codes.keys():
            if time.monotonic() > deadline:
                hung = [k for k, pid in enumerate(self.pids) if pid not in self._codes]
                self.kill_all()
                said = "\n".join(f"{k}: {each.stderr}" for k, each in enumerate(self._ended()))
                raise Hung(f"ranks {hung} had not ended after {seconds} s\n{said}")
            if self.stops_others and not told and any(self._codes.values()):
                told = True
                self.signal(signal.SIGTERM)
            time.sleep(0.002)
        self.kill_all()
        return self._ended()

    def run(self, world_size, function, *args, seconds=60.0, **given):
        """`start` and `wait`."""
        self.start(world_size, function, *args, **given)
        return self.wait(seconds)

    def signal(self, signum, rank=None):
        """Send a signal to a rank, or to all that have not ended."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            if pid not in self._codes:
                with suppress(ProcessLookupError):
                    os.kill(pid, signum)

    def kill_all(self):
        """End them, and what they started."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        while not self._all_ended():
            time.sleep(0.002)

    def stderr(self, rank):
        """What a rank has said so far."""
        path = self._now / f"rank {self._names[rank]} stderr"
        return path.read_text() if path.exists() else ""

    def wait_for(self, what, seconds=30.0):
        """Until a condition holds. A rank that ends before is an error."""
        deadline = time.monotonic() + seconds
        while not what():
            said = [self.stderr(rank) for rank in range(len(self.pids))]
            assert not self._some_ended(), said
            assert time.monotonic() < deadline, said
            time.sleep(0.002)

    def _some_ended(self):
        self._all_ended()
        return bool(self._codes)

    def _all_ended(self):
        if self.pids:
            ended = _forks.ended()
            self._codes = {pid: ended[pid] for pid in self.pids if pid in ended}
        return all(pid in self._codes for pid in self.pids)

    def _ended(self):
        found = []
        for pid, name in zip(self.pids, self._names, strict=True):
            result = self._now / f"rank {name} result"
            texts = [self._now / f"rank {name} {stream}" for stream in ("stdout", "stderr")]
            found.append(
                Ended(
                    self._codes[pid],
                    pickle.loads(result.read_bytes()) if result.exists() else None,
                    *(text.read_text() if text.exists() else "" for text in texts),
                )
            )
        return found


def in_ranks(world_size, function, *args, folder, **given):
    """What came of ranks that were started once.

    Args:
        world_size: as `Agent.start`, and likewise the others.
        function: see there.
        args: see there.
        folder: the working directory; new.
        given: see there.
    """
    with Agent(folder) as agent:
        return agent.run(world_size, function, *args, **given)


class Torchrun:
    """The real one, on this machine, with `vecpg train`.

    Args:
        folder: the working directory.
        args: flags of `vecpg train`.
        ranks: how many.
        options: of torchrun.
    """

    def __init__(self, folder, *args, ranks=2, options=()):
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = [open(folder / name, "w+") for name in ("stdout", "stderr")]  # noqa: SIM115
        path = [str(HERE), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), *options, "-m", "vecpg", "train", *args]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            stdout=self._outputs[0],
            stderr=self._outputs[1],
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in [*self.ranks().values(), self.process]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        self.process.wait()
        for each in self._outputs:
            each.close()

    def ranks(self):
        """Those that are there, by their rank."""
        found = {}
        with suppress(psutil.NoSuchProcess):
            for each in psutil.Process(self.process.pid).children():
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
                    if each.status() != psutil.STATUS_ZOMBIE:
                        found[int(each.environ()["RANK"])] = each
        return found

    def wait(self, seconds=120.0):
        """What came of torchrun itself; its output is that of all ranks too."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Hung(self._texts()[1]) from None
        return Ended(code, None, *self._texts())

    def stderr(self):
        """What was said so far."""
        return self._texts()[1]

    def _texts(self):
        return [Path(each.name).read_text() for each in self._outputs]


# -- What ranks do -------------------------------------------------------------------------------


def command(*args):
    """`vecpg train` with these flags."""
    from vecpg.__main__ import main

    main(["train", *args])


def flags(**settings):
    """Settings as the command line has them."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            words += [f"--{flag}", *map(str, value)]
        elif isinstance(value, dict):
            words += [f"--{flag}", json.dumps(value)]
        else:
            words += [f"--{flag}", "none" if value is None else str(value)]
    return words


def train_here(settings, on_iteration=None):
    """Train with these settings, as a script that calls `train` would."""
    import logging

    from vecpg.config import Config
    from vecpg.train import train

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(Config(progress=False, **settings), on_iteration)


def my_rank():
    return int(os.environ.get("RANK", "0"))


def train_and_die(settings, rank, iteration):
    """The process of a rank is killed after so many iterations."""

    def die(row, policy):
        if my_rank() == rank and row["iteration"] == iteration:
            os.kill(os.getpid(), signal.SIGKILL)

    train_here(settings, die)


def train_twice(first, second, rank=None, iteration=None):
    """Two runs, one after the other; the process of a rank is killed in the second."""
    train_here(first)
    train_and_die(second, rank, iteration)


def train_then_die(settings, rank):
    """The process of a rank is killed when all is done."""
    train_here(settings)
    if my_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def train_until_false(settings, rank, iteration):
    """On a rank whoever looks at iterations says that it is enough."""
    train_here(settings, lambda row, _: my_rank() != rank or row["iteration"] < iteration)


def train_and_die_at(settings, rank, name):
    """The process of a rank is killed where a run would call that."""
    from vecpg import begin, train
    from vecpg.distributed import Ranks

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    if my_rank() == rank:
        owner = next(each for each in (train, begin, Ranks) if hasattr(each, name))
        setattr(owner, name, die)
    train_here(settings)


def making_slowly(rank, function, *args):
    """As `function`, where one rank makes its environments later than the others."""
    from vecpg import begin

    real = begin.make_envs

    def make_envs(*given, **named):
        print("making", file=sys.stderr, flush=True)
        if my_rank() == rank:
            time.sleep(2.0)
        return real(*given, **named)

    begin.make_envs = make_envs
    function(*args)


def evaluating_for(seconds, function, *args):
    """As `function`, with evaluations that take so long."""
    from vecpg import train

    real = train.evaluate_in

    def evaluate_in(*given, **named):
        print("evaluating", file=sys.stderr, flush=True)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(0.01)
        return real(*given, **named)

    train.evaluate_in = evaluate_in
    function(*args)


def signalled_after(rank, calls, module, name, *words):
    """As `command`; a rank gets SIGTERM as so many calls of what has that name have returned."""
    from vecpg import distributed

    *path, name = name.split(".")
    where = functools.reduce(getattr, path, importlib.import_module(module))
    real, left = getattr(where, name), [calls]

    def call(*args, **named):
        result = real(*args, **named)
        left[0] -= 1
        if left[0] == 0 and my_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    setattr(where, name, call)
    distributed._SAVING = 60.0
    command(*words)


def saving_slowly(seconds, *words):
    """As `command`; rank 0 takes so long for the checkpoint that it writes at its end."""
    from vecpg.run.checkpoint import Saver
    from vecpg.run.interrupts import Interrupts

    real = Saver.save

    def save(self, state):
        outermost = Interrupts._outermost
        if outermost is not None and outermost._first is not None:
            print("saving", file=sys.stderr, flush=True)
            time.sleep(seconds)
        return real(self, state)

    Saver.save = save
    command(*words)


def failing(rank, name, *words):
    """As `command`; what `vecpg.train` or `vecpg.begin` would call raises; rank None: on all."""
    from vecpg import begin, train

    def fail(*_, **__):
        raise (RuntimeError if name.startswith("make") else OSError)("no more of it")

    if rank in (None, my_rank()):
        setattr(train if hasattr(train, name) else begin, name, fail)
    command(*words)


def combine(settings, added, kept):
    """What `Ranks.combine` gives of the shards of all ranks, each of which has its part of them."""
    from vecpg.config import Config
    from vecpg.distributed import joined

    config = Config(progress=False, **settings)
    with joined(config) as ranks:
        mine = ranks.part_of(config, None).resolved_shards
        first = ranks.rank * mine
        return ranks.combine(added[first : first + mine], kept[first : first + mine])


def failing_and_closing_never(rank, *words):
    """As `command`; a rank fails in its third iteration, and does not come to its end."""
    from vecpg import begin, train

    real, left = train.collect, [3]

    def collect(*args, **named):
        left[0] -= 1
        if left[0] == 0:
            raise OSError("no more of it")
        return real(*args, **named)

    if my_rank() == rank:
        begin._close = lambda envs: time.sleep(600)
        train.collect = collect
    command(*words)


def each_its_own(settings):
    """Train with the settings of the rank, of as many as there are ranks."""
    train_here(settings[my_rank()])


def train_and_count(settings):
    """Train; returns what collectives were called, in order; None stands after each iteration."""
    from torch.distributed import ProcessGroup

    called = []

    def counting(name):
        real = getattr(ProcessGroup, name)

        def call(*args, **named):
            called.append(name)
            return real(*args, **named)

        return call

    for name in COLLECTIVES:
        setattr(ProcessGroup, name, counting(name))
    train_here(settings, lambda row, policy: called.append(None))
    return called


COLLECTIVES = (
    "_allgather_base",
    "_reduce_scatter_base",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "recv",
    "reduce",
    "reduce_scatter",
    "scatter",
    "send",
)


def raising_on_rank_1(env):
    """A wrapper: some steps into the run, the environment raises."""
    return _Raising(env) if my_rank() == 1 else env


def unmade(env):
    """A wrapper that fails."""
    raise ZeroDivisionError("no pole")


class _Raising(gymnasium.Wrapper):
    left = 100

    def step(self, action):
        _Raising.left -= 1
        if _Raising.left == 0:
            raise ZeroDivisionError("the pole fell off")
        return super().step(action)
