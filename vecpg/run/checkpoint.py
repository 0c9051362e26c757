"""Checkpoints: a folder that is there as a whole or not at all, verified when it is loaded.

`checkpoints/<iteration>/` of a run holds

    state.pt        all that a run needs to go on (`TrainState.state_dict`)
    best.pt         the best policy so far
    manifest.json   what the run is, how far it is, and the SHA-256 of every file, itself included
"""

import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
import logging
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vecpg.config import ConfigError
from vecpg.kernels.announce import once
from vecpg.policy import Policy
from vecpg.run.content import policy_of, unpickle
from vecpg.run.directory import TEMPORARY, discard, sync_directory, write_file, writing
from vecpg.run.resume import LONGEST_NAME
from vecpg.run.stored import config_of, read_bytes, read_object

if TYPE_CHECKING:
    from vecpg.run.metrics import Metrics
    from vecpg.run.state import TrainState

FORMAT = 5
# So many of a run are kept, the newest.
KEPT = 3
MANIFEST, STATE, BEST = "manifest.json", "state.pt", "best.pt"
_KIND = "vecpg checkpoint"
_LONGEST_MANIFEST = 2**20

_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded. The message has the file and the reason."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose manifest was found right. Its other files are verified when read.

    folder:   its path.
    manifest: what stands in manifest.json; plain JSON types.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def iteration(self) -> int:
        """After which iteration of the run it was written."""
        iteration: int = self.manifest["counters"]["iteration"]
        return iteration

    def read(self, name: str) -> dict[str, Any]:
        """The content of one file. Nothing in it is executed.

        Raises:
            CheckpointError: it is missing, cut, damaged or something else.
        """
        path = self.folder / name
        expected = self.manifest["files"][name]
        try:
            data = read_bytes(path, expected["bytes"])
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        if len(data) < expected["bytes"]:
            raise CheckpointError(
                f"{path}: truncated (expected {expected['bytes']} bytes, found {len(data)})"
            )
        if _sha256(data) != expected["sha256"]:
            raise CheckpointError(f"{path}: damaged: its content does not match its digest")
        try:
            return unpickle(data, path)
        except ValueError as error:
            raise CheckpointError(str(error)) from None


def save(folder: Path, about: dict[str, Any], contents: dict[str, Any]) -> None:
    """Write a checkpoint: on the disk as a whole when this returns, else not there at all.

    Every file is on the disk before the folder gets its name, and that before this returns.

    Args:
        folder: where it will be; there must be nothing yet.
        about: for the manifest; plain JSON types.
        contents: of each file; tensors and plain types, nested.

    Raises:
        WriteFailure: the disk is full, or the directory cannot be written.
    """
    temporary = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    with writing(folder):
        try:
            temporary.mkdir()
            files = {}
            for name, content in contents.items():
                data = io.BytesIO()
                torch.save(content, data)
                write_file(temporary / name, data.getvalue())
                files[name] = {"bytes": len(data.getvalue()), "sha256": _sha256(data.getvalue())}
            manifest = {"kind": _KIND, "format": FORMAT, **about, "files": files}
            manifest["sha256"] = _digest(manifest)
            text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
            write_file(temporary / MANIFEST, text.encode())
            sync_directory(temporary)
            os.replace(temporary, folder)
            sync_directory(folder.parent)
        except BaseException:
            discard(temporary)
            raise


