"""Many runs in one process beside the same runs one by one: the same bits, speed, memory.

    python benchmarks/population.py

First every run of several populations is compared with the same run alone. Then follow the wall of
one command for 20 seeds beside that of 20 processes; steps per second beside one run on one core
and one on all, in turn; and memory and time of a run against the number of runs, each number in a
process of its own. Writes benchmarks/results/<machine>/population.json and prints tables.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from seeds import compare

from vecpg.config import Config
from vecpg.kernels.cores import cores
from vecpg.machine import commit, results_folder, system
from vecpg.population import train_many
from vecpg.run.checkpoint import STATE, newest_valid
from vecpg.train import train

QUIET = Config(progress=False, log_every=1e9)
SHORT = replace(QUIET, total_iterations=8, target_return=None, eval_episodes=10)
VALUE = replace(SHORT, baseline="value", weights="gae", num_envs=16)


def seeds(config, count):
    return [replace(config, seed=seed) for seed in range(1, count + 1)]


COMPARED = {
    "default, 20 seeds": seeds(QUIET, 20),
    "default, 1 seed": seeds(QUIET, 1),
    "default, 3 seeds": seeds(QUIET, 3),
    "sync, 3 seeds": seeds(replace(SHORT, vectorization="sync", num_envs=8), 3),
    "value baseline, 3 seeds": seeds(VALUE, 3),
    "dropout, 3 seeds": seeds(replace(SHORT, dropout=0.3), 3),
    "mixed settings": [
        replace(SHORT, num_envs=48, hidden_sizes=(32,)),
        replace(SHORT, env_id="Acrobot-v1", num_envs=8),
        replace(SHORT, env_id="Pendulum-v1", num_envs=16),
        replace(SHORT, vectorization="sync", num_envs=4),
        replace(VALUE, seed=5),
        replace(SHORT, num_steps=128, activation="relu", learning_rate=3e-3, seed=9),
    ],
}

# Long runs of equal work, so that a call's beginning and end weigh little.
LONG = replace(QUIET, target_return=None, eval_episodes=1, save_every=1e9)
SPEEDS = {
    "one episode each": replace(LONG, total_timesteps=2_000_000),
    "--num-steps 512": replace(LONG, total_timesteps=2_000_000, num_steps=512),
}
ROUNDS = 7

COUNTS = (1, 2, 4, 8, 16, 32, 64)
OF_EQUAL_WORK = replace(QUIET, total_iterations=14, target_return=None)
COUNT_ROUNDS = 3


def main():
    machine = system()
    result = {"commit": commit()["commit"], "machine": machine, "cores": cores()}
    result["equal"] = {name: check_equal(name, configs) for name, configs in COMPARED.items()}
    result["wall"] = compare([], 20)["seconds"]
    result["speeds"] = {name: speeds(config) for name, config in SPEEDS.items()}
    result["counts"] = counts()
    path = results_folder(machine) / "population.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables(result))


def check_equal(name, configs):
    """How many runs there are, each of which came to the same alone."""
    with tempfile.TemporaryDirectory() as out_dir:
        place = Path(out_dir)
        together = train_many([replace(one, out_dir=str(place / "many")) for one in configs])
        for one, result in zip(configs, together, strict=True):
            alone = train(replace(one, out_dir=str(place / "alone")))
            for what, many, single in zip(
                ("state", "metrics.jsonl", "solved_env_steps"),
                fingerprint(result),
                fingerprint(alone),
                strict=True,
            ):
                if many != single:
                    raise SystemExit(
                        f"{name}, seed {one.seed}: {what} is not that of the run alone"
                    )
    print(f"{name}: {len(configs)} of {len(configs)} equal", file=sys.stderr, flush=True)
    return len(configs)


def fingerprint(result):
    """Of all that a run saved without its clock, of its rows without theirs; and when it solved."""
    state = newest_valid(result.run_dir).read(STATE)
    del state["seconds"]
    rows = []
    for line in (result.run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({k: v for k, v in row.items() if k != "charts/SPS" and k[:5] != "perf/"})
    found = hashlib.sha256()
    feed(found, state)
    return found.hexdigest(), json.dumps(rows), result.summary["solved_env_steps"]


def feed(found, value):
    """Tensors and plain types, nested, into a digest."""
    if isinstance(value, torch.Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            found.update(f"{key}:".encode())
            feed(found, value[key])
    elif isinstance(value, list | tuple):
        found.update(f"{len(value)} items".encode())
        for item in value:
            feed(found, item)
    else:
        found.update(repr(value).encode())


def speeds(config):
    """Steps per second of whole calls, in turn; of each way the median, and all."""
    ways = {
        "population": lambda: seeds(config, 2 * cores()),
        "one core": lambda: [replace(config, threads=1)],
        "all cores": lambda: [config],
    }
    found = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        names = list(ways)
        for name in names[number % 3 :] + names[: number % 3]:
            done = per_second(ways[name]())
            if number:  # the first warms up
                found[name].append(done)
    medians = {name: statistics.median(each) for name, each in found.items()}
    print(medians, file=sys.stderr, flush=True)
    of_cores = [
        a / (cores() * b) for a, b in zip(found["population"], found["one core"], strict=True)
    ]
    of_all = [a / b for a, b in zip(found["population"], found["all cores"], strict=True)]
    return {
        "runs": 2 * cores(),
        "steps_per_second": medians,
        "of cores x one core": statistics.median(of_cores),
        "of all cores": statistics.median(of_all),
        "rounds": found,
    }


def per_second(configs):
    with tempfile.TemporaryDirectory() as out_dir:
        placed = [replace(one, out_dir=out_dir) for one in configs]
        started = time.perf_counter()
        results = train_many(placed) if len(placed) > 1 else [train(placed[0])]
        seconds = time.perf_counter() - started
    return sum(result.summary["env_steps"] for result in results) / seconds


def counts():
    """Of each number of runs, medians of its own processes: seconds and memory."""
    rounds = {count: [] for count in COUNTS}
    spawn = multiprocessing.get_context("spawn")
    for _ in range(COUNT_ROUNDS):
        for count in COUNTS:
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
                rounds[count].append(pool.submit(of_count, count).result())
            print(count, rounds[count][-1], file=sys.stderr, flush=True)
    return [
        {"runs": count} | {key: statistics.median(one[key] for one in each) for key in each[0]}
        for count, each in rounds.items()
    ]


def of_count(count):
    """Seconds of this many runs, and MiB before, at most, and after, with their results kept."""
    with tempfile.TemporaryDirectory() as out_dir:
        few = replace(OF_EQUAL_WORK, total_iterations=1, out_dir=out_dir)
        train_many(seeds(few, cores()))  # loads the kernels, starts the threads
        configs = seeds(replace(OF_EQUAL_WORK, out_dir=out_dir), count)
        before = mebibytes()
        with highest_memory() as highest:
            started = time.perf_counter()
            results = train_many(configs)
            seconds = time.perf_counter() - started
        after = mebibytes()
    assert len(results) == count
    return {"seconds": seconds, "before": before, "highest": highest[0], "after": after}


def mebibytes():
    return psutil.Process().memory_info().rss / 2**20


@contextlib.contextmanager
def highest_memory():
    """A list of one number: the most memory that was there, looked at every 5 ms."""
    most, over = [mebibytes()], threading.Event()

    def watch():
        while not over.wait(0.005):
            most[0] = max(most[0], mebibytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


def tables(result):
    """Markdown."""
    equal = ", ".join(f"{name}: {count} of {count}" for name, count in result["equal"].items())
    wall = result["wall"]
    lines = [
        f"Equal to single runs ({equal}).",
        "",
        f"`vecpg train --num-seeds 20`: {wall['one command']:.1f} s from start to exit;"
        f" 20 processes, one after the other: {wall['a process for each']:.1f} s.",
        "",
        "| k steps/s | population | one run, one core | one run, all cores | of cores x one core |"
        " of all cores |",
        "|-|-|-|-|-|-|",
    ]
    for name, one in result["speeds"].items():
        speed = " | ".join(f"{1e-3 * each:,.0f}" for each in one["steps_per_second"].values())
        ratios = f"{one['of cores x one core']:.2f} | {one['of all cores']:.2f}"
        lines.append(f"| {name} ({one['runs']} runs) | {speed} | {ratios} |")
    lines += [
        "",
        "| runs | seconds | a run | memory more at most | kept for a run |",
        "|-|-|-|-|-|",
    ]
    for one in result["counts"]:
        more, kept = one["highest"] - one["before"], (one["after"] - one["before"]) / one["runs"]
        lines.append(
            f"| {one['runs']} | {one['seconds']:.2f} | {one['seconds'] / one['runs']:.3f} |"
            f" {more:.0f} MiB | {kept:.1f} MiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
