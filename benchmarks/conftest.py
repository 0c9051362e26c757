"""What every benchmark records, and the checks that come before any clock is started."""

import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from machine import commit

from vecpg.run_directory import system


@pytest.fixture(autouse=True)
def _one_thread():
    """The default of training; recorded with every figure."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def record(benchmark):
    """Put a speed, and where it was measured, into the benchmark's extra_info."""
    at = commit()

    def put(**numbers):
        benchmark.extra_info |= {
            **numbers,
            **system(),
            "threads": torch.get_num_threads(),
            "commit": at,
        }

    return put


def check_cartpole(rollout, rows=300):
    """Counted rows are CartPole-v1: replayed one transition at a time, in whole episodes."""
    assert rollout.dones.sum(dim=0).min() >= 1
    assert torch.equal(rollout.rewards, rollout.mask.float())
    inside = rollout.mask & ~rollout.dones
    inside[-1] = False
    places = inside.nonzero()
    chosen = places[torch.from_numpy(np.random.default_rng(0).permutation(len(places))[:rows])]
    env = gymnasium.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    for t, n in chosen.tolist():
        env.state = rollout.obs[t, n].double().numpy()
        obs, _, terminated, _, _ = env.step(int(rollout.actions[t, n]))
        assert not terminated
        np.testing.assert_allclose(rollout.obs[t + 1, n].numpy(), obs, atol=1e-5)


def multiply_speed(number):
    """FLOP/s of a 2048 x 2048 x 2048 float32 product in torch, on so many threads."""
    torch.set_num_threads(number)
    a, b = torch.ones(2, 2048, 2048)
    torch.mm(a, b)
    started = time.perf_counter()
    torch.mm(a, b)
    speed = 2 * 2048**3 / (time.perf_counter() - started)
    torch.set_num_threads(1)
    return speed
