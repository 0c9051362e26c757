"""What a search has found: how sure it is, the command that trains with it, and pictures of it."""

import dataclasses
import json
import math
import os
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState, create_trial

from vecpg.config import Config, flag, to_dict
from vecpg.look.intervals import bootstrap_interval, interquartile_mean
from vecpg.recipes import RECIPES
from vecpg.shell import how_to_call
from vecpg.tune.rounds import Search
from vecpg.tune.space import as_text, in_words

# What is not part of a finding.
_OF_THE_SEARCH = ("out_dir", "exp_name", "seed", "resume", "progress")


def summary(search: Search) -> dict[str, Any]:
    """The line that goes to stdout, without what is confirmed; `best` is None if nothing was left.

    A score is the median over the seeds. `gap` is that of the best minus that of the second.
    """
    trials = search.study.get_trials(deepcopy=False)
    best, second, *_ = [*search.finalists(), None, None]
    return {
        "env_id": search.config.env_id,
        "study_dir": os.path.relpath(search.study_dir),
        "budgets": search.config.budgets,
        "trials": len(trials),
        "pruned": sum(trial.state == TrialState.PRUNED for trial in trials),
        "failed": sum(trial.state == TrialState.FAIL for trial in trials),
        "best": _found(search, best),
        "second": _found(search, second),
        "gap": gap(_scores(best), _scores(second), np.median),
        "confirmed": None,
        "command": None if best is None else command(search.config.fixed, search.settings(best)),
    }


def confirmed(scores: dict[str, list[float]], seeds: range) -> dict[str, Any]:
    """The best settings beside the default ones, by interquartile means over fresh seeds."""
    found = {name: estimate(of_one, interquartile_mean) for name, of_one in scores.items()}
    return {
        "seeds": [seeds.start, seeds.stop - 1],
        **{name: found[name] | {"scores": of_one} for name, of_one in scores.items()},
        "gap": gap(scores["best"], scores["default"], interquartile_mean),
    }


def estimate(scores: Sequence[float], statistic: Callable[..., Any]) -> dict[str, Any]:
    """A statistic of runs, and its 95 % bootstrap interval; None for what they cannot tell.

    Example:
        >>> estimate([1.0, 2.0, 6.0], np.median)
        {'score': 2.0, 'interval': [1.0, 6.0]}
    """
    if not scores:
        return {"score": None, "interval": None}
    interval = bootstrap_interval(scores, statistic)
    return {
        "score": float(statistic(np.array(scores), axis=-1)),
        "interval": None if interval is None else interval.tolist(),
    }


def gap(
    ours: Sequence[float], theirs: Sequence[float], statistic: Callable[..., Any]
) -> dict[str, Any]:
    """By how much a statistic of some runs is above that of others; as `estimate`.

    Example:
        >>> gap([5.0, 6.0], [1.0, 1.0], np.median)
        {'score': 4.5, 'interval': [4.0, 5.0]}
    """
    if not ours or not theirs:
        return {"score": None, "interval": None}
    n = len(ours)

    def difference(runs: Any, axis: int) -> Any:
        return statistic(runs[..., :n], axis=axis) - statistic(runs[..., n:], axis=axis)

    runs = [*ours, *theirs]
    interval = bootstrap_interval(runs, difference, strata=[0] * n + [1] * len(theirs))
    return {
        "score": float(difference(np.array(runs), axis=-1)),
        "interval": None if interval is None else interval.tolist(),
    }


def command(fixed: Config, settings: dict[str, Any]) -> str:
    """What is typed to train so: the recipe, and what differs from it.

    Example:
        >>> command(Config(), {"learning_rate": 0.1, "hidden_sizes": (8, 8)})  # doctest: +ELLIPSIS
        '...vecpg train --hidden-sizes 8 8 --learning-rate 0.1'
    """
    without_flags = to_dict(RECIPES[fixed.recipe][0]) | {"recipe": Config.recipe}
    words = []
    for name, value in to_dict(dataclasses.replace(fixed, **settings)).items():
        if name not in _OF_THE_SEARCH and value != without_flags[name]:
            words += _words(name, value)
    return f"{how_to_call('vecpg', 'vecpg')} train {shlex.join(words)}"


