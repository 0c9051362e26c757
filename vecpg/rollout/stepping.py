"""Collecting by stepping any Gymnasium vector environment in NEXT_STEP mode.

`play` is the one place that knows which rows count. Training stores what it yields (`collect`);
evaluation adds it up.
"""

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from vecpg.envs import (
    EnvironmentFailure,
    SubEnvironmentError,
    check_autoreset,
    has_one_generator,
)
from vecpg.noise import Purpose, StepNoise, reset_seeds
from vecpg.policy import Policy
from vecpg.rollout.data import Rollout


@dataclass(frozen=True, slots=True)
class Row:
    """One step of N environments, on the host. Ends are False where `mask` is."""

    rewards: NDArray[np.floating[Any]]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]
    mask: NDArray[np.bool_]


def collect(
    envs: VectorEnv, policy: Policy, *, num_steps: int, seed: int, iteration: int
) -> Rollout:
    """Whole episodes from a fresh reset, with the start window.

    An environment starts another episode if and only if it has made fewer than `num_steps` real
    steps in this iteration, and collecting goes on until every started episode has ended. Whether
    an episode starts depends on the past alone, so no outcome is favoured.

    Args:
        envs: N environments in NEXT_STEP mode.
        policy: on any device; one copy of the actions to the host at each step is the only wait.
        num_steps: the start window in real steps. 1 = exactly one episode for each environment.
        seed: of the run.
        iteration: which collection this is; (seed, iteration) fixes every random number in it.

    Returns:
        a `Rollout` on the policy's device.

    Raises:
        ValueError: environments in another autoreset mode.
        EnvironmentFailure: an environment raised or returned a number that is not finite; the
            message has its index, the step and the seed.

    Example:
        >>> from vecpg.envs import make_envs
        >>> envs = make_envs("CartPole-v1", 4)
        >>> policy = Policy(envs.single_observation_space, envs.single_action_space)
        >>> rollout = collect(envs, policy, num_steps=1, seed=1, iteration=0)
        >>> rollout.dones.sum().item()
        4
    """
    check_autoreset(envs)
    rows = _Rows(min(num_steps, 1024) + 1, envs.num_envs, policy.obs_shape)
    device = policy.device
    noise = StepNoise(seed, iteration, envs.num_envs, Purpose.ACTION, device)

    def act(t: int, obs: NDArray[Any]) -> NDArray[Any]:
        rows.make_room(t + 2)
        rows.obs[t] = obs
        seen = torch.from_numpy(rows.obs[t]).to(device, non_blocking=True)
        actions = policy.sample(seen, noise(t)).cpu().numpy()
        rows.actions[t] = actions
        return actions

    seeds = _seeds(envs, seed, iteration, Purpose.TRAINING_RESET)
    length = 0
    with torch.inference_mode():
        for row, following in play(envs, act, lambda steps, _: steps < num_steps, seeds=seeds):
            rows.rewards[length] = row.rewards
            rows.terminations[length] = row.terminations
            rows.truncations[length] = row.truncations
            rows.mask[length] = row.mask
            length += 1
            last_obs = following
    rows.obs[length] = last_obs
    return rows.rollout(length, device)


def play(
    envs: VectorEnv,
    act: Callable[[int, NDArray[Any]], NDArray[Any]],
    starts_another: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]],
    *,
    seeds: int | list[int],
) -> Iterator[tuple[Row, NDArray[Any]]]:
    """Reset, then step until every episode that counts has ended.

    Args:
        envs: N environments in NEXT_STEP mode.
        act: from the step number and the observations to the actions.
        starts_another: from the real steps and the finished episodes of each environment (both
            (N,), counted from the reset) to whether it starts another one, asked as one ends.
        seeds: as the environments' `reset` takes them.

    Yields:
        each row, and the observations that follow it (after an end, the final one).
    """
    try:
        # VectorEnv annotates one integer; Sync and Async document the list.
        obs, _ = envs.reset(seed=seeds)  # type: ignore[arg-type]
    except (Exception, SystemExit) as error:
        raise _failure(error, "its reset", seeds) from error
    steps = np.zeros(envs.num_envs, np.int64)
    episodes = np.zeros(envs.num_envs, np.int64)
    mask = np.ones(envs.num_envs, np.bool_)
    resetting = np.zeros(envs.num_envs, np.bool_)
    _check_finite("observation", obs, mask, "its reset", seeds)
    t = 0
    while mask.any() or resetting.any():
        actions = act(t, obs)
        try:
            obs, rewards, terminations, truncations, _ = envs.step(actions)
        except (Exception, SystemExit) as error:
            raise _failure(error, f"step {t}", seeds) from error
        # A row that resets carries the first observation of an episode.
        _check_finite("observation", obs, mask | resetting, f"step {t}", seeds)
        _check_finite("reward", rewards, mask, f"step {t}", seeds)
        terminations = terminations & mask
        truncations = truncations & mask
        yield Row(rewards, terminations, truncations, mask), obs
        ended = terminations | truncations
        steps += mask
        episodes += ended
        mask = (mask & ~ended) | resetting
        resetting = ended & starts_another(steps, episodes)
        t += 1


