"""Which parts there are, in order of worth, and what keeps one from running.

Only the standard library is imported here: what is missing has to be said.
"""

import importlib.util
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from vecpg.shell import how_to_call

# What a part needs, as it is imported and as pip knows it.
KERNELS = ("torch", "numpy", "triton")
COLLECTING = (*KERNELS, "numba", "gymnasium")
TRAINING = (*COLLECTING, "tensorboard", "tqdm")
COMMAND = (*TRAINING, "tyro", "matplotlib")


@dataclass(frozen=True)
class Part:
    """One part.

    module:    of this package; its `measure` is given a `Job`.
    packages:  that it imports.
    seconds:   after which it begins nothing new.
    miniature: what it does without a GPU; None: it needs one.
    """

    module: str
    title: str
    packages: tuple[str, ...]
    seconds: float
    miniature: str | None


PARTS = {
    "a": Part(
        "correctness",
        "correctness of every kernel",
        KERNELS,
        100,
        "a few cases in Triton's interpreter",
    ),
    "b": Part(
        "parity",
        "50 steps, and whole iterations, beside the CPU's from the same keys",
        COLLECTING,
        60,
        "op by op on the CPU, and one kernel interpreted, beside machine code",
    ),
    "c": Part(
        "ladder",
        "whole iterations, op by op, in CUDA graphs, by kernels, and the CPU's machine code",
        COLLECTING,
        90,
        "a few copies on the CPU",
    ),
    "d": Part(
        "returns",
        "returns and advantages beside a copy of the same bytes",
        KERNELS,
        50,
        "a few rows in Triton's interpreter, checked and not timed",
    ),
    "e": Part(
        "solving",
        "seconds until CartPole-v1 is solved",
        TRAINING,
        50,
        "two iterations on the CPU",
    ),
    "f": Part(
        "devices",
        "scripts/benchmark.py --devices cpu cuda",
        COMMAND,
        45,
        None,
    ),
    "t": Part(
        "tiles",
        "every tile of the returns kernel at many shapes",
        KERNELS,
        120,
        None,
    ),
}
# Without a choice; the others have to be named.
USUAL = "abcdef"

# What a part may go on for when its seconds are over: one measurement, and to end.
GRACE = 12
# Of the command itself: torch is imported, and the table printed.
OWN_SECONDS = 10


def missing(part: Part) -> list[str]:
    """The packages that a part lacks."""
    return [name for name in part.packages if importlib.util.find_spec(name) is None]


def pip_line(packages: list[str]) -> str:
    """What adds them to this Python, in the versions that were tested."""
    tested = os.path.relpath(Path(__file__).resolve().parents[2] / "constraints.txt")
    return f"{how_to_call('pip', 'pip')} install -c {shlex.quote(tested)} {' '.join(packages)}"
