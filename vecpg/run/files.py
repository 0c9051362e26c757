"""The files of a run that is trained: new ones, or those of a run that goes on."""

import dataclasses
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv

from vecpg.config import Config, to_dict
from vecpg.kernels.announce import whose
from vecpg.policy.spaces import fingerprint
from vecpg.run import checkpoint
from vecpg.run.checkpoint import STATE, Checkpoint, Saver
from vecpg.run.directory import Lock, discard, hold, make_run_directory, sweep, write_json
from vecpg.run.metrics import Metrics, end_of
from vecpg.run.resume import check_settings, differences, find_run, read_config, shown
from vecpg.run.state import TrainState
from vecpg.run.stored import config_of

_log = logging.getLogger(__name__)


class Files(NamedTuple):
    """What a run writes to. Closing `lock` lets others train in the directory."""

    run_dir: Path
    metrics: "Metrics | Elsewhere"
    saver: "Saver | Elsewhere"
    lock: "Lock | Elsewhere"


class Source(NamedTuple):
    """What a run goes on from, held: nobody else trains in the directory until `lock` is closed."""

    run_dir: Path
    checkpoint: Checkpoint
    lock: Lock


def find_source(config: Config) -> Source | None:
    """What `config.resume` says to go on from; None where a new run starts.

    Raises:
        ValueError: no run there, no right checkpoint, somebody else trains in it, or settings that
            differ.
    """
    run_dir = find_run(config)
    if run_dir is None:
        if config.resume == "auto":
            _log.info(
                "--resume auto: no unfinished run of %s, %s, seed %d in %s; a new one starts",
                config.env_id,
                config.exp_name,
                config.seed,
                config.out_dir,
            )
        return None
    run_dir = run_dir.absolute()
    check_links(run_dir)
    lock = hold(run_dir)
    try:
        sweep(run_dir)
        found, _ = agreed(config, run_dir)
    except BaseException:
        lock.close()
        raise
    return Source(run_dir, found, lock)


def agreed(config: Config, run_dir: Path) -> tuple[Checkpoint, Config]:
    """The checkpoint that a run goes on from, and the settings that it was written with.

    Raises:
        ValueError: no right checkpoint, or settings that differ from those of the run.
    """
    check_settings(config, read_config(run_dir))
    if config.resume == "auto":
        found = checkpoint.newest_valid(run_dir)
    else:
        found = checkpoint.chosen(config.resume, run_dir)
    # Whoever changed config.json by hand changed what the run is.
    stored = config_of(found.manifest["config"], found.folder)
    check_settings(config, stored)
    return found, stored


def check_links(run_dir: Path) -> None:
    """Refuse a run directory with links in it: a run goes on in its own directory only.

    Raises:
        ValueError: with the first one.
    """
    for path in (*run_dir.iterdir(), *(run_dir / "checkpoints").glob("*")):
        if path.is_symlink():
            raise ValueError(
                f"{path}: expected a file or a folder, got a link; put the file itself there"
            )


def begin(config: Config, about: dict[str, Any], state: TrainState) -> Files:
    """A new run directory, with a checkpoint of the state before the first iteration."""
    run_dir = make_run_directory(config)
    with ExitStack() as unless_all_is_well:
        unless_all_is_well.callback(discard, run_dir)
        lock = unless_all_is_well.enter_context(hold(run_dir))
        metrics = Metrics(run_dir, about["config"])
        unless_all_is_well.callback(metrics.close)
        saver = Saver(run_dir, about, config.save_every, metrics)
        saver.save(state)
        # Last: a directory with a config.json has a checkpoint to go on from.
        write_json(run_dir / "config.json", about["config"])
        unless_all_is_well.pop_all()
    return Files(run_dir, metrics, saver, lock)


