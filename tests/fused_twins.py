"""What the kernels of whole iterations do, in plain torch: in their place, a launch each.

They follow `vecpg.kernels.iteration` by other means: environments are stepped one row at a time, a
gradient is autograd's, in float64. Where nobody may look there is NaN, or an action that is none.
"""

import functools
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from pretend import launch_as
from torch.utils._python_dispatch import _disable_current_modes

from vecpg.advantage import reference as by_age
from vecpg.envs.tensor import Dynamics
from vecpg.kernels.iteration import Entry, Setting, Stamp, Tally
from vecpg.kernels.sums import in_order
from vecpg.noise import KeyedNoise, Purpose
from vecpg.policy import Policy
from vecpg.policy.shape import in_a_row
from vecpg.returns import reference as returns
from vecpg.rollout.data import FINISHED, NEXT, PLAYING


@contextmanager
def fused_twins() -> Iterator[None]:
    """Whatever launches a kernel calls its twin."""
    import vecpg.advantage.cuda
    import vecpg.fused.cuda
    import vecpg.policy.cuda.gradient
    import vecpg.rollout.cuda.persistent

    modules = {
        vecpg.rollout.cuda.persistent: play,
        vecpg.advantage.cuda: subtract_mean_of_runs,
        vecpg.policy.cuda.gradient: sum_gradient,
        vecpg.fused.cuda: step,
    }
    with ExitStack() as undone:
        for module, twin in modules.items():
            undone.enter_context(launch_as(module, twin.__name__, twin))
        yield


def _on_no_device(function):
    """A function whose tensors are on none, and that may differentiate."""

    @functools.wraps(function)
    def call(*given, **named):
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            function(*given, **named)

    return call


def _stamp(stamps, at):
    """Say in every run's place of an iteration when this is."""
    stamps[at.item() % len(stamps)] = time.perf_counter_ns()


def _slots(memory):
    """Of the iteration at hand, and of the next one."""
    slots, at = len(memory.states), memory.at.item()
    return at % slots, (at + 1) % slots


def _blocks(memory):
    """Which environments each block has."""
    num_envs, shards = memory.flags.shape[2], memory.parts.shape[1]
    of_shard = num_envs // shards
    return [
        slice(first, min(first + memory.block, shard + of_shard))
        for shard in range(0, num_envs, of_shard)
        for first in range(shard, shard + of_shard, memory.block)
    ]


# -- The policy ----------------------------------------------------------------------------------


@functools.cache
def _policy(shape, dtype):
    box = functools.partial(spaces.Box, -math.inf, math.inf)
    actions = spaces.Discrete(shape.outputs, start=shape.first_action)
    return Policy(
        box((shape.features,)),
        box((shape.outputs,)) if shape.gaussian else actions,
        hidden_sizes=shape.units,
        activation="tanh" if shape.tanh else "relu",
    ).to(dtype)


def _policy_of(shape, row, dtype=torch.float32):
    """A policy with the numbers of a row; the next call changes it."""
    policy = _policy(shape, dtype)
    numbers = row[: shape.size].split(shape.sizes)
    for parameter, own in zip(in_a_row(policy), numbers, strict=True):
        parameter.copy_(own.view(parameter.shape))
        parameter.grad = None
    return policy


# -- The rollout ---------------------------------------------------------------------------------


class Played(NamedTuple):
    """Rows of a run: obs (T + 1, N, F), actions as memory has them, and the rest, (T, N)."""

    obs: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    terminations: torch.Tensor
    truncations: torch.Tensor
    mask: torch.Tensor


@_on_no_device
def play(
    memory, definition, num_variables, shape, *, num_steps, max_episode_steps, full_return=False
):
    """See `vecpg.rollout.cuda.persistent.play`."""
    slot, _ = _slots(memory)
    _stamp(memory.stamps[..., Stamp.COLLECT], memory.at)
    for run, key in enumerate(memory.keys[slot]):
        policy = _policy_of(shape, memory.states[slot, run, 0])
        rows = _play(memory, definition, policy, key, num_steps, max_episode_steps)
        _store_episodes(memory, run, rows)
        _store_rows(memory, run, rows, memory.settings[run, Setting.GAMMA], full_return)


