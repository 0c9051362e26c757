"""Wrappers that a user names, around every copy of an environment."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from vecpg.envs.errors import WrapperFailed, in_words
from vecpg.named import load

Wrapper = tuple[str, Callable[[gymnasium.Env[Any, Any]], Any]]


def load_wrappers(names: Sequence[str]) -> list[Wrapper]:
    """Name and callable of each "module:callable".

    Raises:
        ValueError: one cannot be imported, or is not callable.

    Example:
        >>> load_wrappers(["gymnasium.wrappers:FlattenObservation"])
        [('gymnasium.wrappers:FlattenObservation', <class '...FlattenObservation'>)]
    """
    return [(name, load(name, "--wrappers")) for name in names]


def make_wrapped(
    spec: EnvSpec, wrappers: Sequence[Wrapper], **kwargs: Any
) -> gymnasium.Env[Any, Any]:
    """One copy of an environment, in its wrappers, of which the first is the innermost.

    Args:
        spec: what is registered.
        wrappers: as `load_wrappers` gives them.
        kwargs: as `gymnasium.make` takes them.

    Raises:
        Exception: whatever the constructor raised.
        WrapperFailed: a wrapper raised, or returned something that is no environment. What was
            made is closed.

    Example:
        >>> flat = load_wrappers(["gymnasium.wrappers:FlattenObservation"])
        >>> make_wrapped(gymnasium.spec("FrozenLake-v1"), flat).observation_space
        Box(0, 1, (16,), int64)
    """
    env = gymnasium.make(spec, **kwargs)
    try:
        for name, wrap in wrappers:
            try:
                wrapped = wrap(env)
            # Whatever it raises, the user has to hear which one it was.
            except Exception as error:
                raise WrapperFailed(f"--wrappers {name}: {in_words(error)}") from error
            if not isinstance(wrapped, gymnasium.Env):
                raise WrapperFailed(
                    f"--wrappers {name}: expected a gymnasium.Env, got {type(wrapped).__name__};"
                    " it is called as callable(env) -> env"
                )
            env = wrapped
    except BaseException:
        env.close()
        raise
    return env
