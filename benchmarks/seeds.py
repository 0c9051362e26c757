"""Train with many seeds and tabulate them: does it solve, after how many steps and seconds?

    python benchmarks/seeds.py --seeds 20 -- --num-envs 64

Everything after `--` goes to scripts/train.py: once with `--num-seeds`, one process for all, and
then once for each seed, one after the other in a fresh process, as one would without it. Both have
to come to the same. Writes benchmarks/results/<machine>/seeds-<env>.json and prints a table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

from vecpg.look.intervals import bootstrap_interval, interquartile_mean
from vecpg.machine import checkout, commit, results_folder, system

# What no clock has a part in.
EXACT = ("seed", "solved", "solved_env_steps", "env_steps", "eval_return_mean")
KEPT = (
    *EXACT,
    "solved_seconds",
    "wall_seconds",  # of solved_seconds, what was not the confirming evaluation
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="seeds 1 to this many")
    parser.add_argument("flags", nargs="*", help="flags of scripts/train.py, after --")
    args = parser.parse_args()
    compared = compare(args.flags, args.seeds)
    machine = system()
    result = {
        "command": " ".join(
            ["python scripts/train.py", *args.flags, "--num-seeds", str(args.seeds)]
        ),
        "commit": commit()["commit"],
        "machine": machine,
        **compared,
    }
    path = results_folder(machine) / f"seeds-{result['env_id'].replace('/', '-')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def compare(flags, seeds):
    """One command for all seeds beside one for each: the seconds of both, and what they came to."""
    train([*flags, "--seed", "1", "--total-iterations", "1"])  # whatever it compiles is kept
    summaries, said, seconds = train([*flags, "--seed", "1", "--num-seeds", str(seeds)])
    summaries.sort(key=lambda summary: summary["seed"])
    in_processes = 0.0
    for summary in summaries:
        seed = str(summary["seed"])
        (alone,), _, spent = train([*flags, "--seed", seed])
        in_processes += spent
        print(f"seed {seed}: {spent:.1f} s alone", file=sys.stderr, flush=True)
        for name in EXACT:
            if alone[name] != summary[name]:
                raise SystemExit(f"seed {seed} alone has {name} {alone[name]}, not {summary[name]}")
    return {
        "env_id": summaries[0]["env_id"],
        "runs": [{key: summary[key] for key in KEPT} for summary in summaries],
        "said": said,
        "seconds": {"one command": seconds, "a process for each": in_processes},
    }


def train(flags):
    """The summaries of one command, the warnings it gave, and its seconds from start to exit."""
    with tempfile.TemporaryDirectory() as out_dir:
        started = time.perf_counter()
        done = subprocess.run(
            [
                sys.executable,
                str(checkout() / "scripts" / "train.py"),
                *flags,
                "--out-dir",
                out_dir,
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - started
    said = [line for line in done.stderr.splitlines() if "every episode" in line]
    return [json.loads(line) for line in done.stdout.splitlines()], said, seconds


def table(result):
    """Markdown: a line per seed, then the median, the interquartile mean and the worst."""
    runs, seconds = result["runs"], result["seconds"]
    solved = [run for run in runs if run["solved"]]
    lines = [
        f"`{result['command']}`: {len(solved)} of {len(runs)} solved, in"
        f" {seconds['one command']:.1f} s; a process for each, one after the other:"
        f" {seconds['a process for each']:.1f} s",
        "",
        "| seed | solved_env_steps | solved_seconds | greedy return |",
        "|-|-|-|-|",
    ]
    for run in runs:
        steps, spent = run["solved_env_steps"], run["solved_seconds"]
        measured = f"{steps:,} | {spent:.2f}" if run["solved"] else "not solved | "
        lines.append(f"| {run['seed']} | {measured} | {run['eval_return_mean']:.1f} |")
    for name, show in (("median", median), ("interquartile mean (95 %)", middle), ("worst", None)):
        cells = [
            (show or worst)([run[key] for run in of], form)
            for of, key, form, worst in (
                (solved, "solved_env_steps", ",.0f", highest),
                (solved, "solved_seconds", ".2f", highest),
                (runs, "eval_return_mean", ".1f", lowest),
            )
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def median(values, form):
    return format(statistics.median(values), form) if values else ""


def highest(values, form):
    return format(max(values), form) if values else ""


def lowest(values, form):
    return format(min(values), form)


def middle(values, form):
    """The interquartile mean with its interval, where there is one."""
    if len(values) < 2:
        return ""
    low, high = bootstrap_interval(values)
    return f"{interquartile_mean(values):{form}} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    main()
