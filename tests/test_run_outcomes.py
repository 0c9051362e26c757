"""Iterations that the host reads late leave what those leave that it reads at once."""

import contextlib
import importlib
import os
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import digest
from gymnasium import spaces
from pretend import pretended
from twins import without_triton

from vecpg.adam import Adam
from vecpg.config import Config
from vecpg.evaluate import EvalResult
from vecpg.kernels.jit import Compilation
from vecpg.policy import Policy
from vecpg.run.clock import Clock, Lap
from vecpg.run.outcomes import Outcome, Outcomes, _read
from vecpg.run.state import Counters, TrainState
from vecpg.run.stopping import Stopping, parameters

CPU = torch.device("cpu")
# Returns of the episodes of each iteration; a window of four has its best in the fourth.
RETURNS = [[1.0, 2.0, 9.0], [5.0, 5.0], [5.0, 5.0], [7.0, 8.0], [1.0, 1.0]]


class Signals:
    """Stands in for `Interrupts`."""

    def held(self):
        return contextlib.nullcontext()


class Run:
    """A state whose policy is marked by how often it was updated."""

    def __init__(self, ahead, target=None, judge=None):
        torch.manual_seed(0)
        policy = Policy(spaces.Box(-1, 1, (1,)), spaces.Discrete(1), hidden_sizes=())
        optimizer = Adam(policy.parameters(), 1.0)
        self.state = TrainState(policy, optimizer, None, Stopping(target, 4))
        self.draft = self.state.draft()
        self.lines = []
        self.clock = Clock(CPU, Compilation(), {})
        self.outcomes = Outcomes(self.state, self.draft, self.clock, self, judge)
        self.ahead = ahead

    def iterate(self, returns, **finite):
        acting = self.draft.policy if self.ahead else self.state.policy
        acted = parameters(acting) if self.ahead else None
        self.draft.optimizer.zero_grad()
        loss = self.draft.policy(torch.full((1, 1), sum(returns))).square().sum()
        loss.backward()
        self.draft.optimizer.step()
        counters = self.draft.counters
        counters.iteration += 1
        counters.env_steps += 10
        counters.episodes += len(returns)
        several = torch.tensor(returns, dtype=torch.float64)
        self.outcomes.add(
            Outcome(
                replace(counters),
                len(returns),
                (several.sum(), several.min(), several.max()),
                torch.tensor(5.0),
                (loss.detach(), None, torch.tensor(0.5), torch.tensor(0.25)),
                {name: torch.tensor(value) for name, value in finite.items()},
                self.clock.lap(),
                acted,
            )
        )

    def log(self, row):
        """What is written of it, in the place of the files."""
        self.lines.append(row | {"charts/SPS": None})

    def saved(self):
        content = self.state.state_dict()
        return digest(content | {"seconds": {}})


def at_once(returns=RETURNS, **options):
    run = Run(ahead=False, **options)
    for each in returns:
        run.iterate(each)
        run.outcomes.commit(Signals())
    return run


@pytest.mark.parametrize("reads", [(5,), (1, 4), (2, 3), (1, 1, 1, 1, 1)])
def test_read_late_it_is_the_same_state_and_the_same_rows(reads):
    expected = at_once()
    run = Run(ahead=True)
    left = iter(RETURNS)
    for count in reads:
        before = run.saved()
        for _ in range(count):
            run.iterate(next(left))
            assert run.saved() == before  # nothing is committed until it is read
        row = run.outcomes.commit(Signals())
        assert row["iteration"] == run.state.counters.iteration
    assert run.lines == expected.lines
    assert run.saved() == expected.saved()
    # The best is the policy that collected in the fourth iteration, not one that was made later.
    best = run.state.stopping.best
    assert run.state.stopping.best_return == 6.25
    assert digest(best) == digest(at_once(RETURNS[:3]).state.policy.state_dict())


def test_what_is_not_finite_leaves_the_last_commit():
    run = Run(ahead=True)
    run.iterate(RETURNS[0], everything=True)
    run.outcomes.commit(Signals())
    before, rows = run.saved(), run.lines.copy()
    run.iterate(RETURNS[1], everything=True, rewards=True)
    run.iterate(RETURNS[2], everything=True, rewards=False)
    run.iterate([torch.nan], everything=False, rewards=False)
    words = "not all is finite of rewards in iteration 3; lower --learning-rate"
    with pytest.raises(FloatingPointError, match=words):
        run.outcomes.commit(Signals())
    assert (run.saved(), run.lines) == (before, rows)
    # What is at an end is not tried again.
    run.outcomes.settle()
    assert (run.saved(), run.lines) == (before, rows)