def opened(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, its manifest verified.

    Raises:
        CheckpointError: there is none, it is damaged, or another version of vecpg wrote it.
    """
    path = folder / MANIFEST
    if (folder / "last.pt").exists():
        raise CheckpointError(
            f"{folder}: expected format {FORMAT}, got that of vecpg 0.1; use the vecpg that wrote"
            " it"
        )
    if folder.is_dir() and not path.exists():
        raise CheckpointError(f"{folder}: expected a checkpoint, got a folder without {MANIFEST}")
    try:
        manifest = read_object(read_bytes(path, _LONGEST_MANIFEST), path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if manifest.get("kind") != _KIND:
        raise CheckpointError(f"{path} is not of a vecpg checkpoint")
    number = manifest.get("format")
    if number != FORMAT:
        newer = isinstance(number, int) and number > FORMAT
        written_by = manifest.get("versions")
        version = written_by.get("vecpg") if isinstance(written_by, dict) else None
        remedy = (
            f"use a newer vecpg, {version} wrote it" if newer else "use the vecpg that wrote it"
        )
        raise CheckpointError(f"{path}: expected format {FORMAT}, got {str(number)[:20]}; {remedy}")
    claimed = manifest.pop("sha256", None)
    if _digest(manifest) != claimed:
        raise CheckpointError(f"{path}: damaged: its content does not match its digest")
    _check(manifest, path)
    return Checkpoint(folder, manifest)


def _check(manifest: dict[str, Any], path: Path) -> None:
    """A right digest says that nothing was damaged, not that a run of vecpg wrote this."""
    each_file = {"bytes": int, "sha256": str}
    expected = {
        "config": dict,
        "files": dict,
        "counters": dict,
        "solved": bool,
        "resolved": dict,
        "machine": dict,
        "environment": dict,
        "versions": dict,
    }
    inside: dict[str, dict[str, Any]] = {
        "files": {STATE: dict, BEST: dict},
        "counters": dict.fromkeys(("iteration", "env_steps", "vector_steps", "episodes"), int),
        "resolved": {
            "vectorization": str,
            "device": str,
            "shards": int,
            "target": int | float | None,
        },
    }
    wrong = _mismatch(manifest, {"kind": str, "format": int, **expected})
    for name, kinds in inside.items():
        wrong = wrong or _mismatch(manifest[name], kinds, f"{name}.")
    for name in (STATE, BEST):
        wrong = wrong or _mismatch(manifest["files"][name], each_file, f"files.{name}.")
    if wrong is None:
        resolved = {name: manifest["resolved"][name] for name in ("vectorization", "device")}
        try:
            config = config_of(manifest["config"], "config")
            dataclasses.replace(config, **resolved)
        except ConfigError as error:
            wrong = str(error)[:300]
    if wrong is not None:
        raise CheckpointError(f"{path}: {wrong}; this vecpg did not write it")


def _mismatch(value: dict[str, Any], expected: dict[str, Any], where: str = "") -> str | None:
    """The first entry that is missing, of another type, or not known."""
    for name, kind in expected.items():
        if name not in value:
            return f"{where}{name} is missing"
        given = value[name]
        if not isinstance(given, kind) or isinstance(given, bool) != (kind is bool):
            wanted = getattr(kind, "__name__", str(kind))
            return f"{where}{name}: expected {wanted}, got {type(given).__name__}"
    others = [name for name in value if name not in expected]
    return f"{where}{ascii(others[0])[:80]} is not known" if others else None


def folders(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, the newest first, whether they are good or not."""
    directory = run_dir / "checkpoints"
    names = [name for name in _names(directory) if re.fullmatch("0|[1-9][0-9]{0,18}", name)]
    numbers = sorted(map(int, names), reverse=True)
    return [directory / str(number) for number in numbers]


def newest_valid(run_dir: Path) -> Checkpoint:
    """The newest checkpoint of a run all of whose files are right; the log names what is skipped.

    Raises:
        CheckpointError: there is none.
    """
    reasons = []
    for folder in folders(run_dir):
        try:
            checkpoint = _verified(folder)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            _log.warning("skipped: %s", reason)
        return checkpoint
    found = "; ".join(reasons) or "none at all"
    raise CheckpointError(f"{run_dir}: expected a checkpoint to go on from, found {found}")


def chosen(path: str | Path | None, run_dir: Path) -> Checkpoint:
    """The checkpoint that a run goes on from: that of the path, or the newest of the run.

    Raises:
        CheckpointError: it is damaged; the message says what else there is.
    """
    given = Path(path or run_dir)
    # A run may itself lie in a folder of that name.
    of_run = (run_dir / "checkpoints").resolve()
    named = [each for each in (given, given.parent) if each.resolve().parent == of_run]
    known = named or folders(run_dir)
    if not known:
        raise CheckpointError(f"{run_dir}: expected a checkpoint to go on from, found none at all")
    folder = known[0]
    try:
        return _verified(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{others(folder)}") from None


def _verified(folder: Path) -> Checkpoint:
    """A checkpoint that a run can go on from: all of its files are right, and belong together."""
    checkpoint = opened(folder)
    state, _ = checkpoint.read(STATE), checkpoint.read(BEST)
    if state.get("counters") != checkpoint.manifest["counters"]:
        raise CheckpointError(f"{folder}: its {STATE} and its {MANIFEST} are of different moments")
    if folder.resolve().name != str(checkpoint.iteration):
        raise CheckpointError(
            f"{folder}: expected the name {checkpoint.iteration}, after the iteration that it was"
            " written at; rename it"
        )
    return checkpoint


def load(run_or_checkpoint: str | Path) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint that a path stands for, and the content of one of its files.

    A run directory means the best policy of its newest checkpoint; `checkpoints/12` of a run all
    that was saved after iteration 12; `checkpoints/12/best.pt` that file.

    Raises:
        CheckpointError: the path is neither, or the checkpoint is damaged; the message says what
            else there is.
    """
    path = Path(run_or_checkpoint)
    folder, name = path, STATE
    if len(path.name) > LONGEST_NAME:
        raise CheckpointError(f"{ascii(path.name)[:80]}...: expected the name of a run")
    if path.name in (STATE, BEST) and path.is_file():
        folder, name = path.parent, path.name
    elif (path / "checkpoints").is_dir():
        folder, name = next(iter(folders(path)), path / "checkpoints"), BEST
    elif not path.is_dir():
        got = "another file" if path.exists() else "nothing of that name"
        near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise CheckpointError(
            f"{path}: expected a run directory or a checkpoint in one, such as"
            f" runs/CartPole-v1__reinforce__1__1795600430, got {got}{hint}"
        )
    try:
        checkpoint = opened(folder)
        return checkpoint, checkpoint.read(name)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{others(folder)}") from None


def others(folder: Path) -> str:
    """The right checkpoints beside one that is not, in words to go on with."""
    good = []
    for other in folders(folder.parent.parent):
        with contextlib.suppress(CheckpointError):
            if other != folder:
                good.append(opened(other).folder)
    return f"; {', '.join(map(str, good))} can be loaded" if good else ""


def load_policy(
    run_or_checkpoint: str | Path,
    device: torch.device | str = "cpu",
    *,
    network: str | None = None,
) -> Policy:
    """The trained policy of a run directory (its best) or of one checkpoint.

    Args:
        run_or_checkpoint: such as `runs/CartPole-v1__reinforce__1__1795310000`.
        device: where the policy should be.
        network: that of `--network`, where it is "module:function": what a file names is imported
            only if it is named here too.

    Raises:
        CheckpointError: a `ValueError`: no checkpoint there, or a damaged one.
        ValueError: the policy has another network, which is to be named.
    """
    checkpoint, content = load(run_or_checkpoint)
    return policy_of(content, checkpoint.folder, device, network)


def policy_state(policy: Policy) -> dict[str, Any]:
    """What a checkpoint keeps of a policy: how to build it, and its parameters."""
    return {"description": policy.description(), "parameters": dict(policy.state_dict())}


class Saver:
    """Writes the checkpoints of a run, and keeps the newest.

    `best.pt` follows from the state that it is written with: until the return window is full, the
    newest policy is the best.

    Args:
        run_dir: with its folder `checkpoints`.
        about: what does not change during the run; plain JSON types.
        every: seconds between two times that `save_if_due` saves.
        metrics: whose rows are on the disk before the state that they lead to.
        iteration: of the checkpoint that the run goes on from, if it does. Then, and later, that of
            the newest checkpoint.
    """

    def __init__(
        self,
        run_dir: Path,
        about: dict[str, Any],
        every: float,
        metrics: "Metrics",
        iteration: int | None = None,
    ) -> None:
        self._directory = run_dir / "checkpoints"
        self._about, self._every, self._metrics = about, every, metrics
        self.iteration = iteration
        self._saved = time.perf_counter()

    def save(self, state: "TrainState") -> Path:
        """Write a checkpoint, unless the newest is of this iteration. Returns its folder.

        Raises:
            WriteFailure: it could not be written. Older ones are as they were.
        """
        content = state.state_dict()
        policy, best = content["policy"], state.stopping.best
        best_policy = policy if best is None else policy | {"parameters": best}
        counters = content["counters"]
        folder = self._directory / str(counters["iteration"])
        if counters["iteration"] != self.iteration:
            self._metrics.flush()
            about = self._about | {"counters": counters, "solved": state.stopping.solved}
            try:
                save(folder, about, {STATE: content, BEST: {"policy": best_policy}})
            finally:
                if folder.exists():  # although its name may not be on the disk
                    self.iteration = counters["iteration"]
            self._prune()
        self._saved = time.perf_counter()
        return folder

    def save_again(self) -> None:
        """Have a save be due: what the last one wrote is older than what was asked for."""
        self._saved = -math.inf

    def is_due(self) -> bool:
        """Whether the last time was long ago."""
        return time.perf_counter() - self._saved >= self._every

    def save_if_due(self, state: "TrainState") -> None:
        """Write a checkpoint, if the last time was long ago."""
        if self.is_due():
            self.save(state)

    def _prune(self) -> None:
        for folder in folders(self._directory.parent)[KEPT:]:
            try:
                remove(folder)
            except OSError as error:
                once(_log, f"{folder} cannot be removed: {error.strerror}", logging.WARNING)


def remove(folder: Path) -> None:
    """Remove a checkpoint: gone as a whole, or as it was."""
    doomed = folder.with_name(f"{TEMPORARY}{os.getpid()}-old-{folder.name}")
    os.replace(folder, doomed)
    discard(doomed)


def _names(directory: Path) -> list[str]:
    return os.listdir(directory) if directory.is_dir() else []


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    """Of what a manifest says; not of how it is laid out."""
    return _sha256(json.dumps(manifest, sort_keys=True).encode())
