"""The threads that run kernels, block by block. What kernels compute does not depend on them."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Threads:
    def __init__(self) -> None:
        self.count = cores()
        self.pool: ThreadPoolExecutor | None = None


_threads = _Threads()


def count() -> int:
    """How many threads kernels run on: every core of the process, unless `using` says otherwise.

    Example:
        >>> with using(3):
        ...     count()
        3
    """
    return _threads.count


@contextmanager
def using(number: int) -> Iterator[None]:
    """Run kernels on so many threads inside."""
    before = _threads.count, _threads.pool
    _threads.count, _threads.pool = number, None
    try:
        yield
    finally:
        if _threads.pool is not None:
            _threads.pool.shutdown()
        _threads.count, _threads.pool = before


def run(task: Callable[[int], T], blocks: int) -> list[T]:
    """`task(0)` to `task(blocks - 1)`, on several threads; the results are in this order.

    A thread takes the next block when it has finished one, so a slow block delays nobody. `task`
    must release the interpreter's lock to gain anything.

    Example:
        >>> run(lambda block: block * block, 4)
        [0, 1, 4, 9]
    """
    if min(blocks, count()) == 1:
        return [task(block) for block in range(blocks)]
    if _threads.pool is None:
        _threads.pool = ThreadPoolExecutor(count(), thread_name_prefix="vecpg")
    return list(_threads.pool.map(task, range(blocks)))
