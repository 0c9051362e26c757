"""What is drawn of runs: read from their directories, and grouped by their settings."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger(__name__)

# Runs that differ in nothing else are repetitions of one experiment.
NO_PART_OF_A_GROUP = frozenset(
    (
        "seed",
        "exp_name",
        "out_dir",
        "progress",
        "log_every",
        "save_every",
        "threads",
        "activation_memory",
        "capture_video",
    )
)

# Keys of metrics.jsonl that are not curves: they identify the row.
_COUNTERS = ("iteration", "env_steps", "episodes")

# Of summary.json: the point that a run ends in.
_END = ("env_steps", "eval_return_mean")


@dataclass(frozen=True, slots=True)
class Curve:
    """One tag of one run: its settings, and (P,) points with increasing env_steps, P >= 1."""

    run_dir: Path
    config: dict[str, Any]
    env_steps: NDArray[np.float64]
    values: NDArray[np.float64]


def read_curves(runs: Sequence[str | Path], tag: str | None) -> list[Curve]:
    """The curves of run directories, and of those in directories of runs.

    Args:
        runs: as `plot`.
        tag: a key of metrics.jsonl; None = one point, the greedy evaluation at a run's end.

    Raises:
        ValueError: as `plot`.
    """
    curves: dict[Path, Curve] = {}
    left_out: list[str] = []
    for given in map(Path, runs):
        is_run = (given / "config.json").is_file()
        populations = sorted(path.parent for path in given.glob("*/population.json"))
        found = [
            path.parent
            for folder in (given, *populations)
            for path in sorted(folder.glob("*/config.json"))
        ]
        if not is_run and not found:
            got = "neither" if given.is_dir() else "a file" if given.exists() else "no directory"
            raise ValueError(f"{given}: expected a run directory or a directory of runs, got {got}")
        for run_dir in [given] if is_run else found:
            try:
                curves[run_dir.resolve()] = _read_curve(run_dir, tag)
            except _NothingToDraw as error:
                if is_run:
                    raise
                left_out.append(str(error))
    if not curves:
        raise ValueError(left_out[0])
    for message in left_out:
        _log.warning("left out: %s", message)
    return list(curves.values())


class _NothingToDraw(ValueError):
    """A run without a value of the tag."""


def _read_curve(run_dir: Path, tag: str | None) -> Curve:
    config = _read_settings(run_dir / "config.json")
    if tag is None:
        return _read_end(run_dir, config)
    rows = _read_rows(run_dir / "metrics.jsonl")
    if not rows:
        raise _NothingToDraw(f"{run_dir} has no iteration in its metrics.jsonl yet")
    points: list[tuple[float, float]] = []
    for row in rows:
        if tag in _COUNTERS or row.get(tag) is None:
            continue
        # A run that went on from an earlier checkpoint may do iterations again: the last counts.
        while points and points[-1][0] >= row["env_steps"]:
            points.pop()
        points.append((row["env_steps"], row[tag]))
    if not points:
        tags = {key for row in rows for key, value in row.items() if value is not None}
        known = ", ".join(sorted(tags - set(_COUNTERS)))
        raise _NothingToDraw(f"--tag: expected one that {run_dir} has ({known}), got {tag}")
    steps, values = np.array(points, np.float64).T
    return Curve(run_dir, config, steps, values)


def _read_end(run_dir: Path, config: dict[str, Any]) -> Curve:
    path = run_dir / "summary.json"
    if not path.exists():
        raise _NothingToDraw(f"{run_dir} has no summary.json: it has not come to its end")
    summary = _read_json(path)
    point = [summary.get(name) if isinstance(summary, dict) else None for name in _END]
    if not all(_is_number(number) and math.isfinite(number or 0) for number in point):
        raise ValueError(f"{path}: expected numbers by the names {' and '.join(_END)}")
    steps, score = np.array(point, np.float64)[:, None]
    return Curve(run_dir, config, steps, score)


def _read_settings(path: Path) -> dict[str, Any]:
    content = _read_json(path)
    right = isinstance(content, dict) and all(
        isinstance(content.get(name), kind) for name, kind in (("env_id", str), ("seed", int))
    )
    if not right or not isinstance(content.get("recipe", ""), str):
        raise ValueError(f"{path}: expected the settings of a run, got something else")
    settings: dict[str, Any] = content
    return settings


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    # Lists inside each other by the thousand are a RecursionError.
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that is not finished yet is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not _is_row(row):
            raise ValueError(
                f"{path}: expected an iteration in line {number}, got {line.strip()[:40]!a}"
            )
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    """Numbers by name, the environment steps among them."""
    if not isinstance(row, dict) or not _is_number(row.get("env_steps")):
        return False
    return math.isfinite(row["env_steps"]) and all(
        value is None or _is_number(value) for value in row.values()
    )


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def one_for_each_seed(curves: Sequence[Curve]) -> list[Curve]:
    """The curves without those that repeat the settings and the seed of a longer one."""
    longest: dict[str, Curve] = {}
    for curve in curves:
        key = _key(curve.config) + json.dumps(curve.config["seed"])
        kept = longest.setdefault(key, curve)
        if kept is curve:
            continue
        if curve.env_steps[-1] >= kept.env_steps[-1]:
            longest[key], curve = curve, kept
        _log.warning(
            "left out: %s repeats the settings and the seed of %s",
            curve.run_dir,
            longest[key].run_dir,
        )
    return list(longest.values())


def _key(config: dict[str, Any]) -> str:
    kept = {name: value for name, value in config.items() if name not in NO_PART_OF_A_GROUP}
    return json.dumps(kept, sort_keys=True)


def group_curves(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Curves by the settings that make their group, in order of appearance."""
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(_key(curve.config), []).append(curve)
    return groups
