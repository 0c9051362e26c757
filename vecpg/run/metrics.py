"""Where the numbers of an iteration go: metrics.jsonl and TensorBoard."""

import contextlib
import json
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import hparams, text

# Not drawn as curves: they identify the row.
_COUNTERS = ("iteration", "env_steps", "episodes")


class Metrics:
    """Writes one line and one point per tag for each iteration."""

    def __init__(self, run_dir: Path, settings: dict[str, Any]) -> None:
        self._lines = open(run_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._events = FileWriter(str(run_dir))
        plain = {
            name: value if isinstance(value, int | float | str) else json.dumps(value)
            for name, value in settings.items()
        }
        # SummaryWriter.add_hparams would start a second run in a subdirectory.
        summaries: tuple[Summary, ...] = hparams(plain, {"charts/episodic_return": 0.0})
        for summary in summaries:
            self._events.add_summary(summary)
        table = "".join(f"|{name}|{value}|\n" for name, value in plain.items())
        self._events.add_summary(text("hyperparameters", "|setting|value|\n|-|-|\n" + table))

    def close(self) -> None:
        """Finish both files."""
        with contextlib.closing(self._events):  # whatever becomes of the lines
            self._lines.close()

    def log(self, row: dict[str, float | None]) -> None:
        """Write one iteration: `iteration`, `env_steps`, `episodes`, and the tags.

        None is null in metrics.jsonl and no point in TensorBoard.
        """
        self._lines.write(json.dumps(row, allow_nan=False) + "\n")
        self._lines.flush()
        points = {
            tag: value for tag, value in row.items() if tag not in _COUNTERS and value is not None
        }
        self.draw(points, int(row["env_steps"] or 0))

    def draw(self, points: dict[str, float], env_steps: int) -> None:
        """One point of each of these TensorBoard curves."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in points.items()]
        self._events.add_summary(Summary(value=values), env_steps)
