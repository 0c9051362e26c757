"""(f) `scripts/benchmark.py --devices cpu cuda`, a number of environments at a time."""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

from hour.job import Wrong, read

ROOT = Path(__file__).resolve().parents[2]

NUM_ENVS = (4096, 64, 32768)


def measure(job):
    job.run(
        [
            (f"{number} environments", functools.partial(benchmark, job, number))
            for number in NUM_ENVS
        ],
        limit=60,
    )


def benchmark(job, number):
    """What the command leaves for one number of environments."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "scripts/benchmark.py", "--quick", "--devices", "cpu", "cuda"]
        command += ["--vectorizations", "tensor", "--num-envs", str(number), "--out-dir", folder]
        done = subprocess.run(
            command, cwd=ROOT, stdout=sys.stderr, check=False, timeout=max(20, job.left() + 8)
        )
        files = sorted(Path(folder).glob("*.json"))
        if not files:
            raise Wrong(f"scripts/benchmark.py ended with status {done.returncode}")
        found = read(files[0])
        rounds = ("seconds", "limit_seconds")
        for cell in found["cells"]:
            for name in rounds:
                del cell[name]
        return {"results": found}
