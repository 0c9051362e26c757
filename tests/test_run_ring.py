"""A ring of iterations that a device made leaves what is left where each is looked at, at once."""

import copy
import importlib
import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import digest
from fused_twins import entry_of

from vecpg.advantage import advantages
from vecpg.config import Config
from vecpg.evaluate import EvalResult
from vecpg.kernels.iteration import Entry
from vecpg.rollout import collect
from vecpg.rollout.statistics import episode_statistics
from vecpg.run import checkpoint
from vecpg.run.clock import Clock
from vecpg.run.interrupts import Interrupted
from vecpg.run.metrics import Metrics
from vecpg.run.progress import Progress
from vecpg.run.state import Counters
from vecpg.run.stopping import parameters
from vecpg.update import update

story = importlib.import_module("vecpg.train")

CLOCK = ("charts/SPS", "perf/collect_s", "perf/returns_s", "perf/update_s")


class Recorded:
    """What a ring would have, computed on the CPU; nobody is told more than it asks for."""

    def __init__(self, config, run, slots=5, spoiled=None, ago=(3, 2, 1, 0), apart=1):
        self.config, self.envs, self.slots, self.spoiled = config, run.envs, slots, spoiled
        self.launched = self.released = 0
        self.run, self.reads = 0, []
        # Of stamps: microseconds before the end, or None for none, and milliseconds between ends.
        self.ago, self.apart = ago, apart
        state = run.state.draft()
        self.policy, self.optimizer = state.policy, state.optimizer
        self.first = state.counters.iteration
        self.kept = {}

    @property
    def room(self):
        return self.slots - 1 - (self.launched - self.released)

    def iterate(self):
        assert self.room > 0
        config = self.config
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
        entry = entry_of(rollout, episodes, stats)
        if self.launched == self.spoiled:
            entry[Entry.GRAD_NORM], entry[Entry.UPDATE_FINITE] = np.nan, 0
        end = 1_764_000_000_000_000_000 + 1_000_000 * self.apart * self.launched
        stamps = np.array([0 if each is None else end - 1000 * each for each in self.ago])
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


def most_of(window, limit):
    """The most steps and episodes of one environment in an iteration, of all that there may be."""

    def go_on(steps, episodes):
        yield steps, episodes
        if steps < window:
            for length in range(1, limit + 1):
                yield from go_on(steps + length, episodes + 1)

    return tuple(map(max, zip(*go_on(0, 0), strict=True)))


@pytest.mark.parametrize(("window", "limit"), [(1, 1), (1, 5), (4, 1), (3, 4), (5, 3)])
def test_so_many_iterations_surely_reach_no_limit(window, limit):
    most_steps, most_episodes = most_of(window, limit)
    run = SimpleNamespace(envs=SimpleNamespace(max_episode_steps=limit))
    for steps, episodes in ((None, 50), (50, None), (40, 60), (60, 40)):
        config = Config(
            num_envs=2, num_steps=window, total_timesteps=steps, total_episodes=episodes
        )
        for so_far in range(30):
            counters = Counters(3, so_far, 0, so_far)

            found = story._surely_more(config, run, counters)
            for iterations, reached in ((found, False), (found + 1, True)):
                limits = (
                    (steps, so_far + 2 * most_steps * iterations),
                    (episodes, so_far + 2 * most_episodes * iterations),
                )
                assert any(each is not None and far >= each for each, far in limits) == reached
    config = Config(total_timesteps=None, total_iterations=5)
    assert story._surely_more(config, run, Counters()) > 10**9


def test_one_that_goes_on_begins_no_more_than_are_left(tmp_path, monkeypatch):
    result = story.train(config := settings(tmp_path, total_iterations=2))
    config = replace(config, resume=str(result.run_dir), total_iterations=5)
    result, ring = train_in_ring(monkeypatch, config)
    assert result.summary["iterations"] == 5
    assert ring.launched == 3


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