@functools.cache
def _dynamics(definition):
    return Dynamics(definition, torch.float32)


@functools.cache
def _noise(counts, steps, num_envs):
    return KeyedNoise(dict(counts), steps, num_envs, torch.device("cpu"))


def _play(memory, definition, policy, key, num_steps, max_episode_steps):
    """All rows until every environment has finished."""
    capacity, num_envs = memory.flags.shape[1:]
    dynamics, gaussian = _dynamics(definition), memory.actions.is_floating_point()
    counts = (Purpose.ACTION, policy.num_uniforms), (Purpose.START, definition.num_uniforms)
    # Of the row before the first one there are start states alone.
    drawn, begun = _noise(counts, capacity + 1, num_envs)(key, torch.tensor([-1]))
    now, steps, lengths = np.full(num_envs, PLAYING), np.zeros(num_envs), np.zeros(num_envs)
    state = dynamics.start(begun[:, 0])
    obs, rows = [dynamics.observation(state).flatten(1)], []
    while (now != FINISHED).any():
        t = len(obs)
        acts = policy.distribution.sample(policy.network(obs[-1]).mT, drawn[:, t].contiguous())
        taken = acts.clamp(*memory.bounds) if gaussian else acts
        taken = taken.view(num_envs, *definition.action_space.shape)
        following, paid, ended = dynamics.step(state, taken)
        plays = now == PLAYING
        steps += plays
        lengths += plays
        ended, truncated = ended.numpy() & plays, (lengths >= max_episode_steps) & plays
        over = ended | truncated
        lengths[over] = 0
        now = NEXT[now, over.astype(int), (steps < num_steps).astype(int)]
        ended, truncated, plays = map(torch.from_numpy, (ended, truncated, plays))
        if gaussian:
            acts[~plays] = torch.nan
        else:
            acts = torch.where(plays, acts - definition.action_space.start, 99)
        rows.append((acts, torch.where(plays, paid, 0.0), ended, truncated, plays))
        state = torch.where(plays, following, dynamics.start(begun[:, t]))
        obs.append(dynamics.observation(state).flatten(1))
    return Played(torch.stack(obs), *map(torch.stack, zip(*rows, strict=True)))


def _store_episodes(memory, run, rows):
    mask, rewards = rows.mask.numpy(), rows.rewards.double().numpy()
    dones = (rows.terminations | rows.truncations).numpy()
    seen = rows.obs.isfinite().all(dim=2).numpy()
    finite = (seen[:-1] | ~mask) & (seen[1:] | ~rows.truncations.numpy())
    finite &= np.isfinite(rewards) & (
        rows.actions.isfinite().view(*mask.shape, -1).all(2).numpy() | ~mask
    )
    earned = []
    for n in range(mask.shape[1]):
        stops = np.flatnonzero(dones[:, n]) + 1
        # The row after an episode resets.
        starts = np.array([0, *(stops[:-1] + 1)])
        of_memory = (memory.starts, starts), (memory.stops, stops)
        for kept, found in of_memory:
            kept[run, : len(found), n] = torch.from_numpy(found)
        memory.numbers[run, n] = len(starts)
        memory.longest[run, n] = int((stops - starts).max())
        earned.append([rewards[i:j, n].sum() for i, j in zip(starts, stops, strict=True)])
    for block, envs in enumerate(_blocks(memory)):
        own = np.concatenate(earned[envs])
        memory.last[run, block] = int(np.flatnonzero(mask[:, envs].any(axis=1)).max()) + 1
        tallies = {
            Tally.COUNTED: mask[:, envs].sum(),
            Tally.EPISODES: len(own),
            Tally.RETURN_SUM: own.sum(),
            Tally.RETURN_LOW: own.min(),
            Tally.RETURN_HIGH: own.max(),
            Tally.FINITE: finite[:, envs].all(),
        }
        for name, number in tallies.items():
            memory.tallies[run, block, name] = float(number)


