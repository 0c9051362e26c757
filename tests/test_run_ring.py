"""A ring of iterations that a device made leaves what is left where each is looked at, at once."""

import copy
import errno
import importlib
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from conftest import digest

from vecpg.advantage import advantages
from vecpg.config import Config
from vecpg.evaluate import EvalResult
from vecpg.fused.memory import Entry
from vecpg.rollout import collect
from vecpg.rollout.statistics import episode_statistics
from vecpg.run import checkpoint
from vecpg.run.interrupts import Interrupted
from vecpg.run.metrics import Metrics
from vecpg.run.progress import Progress
from vecpg.run.stopping import parameters
from vecpg.update import update

story = importlib.import_module("vecpg.train")

CLOCK = ("charts/SPS", "perf/collect_s", "perf/returns_s", "perf/update_s")


class Recorded:
    """What a ring would have, computed on the CPU; nobody is told more than it asks for."""

    def __init__(self, config, run, slots=5, spoiled=None):
        self.config, self.envs, self.slots, self.spoiled = config, run.envs, slots, spoiled
        self.launched = self.released = 0
        self.run, self.reads = 0, []
        state = run.state.draft()
        self.policy, self.optimizer = state.policy, state.optimizer
        self.first = state.counters.iteration
        self.kept = {}

    @property
    def room(self):
        return self.slots - 1 - (self.launched - self.released)

    def iterate(self):
        assert self.room > 0
        config, entry = self.config, np.zeros(len(Entry))
        acted = parameters(self.policy)
        rollout = collect(
            self.envs,
            self.policy,
            num_steps=config.num_steps,
            seed=config.seed,
            iteration=self.first + self.launched,
        )
        episodes = episode_statistics(rollout)
        stats = update(self.policy, self.optimizer, rollout, advantages(rollout, config), config)
        entry[Entry.COUNTED], entry[Entry.ROWS] = int(rollout.mask.sum()), len(rollout.mask)
        entry[Entry.EPISODES] = len(episodes.returns)
        entry[Entry.RETURN_SUM] = episodes.return_sum
        entry[Entry.RETURN_LOW] = episodes.returns.min()
        entry[Entry.RETURN_HIGH] = episodes.returns.max()
        entry[Entry.POLICY_LOSS], entry[Entry.ENTROPY] = stats.policy_loss, stats.entropy
        entry[Entry.GRAD_NORM] = stats.grad_norm
        entry[[Entry.ROLLOUT_FINITE, Entry.UPDATE_FINITE]] = 1
        if self.spoiled is not None and self.launched >= self.spoiled:
            entry[Entry.GRAD_NORM], entry[Entry.UPDATE_FINITE] = np.nan, 0
        end = 1_000_000 * (self.launched + 1)
        stamps = np.array([end - 3000, end - 2000, end - 1000, end])
        left = copy.deepcopy((self.policy, self.optimizer))
        self.kept[self.launched] = entry, stamps, acted, left
        self.kept.pop(self.launched - self.slots, None)
        self.launched += 1

    def read(self, first, count):
        assert first >= self.released
        assert first + count <= self.launched
        self.reads.append(count)
        found = [self.kept[first + k] for k in range(count)]
        return tuple(np.stack([each[i] for each in found])[:, None] for i in (0, 1))

    def acted(self, run, number):
        assert number >= self.released
        return self.kept[number][2]

    def restore(self, run, number, policy, optimizer):
        kept_policy, kept_optimizer = self.kept[number][3]
        policy.load_state_dict(kept_policy.state_dict())
        optimizer.copy_from(kept_optimizer)

    def release(self, number):
        assert self.released - 1 <= number < self.launched
        self.released = number + 1


def settings(tmp_path, **changes):
    given = {
        "num_envs": 8,
        "num_steps": 16,
        "seed": 3,
        "total_timesteps": None,
        "target_return": None,
        "return_window": 20,
        "progress": False,
        "eval_episodes": 4,
        "out_dir": str(tmp_path),
        "log_every": 1e9,
        "learning_rate": 3e-2,
    }
    return Config(**given | changes)


