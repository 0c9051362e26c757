"""Exactly K whole episodes under a frozen policy."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from vecpg.envs import find_spec, judge_of, make_envs, resolve_vectorization
from vecpg.kernels import threads
from vecpg.noise import Purpose, StepNoise, Stream
from vecpg.policy import Policy, sampling
from vecpg.policy.sampling import greedily
from vecpg.rollout import play
from vecpg.rollout.stepping import seeds_of

Act = Callable[..., NDArray[Any]]
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


@threads.torch_using(1)
def evaluate(
    policy: Policy,
    env_id: str,
    episodes: int,
    *,
    vectorization: str = "auto",
    num_envs: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
    wrappers: Sequence[str] = (),
    step_timeout: float = 60.0,
    envs_per_worker: int | None = None,
    greedy: bool = True,
    seed: int = 1,
    purpose: Purpose = Purpose.EVALUATION_RESET,
    draw: int = 0,
    action_masks: bool = False,
) -> EvalResult:
    """Play whole episodes in the environment itself, stepped as in training.

    An environment on tensors is judged by the one it stands for, or by itself in float64: see
    `vecpg.envs.judge_of`.

    Every copy of the environment plays a number of episodes that is fixed beforehand. (Taking the
    first to finish would favour short ones.) Torch computes on one thread, as in training: a row at
    a time it gains nothing by more.

    Args:
        policy: is not changed.
        env_id: a registered id, or `module:Id`.
        episodes: how many, exactly. At least 1.
        vectorization: of training, as for `make_envs`.
        num_envs: of training, as for `make_judge`.
        env_kwargs: keyword arguments of the environment.
        max_episode_steps: time limit; None keeps the environment's own.
        wrappers: as for `make_envs`.
        step_timeout: as for `make_envs`.
        envs_per_worker: as for `make_envs`.
        greedy: True = the most probable action; False = draw actions.
        seed: with `purpose` and `draw` fixes start states and draws.
        purpose: which stream of start states; training's is never used here.
        draw: a further number for another set of episodes.
        action_masks: as for `make_envs`; only what the masks allow is taken.

    Raises:
        ValueError: an environment that cannot be made, or has other spaces than the policy; or
            `episodes` below 1.
        EnvironmentFailure: an environment raised or returned a number that is not finite, or no
            mask that allows something where it is asked for one.

    Example:
        >>> from vecpg.envs import make_envs
        >>> envs = make_envs("CartPole-v1", 1)
        >>> policy = Policy(envs.single_observation_space, envs.single_action_space)
        >>> len(evaluate(policy, "CartPole-v1", 10).returns)
        10
    """
    judge = make_judge(
        policy,
        env_id,
        episodes,
        vectorization=vectorization,
        num_envs=num_envs,
        env_kwargs=env_kwargs,
        max_episode_steps=max_episode_steps,
        wrappers=wrappers,
        step_timeout=step_timeout,
        action_masks=action_masks,
        envs_per_worker=envs_per_worker,
    )
    try:
        return evaluate_in(
            judge,
            policy,
            episodes,
            greedy=greedy,
            seed=seed,
            purpose=purpose,
            draw=draw,
            action_masks=action_masks,
        )
    finally:
        judge.close()


def make_judge(
    policy: Policy,
    env_id: str,
    episodes: int,
    *,
    vectorization: str,
    num_envs: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
    wrappers: Sequence[str] = (),
    step_timeout: float = 60.0,
    action_masks: bool = False,
    envs_per_worker: int | None = None,
) -> VectorEnv[Any, Any, Any]:
    """The environments that `evaluate` plays in, for any number of evaluations.

    Args:
        policy: whose spaces they must have.
        env_id: as all that follow but one, see `evaluate`.
        episodes: as there.
        vectorization: as there.
        num_envs: how many copies training has. Where it steps them one by one (sync, async), there
            are no more of them here: a copy may be large. None: up to 128, as else.
        env_kwargs: as there.
        max_episode_steps: as there.
        wrappers: as there.
        step_timeout: as there.
        action_masks: as there.
        envs_per_worker: as there.

    Raises:
        ValueError: as `evaluate`.
        EnvironmentFailure: where training is in another environment than this, or actions are
            masked, it is tried: it failed at its reset or first step.
    """
    if episodes < 1:
        raise ValueError(f"episodes: expected at least 1, got {episodes}")
    if num_envs is not None and num_envs < 1:
        raise ValueError(f"num_envs: expected at least 1, got {num_envs}")
    spec = find_spec(env_id)
    vectorization = resolve_vectorization(
        spec,
        vectorization,
        env_kwargs,
        max_episode_steps=max_episode_steps,
        wrappers=wrappers,
        action_masks=action_masks,
    )
    judge, settings = judge_of(
        env_id,
        vectorization=vectorization,
        env_kwargs=env_kwargs,
        max_episode_steps=max_episode_steps,
        wrappers=wrappers,
        action_masks=action_masks,
    )
    most = _MOST_ENVS
    if vectorization in ("sync", "async") and num_envs is not None:
        most = min(most, num_envs)
    envs = make_envs(
        judge,
        min(episodes, most),
        step_timeout=step_timeout,
        action_masks=action_masks,
        envs_per_worker=envs_per_worker,
        **settings,
    )
    try:
        _check_spaces(policy, envs, env_id)
        trained = spec.id, vectorization, env_kwargs
        found = judge, settings["vectorization"], settings["env_kwargs"]
        if found != trained or action_masks:
            _try_out(envs, policy, action_masks)
    except BaseException:
        envs.close()
        raise
    return envs


def evaluate_in(
    judge: VectorEnv[Any, Any, Any],
    policy: Policy,
    episodes: int,
    *,
    greedy: bool = True,
    seed: int = 1,
    purpose: Purpose = Purpose.EVALUATION_RESET,
    draw: int = 0,
    action_masks: bool = False,
) -> EvalResult:
    """As `evaluate`, in environments that are there already, and stay.

    Args:
        judge: N environments in NEXT_STEP mode, at most as many as episodes.
        policy: as all that follow, see `evaluate`.
        episodes: as there.
        greedy: as there.
        seed: as there.
        purpose: as there.
        draw: as there.
        action_masks: as there.

    Raises:
        EnvironmentFailure: as there.

    Example:
        >>> from vecpg.envs import make_envs
        >>> judge = make_envs("CartPole-v1", 3, vectorization="sync")
        >>> policy = Policy(judge.single_observation_space, judge.single_action_space)
        >>> one, other = (evaluate_in(judge, policy, 10, draw=k) for k in (0, 1))
        >>> len(one.returns), one == other
        (10, False)
    """
    num_envs = judge.num_envs
    quotas = np.full(num_envs, episodes // num_envs)
    quotas[: episodes % num_envs] += 1
    stream = Stream(seed, draw, 0, num_envs)
    act = _acting(policy, stream, purpose, greedy, action_masks)
    returns: list[list[float]] = [[] for _ in range(num_envs)]
    lengths: list[list[int]] = [[] for _ in range(num_envs)]
    total = np.zeros(num_envs)
    length = np.zeros(num_envs, np.int64)
    with torch.inference_mode():
        seeds = seeds_of(judge, stream, purpose)
        for row, _ in play(judge, act, quotas=quotas, seeds=seeds, action_masks=action_masks):
            total += row.rewards
            length += row.mask
            for n in np.flatnonzero(row.terminations | row.truncations):
                returns[n].append(float(total[n]))
                lengths[n].append(int(length[n]))
                total[n] = length[n] = 0
    return EvalResult(
        tuple(value for one in returns for value in one),
        tuple(value for one in lengths for value in one),
    )


def prepare_evaluation(policy: Policy) -> None:
    """Compile, or load, what choosing a policy's actions in evaluation will need."""
    if sampling.why_not(policy) is None:
        obs = np.zeros((1, *policy.obs_shape), np.float32)
        greedily(policy)(obs)