class _Rows:
    """Buffers on the host that double when they are full."""

    def __init__(self, capacity: int, num_envs: int, obs_shape: tuple[int, ...]) -> None:
        self.obs = np.empty((capacity, num_envs, *obs_shape), np.float32)
        self.actions = np.empty((capacity, num_envs), np.int64)
        self.rewards = np.empty((capacity, num_envs), np.float32)
        self.terminations = np.empty((capacity, num_envs), np.bool_)
        self.truncations = np.empty((capacity, num_envs), np.bool_)
        self.mask = np.empty((capacity, num_envs), np.bool_)

    def make_room(self, length: int) -> None:
        """Hold at least `length` rows."""
        if length <= self.mask.shape[0]:
            return
        for name, buffer in vars(self).items():
            setattr(self, name, np.concatenate([buffer, np.empty_like(buffer)]))

    def rollout(self, length: int, device: torch.device) -> Rollout:
        """The first `length` rows as tensors."""
        mask, truncations = self.mask[:length], self.truncations[:length]
        rewards = self.rewards[:length]
        rewards[~mask] = 0
        t, n = np.nonzero(truncations)
        host = {
            "obs": self.obs[:length],
            "actions": self.actions[:length],
            "rewards": rewards,
            "terminations": self.terminations[:length],
            "truncations": truncations,
            "mask": mask,
            "final_obs": self.obs[t + 1, n],
            "final_rows": np.stack([t, n], axis=1),
        }
        return Rollout(
            **{
                name: torch.from_numpy(rows).to(device, non_blocking=True)
                for name, rows in host.items()
            }
        )


def _seeds(envs: VectorEnv, seed: int, iteration: int, purpose: Purpose) -> int | list[int]:
    if has_one_generator(envs):
        return reset_seeds(seed, iteration, 1, purpose)[0]
    return reset_seeds(seed, iteration, envs.num_envs, purpose)


def _check_finite(
    what: str, values: NDArray[Any], rows: NDArray[np.bool_], when: str, seeds: int | list[int]
) -> None:
    # As float32, in which everything is stored: 1e300 would become infinite there.
    with np.errstate(over="ignore"):
        values = np.asarray(values, np.float32)
    if np.isfinite(values).all():
        return
    bad = ~np.isfinite(values).reshape(len(rows), -1).all(axis=1) & rows
    if bad.any():
        index = int(bad.argmax())
        raise EnvironmentFailure(
            f"environment {index} returned the {what} {values[index]} at {when}"
            f" ({_reset(seeds, index)}); expected finite float32 numbers"
        )


def _failure(error: BaseException, when: str, seeds: int | list[int]) -> EnvironmentFailure:
    if isinstance(error, SubEnvironmentError):
        who, verb, detail = f"environment {error.index}", error.verb, error.detail
        seed, trace = f" ({_reset(seeds, error.index)})", error.trace
    else:
        who, verb, detail = "the environments", "failed", f"{type(error).__name__}: {error}"
        # Which of them it was is not known, so only a common seed can be named.
        seed = f" ({_reset(seeds, 0)})" if isinstance(seeds, int) else ""
        trace = "".join(traceback.format_exception(error))
    return EnvironmentFailure(f"{who} {verb} at {when}{seed}: {detail}", trace)


def _reset(seeds: int | list[int], index: int) -> str:
    if isinstance(seeds, int):
        return f"all reset together with seed {seeds}"
    return f"reset with seed {seeds[index]}"
