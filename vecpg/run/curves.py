"""The curves of a run as TensorBoard reads them: event files, one for each time that it went on."""

import os
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

_PREFIX = "events.out.tfevents."
# Bytes before a record, its length and that one's checksum, and behind it, its checksum.
_HEAD, _TAIL = 12, 4


class Curves:
    """Writes points to an event file, each of them at once.

    Torch's and TensorBoard's own writers write in a thread, whose errors are a traceback there, and
    another at the end.

    Args:
        run_dir: where the file will lie, behind those that are there.
        after: TensorBoard drops the points of earlier files that lie beyond so many steps. None =
            there are none.

    Raises:
        ImportError: TensorBoard is not installed, or cannot be used.
        OSError: the file cannot be written.
    """

    def __init__(self, run_dir: Path, after: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._file = open(run_dir / _next_name(run_dir), "xb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        if after is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(session_log=start, step=after + 1))

    def describe(self, settings: dict[str, Any]) -> None:
        """The settings of the run, for the page that compares runs, and as a table of text."""
        from torch.utils.tensorboard.summary import hparams, text

        # SummaryWriter.add_hparams would start a second run in a subdirectory.
        for summary in hparams(settings, {"charts/episodic_return": 0.0}):
            self._summary(summary, 0)
        table = "".join(f"|{name}|{value}|\n" for name, value in settings.items())
        self._summary(text("hyperparameters", "|setting|value|\n|-|-|\n" + table), 0)

    def draw(self, points: dict[str, float], env_steps: int) -> None:
        """One point of each of these curves."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in points.items()]
        self._summary(Summary(value=values), env_steps)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def _summary(self, summary: Any, env_steps: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._write(Event(summary=summary, step=env_steps))

    def _write(self, event: "Event") -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._file.flush()


def cut(run_dir: Path, env_steps: int) -> int:
    """Remove from the event files what came after the iteration that ended at so many steps.

    Returns:
        the steps of the last iteration that they have, or 0 if they have none.
    """
    last = 0
    over = False
    for path in _event_files(run_dir):
        if over:
            path.unlink()
            continue
        end = 0
        for event_end, event in _events(path):
            steps = event.step if _is_iteration(event) else last
            over = steps > env_steps or (steps == last == env_steps > 0)
            if over:
                break
            last, end = steps, event_end
        if end == 0:
            path.unlink()
        else:  # a record that was not finished would hide what is behind it
            os.truncate(path, end)
    return last


def _is_iteration(event: "Event") -> bool:
    """Whether these are the points of an iteration, and not of an evaluation, or settings."""
    return any(value.tag == "charts/episodic_return" for value in event.summary.value)


def _events(path: Path) -> Iterator[tuple[int, "Event"]]:
    """Each whole event of a file, and where it ends. Checksums would take most of the time.

    It ends before what is cut off, or was never written, as after a loss of power.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    data, start = path.read_bytes(), 0
    while start + _HEAD <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + _HEAD + length + _TAIL
        if end > len(data):
            return
        try:
            event = Event.FromString(data[start + _HEAD : end - _TAIL])
        except DecodeError:
            return
        if not event.wall_time:
            return
        yield end, event
        start = end


def _event_files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob(f"{_PREFIX}*"))


def _next_name(run_dir: Path) -> str:
    """Behind the others: TensorBoard reads them in the order of their names."""
    known = _event_files(run_dir)
    seconds = [re.match(r"\d{10}", path.name.removeprefix(_PREFIX)) for path in known]
    newest = max((int(found[0]) for found in seconds if found), default=0)
    return f"{_PREFIX}{max(int(time.time()), newest):010d}.{len(known):06d}"
