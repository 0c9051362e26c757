"""Runs whose iterations are made as a whole, on a device that is not there, from begin to end."""

import importlib
import json
import os
import signal
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import digest
from fused_twins import fused_twins
from pretend import pretended
from twins import twins

from vecpg import fused, population
from vecpg.config import Config
from vecpg.fused import Fused
from vecpg.fused.lanes import Lane
from vecpg.kernels.iteration import Entry
from vecpg.population import RunsFailed, _Population, train_many
from vecpg.run import checkpoint
from vecpg.run.interrupts import Interrupted
from vecpg.run.progress import Progress

story = importlib.import_module("vecpg.train")
# Of the clock, and of how V is fitted, which is not.
NOT_COMPARED = ("charts/SPS", "perf/collect_s", "perf/returns_s", "perf/update_s")


@contextmanager
def device():
    with ExitStack() as undone:
        on = undone.enter_context(pretended())
        undone.enter_context(fused_twins())
        yield on


def settings(tmp_path, **changes):
    given = {
        "num_envs": 6,
        "num_steps": 12,
        "seed": 3,
        "total_timesteps": None,
        "total_iterations": 5,
        "target_return": None,
        "return_window": 20,
        "progress": False,
        "eval_episodes": 4,
        "out_dir": str(tmp_path),
        "vectorization": "tensor",
        "device": "cuda",
    }
    return Config(**given | changes)


def rows_of(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: each for name, each in line.items() if name not in NOT_COMPARED} for line in lines
    ]


def left_by(run_dir):
    last = checkpoint.newest_valid(run_dir)
    kept = last.read(checkpoint.STATE) | {"seconds": {}}
    return rows_of(run_dir), digest(kept), digest(last.read(checkpoint.BEST))


def check_close(rows, expected):
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert [name for name, each in row.items() if each is None] == [
            name for name, each in wanted.items() if each is None
        ]
        numbers = {name: each for name, each in wanted.items() if each is not None}
        assert {name: row[name] for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-4)


PENDULUM = {"env_id": "Pendulum-v1", "max_episode_steps": 20, "total_iterations": 3}
CASES = {
    "CartPole": {},
    "solved": {"target_return": 35.0, "total_iterations": 30},
    "full_return": {"weights": "full_return", "baseline": "timestep_mean", "reduction": "step"},
    "clipped": {"max_grad_norm": 0.5, "ent_coef": 0.1, "baseline": "none", "total_iterations": 3},
    "shards": {"shards": 2, "total_iterations": 3},
    "Pendulum": PENDULUM,
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_of_the_cpu(tmp_path, case, caplog):
    config = settings(tmp_path, **CASES[case])
    expected = story.train(replace(config, device="cpu"))
    with device(), caplog.at_level("INFO"):
        result = story.train(config)
    check_close(rows_of(result.run_dir), rows_of(expected.run_dir))
    for name in ("iterations", "env_steps", "vector_steps", "episodes", "solved"):
        assert result.summary[name] == expected.summary[name]
    assert "iterations: whole iterations in one CUDA graph" in caplog.text
    assert "gradient: by autograd" not in caplog.text


def test_between_log_lines_nothing_is_waited_for_and_with_a_target_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Progress, "is_due", lambda line: False)
    launched = []
    iterate = Fused.iterate
    for target, looks in ((None, 0), (1e9, 1)):
        with device() as on, monkeypatch.context() as patch:

            def counting(ring, on=on):
                iterate(ring)
                launched.append((on.waits.of(), on.looks.of(), on.operations.of()))
                on.clear()

            patch.setattr(Fused, "iterate", counting)
            story.train(settings(tmp_path, target_return=target, total_iterations=7))
        # Before the first one all begins; a first row is always shown; from then on it is the same.
        for waits, looked, operations in launched[-4:]:
            assert (waits, looked) == (0, looks)
            # The graph; with a target what it left, and a copy of the best parameters, besides.
            assert operations in ((1,) if target is None else (9, 15))
        assert [waits for waits, _, _ in launched[-6:]] == [0] * 6


