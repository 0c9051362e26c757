"""The gradient step: rows per second through forward, backward and Adam.

The gradient is checked against one backward pass over all rows at once before the clock starts.
"""

import pytest
import torch
from gymnasium import spaces

from vecpg import update as update_module
from vecpg.adam import Adam
from vecpg.config import Config
from vecpg.kernels import threads
from vecpg.kernels.cores import cores
from vecpg.policy import Policy
from vecpg.rollout import Rollout
from vecpg.update import update


def make_case(length, num_envs):
    g = torch.Generator().manual_seed(0)
    shape = (length, num_envs)
    torch.manual_seed(0)
    policy = Policy(spaces.Box(-1, 1, (4,)), spaces.Discrete(2))
    none = torch.zeros(shape, dtype=torch.bool)
    rollout = Rollout(
        obs=torch.randn(*shape, 4, generator=g),
        actions=torch.randint(0, 2, shape, generator=g),
        rewards=torch.ones(shape),
        terminations=none,
        truncations=none,
        mask=torch.rand(shape, generator=g) < 0.8,
        final_obs=torch.zeros(0, 4),
        final_rows=torch.zeros(0, 2, dtype=torch.int64),
    )
    return policy, rollout, torch.randn(shape, generator=g)


@pytest.mark.parametrize(("length", "num_envs"), [(512, 64), (64, 4096)])
@pytest.mark.parametrize(
    ("how", "number"),
    [("machine code", 1), ("machine code", cores()), ("autograd", 1)],
    ids=["machine-code-1-thread", "machine-code-every-core", "autograd-1-thread"],
)
@pytest.mark.benchmark(group="update")
def bench_update(benchmark, record, monkeypatch, length, num_envs, how, number):
    if how == "autograd":
        monkeypatch.setattr(update_module, "by_machine_code", update_module.by_autograd)
    policy, rollout, advantages = make_case(length, num_envs)
    config = Config()
    still = torch.optim.SGD(policy.parameters(), 0.0)
    update(policy, still, rollout, advantages, config)
    in_chunks = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    log_probs, _ = policy.log_probs_and_entropy(
        rollout.obs[rollout.mask], rollout.actions[rollout.mask]
    )
    (-(log_probs * advantages[rollout.mask]).sum() / num_envs).backward()
    for chunked, parameter in zip(in_chunks, policy.parameters(), strict=True):
        torch.testing.assert_close(chunked, parameter.grad, rtol=1e-3, atol=1e-4)

    optimizer = Adam(policy.parameters(), lr=1e-4)
    with threads.using(number):
        benchmark.pedantic(
            lambda: update(policy, optimizer, rollout, advantages, config),
            rounds=20 if how == "machine code" else 10,
            warmup_rounds=2,
        )
    if benchmark.stats:
        median = benchmark.stats.stats.median
        record(
            kernel_threads=number, env_steps_per_second=round(rollout.mask.sum().item() / median)
        )
