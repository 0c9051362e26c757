"""Curves of runs: for each group of equal settings, the mean over seeds with a confidence band.

Matplotlib is imported when something is drawn, without a display; torch is not needed.
"""

import io
import json
import logging
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vecpg.config import to_dict
from vecpg.recipes import RECIPES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)

# Runs that differ in nothing else are repetitions of one experiment.
_NO_PART_OF_A_GROUP = frozenset(
    (
        "seed",
        "exp_name",
        "out_dir",
        "progress",
        "log_every",
        "save_every",
        "threads",
        "capture_video",
    )
)

# Keys of metrics.jsonl that are not curves: they identify the row.
_COUNTERS = ("iteration", "env_steps", "episodes")

_WORDS = {
    "charts/episodic_return": "mean return of an episode (reward)",
    "charts/best_return": "best mean return so far (reward)",
    "charts/episodic_length": "mean length of an episode (steps)",
    "charts/SPS": "speed (environment steps per second)",
    "eval/episodic_return": "mean return in evaluation (reward)",
    "losses/policy_loss": "policy loss (surrogate, no unit)",
    "losses/value_loss": "value loss (squared reward)",
    "losses/entropy": "entropy of the policy (nats)",
    "losses/grad_norm": "norm of the gradient (no unit)",
    "perf/collect_s": "collecting an iteration (seconds)",
    "perf/returns_s": "returns of an iteration (seconds)",
    "perf/update_s": "update of an iteration (seconds)",
}

# Okabe and Ito (2008), "Color universal design"; without yellow, which is faint on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True, slots=True)
class Curve:
    """One tag of one run: its settings, and (P,) points with increasing env_steps, P >= 1."""

    run_dir: Path
    config: dict[str, Any]
    env_steps: NDArray[np.float64]
    values: NDArray[np.float64]


def plot(
    runs: Sequence[str | Path], out: str | Path, tag: str = "charts/episodic_return"
) -> dict[str, Any]:
    """Draw one tag of several runs into an image file.

    Runs whose settings are the same but for the seed (and for what changes no result: names,
    directories, logging, threads) are one line: their mean. The band around it is the 95 %
    confidence interval of that mean, see `mean_and_band`. Each environment has its own panel. Of
    several runs with the same settings and seed the longest is drawn: they are no further samples.

    Args:
        runs: run directories, and directories that hold run directories, such as `runs`. A run
            found in the latter that has nothing to draw is left out, and the log says so.
        out: the image file; its ending (.png, .pdf, .svg, ...) says the format.
        tag: a key of metrics.jsonl.

    Returns:
        {"out": the file, "runs": how many were drawn, "groups": how many lines}.

    Raises:
        ValueError: not a run directory, nothing to draw, no such tag, seeds of a group without any
            common range, or a file that cannot be written.

    Example:
        >>> plot(["no/such/directory"], "curves.png")
        Traceback (most recent call last):
            ...
        ValueError: no/such/directory: expected a run directory or a directory of runs, got no directory
    """  # noqa: E501
    from matplotlib import rc_context

    curves = _one_for_each_seed(read_curves(runs, tag))
    groups = group_curves(curves)
    path = Path(out)
    image = io.BytesIO()
    # What stands in a file is no program for TeX, even where a user has TeX set all text.
    with rc_context({"text.usetex": False}):
        figure = draw(groups, tag)
        try:
            figure.savefig(image, format=path.suffix[1:] or "none", dpi=150)
        except ValueError as error:  # matplotlib names the formats that there are
            raise ValueError(f"--out {path}: {error}") from error
    try:
        path.write_bytes(image.getvalue())
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error.strerror}") from error
    return {"out": str(out), "runs": len(curves), "groups": len(groups)}


def read_curves(runs: Sequence[str | Path], tag: str) -> list[Curve]:
    """The curves of run directories, and of those in directories of runs.

    Raises:
        ValueError: as `plot`.
    """
    curves: dict[Path, Curve] = {}
    left_out: list[str] = []
    for given in map(Path, runs):
        is_run = (given / "config.json").is_file()
        found = sorted(path.parent for path in given.glob("*/config.json"))
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


def _read_curve(run_dir: Path, tag: str) -> Curve:
    config = _read_object(run_dir / "config.json")
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


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    # Lists inside each other by the thousand are a RecursionError.
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    right = isinstance(content, dict) and all(
        isinstance(content.get(name), kind) for name, kind in (("env_id", str), ("seed", int))
    )
    if not right or not isinstance(content.get("recipe", ""), str):
        raise ValueError(f"{path}: expected the settings of a run, got something else")
    settings: dict[str, Any] = content
    return settings


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

    def is_number(value: Any) -> bool:
        return type(value) is float or (type(value) is int and abs(value) < 2**63)

    if not isinstance(row, dict) or not is_number(row.get("env_steps")):
        return False
    return math.isfinite(row["env_steps"]) and all(
        value is None or is_number(value) for value in row.values()
    )


def _one_for_each_seed(curves: Sequence[Curve]) -> list[Curve]:
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
    kept = {name: value for name, value in config.items() if name not in _NO_PART_OF_A_GROUP}
    return json.dumps(kept, sort_keys=True)


