"""Pictures of runs: for each group of equal settings a curve over seeds, or their scores' profile.

Matplotlib is imported when something is drawn, without a display; torch is not needed.
"""

import io
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vecpg.config import to_dict
from vecpg.look.curves import (
    NO_PART_OF_A_GROUP,
    Curve,
    group_curves,
    one_for_each_seed,
    read_curves,
)
from vecpg.look.intervals import bootstrap_interval, interquartile_mean, student_t
from vecpg.recipes import RECIPES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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

# Of the bands that are drawn, at every place: rliable's number for profiles.
_RESAMPLES = 2000

# A band has its own resamples at so many places at most, and is a straight line between them.
_PLACES = 500

Statistic = Literal["mean", "iqm"]
_BANDS = {
    "mean": "mean over seeds, and its 95 % confidence band,",
    "iqm": f"interquartile mean over seeds, 95 % band (bootstrap, {_RESAMPLES:,} resamples),",
}

# Okabe and Ito (2008), "Color universal design"; without yellow, which is faint on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")


def plot(
    runs: Sequence[str | Path],
    out: str | Path,
    tag: str | None = None,
    *,
    kind: Literal["curve", "profile"] = "curve",
    statistic: Statistic = "mean",
) -> dict[str, Any]:
    """Draw curves of several runs, or the profile of their scores, into an image file.

    Runs whose settings are the same but for the seed (and for what changes no result: names,
    directories, logging, threads) are one line: of a curve see `centre_and_band`, of a profile
    `profile_and_band`. Each environment has its own panel. Of several runs with the same settings
    and seed the longest is drawn: they are no further samples.

    Args:
        runs: run directories, and directories that hold run directories: a population, or one such
            as `runs`, with the populations in it. A run found in the latter that has nothing to
            draw is left out, and the log says so.
        out: the image file; its ending (.png, .pdf, .svg, ...) says the format.
        tag: a key of metrics.jsonl, `charts/episodic_return` if None. The score of a run in a
            profile is its last value there, so that of `charts/best_return` is its best; if None,
            the mean return of the greedy evaluation at its end, from summary.json.
        kind: what to draw.
        statistic: what a curve is of the seeds: their mean, or their interquartile mean.

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

    if kind == "curve" and tag is None:
        tag = "charts/episodic_return"
    curves = one_for_each_seed(read_curves(runs, tag))
    groups = group_curves(curves)
    path = Path(out)
    image = io.BytesIO()
    # What stands in a file is no program for TeX, even where a user has TeX set all text.
    with rc_context({"text.usetex": False}):
        figure = draw_profiles(groups, tag) if kind == "profile" else draw(groups, tag, statistic)
        try:
            figure.savefig(image, format=path.suffix[1:] or "none", dpi=150)
        except ValueError as error:  # matplotlib names the formats that there are
            raise ValueError(f"--out {path}: {error}") from error
    try:
        path.write_bytes(image.getvalue())
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error.strerror}") from error
    return {"out": str(out), "runs": len(curves), "groups": len(groups)}


def centre_and_band(
    curves: Sequence[Curve], statistic: Statistic = "mean"
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
    """The mean or the interquartile mean of n curves where all have data, with its 95 % interval.

    mean: the interval is mean ± t * s / sqrt(n), s the standard deviation over the curves (n - 1),
    t the 97.5 % point of Student's distribution with n - 1 degrees of freedom; so it is an honest
    one with few curves, too. iqm: the mean of the middle half, which a run that fails, or one that
    is lucky, doesn't move; its interval is `vecpg.look.intervals.bootstrap_interval`, which is too
    narrow with fewer than ten curves. Either is an interval for every number of steps by itself.

    A curve is a straight line between its own points and is not continued beyond them, so the
    result begins where the last curve begins and ends where the first one ends, as a run does that
    solved its environment early. In between it has a point wherever any curve has one.

    Args:
        curves: at least one.
        statistic: which.

    Returns:
        (P,) env_steps, (P,) the statistic, and (2, P) the lower and the upper end of the interval;
        None for one curve.

    Raises:
        ValueError: there is no number of steps where all have data.

    Source: the interquartile mean and its interval: Agarwal et al. (2021), section 4.

    Example:
        >>> steps = np.array([0.0, 10.0])
        >>> one = Curve(Path("1"), {}, steps, np.array([0.0, 2.0]))
        >>> other = Curve(Path("2"), {}, steps + 5, np.array([3.0, 3.0]))
        >>> centre_and_band([one, other])[:2]
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
    if statistic == "iqm":
        places = np.unique(np.linspace(0, len(steps) - 1, _PLACES).astype(int))
        ends = bootstrap_interval(values[:, places], resamples=_RESAMPLES)
        band = (
            None
            if ends is None
            else np.stack([np.interp(steps, steps[places], end) for end in ends])
        )
        return steps, interquartile_mean(values, axis=0), band
    mean = values.mean(axis=0)
    half = student_t(n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n)
    return steps, mean, np.stack([mean - half, mean + half])


