"""When a run counts as solved, and which policy was its best."""

import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from vecpg.evaluate import EvalResult
from vecpg.policy import Policy

if TYPE_CHECKING:
    from vecpg.rollout.statistics import Episodes

# After so many iterations of equal returns somebody should hear about it.
_STUCK_ITERATIONS = 5

_log = logging.getLogger(__name__)


class ReturnWindow:
    """The last whole iterations that together make at least `episodes` episodes.

    Whole iterations, because inside one the short episodes end first.

    Example:
        >>> window = ReturnWindow(3)
        >>> for total, episodes in ((2.0, 2), (8.0, 2), (7.0, 1)):
        ...     window.add(total, episodes)
        >>> window.mean
        5.0
    """

    def __init__(self, episodes: int) -> None:
        self._needed = episodes
        self._iterations: deque[tuple[float, int]] = deque()
        self._count = 0

    def add(self, total: float, episodes: int) -> None:
        """Add one iteration's sum of returns, and let go of iterations no longer needed."""
        self._iterations.append((total, episodes))
        self._count += episodes
        while self._count - self._iterations[0][1] >= self._needed:
            self._count -= self._iterations.popleft()[1]

    @property
    def mean(self) -> float | None:
        """Mean return of the episodes held; None while there are too few."""
        if self._count < self._needed:
            return None
        return sum(total for total, _ in self._iterations) / self._count


class Stopping:
    """Keeps the best policy, and decides whether the target is reached.

    Args:
        target: mean return that counts as solved; None never does.
        window: episodes in the return window.
        confirm: plays the greedy evaluation of a policy, or None where none is wanted.
    """

    def __init__(
        self,
        target: float | None,
        window: int,
        confirm: Callable[[Policy], EvalResult] | None,
    ) -> None:
        self.target = target
        self.solved = False
        self.evaluation: EvalResult | None = None
        self.best_return: float | None = None
        self.best_parameters: dict[str, Tensor] | None = None
        self._confirm = confirm
        self._window = ReturnWindow(window)
        self._equal: tuple[float, int] = (0.0, 0)

    def consider(self, policy: Policy, episodes: "Episodes") -> EvalResult | None:
        """Take in the episodes that `policy` has just collected, before it is updated.

        Returns:
            the greedy evaluation, if the target was reached and one was asked for.
        """
        self._notice_equal(episodes.returns)
        self._window.add(episodes.return_sum.item(), episodes.returns.numel())
        mean = self._window.mean
        if mean is None:
            return None
        if self.best_return is None or mean > self.best_return:
            self.best_return = mean
            self.best_parameters = parameters(policy)
        if self.target is None or mean < self.target:
            return None
        evaluation = None
        if self._confirm is not None:
            evaluation = self._confirm(policy)
            if evaluation.return_mean < self.target:
                _log.info(
                    "not confirmed: the window's mean is %.1f, a greedy evaluation gives %.1f"
                    " (target %.1f)",
                    mean,
                    evaluation.return_mean,
                    self.target,
                )
                return evaluation
        self.solved = True
        self.evaluation = evaluation
        self.best_parameters = parameters(policy)
        return evaluation

    def _notice_equal(self, returns: Tensor) -> None:
        """Say once in a row that every episode has the same return: no gradient comes of that."""
        low, high = returns.min().item(), returns.max().item()
        value, iterations = self._equal
        if low != high:
            self._equal = (0.0, 0)
            return
        self._equal = (low, iterations + 1 if iterations and low == value else 1)
        if self._equal[1] == _STUCK_ITERATIONS:
            _log.warning(
                "every episode has returned %g for %d iterations, which teaches nothing; if more is"
                " possible, try another --seed, more --num-envs or --ent-coef 0.01",
                low,
                _STUCK_ITERATIONS,
            )


def parameters(policy: Policy) -> dict[str, Tensor]:
    """A copy of the policy's parameters."""
    return {name: value.detach().clone() for name, value in policy.state_dict().items()}