def _acting(
    policy: Policy, stream: Stream, purpose: Purpose, greedy: bool, action_masks: bool
) -> Act:
    """What `play` takes. The policy is read at this call."""
    if greedy and not action_masks and sampling.why_not(policy) is None:
        most_probable = greedily(policy)
        return lambda t, obs: policy.for_env(most_probable(obs))
    noise = StepNoise(stream, purpose, policy.device, policy.num_uniforms)

    def act(t: int, obs: NDArray[Any], *masks: NDArray[np.bool_]) -> NDArray[Any]:
        rows = torch.from_numpy(np.asarray(obs))
        # What is not uint8 here would be cut off to it.
        whole = policy.obs_dtype == torch.uint8 and rows.dtype != torch.uint8
        rows = rows.to(policy.device, torch.float32 if whole else policy.obs_dtype)
        allowed = [torch.from_numpy(mask).to(policy.device) for mask in masks]
        if greedy:
            return policy.for_env(policy.mode(rows, *allowed))
        return policy.for_env(policy.sample(rows, noise(t), None, *allowed))

    return act


def _try_out(judge: VectorEnv[Any, Any, Any], policy: Policy, action_masks: bool) -> None:
    """Reset, and step once."""
    stream, purpose = Stream(0, 0, 0, judge.num_envs), Purpose.EVALUATION_RESET
    act = _acting(policy, stream, purpose, greedy=True, action_masks=action_masks)
    with torch.inference_mode():
        seeds = seeds_of(judge, stream, purpose)
        next(play(judge, act, num_steps=1, seeds=seeds, action_masks=action_masks))


def _check_spaces(policy: Policy, envs: VectorEnv[Any, Any, Any], env_id: str) -> None:
    """Refuse an environment that shows or takes something else; bounds and types may differ."""
    for what, trained, found in (
        ("observations", policy.encoder.space, envs.single_observation_space),
        ("actions", policy.distribution.space, envs.single_action_space),
    ):
        if _form(trained) != _form(found):
            raise ValueError(
                f"{env_id}: expected {what} of {trained}, with which the policy was trained, got"
                f" {found}"
            )


def _form(space: Any) -> Any:
    """What a network depends on."""
    numbers = [getattr(space, name, None) for name in ("n", "nvec", "start")]
    return space.shape, [None if each is None else np.asarray(each).tolist() for each in numbers]
