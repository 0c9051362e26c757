"""How kernels are called: with places and numbers, on a range of columns, shared by threads."""

from typing import Any

from torch import Tensor

from vecpg.kernels import threads

# The modes of masks by the numbers that kernels know.
MODES = {"cut": 0, "skip": 1, "decay": 2, "zero": 3}
# Fewer elements than this for each thread are done sooner by one.
THREAD_ELEMENTS = 2**18


def places_of(*given: Tensor | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where matrices lie, 0 where one is not given, and two strides of each."""
    places = tuple([0 if each is None else each.data_ptr() for each in given])
    strides: tuple[int, ...] = ()
    for each in given:
        strides += (0, 1) if each is None else each.stride()
    return places, strides


def tensor_of(factor: float | Tensor) -> Tensor | None:
    """A factor that is given for each element, or None."""
    return factor if isinstance(factor, Tensor) else None


def number_of(factor: float | Tensor) -> float:
    """One that is given as a number, or 1."""
    return 1.0 if isinstance(factor, Tensor) else factor


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
