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
from conftest import multiply_speed

from vecpg import update as update_module
from vecpg.adam import Adam
from vecpg.advantage import advantages
from vecpg.config import Config
from vecpg.envs import has_one_generator, make_envs
from vecpg.kernels import cores as kernel_cores
from vecpg.kernels import threads
from vecpg.measure.cells import FLOPS, check_cartpole
from vecpg.policy import Policy
from vecpg.rollout import choose_collector, collect
from vecpg.rollout.statistics import episode_statistics
from vecpg.update import by_autograd, by_machine_code, choose_learner, update

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
    optimizer = Adam(policy.parameters(), lr=1e-3)
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


@pytest.mark.parametrize("num_envs", [64, 4096])
@pytest.mark.benchmark(group="train on tensors, num_steps 512")
def bench_tensor(benchmark, record, monkeypatch, num_envs):
    """Machine code on every core and on one, and torch op by op, in turn in one run.

    `bound` is what the matrix products alone would allow at the speed of a large product in
    torch, measured beside it on as many threads; `of_bound` is the part of it that is reached. They
    count the products of the hidden layers twice, as they are where the update computes them again;
    `without_recomputing` is the part of what products would allow were they computed once.
    """
    envs = make_envs("CartPole-v1", num_envs, vectorization="tensor")
    config = Config(num_envs=num_envs, num_steps=512)
    iterations = iter(range(10**6))
    cores = kernel_cores.cores()

    def fresh():
        torch.manual_seed(0)
        policy = Policy(envs.single_observation_space, envs.single_action_space)
        return policy, Adam(policy.parameters(), lr=1e-4)

    policy, optimizer = fresh()
    shares = {}
    # As training does, once.
    memory = config.activation_memory * 1_000_000
    collectors = {
        backend: choose_collector(envs, policy, backend, activation_memory=memory)
        for backend in ("cpu", "reference")
    }
    learner = choose_learner(policy)

    def iteration(number, backend="cpu", differentiate=by_machine_code):
        """Counted steps per second."""
        monkeypatch.setattr(update_module, "by_machine_code", differentiate)
        with threads.using(number):
            clock = [time.perf_counter()]
            rollout = collect(
                envs,
                policy,
                num_steps=512,
                seed=1,
                iteration=next(iterations),
                backend=collectors[backend],
            )
            clock.append(time.perf_counter())
            episode_statistics(rollout)
            clock.append(time.perf_counter())
            weights = advantages(rollout, config)
            clock.append(time.perf_counter())
            update(policy, optimizer, rollout, weights, config, backend=learner)
            clock.append(time.perf_counter())
        steps = int(rollout.mask.sum())
        if number == cores:
            for name, spent in zip(
                ("collect", "statistics", "returns", "update"), np.diff(clock), strict=True
            ):
                shares.setdefault(name, []).append(spent / (clock[-1] - clock[0]))
        return steps / (clock[-1] - clock[0])

    check_training(envs, config, fresh, monkeypatch)
    if not benchmark.enabled:
        benchmark(lambda: None)
        return
    iteration(cores)
    shares.clear()
    every, one, stepped, products = [], [], [], {1: [], cores: []}

    def timed():
        every.append(iteration(cores))

    def others():
        one.append(iteration(1))
        for number in products:
            products[number].append(multiply_speed(number))
        if num_envs == 64 and len(stepped) < 7:
            stepped.append(iteration(1, "reference", by_autograd))

    benchmark.pedantic(timed, setup=others, rounds=20 if num_envs == 64 else 7)
    speed = statistics.median(every)
    flops = {number: statistics.median(speeds) for number, speeds in products.items()}
    record(
        env_steps_per_second=round(speed),
        kernel_threads=cores,
        on_one_thread=round(statistics.median(one)),
        **({"of_op_by_op": round(speed / statistics.median(stepped), 1)} if stepped else {}),
        mm_gflops_one_thread=round(flops[1] / 1e9, 1),
        mm_gflops=round(flops[cores] / 1e9, 1),
        bound=round(flops[cores] / FLOPS["train"]),
        of_bound=round(speed * FLOPS["train"] / flops[cores], 3),
        without_recomputing=round(speed * FLOPS["update"] / flops[cores], 3),
        of_bound_one_thread=round(statistics.median(one) * FLOPS["train"] / flops[1], 3),
        **{
            f"{name}_share": round(float(statistics.median(each)), 3)
            for name, each in shares.items()
        },
    )
    print(f"\ntensor x {num_envs}: {benchmark.extra_info}")


def check_training(envs, config, fresh, monkeypatch):
    """One step along the gradient of a rollout is autograd's, and the rollout is CartPole."""
    gradients = []
    for differentiate in (by_machine_code, by_autograd):
        policy, optimizer = fresh()
        monkeypatch.setattr(update_module, "by_machine_code", differentiate)
        rollout = collect(envs, policy, num_steps=40, seed=1, iteration=0, backend="cpu")
        check_cartpole(rollout)
        update(policy, optimizer, rollout, advantages(rollout, config), config)
        gradients.append([parameter.grad for parameter in policy.parameters()])
    scale = max(gradient.abs().max() for gradient in gradients[1])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() < 1e-5 * scale
