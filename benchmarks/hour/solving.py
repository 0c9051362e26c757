"""(e) Seconds until CartPole-v1 is solved: `vecpg.train.train`, whole runs.

"wall_seconds" are those of the iterations until the one that reached the target, and
"solved_seconds" have the greedy evaluation that confirms it, in Gymnasium's environment, besides.
"""

import contextlib
import functools
import logging
import tempfile

from vecpg.config import Config
from vecpg.train import train

# A wider batch takes more steps to the target.
TIMESTEPS = {64: 500_000, 4096: 30_000_000}
SEEDS = (1, 2, 3)
_KEPT = (
    "solved",
    "iterations",
    "env_steps",
    "solved_env_steps",
    "solved_seconds",
    "wall_seconds",
    "steps_per_second",
    "compile_seconds",
    "eval_return_mean",
)


def measure(job):
    if job.miniature:
        job.run([("4 copies, cpu", functools.partial(solved, 4, "cpu", 1, 2))])
        return
    cases = [
        (f"{copies} copies, {device}, seed {seed}", (copies, device, seed))
        for seed in SEEDS
        for device in ("cuda", "cpu")
        for copies in TIMESTEPS
    ]
    # What the first run of a kind compiles and captures is not a run's own time.
    warm = [
        (f"{copies} copies, {device}, warm-up", (copies, device, 9, 2))
        for device in ("cuda", "cpu")
        for copies in TIMESTEPS
    ]
    job.run([(what, functools.partial(solved, *case)) for what, case in [*warm, *cases]], limit=50)


@contextlib.contextmanager
def _heard(name):
    """What a logger says meanwhile."""
    heard = []

    class Handler(logging.Handler):
        def emit(self, record):
            heard.append(record.getMessage())

    logger, handler = logging.getLogger(name), Handler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield heard
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


def solved(copies, device, seed, iterations=None):
    """One run, from the first reset to the end of the confirming evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            num_envs=copies,
            device=device,
            seed=seed,
            total_timesteps=TIMESTEPS.get(copies, 10**6),
            total_iterations=iterations,
            out_dir=folder,
            progress=False,
        )
        with _heard("vecpg.train") as heard:
            summary = train(config).summary
    return {
        "copies": copies,
        "device": device,
        "seed": seed,
        "warm_up": iterations is not None,
        # How its iterations went, where the log says so.
        "way": next((each for each in heard if each.startswith("iterations: ")), None),
        **{name: summary[name] for name in _KEPT},
    }