def group_curves(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Curves by the settings that make their group, in order of appearance."""
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(_key(curve.config), []).append(curve)
    return groups


def mean_and_band(
    curves: Sequence[Curve],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
    """The mean ± t * s / sqrt(n), at every number of steps where all n curves have data.

    s is the standard deviation over the curves (n - 1), t the 97.5 % point of Student's
    distribution with n - 1 degrees of freedom. A curve is a straight line between its own points
    and is not continued beyond them, so the result begins where the last curve begins and ends
    where the first one ends. In between it has a point wherever any curve has one: the mean is
    exact.

    Args:
        curves: at least one.

    Returns:
        (P,) env_steps, (P,) mean, and half the height of the band, (P,); None for one curve.

    Raises:
        ValueError: there is no number of steps where all have data.

    Example:
        >>> steps = np.array([0.0, 10.0])
        >>> one = Curve(Path("1"), {}, steps, np.array([0.0, 2.0]))
        >>> other = Curve(Path("2"), {}, steps + 5, np.array([3.0, 3.0]))
        >>> mean_and_band([one, other])[:2]
        (array([ 5., 10.]), array([2. , 2.5]))
    """
    first = max(curve.env_steps[0] for curve in curves)
    last = min(curve.env_steps[-1] for curve in curves)
    if first > last:
        names = ", ".join(str(curve.run_dir) for curve in curves)
        raise ValueError(
            f"expected a range of env_steps that all seeds have in common, got none for {names};"
            " plot fewer of them, or a --tag that every iteration has"
        )
    steps = np.unique(np.concatenate([curve.env_steps for curve in curves]))
    steps = steps[(steps >= first) & (steps <= last)]
    values = np.stack([np.interp(steps, curve.env_steps, curve.values) for curve in curves])
    n = len(curves)
    if n == 1:
        return steps, values[0], None
    half = student_t(n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n)
    return steps, values.mean(axis=0), half


def student_t(degrees: int) -> float:
    """The t with P(-t < T < t) = 0.95, T of Student's distribution.

    Args:
        degrees: of freedom, at least 1.

    Source: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4: with t = sqrt(degrees) * tan(angle) the
    probability is a finite sum of powers of cos(angle).

    Example:
        >>> round(student_t(4), 3)
        2.776
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        sine, cosine = math.sin(angle), math.cos(angle)
        odd = degrees % 2
        term, total = cosine if odd else 1.0, 0.0
        for k in range(1 + odd, degrees, 2):
            total += term
            term *= cosine * cosine * k / (k + 1)
        probability = sine * total
        if odd:
            probability = 2 / math.pi * (angle + probability)
        low, high = (angle, high) if probability < 0.95 else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def draw(groups: dict[str, list[Curve]], tag: str) -> "Figure":
    """The figure: a panel for each environment, a line and a band for each group.

    Args:
        groups: as `group_curves` gives them.
        tag: what the values are.

    Raises:
        ValueError: the seeds of a group have no number of steps in common.
    """
    from matplotlib.figure import Figure

    panels: dict[str, list[str]] = {}
    for key, curves in groups.items():
        panels.setdefault(curves[0].config["env_id"], []).append(key)
    labels = _labels(groups)
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.4 * columns, 4.8 * rows), layout="constrained")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (env_id, keys) in zip(all_axes, panels.items(), strict=False):
        for index, key in enumerate(keys):
            _draw_group(axes, groups[key], labels[key], index)
        _dress(axes, env_id, tag, any(len(groups[key]) > 1 for key in keys))
    for axes in all_axes[len(panels) :]:
        axes.remove()
    return figure


def _draw_group(axes: "Axes", curves: list[Curve], label: str, index: int) -> None:
    steps, mean, half = mean_and_band(curves)
    colour = _COLOURS[index % len(_COLOURS)]
    dashes = _DASHES[index // len(_COLOURS) % len(_DASHES)]
    marker = "o" if len(steps) == 1 else ""  # a line through one point cannot be seen
    axes.plot(steps, mean, dashes, color=colour, marker=marker, linewidth=1.8, label=label)
    if half is not None:
        axes.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)


def _dress(axes: "Axes", env_id: str, tag: str, has_bands: bool) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_title(_plain(env_id), fontsize=12)
    axes.set_xlabel("environment steps", fontsize=11)
    axes.set_ylabel(_plain(_WORDS.get(tag, tag)), fontsize=11)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    # Below the panel, where it hides no curve.
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        frameon=False,
        fontsize=10,
        title="mean over seeds, and its 95 % confidence band" if has_bands else None,
        title_fontsize=10,
    )


def _labels(groups: dict[str, list[Curve]]) -> dict[str, str]:
    """What tells the groups apart, but for the environment, and the number of seeds of each."""
    configs = {key: curves[0].config for key, curves in groups.items()}
    names = dict.fromkeys(name for config in configs.values() for name in config)
    differing = [
        name
        for name in names
        if name not in _NO_PART_OF_A_GROUP | {"env_id"}
        and len({_value(config, name) for config in configs.values()}) > 1
    ]
    if "recipe" in differing:  # which says what follows from it
        differing = [
            name
            for name in differing
            if name == "recipe" or not all(_is_the_recipes(c, name) for c in configs.values())
        ]
    labels = {}
    for key, config in configs.items():
        count = len(groups[key])
        settings = ", ".join(f"{name} {_value(config, name)}" for name in differing)
        seeds = f"{count} seed" + ("s" if count > 1 else "")
        text = f"{settings} ({seeds})" if settings else seeds
        labels[key] = _plain("\n".join(textwrap.wrap(text, 70)))
    return labels


def _is_the_recipes(config: dict[str, Any], name: str) -> bool:
    recipe = RECIPES.get(config.get("recipe", ""))
    return recipe is not None and to_dict(recipe[0]).get(name) == config.get(name)


def _value(config: dict[str, Any], name: str) -> str:
    """A setting as a reader would type it. (Another version of vecpg may not have had it.)"""
    if name not in config:
        return "not recorded"
    value = config[name]
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _plain(text: str) -> str:
    """Text for matplotlib, which would take what stands between dollar signs for a formula."""
    return text.replace("$", r"\$")
