"""Signals from the first import to the last line, as a terminal and as programs send them."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
from conftest import ROOT

from vecpg import signals

# Runs `vecpg ARGS` with a pause in one phase. `during` is a moment of it that a signal interrupts;
# `at` one that it has to wait for. What is saved is written to a file, whatever a checkpoint is.
PROGRAM = """
import fcntl, importlib, os, sys, termios, time

if os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
how, module, name, call, *args = sys.argv[1:]

def pause():
    with open("here.tmp", "w") as file:
        file.write("paused")
    os.rename("here.tmp", "here")
    if how == "computing":  # no byte of Python's runs meanwhile
        import hashlib
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    if how == "during":
        time.sleep(60)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        time.sleep(0.01)

class Importing:
    def find_spec(self, name, path, target=None):
        if name == module:
            pause()

if how == "importing":
    how = "during"
    sys.meta_path.insert(0, Importing())
else:
    from vecpg.run.checkpoint import Saver
    save = Saver.save
    def noted(saver, state):
        folder = save(saver, state)
        with open("saved", "a") as file:
            file.write(f"{state.counters.iteration}\\n")
        return folder
    Saver.save = noted
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for each in path:
        owner = getattr(owner, each)
    real, calls = getattr(owner, name), []
    def paused(*args, **kwargs):
        calls.append(name)
        if len(calls) == int(call):
            pause()
        return real(*args, **kwargs)
    setattr(owner, name, paused)

from vecpg.__main__ import main
main(args)
"""

# A worker waits here in its constructor, or wherever else it is called.
SLOW = """
import time
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class Slow(CartPoleEnv):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        open("here", "w").close()
        time.sleep(60)

gymnasium.register("Slow-v0", Slow, max_episode_steps=9)
"""

# What pauses, whether a signal has to wait for it, in the how-manieth call; how many iterations are
# then saved (None: there is no run yet).
PHASES = {
    "importing": ("importing", "torch", "", 0, None),
    "compiling": ("during", "vecpg.begin", "prepare_advantages", 1, None),
    "collecting": ("during", "vecpg.train", "collect", 2, 1),
    "updating": ("at", "vecpg.train", "update", 2, 2),
    "evaluating": ("during", "vecpg.train", "evaluate_in", 1, 3),
    "saving": ("at", "vecpg.run.checkpoint", "Saver.save", 2, 3),
    "closing": ("at", "vecpg.run.metrics", "Metrics.close", 1, 3),
    "finished": ("during", "vecpg.cli", "how_to_call", 1, 3),
}
TRAIN = ["train", "--num-envs", "2", "--total-iterations", "3", "--eval-episodes", "2"]


class Child:
    """A process in a session of its own; with a terminal, or with pipes and no terminal at all."""

    def __init__(self, cwd, phase, *args, terminal):
        cwd.mkdir()
        self.cwd, self.terminal = cwd, None
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        streams["stderr"] = subprocess.STDOUT
        if terminal:
            self.terminal, slave = pty.openpty()
            streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, phase), *args],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            start_new_session=True,
            **streams,
        )
        if terminal:
            os.close(slave)
            os.set_blocking(self.terminal, False)
        self.text = b""

    def reach(self):
        """Until it pauses."""
        while not (self.cwd / "here").exists():
            assert self.process.poll() is None, self.read()
            self.read()
            time.sleep(0.01)

    def read(self):
        with suppress(OSError):  # nothing is there, or nobody any more
            if self.terminal is not None:
                self.text += os.read(self.terminal, 65536)
        return self.text.decode()

    def stop(self, signum):
        """As a terminal does for Ctrl-C, or as a program sends a signal."""
        if self.terminal is not None and signum == signal.SIGINT:
            os.write(self.terminal, b"\x03")
        else:
            self.process.send_signal(signum)

    def end(self):
        """Its status, what it said, and the iterations that it saved."""
        if self.terminal is None:
            self.text, _ = self.process.communicate(timeout=60)
        else:
            while self.process.poll() is None:
                self.read()
                time.sleep(0.01)
        said = self.read()
        saved = (self.cwd / "saved").read_text().split() if (self.cwd / "saved").exists() else []
        assert not left_of(self.process.pid), said
        assert "Traceback" not in said, said
        assert "warn" not in said.lower(), said
        return self.process.returncode, said, list(map(int, saved))

    def forget(self):
        """Nothing is left of it, whatever the test came to."""
        for process in left_of(self.process.pid, seconds=0):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        if self.terminal is not None:
            with suppress(OSError):
                os.close(self.terminal)


@pytest.fixture
def start():
    """Make children, of which nothing is left afterwards."""
    children = []

    def make(*args, **kwargs):
        children.append(Child(*args, **kwargs))
        return children[-1]

    yield make
    for child in children:
        child.forget()


def left_of(session, seconds=5):
    """Its processes, but for those that end within some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        left = []
        for process in psutil.process_iter():
            with suppress(ProcessLookupError):
                if os.getsid(process.pid) == session:
                    left.append(process)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