@pytest.mark.parametrize("target", [None, 450.0])
def test_what_is_not_finite_ends_the_run_with_what_came_before(tmp_path, monkeypatch, target):
    """Whatever comes after it: that would be finite here."""
    config = settings(tmp_path, total_iterations=9, target_return=target)
    with pytest.raises(
        FloatingPointError, match="iteration 4: the gradient's norm is nan"
    ) as error:
        train_in_ring(monkeypatch, config, spoiled=3, slots=32)
    # It is found where it is read, and not once more when the run is closed.
    assert "settle" not in [entry.name for entry in error.traceback]
    (run_dir,) = tmp_path.iterdir()
    expected = story.train(settings(tmp_path / "other", total_iterations=3, target_return=target))
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


@pytest.mark.parametrize(
    ("changes", "which"),
    [({"total_iterations": 5}, 1), ({"total_iterations": 5, "target_return": 450.0}, 2)],
    ids=str,
)
def test_a_signal_while_it_is_waited_for_loses_nothing(tmp_path, monkeypatch, changes, which):
    config = settings(tmp_path / "one", **changes)
    expected = story.train(replace(config, out_dir=str(tmp_path / "other")))
    read, launched = Recorded.read, []

    def interrupted(ring, *given):
        found = read(ring, *given)
        if len(ring.reads) == which:
            launched.append(ring.launched)
            os.kill(os.getpid(), signal.SIGINT)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Recorded, "read", interrupted)
        with pytest.raises(Interrupted):
            train_in_ring(monkeypatch, config, slots=32)
    (run_dir,) = (tmp_path / "one").iterdir()
    assert [checkpoint.newest_valid(run_dir).iteration] == launched
    with monkeypatch.context() as patch:
        patch.setattr(story, "_fused", Recorded)
        result = story.train(replace(config, resume=str(run_dir)))
    assert left_by(result.run_dir) == left_by(expected.run_dir)


def stopped_in_the_middle():
    os.kill(os.getpid(), signal.SIGINT)


def failed_in_the_middle():
    raise KeyError("of the caller's")


MIDDLE = [stopped_in_the_middle, failed_in_the_middle]


@pytest.mark.parametrize("how", MIDDLE)
def test_what_comes_after_one_that_could_not_be_judged_is_discarded(tmp_path, monkeypatch, how):
    """It does not reach the target: nothing would have to be confirmed of it."""
    changes = {"seed": 5, "learning_rate": 0.3, "return_window": 8}
    free = settings(tmp_path / "free", total_iterations=3, **changes)
    rows, *_ = left_by(story.train(free).run_dir)
    first, highest, third = (row["charts/episodic_return"] for row in rows)
    assert max(first, third) < highest
    config = replace(free, target_return=highest, out_dir=str(tmp_path / "one"))
    expected = story.train(replace(config, total_iterations=1, out_dir=str(tmp_path / "other")))
    monkeypatch.setattr(story, "_evaluation", lambda *given: how())
    with pytest.raises((Interrupted, KeyError)):
        train_in_ring(monkeypatch, config)
    (run_dir,) = (tmp_path / "one").iterdir()
    assert left_by(run_dir) == left_by(expected.run_dir)


@pytest.mark.parametrize("how", MIDDLE)
def test_what_nobody_has_looked_at_is_discarded_where_somebody_looks(tmp_path, monkeypatch, how):
    seen = []

    def on_iteration(row, policy):
        seen.append(row["iteration"])
        if len(seen) == 3:
            how()

    config = settings(tmp_path, total_iterations=9)
    with pytest.raises((Interrupted, KeyError)):
        train_in_ring(monkeypatch, config, on_iteration)
    (run_dir,) = tmp_path.iterdir()
    assert checkpoint.newest_valid(run_dir).iteration == 3
    assert len(left_by(run_dir)[0]) == 3


def test_one_that_is_solved_makes_no_iteration_more(tmp_path, monkeypatch):
    changes = {"target_return": 25.0, "return_window": 8, "confirm": False}
    config = settings(tmp_path, total_iterations=20, **changes)
    result, _ = train_in_ring(monkeypatch, config)
    assert result.summary["solved"]
    (result.run_dir / "summary.json").unlink()  # as if it had been killed before
    again, ring = train_in_ring(monkeypatch, replace(config, resume=str(result.run_dir)))
    assert ring.launched == 0
    assert counts(again.summary) == counts(result.summary)