def _store_rows(memory, run, rows, gamma, full_return):
    """Of each block those before its last."""
    mask, dones = rows.mask, rows.terminations | rows.truncations
    weights = returns.reward_to_go(rows.rewards, dones, gamma, None, None, mask, "cut")
    if full_return:
        weights = torch.where(mask, weights.gather(0, by_age.first_rows(mask, dones)), 0.0)
    flags = mask.to(torch.int8) + 2 * rows.terminations + 4 * rows.truncations
    for block, envs in enumerate(_blocks(memory)):
        last = memory.last[run, block].item()
        memory.obs[run, : last + 1, envs] = rows.obs[: last + 1, envs]
        memory.actions[run, :last, envs] = rows.actions[:last, envs]
        memory.rewards[run, :last, envs] = rows.rewards[:last, envs]
        memory.flags[run, :last, envs] = flags[:last, envs]
        memory.weights[run, :last, envs] = weights[:last, envs]


# -- The baseline --------------------------------------------------------------------------------


@_on_no_device
def subtract_mean_of_runs(weights, found, num_ages, *, others, shards=1, at=None, stamps=None):
    """See `vecpg.advantage.cuda.subtract_mean_of_runs`."""
    _stamp(stamps, at)
    for own, *episodes in zip(weights, *found, strict=True):
        mask, dones = _rows_of(own, *episodes)
        assert mask.sum(dim=0).max() <= num_ages * episodes[2].max()
        parts = [each.chunk(shards, dim=1) for each in (own.clone(), mask, dones)]
        sums = in_order([by_age.sums_by_age(*part) for part in zip(*parts, strict=True)])
        for part in zip(*parts, strict=True):
            by_age.subtract_mean_by_age(*part, sums, others)
        own[mask] = torch.cat(parts[0], dim=1)[mask]


def _rows_of(weights, starts, stops, numbers, longest):
    """Where rows count, and where episodes end."""
    mask, dones = torch.zeros_like(weights, dtype=torch.bool), torch.zeros_like(weights) > 0
    for n, number in enumerate(numbers):
        for k in range(number):
            mask[starts[k, n] : stops[k, n], n] = True
            dones[stops[k, n] - 1, n] = True
    return mask, dones


# -- The gradient --------------------------------------------------------------------------------