def left_by(run_dir):
    """Everything that a run leaves, but for what the clock says."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = checkpoint.newest_valid(run_dir)
    state = last.read(checkpoint.STATE)
    return (
        [{name: value for name, value in line.items() if name not in CLOCK} for line in lines],
        digest(state | {"seconds": {}}),
        digest(last.read(checkpoint.BEST)),
        sorted(folder.name for folder in checkpoint.folders(run_dir))[-1],
    )


def counts(summary):
    kept = ("iterations", "env_steps", "vector_steps", "episodes", "best_return", "solved")
    kept += ("solved_env_steps", "eval_return_mean", "eval_episodes")
    return {name: summary[name] for name in kept}


def train_in_ring(monkeypatch, config, on_iteration=None, **of_ring):
    rings = []

    def make(config, run):
        rings.append(Recorded(config, run, **of_ring))
        return rings[0]

    with monkeypatch.context() as patch:
        patch.setattr(story, "_fused", make)
        result = story.train(config, on_iteration)
    return result, rings[0]


LIMITS = [
    {"total_iterations": 7},
    {"total_iterations": 1},
    {"total_timesteps": 1500},
    {"total_episodes": 130},
    {"total_timesteps": 2000, "total_episodes": 60},
    {"target_return": 30.0, "total_iterations": 12},
    {"target_return": 30.0, "confirm": False, "total_timesteps": 9000},
    {"target_return": 500.0, "total_timesteps": 1500},
]


@pytest.mark.parametrize("slots", [4, 32])
@pytest.mark.parametrize("changes", LIMITS, ids=str)
def test_a_ring_leaves_what_each_iteration_looked_at_leaves(tmp_path, monkeypatch, changes, slots):
    config = settings(tmp_path, **changes)
    expected = story.train(config)
    result, ring = train_in_ring(monkeypatch, config, slots=slots)
    assert counts(result.summary) == counts(expected.summary)
    assert left_by(result.run_dir) == left_by(expected.run_dir)
    assert ring.launched - result.summary["iterations"] <= (
        1 if config.target_return is not None else max(1, ring.slots)
    )


def test_what_may_decide_is_read_one_iteration_late_and_the_rest_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Progress, "is_due", lambda line: False)
    config = settings(tmp_path, target_return=450.0, total_iterations=6)
    _, ring = train_in_ring(monkeypatch, config)
    assert ring.reads == [1] * 6
    # 8 environments make at most 8 x 515 steps: 5 iterations surely do not reach the limit.
    config = settings(tmp_path, total_timesteps=5 * 8 * 515 + 1)
    result, ring = train_in_ring(monkeypatch, config, slots=64)
    assert ring.reads[0] == 5
    assert ring.launched - result.summary["iterations"] <= 1
    _, ring = train_in_ring(monkeypatch, settings(tmp_path, total_iterations=50), slots=64)
    assert ring.reads == [50]


def test_who_looks_at_each_iteration_sees_its_policy_and_may_end_the_run(tmp_path, monkeypatch):
    def watch(seen):
        def on_iteration(row, policy):
            seen.append((row["iteration"], digest(policy.state_dict())))
            return row["iteration"] < 4

        return on_iteration

    config = settings(tmp_path, total_iterations=9)
    one, other = [], []
    expected = story.train(config, watch(one))
    result, ring = train_in_ring(monkeypatch, config, watch(other))
    assert other == one
    assert counts(result.summary) == counts(expected.summary)
    assert left_by(result.run_dir) == left_by(expected.run_dir)
    assert ring.launched == 5


def test_what_is_not_finite_ends_the_run_with_what_came_before(tmp_path, monkeypatch):
    config = settings(tmp_path, total_iterations=9)
    with pytest.raises(FloatingPointError, match="iteration 4: the gradient's norm is nan"):
        train_in_ring(monkeypatch, config, spoiled=3, slots=32)
    (run_dir,) = tmp_path.iterdir()
    expected = story.train(settings(tmp_path / "other", total_iterations=3))
    assert left_by(run_dir) == left_by(expected.run_dir)


# How many iterations after the last one of the run the signal comes.
@pytest.mark.parametrize(
    ("changes", "late"),
    [
        ({"total_iterations": 9}, -4),
        ({"total_iterations": 9, "target_return": 450.0}, -4),
        ({"target_return": 30.0, "total_iterations": 20}, 0),
        ({"target_return": 30.0, "total_iterations": 20}, 1),
        ({"total_timesteps": 3000}, 1),
        ({"total_episodes": 60}, 1),
    ],
    ids=str,
)
def test_a_signal_leaves_what_was_computed_and_it_goes_on(tmp_path, monkeypatch, changes, late):
    """Of iterations that are under way those up to the end; what has to be confirmed is lost."""
    config = settings(tmp_path / "one", **changes)
    expected = story.train(replace(config, out_dir=str(tmp_path / "other")))
    at = expected.summary["iterations"] + late
    iterate = Recorded.iterate

    def interrupted(ring):
        iterate(ring)
        if ring.launched == at:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Recorded, "iterate", interrupted)
        with pytest.raises(Interrupted):
            train_in_ring(monkeypatch, config, slots=32)
    (run_dir,) = (tmp_path / "one").iterdir()
    unconfirmed = bool(expected.summary["solved"])
    assert checkpoint.newest_valid(run_dir).iteration == min(at, at - late - unconfirmed)
    with monkeypatch.context() as patch:
        patch.setattr(story, "_fused", Recorded)
        result = story.train(replace(config, resume=str(run_dir)))
    assert left_by(result.run_dir) == left_by(expected.run_dir)


@pytest.mark.parametrize("target", [None, 450.0])
def test_a_signal_while_the_host_reads_loses_nothing(tmp_path, monkeypatch, target):
    config = settings(tmp_path / "one", total_iterations=4, target_return=target)
    expected = story.train(replace(config, out_dir=str(tmp_path / "other")))
    read = Recorded.read

    def interrupted(ring, first, count):
        found = read(ring, first, count)
        if ring.launched == 3 and ring.reads.count(count) < 3:
            os.kill(os.getpid(), signal.SIGINT)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Recorded, "read", interrupted)
        patch.setattr(Progress, "is_due", lambda line: True)
        with pytest.raises(Interrupted):
            train_in_ring(monkeypatch, config)
    (run_dir,) = (tmp_path / "one").iterdir()
    assert checkpoint.newest_valid(run_dir).iteration == 3
    with monkeypatch.context() as patch:
        patch.setattr(story, "_fused", Recorded)
        story.train(replace(config, resume=str(run_dir)))
    assert left_by(run_dir) == left_by(expected.run_dir)


def test_after_what_is_not_finite_nothing_counts_though_it_be_finite(tmp_path, monkeypatch):
    config = settings(tmp_path, total_iterations=9, target_return=450.0)
    read = Recorded.read

    def spoiled(ring, first, count):
        entries, stamps = read(ring, first, count)
        entries[np.arange(first, first + count) == 2, 0, Entry.UPDATE_FINITE] = 0
        return entries, stamps

    monkeypatch.setattr(Recorded, "read", spoiled)
    with pytest.raises(FloatingPointError, match="iteration 3"):
        train_in_ring(monkeypatch, config)
    (run_dir,) = tmp_path.iterdir()
    assert checkpoint.newest_valid(run_dir).iteration == 2
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 2


def test_lines_that_did_not_fit_on_the_disk_are_not_written_twice(tmp_path, monkeypatch):
    config, log, lines = settings(tmp_path, total_iterations=4), Metrics.log, []

    def full(metrics, row):
        lines.append(row["iteration"])
        if len(lines) == 3:
            raise OSError(errno.ENOSPC, "full")
        log(metrics, row)

    monkeypatch.setattr(Metrics, "log", full)
    with pytest.raises(OSError, match="full"):
        train_in_ring(monkeypatch, config)
    assert lines == [1, 2, 3]


def test_one_that_was_solved_makes_no_further_iteration(tmp_path, monkeypatch):
    config = settings(tmp_path, target_return=20.0, total_iterations=9, confirm=False)
    evaluated = story._evaluated

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError

    monkeypatch.setattr(story, "_evaluated", interrupted)
    with pytest.raises(Interrupted):
        train_in_ring(monkeypatch, config)
    (run_dir,) = tmp_path.iterdir()
    monkeypatch.setattr(story, "_evaluated", evaluated)
    result, ring = train_in_ring(monkeypatch, replace(config, resume=str(run_dir)))
    assert ring.launched == 0
    assert result.summary["solved"]


def test_nothing_is_committed_that_nobody_was_asked_about(tmp_path, monkeypatch):
    def on_iteration(row, policy):
        if row["iteration"] == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        train_in_ring(monkeypatch, settings(tmp_path, total_iterations=9), on_iteration)
    (run_dir,) = tmp_path.iterdir()
    assert checkpoint.newest_valid(run_dir).iteration == 2


def test_one_that_is_interrupted_while_it_is_judged_is_not_committed(tmp_path, monkeypatch):
    config = settings(tmp_path, target_return=20.0, return_window=4, total_iterations=9)

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError

    monkeypatch.setattr(story, "_evaluated", interrupted)
    with pytest.raises(Interrupted):
        train_in_ring(monkeypatch, config)
    (run_dir,) = tmp_path.iterdir()
    state = checkpoint.newest_valid(run_dir).read(checkpoint.STATE)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert state["counters"]["iteration"] == len(lines)
    assert not state["stopping"]["solved"]
    assert len(state["stopping"]["window"]) <= len(lines)


def test_saves_and_lines_come_when_they_are_due(tmp_path, monkeypatch):
    config = settings(tmp_path, total_iterations=6, save_every=1e-9)
    expected = story.train(config)
    result, ring = train_in_ring(monkeypatch, config)
    assert ring.reads == [1, 1, 1, 1, 2]
    assert left_by(result.run_dir) == left_by(expected.run_dir)


def test_a_confirmed_policy_is_the_one_that_collected(tmp_path, monkeypatch):
    config = settings(tmp_path, target_return=25.0, return_window=8, total_iterations=20)
    judged = []

    def evaluated(config, run, policy, iteration):
        judged.append((iteration, digest(policy.state_dict())))
        returns = (30.0 if len(judged) == 2 else 0.0,) * 4
        return EvalResult(returns, (1,) * 4)

    monkeypatch.setattr(story, "_evaluated", evaluated)
    expected = story.train(config)
    one, judged = judged, []
    result, _ = train_in_ring(monkeypatch, config)
    assert judged == one
    assert len(judged) == 2
    assert digest(result.policy.state_dict()) == judged[1][1]
    assert left_by(result.run_dir) == left_by(expected.run_dir)


def test_phases_are_what_the_device_says(tmp_path, monkeypatch):
    config = settings(tmp_path, total_iterations=3)
    result, _ = train_in_ring(monkeypatch, config)
    for line in (result.run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for phase in ("collect", "returns", "update"):
            assert row[f"perf/{phase}_s"] == pytest.approx(1e-6, abs=1e-8)
    assert result.summary["collect_seconds"] == pytest.approx(3e-6, abs=1e-7)
