"""Whole rollouts in machine code: environment, policy and sampling for a block of environments.

The number of environments hardly matters here, and nothing is done for those that have finished.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vecpg.envs import cartpole, pendulum
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.kernels import threads
from vecpg.kernels.jit import jit
from vecpg.noise import Purpose, Stream
from vecpg.policy import Policy
from vecpg.policy import cpu as policy_cpu
from vecpg.policy.cpu import BLOCK, activations, forward
from vecpg.policy.distributions import Categorical, DiagonalGaussian
from vecpg.policy.sampling import as_uniform, choose, philox, uniform
from vecpg.rollout.data import Rollout, check_finite

SERVED = (
    "vecpg/CartPole-v1 and vecpg/Pendulum-v1 in float32 on the CPU, and policies of linear layers"
    " of at most 1024 units with tanh or ReLU, without dropout and without normalized observations;"
    " the standard deviation is a parameter"
)

# 0 in a type that is no constant: else what it is passed to would be compiled for each constant.
_NONE: Any = np.int64(0)
# A state in the kernel has so many variables, those that an environment does not have are 0.
_VARIABLES = 4
# For how many steps memory is set aside at first; it is taken from the system as rows are written.
_FIRST_STEPS = 2**26
# Steps of a block after which a call returns, if only for a moment: an interrupt waits no longer.
_CALL_STEPS = 2**20


class Rows(NamedTuple):
    """The arrays of a `Rollout`, (T, N), all 0 at first. `obs` has one row more."""

    obs: NDArray[np.float32]
    actions: NDArray[Any]
    rewards: NDArray[np.float32]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]
    mask: NDArray[np.bool_]


class Copies(NamedTuple):
    """What every environment has come to.

    state:   (4, N).
    lengths: (N,) steps since its episode began.
    steps:   (N,) real steps in this iteration; -1 = it has finished.
    resets:  (N,) True = its next row only resets.
    """

    state: NDArray[np.float32]
    lengths: NDArray[np.int64]
    steps: NDArray[np.int64]
    resets: NDArray[np.bool_]


def why_not(envs: Any, policy: Policy) -> str | None:
    """Why the kernels of this file do not serve environments and a policy; None if they do."""
    if not isinstance(envs, TensorVectorEnv):
        return f"{type(envs).__name__} is no environment on tensors"
    if type(envs) not in _KERNELS:
        return f"there is no kernel for {type(envs).__name__}"
    if envs.device.type != "cpu":
        return f"the environments are on {envs.device}"
    if envs.dtype != torch.float32:
        return "the environments are not in float32"
    if type(envs.dynamics) is not _KERNELS[type(envs)][0]:
        return "the environments were given other dynamics"
    distribution = policy.distribution
    if policy.obs_shape != envs.single_observation_space.shape:
        return "its observations are not those of the environments"
    if distribution.space != envs.single_action_space:
        return "its actions are not those of the environments"
    if isinstance(distribution, DiagonalGaussian) and distribution.raw_log_std is None:
        return "its standard deviation comes from the network"
    return policy_cpu.why_not_network(policy)


def collect_in_blocks(
    envs: TensorVectorEnv, policy: Policy, *, num_steps: int, stream: Stream
) -> Rollout:
    """As `collect`, from environments and a policy that `why_not` finds nothing against.

    The same numbers as the reference draws: actions are equal wherever rounding does not decide.
    Blocks are given to as many threads as `vecpg.kernels.threads.count()` says; no bit depends on
    it. The environments themselves are left as they were.
    """
    num_envs = envs.num_envs
    starts_of = Stream(stream.common_seed(Purpose.TRAINING_RESET), 0, stream.first_env, num_envs)
    settings = (
        num_steps,
        envs.max_episode_steps,
        stream.first_env,
        stream.key(Purpose.ACTION),
        starts_of.key(Purpose.START),
        _action_settings(policy),
        policy_cpu.network_of(policy),
    )
    _, play = _KERNELS[type(envs)]
    copies = Copies(
        np.zeros((_VARIABLES, num_envs), np.float32),
        np.zeros(num_envs, np.int64),
        np.zeros(num_envs, np.int64),
        np.zeros(num_envs, np.bool_),
    )
    size = max(1, min(BLOCK, -(-num_envs // threads.count())))
    starts = range(0, num_envs, size)
    longest = 2 * num_steps + envs.max_episode_steps  # were every episode one step
    rows = _make_rows(max(1, min(longest, _FIRST_STEPS // num_envs)), num_envs, policy)
    begin = end = length = 0
    while (copies.steps >= 0).any():
        if end == len(rows.mask):
            rows = _longer(rows, policy)
        begin, end = end, min(len(rows.mask), end + max(1, _CALL_STEPS // size))

        def advance(block: int) -> int:
            first = starts[block]
            last = min(first + size, num_envs)
            reached: int = play(rows, copies, first, last, begin, end, *settings)  # noqa: B023
            return reached

        length = max(length, *threads.run(advance, len(starts)))
    if isinstance(policy.distribution, DiagonalGaussian):
        rows = rows._replace(actions=rows.actions[:, :, None])
    return _rollout(rows, length, stream)


def _action_settings(policy: Policy) -> NDArray[np.float64]:
    """What drawing an action takes beside the network's output: see `_draw_...` below."""
    distribution = policy.distribution
    if not isinstance(distribution, DiagonalGaussian):
        return np.zeros(0)
    with torch.no_grad():
        std = distribution.mean_and_log_std(torch.zeros(1, 1))[1].exp().item()
    return np.array([std, distribution.low.item(), distribution.high.item()])


