"""When a run counts as solved, and which policy was its best."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from vecpg.evaluate import EvalResult
from vecpg.kernels.announce import whose
from vecpg.policy import Policy

# After so many iterations of equal returns somebody should hear about it.
_STUCK_ITERATIONS = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReturnWindow:
    """The last whole iterations that together make at least `needed` episodes.

    Whole iterations, because inside one the short episodes end first.

    needed:     episodes.
    iterations: sum of returns and number of episodes of each.

    Example:
        >>> window = ReturnWindow(3)
        >>> for total, episodes in ((2.0, 2), (8.0, 2), (7.0, 1)):
        ...     window = window.with_iteration(total, episodes)
        >>> window.mean
        5.0
    """

    needed: int
    iterations: tuple[tuple[float, int], ...] = ()

    def with_iteration(self, total: float, episodes: int) -> "ReturnWindow":
        """The window after one more iteration, without those that are no longer needed."""
        iterations = (*self.iterations, (total, episodes))
        count = sum(held for _, held in iterations)
        while count - iterations[0][1] >= self.needed:
            count -= iterations[0][1]
            iterations = iterations[1:]
        return ReturnWindow(self.needed, iterations)

    @property
    def mean(self) -> float | None:
        """Mean return of the episodes held; None while there are too few."""
        count = sum(held for _, held in self.iterations)
        if count < self.needed:
            return None
        return sum(total for total, _ in self.iterations) / count


class Returned(NamedTuple):
    """The returns of an iteration's episodes: their sum, how many, the smallest, the largest."""

    total: float
    episodes: int
    low: float
    high: float


class Stopping:
    """Keeps the best policy, and decides whether the target is reached.

    Args:
        target: mean return that counts as solved; None never does.
        episodes: in the return window.
    """

    def __init__(self, target: float | None, episodes: int) -> None:
        self.target = target
        self.window = ReturnWindow(episodes)
        self.solved = False
        # Of the policy that was confirmed.
        self.evaluation: EvalResult | None = None
        self.best_return: float | None = None
        self.best_parameters: dict[str, Tensor] | None = None
        # Of the policy with which it was solved.
        self.confirmed_parameters: dict[str, Tensor] | None = None
        # The return that every episode had, and for how many iterations.
        self.equal: tuple[float, int] = (0.0, 0)

    def consider(
        self,
        policy: Policy | dict[str, Tensor],
        returned: Returned,
        confirm: Callable[[], EvalResult] | None,
    ) -> EvalResult | None:
        """Take in what the episodes that `policy` has collected returned, before it is updated.

        Args:
            policy: is not changed; its parameters are copied where it is the best so far. Or a copy
                of them.
            returned: in the iteration.
            confirm: plays the greedy evaluation of that policy, or None where none is wanted.

        Returns:
            the greedy evaluation, if the target was reached and one was asked for.
        """
        self.window = self.window.with_iteration(returned.total, returned.episodes)
        mean = self.window.mean
        if mean is None or self.target is None or mean < self.target:
            self._notice_equal(returned.low, returned.high)
        if mean is None:
            return None
        if self.best_return is None or mean > self.best_return:
            self.best_return = mean
            self.best_parameters = parameters(policy)
        if self.target is None or mean < self.target:
            return None
        evaluation = None
        if confirm is not None:
            evaluation = confirm()
            if evaluation.return_mean < self.target:
                _log.info(
                    "%snot confirmed: the window's mean is %.1f, a greedy evaluation gives %.1f"
                    " (target %.1f)",
                    whose(),
                    mean,
                    evaluation.return_mean,
                    self.target,
                )
                return evaluation
        self.solved = True
        self.evaluation = evaluation
        self.confirmed_parameters = parameters(policy)
        return evaluation

    @property
    def best(self) -> dict[str, Tensor] | None:
        """Parameters of the policy that reached the target, else of the best; None if none is."""
        return self.confirmed_parameters or self.best_parameters

    def forget_solved(self) -> None:
        """Another target is to be reached: what reached the last one says nothing of it."""
        self.solved, self.evaluation, self.confirmed_parameters = False, None, None

    def copy(self) -> "Stopping":
        """One of its own; what both hold is never written to."""
        other = Stopping(self.target, self.window.needed)
        vars(other).update(vars(self))
        return other

    def state_dict(self) -> dict[str, Any]:
        """What was found so far, as tensors and plain types; not the settings."""
        evaluation = self.evaluation
        return {
            "window": [list(iteration) for iteration in self.window.iterations],
            "solved": self.solved,
            "evaluation": None
            if evaluation is None
            else {"returns": list(evaluation.returns), "lengths": list(evaluation.lengths)},
            "best_return": self.best_return,
            "best_parameters": self.best_parameters,
            "confirmed_parameters": self.confirmed_parameters,
            "equal": list(self.equal),
        }

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, with these settings."""
        iterations = tuple((total, episodes) for total, episodes in content["window"])
        self.window = ReturnWindow(self.window.needed, iterations)
        self.solved = content["solved"]
        found = content["evaluation"]
        self.evaluation = (
            None if found is None else EvalResult(tuple(found["returns"]), tuple(found["lengths"]))
        )
        self.best_return = content["best_return"]
        self.best_parameters = content["best_parameters"]
        self.confirmed_parameters = content["confirmed_parameters"]
        low, iterations_of_it = content["equal"]
        self.equal = (low, iterations_of_it)

    def _notice_equal(self, low: float, high: float) -> None:
        """Say once in a row that every episode has the same return: no gradient comes of that."""
        value, iterations = self.equal
        if low != high:
            self.equal = (0.0, 0)
            return
        self.equal = (low, iterations + 1 if iterations and low == value else 1)
        if self.equal[1] == _STUCK_ITERATIONS:
            _log.warning(
                "%severy episode has returned %g for %d iterations, which teaches next to nothing;"
                " if more is possible, try another --seed, more --num-envs or --ent-coef 0.01",
                whose(),
                low,
                _STUCK_ITERATIONS,
            )


def parameters(policy: Policy | dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the policy's parameters; where it is one, that."""
    if isinstance(policy, dict):
        return policy
    return {name: value.detach().clone() for name, value in policy.state_dict().items()}
