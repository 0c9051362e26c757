"""Measure the peers that are installed here beside vecpg, and print one table.

    python benchmarks/peers/run.py --record

Every harness runs in a process of its own, so that no package's threads or settings are another's;
they take turns, one at a time, in rounds. Before that each tries its settings (of threads, for
example), and goes on with the fastest. Writes benchmark-results/peers.json, or with --record
benchmarks/results/<machine>/peers.json.
"""

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import speed, versions, why_not

from vecpg.machine import commit, results_folder, system

HARNESSES = (
    "ours",
    "gymnasium_stepping",
    "stable_baselines3_training",
    "jax_reinforce",
    "rlox_training",
    "envpool_stepping",
    "torchrl_returns",
)
# One request, such as making something that has to be compiled.
MOST_SECONDS = 240.0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="at most, of every comparison")
    parser.add_argument("--settings", type=int, default=9, help="at most, that each one tries")
    parser.add_argument("--seeds", type=int, default=5, help="solved with seeds 1 to this many")
    parser.add_argument("--only", default="", help="only tables whose name has this in it")
    parser.add_argument("--record", action="store_true", help="keep it in benchmarks/results")
    parser.add_argument("--out", type=Path, default="benchmark-results", help="folder")
    args = parser.parse_args()

    began = time.perf_counter()
    load = os.getloadavg()[0]
    machine = system()
    workers, not_run, packages = [], [], {}
    for name in HARNESSES:
        reason = why_not(importlib.import_module(name))
        if reason is None:
            workers.append(Worker(name))
        else:
            not_run.append({"harness": name, "reason": reason})
            say(f"{name}: {reason}")
    listed = []
    for worker in workers:
        try:
            entrants, found = worker.ask("list")
        except Failure as failure:
            not_run.append({"harness": worker.name, "reason": f"does not work here: {failure}"})
            continue
        packages |= found
        for index, (group, entrant, variants, unequal) in enumerate(entrants):
            variants = variants[: args.settings]
            listed.append((worker, index, group, entrant, variants, unequal))
    groups = []
    for group in dict.fromkeys(entry[2] for entry in listed):
        chosen = [entry for entry in listed if entry[2] == group]
        if args.only in group and len(chosen) > 1:
            say(group)
            groups.append({"name": group, "rows": compare(chosen, args.rounds, not_run)})
    solved = []
    if args.only in "seconds to solve":
        solved = solve([w for w in workers if w.name in SOLVERS], args.seeds, not_run)
    for worker in workers:
        worker.close()
    result = {
        "command": " ".join(["python benchmarks/peers/run.py", *sys.argv[1:]]),
        "commit": commit()["commit"],
        "machine": machine,
        "load_before": round(load, 2),
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "packages": packages,
        "groups": groups,
        "solve": solved,
        "not_run": not_run,
    }
    folder = results_folder(machine) if args.record else args.out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "peers.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


SOLVERS = {"ours": "vecpg", "stable_baselines3_training": "Stable-Baselines3, PPO"}


def compare(entries, rounds, not_run):
    """Speeds of those that run, in turn; the order moves on by one from round to round.

    There are three rounds at least, and more while they take less than a minute.
    """
    rows, round_seconds = [], 0.0
    for worker, index, _, name, variants, unequal in entries:
        tried, took = {}, {}
        for variant in variants:
            try:
                tried[variant], took[variant] = worker.ask("make", index, variant)
                say(f"  {name} {variant}: {tried[variant]:,.0f}")
            except Failure as failure:
                say(f"  {name} {variant}: {failure}")
                reason = f"does not work here: {failure}"
                not_run.append({"harness": f"{name} {variant}".strip(), "reason": reason})
        if tried:
            best = max(tried, key=tried.get)
            worker.ask("keep", index, best)
            round_seconds += took[best]
            row = {"name": name, "variant": best, "unequal": unequal, "tried": tried, "rounds": []}
            rows.append((worker, index, row))
    for turn in range(max(3, min(rounds, int(60 / max(round_seconds, 1e-9))))):
        first = turn % max(1, len(rows))
        for worker, index, row in rows[first:] + rows[:first]:
            try:
                row["rounds"].append(worker.ask("speed", index))
            except Failure as failure:
                say(f"  {row['name']}: {failure}")
                reason = f"failed in round {turn + 1}: {failure}"
                not_run.append({"harness": row["name"], "reason": reason})
                rows = [other for other in rows if other[2] is not row]
    for worker, _, _ in rows:
        worker.ask("drop")
    for _, _, row in rows:
        row["median"] = statistics.median(row["rounds"])
        say(f"  {row['name']}: {row['median']:,.0f}")
    return [row for _, _, row in rows]