def lines(found: dict[str, Any]) -> Iterator[str]:
    """A summary in words."""
    for name in ("best", "second"):
        if (one := found[name]) is not None:
            yield (
                f"{name}: trial {one['trial']}, {in_words(one['settings'])}: median"
                f" {_with_interval(one)} over {len(one['scores'])} seeds"
            )
    if found["second"] is not None:
        yield f"gap between them: {_with_interval(found['gap'])}"
    if (fresh := found["confirmed"]) is not None:
        for name in ("best", "default"):
            yield (
                f"{name}, fresh seeds: interquartile mean {_with_interval(fresh[name])} over"
                f" {len(fresh[name]['scores'])} seeds"
            )
        yield f"gap between them: {_with_interval(fresh['gap'])}, which is {_verdict(fresh['gap'])}"
    elif found["best"] is not None:
        yield "the seeds that chose it flatter it: --confirm-seeds 10 trains it with others"
    if found["command"] is not None:
        yield f"train: {found['command']}"


def save_pictures(search: Search) -> list[Path]:
    """Optuna's own pictures, as PNG files in the search's directory.

    history: what the settings scored after each round. importances, slices: of being in the better
    half after the first round, and of each setting's score then, when all had had the same budget;
    what failed in it counts as below the worst.

    Source: Watanabe, Bansal and Hutter (2023), PED-ANOVA.
    """
    import matplotlib
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as pictures

    matplotlib.use("agg")  # also where there is a display
    first = _after_first_round(search)
    drawings: dict[str, Callable[[], object]] = {
        "history": lambda: pictures.plot_intermediate_values(search.study),
        "importances": lambda: pictures.plot_param_importances(
            first, PedAnovaImportanceEvaluator(target_quantile=0.5), target_name="score"
        ),
        "slices": lambda: pictures.plot_slice(first, target_name="score"),
    }
    paths = []
    for name, draw in drawings.items():
        paths.append(search.study_dir / f"{name}.png")
        # Optuna changes the style.
        with warnings.catch_warnings(), pyplot.rc_context({"figure.figsize": (9, 5)}):
            warnings.simplefilter("ignore", ExperimentalWarning)
            draw()
            pyplot.savefig(paths[-1], bbox_inches="tight", dpi=150)
            pyplot.close()
    return paths


def _after_first_round(search: Search) -> optuna.Study:
    """The same trials, each complete with its score after the first round."""
    trials = search.study.get_trials(deepcopy=False)
    budget = search.config.budgets[0]
    known = {t.number: t.intermediate_values[budget] for t in trials if t.intermediate_values}
    below = min(known.values(), default=0.0) - 1.0
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        study.add_trial(
            create_trial(
                params=trial.params,
                distributions=trial.distributions,
                value=known.get(trial.number, below),
            )
        )
    return study


def _found(search: Search, trial: FrozenTrial | None) -> dict[str, Any] | None:
    if trial is None:
        return None
    scores = _scores(trial)
    about = {"trial": trial.number, "settings": search.settings(trial), "scores": scores}
    return about | estimate(scores, np.median)


def _scores(trial: FrozenTrial | None) -> list[float]:
    return [] if trial is None else trial.user_attrs["scores"]


def _with_interval(found: dict[str, Any]) -> str:
    if found["score"] is None:
        return "unknown"
    interval = found["interval"]
    return f"{found['score']:.1f}" + (
        "" if interval is None else f" [{interval[0]:.1f}, {interval[1]:.1f}]"
    )


def _verdict(found: dict[str, Any]) -> str:
    """What a gap between the best and the default settings says about them."""
    low, high = found["interval"] or (-math.inf, math.inf)
    if low > 0:
        return "for the best"
    return "for the default: keep it" if high < 0 else "no proof for either"


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(name) if value else flag(name).replace("--", "--no-", 1)]
    if isinstance(value, list):
        return [flag(name), *map(str, value)]
    return [flag(name), json.dumps(value) if isinstance(value, dict) else as_text(value)]
