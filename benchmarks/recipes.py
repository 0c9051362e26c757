"""Train every recipe with several seeds: a table, and one picture of their curves.

    python benchmarks/recipes.py --seeds 10

Each run is a fresh process of scripts/train.py with nothing but `--recipe` and `--seed`, two at a
time. Writes benchmarks/results/<machine>/recipes.json and recipes.png and prints the table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vecpg.machine import checkout, commit, results_folder, system
from vecpg.recipes import RECIPES

KEPT = ("solved", "env_steps", "episodes", "iterations", "best_return", "eval_return_mean")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="seeds 1 to this many")
    args = parser.parse_args()
    machine = system()
    folder = results_folder(machine)
    with tempfile.TemporaryDirectory() as runs, ThreadPoolExecutor(2) as pool:
        jobs = {
            (recipe, seed): pool.submit(train, recipe, seed, Path(runs) / f"{recipe}-{seed}")
            for seed in range(1, args.seeds + 1)
            for recipe in RECIPES
        }
        found = {recipe: [] for recipe in RECIPES}
        for (recipe, seed), job in jobs.items():
            summary = job.result()
            found[recipe].append({"seed": seed} | {key: summary[key] for key in KEPT})
            print(recipe, found[recipe][-1], file=sys.stderr, flush=True)
        plot = [sys.executable, str(checkout() / "scripts" / "plot.py")]
        out = ["--out", str(folder / "recipes.png")]
        subprocess.run(
            [*plot, *(str(path) for path in sorted(Path(runs).iterdir())), *out], check=True
        )
    result = {
        "command": f"python benchmarks/recipes.py --seeds {args.seeds}",
        "commit": commit()["commit"],
        "machine": machine,
        "recipes": found,
    }
    (folder / "recipes.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def train(recipe, seed, out_dir):
    """The summary of one run."""
    flags = ["--recipe", recipe, "--seed", str(seed), "--out-dir", str(out_dir)]
    done = subprocess.run(
        [sys.executable, str(checkout() / "scripts" / "train.py"), *flags],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def table(result):
    """Markdown: medians over seeds, with the lowest and the highest return."""
    lines = ["| recipe | solved | env steps | greedy return at the end |", "|-|-|-|-|"]
    for recipe, runs in result["recipes"].items():
        returns = sorted(run["eval_return_mean"] for run in runs)
        solved = sum(bool(run["solved"]) for run in runs)
        counted = "no target" if runs[0]["solved"] is None else f"{solved} of {len(runs)}"
        steps = statistics.median(run["env_steps"] for run in runs)
        spread = f"{statistics.median(returns):.1f} ({returns[0]:.1f} to {returns[-1]:.1f})"
        lines.append(f"| `{recipe}` | {counted} | {steps:,.0f} | {spread} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
