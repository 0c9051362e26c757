"""Collecting from environments on tensors: nothing leaves the device until it is over."""

import torch
from torch import Tensor

from vecpg.envs import EnvironmentFailure
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.noise import Purpose, reset_seeds
from vecpg.policy import Policy
from vecpg.policy.sampling import sampler
from vecpg.rollout.data import Rollout

# Rows between two looks, from the host, at whether everything is over. On a GPU a look waits for
# the device; on a CPU it costs as little as a row that nobody needs.
_ROWS_BETWEEN_LOOKS = {"cpu": 1}
_ROWS_BETWEEN_LOOKS_ELSEWHERE = 16


def collect_on_device(
    envs: TensorVectorEnv, policy: Policy, *, num_steps: int, seed: int, iteration: int
) -> Rollout:
    """As `collect`, from a `TensorVectorEnv` on the policy's device.

    The same start window: an environment starts another episode if and only if it has made fewer
    than `num_steps` real steps. Which rows count is itself a matter of tensors here.

    Raises:
        ValueError: environments on another device than the policy.
        EnvironmentFailure: an observation or a reward that is not finite.
    """
    device = policy.device
    if envs.device != device:
        raise ValueError(
            f"envs: expected them on {device} like the policy, got {envs.device}; make"
            f' them with device="{device}"'
        )
    num_envs = envs.num_envs
    draw = sampler(policy, seed, iteration, num_envs)
    between = _ROWS_BETWEEN_LOOKS.get(device.type, _ROWS_BETWEEN_LOOKS_ELSEWHERE)
    rows = _Rows(min(num_steps, 1024) + 1, num_envs, policy)
    playing = torch.ones(num_envs, dtype=torch.bool, device=device)
    resetting = torch.zeros_like(playing)
    steps = torch.zeros(num_envs, dtype=torch.int64, device=device)
    with torch.inference_mode():
        obs, _ = envs.reset(seed=reset_seeds(seed, iteration, 1, Purpose.TRAINING_RESET)[0])
        t = 0
        while t % between or bool((playing | resetting).any()):
            rows.make_room(t + 2)
            rows.obs[t] = obs
            draw(t, rows.obs[t], rows.actions[t])
            action = policy.distribution.clipped(rows.actions[t])
            obs, rewards, terminations, truncations, _ = envs.step(action)
            rows.mask[t] = playing
            rows.rewards[t] = torch.where(playing, rewards, 0.0)
            rows.terminations[t] = playing & terminations
            rows.truncations[t] = playing & truncations
            steps += playing
            over = playing & (terminations | truncations)
            another = over & (steps < num_steps)
            playing = (playing & ~over) | resetting
            resetting = another
            t += 1
        rows.make_room(t + 1)
        rows.obs[t] = obs
    return rows.rollout(seed, iteration)


class _Rows:
    """Buffers on the device that double when they are full."""

    def __init__(self, capacity: int, num_envs: int, policy: Policy) -> None:
        size, device = (capacity, num_envs), policy.device
        self.obs = torch.empty(*size, *policy.obs_shape, dtype=policy.obs_dtype, device=device)
        self.actions = torch.empty(
            *size, *policy.action_shape, dtype=policy.action_dtype, device=device
        )
        self.rewards = torch.empty(size, device=device)
        self.terminations = torch.empty(size, dtype=torch.bool, device=device)
        self.truncations = torch.empty_like(self.terminations)
        self.mask = torch.zeros_like(self.terminations)

    def make_room(self, length: int) -> None:
        """Hold at least `length` rows."""
        if length <= self.mask.shape[0]:
            return
        for name, buffer in vars(self).items():
            setattr(self, name, torch.cat([buffer, torch.zeros_like(buffer)]))

    def rollout(self, seed: int, iteration: int) -> Rollout:
        """The rows up to the last that counts."""
        length = int(self.mask.any(dim=1).nonzero().max()) + 1
        mask, obs, rewards = self.mask[:length], self.obs[:length], self.rewards[:length]
        self._check_finite(mask, obs, rewards)
        rows = self.truncations[:length].nonzero()
        return Rollout(
            obs=obs.clone(),
            actions=self.actions[:length].clone(),
            rewards=rewards.clone(),
            terminations=self.terminations[:length].clone(),
            truncations=self.truncations[:length].clone(),
            mask=mask.clone(),
            final_obs=self.obs[rows[:, 0] + 1, rows[:, 1]],
            final_rows=rows,
            seed=seed,
            iteration=iteration,
        )

    @staticmethod
    def _check_finite(mask: Tensor, obs: Tensor, rewards: Tensor) -> None:
        for what, finite in (
            ("observation", obs.isfinite().flatten(2).all(dim=2)),
            ("reward", rewards.isfinite()),
        ):
            bad = (mask & ~finite).nonzero()
            if len(bad):
                t, n = bad[0].tolist()
                raise EnvironmentFailure(
                    f"environment {n} returned a {what} that is not finite, at row {t} of the"
                    " iteration; expected finite float32 numbers"
                )
