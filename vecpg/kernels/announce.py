"""Log lines that are said once a run, or of which run they are. Nothing else depends on them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_said: set[str] = set()
_whose: ContextVar[str] = ContextVar("_whose", default="")


def once(log: logging.Logger, message: str, level: int = logging.INFO) -> None:
    """Log `message`, unless it was said before in this run.

    Example:
        >>> log = logging.getLogger("vecpg.example")
        >>> with anew():
        ...     once(log, "a choice")
        ...     "a choice" in _said
        True
    """
    if message not in _said:
        _said.add(message)
        log.log(level, message)


@contextmanager
def anew() -> Iterator[None]:
    """Inside, everything may be said once more: another run has begun in this process."""
    before = _said.copy()
    _said.clear()
    try:
        yield
    finally:
        _said.update(before)


@contextmanager
def of_run(name: str) -> Iterator[None]:
    """Inside, it is the run of this name that speaks: one of several in this process.

    Example:
        >>> with of_run("seed 3"):
        ...     whose()
        'seed 3: '
    """
    before = _whose.set(f"{name}: ")
    try:
        yield
    finally:
        _whose.reset(before)


def whose() -> str:
    """What a log line begins with that speaks of one run; nothing where there is one only."""
    return _whose.get()
