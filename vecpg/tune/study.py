"""A search on the disk: a directory with Optuna's journal, and the runs beside it."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial

from vecpg.config import ConfigError, to_dict
from vecpg.run.directory import discard, hold, make_directory, writing
from vecpg.run.stored import config_of
from vecpg.tune.settings import TuneConfig, of_search
from vecpg.tune.space import Parameter, as_text

_JOURNAL = "journal.log"
_NAME = "search"


def begin(config: TuneConfig, space: Sequence[Parameter], drawn: Sequence[dict[str, Any]]) -> Path:
    """A new directory under `config.out_dir`; in its journal every trial is asked for.

    Args:
        config: kept there last: a journal with settings has all that there is to go on from.
        space: what is searched.
        drawn: the settings of each trial.

    Raises:
        OSError: it cannot be written.
    """
    env_id = config.env_id.replace("/", "-").replace(":", "-")
    study_dir = make_directory(config.out_dir, f"{config.exp_name}__{env_id}")
    distributions = {each.name: _distribution(each) for each in space}
    try:
        with writing(study_dir / _JOURNAL):
            study = optuna.create_study(
                study_name=_NAME, direction="maximize", storage=_storage(study_dir)
            )
            for settings in drawn:
                study.enqueue_trial({each.name: _kept(each, settings) for each in space})
                study.ask(distributions)
            study.set_user_attr("fixed", to_dict(config.fixed))
            study.set_user_attr("search", config.search)
    except BaseException:
        discard(study_dir)
        raise
    return study_dir


def read(study_dir: Path) -> TuneConfig:
    """What a search was begun with.

    Raises:
        ConfigError: there is none, or its journal is damaged.
    """
    path = study_dir / _JOURNAL
    if not path.is_file():
        raise ConfigError(f"--resume {study_dir}: expected the directory of a search, got none")
    try:
        kept = _load(study_dir).user_attrs
        if not kept.keys() >= {"fixed", "search"}:
            raise ConfigError(f"--resume {study_dir}: it was stopped before it began")
        return of_search(config_of(kept["fixed"], path), kept["search"])
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error})") from None


@contextlib.contextmanager
def held(study_dir: Path) -> Iterator[optuna.Study]:
    """What Optuna knows of a search. Until the end, no other process goes on with it.

    Raises:
        ConfigError: another one does.
    """
    path = study_dir / _JOURNAL
    try:
        lock = hold(study_dir)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with lock:
        # Half a line, of a process that was killed as it wrote, would be inside for ever.
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        yield _load(study_dir)


def settings_of(trial: FrozenTrial, space: Sequence[Parameter]) -> dict[str, Any]:
    """What a trial sets, as `Config` has it."""
    settings = {}
    for each in space:
        kept = trial.params[each.name]
        if each.kind == "choice":
            kept = {as_text(value): value for value in each.values}[kept]
        settings[each.name] = kept
    return settings


def _kept(parameter: Parameter, settings: dict[str, Any]) -> Any:
    """A value as Optuna keeps it; what is chosen may be of a type that it does not know."""
    value = settings[parameter.name]
    return as_text(value) if parameter.kind == "choice" else value


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.kind == "choice":
        return CategoricalDistribution([as_text(value) for value in parameter.values])
    low, high = parameter.values
    if parameter.kind == "int":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=parameter.kind == "log")


def _load(study_dir: Path) -> optuna.Study:
    # Nothing is left to be drawn.
    return optuna.load_study(study_name=_NAME, storage=_storage(study_dir), sampler=RandomSampler())


class _NoLock(JournalFileOpenLock):
    """The directory is held; a lock of Optuna's own would outlast a process that is killed."""

    def acquire(self) -> bool:
        """Take nothing."""
        return True

    def release(self) -> None:
        """Give nothing back."""


def _storage(study_dir: Path) -> JournalStorage:
    path = str(study_dir / _JOURNAL)
    return JournalStorage(JournalFileBackend(path, _NoLock(path)))
