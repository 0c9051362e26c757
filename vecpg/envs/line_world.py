"""LineWorld: the smallest problem in which a policy has something to learn."""

from typing import Any

import gymnasium
from gymnasium import spaces

LEFT, RIGHT = 0, 1


class LineWorld(gymnasium.Env[Any, Any]):
    """States 0 to `goal` on a line. Every episode starts in 0 and ends at the goal.

    Actions: 0 moves left and 1 moves right; at the ends of the line the state stays.
    Rewards: -1 for every step, but +10 for the one that reaches the goal. The best return of the
    registered environment, `vecpg/LineWorld-v0`, is 3 * -1 + 10 = 7; it ends after 100 steps.

    Args:
        goal: the last state, at least 1.

    Raises:
        ValueError: a goal below 1.

    Example:
        >>> env = gymnasium.make("vecpg/LineWorld-v0")
        >>> env.reset(seed=0)[0]
        0
        >>> [env.step(RIGHT)[:3] for _ in range(4)][-1]
        (4, 10.0, True)
    """

    def __init__(self, goal: int = 4) -> None:
        if goal < 1:
            raise ValueError(f"goal: expected at least 1, got {goal}; there is no line without it")
        self.goal = goal
        self.observation_space = spaces.Discrete(goal + 1)
        self.action_space = spaces.Discrete(2)
        self._state = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Start in state 0."""
        super().reset(seed=seed)
        self._state = 0
        return self._state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Move one state to the left or to the right."""
        if action not in (LEFT, RIGHT):
            raise ValueError(f"action: expected 0 (left) or 1 (right), got {action}")
        self._state = max(0, self._state + (1 if action == RIGHT else -1))
        arrived = self._state == self.goal
        return self._state, 10.0 if arrived else -1.0, arrived, False, {}
