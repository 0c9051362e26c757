import json
import math
import os
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from vecpg.config import Config, to_dict
from vecpg.run.directory import WriteFailure
from vecpg.run.metrics import Metrics
from vecpg.run.state import Counters


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


def test_a_full_disk_is_named_and_keeps_no_file_open(tmp_path, caplog):
    metrics = Metrics(tmp_path, to_dict(Config()))
    lines, metrics._lines = metrics._lines, open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(WriteFailure, match=r"metrics\.jsonl cannot be written: No space left"):
        metrics.log(row(1, 1))
    with pytest.raises(WriteFailure, match=r"metrics\.jsonl cannot be written: No space left"):
        metrics.close()
    assert metrics._lines.closed
    assert metrics._curves._file.closed
    assert caplog.text == ""
    lines.close()


def test_a_lost_tensorboard_is_one_warning(tmp_path, caplog):
    metrics = Metrics(tmp_path, to_dict(Config()))
    metrics._curves._file.close()
    metrics._curves._file = metrics._curves._records._writer = open("/dev/full", "wb")  # noqa: SIM115
    for iteration in (1, 2, 3):
        metrics.log(row(iteration, 10 * iteration, **{"charts/episodic_return": 1.0}))
    metrics.draw({"eval/episodic_return": 1.0}, 30)
    metrics.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    (said,) = caplog.records
    assert "no more curves for TensorBoard: OSError: " in said.message
    assert "No space left" in said.message


def test_a_missing_tensorboard_is_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    metrics = Metrics(tmp_path, to_dict(Config()))
    for iteration in (1, 2):
        metrics.log(row(iteration, 10 * iteration))
    metrics.close()
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    (said,) = caplog.records
    assert "no more curves for TensorBoard" in said.message


def curve(path, tag="charts/episodic_return"):
    """All points in the event files, dropped ones too."""
    points = []
    for file in sorted(path.glob("events.out.tfevents.*")):
        for record in RawEventFileLoader(str(file)).Load():
            event = Event.FromString(record)
            points += [(event.step, v.simple_value) for v in event.summary.value if v.tag == tag]
    return points


def logged(path, iterations, goes_on=None):
    metrics = Metrics(path, to_dict(Config()), goes_on)
    for iteration in iterations:
        tags = {"charts/episodic_return": float(iteration)}
        metrics.log(row(iteration, 100 * iteration, **tags))
    return metrics


def after(iteration):
    return Counters(iteration=iteration, env_steps=100 * iteration)


@pytest.mark.parametrize("torn", [False, True])
def test_what_came_after_the_checkpoint_is_cut(tmp_path, torn):
    """Twice, the second time back beyond the first; and a final evaluation is no iteration."""
    metrics = logged(tmp_path, range(1, 6))
    metrics.draw({"eval/episodic_return": 9.0}, 500)
    metrics.close()
    if torn:
        with open(tmp_path / "metrics.jsonl", "a") as lines:
            lines.write('{"iteration": 6, "env_st')
        (events,) = tmp_path.glob("events.*")
        os.truncate(events, events.stat().st_size - 7)
    logged(tmp_path, range(6, 8), goes_on=after(5)).close()
    assert curve(tmp_path) == [(100 * i, float(i)) for i in range(1, 8)]
    assert curve(tmp_path, "eval/episodic_return") == []
    logged(tmp_path, range(4, 7), goes_on=after(3)).close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    expected = [(100 * i, float(i)) for i in range(1, 7)]
    assert curve(tmp_path) == expected
    # As TensorBoard reads them.
    events = EventAccumulator(str(tmp_path)).Reload()
    shown = [(point.step, point.value) for point in events.Scalars("charts/episodic_return")]
    assert shown == expected
    assert (
        b"learning_rate"
        in events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )


def test_tensorboard_that_looks_on_drops_what_was_cut(tmp_path):
    metrics = logged(tmp_path, range(1, 6))
    looking = EventAccumulator(str(tmp_path)).Reload()
    assert len(looking.Scalars("charts/episodic_return")) == 5
    metrics.close()
    logged(tmp_path, range(3, 5), goes_on=after(2)).close()
    looking.Reload()
    shown = [(point.step, point.value) for point in looking.Scalars("charts/episodic_return")]
    assert shown == [(100 * i, float(i)) for i in range(1, 5)]


def test_points_that_were_lost_are_drawn_again(tmp_path):
    logged(tmp_path, range(1, 6)).close()
    (events,) = tmp_path.glob("events.*")
    os.truncate(events, events.stat().st_size - 50)
    assert len(curve(tmp_path)) == 4
    logged(tmp_path, [6], goes_on=after(5)).close()
    assert curve(tmp_path) == [(100 * i, float(i)) for i in range(1, 7)]
    for path in tmp_path.glob("events.*"):
        path.unlink()
    logged(tmp_path, [], goes_on=after(6)).close()
    assert curve(tmp_path) == [(100 * i, float(i)) for i in range(1, 7)]


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"iteration": 1}\n{"iteration": 3}\n',
        "1\n2\n3\n",
        *(
            f'{{"iteration": 1, "env_steps": 9}}\n{{"iteration": 2, {rest}}}\n'
            for rest in (
                '"env_steps": "x"',
                '"env_steps": 9',
                '"env_steps": 1e9',
                '"env_steps": NaN',
                '"env_steps": 12, "losses/entropy": [1]',
                f'"env_steps": 12, "losses/entropy": {10**400}',
            )
        ),
    ],
)
def test_lines_that_are_missing_are_an_error_and_nothing_is_cut(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"expected iterations 1 to 3, .* got 1 to [01]; restore"):
        Metrics(tmp_path, {}, after(3))
    assert (tmp_path / "metrics.jsonl").read_text() == content


def test_a_number_that_is_not_json_is_refused(tmp_path):
    metrics = Metrics(tmp_path, {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics.log(row(1, 1, tag=math.nan))
    metrics.close()
