"""Environments in processes of several each, beside the same in one: environment steps per second.

    python benchmarks/pool.py --repetitions 15

64 copies of CartPole-v1, and of environments that compute or sleep so long at each step. Every way
is stepped in turn, again and again, in one run. Writes benchmarks/results/<machine>/pool.json and
prints a table: medians, and of each repetition the ratio to sync.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from vecpg.envs import make_envs

NUM_ENVS = 64
# None is what `--envs-per-worker` is by default.
ENVS_PER_WORKER = (None, 1, 2, 4, 16, 64)
# A turn of the slowest way.
SECONDS = 0.4


def cases(which):
    """Names, with an id and its arguments."""
    found = {"CartPole-v1": ("CartPole-v1", {})}
    for how, milliseconds in itertools.product(("compute", "sleep"), (0.1, 1, 10)):
        kwargs = {"seconds": milliseconds / 1000, "how": how}
        found[f"{how} {milliseconds} ms"] = ("slow:Slow-v0", kwargs)
    return {name: case for name, case in found.items() if which in name}


def ways(env_id, kwargs, stack):
    """By name, environments that have been reset."""
    made = {"sync": make_envs(env_id, NUM_ENVS, vectorization="sync", env_kwargs=kwargs)}
    for each in ENVS_PER_WORKER:
        pool = make_envs(
            env_id, NUM_ENVS, vectorization="async", env_kwargs=kwargs, envs_per_worker=each
        )
        made[f"{each or 'auto'} per process"] = stack.enter_context(closing(pool))
    return made


def check_equal(made, rows):
    """Every way gives what sync gives, to the last bit."""
    actions = np.random.default_rng(0).integers(0, 2, (rows, NUM_ENVS))
    expected = played(made["sync"], actions)
    for name, envs in made.items():
        assert played(envs, actions) == expected, name


def played(envs, actions):
    obs = [envs.reset(seed=1)[0].tobytes()]
    return obs + [one.tobytes() for row in actions for one in envs.step(row)[:-1]]


def measure(env_id, kwargs, repetitions):
    """Seconds of a row, by way, in every repetition."""
    seconds = {}
    with ExitStack() as stack:
        made = ways(env_id, kwargs, stack)
        started = time.perf_counter()
        made["sync"].reset(seed=1)
        made["sync"].step(np.zeros(NUM_ENVS, np.int64))
        rows = max(1, round(SECONDS / (time.perf_counter() - started)))
        # Episodes of 20 steps: a reset is among them where rows are cheap.
        check_equal(made, min(rows, 50))
        actions = np.random.default_rng(1).integers(0, 2, (rows, NUM_ENVS))
        names = list(made)
        for repetition in range(repetitions):
            for name in names if repetition % 2 else names[::-1]:
                started = time.perf_counter()
                for row in actions:
                    made[name].step(row)
                spent = (time.perf_counter() - started) / rows
                seconds.setdefault(name, []).append(spent)
    return {name: seconds[name] for name in names}


def summary(seconds):
    """Of each way its median speed, and its ratio to sync: median, least and largest."""
    result = {}
    for name, spent in seconds.items():
        ratios = [one / other for one, other in zip(seconds["sync"], spent, strict=True)]
        result[name] = {
            "env_steps_per_second": round(NUM_ENVS / statistics.median(spent)),
            "times_sync": round(statistics.median(ratios), 3),
            "times_sync_least": round(min(ratios), 3),
            "times_sync_most": round(max(ratios), 3),
        }
    return result


def table(result):
    """Markdown: a line per case, a column per way."""
    names = list(next(iter(result["cases"].values())))
    lines = ["| environment | " + " | ".join(names) + " |", "|-" * (len(names) + 1) + "|"]
    for case, found in result["cases"].items():
        cells = [
            f"{each['env_steps_per_second']:,} ({each['times_sync']:.2f} x)"
            for each in found.values()
        ]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    args = parser.parse_args()
    # Every worker imports this script, and would load torch with it.
    from vecpg.machine import commit, results_folder, system

    machine, found = system(), {}
    load = os.getloadavg()[0]
    for name, case in cases(args.only).items():
        found[name] = summary(measure(*case, args.repetitions))
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    result = {
        "command": f"python benchmarks/pool.py --repetitions {args.repetitions}",
        "commit": commit()["commit"],
        "machine": machine,
        "cores": len(os.sched_getaffinity(0)),
        # What else was running: of the minute before.
        "load_before": round(load, 2),
        "num_envs": NUM_ENVS,
        "cases": found,
    }
    if not args.only:
        path = results_folder(machine) / "pool.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"load before: {load:.2f}\n\n{table(result)}")


if __name__ == "__main__":
    main()
