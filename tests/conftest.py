"""What every test shares."""

import logging
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parent.parent

# A shell that starts the tests in the background has them, and what they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _quiet_and_steady():
    """One torch thread, and no log level left over from another test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.getLogger("vecpg").setLevel(logging.NOTSET)


def apart(ours, theirs):
    """The statistic of Kolmogorov and Smirnov, of two samples of lengths of at most 500."""
    steps = torch.arange(501)
    shares = [(each[:, None] <= steps).double().mean(dim=0) for each in (ours, theirs)]
    return (shares[0] - shares[1]).abs().max()
