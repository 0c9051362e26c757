"""The file that a benchmark leaves: its schema, the numbers made of its rounds, its place."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np

from vecpg.machine import folder_name

SCHEMA = 1
# More spread than this, between the quartiles and in parts of the median, and a figure is noisy.
NOISY = 0.1

Results = dict[str, Any]


def statistics_of(units: float, seconds: list[float]) -> dict[str, float]:
    """Speeds in units per second from the seconds of each round.

    Returns:
        "median", "p5" and "p95", and "variation": from the lower to the upper quartile, in parts of
        the median.

    Example:
        >>> statistics_of(10, [1.0, 2.0, 5.0])["median"]
        5.0
    """
    speeds = units / np.array(seconds)
    p5, lower, median, upper, p95 = np.percentile(speeds, (5, 25, 50, 75, 95)).tolist()
    return {"median": median, "p5": p5, "p95": p95, "variation": (upper - lower) / median}


def small(results: Results) -> Results:
    """The same without the rounds: what is kept in the repository."""
    dropped = ("seconds", "limit_seconds")
    cells = [
        {name: value for name, value in cell.items() if name not in dropped}
        for cell in results["cells"]
    ]
    return results | {"cells": cells}


def read(path: Path) -> Results:
    """A results file, small or with its rounds.

    Raises:
        ValueError: it cannot be read, or has another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(
            f"{path}: expected results in JSON, got something else; give a file that"
            " vecpg benchmark wrote"
        ) from error
    content = content if isinstance(content, dict) else {}
    schema = content.get("schema")
    if schema != SCHEMA:
        raise ValueError(
            f"{path}: expected results of schema {SCHEMA}, got {schema}; measure again, or read"
            " it with the version of vecpg that wrote it"
        )
    missing = [name for name in ("machine", "devices", "cells", "not_run") if name not in content]
    if missing:
        raise ValueError(
            f"{path}: expected what vecpg benchmark measured, got a file without"
            f" {', '.join(missing)}; give the JSON file of a run without --compare"
        )
    results: Results = content
    return results


def write(path: Path, results: Results) -> None:
    """One line for each cell, numbers to six digits.

    Raises:
        OSError: it cannot be written.
    """
    rows = {
        name: "[\n  " + ",\n  ".join(json.dumps(rounded(row)) for row in results[name]) + "\n ]"
        for name in ("cells", "not_run")
        if results[name]
    }
    text = json.dumps({**results, **{name: name for name in rows}}, indent=1, allow_nan=False)
    for name, lines in rows.items():
        text = text.replace(f'"{name}": "{name}"', f'"{name}": {lines}')
    path.write_text(text + "\n", encoding="utf-8")


def file_name(results: Results) -> str:
    """`<date>-<commit>`, and what keeps it from being recorded; without an ending."""
    name = f"{results['date']}-{results['commit'] or 'no-commit'}"
    return f"{name}{'-changed' if results['dirty'] else ''}{'-quick' if results['quick'] else ''}"


def run_name(results: Results) -> str:
    """`file_name` with the time of day, UTC: no run's files replace another's.

    Example:
        >>> run_name(dict(date="2026-11-22", time="2026-11-22T09:30:05+00:00", commit="1a2b3c4",
        ...               dirty=False, quick=True))
        '2026-11-22-093005-1a2b3c4-quick'
    """
    day, clock = results["date"], results["time"][11:19].replace(":", "")
    return f"{day}-{clock}{file_name(results).removeprefix(day)}"


def newest_of_each_machine(folder: Path) -> list[Results]:
    """The last results of every machine that has any, in order of their folders' names.

    Args:
        folder: of the repository, with a folder for each machine.

    Raises:
        ValueError: a file of another schema.
    """
    machines = sorted(path for path in folder.iterdir() if path.is_dir())
    kept = [sorted(machine.glob("[0-9][0-9][0-9][0-9]-*.json")) for machine in machines]
    # Two files of a day are told apart by the time inside: their names end in a commit.
    return [
        max(map(read, files), key=lambda results: str(results["time"])) for files in kept if files
    ]


def of_every_machine(folder: Path) -> list[Results]:
    """What tells which device is faster: the last results of every machine, or, of one that has
    none, the results that its first hour has left (`benchmarks/first_hour.py`, part f).

    Args:
        folder: as `newest_of_each_machine`.

    Raises:
        ValueError: a file of another schema.
    """
    newest = newest_of_each_machine(folder)
    measured = {folder_name(results["machine"]) for results in newest}
    for path in sorted(folder.glob("*/first-hour-f.json")):
        if path.parent.name not in measured:
            hour = json.loads(path.read_text(encoding="utf-8"))
            cells = [cell for row in hour["rows"] for cell in row["results"]["cells"]]
            newest.append({**hour, "cells": cells})
    return newest


def now() -> dict[str, str]:
    """The date and the time, UTC."""
    at = datetime.datetime.now(datetime.UTC)
    return {"date": at.date().isoformat(), "time": at.isoformat(timespec="seconds")}


def rounded(value: Any) -> Any:
    """Every number in it to six digits, as a file keeps it."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [rounded(each) for each in value]
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return value
