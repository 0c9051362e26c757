import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vecpg.config import Config, to_dict
from vecpg.run.metrics import Metrics


def row(iteration, env_steps, **tags):
    return {"iteration": iteration, "env_steps": env_steps, "episodes": 3, **tags}


def test_lines_and_curves_hold_what_was_logged(tmp_path):
    metrics = Metrics(tmp_path, to_dict(Config()))
    rows = [
        row(1, 100, **{"charts/episodic_return": 5.0, "charts/best_return": None}),
        row(2, 250, **{"charts/episodic_return": 7.5, "charts/best_return": 6.25}),
    ]
    metrics.log(rows[0])
    # Flushed after every iteration, so that a killed run keeps its lines.
    assert (tmp_path / "metrics.jsonl").read_text() == json.dumps(rows[0]) + "\n"
    metrics.log(rows[1])
    metrics.draw({"eval/episodic_return": 9.0}, 250)
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "charts/episodic_return",
        "charts/best_return",
        "eval/episodic_return",
    }
    curve = [(point.step, point.value) for point in events.Scalars("charts/episodic_return")]
    assert curve == [(100, 5.0), (250, 7.5)]
    assert [point.step for point in events.Scalars("charts/best_return")] == [250]
    hyperparameters = events.SummaryMetadata("_hparams_/session_start_info")
    assert b"learning_rate" in hyperparameters.plugin_data.content
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_full_disk_keeps_no_file_open(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path, to_dict(Config()))
    closed = []
    events = metrics._events.close
    monkeypatch.setattr(metrics._events, "close", lambda: (closed.append(True), events()))
    lines = metrics._lines
    metrics._lines = open("/dev/full", "a")  # noqa: SIM115
    metrics._lines.write("x")
    with pytest.raises(OSError, match="No space left"):
        metrics.close()
    assert closed == [True]
    lines.close()


def test_a_number_that_is_not_json_is_refused(tmp_path):
    metrics = Metrics(tmp_path, {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics.log(row(1, 1, tag=math.nan))
    metrics.close()
