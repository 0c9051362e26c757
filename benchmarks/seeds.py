"""Train with many seeds and tabulate them: does it solve, after how many steps and seconds?

    python benchmarks/seeds.py --seeds 20 -- --num-envs 64

Everything after `--` goes to scripts/train.py, which runs once per seed, one after the other, in a
fresh process each, as a user would start it. Writes benchmarks/results/<machine>/seeds-<env>.json
and prints a table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

from vecpg.machine import checkout, commit, results_folder, system

KEPT = (
    "seed",
    "solved",
    "solved_env_steps",
    "solved_seconds",
    "wall_seconds",  # of solved_seconds, what was not the confirming evaluation
    "env_steps",
    "eval_return_mean",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="seeds 1 to this many")
    parser.add_argument("flags", nargs="*", help="flags of scripts/train.py, after --")
    args = parser.parse_args()
    runs = []
    for seed in range(1, args.seeds + 1):
        summary, said = train(args.flags, seed)
        runs.append({key: summary[key] for key in KEPT} | {"said": said})
        print(f"seed {seed}: {runs[-1]}", file=sys.stderr, flush=True)
    machine = system()
    folder = results_folder(machine)
    result = {
        "command": " ".join(["python scripts/train.py", *args.flags, "--seed S"]),
        "commit": commit()["commit"],
        "machine": machine,
        "env_id": summary["env_id"],
        "runs": runs,
    }
    path = folder / f"seeds-{summary['env_id'].replace('/', '-')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def train(flags, seed):
    """The summary of one run, and the warnings it gave."""
    with tempfile.TemporaryDirectory() as out_dir:
        command = [sys.executable, str(checkout() / "scripts" / "train.py"), *flags]
        done = subprocess.run(
            [*command, "--seed", str(seed), "--out-dir", out_dir],
            capture_output=True,
            text=True,
            check=True,
        )
    said = [line for line in done.stderr.splitlines() if line.startswith("every episode")]
    return json.loads(done.stdout), said


def table(result):
    """Markdown: a line per seed, then the median and the worst."""
    runs = result["runs"]
    solved = [run for run in runs if run["solved"]]
    lines = [f"`{result['command']}`: {len(solved)} of {len(runs)} solved", ""]
    lines += ["| seed | solved_env_steps | solved_seconds | greedy return |", "|-|-|-|-|"]
    for run in runs:
        steps, seconds = run["solved_env_steps"], run["solved_seconds"]
        measured = f"{steps:,} | {seconds:.2f}" if run["solved"] else "not solved | "
        lines.append(f"| {run['seed']} | {measured} | {run['eval_return_mean']:.1f} |")
    for name, pick in (("median", statistics.median), ("worst", max)):
        if solved:
            steps = pick([run["solved_env_steps"] for run in solved])
            seconds = pick([run["solved_seconds"] for run in solved])
            lines.append(f"| {name} | {steps:,.0f} | {seconds:.2f} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
