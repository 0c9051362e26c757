"""Drawing a row's actions, in machine code where that serves the policy, else in torch."""

import logging
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vecpg.kernels.jit import jit
from vecpg.noise import MULTIPLIERS, WEYL, WORD, Purpose, StepNoise
from vecpg.policy import Policy
from vecpg.policy import cpu as policy_cpu
from vecpg.policy.cpu import BLOCK, activations, exponentials, forward

_log = logging.getLogger(__name__)
_announced: set[str] = set()


def sampler(
    policy: Policy, seed: int, iteration: int, num_envs: int
) -> Callable[[int, Tensor, Tensor], None]:
    """What draws, at step t, actions (N, *action_shape) for observations (N, *obs_shape).

    It writes them to the tensor it is given. The policy is read when this is called.
    """
    reason = policy_cpu.why_not(policy)
    if (how := reason or "") not in _announced:
        _announced.add(how)
        _log.debug("actions are drawn %s", f"in torch: {reason}" if reason else "in machine code")
    if reason is None:
        network, first_action = policy_cpu.network_of(policy), policy_cpu.first_action_of(policy)
        key = stream_key(seed, iteration, Purpose.ACTION)

        def draw_on_host(t: int, obs: Tensor, actions: Tensor) -> None:
            rows = obs.numpy().reshape(len(obs), -1)
            draw_actions(rows, key, t, first_action, network, actions.numpy())

        return draw_on_host
    stream = seed, iteration, num_envs
    noise = StepNoise(*stream, Purpose.ACTION, policy.device, policy.num_uniforms)
    dropout = StepNoise(*stream, Purpose.DROPOUT, policy.device, policy.dropout_units)

    def draw(t: int, obs: Tensor, actions: Tensor) -> None:
        seen = obs.to(policy.device, non_blocking=True)
        dropped = dropout(t) if policy.dropout_units else None
        actions.copy_(policy.sample(seen, noise(t), dropped))

    return draw


def prepare(policy: Policy) -> None:
    """Compile, or load, what drawing a policy's actions will need."""
    if policy_cpu.why_not(policy) is None:
        actions = np.full(1, policy_cpu.first_action_of(policy))
        draw_actions(
            np.zeros((1, math.prod(policy.obs_shape)), np.float32),
            np.zeros(4, np.uint64),
            0,
            policy_cpu.first_action_of(policy),
            policy_cpu.network_of(policy),
            actions,
        )


def stream_key(seed: int, iteration: int, purpose: Purpose) -> NDArray[np.uint64]:
    """What `philox` takes of a stream: the words of the seed, the iteration and the purpose."""
    return np.array([seed & WORD, seed >> 32, iteration, purpose], np.uint64)


@jit
def draw_actions(
    obs: NDArray[np.float32],
    key: NDArray[np.uint64],
    step: int,
    first_action: int,
    network: policy_cpu.Network,
    actions: NDArray[np.int64],
) -> None:
    """Write to `actions` (B,) what `Policy.sample` draws on obs (B, features) and `uniforms`.

    The key is a `stream_key`. Probabilities differ from torch's in the last bits.
    """
    features = network.widths[0]
    units = activations(network)
    numbers, chosen = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int64)
    for start in range(0, len(actions), BLOCK):
        rows = min(BLOCK, len(actions) - start)
        for n in range(rows):
            for i in range(features):
                units[n * features + i] = obs[start + n, i]
        for n in range(rows):
            numbers[n] = uniform(key, step, start + n)
        choose(forward(network, units, rows), numbers, chosen, rows)
        for n in range(rows):
            actions[start + n] = first_action + chosen[n]


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


@jit
def uniform(key, step, env):
    """The number that `vecpg.noise.uniforms` has for one step and environment.

    The key is a `stream_key`.
    """
    return as_uniform(philox(key, step, env)[0])


@jit
def as_uniform(word):
    """A 32-bit word as a number in [0, 1), as `vecpg.noise.uniforms_at` makes it."""
    return np.float32(word >> np.uint64(8)) * np.float32(2.0**-24)


@jit
def philox(key, step, env):
    """Four 32-bit words for one step and environment, as `vecpg.noise.philox` makes them."""
    word, shift = np.uint64(WORD), np.uint64(32)
    c0, c1, c2, c3 = np.uint64(step), np.uint64(env), key[2], key[3]
    k0, k1 = key[0], key[1]
    for _ in range(10):
        p0, p1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & word, (p0 >> shift) ^ c3 ^ k1, p0 & word
        k0, k1 = (k0 + np.uint64(WEYL[0])) & word, (k1 + np.uint64(WEYL[1])) & word
    return c0, c1, c2, c3
