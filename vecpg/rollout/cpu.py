"""Whole rollouts in machine code: environment, policy and sampling for a block of environments.

The number of environments hardly matters here, and nothing is done for those that have finished.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from vecpg.envs.cpu import NOT_COMPILED, check_compiled, compiled
from vecpg.envs.definition import Definition, num_components, num_observations
from vecpg.envs.ops.cpu import cos, sin
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.kernels import threads
from vecpg.kernels.columns import reader, writer
from vecpg.kernels.jit import jit
from vecpg.kernels.kept import vector
from vecpg.kernels.matrix import NONE, row_stride
from vecpg.noise import Purpose, Stream
from vecpg.policy import Policy
from vecpg.policy import cpu as policy_cpu
from vecpg.policy.cpu import BLOCK, activations, forward, keep
from vecpg.policy.distributions import Categorical
from vecpg.policy.sampling import as_uniform, choose, philox, uniform
from vecpg.rollout.data import (
    FINISHED,
    NEXT,
    PLAYING,
    RESETTING,
    Activations,
    Rollout,
    Rows,
    check_finite,
)

SERVED = (
    "environments on tensors with Discrete or Box actions, in float32 on the CPU, and policies of"
    " linear layers of at most 1024 units with tanh or ReLU, without dropout and without normalized"
    " observations; the standard deviation is a parameter"
)

# For how many steps memory is set aside at first; it is taken from the system as rows are written.
_FIRST_STEPS = 2**26
# Steps of a block after which a call returns, if only for a moment: an interrupt waits no longer.
_CALL_STEPS = 2**20


class Copies(NamedTuple):
    """What every environment has come to.

    state:   (V, N).
    lengths: (N,) steps since its episode began.
    steps:   (N,) real steps in this iteration.
    now:     (N,) what it does at the next row, as in `data.NEXT`.
    """

    state: NDArray[np.float32]
    lengths: NDArray[np.int64]
    steps: NDArray[np.int64]
    now: NDArray[np.int8]


def why_not(envs: Any, policy: Policy) -> str | None:
    """Why the kernels of this file do not serve environments and a policy; None if they do."""
    if not isinstance(envs, TensorVectorEnv):
        return "these are no environments on tensors"
    if type(envs) is not TensorVectorEnv:
        return f"{type(envs).__name__} may do something else than its definition"
    if envs.device.type != "cpu":
        return f"the environments are on {envs.device}"
    if envs.dtype != torch.float32:
        return "the environments are not in float32"
    if policy.obs_shape != envs.single_observation_space.shape:
        return "its observations are not those of the environments"
    if policy.distribution.space != envs.single_action_space:
        return "its actions are not those of the environments"
    return policy_cpu.why_not(policy)


def collect_in_blocks(
    envs: TensorVectorEnv,
    policy: Policy,
    *,
    num_steps: int,
    stream: Stream,
    activation_memory: int = 0,
) -> Rollout:
    """As `collect`, from environments and a policy that `why_not` finds nothing against.

    The same numbers as the reference draws: actions are equal wherever rounding does not decide.
    Blocks are given to as many threads as `vecpg.kernels.threads.count()` says; no bit depends on
    it. The environments themselves are left as they were.

    Raises:
        ValueError: a function of the definition does not compile, or returns what it should not.
        EnvironmentFailure: an observation or a reward that is not finite.
    """
    num_envs = envs.num_envs
    starts_of = Stream(stream.common_seed(Purpose.TRAINING_RESET), 0, stream.first_env, num_envs)
    network = policy_cpu.network_of(policy)
    longest = 2 * num_steps + envs.max_episode_steps  # were every episode one step
    kept = _room(network, num_envs, longest, activation_memory)
    settings = (
        num_steps,
        envs.max_episode_steps,
        stream.first_env,
        stream.key(Purpose.ACTION),
        starts_of.key(Purpose.START),
        _action_settings(policy),
        network,
        kept,
    )
    play = _kernel(envs.definition, envs.dynamics.num_variables)
    copies = Copies(
        np.zeros((envs.dynamics.num_variables, num_envs), np.float32),
        np.zeros(num_envs, np.int64),
        np.zeros(num_envs, np.int64),
        np.full(num_envs, PLAYING, np.int8),
    )
    size = max(1, min(BLOCK, -(-num_envs // threads.count())))
    starts = range(0, num_envs, size)
    rows = Rows(
        max(1, min(longest, _FIRST_STEPS // num_envs)),
        num_envs,
        (policy.obs_shape, torch.float32),
        (policy.action_shape, policy.action_dtype),
    )
    arrays = _arrays(rows)
    begin = end = length = 0
    while (copies.now != FINISHED).any():
        if rows.make_room(end + 1):
            arrays = _arrays(rows)
        begin, end = end, min(rows.capacity, end + max(1, _CALL_STEPS // size))

        def advance(block: int) -> int:
            first = starts[block]
            last = min(first + size, num_envs)
            reached: int = play(arrays, copies, first, last, begin, end, *settings)  # noqa: B023
            return reached

        length = max(length, *threads.run(advance, len(starts)))
    rollout = rows.rollout(length, torch.device("cpu"), stream)
    check_finite(rollout)
    if len(kept) == 0:
        return rollout
    of = (rollout.obs, rollout.obs._version), (rollout.mask, rollout.mask._version)
    return replace(rollout, activations=Activations(kept, network, of))


def _room(
    network: policy_cpu.Network, num_envs: int, longest: int, most: int
) -> NDArray[np.float32]:
    """(R, N, units), memory for the activations of as many rows as `most` bytes hold."""
    units = policy_cpu.kept_units(network.widths)
    rows = min(longest, most // max(1, 4 * num_envs * units)) if units else 0
    memory = vector(rows * num_envs * units, torch.float32)
    return memory.numpy().reshape(rows, num_envs, units)


def _action_settings(policy: Policy) -> NDArray[np.float32]:
    """What `_categorical` or `_gaussian` takes beside the network's output."""
    distribution: Any = policy.distribution
    if isinstance(distribution, Categorical):
        return np.full((1, 1), distribution.first_action, np.float32)
    with torch.no_grad():
        parameters = torch.zeros(distribution.size, 1, dtype=torch.float32)
        std = distribution.mean_and_log_std(parameters)[1].exp()
    rows = std, distribution.low, distribution.high
    return np.stack([row.numpy().reshape(-1) for row in rows])


