"""Train every recipe with several seeds: a table, and one picture of their curves.

    python benchmarks/recipes.py --seeds 20

Every run has nothing but its recipe and its seed; all of them are one population. Writes
benchmarks/results/<machine>/recipes.json and recipes.png and prints the table.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace

from seeds import lowest, middle

from vecpg.look.plot import plot
from vecpg.machine import commit, results_folder, system
from vecpg.population import train_many
from vecpg.recipes import RECIPES

KEPT = ("seed", "solved", "env_steps", "episodes", "iterations", "best_return", "eval_return_mean")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="seeds 1 to this many")
    args = parser.parse_args()
    machine = system()
    folder = results_folder(machine)
    with tempfile.TemporaryDirectory() as runs:
        configs = [
            replace(config, seed=seed, exp_name=recipe, out_dir=runs)
            for recipe, (config, _) in RECIPES.items()
            for seed in range(1, args.seeds + 1)
        ]
        summaries = [result.summary for result in train_many(configs)]
        plot([runs], folder / "recipes.png", statistic="iqm")
    result = {
        "command": f"python benchmarks/recipes.py --seeds {args.seeds}",
        "commit": commit()["commit"],
        "machine": machine,
        "recipes": {
            recipe: [
                {key: one[key] for key in KEPT} for one in summaries if one["recipe"] == recipe
            ]
            for recipe in RECIPES
        },
    }
    (folder / "recipes.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def table(result):
    """Markdown: medians over seeds, and the interquartile mean and the lowest of the returns."""
    lines = [
        "| recipe | solved | env steps | greedy return at the end (95 %) | lowest |",
        "|-|-|-|-|-|",
    ]
    for recipe, runs in result["recipes"].items():
        solved = sum(bool(run["solved"]) for run in runs)
        counted = "no target" if runs[0]["solved"] is None else f"{solved} of {len(runs)}"
        steps = statistics.median(run["env_steps"] for run in runs)
        returns = [run["eval_return_mean"] for run in runs]
        cells = (counted, f"{steps:,.0f}", middle(returns, ".1f"), lowest(returns, ".1f"))
        lines.append(f"| `{recipe}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
