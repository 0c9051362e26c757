"""Everything that changes during a run, and how it changes: all at once, or not at all."""

import copy
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vecpg.adam import Adam
from vecpg.policy import Policy
from vecpg.run.checkpoint import policy_state
from vecpg.run.content import check_state
from vecpg.run.stopping import Stopping
from vecpg.value import Critic


@dataclass(slots=True)
class Counters:
    """How far a run is."""

    iteration: int = 0
    env_steps: int = 0
    vector_steps: int = 0
    episodes: int = 0


@dataclass(slots=True)
class TrainState:
    """What an iteration changes.

    An iteration computes what follows in a `draft`, and `commit` makes that the state. Until then
    the state is as the last commit left it, whatever fails.

    policy:    acts, and is differentiated.
    optimizer: of the policy.
    critic:    V with its optimizer; None without a learned baseline.
    stopping:  the return window, the best policy, whether the target was reached.
    counters:  iterations, steps and episodes so far.
    seconds:   totals of the clock.

    Example:
        >>> from gymnasium import spaces
        >>> policy = Policy(spaces.Box(-1, 1, (2,)), spaces.Discrete(2))
        >>> state = TrainState(policy, Adam(policy.parameters(), 1e-2), None, Stopping(None, 10))
        >>> draft = state.draft()
        >>> draft.counters.iteration += 1
        >>> state.counters.iteration
        0
        >>> state.commit(draft)
        >>> state.counters.iteration
        1
    """

    policy: Policy
    optimizer: Adam
    critic: Critic | None
    stopping: Stopping
    counters: Counters = field(default_factory=Counters)
    seconds: dict[str, float] = field(default_factory=dict)
    _following: "TrainState | None" = field(init=False, default=None)
    _tensors: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        """Find once what a commit writes to."""
        self._tensors = list(self.policy.state_dict().values())
        if self.critic is not None:
            self._tensors += self.critic.value_function.state_dict().values()

    def draft(self) -> "TrainState":
        """A state of its own with the same content, to compute in."""
        # Together: an optimizer goes on with the parameters that were copied beside it.
        own = copy.deepcopy((self.policy, self.optimizer, self.critic))
        counters, seconds = replace(self.counters), dict(self.seconds)
        return TrainState(*own, self.stopping.copy(), counters, seconds)

    def commit(self, draft: "TrainState") -> None:
        """Make what the draft has come to the state.

        One assignment decides. If what follows it is interrupted, `state_dict` goes on with it.
        """
        self._following = draft
        self._follow()

    def _follow(self) -> None:
        draft = self._following
        if draft is None:
            return
        torch._foreach_copy_(self._tensors, draft._tensors)
        self.optimizer.copy_from(draft.optimizer)
        if self.critic is not None and draft.critic is not None:
            self.critic.optimizer.copy_from(draft.critic.optimizer)
        self.stopping = draft.stopping.copy()
        self.counters = replace(draft.counters)
        self.seconds = dict(draft.seconds)
        self._following = None

    def best_policy(self) -> Policy:
        """The policy that reached the target, else the best so far, as a copy that only plays."""
        policy = copy.deepcopy(self.policy)
        if self.stopping.best is not None:
            policy.load_state_dict(self.stopping.best)
        return policy.eval()

    def state_dict(self) -> dict[str, Any]:
        """All of it as tensors and plain types; the tensors are the state's own."""
        self._follow()
        return {
            "policy": policy_state(self.policy),
            "optimizer": self.optimizer.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
            "stopping": self.stopping.state_dict(),
            "counters": asdict(self.counters),
            "seconds": dict(self.seconds),
        }

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Take what `state_dict` gave of a state of the same shapes.

        Raises:
            ValueError: it is something else, with the path of the first part that is wrong.
                Nothing was changed.
        """
        check_state(content, self)
        self._following = None
        self.policy.load_state_dict(content["policy"]["parameters"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.critic is not None:
            self.critic.load_state_dict(content["critic"])
        self.stopping.load_state_dict(content["stopping"])
        self.counters = Counters(**content["counters"])
        self.seconds = dict(content["seconds"])
