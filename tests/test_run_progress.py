import io
import os
import sys
import time

import pytest

from vecpg.config import Config
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


def test_many_runs_have_one_line(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    row = {"charts/episodic_return": 20.0, "env_steps": 1000}
    with PopulationProgress(3, live=False, every=1e-9) as line:
        shares = [line.share(place, 100) for place in range(3)]
        for share, number in zip(shares, (20.0, 40.0, 90.0), strict=True):
            line._next_look = 0.0
            share.show(row | {"charts/episodic_return": number}, last=False)
        line.ended(True)
        line.ended(False)
    found = stderr.getvalue().splitlines()
    assert found[0].startswith("0 of 3 runs ended, 0 solved, median return 20.0, ")
    assert found[2].startswith("0 of 3 runs ended, 0 solved, median return 40.0, ")
    assert found[4].startswith("2 of 3 runs ended, 1 solved, median return 40.0, ")
    assert len(found) == 5
    # What they had before is no step of this process.
    passed = 2700 / float(found[4].split()[-2].replace(",", ""))
    assert 0 < passed < time.monotonic() - line._started


def test_a_live_line_of_many_runs_counts_them(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with PopulationProgress(2, live=True, every=1.0) as line:
        line.ended(True)
        line.ended(True)
    last = stderr.getvalue().split("\r")[-1]
    assert "2/2 runs" in last
    assert "2 solved" in last