def test_a_full_ring_keeps_the_device_at_work(tmp_path, monkeypatch):
    """All are read but the one that is computed meanwhile."""
    monkeypatch.setattr(Progress, "is_due", lambda line: False)
    _, ring = train_in_ring(monkeypatch, settings(tmp_path, total_timesteps=50_000), slots=4)
    assert ring.reads[0] == 2


@pytest.mark.parametrize(("target", "committed"), [(450.0, 2), (None, 0)])
def test_where_a_row_could_not_be_written_no_other_is(tmp_path, monkeypatch, target, committed):
    monkeypatch.setattr(Progress, "is_due", lambda line: False)
    config = settings(tmp_path, total_iterations=9, target_return=target)
    log, failed = Metrics.log, []

    def full(metrics, row):
        if row["iteration"] == 3 and not failed:
            failed.append(row)
            raise OSError("no space left")
        log(metrics, row)

    monkeypatch.setattr(Metrics, "log", full)
    with pytest.raises(OSError, match="no space left"):
        train_in_ring(monkeypatch, config, slots=32)
    (run_dir,) = tmp_path.iterdir()
    rows, *_ = left_by(run_dir)
    assert [row["iteration"] for row in rows] == [1, 2]
    assert checkpoint.newest_valid(run_dir).iteration == committed


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

    monkeypatch.setattr(story, "_evaluation", evaluated)
    expected = story.train(config)
    one, judged = judged, []
    result, _ = train_in_ring(monkeypatch, config)
    assert judged == one
    assert len(judged) == 2
    assert digest(result.policy.state_dict()) == judged[1][1]
    assert left_by(result.run_dir) == left_by(expected.run_dir)


def test_a_run_begins_when_its_ring_is_there(tmp_path, monkeypatch):
    """What it takes to make one is mostly compiling, and no part of any iteration."""
    order, start, init, iterate = [], Clock.start, Recorded.__init__, Recorded.iterate

    def noting(name, function):
        def call(*given, **named):
            order.append(name)
            return function(*given, **named)

        return call

    monkeypatch.setattr(Clock, "start", noting("start", start))
    monkeypatch.setattr(Recorded, "__init__", noting("made", init))
    monkeypatch.setattr(Recorded, "iterate", noting("iterate", iterate))
    train_in_ring(monkeypatch, settings(tmp_path, total_iterations=1))
    assert order[order.index("made") :] == ["made", "start", "iterate"]


@pytest.mark.parametrize(
    ("ago", "expected"),
    [
        ((3, 2, 1, 0), (1, 1, 1)),
        ((9, None, 2, 0), (7, 0, 2)),  # there was no part for the baseline
        ((3, 5, 1, 0), (0, 4, 1)),  # a clock that went back
    ],
)
def test_phases_are_what_the_device_says(tmp_path, monkeypatch, ago, expected):
    config = settings(tmp_path, total_iterations=3)
    result, _ = train_in_ring(monkeypatch, config, ago=ago)
    for phase, micros in zip(("collect", "returns", "update"), expected, strict=True):
        for line in (result.run_dir / "metrics.jsonl").read_text().splitlines():
            found = json.loads(line)[f"perf/{phase}_s"]
            assert found == pytest.approx(1e-6 * micros, abs=1e-12)
        assert result.summary[f"{phase}_seconds"] == pytest.approx(3e-6 * micros, abs=1e-12)


def test_a_speed_is_that_of_when_the_device_was_there(tmp_path, monkeypatch):
    """Of those read together all but the last were done long ago: here before the start."""
    monkeypatch.setattr(Progress, "is_due", lambda line: False)
    config = settings(tmp_path, total_iterations=3)
    result, ring = train_in_ring(monkeypatch, config, apart=10**6)
    assert ring.reads == [3]
    speeds = [
        json.loads(line)["charts/SPS"]
        for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert speeds[:2] == [None, None]
    assert speeds[2] > 0
