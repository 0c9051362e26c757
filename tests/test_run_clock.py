import itertools
import json

import pytest
import torch

from vecpg.config import Config
from vecpg.run import clock as clock_module
from vecpg.run.clock import Clock
from vecpg.train import train


class Compiled:
    """What was compiled so far."""

    def __init__(self, seconds):
        self.seconds = seconds


@pytest.fixture
def now(monkeypatch):
    """A clock that stands until it is moved."""
    time = [100.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: time[0])
    return time


def test_what_is_compiled_while_evaluating_is_left_out_once(now):
    compiled = Compiled(2.0)
    clock = Clock(torch.device("cpu"), compiled, {})
    now[0], compiled.seconds = 103.0, 4.0
    assert clock.since_start() == 1.0
    with clock.evaluation():
        now[0], compiled.seconds = 110.0, 9.0
    assert clock.since_start() == 3.0
    assert clock.without_evaluations() == 1.0
    assert clock.compile_seconds == 9.0


def test_what_was_before_the_start_is_left_out(now):
    compiled = Compiled(2.0)
    clock = Clock(torch.device("cpu"), compiled, {"run": 7.0})
    now[0], compiled.seconds = 110.0, 6.0
    clock.start()
    assert clock.since_start() == 7.0
    now[0], compiled.seconds = 114.0, 7.0
    assert clock.since_start() == 10.0


def test_it_goes_on_from_the_totals_of_an_earlier_part(now):
    clock = Clock(torch.device("cpu"), Compiled(0.0), {})
    with clock.phase("collect"):
        now[0] += 2.0
    with clock.evaluation():
        now[0] += 5.0
    clock.note("solved")
    before = clock.totals()
    assert before == {"collect": 2.0, "solved": 7.0, "evaluate": 5.0, "run": 7.0}
    now[0] += 1000.0  # nothing ran
    clock = Clock(torch.device("cpu"), Compiled(0.0), before)
    with clock.phase("collect"):
        now[0] += 1.0
    assert clock.last == {"collect": 1.0}
    assert clock.totals() == {"collect": 3.0, "solved": 7.0, "evaluate": 5.0, "run": 8.0}
    assert clock.without_evaluations() == 3.0


def test_a_phase_that_failed_is_still_known(now):
    clock = Clock(torch.device("cpu"), Compiled(0.0), {})
    with clock.phase("collect"), clock.evaluation():
        assert clock.phase_now == "evaluate"
    assert clock.phase_now == "collect"
    with pytest.raises(MemoryError), clock.phase("update"):
        raise MemoryError
    assert clock.phase_now == "update"


def test_on_a_gpu_a_lap_is_counted_when_it_is_read(now, monkeypatch):
    """The device is behind the host: a mark has its time when the device comes to it."""
    device = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = device[0]

        def elapsed_time(self, other):
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    compiled = Compiled(0.0)
    clock = Clock(torch.device("cuda"), compiled, {"collect": 10.0})
    laps = []
    for seconds in (1.0, 2.0):
        with clock.phase("collect"):
            device[0] += 4 * seconds
        with clock.phase("update"):
            device[0] += seconds
            compiled.seconds += 0.25
        laps.append(clock.lap())
        now[0] += 0.001  # the host does not wait
    assert clock.totals()["collect"] == 10.0
    now[0] += 15.0
    found = [clock.count(lap, laps[-1]) for lap in laps]
    assert found == [
        ({"collect": 4.0, "update": 0.75}, 10.0),
        ({"collect": 8.0, "update": 1.75}, 0.0),
    ]
    assert clock.totals()["collect"] == 22.0
    assert clock.totals()["update"] == 2.5


@pytest.mark.parametrize("step", [0.0, -1.0])
def test_a_clock_that_does_not_go_forwards_gives_no_speed(tmp_path, monkeypatch, capsys, step):
    """As coarse clocks do, and those of machines that are moved."""
    ticks = itertools.count()
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: 1e3 + step * next(ticks))
    config = Config(
        num_envs=4,
        total_iterations=2,
        eval_episodes=2,
        return_window=4,
        target_return=1.0,
        confirm=True,
        env_id="CartPole-v1",
        out_dir=str(tmp_path),
        progress=False,
        save_every=1e-9,
    )
    result = train(config)
    rows = [json.loads(one) for one in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["charts/SPS"] for row in rows] == [None] * len(rows)
    for row in rows:
        assert all(row[f"perf/{phase}_s"] == 0 for phase in ("collect", "returns", "update"))
    summary = result.summary
    assert summary["steps_per_second"] is None
    assert (summary["wall_seconds"], summary["solved_seconds"]) == (0, 0)
    assert json.loads((result.run_dir / "summary.json").read_text()) == summary
    line = capsys.readouterr().err
    assert "return" in line
    assert "steps/s" not in line
