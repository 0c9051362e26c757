"""Environments stepped one after the other, on Gymnasium's SyncVectorEnv, that say which failed."""

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
        SubEnvironmentError: from `reset` and `step`: an environment raised.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gymnasium.Env[Any, Any]]]) -> None:
        super().__init__(env_fns, autoreset_mode=AutoresetMode.NEXT_STEP)

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
            return SubEnvironmentError.raised(frame.f_locals["i"], error)
        for index, obs in enumerate(self._env_obs):
            if obs is not None and np.shape(obs) != self.single_observation_space.shape:
                return SubEnvironmentError.raised(index, error)
        return error


# Where Gymnasium takes apart what environment `i` has returned.
_GYMNASIUMS_LOOPS = (SyncVectorEnv.step.__code__, SyncVectorEnv.reset.__code__)
