"""The threads that run kernels, block by block, and torch's own. No kernel's bits depend on them.

It lies in this package because this package imports nothing else of vecpg.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

_pool: ThreadPoolExecutor | None = None
_number: ContextVar[Callable[[], int]] = ContextVar("_number", default=torch.get_num_threads)

# Who is inside `torch_using`, and the number that the first of them found.
_entering = threading.Lock()
_inside = 0
_found = 0

_is_fork = False


def torch_has_one() -> bool:
    """Whether torch has one thread only, since the others stayed in the process that forked this.

    An operation that is given to more may wait for ever.
    """
    return _is_fork


def count() -> int:
    """How many threads kernels run on: torch's number, unless `using` says otherwise.

    Example:
        >>> with using(3):
        ...     count()
        3
    """
    return _number.get()()


@contextmanager
def using(number: int | Callable[[], int]) -> Iterator[None]:
    """Run this thread's kernels on so many threads inside, whatever torch's number is.

    Args:
        number: of threads; or what says, whenever kernels are run, how many there are just then.
    """
    before = _number.set(number if callable(number) else lambda: number)
    try:
        yield
    finally:
        _number.reset(before)


@contextmanager
def torch_using(number: int) -> Iterator[None]:
    """Run this thread's torch operations on so many threads inside.

    With 1, none is waited for that a process made by fork does not have. Torch gives threads to
    come the number that was set last in any: it is as before when nobody is inside any more.

    Example:
        >>> with torch_using(1):
        ...     torch.get_num_threads()
        1
    """
    global _inside, _found
    with _entering:
        before = torch.get_num_threads()
        _found = before if _inside == 0 else _found
        _inside += 1
        torch.set_num_threads(number)
    try:
        yield
    finally:
        with _entering:
            _inside -= 1
            torch.set_num_threads(before if _inside else _found)


def run(task: Callable[[int], Result], blocks: int) -> list[Result]:
    """`task(0)` to `task(blocks - 1)`, on `count()` threads; the results are in this order.

    A thread takes the next block when it has finished one, so a slow block delays nobody. `task`
    must release the interpreter's lock to gain anything. If it raises, or an interrupt comes, no
    further block is begun, and those that were are waited for: they may hold mere addresses, of
    memory that its owner gives back afterwards.

    Example:
        >>> run(lambda block: block * block, 4)
        [0, 1, 4, 9]
    """
    workers = min(blocks, count())
    if workers <= 1:
        return [task(block) for block in range(blocks)]
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="vecpg")
    results: list[Any] = [None] * blocks
    waiting = iter(range(blocks))  # taking the next is one step of the interpreter

    def work() -> None:
        try:
            for block in waiting:
                results[block] = task(block)
        except BaseException:
            _exhaust(waiting)
            raise

    # An interrupt may come before the future of a thread that has begun is known.
    came: list[None] = []
    left: list[None] = []

    def help_out() -> None:
        came.append(None)
        try:
            work()
        finally:
            left.append(None)

    futures: list[Future[None]] = []
    problem: BaseException | None = None
    begun = False
    while True:
        # An interrupt may come at any point: then it is kept, and the waiting goes on.
        try:
            if not begun:
                begun = True
                futures.extend(_pool.submit(help_out) for _ in range(workers - 1))
                work()
            if problem is not None:
                _exhaust(waiting)
                while len(left) < len(came):  # who comes later finds nothing to do
                    time.sleep(0.001)
            wait(futures)
            break
        except BaseException as error:
            problem = error
    if problem is not None:
        raise problem
    for future in futures:
        future.result()
    return results


def _exhaust(waiting: Iterator[int]) -> None:
    for _ in waiting:
        pass


def _forget_others() -> None:
    """A child made by fork has none of its parent's threads but the one that forked."""
    global _pool, _entering, _is_fork
    _pool, _entering, _is_fork = None, threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_others)