@pytest.fixture
def handlers():
    """Put back afterwards."""
    before = {signum: signal.getsignal(signum) for signum in (*signals.STOPPING, signal.SIGUSR1)}
    yield before
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def ended(monkeypatch):
    """The statuses with which a signal would have ended this process, and what it said."""
    found = []
    monkeypatch.setattr(os, "_exit", found.append)
    monkeypatch.setattr(os, "write", lambda number, text: found.append((number, text.decode())))
    return found


@pytest.mark.parametrize("signum", signals.STOPPING)
def test_a_signal_is_answered_at_once_with_one_line(handlers, ended, monkeypatch, signum):
    monkeypatch.setattr(signals, "remark", "; nothing to resume")
    monkeypatch.setattr(signals, "said", False)
    signals.answer_at_once()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert ended == []
    os.kill(os.getpid(), signum)
    status = 130 if signum == signal.SIGINT else 143
    assert ended == [(2, f"stopped by {signum.name}; nothing to resume\n"), status]
    signals.said = True
    os.kill(os.getpid(), signum)
    assert ended[2:] == [status]


def test_a_line_that_cannot_be_written_changes_no_status(handlers, ended, monkeypatch):
    def broken(number, text):
        raise OSError("nobody reads")

    monkeypatch.setattr(os, "write", broken)
    signals.answer_at_once()
    os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [143]


def test_what_is_ignored_or_handled_by_others_is_left_alone(handlers, ended):
    for signum in handlers:
        signal.signal(signum, signal.SIG_IGN)
    signals.answer_at_once()
    for signum in handlers:
        assert signal.getsignal(signum) is signal.SIG_IGN


def test_as_a_library_it_changes_no_handler():
    import vecpg.__main__
    import vecpg.cli
    import vecpg.train

    assert vecpg.train
    assert vecpg.cli
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        assert signal.getsignal(signum) is signal.SIG_DFL


def test_next_to_nothing_is_imported_before_signals_are_answered():
    """Until then Ctrl-C would be a traceback."""
    program = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import vecpg.__main__\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "signal" in out.split()
    heavy = {"typing", "re", "inspect", "dataclasses", "logging", "threading", "tyro", "vecpg.cli"}
    assert heavy & set(out.split()) == set()


