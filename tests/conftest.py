"""What every test shares."""

import dataclasses
import hashlib
import json
import logging
import signal
import sys
from pathlib import Path

import pytest
import torch

from vecpg.config import Config, to_dict
from vecpg.noise import Stream
from vecpg.policy import sampling
from vecpg.policy.sampling import sampler
from vecpg.rollout.stepping import collect_by_stepping
from vecpg.run import checkpoint
from vecpg.run.state import Counters

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
    draw = sampler(policy, stream, in_machine_code=sampling.why_not(policy) is None)
    return collect_by_stepping(envs, policy, draw, num_steps=num_steps, stream=stream)


def apart(ours, theirs):
    """The statistic of Kolmogorov and Smirnov, of two samples of lengths of at most 500."""
    steps = torch.arange(501)
    shares = [(each[:, None] <= steps).double().mean(dim=0) for each in (ours, theirs)]
    return (shares[0] - shares[1]).abs().max()


def last(run_dir):
    """What the newest checkpoint of a run holds."""
    return checkpoint.load(checkpoint.folders(run_dir)[0])[1]


def about(**settings):
    """A manifest without what is of the moment."""
    return {
        "config": to_dict(Config(**settings)),
        "resolved": {"vectorization": "sync", "device": "cpu", "shards": 1, "target": None},
        "versions": {"vecpg": "0.1.0"},
        "machine": {},
        "environment": {},
        "counters": dataclasses.asdict(Counters()),
        "solved": False,
    }


def save_policy(folder, policy, **settings):
    """A checkpoint that holds a policy and nothing else."""
    content = {"policy": checkpoint.policy_state(policy)}
    folder.parent.mkdir(exist_ok=True)
    checkpoint.save(folder, about(**settings), {"state.pt": content, "best.pt": content})


def digest(value):
    """SHA-256 of tensors and plain types, nested."""
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()


def _feed(found, value):
    if isinstance(value, torch.Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            found.update(f"{key}:".encode())
            _feed(found, value[key])
    elif isinstance(value, list | tuple):
        found.update(f"{len(value)} items".encode())
        for item in value:
            _feed(found, item)
    else:
        found.update(json.dumps(value).encode())
