"""Exactly K whole episodes under a frozen policy."""

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from vecpg.envs import judge_of, make_envs
from vecpg.noise import Purpose, StepNoise, Stream
from vecpg.policy import Policy
from vecpg.rollout import play
from vecpg.rollout.stepping import seeds_of

# One episode each for the usual hundred; more copies only cost time to make.
_MOST_ENVS = 128


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Undiscounted returns and lengths of the episodes, in order of (environment, start).

    return_std divides by n - 1, and is 0 for one episode.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def return_mean(self) -> float:
        """Mean return of an episode."""
        return statistics.fmean(self.returns)

    @property
    def return_std(self) -> float:
        """Standard deviation of the returns."""
        return statistics.stdev(self.returns) if len(self.returns) > 1 else 0.0

    @property
    def length_mean(self) -> float:
        """Mean number of steps of an episode."""
        return statistics.fmean(self.lengths)


def evaluate(
    policy: Policy,
    env_id: str,
    episodes: int,
    *,
    env_kwargs: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
    greedy: bool = True,
    seed: int = 1,
    purpose: Purpose = Purpose.EVALUATION_RESET,
    draw: int = 0,
) -> EvalResult:
    """Play whole episodes in the environment itself, whatever training used.

    An environment on tensors is judged by the one it stands for, or by itself in float64: see
    `vecpg.envs.judge_of`.

    Every copy of the environment plays a number of episodes that is fixed beforehand. (Taking the
    first to finish would favour short ones.)

    Args:
        policy: is not changed.
        env_id: a registered id, or `module:Id`.
        episodes: how many, exactly. At least 1.
        env_kwargs: keyword arguments of the environment.
        max_episode_steps: time limit; None keeps the environment's own.
        greedy: True = the most probable action; False = draw actions.
        seed: with `purpose` and `draw` fixes start states and draws.
        purpose: which stream of start states; training's is never used here.
        draw: a further number for another set of episodes.

    Raises:
        ValueError: an environment that cannot be made, or has other spaces than the policy; or
            `episodes` below 1.
        EnvironmentFailure: an environment raised or returned a number that is not finite.

    Example:
        >>> from vecpg.envs import make_envs
        >>> envs = make_envs("CartPole-v1", 1)
        >>> policy = Policy(envs.single_observation_space, envs.single_action_space)
        >>> len(evaluate(policy, "CartPole-v1", 10).returns)
        10
    """
    if episodes < 1:
        raise ValueError(f"episodes: expected at least 1, got {episodes}")
    num_envs = min(episodes, _MOST_ENVS)
    quotas = np.full(num_envs, episodes // num_envs)
    quotas[: episodes % num_envs] += 1
    judge, settings = judge_of(env_id, env_kwargs=env_kwargs, max_episode_steps=max_episode_steps)
    envs = make_envs(judge, num_envs, **settings)
    _check_spaces(policy, envs, env_id)
    stream = Stream(seed, draw, 0, num_envs)
    noise = StepNoise(stream, purpose, policy.device, policy.num_uniforms)

    def act(t: int, obs: NDArray[Any]) -> NDArray[Any]:
        rows = torch.from_numpy(np.asarray(obs)).to(policy.device, policy.obs_dtype)
        return policy.for_env(policy.mode(rows) if greedy else policy.sample(rows, noise(t)))

    returns: list[list[float]] = [[] for _ in range(num_envs)]
    lengths: list[list[int]] = [[] for _ in range(num_envs)]
    total = np.zeros(num_envs)
    length = np.zeros(num_envs, np.int64)
    try:
        with torch.inference_mode():
            seeds = seeds_of(envs, stream, purpose)
            for row, _ in play(envs, act, quotas=quotas, seeds=seeds):
                total += row.rewards
                length += row.mask
                for n in np.flatnonzero(row.terminations | row.truncations):
                    returns[n].append(float(total[n]))
                    lengths[n].append(int(length[n]))
                    total[n] = length[n] = 0
    finally:
        envs.close()
    return EvalResult(
        tuple(value for one in returns for value in one),
        tuple(value for one in lengths for value in one),
    )


def _check_spaces(policy: Policy, envs: VectorEnv[Any, Any, Any], env_id: str) -> None:
    """Refuse an environment that shows or takes something else; bounds and types may differ."""
    for what, trained, found in (
        ("observations", policy.encoder.space, envs.single_observation_space),
        ("actions", policy.distribution.space, envs.single_action_space),
    ):
        if _form(trained) != _form(found):
            envs.close()
            raise ValueError(
                f"{env_id}: expected {what} of {trained}, with which the policy was trained, got"
                f" {found}"
            )


def _form(space: Any) -> Any:
    """What a network depends on."""
    numbers = [getattr(space, name, None) for name in ("n", "nvec", "start")]
    return space.shape, [None if each is None else np.asarray(each).tolist() for each in numbers]
