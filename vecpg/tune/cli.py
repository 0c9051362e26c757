"""The command line of `vecpg tune`: check, search, confirm, say what was found."""

import dataclasses
import importlib.util
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vecpg.cli import (
    EXIT_FAILED,
    check_cheaply,
    exit_codes,
    given,
    imports_kept,
    parse,
    parse_config,
    prepare_process,
    stdout_kept_clean,
)
from vecpg.config import Config, ConfigError, flag, to_dict
from vecpg.run.stored import NAMES, flags_to_type, trusted_names
from vecpg.shell import how_to_call
from vecpg.tune.settings import TuneConfig, check_same, of_search
from vecpg.tune.space import Parameter, draw, read_space, settle

_log = logging.getLogger(__name__)


def tune_main(args: Sequence[str]) -> None:
    """`vecpg tune`."""
    with exit_codes():
        resume = given(args, "resume")
        config = _new(args) if resume is None else _going_on(args, Path(resume))
        space = read_space(config.param, config.fixed)
        drawn = draw(space, config.trials, config.seed)
        _check_optuna()
        prepare_process()
        with stdout_kept_clean():
            if resume is None:
                _check_cheaply(args, config, space, drawn)
            found = _search(config, space, drawn)
        if found["best"] is None:
            print(f"error: all {found['trials']} settings failed", file=sys.stderr)
            raise SystemExit(EXIT_FAILED)
        print(json.dumps(found), flush=True)


def _new(args: Sequence[str]) -> TuneConfig:
    """The settings that flags give, `--recipe` read first."""
    recipe = given(args, "recipe")
    named = parse_config([] if recipe is None else ["--recipe", recipe])
    return parse(TuneConfig, args, command="tune", default=of_search(named, {}))


def _going_on(args: Sequence[str], study_dir: Path) -> TuneConfig:
    """The settings of a search that goes on."""
    _check_optuna()
    from vecpg.tune import study

    stored = dataclasses.replace(study.read(study_dir), progress=Config().progress)
    config = parse(TuneConfig, args, command="tune", default=stored)
    check_same(config, stored)
    trusted_names(
        to_dict(stored),
        {name: getattr(config, name) for name in NAMES if given(args, name) is not None},
        f"{how_to_call('vecpg', 'vecpg')} {shlex.join(['tune', *args])}",
    )
    return config


def _check_optuna() -> None:
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("vecpg tune needs optuna: pip install 'vecpg[tune]'")


def _check_cheaply(
    args: Sequence[str],
    config: TuneConfig,
    space: Sequence[Parameter],
    drawn: Sequence[dict[str, Any]],
) -> None:
    """What is wrong with any of the runs, before torch is loaded."""
    for parameter in space:
        if given(args, parameter.name) is not None:
            raise ConfigError(
                f"{flag(parameter.name)}: expected it here or as --param {parameter.name}, got both"
            )
    for run in [config.fixed, *(settle(config.fixed, settings) for settings in drawn)]:
        check_cheaply(run)


def _search(
    config: TuneConfig, space: Sequence[Parameter], drawn: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Search, from the beginning or from where a search was cut; returns what was found."""
    started = time.perf_counter()
    with imports_kept():
        import optuna

        from vecpg.run.directory import discard
        from vecpg.run.interrupts import Interrupts
        from vecpg.tune import report, study
        from vecpg.tune.rounds import Search

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with Interrupts():
        study_dir = Path(config.resume or study.begin(config, space, drawn))
        shown = os.path.relpath(study_dir)
        _log.info("search directory: %s", shown)
        with study.held(study_dir) as known:
            search = Search(study_dir, known, config)
            try:
                search.run()
                found = report.summary(search)
                if config.confirm_seeds and found["best"] is not None:
                    scores = search.confirm(search.finalists()[0])
                    found["confirmed"] = report.confirmed(scores, config.fresh_seeds)
                pictures = report.save_pictures(search)
            except BaseException as error:
                if isinstance(error, ConfigError) and not search.has_begun():
                    discard(study_dir)
                    raise
                words = ["tune --resume", shlex.quote(shown), flags_to_type(to_dict(config.fixed))]
                command = " ".join(filter(None, (how_to_call("vecpg", "vecpg"), *words)))
                _log.info("to go on: %s", command)
                raise
    for line in report.lines(found):
        _log.info("%s", line)
    _log.info("pictures: %s", ", ".join(map(str, pictures)))
    return found | {"wall_seconds": time.perf_counter() - started}
