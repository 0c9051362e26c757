"""vecpg, beside which the peers are measured.

Training is collect, statistics, returns and update, as `vecpg/train.py` calls them; what is counted
are the rows that the gradient used, of whole episodes. Solving is `train()` with its default
settings, and what is read is its `solved_seconds`: from the first reset to the end of the greedy
evaluation over 100 episodes that confirms it, without the time to compile kernels.
"""

import functools
import tempfile

import numpy as np
from harness import LEARNING_RATE, LENGTH, Entrant, check_rows, returns, stepping, training

NEEDS = ("vecpg",)
PACKAGES = ("vecpg", "torch", "numba")


def entrants():
    steppers = [
        Entrant(stepping(n), "vecpg, tensor", {"": functools.partial(make_stepping, n)})
        for n in (64, 4096)
    ]
    learners = [
        Entrant(training(n), f"vecpg, {kind}", {"": functools.partial(make_training, n, kind)})
        for n, kind in ((64, "tensor"), (64, "sync"), (4096, "tensor"))
    ]
    kernels = [
        Entrant(returns(n), "vecpg", {"": functools.partial(make_returns, n)}) for n in (64, 4096)
    ]
    return [*steppers, *learners, *kernels]


def make_training(num_envs, vectorization):
    import torch

    from vecpg.adam import Adam
    from vecpg.advantage import advantages
    from vecpg.config import Config
    from vecpg.envs import make_envs
    from vecpg.kernels import threads
    from vecpg.kernels.cores import cores
    from vecpg.policy import Policy
    from vecpg.rollout import choose_collector, collect
    from vecpg.rollout.statistics import episode_statistics
    from vecpg.update import choose_learner, update

    torch.set_num_threads(1)
    torch.manual_seed(0)
    envs = make_envs("CartPole-v1", num_envs, vectorization=vectorization)
    policy = Policy(envs.single_observation_space, envs.single_action_space)
    optimizer = Adam(policy.parameters(), lr=LEARNING_RATE)
    config = Config(num_envs=num_envs, num_steps=LENGTH)
    iterations = iter(range(10**9))
    memory = config.activation_memory * 1_000_000
    collector = choose_collector(envs, policy, activation_memory=memory)
    learner = choose_learner(policy)

    def gather():
        given = {"num_steps": LENGTH, "seed": 1, "iteration": next(iterations)}
        return collect(envs, policy, **given, backend=collector)

    def iterate():
        with threads.using(cores()):
            rollout = gather()
            episode_statistics(rollout)
            weights = advantages(rollout, config)
            update(policy, optimizer, rollout, weights, config, backend=learner)
        return int(rollout.mask.sum())

    rollout = gather()
    inside = rollout.mask[:-1]
    check_rows(
        rollout.obs[:-1][inside].numpy(),
        rollout.actions[:-1][inside].numpy(),
        rollout.obs[1:][inside].numpy(),
        rollout.dones[:-1][inside].numpy(),
    )
    iterate()
    return iterate


def make_stepping(num_envs):
    import torch

    from vecpg.envs import make_envs

    torch.set_num_threads(1)
    envs = make_envs("CartPole-v1", num_envs, vectorization="tensor")
    actions = torch.randint(2, (100, num_envs), generator=torch.Generator().manual_seed(0))
    envs.reset(seed=1)

    def step():
        ends = 0
        for row in actions:
            _, _, terminations, truncations, _ = envs.step(row)
            ends += int((terminations | truncations).sum())
        return actions.numel() - ends  # each is followed by a row that only resets

    return step


def returns_case(num_envs):
    """Rewards and ends, (T, N): one row in 25 ends an episode."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(128, num_envs, generator=generator)
    return rewards, torch.rand(128, num_envs, generator=generator) < 0.04


def returns_error(result, rewards, dones):
    """The largest difference from the definition summed in float64, as part of the largest."""
    expected = np.zeros(rewards.shape)
    after = np.zeros(rewards.shape[1])
    for t in range(len(rewards) - 1, -1, -1):
        after = rewards[t].double().numpy() + 0.99 * np.where(dones[t].numpy(), 0.0, after)
        expected[t] = after
    return float(np.abs(result.double().numpy() - expected).max() / np.abs(expected).max())


def make_returns(num_envs):
    import torch

    from vecpg.kernels import threads
    from vecpg.kernels.cores import cores
    from vecpg.returns import reward_to_go

    torch.set_num_threads(1)
    rewards, dones = returns_case(num_envs)
    assert returns_error(reward_to_go(rewards, dones, 0.99), rewards, dones) < 1e-6

    def compute():
        with threads.using(cores()):
            for _ in range(10):
                reward_to_go(rewards, dones, 0.99)
        return 10 * rewards.numel()

    return compute


def solve(seed):
    """Seconds, and environment steps, until solved; None where it was not."""
    from vecpg.config import Config
    from vecpg.train import train

    with tempfile.TemporaryDirectory() as out_dir:
        config = Config(num_envs=64, seed=seed, out_dir=out_dir, progress=False)
        summary = train(config).summary
    return summary["solved_seconds"], summary["solved_env_steps"]
