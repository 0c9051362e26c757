"""What iterations came to, from when they were computed in a draft until that is the state.

On a GPU nothing has to wait in between: the numbers stay there, and the host reads those of many
iterations at once.
"""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vecpg.evaluate import EvalResult
from vecpg.policy import Policy
from vecpg.run.clock import Clock, Lap, per_second
from vecpg.run.files import Elsewhere
from vecpg.run.interrupts import Interrupts, Told
from vecpg.run.metrics import Metrics
from vecpg.run.state import Counters, TrainState
from vecpg.run.stopping import Returned

Row = dict[str, float | None]
# The greedy evaluation of the policy with which an iteration, of this number, began.
Judge = Callable[[Policy, int], EvalResult]

# Bytes that are kept for iterations that were not read, and of one at least, its parameters beside.
_MOST_KEPT = 2**28
_KEPT_AT_LEAST = 2**14


class Outcome(NamedTuple):
    """What an iteration came to.

    counters: of the run, after it.
    episodes: how many ended in it.
    returns:  sum, smallest and largest of their returns; tensors without dimensions, as all here.
    length:   their mean length.
    losses:   the policy's loss, V's (None without a critic), the entropy, the gradient's norm.
    finite:   of what is named whether all of it is finite; nothing where that was looked at.
    lap:      of the clock.
    acted:    the parameters of the policy that collected; None: the state has them still.
    """

    counters: Counters
    episodes: int
    returns: tuple[Tensor, Tensor, Tensor]
    length: Tensor
    losses: tuple[Tensor, Tensor | None, Tensor, Tensor]
    finite: dict[str, Tensor]
    lap: Lap
    acted: dict[str, Tensor] | None

    def numbers(self) -> list[Tensor]:
        """All that the host has to read."""
        losses = [each for each in self.losses if each is not None]
        return [*self.returns, self.length, *losses, *self.finite.values()]


class Outcomes:
    """The iterations since the last commit; the draft is what the last of them left.

    Args:
        state: as the last commit left it.
        draft: in which iterations are computed.
        clock: of the run.
        metrics: gets a row for each.
        judge: confirms that the target was reached; None where nothing does.
    """

    def __init__(
        self,
        state: TrainState,
        draft: TrainState,
        clock: Clock,
        metrics: Metrics | Elsewhere,
        judge: Judge | None,
    ) -> None:
        self._state, self._draft, self._clock, self._metrics = state, draft, clock, metrics
        self._judge = judge
        self._pending: list[Outcome] = []
        of_parameters: int = sum(each.nbytes for each in state.policy.state_dict().values())
        self._bytes = _KEPT_AT_LEAST + of_parameters

    @property
    def full(self) -> bool:
        """Whether so many are there that they have to be read."""
        return len(self._pending) * self._bytes >= _MOST_KEPT

    def add(self, outcome: Outcome) -> None:
        """One iteration more."""
        self._pending.append(outcome)

    def commit(self, interrupts: Interrupts | Told) -> Row:
        """Make the draft the state, and write a row for each iteration; the host waits here, once.

        There is at least one.

        Args:
            interrupts: reach the confirming evaluation, and not the rest.

        Returns:
            the row of the last of them.

        Raises:
            FloatingPointError: numbers of an iteration are not finite. State and rows are those of
                the last commit.
        """
        rows = self._rows(self._judge)
        with interrupts.held():
            self._write(rows)
        return rows[-1]

    def settle(self) -> None:
        """As `commit`, when the run is stopped: what would have to be confirmed is left out.

        So is all of it where the draft has gone on, and what it is now is no iteration's.
        """
        if not self._pending or self._pending[-1].counters != self._draft.counters:
            return
        with contextlib.suppress(Unconfirmed):
            self._write(self._rows(None if self._judge is None else refuse))

    def _rows(self, judge: Judge | None) -> list[Row]:
        pending, self._pending = self._pending, []
        return [
            self._row(outcome, numbers, pending[-1].lap, judge)
            for outcome, numbers in zip(pending, _read(pending), strict=True)
        ]

    def _row(self, outcome: Outcome, numbers: list[float], last: Lap, judge: Judge | None) -> Row:
        """What an iteration came to, taken in by the draft's stopping rule.

        Args:
            outcome: of the iteration.
            numbers: what the host has read of it.
            last: lap of those that were read with it.
            judge: of its policy, if it has to be confirmed.
        """
        found = iter(numbers)
        total, low, high, length = (next(found) for _ in range(4))
        losses = [None if each is None else next(found) for each in outcome.losses]
        iteration = outcome.counters.iteration
        _check_finite(dict(zip(outcome.finite, found, strict=True)), losses, iteration)
        returned = Returned(total, outcome.episodes, low, high)
        stopping, policy = self._draft.stopping, self._state.policy
        with self._clock.evaluation():
            evaluation = stopping.consider(
                policy if outcome.acted is None else outcome.acted,
                returned,
                None if judge is None else lambda: judge(policy, iteration - 1),
            )
        if stopping.solved:
            self._clock.note("solved")
        phases, ago = self._clock.count(outcome.lap, last)
        steps = outcome.counters.env_steps
        return {
            "iteration": iteration,
            "env_steps": steps,
            "episodes": outcome.counters.episodes,
            "charts/episodic_return": total / outcome.episodes,
            "charts/best_return": stopping.best_return,
            "charts/episodic_length": length,
            "charts/SPS": per_second(steps, self._clock.without_evaluations() - ago),
            "eval/episodic_return": None if evaluation is None else evaluation.return_mean,
            "losses/policy_loss": losses[0],
            "losses/value_loss": losses[1],
            "losses/entropy": losses[2],
            "losses/grad_norm": losses[3],
            **{f"perf/{phase}_s": spent for phase, spent in phases.items()},
        }

    def _write(self, rows: list[Row]) -> None:
        self._draft.seconds = self._clock.totals()
        for row in rows:
            self._metrics.log(row)
        self._state.commit(self._draft)


class Unconfirmed(Exception):
    """A greedy evaluation would be needed."""


def refuse(policy: Policy, iteration: int) -> EvalResult:
    """What judges where nothing can be confirmed any more."""
    raise Unconfirmed


def _read(pending: list[Outcome]) -> list[list[float]]:
    """The numbers of each."""
    numbers = [outcome.numbers() for outcome in pending]
    if not numbers or numbers[0][0].device.type == "cpu":
        return [[each.item() for each in own] for own in numbers]
    wide = [torch.stack([each.to(torch.float64) for each in own]) for own in numbers]
    read: list[list[float]] = torch.stack(wide).tolist()
    return read


def _check_finite(finite: dict[str, float], losses: list[float | None], iteration: int) -> None:
    wrong = [name for name, all_are in finite.items() if not all_are]
    if wrong:
        names = "policy loss", "value loss", "entropy", "gradient's norm"
        shown = ", ".join(
            f"the {name} is {number}"
            for name, number in zip(names, losses, strict=True)
            if number is not None and not math.isfinite(number)
        )
        raise FloatingPointError(
            f"not all is finite of {' and '.join(wrong)} in iteration {iteration}"
            f"{': ' if shown else ''}{shown}; lower --learning-rate, or scale rewards or"
            " observations"
        )
