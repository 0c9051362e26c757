"""Collecting by stepping any Gymnasium vector environment in NEXT_STEP mode.

`play` applies the start window's rule (`data.NEXT`) to what environments answer. Training stores
what it yields (`collect_by_stepping`); evaluation adds it up.
"""

import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from vecpg.envs import EnvironmentFailure, SubEnvironmentError, has_one_generator
from vecpg.envs.answers import mask_sizes, read_action_masks
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.kernels.jit import jit
from vecpg.noise import Purpose, Stream
from vecpg.policy import Policy
from vecpg.policy.sampling import Draw
from vecpg.rollout.data import FINISHED, NEXT, PLAYING, Rollout, Rows

# The square of the largest float32.
_LARGEST_SQUARE = float(np.finfo(np.float32).max) ** 2
# Of the observations that there is room for at first; there are 1024 rows at most.
_MOST_BYTES = 2**28


class _Copies(NamedTuple):
    """How messages name copies of an environment, whichever of the run's they are.

    seeds:     as their `reset` has taken them.
    first_env: the index in the whole run of the first.
    """

    seeds: int | list[int]
    first_env: int

    def name(self, index: int) -> str:
        """Of one of them."""
        return f"environment {self.first_env + index}"

    def reset(self, index: int) -> str:
        """How it was reset last."""
        if isinstance(self.seeds, int):
            return f"all reset together with seed {self.seeds}"
        return f"reset with seed {self.seeds[index]}"

    @property
    def common(self) -> str:
        """Where it is not known which one it was, only a common seed can be named."""
        return f" ({self.reset(0)})" if isinstance(self.seeds, int) else ""


class Row(NamedTuple):
    """One step of N environments, on the host. Ends are False, and rewards 0, where `mask` is."""

    rewards: NDArray[np.float64]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]
    mask: NDArray[np.bool_]


