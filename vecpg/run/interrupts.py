"""Signals during a run: the first one stops it, a second one ends the process, SIGUSR1 saves.

What is being collected is dropped at once; an update is finished first.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, ClassVar, Self

from vecpg import signals

# Seconds within which another signal belongs to the first. `timeout` sends SIGTERM to the process
# and to its group; a terminal that closes, SIGHUP once from the shell and once from the system: to
# torchrun, which passes on the first and makes SIGTERM of the second.
_SAME = 0.02
_SAME_HANGUP = 1.0


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP arrived; `signum` says which."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interrupts:
    """Turns the first of SIGINT, SIGTERM and SIGHUP into `Interrupted`.

    A second one ends the process at once, with the exit status of `signals.exit_status`: also while
    the main thread is in machine code, unless that keeps the interpreter's lock.

    A signal that was ignored before stays ignored. Handlers are put back at the end. One within
    another leaves all of this to it. Outside the main thread, where Python delivers no signals,
    nothing is changed.

    Args:
        save: what SIGUSR1 calls, at any time but during `held`, and then at its end. If it fails
            while something is computed, it is called again at the next end of `held`, from where
            its error is no other's. None: SIGUSR1 is left as it was.

    Raises:
        Interrupted: wherever the program is, or at the end of `held`. If it was swallowed there
            (by an `except:`, or in a `__del__`), again at the next end of `held`, or of this.
    """

    _outermost: ClassVar["Interrupts | None"] = None

    def __init__(self, save: Callable[[], None] | None = None) -> None:
        self._save = save
        self._asked_to_save = False
        self._previous: dict[int, Any] = {}
        # Of the outermost:
        self._outer = self
        self._before: dict[int, Any] = {}
        self._held = False
        self._first: int | None = None
        self._raised = False

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._outer = outer = Interrupts._outermost or self
        outer._held = True  # until all is in place
        if outer is self:
            Interrupts._outermost = self
            self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
            self._watch = _Watch(self._handle_all(signals.STOPPING, self._handle))
        if self._save is not None:
            signals.remark = ""  # from now on there is something to resume
            self._handle_all((signal.SIGUSR1,), self._handle_save)
        outer._held = False
        if outer._first is not None:
            self.__exit__(None, None, None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        outer = self._outer
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        if outer is self is Interrupts._outermost:
            self._watch.stop()
            sys.unraisablehook = self._hook
            Interrupts._outermost = None
        # What was raised may come out as another error: of an import, say.
        if outer._first is not None and (error is None or outer._raised):
            if isinstance(error, Interrupted):
                return
            raise Interrupted(outer._first) from error

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a signal wait until the end of this block."""
        outer = self._outer
        outer._held = True
        outer._raised = False  # what fails from here on is no consequence
        try:
            yield
            # Who is stopped saves anyway.
            if self._asked_to_save and self._save is not None and outer._first is None:
                self._save()
                self._asked_to_save = False
        finally:
            outer._held = False
        # Not where an error is on its way: that is what ended the run.
        if outer._first is not None and sys.exception() is None:
            raise Interrupted(outer._first)

    def _handle_all(
        self, signums: Sequence[int], handler: Callable[[int, FrameType | None], None]
    ) -> Sequence[int]:
        """Returns those that are handled now."""
        handled = [signum for signum in signums if not signals.is_left_alone(signum)]
        for signum in handled:
            self._previous[signum] = signal.signal(signum, handler)
            self._outer._before.setdefault(signum, self._previous[signum])
        return handled

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._first is not None:
            return  # the watch knows
        self._first = signum
        if not self._held:
            self._raised = True
            raise Interrupted(signum)

    def _handle_save(self, signum: int, frame: FrameType | None) -> None:
        self._asked_to_save = True
        if not self._outer._held:
            try:
                with self.held():
                    pass
            except Exception:
                return  # `held` saves again; here it would pass for a fault of the environment

    def _unraisable(self, unraisable: Any) -> None:
        """Where an exception cannot go on from, Python prints it; this one is raised again."""
        if not isinstance(unraisable.exc_value, Interrupted):
            self._hook(unraisable)


class Told:
    """What `Interrupts` is to a run in another thread than the main one, where no signal comes.

    The main thread tells it, and it answers at the next end of `held`.

    Args:
        save: what it calls when it is asked to save.
    """

    def __init__(self, save: Callable[[], object]) -> None:
        self._save = save
        self._asked_to_save = False
        self._signum: int | None = None

    def stop(self, signum: int) -> None:
        """Have `Interrupted` raised."""
        self._signum = signum

    def ask_to_save(self) -> None:
        """Have the run saved."""
        self._asked_to_save = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """At the end of this block it answers."""
        yield
        if self._asked_to_save and self._signum is None:
            self._save()
            self._asked_to_save = False
        if self._signum is not None and sys.exception() is None:
            raise Interrupted(self._signum)


class _Watch:
    """A thread that ends the process at the second signal, whatever the main thread is doing.

    Args:
        signums: which count. They have handlers.
    """

    def __init__(self, signums: Sequence[int]) -> None:
        self._signums = signums
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        # Python's own handler, in C, writes the number of each signal there.
        self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="vecpg-signals", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        signal.set_wakeup_fd(self._before)
        os.write(self._writing, b"\0")
        self._thread.join()
        os.close(self._writing)
        os.close(self._reading)

    def _run(self) -> None:
        first: float | None = None
        same = _SAME
        while signum := os.read(self._reading, 1)[0]:
            now = time.monotonic()
            if signum not in self._signums:
                continue
            if first is None:
                first = now
                same = _SAME_HANGUP if signum == signal.SIGHUP else _SAME
            elif now - first > (_SAME_HANGUP if signum == signal.SIGHUP else same):
                signals.end_process(signum)


# Of each thread that forks, what it had blocked before.
_masks = threading.local()


def _before_fork() -> None:
    """A signal to the child must not reach it while it still has its parent's handlers and pipe."""
    if Interrupts._outermost is not None:
        stopping = (*signals.STOPPING, signal.SIGUSR1)
        _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, stopping)


def _after_fork() -> None:
    if Interrupts._outermost is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _forget() -> None:
    """A child made by fork has neither its parent's thread nor a run to save."""
    outermost = Interrupts._outermost
    if outermost is not None:
        Interrupts._outermost = None
        signal.set_wakeup_fd(-1)
        sys.unraisablehook = outermost._hook
        for signum, handler in outermost._before.items():
            # What answers for a command does not answer for what an environment starts.
            own = handler in signals.HANDLERS
            signal.signal(signum, signal.SIG_DFL if own else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_forget)
