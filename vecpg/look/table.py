"""What many runs came to, as a few lines of text."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vecpg.look.intervals import RESAMPLES, bootstrap_interval, interquartile_mean

_WIDTH = 100


def closing_table(summaries: Sequence[dict[str, Any]], failed: int = 0) -> str:
    """How many runs solved their environment; median, interquartile mean and worst of the runs.

    Returns in one environment say nothing about those in another, so each has its own rows; all
    runs in one are repetitions, whatever else their settings are. The interval is
    `vecpg.look.intervals.bootstrap_interval` of the interquartile mean. The steps are of those runs
    that solved it.

    Args:
        summaries: of runs that came to their end, as in summary.json; of each, `env_id`, `seed`,
            `solved`, `eval_return_mean`, `solved_env_steps` and `run_dir` are read.
        failed: how many runs did not; the first line says so, and no number is of them.

    Returns:
        lines of at most 100 characters, without a newline at the end. The worst is named by its
        seed, or by its directory where another run has that seed.

    Example:
        >>> runs = [
        ...     {"env_id": "A-v0", "seed": seed, "solved": True, "eval_return_mean": 490.0 + seed,
        ...      "solved_env_steps": 90_000 + 1_000 * seed}
        ...     for seed in range(1, 6)
        ... ]
        >>> print(closing_table(runs))  # doctest: +NORMALIZE_WHITESPACE
        solved 5 of 5
                           median   interquartile mean (95 %)   worst
        eval_return_mean    493.0      493.0 (491.3 to 494.7)   491.0 (seed 1)
        solved_env_steps   93,000   93,000 (91,333 to 94,667)   95,000 (seed 5)
        95 %: bootstrap over runs, 50,000 resamples, percentiles
    """
    if not summaries:
        return "no run came to its end"
    by_env: dict[str, list[dict[str, Any]]] = {}
    for summary in summaries:
        by_env.setdefault(summary["env_id"], []).append(summary)
    rows = [("", "median", "interquartile mean (95 %)", "worst", "")]
    headings = {}
    for env_id, runs in by_env.items():
        headings[len(rows)] = f"{env_id}: {_solved(runs)}"
        rows.append(_row("eval_return_mean", runs, lowest_is_worst=True))
        if solved := [run for run in runs if run["solved"]]:
            rows.append(_row("solved_env_steps", solved, lowest_is_worst=False))
    names, medians, middles = (
        max(map(len, column)) for column in list(zip(*rows, strict=True))[:3]
    )
    lines = [_solved(summaries) + (f", {failed} failed" if failed else "")]
    for index, (name, median, middle, worst, who) in enumerate(rows):
        if len(by_env) > 1 and index in headings:
            lines.append(headings[index])
        line = f"{name:{names}}   {median:>{medians}}   {middle:>{middles}}   {worst}"
        named = f"{line} ({who})" if who else line
        lines += [named] if len(named) <= _WIDTH else [line, f"  worst: {who}"]
    if any(len(runs) > 1 for runs in by_env.values()):
        lines.append(f"95 %: bootstrap over runs, {RESAMPLES:,} resamples, percentiles")
    return "\n".join(lines)


def _solved(runs: Sequence[dict[str, Any]]) -> str:
    with_target = [run["solved"] for run in runs if run["solved"] is not None]
    without = len(runs) - len(with_target)
    if not with_target:
        return f"{len(runs)} run{'s' if len(runs) > 1 else ''} without a target"
    rest = f" ({without} without a target)" if without else ""
    return f"solved {sum(with_target)} of {len(with_target)}{rest}"


def _row(
    name: str, runs: Sequence[dict[str, Any]], *, lowest_is_worst: bool
) -> tuple[str, str, str, str, str]:
    """Name, median, interquartile mean with its interval, the worst, and which run that is."""
    values = [float(run[name]) for run in runs]
    # Scores may be of hundreds or of a hundredth; steps are whole.
    digits = 0 if name == "solved_env_steps" else 1 if max(map(abs, values)) >= 10 else 3
    ends = bootstrap_interval(values)
    interval = "one run, no interval"
    if ends is not None:
        interval = f"{ends[0]:,.{digits}f} to {ends[1]:,.{digits}f}"
    worst = (min if lowest_is_worst else max)(runs, key=lambda run: run[name])
    seed_is_a_name = len({run["seed"] for run in runs}) == len(runs)
    return (
        name,
        f"{statistics.median(values):,.{digits}f}",
        f"{interquartile_mean(values):,.{digits}f} ({interval})",
        f"{worst[name]:,.{digits}f}",
        f"seed {worst['seed']}" if seed_is_a_name else Path(worst["run_dir"]).name,
    )