def test_it_goes_on_where_it_was_on_either_device(tmp_path):
    expected = story.train(settings(tmp_path / "one", device="cpu", total_iterations=6))
    config = settings(tmp_path / "other", device="cpu", total_iterations=2)
    run_dir = story.train(config).run_dir
    with device():
        on_gpu = replace(config, resume=str(run_dir), device="cuda", total_iterations=4)
        story.train(on_gpu)
    result = story.train(replace(config, resume=str(run_dir), total_iterations=6))
    assert result.summary["iterations"] == 6
    check_close(rows_of(run_dir), rows_of(expected.run_dir))


def test_a_run_that_was_stopped_is_the_same_run(tmp_path, monkeypatch):
    config = settings(tmp_path / "one")
    iterate = Fused.iterate
    with device():
        expected = story.train(replace(config, out_dir=str(tmp_path / "other")))

        def interrupted(ring):
            iterate(ring)
            if ring.launched == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(Fused, "iterate", interrupted)
            story.train(config)
        (run_dir,) = (tmp_path / "one").iterdir()
        assert checkpoint.newest_valid(run_dir).iteration == 3
        story.train(replace(config, resume=str(run_dir)))
    assert left_by(run_dir) == left_by(expected.run_dir)


def many(tmp_path):
    """Runs that differ in what may differ, and one that has another shape."""
    one = settings(tmp_path)
    return [
        replace(one, seed=1),
        replace(one, seed=2, gamma=0.9, learning_rate=3e-3, total_iterations=3),
        replace(one, seed=3, target_return=25.0, total_iterations=8),
        replace(one, seed=4, num_envs=5, total_iterations=2),
        replace(one, seed=5, ent_coef=0.1, max_grad_norm=0.5, reduction="step"),
    ]


@pytest.mark.slow
def test_runs_at_once_are_each_what_they_are_alone(tmp_path, monkeypatch):
    made = []
    init = Fused.__init__

    def counting(ring, configs, *given):
        made.append(len(configs))
        init(ring, configs, *given)

    with device():
        alone = [story.train(config) for config in many(tmp_path / "alone")]
        monkeypatch.setattr(Fused, "__init__", counting)
        ended = []
        results = train_many(many(tmp_path / "many"), lambda place, _: ended.append(place))
    assert made == [3, 1, 1]
    assert sorted(ended) == [0, 1, 2, 3, 4]
    for result, expected in zip(results, alone, strict=True):
        assert left_by(result.run_dir) == left_by(expected.run_dir)
        for name in ("iterations", "env_steps", "solved", "eval_return_mean"):
            assert result.summary[name] == expected.summary[name]


def test_one_that_fails_keeps_no_other_from_its_end(tmp_path, monkeypatch):
    read = Fused.read

    def spoiled(ring, first, count):
        entries, stamps = read(ring, first, count)
        entries[max(0, 1 - first) :, 1, Entry.UPDATE_FINITE] = 0
        return entries, stamps

    monkeypatch.setattr(Fused, "read", spoiled)
    one = settings(tmp_path, total_iterations=4)
    configs = [one, replace(one, seed=4), replace(one, seed=5)]
    with device(), pytest.raises(RunsFailed) as failed:
        train_many(configs)
    assert [*failed.value.failures] == [1]
    assert "in iteration 2" in str(failed.value.failures[1])
    first, none, last = failed.value.results
    assert none is None
    assert first.summary["iterations"] == last.summary["iterations"] == 4


def test_where_there_is_no_memory_for_all_the_others_come_to_their_end(tmp_path, monkeypatch):
    load = Fused.load

    def full(ring, run, *given):
        if run == 1:
            raise torch.OutOfMemoryError("no more")
        load(ring, run, *given)

    monkeypatch.setattr(Fused, "load", full)
    one = settings(tmp_path, total_iterations=1)
    configs = [one, replace(one, seed=4), replace(one, seed=5, num_envs=5)]
    with device(), pytest.raises(RunsFailed) as failed:
        train_many(configs)
    assert [type(error) for error in failed.value.failures.values()] == [MemoryError] * 2
    assert [*failed.value.failures] == [0, 1]
    assert failed.value.results[2].summary["iterations"] == 1