def collect_by_stepping(
    envs: VectorEnv,
    policy: Policy,
    draw: Draw,
    *,
    num_steps: int,
    stream: Stream,
    action_masks: bool = False,
) -> Rollout:
    """As `collect`, from any vector environment on the host.

    One copy of the actions to the host at each step is the only wait for the policy's device.

    Args:
        envs: N environments in NEXT_STEP mode.
        policy: whose actions are drawn.
        draw: as `sampler` gives it.
        num_steps: the start window.
        stream: fixes the reset seeds.
        action_masks: whether the environments' infos say which actions are allowed.
    """
    numbers = stream.num_envs * math.prod(policy.obs_shape)
    most = max(1, _MOST_BYTES // (numbers * policy.obs_dtype.itemsize))
    rows = Rows(
        min(num_steps, 1024, most) + 1,
        stream.num_envs,
        (policy.obs_shape, policy.obs_dtype),
        (policy.action_shape, policy.action_dtype),
        action_masks=sum(mask_sizes(envs.single_action_space)) if action_masks else None,
    )
    host = rows.host

    def act(t: int, obs: NDArray[Any], *masks: NDArray[np.bool_]) -> NDArray[Any]:
        rows.make_room(t + 1)
        host.obs[t] = obs
        actions: NDArray[Any] = host.actions[t]
        for mask in masks:
            host.action_masks[t] = mask
        given = map(torch.from_numpy, masks)
        # Indexing NumPy's array costs half of indexing torch's.
        draw(t, torch.from_numpy(host.obs[t]), torch.from_numpy(actions), *given)
        return policy.for_env(actions)

    seeds = seeds_of(envs, stream, Purpose.TRAINING_RESET)
    length = 0
    with torch.inference_mode():
        for row, following in play(
            envs,
            act,
            num_steps=num_steps,
            seeds=seeds,
            first_env=stream.first_env,
            action_masks=action_masks,
        ):
            host.rewards[length] = row.rewards
            host.terminations[length] = row.terminations
            host.truncations[length] = row.truncations
            host.mask[length] = row.mask
            if action_masks:
                host.action_masks[length, ~row.mask] = True
            length += 1
            last_obs = following
    host.obs[length] = last_obs
    return rows.rollout(length, policy.device, stream)


def seeds_of(envs: VectorEnv, stream: Stream, purpose: Purpose) -> int | list[int]:
    """What `reset` takes of a stream: a seed for each copy, or one where they share a generator."""
    if not has_one_generator(envs):
        return stream.reset_seeds(purpose)
    seed = stream.common_seed(purpose)
    # Those of others may be written in C++, and take what an `int` holds.
    return seed if isinstance(envs.unwrapped, TensorVectorEnv) else seed >> 1


def play(
    envs: VectorEnv,
    act: Callable[..., NDArray[Any]],
    *,
    num_steps: int | None = None,
    quotas: NDArray[np.int64] | None = None,
    seeds: int | list[int],
    first_env: int = 0,
    action_masks: bool = False,
) -> Iterator[tuple[Row, NDArray[Any]]]:
    """Reset, then step until every episode that counts has ended.

    An environment that ends an episode starts another one if and only if it has made fewer than
    `num_steps` real steps and finished fewer episodes than its quota.

    Args:
        envs: N environments in NEXT_STEP mode.
        act: from the step number and the observations to the actions; with `action_masks` also
            from (N, A) bool, True = allowed.
        num_steps: the start window in real steps, counted from the reset. None = no end.
        quotas: (N,) episodes. None = no end.
        seeds: as the environments' `reset` takes them.
        first_env: the index in the whole run of the first environment, for what is said of them.
        action_masks: whether infos say which actions are allowed. What is ignored, the action after
            an episode's end, may be any.

    Yields:
        each row, and the observations that follow it (after an end, the final one). A row's arrays
        are written anew at the next one.
    """
    copies = _Copies(seeds, first_env)
    try:
        # VectorEnv annotates one integer; Sync and Async document the list.
        obs, infos = envs.reset(seed=seeds)  # type: ignore[arg-type]
    except (Exception, SystemExit) as error:
        raise _failure(error, "its reset", copies) from error
    num_envs = envs.num_envs
    most = np.iinfo(np.int64).max
    window = most if num_steps is None else num_steps
    quotas = np.full(num_envs, most) if quotas is None else quotas
    done = np.zeros((2, num_envs), np.int64)
    state = np.full(num_envs, PLAYING, np.int8)
    row = Row(np.empty(num_envs), *np.empty((3, num_envs), np.bool_))
    obs = np.asarray(obs)
    space = envs.single_observation_space
    _check_observations(obs, state, space, "its reset", copies)
    masks: tuple[NDArray[np.bool_], ...] = ()
    if action_masks:
        none_ended = np.zeros(num_envs, np.bool_)
        masks = (_masks(envs, infos, state, none_ended, "its reset", copies),)
    t, playing = 0, num_envs
    while playing:
        actions = act(t, obs, *masks)
        try:
            obs, rewards, terminations, truncations, infos = envs.step(actions)
        except (Exception, SystemExit) as error:
            raise _failure(error, f"step {t}", copies) from error
        # Environments on tensors, on the CPU, are stepped like any other.
        obs = np.asarray(obs)
        _check_observations(obs, state, space, f"step {t}", copies)
        rewards = _column("rewards", rewards, np.float64, f"step {t}", copies, num_envs)
        terminations = _column(
            "terminations", terminations, np.bool_, f"step {t}", copies, num_envs
        )
        truncations = _column("truncations", truncations, np.bool_, f"step {t}", copies, num_envs)
        playing, bad = _next_row(
            rewards, terminations, truncations, window, quotas, done, state, *row
        )
        if bad >= 0:
            raise _not_finite("reward", rewards[bad], bad, f"step {t}", copies)
        if action_masks:
            ended = terminations | truncations
            masks = (_masks(envs, infos, state, ended, f"step {t}", copies),)
        yield row, obs
        t += 1


def _masks(
    envs: VectorEnv,
    infos: Any,
    state: NDArray[np.int8],
    ended: NDArray[np.bool_],
    when: str,
    copies: _Copies,
) -> NDArray[np.bool_]:
    """(N, A) of what `infos` allow: where an episode goes on, or begins, that is something."""
    space = envs.single_action_space
    try:
        return read_action_masks(infos, space, needed=state == PLAYING, ended=ended)
    except SubEnvironmentError as error:
        raise _failure(error, when, copies) from error


def _column(
    what: str, given: Any, dtype: Any, when: str, copies: _Copies, num_envs: int
) -> NDArray[Any]:
    """(N,) of what a step has returned, from (N,) or (N, 1) numbers of any kind."""
    found = np.asarray(given)
    if found.dtype == dtype and found.shape == (num_envs,):
        return found
    if found.dtype.kind in "biuf" and found.shape in ((num_envs,), (num_envs, 1)):
        return found.reshape(num_envs).astype(dtype)
    raise EnvironmentFailure(
        f"the environments returned {what} of shape {found.shape} and dtype {found.dtype} at {when}"
        f"{copies.common}; expected numbers of shape ({num_envs},)"
    )


@jit
def _next_row(  # type: ignore[no-untyped-def]
    rewards,
    terminations,
    truncations,
    num_steps,
    quotas,
    done,
    state,
    row_rewards,
    row_terminations,
    row_truncations,
    row_mask,
):
    """Write a row, and set what every environment does at the next.

    `done` is (2, N), real steps and finished episodes so far. Returns how many environments have
    not finished, and the index of one whose reward is not finite as float32, or -1.
    """
    playing = 0
    bad = -1
    for n in range(len(state)):
        now = state[n]
        real = now == PLAYING
        terminated = real and terminations[n]
        truncated = real and truncations[n]
        row_mask[n] = real
        row_terminations[n] = terminated
        row_truncations[n] = truncated
        row_rewards[n] = rewards[n] if real else 0.0
        if bad < 0 and not np.isfinite(np.float32(row_rewards[n])):
            bad = n
        ends = terminated or truncated
        done[0, n] += real
        done[1, n] += ends
        more = done[0, n] < num_steps and done[1, n] < quotas[n]
        state[n] = NEXT[now, int(ends), int(more)]
        playing += state[n] != FINISHED
    return playing, bad


def prepare() -> None:
    """Compile, or load, what `play` needs."""
    none, one = np.zeros(1, np.bool_), np.ones(1, np.int64)
    row = Row(np.zeros(1), none.copy(), none.copy(), none.copy())
    _next_row(
        np.zeros(1), none, none, 1, one, np.zeros((2, 1), np.int64), np.ones(1, np.int8), *row
    )


def _check_observations(
    obs: NDArray[Any],
    state: NDArray[np.int8],
    space: spaces.Space[Any],
    when: str,
    copies: _Copies,
) -> None:
    """Those of environments that play or reset: a row that resets carries a first observation."""
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        sizes = space.n if isinstance(space, spaces.Discrete) else space.nvec
        # Not in the space's own type: that may not have what follows its last value. What goes over
        # the end of int64 in a difference comes back.
        sizes, starts = (np.asarray(each).astype(np.int64) for each in (sizes, space.start))
        values = obs.astype(np.int64) - starts
        # What is beyond them would be looked up in another component's rows, or in none.
        outside = ((values < 0) | (values >= sizes)).reshape(len(state), -1)
        bad = outside.any(axis=1) & (state != FINISHED)
        if bad.any():
            index = int(bad.argmax())
            raise EnvironmentFailure(
                f"{copies.name(index)} returned the observation {obs[index]} at {when}"
                f" ({copies.reset(index)}); expected one of {space}"
            )
        return
    if space.dtype == np.uint8:
        _check_bytes(obs, state, space, when, copies)
        return
    # Whole numbers are finite; a sum of their squares, which wraps around, would say nothing.
    if obs.dtype.kind in "biu":
        return
    # What passes this, in a single fast sum, is finite; what does not is looked at one by one.
    if float(np.vdot(obs, obs)) < _LARGEST_SQUARE:
        return
    # As float32, in which everything is stored: 1e300 would become infinite there.
    with np.errstate(over="ignore"):
        values = np.asarray(obs, np.float32)
    finite = np.isfinite(values).reshape(len(state), -1).all(axis=1)
    bad = ~finite & (state != FINISHED)
    if bad.any():
        index = int(bad.argmax())
        raise _not_finite("observation", values[index], index, when, copies)


def _check_bytes(
    obs: NDArray[Any],
    state: NDArray[np.int8],
    space: spaces.Space[Any],
    when: str,
    copies: _Copies,
) -> None:
    """Of a space of uint8, whose observations stay that: none may be another number in it."""
    if obs.dtype == np.uint8:
        return
    with np.errstate(invalid="ignore"):
        outside = (obs != obs.astype(np.uint8)).reshape(len(state), -1)
    bad = outside.any(axis=1) & (state != FINISHED)
    if bad.any():
        index = int(bad.argmax())
        value = obs[index].reshape(-1)[outside[index]][0]
        raise EnvironmentFailure(
            f"{copies.name(index)} returned an observation with the number {value} at {when}"
            f" ({copies.reset(index)}); expected whole numbers from 0 to 255, as its space"
            f" has, of shape {space.shape} and uint8"
        )


def _not_finite(
    what: str, value: Any, index: int, when: str, copies: _Copies
) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"{copies.name(index)} returned the {what} {value} at {when}"
        f" ({copies.reset(index)}); expected finite float32 numbers"
    )


def _failure(error: BaseException, when: str, copies: _Copies) -> EnvironmentFailure:
    if isinstance(error, SubEnvironmentError):
        who, verb, detail = copies.name(error.index), error.verb, error.detail
        seed, trace = f" ({copies.reset(error.index)})", error.trace
    else:
        who, verb, detail = "the environments", "failed", f"{type(error).__name__}: {error}"
        seed = copies.common
        trace = "".join(traceback.format_exception(error))
    return EnvironmentFailure(f"{who} {verb} at {when}{seed}: {detail}", trace)