def _arrays(rows: Rows) -> tuple[NDArray[Any], ...]:
    """The same memory as the kernel takes it, with one axis for all numbers of an observation."""
    host, num_envs = rows.host, rows.host.mask.shape[1]
    obs = host.obs.reshape(rows.capacity + 1, num_envs, -1)
    actions = host.actions.reshape(rows.capacity, num_envs, -1)
    return obs, actions, host.rewards, host.terminations, host.truncations, host.mask


def prepare(envs: Any, policy: Policy) -> None:
    """Compile, or load, the kernel that serves environments and a policy.

    Raises:
        ValueError: a function of the definition does not compile, or returns what it should not.
    """
    one = TensorVectorEnv(envs.definition, 1, max_episode_steps=1)
    collect_in_blocks(one, policy, num_steps=1, stream=Stream(0, 0, 0, 1))


def _uniforms(count: int) -> Any:
    """`uniforms(key, step, env)`: the tuple of the first `count` of `Stream.uniforms_at`."""
    last = (count - 1) // 4
    before = _uniforms(4 * last) if last else _none
    kept, above = count - 4 * last, np.uint64(last << 8)

    @jit(inlined=True)
    def uniforms(key, step, env):
        w0, w1, w2, w3 = philox((key[0], key[1], key[2], key[3] | above), step, env)
        numbers = as_uniform(w0), as_uniform(w1), as_uniform(w2), as_uniform(w3)
        return before(key, step, env) + numbers[:kept]

    return uniforms


@jit(inlined=True)
def _none(key, step, env):
    return ()


def _categorical() -> Any:
    """`draw(...)`: draw a block's actions, and write them as the environment takes them to `acted`.

    The setting is the first action.
    """

    @jit(inlined=True)
    def draw(outputs, key, step, first_env, who, live, settings, noise, drawn, acted):
        for i in range(live):
            noise[i] = uniform(key, step, first_env + who[i])
        choose(outputs, noise, drawn, live)
        for i in range(live):
            drawn[i] += np.int64(settings[0, 0])
            acted[i] = np.float32(drawn[i])

    return draw


def _gaussian(size: int) -> Any:
    """As `_categorical`; the settings are standard deviations and bounds of the components.

    By the method of Box and Muller a radius and an angle give two normal numbers: see
    `DiagonalGaussian.sample`.
    """
    pairs = (size + 1) // 2
    uniforms, write = _uniforms(2 * pairs), writer(2 * pairs, BLOCK)

    @jit(inlined=True)
    def draw(outputs, key, step, first_env, who, live, settings, noise, drawn, acted):
        for i in range(live):
            write(noise, i, uniforms(key, step, first_env + who[i]))
        for pair in range(pairs):
            radii, turns = pair * BLOCK, (pairs + pair) * BLOCK
            for i in range(live):
                logarithm = np.float32(math.log1p(-noise[radii + i]))
                noise[radii + i] = math.sqrt(np.float32(-2.0) * logarithm)
            for i in range(live):
                noise[turns + i] *= np.float32(2.0 * math.pi)
                drawn[radii + i] = noise[radii + i] * cos(noise[turns + i])
            if pairs + pair < size:
                for i in range(live):
                    drawn[turns + i] = noise[radii + i] * sin(noise[turns + i])
        for a in range(size):
            std, low, high = settings[0, a], settings[1, a], settings[2, a]
            for i in range(live):
                at = a * BLOCK + i
                drawn[at] = outputs[a, i] + std * drawn[at]
                acted[at] = min(max(drawn[at], low), high)

    return draw


