"""Vector environments for any Gymnasium id, all in the NEXT_STEP autoreset mode.

In that mode the observation that comes with an episode's end is the true final one, and the step
after it only resets: its action is ignored and its reward is 0. No torch is imported here.
"""

import functools
import importlib
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from vecpg.envs.answers import mask_sizes, read_action_masks
from vecpg.envs.errors import (
    EnvironmentFailure,
    EnvironmentNotMade,
    SubEnvironmentError,
    in_words,
    trace_of_making,
)
from vecpg.envs.fork_server import check_process
from vecpg.envs.in_process import InProcessEnvs
from vecpg.envs.workers import WorkerEnvs
from vecpg.envs.wrappers import load_wrappers, make_wrapped
from vecpg.kernels.announce import once

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

_log = logging.getLogger(__name__)

# The vector environment around every definition.
_ON_TENSORS = "vecpg.envs.tensor:TensorVectorEnv"
# By the id of Gymnasium's own environment the id of what stands for it on tensors.
_stand_ins: dict[str, str] = {}
# The keyword by which Atari games end their episodes themselves.
_LIMIT_OF_ATARI = "max_num_frames_per_episode"
# What Gymnasium itself registers under the ids for which something of vecpg's stands.
_CLASSES = {
    "CartPole-v1": ("CartPoleEnv", "CartPoleVectorEnv"),
    "Pendulum-v1": ("PendulumEnv",),
    "Acrobot-v1": ("AcrobotEnv",),
    "MountainCarContinuous-v0": ("Continuous_MountainCarEnv",),
}


def register(
    env_id: str,
    definition: str,
    *,
    max_episode_steps: int,
    reward_threshold: float | None = None,
    stands_for: str | None = None,
) -> None:
    """Make an environment on tensors known to Gymnasium and to vecpg.

    Then `gymnasium.make_vec(env_id, num_envs=N, device="cuda", dtype="float64")` makes it, and
    `--env-id` trains it, in machine code on the CPU.

    Args:
        env_id: its id, such as "mine/Ball-v0".
        definition: "module:Class", a definition as `docs/environments.md` shows it. It is imported
            when the environment is made.
        max_episode_steps: time limit, at least 1.
        reward_threshold: the mean return that counts as solved.
        stands_for: the id of an environment of Gymnasium's own that this one equals: it is trained
            in this one's place, and judges what was trained in this one. Only as long as what is
            registered under that id is Gymnasium's own. Without it, evaluation plays this one,
            stepped in float64.

    Raises:
        ValueError: a definition that is not "module:Class", or a limit below 1.

    Example:
        >>> register("example/Cart-v0", "vecpg.envs.cartpole:CartPole", max_episode_steps=50)
        >>> make_envs("example/Cart-v0", 2).max_episode_steps
        50
    """
    if not isinstance(definition, str) or not all(definition.partition(":")):
        raise ValueError(f'definition: expected "module:Class", got {definition!r}')
    if not isinstance(max_episode_steps, int) or max_episode_steps < 1:
        raise ValueError(
            f"max_episode_steps: expected a whole number of at least 1, got {max_episode_steps!r}"
        )
    gymnasium.register(
        env_id,
        vector_entry_point=_ON_TENSORS,
        max_episode_steps=max_episode_steps,
        reward_threshold=reward_threshold,
        kwargs={"definition": definition},
    )
    # What is registered anew stands for what it says now.
    for original in [key for key, stand_in in _stand_ins.items() if stand_in == env_id]:
        del _stand_ins[original]
    if stands_for is not None:
        _stand_ins[stands_for] = env_id


