"""How copies are stepped: what "auto" stands for, and what evaluation plays."""

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import AutoresetMode

from vecpg.envs.answers import read_action_masks
from vecpg.envs.errors import SubEnvironmentError, in_words
from vecpg.envs.registered import find_spec, not_gymnasiums, on_tensors, original_of
from vecpg.kernels.announce import once

_log = logging.getLogger(__name__)


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
    given = made_with(env_kwargs, max_episode_steps)
    if _why_not_taken(spec.entry_point, {**spec.kwargs, **(env_kwargs or {})}) is not None:
        return "sync"  # a single copy, which says what is wrong
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
    ranks: int = 1,
) -> str:
    """What "auto" stands for, and a refusal of what this environment does not have.

    Args:
        spec: of the environment.
        vectorization: what is asked for.
        env_kwargs: keyword arguments of the environment.
        max_episode_steps: time limit; None keeps the environment's own.
        wrappers: as for `make_envs`.
        action_masks: as for `make_envs`.
        ranks: over how many the copies are split. With more than one they are not stepped by the
            environment's own vectorized form, whose copies draw from one generator.

    Raises:
        ValueError: a way of stepping that this environment does not have, or whose arguments it
            does not take; wrappers, which go around single copies, where all are stepped at once;
            "tensor" where what is registered is no longer what the environment on
            tensors stands for, or with action masks.
    """
    on_tensors_only = on_tensors(spec) == spec.id
    if action_masks and (vectorization == "tensor" or on_tensors_only):
        remedy = "another environment" if on_tensors_only else "--vectorization auto, sync or async"
        raise ValueError(
            f"--action-masks: environments on tensors give no infos, and so no action_mask; use"
            f" {remedy}, or --no-action-masks"
        )
    if wrappers and vectorization not in ("sync", "async"):
        if vectorization == "auto" and spec.entry_point is not None:
            if on_tensors(spec) is not None or spec.vector_entry_point is not None:
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
    changed = None if on_tensors(spec) in (None, spec.id) else not_gymnasiums(spec)
    if vectorization == "auto":
        # Keyword arguments are those of Gymnasium's own environment.
        if on_tensors(spec) is not None and not action_masks:
            reason = f"its {changed}" if changed is not None else "--env-kwargs are given"
            if changed is None and not env_kwargs:
                return "tensor"
            once(_log, f"{spec.id} is stepped as it is registered, not on tensors: {reason}")
        own = own_vectorization(
            spec, env_kwargs, max_episode_steps=max_episode_steps, action_masks=action_masks
        )
        if own == "sync" or ranks == 1:
            return own
        if spec.entry_point is not None:
            once(
                _log,
                f"{spec.id} is stepped one by one (sync): the copies of its vectorized form draw"
                " from one generator, which cannot be split",
            )
            return "sync"
        vectorization = own
    needed = {
        "sync": spec.entry_point,
        "async": spec.entry_point,
        "vector_entry_point": spec.vector_entry_point,
        "tensor": on_tensors(spec),
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
    strange = sorted({*(env_kwargs or {})} - {"dtype"})
    if vectorization == "tensor" and needed["tensor"] != spec.id and strange:
        raise ValueError(
            f"--vectorization tensor: {needed['tensor']} stands for {spec.id} without keyword"
            f" arguments, and has no {', '.join(strange)}; use auto, sync or async"
        )
    if vectorization == "vector_entry_point" and spec.entry_point is not None:
        lacking = _why_not_vectorized(spec, made_with(env_kwargs, max_episode_steps))
        if lacking is not None:
            raise ValueError(
                f"--vectorization vector_entry_point: the vectorized form of {spec.id} {lacking};"
                " use sync, async or auto"
            )
    if vectorization == "vector_entry_point" and ranks > 1:
        remedy = "start one rank" if spec.entry_point is None else "use sync or async"
        raise ValueError(
            "--vectorization vector_entry_point: its copies draw from one generator, which cannot"
            f" be split over {ranks} ranks; {remedy}"
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
    if on_tensors(spec) == spec.id:
        # With keyword arguments it may be another one.
        judge = (None if env_kwargs else original_of(spec)) or spec
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


def made_with(env_kwargs: dict[str, Any] | None, max_episode_steps: int | None) -> dict[str, Any]:
    """The keyword arguments of a copy, as Gymnasium takes them."""
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
    return _why_not_taken(point, arguments)


def _why_not_taken(point: Any, arguments: dict[str, Any]) -> str | None:
    """Why an entry point cannot be called with these, as far as its signature tells."""
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
    number = getattr(envs, "num_envs", None)
    without = _why_no_masks(envs) if action_masks else None
    _close(envs)
    if without is not None:
        return without
    if mode != AutoresetMode.NEXT_STEP:
        return f"is in autoreset mode {mode}"
    if number != 1:
        return f"makes {number} copies where 1 is asked for"
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
    except (Exception, SystemExit) as error:
        _log.warning("closing %s failed: %s", type(envs.unwrapped).__name__, in_words(error))
