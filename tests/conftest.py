"""What every test shares."""

import logging
import signal
import sys
from pathlib import Path

import pytest
import torch

from vecpg.noise import Stream
from vecpg.policy import cpu as policy_cpu
from vecpg.policy.sampling import sampler
from vecpg.rollout.stepping import collect_by_stepping

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parent.parent

# A shell that starts the tests in the background has them, and what they start, ignore Ctrl-C;
# nohup has them ignore SIGHUP.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _quiet_and_steady():
    """One torch thread, and no log level left over from another test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.getLogger("vecpg").setLevel(logging.NOTSET)


def by_stepping(envs, policy, *, num_steps, seed, iteration):
    """Environments on tensors stepped from outside, like any other."""
    stream = Stream(seed, iteration, 0, envs.num_envs)
    draw = sampler(policy, stream, in_machine_code=policy_cpu.why_not(policy) is None)
    return collect_by_stepping(envs, policy, draw, num_steps=num_steps, stream=stream)


def apart(ours, theirs):
    """The statistic of Kolmogorov and Smirnov, of two samples of lengths of at most 500."""
    steps = torch.arange(501)
    shares = [(each[:, None] <= steps).double().mean(dim=0) for each in (ours, theirs)]
    return (shares[0] - shares[1]).abs().max()
