"""The directory of a run: its name, the machine, who trains in it, how its files are written."""

import contextlib
import errno
import fcntl
import io
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vecpg.config import Config
from vecpg.machine import system
from vecpg.run.resume import name_of

# No name of a file or a folder that is looked for begins like this.
TEMPORARY = ".tmp-"


class WriteFailure(OSError):
    """A file of a run could not be written. The message has the file, the reason and the mount."""


def make_run_directory(config: Config) -> Path:
    """A new directory under `config.out_dir` with system.json and checkpoints/.

    Raises:
        OSError: it cannot be made.
    """
    run_dir = make_directory(config.out_dir, name_of(config))
    try:
        with writing(run_dir):
            (run_dir / "checkpoints").mkdir()
            # A checkpoint on the disk is lost all the same if its directory's name is not.
            sync_directory(run_dir.parent)
        write_json(run_dir / "system.json", system())
    except BaseException:
        discard(run_dir)
        raise
    return run_dir


def make_directory(out_dir: str, name: str) -> Path:
    """A new directory whose name goes on with the time, and is no other's.

    Raises:
        OSError: it cannot be made.
    """
    # Wherever an environment goes meanwhile.
    parent = Path(out_dir).absolute()
    named = f"{name}__{int(time.time())}"
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in itertools.count():
            path = parent / (f"{named}-{attempt}" if attempt else named)
            try:
                path.mkdir()
                break
            except FileExistsError:
                continue
    return path


class Lock(io.TextIOWrapper):
    """A file that holds a directory until it is closed, or the process ends."""

    def close(self) -> None:
        """Let the directory go, also where a forked child has a copy of this."""
        if not self.closed:
            with contextlib.suppress(OSError):  # there may be no locks here
                fcntl.flock(self, fcntl.LOCK_UN)
        super().close()


def hold(run_dir: Path) -> Lock:
    """Keep every other process, and thread, from training in this directory.

    Returns:
        a file. Until it is closed, or this process and its forked children end, the directory is
        held.

    Raises:
        ValueError: another one holds it.
        OSError: this file system has no locks, or the directory cannot be written.

    Example:
        >>> import tempfile
        >>> run_dir = Path(tempfile.mkdtemp())
        >>> with hold(run_dir):
        ...     hold(run_dir)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: ...: expected a run that nobody trains, got one that process ... trains; ...
    """
    path = run_dir / ".lock"
    with writing(path):
        # Not emptied: until the lock is there, what is written in it is the other's.
        file = Lock(open(path, "a+b"), encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "of unknown number"
        file.close()
        raise ValueError(
            f"{run_dir}: expected a run that nobody trains, got one that process {holder} trains;"
            " end that one, or wait for its end"
        ) from None
    except OSError as error:
        file.close()
        raise WriteFailure(
            f"{path} cannot be locked: {error.strerror}; give an --out-dir on a file system that"
            " has locks"
        ) from error
    try:
        with writing(path):
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        raise
    return file


def sweep(run_dir: Path) -> None:
    """Remove what saving leaves behind when it is killed. Only for who holds the directory."""
    for folder in (run_dir, run_dir / "checkpoints"):
        for path in folder.glob(f"{TEMPORARY}*"):
            discard(path)


def discard(path: Path) -> None:
    """Remove a file or a folder, if it can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """One JSON object, indented; written whole or not at all.

    Raises:
        WriteFailure: it could not be written, and what was there is as it was.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with writing(path):
        try:
            write_file(temporary, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
            os.replace(temporary, path)
            sync_directory(path.parent)
        except BaseException:
            discard(temporary)
            raise


def write_file(path: Path, data: bytes) -> None:
    """Write a new file. When this returns, its content is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """When this returns, the names in a directory are on the disk."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of an error inside which file could not be written, and how full the disk is."""
    try:
        yield
    except WriteFailure:
        raise
    except OSError as error:
        hint = {
            errno.ENOSPC: "; make some room",
            errno.EDQUOT: "; make some room",
            errno.EFBIG: "; raise the limit on the size of a file (ulimit -f)",
        }.get(error.errno or 0, "")
        reason = error.strerror or str(error)
        raise WriteFailure(f"{path} cannot be written: {reason}{_mount(path)}{hint}") from error


def _mount(path: Path) -> str:
    """The mount that a path lies on, and what is free there, in words."""
    place = path.absolute()
    try:
        while not place.exists() or not place.is_mount():
            place = place.parent
        free = shutil.disk_usage(place).free
    except OSError:
        return ""
    return f" ({free / 2**20:,.0f} MB free on {place})"
