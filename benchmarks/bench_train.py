"""Whole iterations of training, beside bare stepping of the same environments in the same run.

`of_bare` is vector_steps per second of whole iterations, divided by that of bare stepping with
random actions, measured before and after each of five rounds; the median is reported.
`counted_share` is the part of the stepped rows that the gradient used.
"""

import statistics
import time

import numpy as np
import pytest
import torch
from conftest import check_cartpole

from vecpg.config import Config
from vecpg.envs import has_one_generator, make_envs
from vecpg.loss import advantages
from vecpg.policy import Policy
from vecpg.rollout import collect
from vecpg.update import update

CASES = [
    ("sync", 64, 512),
    ("async", 4, 512),
    ("vector_entry_point", 64, 512),
    ("vector_entry_point", 1024, 128),
    ("vector_entry_point", 16384, 16),
    ("tensor", 64, 512),
    ("tensor", 1024, 128),
    ("tensor", 16384, 16),
]
ROUNDS = 5


@pytest.mark.parametrize(("vectorization", "num_envs", "num_steps"), CASES)
@pytest.mark.benchmark(group="train")
def bench_train(benchmark, record, vectorization, num_envs, num_steps):
    envs = make_envs("CartPole-v1", num_envs, vectorization=vectorization)
    torch.manual_seed(0)
    policy = Policy(envs.single_observation_space, envs.single_action_space)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    config = Config(num_envs=num_envs, num_steps=num_steps)
    seconds = dict.fromkeys(("collect", "returns", "update"), 0.0)
    steps = {"env": 0, "vector": 0}
    iterations = iter(range(10**6))

    def iteration():
        started = time.perf_counter()
        rollout = collect(envs, policy, num_steps=num_steps, seed=1, iteration=next(iterations))
        collected = time.perf_counter()
        weights = advantages(rollout, config)
        weighed = time.perf_counter()
        update(policy, optimizer, rollout, weights, config)
        seconds["collect"] += collected - started
        seconds["returns"] += weighed - collected
        seconds["update"] += time.perf_counter() - weighed
        steps["env"] += int(rollout.mask.sum())
        steps["vector"] += rollout.mask.numel()
        return rollout

    actions = np.random.default_rng(0).integers(0, 2, (num_steps, num_envs))

    def bare():
        """Vector steps per second with actions that cost nothing."""
        envs.reset(seed=1 if has_one_generator(envs) else list(range(num_envs)))
        started = time.perf_counter()
        for row in actions:
            envs.step(row)
        return actions.size / (time.perf_counter() - started)

    check_cartpole(iteration())
    if not benchmark.enabled:
        benchmark(lambda: None)
        envs.close()
        return
    bare()
    ratios, speeds, before = [], [], bare()
    for name in seconds:
        seconds[name] = 0.0
    steps |= {"env": 0, "vector": 0}

    def timed():
        nonlocal before
        stepped, started = steps["vector"], time.perf_counter()
        iteration()
        speed = (steps["vector"] - stepped) / (time.perf_counter() - started)
        after = bare()
        ratios.append(speed / statistics.mean((before, after)))
        speeds.append(speed)
        before = after

    benchmark.pedantic(timed, rounds=ROUNDS)
    envs.close()
    spent = sum(seconds.values())
    record(
        num_steps=num_steps,
        vector_steps_per_second=round(statistics.median(speeds)),
        env_steps_per_second=round(steps["env"] / spent),
        of_bare=round(statistics.median(ratios), 3),
        counted_share=round(steps["env"] / steps["vector"], 3),
        **{f"{name}_share": round(value / spent, 3) for name, value in seconds.items()},
    )
    print(f"\n{vectorization} x {num_envs}: {benchmark.extra_info}")
