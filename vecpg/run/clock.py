"""Seconds of a run, phase by phase, without compiling and evaluating."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from vecpg.kernels.jit import Compilation


def per_second(count: int, seconds: float) -> float | None:
    """`count / seconds`; None where no time passed: a coarse clock may stand still.

    Example:
        >>> per_second(30, 1.5), per_second(30, 0.0)
        (20.0, None)
    """
    return count / seconds if seconds > 0 else None


class _Marks(NamedTuple):
    """Where a phase began and ended among what a GPU was given, and what was compiled meanwhile."""

    begin: torch.cuda.Event
    end: torch.cuda.Event
    compiled: float

    def seconds(self) -> float:
        return max(0.0, _seconds_between(self.begin, self.end) - self.compiled)


class Lap(NamedTuple):
    """An iteration's phases, in seconds, or as marks that can be read once the GPU is that far.

    end: when it ended, in seconds of the device's own clock, where that is what was read; its
        phases were counted by nobody yet.
    """

    phases: dict[str, float]
    marks: dict[str, _Marks]
    end: float | None = None


class Clock:
    """Seconds spent in each phase, in the iteration at hand and in total, without compiling.

    No time is negative, whatever a machine's clock does. On a GPU a phase is what the device spends
    on it, and the host does not wait for that: it is counted when its lap is.

    Args:
        device: of the run.
        compilation: what is not counted.
        before: the totals that an earlier part of the run came to, as `totals` gave them.
    """

    def __init__(
        self, device: torch.device, compilation: Compilation, before: Mapping[str, float]
    ) -> None:
        self._device, self._compilation = device, compilation
        self._total = dict(before)
        self._earlier = self._total.pop("run", 0.0)
        self._evaluating = self._total.pop("evaluate", 0.0)
        self.start()
        # Of the last iteration.
        self.last: dict[str, float] = {}
        self._marks: dict[str, _Marks] = {}
        # The phase at hand, or the last one; "evaluate" while evaluating.
        self.phase_now = "collect"

    def start(self) -> None:
        """The first reset comes now."""
        self._compiled_before = self._compilation.seconds
        self._started = time.perf_counter()

    def since_start(self) -> float:
        """Seconds since the first reset of the run."""
        compiled = self._compilation.seconds - self._compiled_before
        passed = time.perf_counter() - self._started - compiled
        return self._earlier + max(0.0, passed)

    def without_evaluations(self) -> float:
        """Seconds of whole iterations, without what evaluating took."""
        return max(0.0, self.since_start() - self._evaluating)

    def totals(self) -> dict[str, float]:
        """Seconds of each phase so far, of evaluating, and since the first reset ("run")."""
        return self._total | {"evaluate": self._evaluating, "run": self.since_start()}

    @property
    def compile_seconds(self) -> float:
        """Seconds spent compiling, before the first reset too."""
        return self._compilation.seconds

    def note(self, name: str) -> None:
        """Keep among the totals how many seconds after the first reset this is."""
        self._total[name] = self.since_start()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """What happens inside is no part of an iteration."""
        before, self.phase_now = self.phase_now, "evaluate"
        started = self.since_start()
        yield
        self._evaluating += max(0.0, self.since_start() - started)
        self.phase_now = before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what happens inside to `name`."""
        self.phase_now = name
        if self._device.type == "cuda":
            begin, compiled = self._mark(), self._compilation.seconds
            yield
            self._marks[name] = _Marks(begin, self._mark(), self._compilation.seconds - compiled)
            return
        started = self.since_start()
        yield
        self._count(name, max(0.0, self.since_start() - started))

    def lap(self) -> Lap:
        """The phases since the last lap, which may be counted later."""
        marks, self._marks = self._marks, {}
        return Lap(dict(self.last), marks)

    def count(self, lap: Lap, last: Lap) -> tuple[dict[str, float], float]:
        """What a lap's phases took, and how long before the end of the last lap it ended.

        To be called once for each, in order, when the host has read what the last lap computed.
        """
        if lap.end is not None and last.end is not None:
            for name, seconds in lap.phases.items():
                self._count(name, seconds)
            return dict(self.last), max(0.0, last.end - lap.end)
        if not lap.marks:
            return lap.phases, 0.0
        for name, marks in lap.marks.items():
            self._count(name, marks.seconds())
        ends = [list(each.marks.values())[-1].end for each in (lap, last)]
        return dict(self.last), max(0.0, _seconds_between(*ends))

    def _count(self, name: str, seconds: float) -> None:
        self.last[name] = seconds
        self._total[name] = self._total.get(name, 0.0) + seconds

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def _seconds_between(one: torch.cuda.Event, other: torch.cuda.Event) -> float:
    milliseconds: float = one.elapsed_time(other)
    return milliseconds / 1000
