"""Where the numbers of an iteration go: metrics.jsonl and TensorBoard."""

import contextlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from vecpg.kernels.announce import whose
from vecpg.run import curves
from vecpg.run.curves import Curves
from vecpg.run.directory import writing

if TYPE_CHECKING:
    from vecpg.run.state import Counters

_log = logging.getLogger(__name__)

_LINES = "metrics.jsonl"
# Not drawn as curves: they identify the row.
_COUNTERS = ("iteration", "env_steps", "episodes")


class Metrics:
    """Writes one line and one point per tag for each iteration.

    What TensorBoard cannot do is a warning, once, and no more points: the lines have everything.

    Args:
        run_dir: where metrics.jsonl and the event files lie.
        settings: of the run, which TensorBoard shows.
        goes_on: how far the run is that goes on; later lines and points are cut. None = it begins.

    Raises:
        WriteFailure: metrics.jsonl cannot be written.
        ValueError: it does not have the iterations after which the run goes on.
    """

    def __init__(
        self, run_dir: Path, settings: dict[str, Any], goes_on: "Counters | None" = None
    ) -> None:
        self._path = run_dir / _LINES
        end = 0 if goes_on is None else end_of(run_dir, goes_on.iteration)
        with writing(self._path):
            self._lines = open(self._path, "ab", buffering=0)  # noqa: SIM115
            self._lines.truncate(end)
        self._end = end
        lost = goes_on is not None and not any(run_dir.glob("events.out.tfevents.*"))
        self._curves: Curves | None = None
        with self._drawing():
            drawn = 0 if goes_on is None else curves.cut(run_dir, goes_on.env_steps)
            self._curves = Curves(run_dir, after=None if goes_on is None else drawn)
            if goes_on is None or lost:
                self._curves.describe(
                    {
                        name: value if isinstance(value, int | float | str) else json.dumps(value)
                        for name, value in settings.items()
                    }
                )
            if goes_on is not None and drawn < goes_on.env_steps:  # not all reached the disk
                for _, row in _rows(run_dir, goes_on.iteration):
                    if row["env_steps"] > drawn:
                        self._draw(row)

    def close(self) -> None:
        """Finish both files."""
        with self._drawing():
            if self._curves is not None:
                self._curves.close()
        with writing(self._path):
            self._lines.close()

    def flush(self) -> None:
        """When this returns, the lines are on the disk."""
        with writing(self._path):
            os.fsync(self._lines.fileno())

    def log(self, row: dict[str, float | None]) -> None:
        """Write one iteration: `iteration`, `env_steps`, `episodes`, and the tags.

        None is null in metrics.jsonl and no point in TensorBoard.

        Raises:
            WriteFailure: metrics.jsonl cannot be written.
        """
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with writing(self._path):
            try:
                written = self._lines.write(line)
                if written != len(line):  # there was room for a part: the next one says why
                    self._lines.write(line[written:])
            except OSError:
                # What was committed can still be saved, with the lines that lead to it.
                with contextlib.suppress(OSError):
                    self._lines.truncate(self._end)
                raise
        self._end += len(line)
        self._draw(row)

    def draw(self, points: dict[str, float], env_steps: int) -> None:
        """One point of each of these TensorBoard curves."""
        with self._drawing():
            if self._curves is not None:
                self._curves.draw(points, env_steps)

    def _draw(self, row: dict[str, Any]) -> None:
        points = {
            tag: value for tag, value in row.items() if tag not in _COUNTERS and value is not None
        }
        self.draw(points, row["env_steps"])

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        try:
            yield
        except (ImportError, OSError) as error:
            if self._curves is not None:
                with contextlib.suppress(OSError):  # what it could not write it writes once more
                    self._curves.close()
            self._curves = None
            _log.warning(
                "%sno more curves for TensorBoard: %s: %s; metrics.jsonl has them, and `vecpg plot`"
                " draws them",
                whose(),
                type(error).__name__,
                error,
            )


def end_of(run_dir: Path, iterations: int) -> int:
    """The bytes of metrics.jsonl that the first so many iterations take.

    Raises:
        ValueError: it does not have them.
    """
    end, found = 0, 0
    for found, (end, _) in enumerate(_rows(run_dir, iterations), start=1):  # noqa: B007
        pass
    if found < iterations:
        raise ValueError(
            f"{run_dir / _LINES}: expected iterations 1 to {iterations}, which lead to the"
            f" checkpoint, got 1 to {found}; restore the file, or go on from an earlier checkpoint"
        )
    return end


def _rows(run_dir: Path, iterations: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The first lines, one for each iteration, and where each ends. A torn one is none."""
    path, end, steps = run_dir / _LINES, 0, 0
    if not path.is_file():
        return
    with open(path, "rb") as lines:
        for iteration, line in enumerate(itertools.islice(lines, iterations), start=1):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                return
            if not _is_row(row, iteration, steps):
                return
            end, steps = end + len(line), row["env_steps"]
            yield end, row


def _is_row(row: Any, iteration: int, steps_before: int) -> TypeGuard[dict[str, Any]]:
    """Whether this is the line of an iteration, with which it can be drawn again."""
    if not isinstance(row, dict) or row.get("iteration") != iteration:
        return False
    steps = row.get("env_steps")
    numbers = (int, float, type(None))
    plain = all(
        type(value) in numbers and abs(value or 0) <= sys.float_info.max for value in row.values()
    )
    return plain and type(steps) is int and steps_before < steps < 2**63
