"""The returns kernel beside a loop in torch, a copy of the same bytes, and its other layouts.

Everything that is compared is timed in turn within one round, each for about a millisecond or one
call; ratios are of medians. Every buffer has been written before: memory that never was is read
from one page of zeros, and makes a copy look twice as fast. `call` and `packed` allocate what they
return, which costs page faults where it is large; the others are given `out`.
"""

import importlib.util
import statistics
import time

import pytest
import torch

from vecpg.returns import packed_reward_to_go, reference, reward_to_go

GAMMA = 0.99
DONE = 0.02


def make_case(length, num_envs):
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(length, num_envs, generator=g)
    dones = torch.rand(length, num_envs, generator=g) < DONE
    return rewards, dones


def written(tensor):
    """A tensor like this one whose memory has been written to."""
    return torch.empty_like(tensor).fill_(1)


def loop(rewards, dones, out):
    """The fastest loop over time we found: one fused operation a step, in float32."""
    discounts = torch.where(dones, 0.0, GAMMA).unbind()
    rows = rewards.unbind()
    places = out.unbind()
    places[-1].copy_(rows[-1])
    for t in range(len(rows) - 2, -1, -1):
        torch.addcmul(rows[t], discounts[t], places[t + 1], out=places[t])


def check(rewards, dones, result):
    exact = reference.reward_to_go(
        rewards, dones, torch.tensor(GAMMA, dtype=torch.float64), None, None, None, "cut"
    )
    assert (result - exact).abs().max() <= 1e-6 * exact.abs().max()


def in_turn(benchmark, functions, rounds):
    """Median seconds of one call of each function, all of which have their turn in every round."""
    times = {name: [] for name in functions}
    calls = dict.fromkeys(functions, 0)
    for name, function in functions.items():
        function()
        started = time.perf_counter()
        while time.perf_counter() < started + 0.001:
            function()
            calls[name] += 1

    def one_round():
        for name, function in functions.items():
            started = time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append((time.perf_counter() - started) / calls[name])

    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=2)
    return {name: statistics.median(spent[2:]) for name, spent in times.items()}


@pytest.mark.parametrize(("length", "num_envs"), [(128, 64), (500, 64), (128, 4096), (512, 16384)])
@pytest.mark.benchmark(group="returns")
def bench_returns(benchmark, record, length, num_envs):
    rewards, dones = make_case(length, num_envs)
    mask = torch.rand(length, num_envs) < 0.9
    out, looped = written(rewards), written(rewards)
    reward_to_go(rewards, dones, GAMMA, out=out)
    loop(rewards, dones, looped)
    check(rewards, dones, out)
    check(rewards, dones, looped)
    batch_rewards, batch_dones = rewards.t().contiguous(), dones.t().contiguous()
    batch_out = written(batch_rewards)
    reward_to_go(batch_rewards.mT, batch_dones.mT, GAMMA, out=batch_out.mT)
    check(rewards, dones, batch_out.mT)

    # The same episodes one after the other; the last of an environment ends with its last row.
    closed = batch_dones.clone()
    closed[:, -1] = True
    offsets = torch.cat([torch.tensor([0]), closed.reshape(-1).nonzero()[:, 0] + 1])
    flat = batch_rewards.reshape(-1)
    check(rewards, dones, packed_reward_to_go(flat, offsets, GAMMA).view(num_envs, length).t())

    moved = rewards.numel() * 9  # a reward and a return of four bytes, and a flag
    source = written(torch.empty(moved // 2, dtype=torch.uint8))
    target = written(source)
    functions = {
        "ours": lambda: reward_to_go(rewards, dones, GAMMA, out=out),
        "copy": lambda: target.copy_(source),
        "call": lambda: reward_to_go(rewards, dones, GAMMA),
        "masked": lambda: reward_to_go(rewards, dones, GAMMA, mask=mask, out=out),
        "batch_major": lambda: reward_to_go(
            batch_rewards.mT, batch_dones.mT, GAMMA, out=batch_out.mT
        ),
        "packed": lambda: packed_reward_to_go(flat, offsets, GAMMA),
        "loop": lambda: loop(rewards, dones, looped),
    }
    if importlib.util.find_spec("torchrl") and rewards.numel() < 10**6:
        from torchrl.objectives.value.functional import reward2go

        batch = batch_rewards[..., None], closed[..., None]
        check(rewards, dones, reward2go(*batch, GAMMA)[..., 0].t())
        functions["torchrl"] = lambda: reward2go(*batch, GAMMA)
    if not benchmark.enabled:
        benchmark(lambda: None)
        return
    seconds = in_turn(benchmark, functions, rounds=50 if rewards.numel() < 10**6 else 15)
    record(
        shape=[length, num_envs],
        **{f"{name}_us": round(1e6 * spent, 1) for name, spent in seconds.items()},
        elements_per_second=round(rewards.numel() / seconds["ours"]),
        faster_than_loop=round(seconds["loop"] / seconds["ours"], 1),
        of_copy=round(seconds["copy"] / seconds["ours"], 3),
        batch_major_over_ours=round(seconds["batch_major"] / seconds["ours"], 2),
        packed_over_call=round(seconds["packed"] / seconds["call"], 2),
    )
    print(f"\n{length} x {num_envs}: {benchmark.extra_info}")