def solve(workers, seeds, not_run):
    rows = []
    for worker in workers:
        try:
            worker.ask("solve", 0)  # loads what has to be loaded
            rows.append((worker, {"name": SOLVERS[worker.name], "runs": []}))
        except Failure as failure:
            reason = f"does not work here: {failure}"
            not_run.append({"harness": SOLVERS[worker.name], "reason": reason})
    for seed in range(1, seeds + 1):
        for worker, row in rows:
            try:
                seconds, steps = worker.ask("solve", seed)
            except Failure as failure:
                say(f"solve, {row['name']}, seed {seed}: {failure}")
                seconds, steps = None, None
            row["runs"].append({"seed": seed, "seconds": seconds, "env_steps": steps})
            say(f"solve, {row['name']}: {row['runs'][-1]}")
    return [row for _, row in rows]


class Failure(Exception):
    """What a harness could not do, in one line."""


class Worker:
    """A harness in a process of its own."""

    def __init__(self, name):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(name, other), daemon=True)
        self._process.start()
        other.close()

    def ask(self, *request):
        try:
            self._connection.send(request)
            if not self._connection.poll(MOST_SECONDS):
                self._process.kill()
                raise Failure(f"no answer to {request} in {MOST_SECONDS:.0f} s")
            kind, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise Failure(f"its process died ({type(error).__name__})") from error
        if kind == "failed":
            raise Failure(value)
        return value

    def close(self):
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()


def serve(name, connection):
    """Answer requests until the other end is closed."""
    os.dup2(2, 1)  # what a package prints is not a table
    module = importlib.import_module(name)
    made, entrants = {}, []
    while True:
        try:
            verb, *rest = connection.recv()
        except EOFError:
            return
        try:
            answer = None
            if verb == "list":
                entrants = module.entrants()
                rows = [(e.group, e.name, list(e.variants), e.unequal) for e in entrants]
                answer = rows, versions(module)
            elif verb == "make":
                index, variant = rest
                made[index, variant] = entrants[index].variants[variant]()
                started = time.perf_counter()
                answer = speed(made[index, variant]), time.perf_counter() - started
            elif verb == "keep":
                index, variant = rest
                made = {
                    key: work
                    for key, work in made.items()
                    if key[0] != index or key == (index, variant)
                }
            elif verb == "speed":
                (index,) = rest
                answer = next(speed(work) for key, work in made.items() if key[0] == index)
            elif verb == "drop":
                made.clear()
                gc.collect()
            elif verb == "solve":
                answer = module.solve(*rest)
            connection.send(("ok", answer))
        # Whatever a package raises, the table has to say so and go on.
        except Exception as error:
            words = " ".join(str(error).split())[:200]
            connection.send(("failed", f"{type(error).__name__}: {words}"))


def table(result):
    """Markdown, from what peers.json holds."""
    machine = result["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores; Python {machine['python']}, "
        + ", ".join(f"{name} {version}" for name, version in result["packages"].items())
        + f"; commit {result['commit']}.",
    ]
    for group in result["groups"]:
        unit = "elements" if "returns" in group["name"] else "env steps"
        ours = next((r["median"] for r in group["rows"] if r["name"].startswith("vecpg")), None)
        lines += ["", f"**{group['name'][0].upper()}{group['name'][1:]}**", ""]
        lines += [f"| | {unit} per second | lowest to highest | of vecpg | with | not equal |"]
        lines += ["|-|-|-|-|-|-|"]
        for row in group["rows"]:
            low, high = short(min(row["rounds"])), short(max(row["rounds"]))
            share = f"{row['median'] / ours:.2g}" if ours else ""
            lines.append(
                f"| {row['name']} | {short(row['median'])} | {low} to {high} | {share} |"
                f" {row['variant']} | {row['unequal']} |"
            )
    if result["solve"]:
        rows = result["solve"]
        lines += ["", "**Seconds to solve CartPole-v1 (env steps)**", ""]
        lines += ["| seed | " + " | ".join(row["name"] for row in rows) + " |"]
        lines += ["|-" * (len(rows) + 1) + "|"]
        for place, run in enumerate(rows[0]["runs"]):
            cells = [solved_in(row["runs"][place]) for row in rows]
            lines.append(f"| {run['seed']} | " + " | ".join(cells) + " |")
        for name, pick in (("median", statistics.median), ("worst", max)):
            cells = []
            for row in rows:
                every = [run["seconds"] for run in row["runs"]]
                cells.append("" if None in every else f"{pick(every):.2f}")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if result["not_run"]:
        lines += ["", "Did not run:", ""]
        lines += [f"* {each['harness']}: {each['reason']}" for each in result["not_run"]]
    return "\n".join(lines)


def short(number):
    """Three digits: 1.23 M, 45.6 k."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def solved_in(run):
    if run["seconds"] is None:
        return "not solved"
    return f"{run['seconds']:.2f} ({run['env_steps']:,})"


def say(line):
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
