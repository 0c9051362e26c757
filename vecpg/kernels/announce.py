"""Log lines that are said once a run. Nothing else depends on whether they were."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_said: set[str] = set()


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