def go_on(config: Config, about: dict[str, Any], state: TrainState, source: Source) -> Files:
    """The files of a run as they were at a checkpoint, and its state.

    Everything is checked before anything is changed. What came after the checkpoint is removed.

    Raises:
        ValueError: other spaces, another environment, or a state that does not fit; or lines of
            metrics.jsonl are missing.
    """
    run_dir, manifest = source.run_dir, source.checkpoint.manifest
    _check_environment(manifest["environment"], about["environment"])
    try:
        state.load_state_dict(source.checkpoint.read(STATE))
    except ValueError as error:
        raise ValueError(f"{source.checkpoint.folder}: {error}") from None
    end_of(run_dir, state.counters.iteration)
    if manifest["resolved"]["target"] != about["resolved"]["target"]:
        state.stopping.forget_solved()
    had, has = _bits_depend_on(manifest), _bits_depend_on(about)
    if changed := differences(had, has):
        _log.warning(
            "%s%s: from here on not bit for bit what it would have been without a stop",
            whose(),
            ", ".join(changed),
        )
    # From here a crash leaves a run that is not finished, and goes on from the same checkpoint.
    (run_dir / "summary.json").unlink(missing_ok=True)
    for folder in checkpoint.folders(run_dir):
        if int(folder.name) > state.counters.iteration:
            checkpoint.remove(folder)
    write_json(run_dir / "config.json", about["config"])
    metrics = Metrics(run_dir, about["config"], goes_on=state.counters)
    saver = Saver(run_dir, about, config.save_every, metrics, state.counters.iteration)
    # Where there are many, one line says how far all of them are.
    level = logging.DEBUG if whose() else logging.INFO
    _log.log(level, "%sgoing on after iteration %d", whose(), state.counters.iteration)
    return Files(run_dir, metrics, saver, source.lock)


class Elsewhere:
    """What `metrics`, `saver` and `lock` are of a run whose files another rank writes."""

    def __init__(self, run_dir: Path, iteration: int) -> None:
        self._run_dir = run_dir
        self.iteration = iteration

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def log(self, row: dict[str, float | None]) -> None:
        """As `Metrics.log`."""
        self.iteration = int(row["iteration"] or 0)

    def draw(self, points: dict[str, float], env_steps: int) -> None:
        """As `Metrics.draw`."""

    def save(self, state: TrainState) -> Path:
        """As `Saver.save`."""
        return self._run_dir

    def save_again(self) -> None:
        """As `Saver.save_again`."""

    def is_due(self) -> bool:
        """As `Saver.is_due`."""
        return False

    def save_if_due(self, state: TrainState) -> None:
        """As `Saver.save_if_due`."""

    def close(self) -> None:
        """As `Metrics.close`, and `Lock.close`."""


def elsewhere(run_dir: Path, iteration: int) -> Files:
    """The files of a run, after this iteration, that another rank writes."""
    nothing = Elsewhere(run_dir, iteration)
    return Files(run_dir, nothing, nothing, nothing)


def _bits_depend_on(about: dict[str, Any]) -> dict[str, Any]:
    """The build and the device; not the number of cores, nor a GPU that is not used."""
    device, machine = about["resolved"]["device"], about["machine"]
    names = ("platform", "cpu") if device == "cpu" else ("platform", "cpu", "gpu")
    hardware = {name: machine.get(name) for name in names}
    return {**about["versions"], **hardware, "device": device.partition(":")[0]}


def environment(spec: EnvSpec, envs: VectorEnv[Any, Any, Any]) -> dict[str, Any]:
    """What an environment is, in words: how it is registered, and its spaces.

    Example:
        >>> import gymnasium
        >>> envs = gymnasium.make_vec("CartPole-v1", num_envs=1)
        >>> about = environment(gymnasium.spec("CartPole-v1"), envs)
        >>> about["id"], about["action_space"], about["kwargs"]
        ('CartPole-v1', 'Discrete(2)', {})
    """
    observations, actions = envs.single_observation_space, envs.single_action_space
    return {
        "id": spec.id,
        "entry_point": _words(spec.entry_point),
        "vector_entry_point": _words(spec.vector_entry_point),
        "kwargs": {name: _words(value) for name, value in spec.kwargs.items()},
        "wrappers": [wrapper.name for wrapper in spec.additional_wrappers],
        "max_episode_steps": spec.max_episode_steps,
        "observation_space": str(observations),
        "action_space": str(actions),
        "spaces": fingerprint(observations, actions),
    }


def settings(config: Config) -> dict[str, Any]:
    """What is kept of a configuration: all that is not about this one start of the run."""
    return to_dict(dataclasses.replace(config, resume=None))


def _check_environment(had: dict[str, Any], has: dict[str, Any]) -> None:
    for name, value in has.items():
        if had.get(name) != value:
            raise ValueError(
                f"{has['id']}: expected the {name} that the run was begun with,"
                f" {shown(had.get(name))}, got {shown(value)}; register the environment as it was,"
                " or start a new run"
            )


def _words(value: Any) -> str:
    """The same in every process: without addresses."""
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_words, value)))}}}"
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}:{named.__qualname__}"
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text
