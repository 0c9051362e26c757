"""Many runs in one process: each is the run that it would be alone."""

import gc
import logging
import os
import signal
import sys
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import last
from test_run_files import left_behind, short

from vecpg import population as module
from vecpg.config import ConfigError
from vecpg.kernels import threads
from vecpg.kernels.cores import cores
from vecpg.population import RunsFailed, train_many
from vecpg.run import checkpoint
from vecpg.run.interrupts import Interrupted, Told
from vecpg.run.progress import Share
from vecpg.run.resume import stored_config
from vecpg.train import train

KINDS = {
    "tensor": {},
    "gaussian": {"env_id": "Pendulum-v1", "max_episode_steps": 5, "num_steps": 9},
    "value": {"baseline": "value", "value_steps": 3},
    "dropout": {"dropout": 0.3},
    "sync": {"vectorization": "sync"},
}


def seeds(config, *numbers):
    return [replace(config, seed=seed) for seed in numbers]


def runs(out_dir):
    """Those that were begun: of one that a signal kept from it an empty directory may be left."""
    return sorted(path.parent for path in out_dir.glob("*/config.json"))


def equals_alone(configs, results, tmp_path):
    for number, (config, result) in enumerate(zip(configs, results, strict=True)):
        alone = train(replace(config, out_dir=str(tmp_path / f"alone-{number}"), resume=None))
        assert left_behind(result.run_dir) == left_behind(alone.run_dir)
        ours, theirs = result.policy.state_dict(), alone.policy.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert result.summary["seed"] == config.seed


@pytest.mark.parametrize("kind", KINDS)
def test_every_run_is_what_it_would_be_alone(tmp_path, kind):
    configs = seeds(short(tmp_path / "many", total_iterations=3, **KINDS[kind]), 3, 1, 7)
    equals_alone(configs, train_many(configs), tmp_path)


def test_runs_of_different_settings_are_too(tmp_path):
    configs = [
        short(tmp_path / "many", total_iterations=1 + number, num_envs=number + 2, **settings)
        for number, settings in enumerate(KINDS.values())
    ]
    equals_alone(configs, train_many(configs), tmp_path)


def test_served_runs_have_a_thread_each_and_others_the_main_one(tmp_path, monkeypatch):
    real, found = module.advance, []

    def advance(config, *args):
        here = threading.current_thread() is threading.main_thread()
        found.append((config.vectorization, config.baseline, here, torch.get_num_threads()))
        return real(config, *args)

    monkeypatch.setattr(module, "advance", advance)
    one = short(tmp_path, total_iterations=1, vectorization="tensor")
    value = {"baseline": "value", "value_steps": 1}
    configs = [one, replace(one, vectorization="sync"), replace(one, **value)]
    train_many([*configs, replace(one, threads=2, **value)])
    assert sorted(found) == [
        ("sync", "leave_one_out", True, 1),
        ("tensor", "leave_one_out", False, 1),
        ("tensor", "value", False, 1),
        ("tensor", "value", True, 1),  # torch's threads are all its own
    ]


@pytest.mark.parametrize("number", [1, 2, 5])
def test_as_many_runs_as_threads_go_on_at_once(tmp_path, monkeypatch, number):
    """And the kernels of the last ones have more of them."""
    real, at_work, most, counts = module.advance, [], [], []

    def advance(config, *args):
        at_work.append(config.seed)
        most.append(len(at_work))
        counts.append((len(at_work), threads.count()))
        try:
            return real(config, *args)
        finally:
            at_work.remove(config.seed)

    monkeypatch.setattr(module, "advance", advance)
    train_many(seeds(short(tmp_path, total_iterations=2, threads=number), 1, 2, 3, 4, 5, 6))
    assert max(most) <= number
    assert counts[0][1] == 1  # six are left, of whom five may be at work
    alone = []
    monkeypatch.setattr(
        module, "advance", lambda *args: alone.append(threads.count()) or real(*args)
    )
    train_many([short(tmp_path, total_iterations=1, threads=number)])
    assert alone == [number]


