"""What one collection gives: whole episodes of N environments, time first."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rollout:
    """T steps of N environments; row t holds what happened at step t.

    The rows that count make whole episodes: of each environment those it started inside the start
    window, from their first action to their last. Everything else is masked: the step that only
    resets an environment, and whatever an environment does after its last counted episode.

    obs:          (T, N, *obs_shape) float32   what the policy saw before acting; int64 where
                                               observations are Discrete or MultiDiscrete
    actions:      (T, N) int64                 taken on `obs`; (T, N, A) int64 for MultiDiscrete
                                               and float32 for Box, as drawn, before any clipping
    rewards:      (T, N) float32               paid for `actions`, environment units; 0 where masked
    terminations: (T, N) bool                  the action ended the episode by the task's rule
    truncations:  (T, N) bool                  the action ended the episode by a limit
    mask:         (T, N) bool                  True = a real transition that counts
    final_obs:    (K, *obs_shape) float32      the observation after each truncated action
    final_rows:   (K, 2) int64                 the (t, n) of each, t rising
    seed, iteration:                           they fix every random number that was used
    """

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    terminations: Tensor
    truncations: Tensor
    mask: Tensor
    final_obs: Tensor
    final_rows: Tensor
    seed: int = 0
    iteration: int = 0

    @property
    def dones(self) -> Tensor:
        """(T, N) bool, True at the row whose action ended its episode. False where masked."""
        return self.terminations | self.truncations

    def values_at_truncations(self, final_values: Tensor) -> Tensor:
        """(T, N): what continues a truncated episode, 0 wherever none was cut by a limit alone.

        Args:
            final_values: (K,), the value of each of `final_obs`.
        """
        values = torch.zeros_like(self.rewards)
        t, n = self.final_rows.unbind(dim=1)
        cut = self.truncations[t, n] & ~self.terminations[t, n]
        values[t, n] = torch.where(cut, final_values, 0.0)
        return values
