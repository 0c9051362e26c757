"""Checkpoints: written so that a crash leaves the old one whole, verified when loaded."""

import hashlib
import io
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vecpg.policy import Policy
from vecpg.run.content import policy_of, unpickle

if TYPE_CHECKING:
    from vecpg.run.state import TrainState

FORMAT = 3
_KIND = "vecpg checkpoint"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain types, nested) to `path`, whole or not at all.

    The file is on the disk before it takes the place of the old one.

    Raises:
        OSError: the disk is full, or the directory cannot be written; the old file is untouched.
    """
    digest = _digest([FORMAT, state])
    content = {"kind": _KIND, "format": FORMAT, "state": state, "sha256": digest}
    data = io.BytesIO()
    torch.save(content, data)
    write_atomically(path, data.getvalue())


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file at `path` by one with this content, or leave it as it is."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote, verified.

    Nothing in the file is executed (`weights_only=True`).

    Raises:
        ValueError: there is no such file, it is not a checkpoint, it is damaged, or a newer vecpg
            wrote it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    content = unpickle(data, path)
    if content.get("kind") != _KIND:
        raise ValueError(f"{path} is not a vecpg checkpoint")
    number = content.get("format")
    if isinstance(number, int) and number > FORMAT:
        raise ValueError(
            f"{path} has format {number}, and this vecpg reads up to {FORMAT}; use a newer vecpg"
        )
    if number != FORMAT:
        raise ValueError(
            f"{path} has format {number}, and this vecpg reads {FORMAT}; use the older vecpg that"
            " wrote it"
        )
    state: dict[str, Any] = content.get("state", {})
    if _digest([number, state]) != content.get("sha256"):
        raise ValueError(f"{path} is damaged: its content does not match its digest")
    return state


def find(run_or_checkpoint: str | Path) -> Path:
    """The checkpoint a path stands for: a run directory means its `best`.

    Raises:
        ValueError: the path is neither.
    """
    given = Path(run_or_checkpoint)
    path = given / "checkpoints" / "best.pt" if given.is_dir() else given
    if not path.is_file():
        got = "neither" if given.exists() else "nothing of that name"
        raise ValueError(
            f"{given}: expected a run directory or a checkpoint, such as"
            f" runs/CartPole-v1__reinforce__1__1795600430, got {got}"
        )
    return path


def load_policy(run_or_checkpoint: str | Path, device: torch.device | str = "cpu") -> Policy:
    """The trained policy of a run directory (its best) or of one checkpoint.

    Args:
        run_or_checkpoint: such as `runs/CartPole-v1__reinforce__1__1795310000`.
        device: where the policy should be.

    Raises:
        ValueError: no checkpoint there, or a damaged one.
    """
    path = find(run_or_checkpoint)
    return policy_of(load(path), path, device)


def policy_state(policy: Policy) -> dict[str, Any]:
    """What a checkpoint keeps of a policy: how to build it, and its parameters."""
    return {"description": policy.description(), "parameters": dict(policy.state_dict())}


class Saver:
    """Writes a run's `last`, which holds the whole state, and its `best`, which follows from it.

    Until the return window is full, the newest policy is the best.

    Args:
        run_dir: with its folder `checkpoints`.
        about: what does not change during the run, and is kept in both; plain types.
        every: seconds between two times that `save_if_due` saves.
    """

    def __init__(self, run_dir: Path, about: dict[str, Any], every: float) -> None:
        self._directory = run_dir / "checkpoints"
        self._about, self._every = about, every
        self._saved = time.perf_counter()

    def save(self, state: "TrainState") -> None:
        """Write both.

        Raises:
            OSError: as the function `save`.
        """
        content = state.state_dict()
        policy, best = content["policy"], content["stopping"]["best_parameters"]
        best_policy = policy if best is None else policy | {"parameters": best}
        save(self._directory / "last.pt", self._about | content)
        save(self._directory / "best.pt", self._about | {"policy": best_policy})
        self._saved = time.perf_counter()

    def save_if_due(self, state: "TrainState") -> None:
        """Write both, if it was long ago."""
        if time.perf_counter() - self._saved >= self._every:
            self.save(state)


def _digest(state: Any) -> str:
    digest = hashlib.sha256()
    _feed(digest, state)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} items".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(json.dumps(value).encode())