def _make_rows(capacity: int, num_envs: int, policy: Policy) -> Rows:
    shape = capacity, num_envs
    discrete = isinstance(policy.distribution, Categorical)
    return Rows(
        np.zeros((capacity + 1, num_envs, *policy.obs_shape), np.float32),
        np.zeros(shape, np.int64 if discrete else np.float32),
        np.zeros(shape, np.float32),
        *(np.zeros(shape, np.bool_) for _ in range(3)),
    )


def _longer(rows: Rows, policy: Policy) -> Rows:
    """The same rows with room for as many again."""
    longer = _make_rows(2 * len(rows.mask), rows.mask.shape[1], policy)
    for name, old in rows._asdict().items():
        getattr(longer, name)[: len(old)] = old
    return longer


def _rollout(rows: Rows, length: int, stream: Stream) -> Rollout:
    t, n = np.nonzero(rows.truncations[:length])
    rollout = Rollout(
        **{name: torch.from_numpy(each[:length]) for name, each in rows._asdict().items()},
        final_obs=torch.from_numpy(rows.obs[t + 1, n]),
        final_rows=torch.from_numpy(np.stack([t, n], axis=1)),
        stream=stream,
    )
    check_finite(rollout)
    return rollout


def prepare(envs: Any, policy: Policy) -> None:
    """Compile, or load, the kernel that serves environments and a policy."""
    one = type(envs)(1, max_episode_steps=1)
    collect_in_blocks(one, policy, num_steps=1, stream=Stream(0, 0, 0, 1))


@jit
def _draw_categorical(outputs, key, step, first_env, who, live, settings, drawn, acted):
    """Draw a block's actions, and write them as the environment takes them to `acted`.

    There are no settings.
    """
    numbers, chosen = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int64)
    for i in range(live):
        numbers[i] = uniform(key, step, first_env + who[i])
    choose(outputs, numbers, chosen, live)
    for i in range(live):
        drawn[i] = acted[i] = chosen[i]


@jit
def _draw_gaussian(outputs, key, step, first_env, who, live, settings, drawn, acted):
    """As `_draw_categorical`, of one component; the settings are standard deviation and bounds."""
    std, low, high = np.float32(settings[0]), np.float32(settings[1]), np.float32(settings[2])
    for i in range(live):
        w0, w1, _, _ = philox(key, step, first_env + who[i])
        radius = math.sqrt(np.float32(-2.0) * np.float32(math.log1p(-as_uniform(w0))))
        normal = radius * math.cos(np.float32(2.0 * math.pi) * as_uniform(w1))
        drawn[i] = outputs[0, i] + std * normal
        acted[i] = min(max(drawn[i], low), high)


