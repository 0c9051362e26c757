"""Runs in threads of their own that share iterations: whoever comes first launches one for all."""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vecpg.adam import Adam
from vecpg.policy import Policy


class Lane:
    """One run's part in the iterations of several, which it sees as if they were its own.

    A run that is behind the others finds its next iterations launched; one that is ahead waits
    where the ring has no room, until those behind release what they have read.

    Args:
        ring: a `vecpg.fused.Fused` of several runs, all loaded, none of whose iterations was
            launched.
        run: which of them this is.
        lanes: of all of them, to which this one is added.
        turn: is notified where one of them moves; its lock is theirs.
    """

    def __init__(self, ring: Any, run: int, lanes: list["Lane"], turn: threading.Condition) -> None:
        self._ring, self.run, self._lanes, self._turn = ring, run, lanes, turn
        self._slots: int = ring.room
        self.launched = 0
        self._released = 0
        lanes.append(self)

    def __str__(self) -> str:
        return str(self._ring)

    @property
    def room(self) -> int:
        """How many iterations this run may begin before it has to release some."""
        return self._slots - (self.launched - self._released)

    def iterate(self) -> None:
        """Begin the run's next iteration."""
        with self._turn:
            while self._ring.launched == self.launched:
                if self._ring.room:
                    self._ring.iterate()
                else:
                    self._turn.wait()
            self.launched += 1

    def read(self, first: int, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """As `Fused.read`."""
        with self._turn:
            entries, stamps = self._ring.read(first, count)
            return entries, stamps

    def acted(self, run: int, number: int) -> dict[str, Tensor]:
        """As `Fused.acted`."""
        with self._turn:
            found: dict[str, Tensor] = self._ring.acted(run, number)
            return found

    def restore(self, run: int, number: int, policy: Policy, optimizer: Adam) -> None:
        """As `Fused.restore`."""
        with self._turn:
            self._ring.restore(run, number, policy, optimizer)

    def release(self, number: int) -> None:
        """This run no longer needs iterations up to this one."""
        with self._turn:
            self._released = number + 1
            self._let_go()

    def leave(self) -> None:
        """This run needs nothing any more."""
        with self._turn:
            if self in self._lanes:
                self._lanes.remove(self)
                self._let_go()

    def _let_go(self) -> None:
        if self._lanes:
            self._ring.release(min(each._released for each in self._lanes) - 1)
        self._turn.notify_all()


def share(ring: Any, runs: int) -> list[Lane]:
    """A lane for each of a ring's runs."""
    lanes: list[Lane] = []
    turn = threading.Condition()
    return [Lane(ring, run, lanes, turn) for run in range(runs)]
