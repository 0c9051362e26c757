import pytest
import torch

from vecpg.run import clock as clock_module
from vecpg.run.clock import Clock


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