# As text: the environment is imported when it is made.
gymnasium.register(
    "vecpg/LineWorld-v0",
    "vecpg.envs.line_world:LineWorld",
    max_episode_steps=100,
    reward_threshold=7.0,
)
register(
    "vecpg/CartPole-v1",
    "vecpg.envs.cartpole:CartPole",
    max_episode_steps=500,
    reward_threshold=475.0,
    stands_for="CartPole-v1",
)
register(
    "vecpg/Pendulum-v1",
    "vecpg.envs.pendulum:Pendulum",
    max_episode_steps=200,
    stands_for="Pendulum-v1",
)
register(
    "vecpg/Acrobot-v1",
    "vecpg.envs.acrobot:Acrobot",
    max_episode_steps=500,
    reward_threshold=-100.0,
    stands_for="Acrobot-v1",
)
register(
    "vecpg/MountainCarContinuous-v0",
    "vecpg.envs.mountain_car_continuous:MountainCarContinuous",
    max_episode_steps=999,
    reward_threshold=90.0,
    stands_for="MountainCarContinuous-v0",
)


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
    kwargs = _arguments(env_kwargs, max_episode_steps)
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
            on_tensors = _on_tensors(spec) or spec.id
            envs = gymnasium.make_vec(on_tensors, num_envs, device=device, **kwargs)
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
    check_autoreset(envs)
    if action_masks:
        try:
            mask_sizes(envs.single_action_space)
        except ValueError:
            envs.close()
            raise
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
        raise ValueError(f"--env-id {env_id}: {in_words(error)}{hint}") from error


def own_vectorization(
    spec: EnvSpec,
    env_kwargs: dict[str, Any] | None = None,
    *,
    max_episode_steps: int | None = None,
    action_masks: bool = False,
) -> str:
    """How Gymnasium itself steps copies: by their vectorized form where it serves, else sync.

    Where the vectorized form is another environment than the single one, or cannot be made, the log
    says so.
    """
    if spec.vector_entry_point is None:
        return "sync"
    if spec.entry_point is None:
        return "vector_entry_point"
    given = _arguments(env_kwargs, max_episode_steps)
    reason = _why_not_vectorized(spec, given) or _why_another(spec, given, action_masks)
    if reason is None:
        return "vector_entry_point"
    once(_log, f"{spec.id} is stepped one by one (sync): its vectorized form {reason}")
    return "sync"


def resolve_vectorization(
    spec: EnvSpec,
    vectorization: str,
    env_kwargs: dict[str, Any] | None = None,
    *,
    max_episode_steps: int | None = None,
    wrappers: Sequence[str] = (),
    action_masks: bool = False,
) -> str:
    """What "auto" stands for, and a refusal of what this environment does not have.

    Raises:
        ValueError: a way of stepping that this environment does not have, or whose arguments it
            does not take; wrappers, which go around single copies, where all are stepped at once;
            "tensor" where what is registered is no longer what the environment on
            tensors stands for, or with action masks.
    """
    on_tensors_only = _on_tensors(spec) == spec.id
    if action_masks and (vectorization == "tensor" or on_tensors_only):
        remedy = "another environment" if on_tensors_only else "--vectorization auto, sync or async"
        raise ValueError(
            f"--action-masks: environments on tensors give no infos, and so no action_mask; use"
            f" {remedy}, or --no-action-masks"
        )
    if wrappers and vectorization not in ("sync", "async"):
        if vectorization == "auto" and spec.entry_point is not None:
            if _on_tensors(spec) is not None or spec.vector_entry_point is not None:
                once(
                    _log,
                    f"{spec.id} is stepped one by one (sync): --wrappers go around single copies",
                )
            return "sync"
        only = ", which has no single form" if spec.entry_point is None else ""
        raise ValueError(
            f"--wrappers: they go around single copies of {spec.id}{only}; expected"
            f" --vectorization sync or async, got {vectorization}"
        )
    changed = None if _on_tensors(spec) in (None, spec.id) else _not_gymnasiums(spec)
    if vectorization == "auto":
        # Keyword arguments are those of Gymnasium's own environment.
        if _on_tensors(spec) is not None and not env_kwargs and not action_masks:
            if changed is None:
                return "tensor"
            once(_log, f"{spec.id} is stepped as it is registered, not on tensors: its {changed}")
        return own_vectorization(
            spec, env_kwargs, max_episode_steps=max_episode_steps, action_masks=action_masks
        )
    needed = {
        "sync": spec.entry_point,
        "async": spec.entry_point,
        "vector_entry_point": spec.vector_entry_point,
        "tensor": _on_tensors(spec),
    }
    if vectorization not in needed:
        raise ValueError(
            f"--vectorization: expected auto, {', '.join(needed)}, got {vectorization!r}"
        )
    if needed[vectorization] is None:
        others = [name for name, form in needed.items() if form is not None]
        raise ValueError(
            f"--vectorization: {spec.id} has no {vectorization} form; use {', '.join(others)} or"
            " auto"
        )
    if vectorization == "tensor" and changed is not None:
        raise ValueError(
            f"--vectorization tensor: {needed['tensor']} stands for Gymnasium's own {spec.id}, and"
            f" the {changed} of what is registered; use auto, or --env-id {needed['tensor']}"
        )
    if vectorization == "vector_entry_point" and spec.entry_point is not None:
        reason = _why_not_vectorized(spec, _arguments(env_kwargs, max_episode_steps))
        if reason is not None:
            raise ValueError(
                f"--vectorization vector_entry_point: the vectorized form of {spec.id} {reason};"
                " use sync, async or auto"
            )
    return vectorization


