"""Choosing a row's actions, in machine code where that serves the policy, else in torch."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vecpg.kernels.jit import jit
from vecpg.kernels.matrix import row_stride
from vecpg.noise import MULTIPLIERS, WEYL, WORD, Purpose, StepNoise, Stream
from vecpg.policy import Policy
from vecpg.policy import cpu as policy_cpu
from vecpg.policy.cpu import BLOCK, activations, exponentials, forward
from vecpg.policy.distributions import Categorical

# Writes, at step t, actions (N, *action_shape) for observations (N, *obs_shape). In torch it also
# takes masks (N, A), which say what is allowed.
Draw = Callable[..., None]


def why_not(policy: Policy) -> str | None:
    """Why a policy's actions are not chosen in machine code here; None if they are."""
    if not isinstance(policy.distribution, Categorical):
        return "its actions are not Discrete"
    return policy_cpu.why_not_network(policy)


def sampler(policy: Policy, stream: Stream, *, shards: int = 1, in_machine_code: bool) -> Draw:
    """What draws the actions of a collection. The policy is read when this is called.

    Args:
        policy: on any device.
        stream: fixes what is drawn and dropped.
        shards: groups of environments, each of which goes through the network by itself: the bits
            of a matrix product depend on its shape.
        in_machine_code: only where `why_not` has nothing against it. There a row's bits depend on
            the row alone.
    """
    if in_machine_code:
        network, first_action = policy_cpu.network_of(policy), policy_cpu.first_action_of(policy)
        key = stream.key(Purpose.ACTION)

        def draw_on_host(t: int, obs: Tensor, actions: Tensor) -> None:
            rows = obs.numpy().reshape(len(obs), -1)
            draw_actions(rows, key, t, stream.first_env, first_action, network, actions.numpy())

        return draw_on_host
    noise = StepNoise(stream, Purpose.ACTION, policy.device, policy.num_uniforms)
    dropout = StepNoise(stream, Purpose.DROPOUT, policy.device, policy.dropout_units)
    size = stream.num_envs // shards
    parts = [slice(first, first + size) for first in range(0, stream.num_envs, size)]

    def draw(t: int, obs: Tensor, actions: Tensor, *masks: Tensor) -> None:
        seen = obs.to(policy.device, non_blocking=True)
        allowed = [mask.to(policy.device, non_blocking=True) for mask in masks]
        numbers, dropped = noise(t), dropout(t) if policy.dropout_units else None
        for part in parts:
            units = None if dropped is None else dropped[:, part].contiguous()
            drawn = policy.sample(
                seen[part], numbers[:, part].contiguous(), units, *(mask[part] for mask in allowed)
            )
            actions[part].copy_(drawn)

    return draw


def greedily(policy: Policy) -> Callable[[NDArray[Any]], NDArray[np.int64]]:
    """What gives, in machine code, the most probable actions. The policy is read at this call.

    They are those of `Policy.mode`, but where rounding decides which of two logits is the larger.

    Args:
        policy: one that `why_not` has nothing against.

    Returns:
        a function from observations (B, *obs_shape) of any real type to actions (B,).
    """
    network, first_action = policy_cpu.network_of(policy), policy_cpu.first_action_of(policy)

    def most_probable(obs: NDArray[Any]) -> NDArray[np.int64]:
        rows = np.ascontiguousarray(obs, np.float32).reshape(len(obs), -1)
        actions = np.empty(len(obs), np.int64)
        greedy_actions(rows, first_action, network, actions)
        return actions

    return most_probable


def prepare(policy: Policy) -> None:
    """Compile, or load, what drawing the actions of a policy in machine code will need."""
    first_action = policy_cpu.first_action_of(policy)
    obs = np.zeros((1, math.prod(policy.obs_shape)), np.float32)
    network, actions = policy_cpu.network_of(policy), np.full(1, first_action)
    draw_actions(obs, np.zeros(4, np.uint64), 0, 0, first_action, network, actions)