@functools.cache
def _kernel(definition: type[Definition], num_variables: int) -> Callable[..., int]:
    """The function that plays a block of environments, made from the functions of one copy."""
    functions = compiled(definition)
    start, transition, observation = (
        functions[name] for name in ("start", "transition", "observation")
    )
    terminated, reward = functions["terminated"], functions["reward"]
    discrete = isinstance(definition.action_space, spaces.Discrete)
    sizes = (
        num_variables,
        num_observations(definition),
        num_components(definition),
    )
    draw = _categorical() if discrete else _gaussian(sizes[2])
    uniforms = _uniforms(definition.num_uniforms)
    read_state, write_state = reader(sizes[0], BLOCK), writer(sizes[0], BLOCK)
    write_seen, write_number = writer(sizes[1], BLOCK), writer(1, BLOCK)
    read_action = _number if discrete else reader(sizes[2], BLOCK)

    @jit(as_written=True)
    def play(
        rows,
        copies,
        first,
        last,
        begin,
        end,
        num_steps,
        max_episode_steps,
        first_env,
        action_key,
        start_key,
        action_settings,
        network,
        activations_kept,
    ):
        """Play environments `first` to `last` - 1 from row `begin` to their end, or row `end`.

        Returns the number of rows up to the last that counts.
        """
        obs, actions, rewards, terminations, truncations, mask = rows
        states, lengths, steps, now = copies
        variables, features, components = sizes
        words = action_key[0], action_key[1], action_key[2], action_key[3]
        start_words = start_key[0], start_key[1], start_key[2], start_key[3]
        units, stride = activations(network), row_stride(features)
        # A column of these matrices, (numbers, BLOCK), is a copy's.
        before = np.zeros(variables * BLOCK, np.float32)
        after = np.zeros(variables * BLOCK, np.float32)
        seen = np.zeros(features * BLOCK, np.float32)
        noise = np.zeros((components + 1) * BLOCK, np.float32)
        drawn = np.zeros(components * BLOCK, actions.dtype)
        acted = np.zeros(components * BLOCK, np.float32)
        paid, ended = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.bool_)
        # The environments that have not finished, close together.
        who = np.empty(BLOCK, np.int64)
        live = NONE
        for n in range(first, last):
            if now[n] == FINISHED:
                continue
            if begin == 0:
                write_state(before, live, start(uniforms(start_words, NONE, first_env + n)))
            else:
                for v in range(variables):
                    before[v * BLOCK + live] = states[v, n]
            who[live] = n
            live += 1
        t = begin
        length = 0
        while live > 0 and t < end:
            for i in range(live):
                write_seen(seen, i, observation(read_state(before, i)))
            for i in range(live):
                for f in range(features):
                    units[i * stride + f] = seen[f * BLOCK + i]
                    obs[t, who[i], f] = seen[f * BLOCK + i]
            outputs = forward(network, units, live)
            if t < len(activations_kept):
                keep(network, units, live, activations_kept[t], who)
            draw(
                outputs,
                words,
                t,
                first_env,
                who,
                live,
                action_settings,
                noise,
                drawn,
                acted,
            )
            for i in range(live):
                write_state(after, i, transition(read_state(before, i), read_action(acted, i)))
            for i in range(live):
                state, following = read_state(before, i), read_state(after, i)
                ended[i] = terminated(following)
                write_number(paid, i, (reward(state, read_action(acted, i), following),))
            kept = NONE
            for i in range(live):
                n = who[i]
                who[kept] = n
                if now[n] == RESETTING:
                    now[n] = NEXT[RESETTING, 0, 0]
                    write_state(before, kept, start(uniforms(start_words, t + 1, first_env + n)))
                    kept += 1
                    continue
                lengths[n] += 1
                steps[n] += 1
                truncated = lengths[n] >= max_episode_steps
                for a in range(components):
                    actions[t, n, a] = drawn[a * BLOCK + i]
                rewards[t, n] = paid[i]
                terminations[t, n] = ended[i]
                truncations[t, n] = truncated
                mask[t, n] = True
                length = t + 1
                write_state(before, kept, read_state(after, i))
                if not (ended[i] or truncated):
                    kept += 1
                    continue
                lengths[n] = 0
                now[n] = NEXT[PLAYING, 1, int(steps[n] < num_steps)]
                if now[n] == FINISHED:
                    write_seen(seen, i, observation(read_state(after, i)))
                    for f in range(features):
                        obs[t + 1, n, f] = seen[f * BLOCK + i]
                else:
                    kept += 1
            live = kept
            t += 1
        for i in range(live):
            for v in range(variables):
                states[v, who[i]] = before[v * BLOCK + i]
        return length

    looked_at = False

    def played(*given: Any) -> int:
        nonlocal looked_at
        try:
            reached: int = play(*given)
        except NOT_COMPILED:
            check_compiled(definition, num_variables)
            raise
        if not looked_at:
            looked_at = True
            if play.stats.cache_misses:  # what was kept has been looked at
                _look_at(definition, num_variables, play)
        return reached

    return played


def _look_at(definition: type[Definition], num_variables: int, play: Any) -> None:
    """Refuse what was just compiled, and do not keep it, if there is float64 in it."""
    try:
        check_compiled(definition, num_variables)
    except BaseException:
        play._cache.flush()  # else it would pass the next time
        raise


@jit(as_written=True)
def _number(numbers, i):
    return numbers[i]
