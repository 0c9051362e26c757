"""Vector environments for any Gymnasium id, all in the NEXT_STEP autoreset mode.

In that mode the observation that comes with an episode's end is the true final one, and the step
after it only resets: its action is ignored and its reward is 0. No torch is imported here.
"""

import functools
from collections.abc import Sequence
from typing import Any

import gymnasium
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from vecpg.envs.answers import mask_sizes
from vecpg.envs.errors import (
    EnvironmentFailure,
    EnvironmentNotMade,
    SubEnvironmentError,
    in_words,
    trace_of_making,
)
from vecpg.envs.fork_server import check_process
from vecpg.envs.in_process import InProcessEnvs
from vecpg.envs.registered import check_time_limit, find_spec, on_tensors, register
from vecpg.envs.vectorization import judge_of, made_with, own_vectorization, resolve_vectorization
from vecpg.envs.workers import WorkerEnvs
from vecpg.envs.wrappers import load_wrappers, make_wrapped

__all__ = [
    "EnvironmentFailure",
    "EnvironmentNotMade",
    "SubEnvironmentError",
    "check_autoreset",
    "check_time_limit",
    "find_spec",
    "has_one_generator",
    "judge_of",
    "load_wrappers",
    "make_envs",
    "make_wrapped",
    "own_vectorization",
    "register",
    "resolve_vectorization",
]


def make_envs(
    env_id: str,
    num_envs: int,
    *,
    vectorization: str = "auto",
    device: str = "cpu",
    env_kwargs: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
    wrappers: Sequence[str] = (),
    step_timeout: float = 60.0,
    action_masks: bool = False,
    envs_per_worker: int | None = None,
) -> VectorEnv:
    """N copies of a Gymnasium environment as one vector environment in NEXT_STEP mode.

    Args:
        env_id: a registered id; `module:Id` imports the module first.
        num_envs: the number of copies, at least 1.
        vectorization: "sync" steps N ordinary environments in this process; "async" steps them in
            processes of their own; "vector_entry_point" uses the environment's own vectorized form;
            "tensor" uses what is registered for it on tensors; "auto" takes "tensor" where there is
            such a thing and no `env_kwargs` are given, else what `own_vectorization` says.
        device: where "tensor" keeps its state.
        env_kwargs: keyword arguments of the environment.
        max_episode_steps: time limit in steps; None keeps the environment's own.
        wrappers: "module:callable" of each, called as `callable(env) -> env`, in order, on every
            copy. They go around single copies: only "sync" and "async" have them, and "auto" takes
            "sync".
        step_timeout: seconds after which an async environment that has not answered counts as hung,
            its constructor included. The others run in this process, which they may block.
        action_masks: whether every environment gives `info["action_mask"]`, as
            `vecpg.envs.answers.read_action_mask` takes it, and infos are to have it as (N, A). Not
            with "tensor", which "auto" takes no more; nor does it take a vectorized form that gives
            none.
        envs_per_worker: how many async copies are stepped in one process, one after the other; None
            divides them over the cores. 1 where they wait for something else than a core, or a
            process can have one only.

    Raises:
        ValueError: an unknown id or wrapper, an environment that has no time limit, or runs in
            another autoreset mode; action masks of actions that are neither Discrete nor
            MultiDiscrete.
        EnvironmentNotMade: (a ValueError) its constructor or a wrapper raised, died or hung, or
            this process can have no workers.

    Example:
        >>> envs = make_envs("CartPole-v1", 3, vectorization="sync")
        >>> obs, info = envs.reset(seed=[1, 2, 3])
        >>> obs.shape
        (3, 4)
    """
    if envs_per_worker is not None and envs_per_worker < 1:
        raise ValueError(f"envs_per_worker: expected at least 1, got {envs_per_worker}")
    spec = find_spec(env_id)
    check_time_limit(spec, max_episode_steps)
    vectorization = resolve_vectorization(
        spec,
        vectorization,
        env_kwargs,
        max_episode_steps=max_episode_steps,
        wrappers=wrappers,
        action_masks=action_masks,
    )
    around = load_wrappers(wrappers)
    if vectorization == "async":
        check_process()
    kwargs = made_with(env_kwargs, max_episode_steps)
    try:
        # Gymnasium's checker costs time on every step; one checked copy gives the same warnings.
        makers = [
            functools.partial(make_wrapped, spec, around, disable_env_checker=index > 0, **kwargs)
            for index in range(num_envs)
        ]
        if vectorization == "sync":
            envs: VectorEnv = InProcessEnvs(makers, action_masks)
        elif vectorization == "async":
            envs = WorkerEnvs(makers, step_timeout, envs_per_worker, action_masks)
        elif vectorization == "tensor":
            # The limit is that of what was named.
            kwargs.setdefault("max_episode_steps", spec.max_episode_steps)
            stand_in = on_tensors(spec) or spec.id
            envs = gymnasium.make_vec(stand_in, num_envs, device=device, **kwargs)
        else:
            envs = gymnasium.make_vec(
                spec, num_envs, vectorization_mode="vector_entry_point", **kwargs
            )
    except EnvironmentNotMade:
        raise
    except SubEnvironmentError as error:
        # The first of equal copies fails as all would.
        words = error.detail if (error.index, error.verb) == (0, "failed") else error
        raise EnvironmentNotMade(f"{env_id} could not be made: {words}", error.trace) from error
    # Whatever its constructor raises, the user has to hear which environment it was.
    except (Exception, SystemExit) as error:
        raise EnvironmentNotMade(
            f"{env_id} could not be made: {in_words(error)}", trace_of_making(error)
        ) from error
    try:
        check_autoreset(envs)
        _check_form(envs, env_id, num_envs)
        if action_masks:
            mask_sizes(envs.single_action_space)
    except ValueError:
        envs.close()
        raise
    return envs


def _check_form(envs: VectorEnv, env_id: str, num_envs: int) -> None:
    """Refuse a vectorized form that is not what was asked for."""
    for name in ("single_observation_space", "single_action_space"):
        if not isinstance(getattr(envs, name, None), gymnasium.Space):
            raise ValueError(
                f"{env_id}: expected a vectorized form with a {name}, got one without; use"
                " --vectorization sync"
            )
    if envs.num_envs != num_envs:
        raise ValueError(
            f"{env_id}: expected {num_envs} copies, got a vectorized form of {envs.num_envs}; use"
            f" --num-envs {envs.num_envs} or --vectorization sync"
        )


def check_autoreset(envs: VectorEnv) -> None:
    """Refuse a vector environment that is not in NEXT_STEP mode."""
    mode = envs.metadata.get("autoreset_mode")
    if mode != AutoresetMode.NEXT_STEP:
        raise ValueError(
            f"expected a vector environment in autoreset mode NEXT_STEP, got {mode} from"
            f" {type(envs.unwrapped).__name__}; make it with vecpg.envs.make_envs, or with"
            ' vector_kwargs={"autoreset_mode": AutoresetMode.NEXT_STEP}'
        )


def has_one_generator(envs: VectorEnv) -> bool:
    """Whether all copies draw from one generator, so that one seed resets them all."""
    return not isinstance(envs.unwrapped, SyncVectorEnv | AsyncVectorEnv | WorkerEnvs)