def judge_of(
    env_id: str,
    *,
    vectorization: str = "auto",
    env_kwargs: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
    wrappers: Sequence[str] = (),
    action_masks: bool = False,
) -> tuple[str, dict[str, Any]]:
    """What evaluation plays for an environment: its id, and settings for `make_envs`.

    It is stepped as in training, but for what is trained on tensors. That is judged by Gymnasium's
    own environment that it stands for, stepped as `own_vectorization` says, else by itself in
    float64.

    Args:
        env_id: a registered id, or `module:Id`.
        vectorization: of training.
        env_kwargs: keyword arguments of the environment.
        max_episode_steps: time limit; None keeps the environment's own.
        wrappers: as for `make_envs`.
        action_masks: as for `make_envs`.

    Raises:
        ValueError: an unknown id, or a way of stepping that the environment does not have.

    Example:
        >>> judge_of("vecpg/Acrobot-v1")[0]
        'Acrobot-v1'
        >>> judge_of("Acrobot-v1", vectorization="async")[1]["vectorization"]
        'async'
    """
    spec = find_spec(env_id)
    vectorization = resolve_vectorization(
        spec,
        vectorization,
        env_kwargs,
        max_episode_steps=max_episode_steps,
        wrappers=wrappers,
        action_masks=action_masks,
    )
    judge = spec
    if _on_tensors(spec) == spec.id:
        for original, stand_in in _stand_ins.items():
            found = gymnasium.registry.get(original)
            # With keyword arguments it may be another one.
            if stand_in != spec.id or found is None or env_kwargs:
                continue
            if _not_gymnasiums(found) is None:
                judge = found
        if judge is not spec:
            env_kwargs, max_episode_steps = None, max_episode_steps or spec.max_episode_steps
        else:
            env_kwargs = {"dtype": "float64", **(env_kwargs or {})}
    if vectorization == "tensor" or judge is not spec:
        vectorization = own_vectorization(judge, env_kwargs, max_episode_steps=max_episode_steps)
    return judge.id, {
        "vectorization": vectorization,
        "env_kwargs": env_kwargs,
        "max_episode_steps": max_episode_steps,
        "wrappers": wrappers,
    }


def _arguments(env_kwargs: dict[str, Any] | None, max_episode_steps: int | None) -> dict[str, Any]:
    """As Gymnasium takes them."""
    limit = {} if max_episode_steps is None else {"max_episode_steps": max_episode_steps}
    return {**(env_kwargs or {}), **limit}


