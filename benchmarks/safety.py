"""What it costs that nothing is lost: checks that numbers are finite, and saving.

    python benchmarks/safety.py

Trains, times both inside the run that they are a part of, and tabulates medians beside the
iteration of the same run. Writes benchmarks/results/<machine>/safety.json.
"""

import contextlib
import importlib
import itertools
import json
import statistics
import tempfile
import time

from vecpg import train as train_module
from vecpg.config import Config
from vecpg.machine import commit, results_folder, system
from vecpg.train import train

# Every place where a run looks whether numbers are finite.
CHECKS = (
    ("vecpg.rollout.cpu", "check_finite"),
    ("vecpg.rollout.stepping", "_check_observations"),
    ("vecpg.update", "check_parameters"),
    ("vecpg.update.UpdateStats", "not_finite"),
    ("vecpg.value", "check_parameters"),
)
CELLS = (
    {"vectorization": "tensor", "num_envs": 64},
    {"vectorization": "tensor", "num_envs": 4096},
    {"vectorization": "sync", "num_envs": 64},
    {"vectorization": "tensor", "num_envs": 64, "baseline": "value"},
)
RUNS, ITERATIONS = 5, 12


@contextlib.contextmanager
def timed(calls, module, name):
    """Append the seconds of every call to `calls`."""
    home, _, owner = module.rpartition(".")
    place = importlib.import_module(home if owner[0].isupper() else module)
    place = getattr(place, owner) if owner[0].isupper() else place
    real = getattr(place, name)

    def run(*args, **kwargs):
        started = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            calls.append(time.perf_counter() - started)

    setattr(place, name, run)
    try:
        yield
    finally:
        setattr(place, name, real)


def run(settings):
    """Milliseconds of each iteration, without saving; of its checks; of the saves."""
    checks, saves, iterations = [], [], []
    real = train_module.collect

    def collect(*args, **kwargs):
        iterations.append((time.perf_counter(), sum(checks), sum(saves)))
        return real(*args, **kwargs)

    with tempfile.TemporaryDirectory(dir=".") as out_dir, contextlib.ExitStack() as patches:
        for module, name in CHECKS:
            patches.enter_context(timed(checks, module, name))
        patches.enter_context(timed(saves, "vecpg.run.checkpoint.Saver", "save"))
        patches.callback(setattr, train_module, "collect", real)
        train_module.collect = collect
        train(
            Config(
                **settings,
                total_iterations=ITERATIONS,
                total_timesteps=None,
                target_return=None,
                eval_episodes=1,
                save_every=1e-9,
                out_dir=out_dir,
                progress=False,
                log_every=1e9,
            )
        )
    spent = []
    for one, following in itertools.pairwise(iterations[1:]):
        (begun, checked, saved), (ended, checked_then, saved_then) = one, following
        whole = ended - begun - (saved_then - saved)
        spent.append((1e3 * whole, 1e3 * (checked_then - checked)))
    return spent, [1e3 * each for each in saves]


def main():
    cells = [{**settings, "runs": []} for settings in CELLS]
    run(CELLS[0])  # compiles
    for _ in range(RUNS):
        for cell, settings in zip(cells, CELLS, strict=True):
            spent, saves = run(settings)
            cell["runs"].append({"iterations_and_checks_ms": spent, "saves_ms": saves})
    for cell in cells:
        spent = [each for one in cell["runs"] for each in one["iterations_and_checks_ms"]]
        cell["iteration_ms"] = statistics.median(whole for whole, _ in spent)
        cell["checks_share"] = statistics.median(checked / whole for whole, checked in spent)
        cell["first_save_ms"] = statistics.median(one["saves_ms"][0] for one in cell["runs"])
        cell["last_save_ms"] = statistics.median(one["saves_ms"][-1] for one in cell["runs"])
        every = [each for one in cell["runs"] for each in one["saves_ms"][1:]]
        cell["save_ms"] = statistics.median(every)
        cell["save_share"] = cell["save_ms"] / (1e3 * Config().save_every)
    machine = system()
    result = {"commit": commit()["commit"], "machine": machine, "cells": cells}
    path = results_folder(machine) / "safety.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(cells))


def table(cells):
    """Markdown: one line for each cell."""
    lines = [
        "| | copies | iteration | checks of it | first save | last save | saving every 60 s |",
        "|-|-|-|-|-|-|-|",
    ]
    for cell in cells:
        name = cell["vectorization"] + (", --baseline value" if "baseline" in cell else "")
        lines.append(
            f"| {name} | {cell['num_envs']} | {cell['iteration_ms']:.1f} ms |"
            f" {100 * cell['checks_share']:.2f} % | {cell['first_save_ms']:.1f} ms |"
            f" {cell['last_save_ms']:.1f} ms | {100 * cell['save_share']:.3f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