def test_a_run_in_another_thread_changes_no_handler(handlers, tmp_path):
    """As in a notebook's."""
    from vecpg.config import Config
    from vecpg.train import train

    done = []
    config = Config(num_envs=2, total_iterations=1, eval_episodes=1, out_dir=str(tmp_path))
    thread = threading.Thread(target=lambda: done.append(train(config)))
    thread.start()
    thread.join()
    assert done[0].summary["iterations"] == 1
    assert {signum: signal.getsignal(signum) for signum in handlers} == handlers


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_in_a_terminal_and_without_one(start, tmp_path, phase):
    """One is sent Ctrl-C by its terminal, the other SIGTERM."""
    *how, saved = PHASES[phase]
    children = {
        signal.SIGINT: start(tmp_path / "terminal", how, *TRAIN, terminal=True),
        signal.SIGTERM: start(tmp_path / "none", how, *TRAIN, terminal=False),
    }
    for child in children.values():
        child.reach()
    for signum, child in children.items():
        child.stop(signum)
    for signum, child in children.items():
        status, said, iterations = child.end()
        assert status == signals.exit_status(signum), said
        words = f"stopped by {signum.name}" + ("; nothing to resume" if saved is None else "")
        assert said.splitlines()[-1].endswith(words), said
        assert said.count("stopped by") == 1
        if saved is None:
            assert not list(child.cwd.glob("runs/*"))
        else:
            assert iterations[-1] == saved
            (rows,) = child.cwd.glob("runs/*/metrics.jsonl")
            assert len(rows.read_text().splitlines()) == saved


@pytest.mark.slow
def test_ctrl_c_while_workers_are_made_leaves_none(start, tmp_path):
    how = ("at", "vecpg.cli", "how_to_call", 1)
    args = ["--env-id", "slow:Slow-v0", "--vectorization", "async"]
    for terminal, signum in ((True, signal.SIGINT), (False, signal.SIGTERM)):
        cwd = tmp_path / signum.name
        child = start(cwd, how, *TRAIN, *args, terminal=terminal)
        (cwd / "slow.py").write_text(SLOW)
        child.reach()
        child.stop(signum)
        status, said, _ = child.end()
        assert status == signals.exit_status(signum)
        assert said.splitlines()[-1].endswith(f"stopped by {signum.name}; nothing to resume")


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once_with_its_workers(start, tmp_path):
    how = ("computing", "vecpg.train", "update", 2)
    args = ["--vectorization", "async"]
    children = {
        signal.SIGINT: start(tmp_path / "terminal", how, *TRAIN, *args, terminal=True),
        signal.SIGTERM: start(tmp_path / "none", how, *TRAIN, *args, terminal=False),
    }
    for signum, child in children.items():
        child.reach()
        child.stop(signum)
        time.sleep(0.3)
        assert child.process.poll() is None
        child.stop(signum)
    for signum, child in children.items():
        status, _, saved = child.end()
        assert status == signals.exit_status(signum)
        assert saved == [0]


@pytest.mark.slow
def test_a_terminal_that_closes_has_the_run_saved(start, tmp_path):
    """SIGHUP comes from the system; what is written to the terminal from then on is an error."""
    child = start(tmp_path / "run", PHASES["updating"][:4], *TRAIN, terminal=True)
    child.reach()
    child.process.send_signal(signal.SIGHUP)  # as a shell does for its jobs
    time.sleep(0.05)
    os.close(child.terminal)
    child.terminal = os.open(os.devnull, os.O_RDONLY)
    status, _, saved = child.end()
    assert (status, saved[-1]) == (143, 2)


@pytest.mark.slow
def test_what_is_ignored_from_the_start_stays_so_and_sigusr1_saves(start, tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        child = start(tmp_path / "run", ("at", "vecpg.train", "collect", 2), *TRAIN, terminal=False)
    finally:
        signal.signal(signal.SIGHUP, before)
    child.reach()
    child.stop(signal.SIGHUP)
    child.stop(signal.SIGUSR1)
    status, said, saved = child.end()
    assert status == 0, said
    assert saved == [0, 1, 3]


def test_a_signal_before_the_ranks_have_met_is_a_failure_to_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setattr(signals, "together", False)
    assert signals.exit_status(signal.SIGTERM) == 143  # else the others would wait for this one
    monkeypatch.setattr(signals, "together", True)
    assert signals.exit_status(signal.SIGTERM) == 0
