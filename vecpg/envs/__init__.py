"""Vector environments for any Gymnasium id, all in the NEXT_STEP autoreset mode.

In that mode the observation that comes with an episode's end is the true final one, and the step
after it only resets: its action is ignored and its reward is 0. No torch is imported here.
"""

import functools
import importlib
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from vecpg.envs.errors import EnvironmentFailure, SubEnvironmentError
from vecpg.envs.in_process import InProcessEnvs
from vecpg.envs.workers import WorkerEnvs

__all__ = [
    "EnvironmentFailure",
    "SubEnvironmentError",
    "check_autoreset",
    "check_time_limit",
    "find_spec",
    "has_one_generator",
    "make_envs",
    "own_vectorization",
    "resolve_vectorization",
]


# As text: the environment is imported when it is made.
gymnasium.register(
    "vecpg/LineWorld-v0",
    "vecpg.envs.line_world:LineWorld",
    max_episode_steps=100,
    reward_threshold=7.0,
)
gymnasium.register(
    "vecpg/CartPole-v1",
    vector_entry_point="vecpg.envs.cartpole:CartPole",
    max_episode_steps=500,
    reward_threshold=475.0,
)
gymnasium.register(
    "vecpg/Pendulum-v1",
    vector_entry_point="vecpg.envs.pendulum:Pendulum",
    max_episode_steps=200,
)


# What vecpg has on tensors, by the id of Gymnasium's own and by its own.
_ON_TENSORS = {
    env_id: own
    for own in ("vecpg/CartPole-v1", "vecpg/Pendulum-v1")
    for env_id in (own, own.removeprefix("vecpg/"))
}


def make_envs(
    env_id: str,
    num_envs: int,
    *,
    vectorization: str = "auto",
    device: str = "cpu",
    env_kwargs: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
    step_timeout: float = 60.0,
) -> VectorEnv:
    """N copies of a Gymnasium environment as one vector environment in NEXT_STEP mode.

    Args:
        env_id: a registered id; `module:Id` imports the module first.
        num_envs: the number of copies, at least 1.
        vectorization: "sync" steps N ordinary environments in this process; "async" steps each in
            a process of its own; "vector_entry_point" uses the environment's own vectorized form;
            "tensor" uses vecpg's form of it on tensors; "auto" takes "tensor" where vecpg has it
            and no `env_kwargs` are given, else what `own_vectorization` says.
        device: where "tensor" keeps its state.
        env_kwargs: keyword arguments of the environment.
        max_episode_steps: time limit in steps; None keeps the environment's own.
        step_timeout: seconds after which an async environment that has not answered counts as hung.

    Raises:
        ValueError: an unknown id, an environment that cannot be made, has no time limit, or runs
            in another autoreset mode.

    Example:
        >>> envs = make_envs("CartPole-v1", 3, vectorization="sync")
        >>> obs, info = envs.reset(seed=[1, 2, 3])
        >>> obs.shape
        (3, 4)
    """
    spec = find_spec(env_id)
    vectorization = resolve_vectorization(spec, vectorization, env_kwargs)
    check_time_limit(spec, max_episode_steps)
    kwargs = dict(env_kwargs or {})
    if max_episode_steps is not None:
        kwargs["max_episode_steps"] = max_episode_steps
    try:
        # Gymnasium's checker costs time on every step; one checked copy gives the same warnings.
        makers = [
            functools.partial(gymnasium.make, spec, disable_env_checker=index > 0, **kwargs)
            for index in range(num_envs)
        ]
        if vectorization == "sync":
            envs: VectorEnv = InProcessEnvs(makers)
        elif vectorization == "async":
            envs = WorkerEnvs(makers, step_timeout)
        elif vectorization == "tensor":
            envs = gymnasium.make_vec(_ON_TENSORS[spec.id], num_envs, device=device, **kwargs)
        else:
            envs = gymnasium.make_vec(
                spec, num_envs, vectorization_mode="vector_entry_point", **kwargs
            )
    # Whatever its constructor raises, the user has to hear which environment it was.
    except Exception as error:
        raise ValueError(f"{env_id} could not be made: {_words(error)}") from error
    check_autoreset(envs)
    return envs


def find_spec(env_id: str) -> EnvSpec:
    """The registered specification of an id, with Gymnasium's own suggestion when there is none."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gymnasium.spec(name)
    # The module is the user's own, and may raise anything while it is imported.
    except Exception as error:
        versions = [
            known
            for known in gymnasium.registry
            if known.startswith(f"{name}-v") or known.endswith(f"/{name}")
        ]
        hint = f"; did you mean {' or '.join(versions)}?" if versions else ""
        raise ValueError(f"--env-id {env_id}: {_words(error)}{hint}") from error


def own_vectorization(spec: EnvSpec) -> str:
    """How Gymnasium itself steps copies: by their vectorized form where there is one, else sync."""
    return "vector_entry_point" if spec.vector_entry_point is not None else "sync"


def resolve_vectorization(
    spec: EnvSpec, vectorization: str, env_kwargs: dict[str, Any] | None = None
) -> str:
    """What "auto" stands for, and a refusal of what this environment does not have."""
    if vectorization == "auto":
        # Keyword arguments are those of Gymnasium's own environment.
        on_tensors = spec.id in _ON_TENSORS and not env_kwargs
        return "tensor" if on_tensors else own_vectorization(spec)
    needed = {
        "sync": spec.entry_point,
        "async": spec.entry_point,
        "vector_entry_point": spec.vector_entry_point,
        "tensor": _ON_TENSORS.get(spec.id),
    }
    if vectorization not in needed:
        raise ValueError(
            f"--vectorization: expected auto, {', '.join(needed)}, got {vectorization!r}"
        )
    if needed[vectorization] is None:
        other = "vector_entry_point" if spec.entry_point is None else "sync"
        raise ValueError(
            f"--vectorization: {spec.id} has no {vectorization} form; use {other} or auto"
        )
    return vectorization


def check_time_limit(spec: EnvSpec, max_episode_steps: int | None) -> None:
    """Refuse an environment whose episodes may never end."""
    if max_episode_steps is None and spec.max_episode_steps is None:
        raise ValueError(
            f"{spec.id} has no time limit, and REINFORCE needs whole episodes;"
            " give one with --max-episode-steps"
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
    return not isinstance(envs.unwrapped, SyncVectorEnv | AsyncVectorEnv)


def _words(error: Exception) -> str:
    """The error in one line, with its type where the message alone would not say."""
    text = " ".join(str(error).split())
    if isinstance(error, gymnasium.error.Error) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
