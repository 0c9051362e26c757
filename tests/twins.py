"""What Triton's kernels do, in plain torch: in their place, a launch each, where none is."""

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from pretend import launch_as
from torch.utils._python_dispatch import _disable_current_modes

from vecpg.advantage import ages
from vecpg.advantage import reference as by_age
from vecpg.envs.definition import Definition
from vecpg.envs.tensor import Dynamics
from vecpg.noise import KeyedNoise, Purpose
from vecpg.returns import reference as returns
from vecpg.rollout.data import FINISHED, PLAYING, RESETTING

# Of the kernels that add by age: nothing is found beforehand.
ADVANTAGE = {
    "find": lambda mask, dones: (mask, dones),
    "add": lambda weights, found: by_age.sums_by_age(weights, *found)[:, None],
    "add_parts": lambda parts: parts[:, 0],
    "subtract": lambda weights, mask, found, sums, others: by_age.subtract_mean_by_age(
        weights, *found, sums, others
    ),
}


@contextmanager
def twins() -> Iterator[None]:
    """Whatever launches a kernel calls its twin, and rows are played one by one."""
    import vecpg.advantage.cuda
    import vecpg.fused
    import vecpg.policy.cuda
    import vecpg.returns.cuda
    import vecpg.rollout.cuda

    modules = {
        vecpg.rollout.cuda: {"_launch": lambda kernel, *given: kernel(*given)},
        vecpg.policy.cuda: {
            "_draw_categorical": _draw_categorical,
            "_draw_gaussian": _draw_gaussian,
            "uniforms": _uniforms,
        },
        vecpg.advantage.cuda: ADVANTAGE,
        vecpg.returns.cuda: {
            "reward_to_go": _reward_to_go,
            "generalized_advantage": _generalized_advantage,
        },
    }
    with ExitStack() as undone:
        for module, functions in modules.items():
            for name, twin in functions.items():
                undone.enter_context(launch_as(module, name, twin))
        for name in ("prepare_reward_to_go", "prepare_generalized_advantage"):
            undone.enter_context(mock.patch.object(vecpg.returns.cuda, name))
        undone.enter_context(mock.patch.object(vecpg.rollout.cuda, "_kernels", _kernels))
        undone.enter_context(mock.patch.object(vecpg.fused, "why_not", return_value="as asked"))
        yield


@contextmanager
def without_triton() -> Iterator[None]:
    """As where it is not installed."""
    find_spec = importlib.util.find_spec

    def find(name, *args):
        return None if name == "triton" else find_spec(name, *args)

    with (
        mock.patch.object(importlib.util, "find_spec", find),
        mock.patch.object(ages, "_has_triton", return_value=False),
    ):
        yield


# -- Returns and sums by age, of new tensors ------------------------------------------------------


def _reward_to_go(rewards, dones, gamma, final_values, last_values, mask, mask_mode, out):
    gamma = _as_tensor(gamma, out)
    given = rewards, dones, gamma, final_values, last_values, mask, mask_mode
    out.copy_(returns.reward_to_go(*given))


def _generalized_advantage(rewards, values, dones, gamma, gae_lambda, *given):
    *given, out = given
    factors = _as_tensor(gamma, out), _as_tensor(gae_lambda, out)
    out.copy_(returns.generalized_advantage(rewards, values, dones, *factors, *given))


def _as_tensor(number, like):
    if isinstance(number, torch.Tensor):
        return number
    return torch.full((), number, dtype=torch.float64, device=like.device)


# -- Rows of a rollout, in place. What is made meanwhile is on no device. -------------------------


def _in_place(function):
    @functools.wraps(function)
    def call(*given):
        with _disable_current_modes(), torch.no_grad():
            function(*given)

    return call


@functools.cache
def _noise(purpose: Purpose, count: int, steps: int, num_envs: int) -> KeyedNoise:
    return KeyedNoise({purpose: count}, steps, num_envs, torch.device("cpu"))


def _numbers(purpose, count, steps, num_envs, t, key, offset):
    (numbers,) = _noise(purpose, count, steps, num_envs)(key, t + offset)
    return numbers


@_in_place
def _uniforms(out, copies, purpose, offset):
    out.copy_(_numbers(purpose, *out.shape, copies.t, copies.key, offset))


@_in_place
def _draw_categorical(logits, first_action, copies, rows, offset):
    uniforms = _numbers(Purpose.ACTION, 1, 1, logits.shape[1], copies.t, copies.key, offset)[:, 0]
    below = torch.softmax(logits, dim=0)[:-1].cumsum(dim=0)
    actions = (below <= uniforms).sum(dim=0) + first_action
    rows.actions[copies.t.item() + offset] = actions
    copies.acted.copy_(actions[:, None])


@_in_place
def _draw_gaussian(means, distribution, copies, rows, offset):
    count, num_envs = distribution.num_uniforms, means.shape[1]
    uniforms = _numbers(Purpose.ACTION, count, 1, num_envs, copies.t, copies.key, offset)[:, 0]
    actions = distribution.sample(means, uniforms)
    rows.actions[copies.t.item() + offset] = actions
    copies.acted.copy_(distribution.clipped(actions).view_as(copies.acted))


def _kernels(definition: type[Definition], num_variables: int):
    dynamics = Dynamics(definition, torch.float32)

    def fresh(num_envs, t, key, offset):
        count = definition.num_uniforms
        numbers = _numbers(Purpose.START, count, 1, num_envs, t, key, offset)
        return dynamics.start(numbers[:, 0])

    @_in_place
    def begin(num_envs, obs, state, lengths, steps, now, episodes, cut, bad, seen, t, key):
        t.zero_()
        state.copy_(fresh(num_envs, t, key, -1))
        for each in (lengths, steps, episodes, cut):
            each.zero_()
        now.fill_(PLAYING)
        seen.copy_(dynamics.observation(state).view_as(seen))
        bad.copy_(~seen.isfinite().all(dim=1))
        obs[0] = seen.view_as(obs[0])

    @_in_place
    def play(
        num_envs,
        obs,
        state,
        lengths,
        steps,
        now,
        episodes,
        cut,
        bad,
        seen,
        t,
        key,
        acted,
        actions,
        rewards,
        terminations,
        truncations,
        mask,
        offset,
        num_steps,
        max_episode_steps,
    ):
        at = t.item() + offset
        plays, resets = now == PLAYING, now == RESETTING
        after, paid, ended = dynamics.step(
            state, acted.view(num_envs, *definition.action_space.shape)
        )
        lengths += plays
        steps += plays
        ended, truncated = plays & ended, plays & (lengths.long() >= max_episode_steps)
        over = ended | truncated
        rewards[at] = torch.where(plays, paid, 0.0)
        terminations[at], truncations[at], mask[at] = ended, truncated, plays
        lengths *= ~over
        now[resets] = PLAYING
        now[over] = torch.where(steps.long() < num_steps, RESETTING, FINISHED).to(now.dtype)[over]
        episodes += over
        cut += truncated
        after = torch.where(plays, after, state)
        state.copy_(torch.where(resets, fresh(num_envs, t, key, offset), after))
        seen.copy_(dynamics.observation(state).view_as(seen))
        obs[at + 1] = seen.view_as(obs[at + 1])
        wrong = plays & ~(paid.isfinite() & actions[at].view(num_envs, -1).isfinite().all(dim=1))
        counts = truncated | (now == PLAYING)
        bad |= wrong | (counts & ~seen.isfinite().all(dim=1))

    return {"begin": begin, "play": play}