def _kernel(dynamics: ModuleType, draw: Any) -> Any:
    """The function that plays a block of environments, made from the functions of one copy.

    `start`, `transition`, `observation`, `terminated` and `reward` of the module do what those of
    its dynamics do, of one copy and of numbers. `draw` is one of those above.
    """
    start, transition, observation = dynamics.start, dynamics.transition, dynamics.observation
    terminated, reward = dynamics.terminated, dynamics.reward

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
    ):
        """Play environments `first` to `last` - 1 from row `begin` to their end, or row `end`.

        Returns the number of rows up to the last that counts.
        """
        obs, actions, rewards, terminations, truncations, mask = rows
        features = obs.shape[2]
        units = activations(network)
        before = np.zeros((_VARIABLES, BLOCK), np.float32)
        after = np.zeros((_VARIABLES, BLOCK), np.float32)
        s0, s1, s2, s3 = before[0], before[1], before[2], before[3]
        f0, f1, f2, f3 = after[0], after[1], after[2], after[3]
        seen = np.zeros((_VARIABLES, BLOCK), np.float32)
        o0, o1, o2, o3 = seen[0], seen[1], seen[2], seen[3]
        drawn, acted = np.empty(BLOCK, actions.dtype), np.empty(BLOCK, actions.dtype)
        paid, ended = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.bool_)
        # The environments that have not finished, close together.
        who = np.empty(BLOCK, np.int64)
        live = _NONE
        for n in range(first, last):
            if copies.steps[n] < 0:
                continue
            if begin == 0:
                w0, w1, w2, w3 = philox(start_key, _NONE, first_env + n)
                s0[live], s1[live], s2[live], s3[live] = start(
                    as_uniform(w0), as_uniform(w1), as_uniform(w2), as_uniform(w3)
                )
            else:
                for v in range(_VARIABLES):
                    before[v, live] = copies.state[v, n]
            who[live] = n
            live += 1
        t = begin
        length = 0
        while live > 0 and t < end:
            for i in range(live):
                o0[i], o1[i], o2[i], o3[i] = observation(s0[i], s1[i], s2[i], s3[i])
            for i in range(live):
                for f in range(features):
                    units[i * features + f] = seen[f, i]
                    obs[t, who[i], f] = seen[f, i]
            outputs = forward(network, units, live)
            draw(outputs, action_key, t, first_env, who, live, action_settings, drawn, acted)
            for i in range(live):
                f0[i], f1[i], f2[i], f3[i] = transition(s0[i], s1[i], s2[i], s3[i], acted[i])
            for i in range(live):
                ended[i] = terminated(f0[i], f1[i], f2[i], f3[i])
                paid[i] = reward(s0[i], s1[i], s2[i], s3[i], acted[i], f0[i], f1[i], f2[i], f3[i])
            kept = 0
            for i in range(live):
                n = who[i]
                who[kept] = n
                if copies.resets[n]:
                    copies.resets[n] = False
                    w0, w1, w2, w3 = philox(start_key, t + 1, first_env + n)
                    s0[kept], s1[kept], s2[kept], s3[kept] = start(
                        as_uniform(w0), as_uniform(w1), as_uniform(w2), as_uniform(w3)
                    )
                    kept += 1
                    continue
                copies.lengths[n] += 1
                copies.steps[n] += 1
                truncated = copies.lengths[n] >= max_episode_steps
                actions[t, n] = drawn[i]
                rewards[t, n] = paid[i]
                terminations[t, n] = ended[i]
                truncations[t, n] = truncated
                mask[t, n] = True
                length = t + 1
                s0[kept], s1[kept], s2[kept], s3[kept] = f0[i], f1[i], f2[i], f3[i]
                if not (ended[i] or truncated):
                    kept += 1
                elif copies.steps[n] < num_steps:
                    copies.resets[n] = True
                    copies.lengths[n] = 0
                    kept += 1
                else:
                    copies.steps[n] = -1
                    o0[i], o1[i], o2[i], o3[i] = observation(f0[i], f1[i], f2[i], f3[i])
                    for f in range(features):
                        obs[t + 1, n, f] = seen[f, i]
            live = kept
            t += 1
        for i in range(live):
            for v in range(_VARIABLES):
                copies.state[v, who[i]] = before[v, i]
        return length

    return play


# Of every environment that has a kernel its dynamics, and the kernel.
_KERNELS: dict[type, tuple[type, Callable[..., Any]]] = {
    cartpole.CartPole: (cartpole.CartPoleDynamics, _kernel(cartpole, _draw_categorical)),
    pendulum.Pendulum: (pendulum.PendulumDynamics, _kernel(pendulum, _draw_gaussian)),
}
