import io
import os
import sys

import pytest

from vecpg.config import Config
from vecpg.run import progress as module
from vecpg.run.progress import PopulationProgress, Progress

ROW = {
    "iteration": 3,
    "env_steps": 12345,
    "episodes": 192,
    "charts/episodic_return": 56.78,
    "charts/best_return": None,
    "charts/SPS": 54321.0,
}


def test_plain_lines_come_now_and_then_and_at_the_end(capsys):
    with Progress(Config(progress=False, log_every=1e6)) as progress:
        progress.show(ROW, last=False)
        progress.show(ROW | {"iteration": 4}, last=False)
        progress.show(ROW | {"iteration": 5, "charts/best_return": 60.0}, last=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "iteration 3, 12,345 steps: return 56.8, 54,321 steps/s",
        "iteration 5, 12,345 steps: return 56.8, best 60.0, 54,321 steps/s",
    ]


def test_the_live_line_shows_how_far_the_run_is(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(Config(progress=True, total_timesteps=24_690)) as progress:
        progress.show(ROW, last=True)
    line = stream.getvalue().split("\r")[-1]
    assert " 50%" in line
    assert "12.3k/24.7k steps" in line
    assert "return 56.8" in line


def test_a_run_of_episodes_or_iterations_counts_those(monkeypatch):
    for limit in ({"total_episodes": 384}, {"total_iterations": 6}):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress(Config(progress=True, total_timesteps=None, **limit)) as progress:
            progress.show(ROW, last=True)
        assert " 50%" in stream.getvalue().split("\r")[-1]


def test_the_nearest_of_several_limits_is_shown(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    limits = {"total_timesteps": 1_234_500, "total_iterations": 4}
    with Progress(Config(progress=True, **limits)) as progress:
        progress.show(ROW, last=True)
    line = stream.getvalue().split("\r")[-1]
    assert " 75%" in line
    assert "3.00/4.00 iterations" in line


def test_overshooting_the_end_is_all_of_it(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(Config(progress=True, total_timesteps=10_000)) as progress:
        progress.show(ROW, last=True)
    assert "100%" in stream.getvalue().split("\r")[-1]


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("shown", [0, 1])
def test_progress_that_nobody_reads_any_more_stops_nothing(monkeypatch, live, shown):
    reading, writing = os.pipe()
    with open(writing, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        if shown == 0:
            os.close(reading)
        with Progress(Config(progress=live, log_every=1e-9, total_timesteps=10**6)) as progress:
            for number in range(shown):
                progress.show(ROW | {"iteration": number}, last=True)
            if shown:
                os.close(reading)
            for number in range(3):
                progress.show(ROW | {"iteration": number, "env_steps": number}, last=True)
        nowhere = os.open(
            os.devnull, os.O_WRONLY
        )  # where what is still in the stream's buffer goes
        os.dup2(nowhere, writing)
        os.close(nowhere)


@pytest.mark.parametrize("live", [True, False])
def test_without_a_stderr_nothing_is_shown(monkeypatch, capfd, live):
    """`print` would take stdout instead."""
    monkeypatch.setattr(sys, "stderr", None)
    with Progress(Config(progress=live)) as progress:
        progress.show(ROW, last=True)
    assert capfd.readouterr() == ("", "")
    assert not Config().progress


@pytest.mark.parametrize("live", [True, False])
def test_what_another_rank_shows_is_not_shown(capfd, live):
    with PopulationProgress(2, live, 1.0, shown=False) as progress:
        assert not progress.share(0, 0).show(ROW, last=True)
        progress.ended(True)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def many(monkeypatch):
    """What three runs show, one of which had made steps before, as a clock goes on."""

    def shown(live):
        time, stream = [100.0], io.StringIO()
        monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
        monkeypatch.setattr(sys, "stderr", stream)
        with PopulationProgress(3, live, 1.5) as progress:
            if live:
                progress._bar.mininterval = 0.0
            shares = [progress.share(place, before) for place, before in enumerate((0, 10_000, 0))]
            for share, value in zip(shares, (10.0, 20.0, 90.0), strict=True):
                time[0] += 1.0
                share.show(ROW | {"charts/episodic_return": value}, last=False)
            time[0] += 2.0
            for solved in (True, False, True):
                progress.ended(solved)
        return stream.getvalue()

    return shown


def test_many_runs_have_one_line(many):
    # 12,345 steps of two runs and 2,345 of one that went on, in three seconds, and in five.
    assert many(live=False).splitlines() == [
        "0 of 3 runs ended, 0 solved, median return 10.0, 12,345 steps/s",
        "0 of 3 runs ended, 0 solved, median return 20.0, 9,012 steps/s",
        "1 of 3 runs ended, 1 solved, median return 20.0, 5,407 steps/s",
        "3 of 3 runs ended, 2 solved, median return 20.0, 5,407 steps/s",
    ]


def test_many_runs_have_one_live_line(many):
    """It is written anew also where no run has ended."""
    written = many(live=True)
    assert "0/3 runs 0 solved, median return 10.0, 12,345 steps/s" in written
    line = written.split("\r")[-1]
    assert "100%" in line
    assert "3/3 runs 2 solved, median return 20.0, 5,407 steps/s" in line
