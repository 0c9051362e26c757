"""Environments stepped one after the other, on Gymnasium's SyncVectorEnv, that say which failed."""

import functools
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from vecpg.envs.errors import SubEnvironmentError


class InProcessEnvs(SyncVectorEnv):
    """N environments in this process, in NEXT_STEP mode.

    Args:
        env_fns: one maker for each environment.

    Raises:
        SubEnvironmentError: from `reset`, `step` and making one: an environment raised. Those made
            before are closed.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gymnasium.Env[Any, Any]]]) -> None:
        made: list[gymnasium.Env[Any, Any]] = []
        try:
            super().__init__(
                [functools.partial(_make, env_fn, made) for env_fn in env_fns],
                autoreset_mode=AutoresetMode.NEXT_STEP,
            )
        except BaseException:
            for env in made:
                env.close()
            raise

    def reset(self, **kwargs: Any) -> Any:
        """As `SyncVectorEnv.reset`."""
        try:
            return super().reset(**kwargs)
        except (Exception, SystemExit) as error:
            raise self._failure(error) from None

    def step(self, actions: Any) -> Any:
        """As `SyncVectorEnv.step`."""
        try:
            return super().step(actions)
        except (Exception, SystemExit) as error:
            raise self._failure(error) from None

    def _failure(self, error: BaseException) -> BaseException:
        """`error` with the environment's index, which Gymnasium does not tell.

        The environment is the one of whose method a frame is left in the traceback. (A wrapper
        that noted its index would cost 3 % of the speed of 64 CartPoles.) If there is none, what
        it returned could not be used.
        """
        frame = None
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for index, env in enumerate(self.envs):
                if frame.f_locals.get("self") is env:
                    return SubEnvironmentError.raised(index, error)
        if frame is not None and frame.f_code in _GYMNASIUMS_LOOPS:
            index, verb, detail, trace = SubEnvironmentError.raised(
                frame.f_locals["i"], error
            ).args[0]
            return SubEnvironmentError((index, verb, f"{detail}; {_EXPECTED}", trace))
        if any(obs is not None for obs in self._env_obs):  # as before the first reset
            for index, obs in enumerate(self._env_obs):
                if not self._fits(obs):
                    return SubEnvironmentError.raised(index, error)
        return error

    def _fits(self, obs: Any) -> bool:
        space = self.single_observation_space
        if np.shape(obs) != space.shape or space.dtype is None:
            return False
        return np.can_cast(np.asarray(obs).dtype, space.dtype, "same_kind")


# Where Gymnasium takes apart what environment `i` has returned.
_GYMNASIUMS_LOOPS = (SyncVectorEnv.step.__code__, SyncVectorEnv.reset.__code__)
_EXPECTED = (
    "expected an observation, then, of a step, a reward (a number) and two flags, then a dict"
)


def _make(
    env_fn: Callable[[], gymnasium.Env[Any, Any]], made: list[gymnasium.Env[Any, Any]]
) -> gymnasium.Env[Any, Any]:
    """Make one, and keep it in `made`, whose length is its index."""
    try:
        env = env_fn()
    except (Exception, SystemExit) as error:
        raise SubEnvironmentError.raised_in_making(len(made), error) from error
    made.append(env)
    return env