def test_a_loss_that_is_not_finite_is_named():
    run = Run(ahead=True)
    run.iterate([1e30], gradient=False)
    words = "of gradient in iteration 1: the policy loss is inf; lower"
    with pytest.raises(FloatingPointError, match=words):
        run.outcomes.commit(Signals())


def test_a_run_that_is_stopped_has_its_last_iterations():
    run = Run(ahead=True)
    for returns in RETURNS:
        run.iterate(returns)
    run.outcomes.settle()
    assert run.saved() == at_once().saved()
    assert len(run.lines) == len(RETURNS)


def test_an_iteration_that_was_broken_off_is_no_state():
    run = Run(ahead=True)
    run.iterate(RETURNS[0])
    run.outcomes.commit(Signals())
    before = run.saved()
    run.iterate(RETURNS[1])
    run.draft.counters.iteration += 1  # the next one has begun to change the draft
    run.outcomes.settle()
    assert run.saved() == before
    assert len(run.lines) == 1


def test_who_is_stopped_is_not_evaluated():
    shown = []

    def judge(policy, iteration):
        shown.append((digest(policy.state_dict()), iteration))
        return EvalResult((9.0,), (1,))

    run = Run(ahead=False, target=3.0, judge=judge)
    run.iterate(RETURNS[0])
    run.outcomes.settle()
    assert run.state.counters.iteration == 1  # there was nothing to confirm
    before = run.saved()
    run.iterate([5.0] * 4)
    run.outcomes.settle()
    assert (run.saved(), shown) == (before, [])
    other = at_once([RETURNS[0], [5.0] * 4], target=3.0, judge=judge)
    collected = at_once(RETURNS[:1]).state.policy.state_dict()
    assert shown == [(digest(collected), 1)]
    assert other.state.stopping.solved
    assert other.lines[-1]["eval/episodic_return"] == 9.0
    # When that was, is known of it alone.
    assert "solved" in other.state.seconds
    assert "solved" not in at_once().state.seconds


def test_the_speed_in_a_row_is_that_until_its_own_end(monkeypatch):
    run, rows = Run(ahead=True), []
    monkeypatch.setattr(run, "log", rows.append)
    monkeypatch.setattr(run.clock, "without_evaluations", lambda: 10.0)
    monkeypatch.setattr(run.clock, "count", lambda lap, last: ({}, 0.0 if lap is last else 6.0))
    for returns in RETURNS[:2]:
        run.iterate(returns)
    run.outcomes.commit(Signals())
    assert [row["charts/SPS"] for row in rows] == [10 / 4, 20 / 10]


def test_no_digit_is_lost_on_the_way_from_a_gpu():
    with pretended():
        of = {"dtype": torch.float64, "device": "cuda"}
        returns = tuple(torch.full((), 2.0**24 + i / 8, **of) for i in range(3))
        one, yes = torch.ones((), device="cuda"), torch.ones((), dtype=torch.bool, device="cuda")
        outcome = Outcome(
            Counters(), 1, returns, one, (one, None, one, one), {"all": yes}, Lap({}, {}), None
        )
        read = _read([outcome, outcome])
    assert read == [[2.0**24, 2.0**24 + 0.125, 2.0**24 + 0.25, 1, 1, 1, 1, 1]] * 2


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("vecpg.run.outcomes._KEPT_AT_LEAST", 8)
    monkeypatch.setattr("vecpg.run.outcomes._MOST_KEPT", 32)  # a weight and a bias beside, twice
    run = Run(ahead=True)
    run.iterate(RETURNS[0])
    assert not run.outcomes.full
    run.iterate(RETURNS[1])
    assert run.outcomes.full
    run.outcomes.commit(Signals())
    assert not run.outcomes.full


@pytest.mark.slow
def test_sigusr1_has_the_newest_iteration_saved_where_the_host_is_ahead(tmp_path, monkeypatch):
    """What it saves at once is the last that was read; the next iteration is read and saved."""
    loop: Any = importlib.import_module("vecpg.train")
    predict, calls = loop.predict, []

    def asked(*given):
        calls.append(given)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        return predict(*given)

    monkeypatch.setattr(loop, "predict", asked)
    config = Config(
        num_envs=2,
        max_episode_steps=3,
        total_iterations=6,
        target_return=None,
        eval_episodes=1,
        hidden_sizes=(4,),
        vectorization="tensor",
        device="cuda",
        out_dir=str(tmp_path),
        progress=False,
        log_every=1e9,
        save_every=1e9,
    )
    with pretended(), without_triton():
        result = loop.train(config)
    saved = {folder.name for folder in (result.run_dir / "checkpoints").iterdir()}
    assert "4" in saved