def test_no_bit_depends_on_the_number_of_threads(tmp_path):
    config = short(tmp_path, num_envs=70, total_iterations=3)
    found = [
        left_behind(result.run_dir)[:3]
        for number in (1, 3)
        for result in train_many(seeds(replace(config, threads=number), 4))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("vectorization", ["tensor", "sync"])
def test_a_run_that_fails_ends_alone(tmp_path, caplog, vectorization):
    one = short(tmp_path / "many", vectorization=vectorization, total_iterations=3)
    configs = seeds(one, 1, 2, 3)
    configs[1] = replace(configs[1], learning_rate=3e38)
    ended = []
    with (
        caplog.at_level(logging.INFO, "vecpg"),
        pytest.raises(RunsFailed, match="^1 of 3 runs failed: seed 2$") as raised,
    ):
        train_many(configs, lambda place, result: ended.append((place, result)))
    failed = raised.value
    assert list(failed.failures) == [1]
    assert isinstance(failed.failures[1], FloatingPointError)
    assert failed.results[1] is None
    assert sorted(ended, key=lambda each: each[0]) == [
        (place, failed.results[place]) for place in (0, 2)
    ]
    equals_alone(configs[::2], failed.results[::2], tmp_path)
    (message,) = [r.getMessage() for r in caplog.records if "failed" in r.getMessage()]
    run_dir = next(path for path in runs(tmp_path / "many") if "__2__" in path.name)
    assert message.startswith("seed 2 failed: FloatingPointError: ")
    assert "saved after iteration" in message
    assert message.endswith(f"train --resume {run_dir}")
    assert not (run_dir / "summary.json").exists()


@pytest.mark.parametrize("vectorization", ["tensor", "sync"])
def test_of_a_run_that_failed_no_memory_is_kept(tmp_path, monkeypatch, vectorization):
    real, rollouts = sys.modules["vecpg.train"].update, []

    def update(policy, optimizer, rollout, *args, **kwargs):
        rollouts.append(weakref.ref(rollout.rewards))
        return real(policy, optimizer, rollout, *args, **kwargs)

    monkeypatch.setattr(sys.modules["vecpg.train"], "update", update)
    one = short(tmp_path, vectorization=vectorization, learning_rate=3e38)
    with pytest.raises(RunsFailed) as raised:
        train_many(seeds(one, 1, 2))
    gc.collect()
    assert len(rollouts) >= 2
    assert [each() for each in rollouts] == [None] * len(rollouts)
    assert raised.value.failures[0].__traceback__ is not None


def test_nothing_is_begun_where_a_setting_cannot_work(tmp_path):
    one = short(tmp_path)
    with pytest.raises(ConfigError, match="Nothing-v0"):
        train_many([one, replace(one, seed=2), replace(one, env_id="Nothing-v0")])
    with pytest.raises(TypeError, match="expected a Config for each run, got 3"):
        train_many([one, 3])
    with pytest.raises(ConfigError, match="--resume nothing: expected"):
        train_many([one, replace(one, resume="nothing")])
    assert list(tmp_path.iterdir()) == []
    assert train_many([]) == []


@pytest.mark.parametrize("vectorization", ["tensor", "sync"])
def test_it_is_told_when_the_first_has_begun_and_nothing_can_be_refused(tmp_path, vectorization):
    one = short(tmp_path, vectorization=vectorization, total_iterations=1)
    told = []

    def on_begun():
        told.append([len((run / "metrics.jsonl").read_text()) for run in runs(tmp_path)])

    results = train_many(seeds(one, 1, 2), on_begun=on_begun)
    assert told == [[0]]
    train_many([stored_config(result.run_dir) for result in results], on_begun=on_begun)
    with pytest.raises(ConfigError):
        train_many(seeds(replace(one, device="cuda:99"), 1, 2), on_begun=on_begun)
    assert told == [[0]]  # none had to begin, and none could


def test_where_that_fails_the_run_is_closed(tmp_path):
    with pytest.raises(ZeroDivisionError):
        train_many([short(tmp_path, total_iterations=1)], on_begun=lambda: 1 / 0)
    (run_dir,) = runs(tmp_path)
    (result,) = train_many([stored_config(run_dir)])  # nobody holds it
    assert result.summary["iterations"] == 1


def test_so_it_is_where_all_before_it_had_come_to_their_end(tmp_path):
    one = short(tmp_path, total_iterations=1)
    ended, other = (result.run_dir for result in train_many(seeds(one, 1, 2)))
    goes_on = stored_config(other, total_iterations=2, device="cuda:99")
    with pytest.raises(ConfigError, match="--device cuda:99"):
        train_many([stored_config(ended), goes_on])


# The signal may come between the opening of a file of a run that is just begun and its `with`: then
# the file is closed as it is forgotten.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize(
    ("how", "vectorization"),
    [("a signal", "tensor"), ("a signal", "sync"), ("an error of the caller's", "tensor")],
)
def test_whatever_stops_them_every_run_is_saved_and_goes_on(
    tmp_path, monkeypatch, how, vectorization
):
    """Of those that are not begun there is nothing to save."""
    shown = []
    real = Share.show

    def show(share, row, *, last):
        shown.append(row)
        if len(shown) == 5 and how == "a signal":
            os.kill(os.getpid(), signal.SIGTERM)
        real(share, row, last=last)

    monkeypatch.setattr(Share, "show", show)
    one = short(tmp_path / "many", vectorization=vectorization, total_iterations=9)
    configs = seeds(one, *range(1, 5))
    configs[0] = replace(configs[0], total_iterations=2)

    def on_result(place, result):
        if how == "an error of the caller's":
            raise ZeroDivisionError

    with pytest.raises((Interrupted, ZeroDivisionError)):
        train_many(configs, on_result)
    monkeypatch.undo()
    found = {stored_config(run_dir).seed: run_dir for run_dir in runs(tmp_path / "many")}
    assert 1 in found
    for seed, run_dir in found.items():  # saved as far as they were
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        assert last(run_dir)["counters"]["iteration"] == len(lines)
        configs[seed - 1] = stored_config(run_dir)
    results = train_many(configs)
    assert {stored_config(each.run_dir).seed for each in results} == {1, 2, 3, 4}
    assert len(runs(tmp_path / "many")) == 4
    equals_alone(configs, results, tmp_path)