def test_a_signal_before_all_have_started_keeps_none_waiting(tmp_path, monkeypatch):
    start, iterate, wait = _Population._start, Lane.iterate, threading.Condition.wait
    asked, in_vain = [], []

    def iterating(lane):
        asked.append(lane.launched)
        iterate(lane)

    def waiting(condition, timeout=None):
        notified = wait(condition, timeout or 20)
        if not notified and timeout is None:
            in_vain.append(condition)
            raise AssertionError
        return notified

    def starting(population, place, *given):
        if place == 1:
            while 3 not in asked:  # for which there is room once the other run has read
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
        start(population, place, *given)

    monkeypatch.setattr(fused, "_MOST_SLOTS", 4)
    monkeypatch.setattr(_Population, "_start", starting)
    monkeypatch.setattr(Lane, "iterate", iterating)
    monkeypatch.setattr(threading.Condition, "wait", waiting)
    with device(), pytest.raises(Interrupted):
        train_many([settings(tmp_path, seed=seed) for seed in (1, 2)])
    assert not in_vain
    first, other = (checkpoint.newest_valid(each).iteration for each in sorted(tmp_path.iterdir()))
    assert first >= 3
    assert other == 0


@pytest.mark.slow
def test_who_is_stopped_among_many_is_saved_and_goes_on(tmp_path, monkeypatch):
    configs = [settings(tmp_path / "many", seed=seed, total_iterations=6) for seed in (1, 2, 3)]
    iterate = Fused.iterate

    def interrupted(ring):
        iterate(ring)
        if ring.launched == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with device():
        expected = train_many([replace(each, out_dir=str(tmp_path / "one")) for each in configs])
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(Fused, "iterate", interrupted)
            train_many(configs)
        results = train_many([replace(each, resume="auto") for each in configs])
    for result, other in zip(results, expected, strict=True):
        assert left_by(result.run_dir) == left_by(other.run_dir)


def test_films_are_made_in_the_main_thread(tmp_path, monkeypatch):
    filmed = []

    def film(config, result):
        main = threading.current_thread() is threading.main_thread()
        filmed.append((config.seed, result.summary["iterations"], main))

    monkeypatch.setattr(population, "film_if_asked", film)
    with device():
        train_many([settings(tmp_path, seed=seed, total_iterations=1) for seed in (1, 2)])
    assert sorted(filmed) == [(1, 1, True), (2, 1, True)]


def test_as_many_at_once_as_there_is_memory_for(tmp_path, monkeypatch, caplog):
    made, init, why_not = [], Fused.__init__, fused.why_not

    def counting(ring, configs, *given):
        made.append(len(configs))
        init(ring, configs, *given)

    monkeypatch.setattr(Fused, "__init__", counting)
    monkeypatch.setattr(
        fused,
        "why_not",
        lambda *given, runs=1: "it takes too much" if runs > 2 else why_not(*given, runs=runs),
    )
    with device(), caplog.at_level("INFO"):
        train_many([settings(tmp_path, seed=seed, total_iterations=1) for seed in range(1, 6)])
    assert made == [2, 2, 1]
    assert caplog.text.count("iterations: not of all runs at once: it takes too much") == 1


def test_other_settings_go_step_by_step_and_it_is_said(tmp_path, caplog):
    why_not = fused.why_not
    with ExitStack() as undone:
        undone.enter_context(pretended())
        undone.enter_context(twins())
        undone.enter_context(mock.patch.object(fused, "why_not", why_not))
        undone.enter_context(caplog.at_level("INFO"))
        story.train(settings(tmp_path, normalize=True, total_iterations=1))
    assert "iterations: step by step: the weights are normalized" in caplog.text
    assert "gradient: by autograd" in caplog.text
