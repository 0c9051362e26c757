"""Train in forked children that are killed at random moments, until all runs have come to an end.

    python tests/killed.py FOLDER KILLS

One JSON line: for every run what it left, beside what a run left that nobody killed.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest import last
from test_run_files import left_behind

# Imported before the forks, and nothing is trained here: a child starts in a tenth of a second.
from vecpg.config import Config
from vecpg.run.directory import TEMPORARY
from vecpg.train import train


def config(out_dir, seed):
    """Saved after every iteration: most moments are in the middle of saving."""
    return Config(
        num_envs=64,
        seed=seed,
        out_dir=str(out_dir),
        save_every=1e-9,
        eval_episodes=20,
        resume="auto",
        progress=False,
    )


def fork(settings):
    """Train in a child of its own, silently."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        status = 1
        try:
            train(settings)
            status = 0
        finally:
            os._exit(status)
    return child


def ended(child):
    """The exit status of a child that has ended, or None."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def main(folder, kills):
    numbers = random.Random(1)
    done = {"kills": 0, "while saving": 0, "iterations": [], "runs": []}
    seed = 0
    while done["kills"] < kills:
        seed += 1
        whole, parts = (Path(folder) / f"{name} {seed}" for name in ("whole", "parts"))
        child = fork(config(whole, seed))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        status = None
        while status is None:
            child = fork(config(parts, seed))
            saving = f"*/checkpoints/{TEMPORARY}{child}-*"
            live_on = done["kills"] >= kills
            deadline = time.monotonic() + (600 if live_on else numbers.uniform(0.0, 0.6))
            # Every other one shortly after it has begun to save.
            at_saving = not live_on and done["kills"] % 2 == 1
            if at_saving:
                deadline += 600
            while status is None and time.monotonic() < deadline:
                time.sleep(0.0002)
                status = ended(child)
                if at_saving and any(parts.glob(saving)):
                    at_saving = False
                    deadline = time.monotonic() + numbers.uniform(0.0, 0.005)
            if status is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                done["kills"] += 1
                done["while saving"] += any(parts.glob(saving))
                if any(parts.glob("*/summary.json")):  # it had come to its end
                    status = 0
        begun = [path.parent for path in parts.glob("*/config.json")]
        assert status == 0, f"{parts}: {status}"
        assert len(begun) == 1, begun
        (other,) = whole.iterdir()
        done["runs"].append([left_behind(begun[0]), left_behind(other)])
        done["iterations"].append(last(other)["counters"]["iteration"])
    print(json.dumps(done))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