def _why_not_vectorized(spec: EnvSpec, given: dict[str, Any]) -> str | None:
    """Why the vectorized form cannot be made, as far as is known without making it."""
    if spec.additional_wrappers:
        names = ", ".join(wrapper.name for wrapper in spec.additional_wrappers)
        return f"has none of its additional_wrappers ({names})"
    point: Any = spec.vector_entry_point
    limit = (
        {"max_episode_steps": spec.max_episode_steps} if spec.max_episode_steps is not None else {}
    )
    arguments = {**limit, **spec.kwargs, **given, "num_envs": 1}
    # Whatever a module raises while it is imported.
    try:
        creator = load_env_creator(point) if isinstance(point, str) else point
    except Exception as error:
        return f"cannot be loaded: {in_words(error)}"
    try:
        signature = inspect.signature(creator)
    except (TypeError, ValueError):  # it has none to look at, and has to be tried
        return None
    try:
        signature.bind(**arguments)
    except TypeError as error:
        return f"does not take what it would be made with: {error}"
    return None


def _why_another(spec: EnvSpec, given: dict[str, Any], action_masks: bool) -> str | None:
    """Why one copy by the vectorized form is not what a single one is."""
    try:
        envs = gymnasium.make_vec(spec, 1, vectorization_mode="vector_entry_point", **given)
    # Whatever its constructor raises.
    except (Exception, SystemExit) as error:
        return f"could not be made: {in_words(error)}"
    mode = envs.metadata.get("autoreset_mode")
    names = "single_observation_space", "single_action_space"
    found = [getattr(envs, name, None) for name in names]  # one that has none is no use
    without = _why_no_masks(envs) if action_masks else None
    _close(envs)
    if without is not None:
        return without
    if mode != AutoresetMode.NEXT_STEP:
        return f"is in autoreset mode {mode}"
    try:
        env = gymnasium.make(spec, disable_env_checker=True, **given)
    except (Exception, SystemExit):
        return None  # then there is nothing else to step
    own = [env.observation_space, env.action_space]
    _close(env)
    for what, theirs, single in zip(("observations", "actions"), found, own, strict=True):
        if theirs != single:
            return f"has {what} of {theirs}, and a single copy of {single}"
    return None


def _why_no_masks(envs: Any) -> str | None:
    """Why a copy by the vectorized form has no action masks, by its first reset."""
    one, none = np.ones(1, np.bool_), np.zeros(1, np.bool_)
    try:
        _, infos = envs.reset(seed=0)
        read_action_masks(infos, envs.single_action_space, needed=one, ended=none)
    except SubEnvironmentError as error:
        return f"gives no action masks at its reset: {error.detail}"
    # Whatever its reset raises.
    except (Exception, SystemExit) as error:
        return f"could not be reset: {in_words(error)}"
    return None


def _close(envs: Any) -> None:
    """What was made to be looked at only; nothing hangs on how it ends."""
    try:
        envs.close()
    except Exception as error:
        _log.warning("closing %s failed: %s", type(envs.unwrapped).__name__, in_words(error))


def _on_tensors(spec: EnvSpec) -> str | None:
    """The id of an environment on tensors: its own, or that of what stands for it."""
    if spec.vector_entry_point == _ON_TENSORS:
        return spec.id
    found = gymnasium.registry.get(_stand_ins.get(spec.id, ""))
    return found.id if found is not None and found.vector_entry_point == _ON_TENSORS else None


def _not_gymnasiums(spec: EnvSpec) -> str | None:
    """What is not Gymnasium's own about what is registered under one of its ids, if anything."""
    for name in ("entry_point", "vector_entry_point"):
        point = getattr(spec, name)
        own = isinstance(point, str) and point.startswith("gymnasium.envs.")
        if own and spec.id in _CLASSES:
            own = point.rpartition(":")[2] in _CLASSES[spec.id]
        if point is not None and not own:
            return f"{name} is {point!r}"
    if spec.additional_wrappers:
        names = ", ".join(wrapper.name for wrapper in spec.additional_wrappers)
        return f"additional_wrappers are {names}"
    return f"kwargs are {spec.kwargs}" if spec.kwargs else None


def check_time_limit(spec: EnvSpec, max_episode_steps: int | None) -> None:
    """Refuse an environment whose episodes may never end."""
    limited = spec.max_episode_steps is not None or spec.kwargs.get(_LIMIT_OF_ATARI) is not None
    if max_episode_steps is None and not limited:
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
    return not isinstance(envs.unwrapped, SyncVectorEnv | AsyncVectorEnv | WorkerEnvs)
