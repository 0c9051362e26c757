"""Iterations that a device computes one after the other, and a run that commits them later.

The host need not look at one before the next begins. It reads them in order; what was begun after
the one that ends the run is discarded.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vecpg.adam import Adam
from vecpg.kernels.iteration import Entry
from vecpg.policy import Policy
from vecpg.run.clock import Clock, Lap
from vecpg.run.files import Files
from vecpg.run.interrupts import Interrupts, Told
from vecpg.run.outcomes import Judge, Outcome, Outcomes, Row, Unconfirmed, refuse
from vecpg.run.progress import Progress, Share
from vecpg.run.state import Counters, TrainState


class Ring(Protocol):
    """Iterations of a run that others may share, numbered from 0 on.

    What the last ones left, and what they came to, is kept until it is written over.

    run: which of those that share them it is.
    """

    run: int

    @property
    def launched(self) -> int:
        """How many were begun."""

    def read(self, first: int, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """What iterations came to, and when: the host waits until the last of them is done.

        Returns:
            (count, R, len(Entry)) and (count, R, len(Stamp)) of all R that share them, numbered as
            `vecpg.kernels.iteration` has them.
        """

    def acted(self, run: int, number: int) -> dict[str, Tensor]:
        """A copy of the parameters with which an iteration collected."""

    def restore(self, run: int, number: int, policy: Policy, optimizer: Adam) -> None:
        """Give a policy and its optimizer what an iteration left."""


class RingOutcomes(Outcomes):
    """The iterations of a run of which a ring has those that come next.

    Args:
        state: as the last commit left it.
        clock: of the run.
        files: get a row for each, and checkpoints.
        judge: confirms that the target was reached; None where nothing does.
        ring: has the run's iterations from now on.
        num_envs: of the run.
        is_over: whether a run that is so far, and solved or not, is at its end.
        surely_more: how many further iterations of a run that is so far do not end it, whatever
            they come to, its target apart.
        most: iterations that it will make at most; None where nothing says so.
        goes_on: whether it is to go on after an iteration, by its row; None: nobody asks.
    """

    def __init__(
        self,
        state: TrainState,
        clock: Clock,
        files: Files,
        judge: Judge | None,
        *,
        ring: Ring,
        num_envs: int,
        is_over: Callable[[Counters, bool], bool],
        surely_more: Callable[[Counters], int],
        most: int | None,
        goes_on: Callable[[Row], bool] | None,
    ) -> None:
        super().__init__(state, state.draft(), clock, files.metrics, judge)
        self._saver = files.saver
        self._ring, self._num_envs = ring, num_envs
        self._is_over, self._surely_more, self._most = is_over, surely_more, most
        self._goes_on = goes_on
        # So many of the ring's iterations are committed.
        self.committed = 0
        self.ended = is_over(state.counters, state.stopping.solved)

    @property
    def pending(self) -> int:
        """How many iterations were begun, and may yet be committed."""
        if self.ended:
            return 0
        launched = self._ring.launched
        return (launched if self._most is None else min(launched, self._most)) - self.committed

    def catch_up(
        self, interrupts: Interrupts | Told, progress: Progress | Share, *, full: bool
    ) -> None:
        """Commit what is pending, as far as that is due.

        An iteration that may end the run is read while the next one is computed, and by itself
        where somebody looks at each; others are read together at log lines and saves.

        Args:
            interrupts: reach the confirming evaluation, and `goes_on`.
            progress: shows the last row.
            full: whether the ring has no room for another iteration.
        """
        singly = self._state.stopping.target is not None or self._goes_on is not None
        all_begun = self._most is not None and self._ring.launched >= self._most
        left = 0 if all_begun else 1
        while self.pending > left:
            decides = singly or self.pending > self._surely_more(self._state.counters)
            due = progress.is_due() or self._saver.is_due()
            if not (decides or due or all_begun or full):
                return
            row = self.commit_first(1 if singly else self.pending - left, interrupts)
            if self._goes_on is not None and not self._goes_on(row):
                self.ended = True
            with interrupts.held():
                progress.show(row, last=self.ended)
                if not self.ended:
                    self._saver.save_if_due(self._state)

    def commit_first(self, count: int, interrupts: Interrupts | Told) -> Row:
        """As `commit`, of the first `count` of those that are pending, at least one.

        Where the run ends with one of them it has `ended`, and those after it are left out.

        Raises:
            FloatingPointError: numbers of an iteration are not finite. Those before it are
                committed.
        """
        rows, error = self._take_in(count, self._judge)
        with interrupts.held():
            self._write(rows)
        if error is not None:
            self.ended = True  # what comes after it in the ring follows from nothing
            raise error
        return rows[-1]

    def settle(self) -> None:
        """As `commit`, when the run is stopped: from what would have to be confirmed on it is lost.

        So is all of it where somebody looks at each, who would not see it.

        Raises:
            FloatingPointError: numbers of an iteration are not finite. Those before it are
                committed.
        """
        if not self.pending or self._goes_on is not None:
            return
        rows, error = self._take_in(self.pending, None if self._judge is None else refuse)
        self._write(rows)
        if isinstance(error, FloatingPointError):
            raise error

    def _take_in(self, count: int, judge: Judge | None) -> tuple[list[Row], Exception | None]:
        """Rows up to where the run ends, or to what kept the next one from being taken in.

        Until they are written nothing is committed: whatever interrupts this, it can be done again.
        """
        run = self._ring.run
        entries, stamps = map(torch.from_numpy, self._ring.read(self.committed, count))
        rows: list[Row] = []
        counters, stopping = self._state.counters, self._state.stopping
        last = _lap(stamps[-1, run])
        for k in range(count):
            outcome = self._outcome(counters, entries[k, run], stamps[k, run])
            if count > 1:
                outcome = outcome._replace(acted=self._ring.acted(run, self.committed + k))
            self._draft.stopping = stopping.copy()
            numbers = [each.item() for each in outcome.numbers()]
            try:
                row = self._row(outcome, numbers, last, judge)
            except (FloatingPointError, Unconfirmed) as error:
                self._draft.stopping = stopping
                return rows, error
            rows.append(row)
            stopping = self._draft.stopping
            counters = self._draft.counters = outcome.counters
            if self._is_over(counters, stopping.solved):
                break
        return rows, None

    def _outcome(self, before: Counters, entry: Tensor, stamps: Tensor) -> Outcome:
        counted, rows, episodes = (
            int(entry[each]) for each in (Entry.COUNTED, Entry.ROWS, Entry.EPISODES)
        )
        return Outcome(
            Counters(
                before.iteration + 1,
                before.env_steps + counted,
                before.vector_steps + rows * self._num_envs,
                before.episodes + episodes,
            ),
            episodes,
            (entry[Entry.RETURN_SUM], entry[Entry.RETURN_LOW], entry[Entry.RETURN_HIGH]),
            entry[Entry.COUNTED] / entry[Entry.EPISODES],
            (entry[Entry.POLICY_LOSS], None, entry[Entry.ENTROPY], entry[Entry.GRAD_NORM]),
            {
                "observations, rewards and actions": entry[Entry.ROLLOUT_FINITE],
                "the loss, its gradient and the parameters": entry[Entry.UPDATE_FINITE],
            },
            _lap(stamps),
            None,
        )

    def _write(self, rows: list[Row]) -> None:
        if not rows:
            return
        draft, last = self._draft, self.committed + len(rows) - 1
        self._ring.restore(self._ring.run, last, draft.policy, draft.optimizer)
        self.ended = True  # where a row cannot be written nothing is written after it
        super()._write(rows)
        self.committed = last + 1
        self.ended = self._is_over(draft.counters, draft.stopping.solved)


def _lap(stamps: Tensor) -> Lap:
    """The phases of an iteration. Without a part for the baseline nothing says when it begins."""
    begin, returns, update, end = stamps.tolist()
    returns = returns or update
    phases = {"collect": returns - begin, "returns": update - returns, "update": end - update}
    seconds = {name: max(0, nanoseconds) / 1e9 for name, nanoseconds in phases.items()}
    return Lap(seconds, {}, end / 1e9)