def profile_and_band(
    scores: Sequence[float],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
    """The share of runs with a score above tau, at every tau where it falls, and its 95 % interval.

    It falls to what is given at its tau, and stays there until the next; below the first it is 1.
    The interval is `vecpg.look.intervals.bootstrap_interval`, for every tau by itself; where the
    share is 0 or 1 it has no width.

    Args:
        scores: at least one.

    Returns:
        (P,) the scores that there are, in order; (P,) the share of those above; and (2, P) the
        lower and the upper end of the interval, None for one run.

    Source: Agarwal et al. (2021), section 4.2, "run-score distributions".

    Example:
        >>> taus, share, _ = profile_and_band([3.0, 1.0, 3.0, 9.0])
        >>> taus.tolist(), share.tolist()
        ([1.0, 3.0, 9.0], [0.75, 0.25, 0.0])
    """
    taus = np.unique(np.asarray(scores, np.float64))
    above = np.asarray(scores, np.float64)[:, None] > taus
    return taus, above.mean(axis=0), bootstrap_interval(above, np.mean, resamples=_RESAMPLES)


def draw(
    groups: dict[str, list[Curve]], tag: str | None, statistic: Statistic = "mean"
) -> "Figure":
    """The figure of curves: a panel for each environment, a line and a band for each group.

    Args:
        groups: as `group_curves` gives them.
        tag: what the values are, as `read_curves` takes it.
        statistic: as `centre_and_band` takes it.

    Raises:
        ValueError: the seeds of a group have no number of steps in common.
    """

    def paint(axes: "Axes", curves: list[Curve], style: dict[str, Any]) -> None:
        steps, centre, band = centre_and_band(curves, statistic)
        marker = "o" if len(steps) == 1 else ""  # a line through one point cannot be seen
        axes.plot(steps, centre, marker=marker, **style)
        if band is not None:
            axes.fill_between(steps, *band, color=style["color"], alpha=0.2, linewidth=0)

    band = f"{_BANDS[statistic]}\nas far as every seed has data"
    return _panels(groups, paint, "environment steps", _words(tag), band)


def draw_profiles(groups: dict[str, list[Curve]], tag: str | None) -> "Figure":
    """The figure of profiles: a panel for each environment, a line and a band for each group.

    Args:
        groups: as `group_curves` gives them; the score of a curve is its last value.
        tag: what the values are, as `read_curves` takes it.
    """
    reach: dict[str, list[float]] = {}
    for curves in groups.values():
        for curve in curves:
            reach.setdefault(curve.config["env_id"], []).append(curve.values[-1])

    def paint(axes: "Axes", curves: list[Curve], style: dict[str, Any]) -> None:
        scores = reach[curves[0].config["env_id"]]
        margin = 0.05 * (max(scores) - min(scores)) or 1.0
        taus, share, band = profile_and_band([curve.values[-1] for curve in curves])
        taus = np.array([min(scores) - margin, *taus, max(scores) + margin])
        axes.step(taus, [1, *share, 0], where="post", **style)
        if band is not None:
            low, high = ([1, *end, 0] for end in band)
            colour = style["color"]
            axes.fill_between(taus, low, high, step="post", color=colour, alpha=0.2, linewidth=0)

    band = f"share of runs, and its 95 % band (bootstrap, {_RESAMPLES:,} resamples)"
    score = f"tau, at a run's end: {_words(tag)}"
    return _panels(groups, paint, score, "share of runs with more than tau", band)


def _words(tag: str | None) -> str:
    return "greedy return (reward)" if tag is None else _WORDS.get(tag, tag)


def _panels(
    groups: dict[str, list[Curve]],
    paint: Callable[["Axes", list[Curve], dict[str, Any]], None],
    x_label: str,
    y_label: str,
    band: str,
) -> "Figure":
    """A panel for each environment, in which `paint(axes, curves, style)` draws a group."""
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
            style = {
                "color": _COLOURS[index % len(_COLOURS)],
                "linestyle": _DASHES[index // len(_COLOURS) % len(_DASHES)],
                "linewidth": 1.8,
                "label": labels[key],
            }
            paint(axes, groups[key], style)
        axes.set_title(_plain(env_id), fontsize=12)
        axes.set_xlabel(_plain(x_label), fontsize=11)
        axes.set_ylabel(_plain(y_label), fontsize=11)
        _dress(axes, band if any(len(groups[key]) > 1 for key in keys) else None)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    return figure


def _dress(axes: "Axes", band: str | None) -> None:
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    # Below the panel, where it hides no curve.
    legend = axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        frameon=False,
        fontsize=10,
        title=band,
        title_fontsize=10,
    )
    legend.get_title().set_multialignment("center")


def _labels(groups: dict[str, list[Curve]]) -> dict[str, str]:
    """What tells the groups apart, but for the environment, and the number of seeds of each."""
    configs = {key: curves[0].config for key, curves in groups.items()}
    names = dict.fromkeys(name for config in configs.values() for name in config)
    differing = [
        name
        for name in names
        if name not in NO_PART_OF_A_GROUP | {"env_id"}
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
