"""Environments stepped one after the other, on Gymnasium's SyncVectorEnv, that say which failed."""

import copy
import functools
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import concatenate, iterate

from vecpg.envs.answers import (
    check_observation,
    check_whole_numbers,
    mask_sizes,
    read_action_mask,
    read_answer,
    with_typed_observations,
)
from vecpg.envs.errors import SubEnvironmentError, close_env


class InProcessEnvs(SyncVectorEnv):
    """N environments in this process, in NEXT_STEP mode.

    Of their infos nothing is collected but the action masks, where they are asked for:
    `infos["action_mask"]`, (N, A) bool, True = allowed, and True everywhere after an episode's end.

    Args:
        env_fns: one maker for each environment.
        action_masks: whether the environments' infos have an `action_mask`, and it is wanted. Not
            of environments whose actions `mask_sizes` refuses.

    Raises:
        SubEnvironmentError: from `reset`, `step` and making one: an environment raised. Those made
            before are closed.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gymnasium.Env[Any, Any]]],
        action_masks: bool = False,
    ) -> None:
        self._with_masks, self._masks = action_masks, np.empty((0, 0), np.bool_)
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
        if self._with_masks and not self._masks.size:
            # Those that are not reset keep theirs.
            self._masks = np.ones((self.num_envs, sum(mask_sizes(self.single_action_space))), bool)
        try:
            obs, _ = super().reset(**kwargs)
            self._check_observations()
            return obs, self._infos()
        except SubEnvironmentError:
            raise
        except (Exception, SystemExit) as error:
            raise self._failure(error) from None

    def step(self, actions: Any) -> Any:
        """As `SyncVectorEnv.step`, with rewards and flags as `read_answer` takes them."""
        try:
            self._step_each(actions)
            self._check_observations()
            self._observations = concatenate(
                self.single_observation_space, self._env_obs, self._observations
            )
        except SubEnvironmentError:
            raise
        except (Exception, SystemExit) as error:
            raise self._failure(error) from None
        self._autoreset_envs = np.logical_or(self._terminations, self._truncations)
        answers = self._rewards, self._terminations, self._truncations
        return copy.deepcopy(self._observations), *map(np.copy, answers), self._infos()

    def _check_observations(self) -> None:
        """Whole numbers of another type would be taken for others without a word."""
        space = self.single_observation_space
        # Of a single number Gymnasium, or `with_typed_observations`, sees to it.
        if not space.shape or space.dtype is None or space.dtype.kind not in "iu":
            return
        for index, obs in enumerate(self._env_obs):
            try:
                check_whole_numbers(obs, space.dtype)
            except TypeError as error:
                raise SubEnvironmentError((index, "failed", f"TypeError: {error}", "")) from None

    def _infos(self) -> dict[str, Any]:
        return {"action_mask": self._masks.copy()} if self._with_masks else {}

    def _add_info(
        self, vector_infos: dict[str, Any], env_info: Any, env_num: int
    ) -> dict[str, Any]:
        """What Gymnasium's `reset` does with the info of an environment."""
        if not isinstance(env_info, dict):
            raise _no_dict(env_num, env_info)
        if self._with_masks:
            self._read_mask(env_num, env_info)
        return vector_infos

    def _read_mask(self, index: int, info: Any) -> None:
        try:
            self._masks[index] = read_action_mask(info, self.single_action_space)
        except TypeError as error:
            raise SubEnvironmentError((index, "failed", f"TypeError: {error}", "")) from None

    def _step_each(self, actions: Any) -> None:
        rewards, terminations, truncations = self._rewards, self._terminations, self._truncations
        each = zip(iterate(self.action_space, actions), self.envs, strict=True)
        for i, (action, env) in enumerate(each):
            if self._autoreset_envs[i]:
                self._env_obs[i], info = env.reset()
                rewards[i], terminations[i], truncations[i] = 0.0, False, False
            else:
                self._env_obs[i], reward, terminated, truncated, info = env.step(action)
                rewards[i], terminations[i], truncations[i] = read_answer(
                    reward, terminated, truncated
                )
            if not isinstance(info, dict):
                raise _no_dict(i, info)
            if self._with_masks:
                self._masks[i] = True
                if not (terminations[i] or truncations[i]):
                    self._read_mask(i, info)

    def _failure(self, error: BaseException) -> BaseException:
        """`error` with the environment's index, which Gymnasium does not tell.

        The environment is the one of whose method a frame is left in the traceback. (A wrapper
        that noted its index would cost 3 % of the speed of 64 CartPoles.) If there is none, what
        it returned could not be used.
        """
        frame = loop = None
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for index, env in enumerate(self.envs):
                if frame.f_locals.get("self") is env:
                    return SubEnvironmentError.raised(index, error)
            loop = frame if frame.f_code in _LOOPS else loop
        if loop is not None and (loop is frame or loop.f_code is InProcessEnvs._step_each.__code__):
            index, verb, detail, trace = SubEnvironmentError.raised(loop.f_locals["i"], error).args[
                0
            ]
            hint = f"; {_EXPECTED}" if loop is frame else ""
            return SubEnvironmentError((index, verb, f"{detail}{hint}", trace))
        # Before the first reset there are none.
        together = frame is not None and frame.f_globals.get("__name__", "").startswith(_TOGETHER)
        if together or any(obs is not None for obs in self._env_obs):
            for index, obs in enumerate(self._env_obs):
                try:
                    check_observation(obs, self.single_observation_space)
                except (TypeError, ValueError) as found:
                    return SubEnvironmentError.raised(index, found)
        return error

    def close_extras(self, **kwargs: Any) -> None:
        """Close every environment, whatever closing another does."""
        for index, env in enumerate(self.envs):
            close_env(env, index)


# Where what all environments have returned is put together.
_TOGETHER = ("gymnasium.vector.utils", "numpy")
# Where what environment `i` has returned is taken apart.
_LOOPS = (InProcessEnvs._step_each.__code__, SyncVectorEnv.reset.__code__)
_EXPECTED = (
    "expected an observation, then, of a step, a reward (a number) and two flags, then a dict"
)


def _no_dict(index: int, info: Any) -> SubEnvironmentError:
    detail = f"TypeError: expected an info that is a dict, got {info!r}"
    return SubEnvironmentError((index, "failed", detail, ""))


def _make(
    env_fn: Callable[[], gymnasium.Env[Any, Any]], made: list[gymnasium.Env[Any, Any]]
) -> gymnasium.Env[Any, Any]:
    """Make one, and keep it in `made`, whose length is its index."""
    try:
        env = with_typed_observations(env_fn())
    except (Exception, SystemExit) as error:
        raise SubEnvironmentError.raised_in_making(len(made), error) from error
    made.append(env)
    return env
