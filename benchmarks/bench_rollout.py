"""Stepping and collecting: environment steps per second, by vectorization and number of copies.

`bare` steps the environments with random actions prepared beforehand; `collect` is what training
does. Both report `vector_steps_per_second` (rows x copies); `collect` also `env_steps_per_second`
(rows that count). Everything runs on one thread: speeds are those of one core.
"""

import numpy as np
import pytest
import torch

from vecpg.envs import has_one_generator, make_envs
from vecpg.measure.cells import check_cartpole
from vecpg.policy import Policy
from vecpg.rollout import collect

CASES = [
    ("sync", 64),
    ("async", 4),
    ("async", 64),
    ("vector_entry_point", 64),
    ("vector_entry_point", 1024),
    ("vector_entry_point", 16384),
    ("tensor", 64),
    ("tensor", 1024),
    ("tensor", 16384),
]
ON_TENSORS = ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCarContinuous-v0"]
BARE_ROWS = 100


@pytest.fixture
def envs(vectorization, num_envs):
    made = make_envs("CartPole-v1", num_envs, vectorization=vectorization)
    yield made
    made.close()


def fresh_policy(envs):
    torch.manual_seed(0)
    return Policy(envs.single_observation_space, envs.single_action_space)


@pytest.mark.parametrize(("vectorization", "num_envs"), CASES)
@pytest.mark.benchmark(group="bare stepping")
def bench_bare(benchmark, record, envs, num_envs):
    check_cartpole(collect(envs, fresh_policy(envs), num_steps=1, seed=1, iteration=0))
    actions = np.random.default_rng(0).integers(0, 2, (BARE_ROWS, num_envs))
    envs.reset(seed=1 if has_one_generator(envs) else list(range(num_envs)))

    def bare():
        for row in actions:
            envs.step(row)

    benchmark.pedantic(bare, rounds=5, warmup_rounds=1)
    if benchmark.stats:
        median = benchmark.stats.stats.median
        record(vector_steps_per_second=round(BARE_ROWS * num_envs / median))


@pytest.mark.parametrize(("vectorization", "num_envs"), CASES)
@pytest.mark.benchmark(group="collect")
def bench_collect(benchmark, record, envs, num_envs):
    time_collect(benchmark, record, envs, 64 if num_envs > 4000 else 128, "reference")


@pytest.mark.parametrize("vectorization", ["tensor"])
@pytest.mark.parametrize("num_envs", [1, 64, 4096])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.benchmark(group="collect, num_steps 512")
def bench_kernel(benchmark, record, envs, num_envs, backend):
    """Whole rollouts in machine code, beside the same stepped in torch."""
    check_equal(envs, fresh_policy(envs))
    time_collect(benchmark, record, envs, 512, backend)


@pytest.mark.parametrize("env_id", ON_TENSORS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.benchmark(group="collect, 64 copies, num_steps 512")
def bench_environment(benchmark, record, env_id, backend):
    """Every environment that has one definition; its episodes are those of a policy untrained."""
    envs = make_envs(env_id, 64, vectorization="tensor")
    check_equal(envs, fresh_policy(envs))
    time_collect(benchmark, record, envs, 512, backend, check=check_whole)


def check_equal(envs, policy):
    """The kernel's first rows are the reference's."""
    arguments = {"num_steps": 40, "seed": 1, "iteration": 0}
    ours, expected = (
        collect(envs, policy, **arguments, backend=backend) for backend in ("cpu", "reference")
    )
    counted = expected.mask[:40]
    assert torch.equal(ours.mask[:40], counted)
    for name in ("obs", "actions", "rewards"):
        found, wanted = (getattr(each, name)[:40][counted] for each in (ours, expected))
        exact = not wanted.is_floating_point()
        # A pendulum that stands doubles every four rows what rounding does.
        torch.testing.assert_close(found, wanted, rtol=0, atol=0 if exact else 1e-3)


def check_whole(rollout):
    """Rows that count make whole episodes."""
    assert rollout.dones.any(dim=0).all()
    assert not (rollout.dones & ~rollout.mask).any()


def time_collect(benchmark, record, envs, num_steps, backend, check=check_cartpole):
    policy = fresh_policy(envs)
    arguments = {"num_steps": num_steps, "seed": 1, "iteration": 0, "backend": backend}
    rollout = collect(envs, policy, **arguments)
    check(rollout)
    benchmark.pedantic(
        lambda: collect(envs, policy, **arguments),
        rounds=15 if backend == "cpu" else 5,
        warmup_rounds=1,
    )
    if benchmark.stats:
        median = benchmark.stats.stats.median
        record(
            num_steps=num_steps,
            env_steps_per_second=round(rollout.mask.sum().item() / median),
            vector_steps_per_second=round(rollout.mask.numel() / median),
        )
