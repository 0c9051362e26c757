"""The kernels that play rows on a GPU, in torch: a twin has its kernel's arguments and effects."""

import functools
import sys
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
from pretend import launch_as

from vecpg.envs.tensor import Dynamics
from vecpg.noise import KeyedNoise, Purpose
from vecpg.policy import cuda as policy_cuda
from vecpg.rollout import cuda
from vecpg.rollout.data import NEXT, PLAYING, RESETTING


@contextmanager
def in_place_of_kernels():
    """The twins instead of the kernels, each of which counts and is recorded as one operation."""
    here = sys.modules[__name__]
    with ExitStack() as undone:
        for name in ("start", "step", "draw"):
            undone.enter_context(launch_as(here, name, globals()[name]))
        undone.enter_context(launch_as(policy_cuda, "uniforms", uniforms))
        for owner, name, new in (
            (cuda, "make_start", _make_start),
            (cuda, "make_step", _make_step),
            (cuda, "prepare", lambda *given: None),
            (policy_cuda, "make_draw", _make_draw),
            (policy_cuda, "prepare", lambda policy: None),
        ):
            undone.enter_context(mock.patch.object(owner, name, new))
        for each in (noise_of, following_table):
            undone.callback(each.cache_clear)
        yield


def _make_start(definition, num_variables):
    dynamics = Dynamics(definition, torch.float32)
    return lambda copies, rows: start(dynamics, copies, rows)


def _make_step(definition, num_variables):
    dynamics = Dynamics(definition, torch.float32)

    def launch(copies, rows, offset, *, num_steps, max_episode_steps):
        step(dynamics, copies, rows, offset, num_steps, max_episode_steps)

    return launch


def _make_draw(policy):
    return lambda parameters, copies, rows, offset: draw(policy, parameters, copies, rows, offset)


def start(dynamics, copies, rows):
    """Begins a collection."""
    copies.state.copy_(fresh(dynamics, copies, copies.t.zero_() - 1))
    for each in (copies.lengths, copies.steps, copies.episodes, copies.cut):
        each.zero_()
    copies.now.fill_(PLAYING)
    copies.seen.copy_(dynamics.observation(copies.state).flatten(1))
    copies.bad.copy_(~copies.seen.isfinite().all(dim=1))
    rows.obs[0].copy_(copies.seen.view_as(rows.obs[0]))


def step(dynamics, copies, rows, offset, num_steps, max_episode_steps):
    """A row."""
    at = copies.t + offset
    num_envs = len(copies.now)
    plays, resets = copies.now == PLAYING, copies.now == RESETTING
    action = copies.acted.view(num_envs, *dynamics.definition.action_space.shape)
    following, paid, ended = dynamics.step(copies.state, action)
    copies.lengths.copy_(torch.where(plays, copies.lengths + 1, 0))
    copies.steps.add_(plays)
    ended = plays & ended
    truncated = plays & (copies.lengths >= max_episode_steps)
    over = ended | truncated
    copies.episodes.add_(over)
    copies.cut.add_(truncated)
    table = following_table(copies.now.device)
    more = copies.steps < num_steps
    copies.now.copy_(table.take(copies.now.long() * 4 + over.long() * 2 + more.long()))
    moved = torch.where(plays, following, copies.state)
    copies.state.copy_(torch.where(resets, fresh(dynamics, copies, at), moved))
    copies.seen.copy_(dynamics.observation(copies.state).flatten(1))
    rows.obs.index_copy_(0, at + 1, copies.seen.view(1, *rows.obs.shape[1:]))
    rows.rewards.index_copy_(0, at, torch.where(plays, paid, 0.0)[None])
    rows.terminations.index_copy_(0, at, ended[None])
    rows.truncations.index_copy_(0, at, truncated[None])
    rows.mask.index_copy_(0, at, plays[None])
    counts = truncated | (copies.now == PLAYING)
    copies.bad.logical_or_(counts & ~copies.seen.isfinite().all(dim=1))
    drawn = rows.actions.index_select(0, at).double().view(num_envs, -1)
    copies.bad.logical_or_(plays & ~(paid.isfinite() & drawn.isfinite().all(dim=1)))


def draw(policy, parameters, copies, rows, offset):
    """A row's actions."""
    numbers = torch.empty(policy.num_uniforms, 1, len(copies.now), device=copies.t.device)
    uniforms(numbers, copies, Purpose.ACTION, offset)
    actions = policy.distribution.sample(parameters, numbers[:, 0])
    rows.actions.index_copy_(0, copies.t + offset, actions[None])
    copies.acted.copy_(policy.distribution.clipped(actions).view_as(copies.acted))


def uniforms(out, copies, purpose, offset):
    """Uniform numbers."""
    noise = noise_of(purpose, *out.shape, out.device)
    out.copy_(noise(copies.key, copies.t + offset)[0])


def fresh(dynamics, copies, at):
    """(V, N) states of copies that are reset at a row."""
    count = dynamics.definition.num_uniforms
    noise = noise_of(Purpose.START, count, 1, len(copies.now), at.device)
    return dynamics.start(noise(copies.key, at)[0][:, 0])


# Constants are made once, as a kernel has them: a graph holds no copies from the host.


@functools.cache
def noise_of(purpose, count, num_steps, num_envs, device):
    return KeyedNoise({purpose: count}, num_steps, num_envs, device)


@functools.cache
def following_table(device):
    return torch.from_numpy(NEXT.astype(np.int64)).to(device).flatten()