def test_who_is_stopped_does_not_go_on_to_the_end(tmp_path, monkeypatch):
    both = threading.Barrier(2, lambda: os.kill(os.getpid(), signal.SIGINT), timeout=60)
    real = Share.show

    def show(share, row, *, last):
        if row["iteration"] == 3:
            both.wait()
        real(share, row, last=last)

    monkeypatch.setattr(Share, "show", show)
    with pytest.raises(Interrupted):
        train_many(seeds(short(tmp_path, total_iterations=2000, threads=2), 1, 2))
    assert [last(each)["counters"]["iteration"] >= 3 for each in runs(tmp_path)] == [True, True]
    assert not list(tmp_path.glob("*/summary.json"))


@pytest.mark.parametrize("second", ["tensor", "sync"])
def test_all_are_saved_when_asked(tmp_path, monkeypatch, second):
    """In threads, and where one is in the main thread: a thread waits until it was told."""
    real, ask_to_save, told = Share.show, Told.ask_to_save, threading.Event()
    both = threading.Barrier(2, lambda: os.kill(os.getpid(), signal.SIGUSR1), timeout=60)
    in_threads = 2 if second == "tensor" else 1
    asked = []

    def ask(one):
        ask_to_save(one)
        asked.append(one)
        if len(asked) == in_threads:
            told.set()

    def show(share, row, *, last):
        if row["iteration"] == 1:
            both.wait()
            assert threading.current_thread() is threading.main_thread() or told.wait(60)
        real(share, row, last=last)

    monkeypatch.setattr(Told, "ask_to_save", ask)
    monkeypatch.setattr(Share, "show", show)
    one = short(tmp_path, total_iterations=3, threads=2)
    results = train_many([one, replace(one, seed=2, vectorization=second)])
    for result in results:
        kept = [int(folder.name) for folder in checkpoint.folders(result.run_dir)]
        assert kept == [3, 1, 0]


def test_a_warning_says_of_which_run_it_is(tmp_path, caplog):
    one = short(tmp_path, env_id="vecpg/LineWorld-v0", max_episode_steps=1, total_iterations=6)
    with caplog.at_level(logging.INFO, "vecpg"):
        train_many(seeds(one, 8, 9))
    said = [r.getMessage() for r in caplog.records]
    stuck = [line.partition(": ")[0] for line in said if "every episode has returned" in line]
    assert sorted(stuck) == ["seed 8", "seed 9"]
    assert sum("LineWorld" in line and "x 4" in line for line in said) == 1


def test_a_film_is_made_as_a_run_ends_and_not_again(tmp_path, monkeypatch):
    filmed = []
    monkeypatch.setattr(module, "film_if_asked", lambda *given: filmed.append(given))
    config = short(tmp_path, total_iterations=1, vectorization="sync")
    (result,) = train_many([config])
    assert filmed == [(config, result)]
    train_many([stored_config(result.run_dir)])
    assert len(filmed) == 1


def test_names_are_seeds_where_no_two_are_equal(tmp_path):
    one = short(tmp_path)
    assert module._names(seeds(one, 5, 3)) == ["seed 5", "seed 3"]
    other = replace(one, exp_name="other")
    assert module._names([one, other]) == ["reinforce, seed 1", "other, seed 1"]
    assert module._names(seeds(one, 5, 5)) == ["run 1 (seed 5)", "run 2 (seed 5)"]


def test_by_default_there_are_as_many_as_cores(tmp_path):
    assert module._Population([short(tmp_path)], None)._at_once == cores()