@jit
def draw_actions(
    obs: NDArray[np.float32],
    key: NDArray[np.uint64],
    step: int,
    first_env: int,
    first_action: int,
    network: policy_cpu.Network,
    actions: NDArray[np.int64],
) -> None:
    """Write to `actions` (B,) what `Policy.sample` draws on obs (B, features) and its uniforms.

    The key is that of a `Stream`, which begins at `first_env`. Probabilities differ from torch's
    in the last bits.
    """
    features, stride = network.widths[0], row_stride(network.widths[0])
    units = activations(network)
    numbers, chosen = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int64)
    for start in range(0, len(actions), BLOCK):
        rows = min(BLOCK, len(actions) - start)
        for n in range(rows):
            for i in range(features):
                units[n * stride + i] = obs[start + n, i]
        for n in range(rows):
            numbers[n] = uniform(key, step, first_env + start + n)
        choose(forward(network, units, rows), numbers, chosen, rows)
        for n in range(rows):
            actions[start + n] = first_action + chosen[n]


@jit
def greedy_actions(
    obs: NDArray[np.float32],
    first_action: int,
    network: policy_cpu.Network,
    actions: NDArray[np.int64],
) -> None:
    """Write to `actions` (B,) the first of the largest logits for obs (B, features)."""
    features, stride = network.widths[0], row_stride(network.widths[0])
    units = activations(network)
    for start in range(0, len(actions), BLOCK):
        rows = min(BLOCK, len(actions) - start)
        for n in range(rows):
            for i in range(features):
                units[n * stride + i] = obs[start + n, i]
        logits = forward(network, units, rows)
        for n in range(rows):
            largest = 0
            for a in range(1, len(logits)):
                if logits[a, n] > logits[largest, n]:
                    largest = a
            actions[start + n] = first_action + largest


@jit
def choose(logits, numbers, chosen, rows):
    """Write to `chosen` the actions that uniform numbers stand for. The logits are overwritten.

    As the reference: the number of actions whose cumulative probability is reached.
    """
    largest, total = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    below = np.empty(BLOCK, np.float32)
    exponentials(logits, largest, total, rows)
    for n in range(rows):
        total[n] *= numbers[n]
        below[n] = np.float32(0.0)
        chosen[n] = 0
    for a in range(len(logits) - 1):
        row = logits[a]
        for n in range(rows):
            below[n] += row[n]
            chosen[n] += below[n] <= total[n]


@jit(inlined=True)
def uniform(key, step, env):
    """The first number of `Stream.uniforms_at` for one step and environment of the whole run."""
    return as_uniform(philox(key, step, env)[0])


@jit(inlined=True)
def as_uniform(word):
    """A 32-bit word as a number in [0, 1), as `Stream.uniforms_at` makes it."""
    return np.float32(word >> np.uint64(8)) * np.float32(2.0**-24)


@jit(inlined=True)
def philox(key, step, env):
    """Four 32-bit words for one step and environment, as `vecpg.noise.philox` makes them."""
    return _ten_rounds(np.uint64(step), np.uint64(env), key[2], key[3], key[0], key[1])


def _rounds(count: int) -> Any:
    """So many rounds, one after the other: a loop of them would keep others from vectorizing."""
    if count == 0:
        return _words
    others = _rounds(count - 1)

    @jit(inlined=True)
    def rounds(c0, c1, c2, c3, k0, k1):
        word, shift = np.uint64(WORD), np.uint64(32)
        p0, p1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        return others(
            (p1 >> shift) ^ c1 ^ k0,
            p1 & word,
            (p0 >> shift) ^ c3 ^ k1,
            p0 & word,
            (k0 + np.uint64(WEYL[0])) & word,
            (k1 + np.uint64(WEYL[1])) & word,
        )

    return rounds


@jit(inlined=True)
def _words(c0, c1, c2, c3, k0, k1):
    return c0, c1, c2, c3


_ten_rounds = _rounds(10)