@_on_no_device
def sum_gradient(memory, shape):
    """See `vecpg.policy.cuda.gradient.sum_gradient`. All of a shard is its first part."""
    slot, _ = _slots(memory)
    _stamp(memory.stamps[..., Stamp.UPDATE], memory.at)
    memory.parts[..., : shape.size + 2] = 0.0
    blocks = len(memory.last[0]) // memory.parts.shape[1]
    for run, state in enumerate(memory.states[slot]):
        count = memory.tallies[run, :, Tally.COUNTED].sum()
        divisor, ent_coef = memory.settings[run, [Setting.DIVISOR, Setting.ENT_COEF]]
        divisor = divisor if divisor > 0 else count
        for block, envs in enumerate(_blocks(memory)):
            policy = _policy_of(shape, state[0], torch.float64)
            last = memory.last[run, block].item()
            mask = (memory.flags[run, :last, envs] & 1) > 0
            obs, actions, weights = (
                each[run, :last, envs][mask].to(wanted)
                for each, wanted in (
                    (memory.obs, torch.float64),
                    (memory.actions, torch.float64 if shape.gaussian else torch.int64),
                    (memory.weights, torch.float64),
                )
            )
            if not shape.gaussian:
                actions += shape.first_action
            with torch.enable_grad():
                log_probs, entropies = policy.distribution.log_probs_and_entropy(
                    policy.network(obs).mT, actions
                )
                loss, entropy = -(log_probs * weights).sum() / divisor, entropies.sum()
                (loss - ent_coef / count * entropy).backward()
            part = memory.parts[run, block // blocks, 0, : shape.size + 2]
            gradients = [each.grad.flatten() for each in in_a_row(policy)]
            part += torch.cat([*gradients, torch.stack([loss, entropy])])


# -- What the host reads -------------------------------------------------------------------------


def entry_of(rollout, episodes, stats):
    """What an iteration that went step by step would tell, if all of it is finite."""
    entry = np.ones(len(Entry))
    entry[Entry.COUNTED], entry[Entry.ROWS] = int(rollout.mask.sum()), len(rollout.mask)
    entry[Entry.EPISODES] = len(episodes.returns)
    entry[Entry.RETURN_SUM] = episodes.return_sum
    entry[Entry.RETURN_LOW] = episodes.returns.min()
    entry[Entry.RETURN_HIGH] = episodes.returns.max()
    entry[Entry.POLICY_LOSS], entry[Entry.ENTROPY] = stats.policy_loss, stats.entropy
    entry[Entry.GRAD_NORM] = stats.grad_norm
    return entry


# -- The step ------------------------------------------------------------------------------------


@_on_no_device
def step(memory, shape, betas, eps):
    """See `vecpg.fused.cuda.step`."""
    slot, following = _slots(memory)
    memory.sums.copy_(memory.parts.sum(dim=2).sum(dim=1))
    for run, (tallies, sums, before) in enumerate(
        zip(memory.tallies, memory.sums, memory.states[slot], strict=True)
    ):
        gradient, (loss, entropy) = sums[: shape.size], sums[shape.size :][:2]
        norm, count = gradient.norm(), tallies[:, Tally.COUNTED].sum()
        scale = (memory.settings[run, Setting.MAX_GRAD_NORM] / (norm + 1e-6)).clamp(max=1.0)
        size, root = (each.item() for each in memory.scalars[slot, run])
        after = torch.zeros_like(before)
        after[:, : shape.size] = _adam(
            *before[:, : shape.size], (gradient * scale).float(), size, root, betas, eps
        )
        wise = tallies[:, Tally.FINITE].min()
        entry = {
            Entry.COUNTED: count,
            Entry.ROWS: memory.last[run].max(),
            Entry.EPISODES: tallies[:, Tally.EPISODES].sum(),
            Entry.RETURN_SUM: tallies[:, Tally.RETURN_SUM].sum(),
            Entry.RETURN_LOW: tallies[:, Tally.RETURN_LOW].min(),
            Entry.RETURN_HIGH: tallies[:, Tally.RETURN_HIGH].max(),
            Entry.POLICY_LOSS: loss,
            Entry.ENTROPY: entropy / count,
            Entry.GRAD_NORM: norm,
            Entry.ROLLOUT_FINITE: wise,
            Entry.UPDATE_FINITE: torch.stack([loss, entropy, norm]).isfinite().all()
            & after[0].isfinite().all(),
        }
        for name, number in entry.items():
            memory.entries[slot, run, name] = float(number)
        good = entry[Entry.ROLLOUT_FINITE] > 0 and entry[Entry.UPDATE_FINITE]
        memory.states[following, run] = after if good else before
    _stamp(memory.stamps[..., Stamp.END], memory.at)
    memory.at.add_(1)


def _adam(parameters, means, squares, gradient, size, root, betas, eps):
    means = means.lerp(gradient, 1 - betas[0])
    squares = (squares * betas[1]).addcmul(gradient, gradient, value=1 - betas[1])
    divisors = squares.sqrt() / root + eps
    return torch.stack([parameters.addcdiv(means, divisors, value=-size), means, squares])
