"""What `--resume` means: which run, with which settings. Only the standard library is imported."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from vecpg.config import Config, ConfigError, flag, to_dict
from vecpg.run.stored import (
    NAME_IT_TOO,
    config_of,
    flags_to_type,
    names_to_type,
    read_bytes,
    read_object,
)
from vecpg.shell import how_to_call

# What a run may be given anew when it goes on.
ANEW = (
    "total_timesteps",
    "total_episodes",
    "total_iterations",
    "target_return",
    "save_every",
    "dist_timeout",
    "device",
    "progress",
)
# Of a file, as file systems have it.
LONGEST_NAME = 255
# What says where runs are, and is no setting of one.
_WHERE = ("out_dir", "resume")


def find_run(config: Config) -> Path | None:
    """The run directory in which a run goes on, by `config.resume`; None where a new one starts.

    "auto" means the newest run under `config.out_dir` with the same env_id, exp_name and seed that
    has not come to its end.

    Raises:
        ConfigError: the path is not of a run, or of one that has not begun.
    """
    if config.resume is None:
        return None
    if config.resume == "auto":
        return _newest_unfinished(config)
    return find_named_run(Path(config.resume))


def find_named_run(path: Path) -> Path:
    """The run directory that a path stands for: itself, or that of a checkpoint.

    Raises:
        ConfigError: as `find_run`.
    """
    if len(path.name) > LONGEST_NAME:
        raise ConfigError(f"--resume {ascii(path.name)[:80]}...: expected the name of a run")
    for run_dir in (path, _run_of(path)):
        if run_dir is not None and (run_dir / "config.json").is_file():
            return run_dir
    known = sorted(each.parent.name for each in path.absolute().parent.glob("*/config.json"))
    there = f"; there are {', '.join(known[-5:])}" if known else ""
    got = "something else" if path.exists() else "nothing of that name"
    if (path / "checkpoints").is_dir():
        got = "one without config.json: it was stopped before it began, or the file is gone"
    raise ConfigError(
        f"--resume {path}: expected auto, a run directory or a checkpoint in one, got {got}{there}"
    )


def stored_config(run_or_checkpoint: str | Path, **anew: Any) -> Config:
    """The settings of a run that is to go on: `train(stored_config(RUN_DIR))`.

    Args:
        run_or_checkpoint: its directory, or a checkpoint in it.
        anew: settings that change: limits, target_return, save_every, device, progress; and
            `env_id`, `env_kwargs`, `wrappers` and `network` as they are, where they name a module
            or a path, which is taken from no file.

    Raises:
        ConfigError: there is no run, its config.json is damaged, or another setting is given anew.

    Example:
        >>> stored_config("nothing")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        vecpg.config.ConfigError: --resume nothing: expected auto, a run directory or a ...
    """
    path = Path(run_or_checkpoint)
    stored = read_config(find_named_run(path))
    for name in names_to_type(to_dict(stored)):
        if name not in anew:
            raise ConfigError(
                f"{NAME_IT_TOO}; if you trust it, pass {name}={getattr(stored, name)!r}"
            )
    config = dataclasses.replace(stored, resume=str(path), **anew)
    check_settings(config, stored)
    return config


def read_config(run_dir: Path) -> Config:
    """The settings in a run's config.json, checked.

    Raises:
        ConfigError: it cannot be read, or is not what a run of this version leaves.
    """
    path = run_dir / "config.json"
    return config_of(read_json(path), path)


def check_settings(config: Config, stored: Config) -> None:
    """Refuse other settings than a run was begun with, those apart that may be given anew.

    Raises:
        ConfigError: one differs; the message has both values.
    """
    given, had = to_dict(config), to_dict(stored)
    for name, value in had.items():
        if name not in (*ANEW, *_WHERE) and given[name] != value:
            free = ", ".join(flag(each) for each in ANEW)
            raise ConfigError(
                f"{flag(name)}: expected {shown(value)}, with which the run was begun, got"
                f" {shown(given[name])}; leave it out, or start a new run (only {free} may be"
                " given anew)"
            )


def differences(had: dict[str, Any], has: dict[str, Any]) -> list[str]:
    """What of a machine and its packages is another than it was, in words.

    Example:
        >>> differences({"torch": "2.6", "cpu": "A"}, {"torch": "2.7", "cpu": "A"})
        ['torch 2.7 instead of 2.6']
    """
    return [
        f"{name} {shown(has.get(name))} instead of {shown(had.get(name))}"
        for name in sorted({*had, *has})
        if had.get(name) != has.get(name)
    ]


def name_of(config: Config) -> str:
    """What the name of a run's directory begins with: environment, experiment, seed."""
    env_id = config.env_id.replace("/", "-").replace(":", "-")
    return f"{env_id}__{config.exp_name}__{config.seed}"


def resume_command(run_dir: str, config: Config) -> str:
    """The command that goes on with a run, to be typed; names of modules are not taken from a file.

    Args:
        run_dir: as the user sees it.
        config: of the run.
    """
    words = ["train", "--resume", shlex.quote(run_dir), flags_to_type(to_dict(config))]
    return " ".join(filter(None, (how_to_call("vecpg", "vecpg"), *words)))


def _run_of(path: Path) -> Path | None:
    """The run that a checkpoint, or a file of one, lies in."""
    for folder in (path.absolute(), path.absolute().parent):
        if folder.parent.name == "checkpoints":
            return folder.parent.parent
    return None


def _newest_unfinished(config: Config) -> Path | None:
    names = ("env_id", "exp_name", "seed")
    wanted = {name: getattr(config, name) for name in names}
    unfinished = [
        path.parent
        for path in Path(config.out_dir).glob("*/config.json")
        if not (path.parent / "summary.json").exists()
    ]
    for run_dir in sorted(unfinished, key=begun, reverse=True):
        try:
            content = read_json(run_dir / "config.json")
        except ConfigError:
            if run_dir.name.startswith(f"{name_of(config)}__"):
                raise
            continue
        if {name: content.get(name) for name in names} == wanted:
            return run_dir
    return None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run.

    Raises:
        ConfigError: there is none, or the file cannot be read.
    """
    return read_object(read_bytes(path), path)


def begun(run_dir: Path) -> tuple[int, int]:
    """When a run or a population was begun, and which it was of that second, by its name."""
    second, _, number = run_dir.name.rpartition("__")[2].partition("-")
    return int(second) if second.isdecimal() else 0, int(number) if number.isdecimal() else 0


def shown(value: Any) -> str:
    """A value in characters that can be printed, wherever it comes from."""
    text = "none" if value is None else str(value)
    return text if text.isprintable() else ascii(text)
