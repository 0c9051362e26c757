"""What every benchmark records."""

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from vecpg.machine import commit, system


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
    at = commit()["commit"]

    def put(**numbers):
        benchmark.extra_info |= {
            **numbers,
            **system(),
            "threads": torch.get_num_threads(),
            "commit": at,
        }

    return put


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
