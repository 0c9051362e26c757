"""A range of columns, shared by threads; and the modes of masks by the numbers kernels know."""

from typing import Any

from vecpg.kernels import threads

MODES = {"cut": 0, "skip": 1, "decay": 2, "zero": 3}
# Fewer elements than this for each thread are done sooner by one.
THREAD_ELEMENTS = 2**18


def in_threads(
    kernel: Any,
    options: tuple[Any, ...],
    count: int,
    tail: tuple[Any, ...],
    size: int,
    least: int = 1,
) -> None:
    """Run a kernel over 0 to `count`, shared by threads where that pays, `least` or more to each.

    A result does not depend on how the range is split.
    """
    parts = size // THREAD_ELEMENTS
    if parts > 1:
        parts = min(parts, count // least, threads.count())
    if parts <= 1:
        kernel(*options, 0, count, *tail)
        return
    bounds = [count * i // parts for i in range(parts + 1)]
    threads.run(lambda i: kernel(*options, bounds[i], bounds[i + 1], *tail), parts)
