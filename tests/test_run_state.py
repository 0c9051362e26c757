"""One state, one commit: what is saved is the state before an iteration or after it."""

import collections
import functools
import importlib.metadata
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import digest, last
from gymnasium import spaces

import vecpg
from vecpg import train as train_module
from vecpg.adam import Adam
from vecpg.config import Config
from vecpg.policy import Policy
from vecpg.run.state import TrainState
from vecpg.run.stopping import Returned, Stopping
from vecpg.train import train
from vecpg.value import Critic, ValueFunction

PACKAGE = str(Path(vecpg.__file__).parent)
SPACE = spaces.Box(-1, 1, (3,))


def make_state(seed=0, critic=True):
    torch.manual_seed(seed)
    policy = Policy(SPACE, spaces.Discrete(2), hidden_sizes=(4,), normalize_obs=True)
    value_function = ValueFunction(SPACE, hidden_sizes=(4,), normalize_obs=True)
    optimizer = Adam(policy.parameters(), 1e-2)
    own = Critic(value_function, 1e-3) if critic else None
    return TrainState(policy, optimizer, own, Stopping(None, 3))


def advance(state, by):
    """Change everything."""
    obs = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(by))
    mask = torch.ones(2, 4, dtype=torch.bool)
    state.optimizer.zero_grad()
    state.policy(obs[0]).square().sum().backward()
    state.optimizer.step()
    state.policy.observe(obs, mask)
    if state.critic is not None:
        state.critic.optimizer.zero_grad()
        state.critic.value_function(obs[0]).square().sum().backward()
        state.critic.optimizer.step()
        state.critic.value_function.encoder.observe(obs, mask)
    state.stopping.consider(state.policy, Returned(4.0 * by, 4, float(by), float(by)), None)
    state.counters.iteration += 1
    state.counters.env_steps += 8
    state.seconds = {"run": float(by)}


@pytest.mark.parametrize("critic", [True, False])
def test_a_draft_changes_nothing_until_it_is_committed(critic):
    state = make_state(critic=critic)
    draft = state.draft()
    for by in range(1, 4):
        before = digest(state.state_dict())
        assert digest(draft.state_dict()) == before
        advance(draft, by)
        assert digest(state.state_dict()) == before
        after = digest(draft.state_dict())
        assert after != before
        state.commit(draft)
        assert digest(state.state_dict()) == after
        # Nothing is shared: the next iteration changes the draft alone.
    twin = make_state(critic=critic)
    for by in range(1, 4):
        advance(twin, by)
    assert digest(twin.state_dict()) == digest(state.state_dict())


def test_every_part_of_the_state_is_in_what_is_saved():
    state = make_state()
    advance(state, 1)
    other = make_state(seed=1)
    assert digest(other.state_dict()) != digest(state.state_dict())
    other.load_state_dict(state.state_dict())
    assert digest(other.state_dict()) == digest(state.state_dict())
    for each in (state, other):
        advance(each, 2)
    assert digest(other.state_dict()) == digest(state.state_dict())
    # The tensors are its own: what was loaded from goes on alone.
    advance(state, 3)
    assert digest(other.state_dict()) != digest(state.state_dict())


def test_the_state_of_another_baseline_is_refused():
    content = make_state().state_dict()
    with pytest.raises(ValueError, match="critic: expected none, got one; train with the --base"):
        make_state(critic=False).load_state_dict(content)
    with pytest.raises(ValueError, match="critic: expected one, got none"):
        make_state().load_state_dict(make_state(critic=False).state_dict())


def test_a_commit_that_is_interrupted_goes_on_when_it_is_saved(monkeypatch):
    """Half of the copying is no state."""
    state = make_state()
    draft = state.draft()
    advance(draft, 1)
    after = digest(draft.state_dict())

    def broken(self, other):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Adam, "copy_from", broken)
        with pytest.raises(KeyboardInterrupt):
            state.commit(draft)
    assert state.counters.iteration == 0
    assert digest(state.state_dict()) == after
    assert state.counters.iteration == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"vectorization": "tensor"},
        {"vectorization": "sync", "baseline": "value", "value_steps": 3},
        {"vectorization": "vector_entry_point", "normalize_obs": True, "dropout": 0.3},
        {"vectorization": "tensor", "env_id": "Pendulum-v1", "max_episode_steps": 7},
        # Reached by the window of several iterations, some of them before and some after.
        {"vectorization": "tensor", "target_return": 30.0, "return_window": 40},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_what_is_saved_is_all_that_a_run_needs_to_go_on(tmp_path, monkeypatch, settings):
    def run(name, iterations, saved_by=None):
        given = {"num_envs": 8, "hidden_sizes": (8,), "eval_episodes": 2, "return_window": 20}
        given |= {"out_dir": str(tmp_path / name), "progress": False, **settings}
        begin = train_module.begin

        def begun(config, ranks):
            begun = begin(config, ranks)
            if saved_by is not None:
                begun.state.load_state_dict(last(saved_by.run_dir))
            return begun

        with monkeypatch.context() as patch:
            patch.setattr(train_module, "begin", begun)
            result = train(Config(**given, total_iterations=iterations))
        rows = (result.run_dir / "metrics.jsonl").read_text().splitlines()
        return result, [without_clock(json.loads(row)) for row in rows]

    whole, rows = run("whole", 60 if "target_return" in settings else 7)
    assert len(rows) > 3
    first, before = run("first", 3)
    second, after = run("last", len(rows), saved_by=first)
    assert before + after == rows
    assert saved(second.run_dir)[0] == saved(whole.run_dir)[0]
    for name in ("solved", "solved_env_steps", "env_steps", "episodes", "eval_return_mean"):
        assert second.summary[name] == whole.summary[name]
    if "target_return" in settings:
        assert whole.summary["solved"]


def without_clock(row):
    return {k: v for k, v in row.items() if k != "charts/SPS" and not k.startswith("perf/")}


class Fault(BaseException):
    """Nothing catches it."""


class Injection:
    """Raises at the given line, of those run in vecpg from `collect`'s return to the commit's.

    Lines that are run again are counted again, but from one place no third time: that is a loop.
    """

    def __init__(self, monkeypatch, at):
        self.runs = collections.Counter()
        self.at, self.lines, self.where = at, 0, None
        self.collections = 0
        real = train_module.collect

        def collect(*args, **kwargs):
            rollout = real(*args, **kwargs)
            self.collections += 1
            if self.collections == 2:
                sys._getframe(1).f_trace = self.trace
                sys.settrace(self.trace)
            return rollout

        commit = TrainState.commit

        def committed(state, draft):
            commit(state, draft)
            sys.settrace(None)

        monkeypatch.setattr(train_module, "collect", collect)
        monkeypatch.setattr(TrainState, "commit", committed)

    def trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        caller = frame.f_back
        place = frame.f_code, frame.f_lineno, caller.f_code, caller.f_lineno
        if event == "line":
            self.runs[place] += 1
        if event == "line" and self.runs[place] <= 2:
            if self.lines == self.at:
                sys.settrace(None)
                self.where = frame.f_code.co_filename, frame.f_lineno
                raise Fault
            self.lines += 1
        return self.trace


FAULTY = {
    "machine code": {"target_return": 2.0, "return_window": 3},
    "torch": {"baseline": "value", "value_steps": 1, "normalize_obs": True, "dropout": 0.5},
}


def saved(run_dir):
    """What `last` holds, without the clock, and how many rows there are."""
    content = last(run_dir)
    del content["seconds"]
    rows = (run_dir / "metrics.jsonl").read_text().count("\n")
    return digest(content), content["counters"]["iteration"], rows


def config(tmp_path, which, **settings):
    given = {"num_envs": 2, "hidden_sizes": (4,), "max_episode_steps": 3, "eval_episodes": 1}
    given |= {"vectorization": "sync", "out_dir": str(tmp_path), "progress": False}
    return Config(**given | FAULTY[which] | settings)


def check_faults(tmp_path, monkeypatch, which, step):
    # Half of a run's time, and nothing that a fault meets.
    monkeypatch.setattr(os, "fsync", lambda file: None)
    version = functools.cache(importlib.metadata.version)
    monkeypatch.setattr(importlib.metadata, "version", version)
    known = {}
    for iterations in (1, 2):
        result = train(config(tmp_path / f"{iterations}", which, total_iterations=iterations))
        whole, at, _ = saved(result.run_dir)
        known[whole] = at
    assert sorted(known.values()) == [1, 2]
    line, found = 0, set()
    while True:
        out_dir = tmp_path / f"line {line}"
        with monkeypatch.context() as patch:
            injection = Injection(patch, line)
            # A thread of its own: a fault in the line that leaves a `with torch.no_grad()` leaves
            # torch's mode behind, which belongs to the thread.
            with ThreadPoolExecutor(1) as thread:
                fault = thread.submit(train, config(out_dir, which, total_iterations=2)).exception()
        if fault is None:
            assert injection.lines <= line
            break
        assert isinstance(fault, Fault), injection.where
        (run_dir,) = out_dir.iterdir()
        content, at, rows = saved(run_dir)
        assert known.get(content) == at, injection.where
        # A row may be there before its state, never after it.
        assert at <= rows <= 2, injection.where
        found.add((at, rows))
        line += step
    # A few lines only follow the last save.
    assert found >= ({(1, 1), (2, 2)} if step == 1 else {(1, 1)})
    return line


@pytest.mark.parametrize("which", FAULTY)
def test_a_fault_at_some_lines_leaves_the_state_before_or_after(tmp_path, monkeypatch, which):
    assert check_faults(tmp_path, monkeypatch, which, step=41) > 600


@pytest.mark.slow
@pytest.mark.parametrize("which", FAULTY)
def test_a_fault_at_every_line_leaves_the_state_before_or_after(tmp_path, monkeypatch, which):
    assert check_faults(tmp_path, monkeypatch, which, step=1) > 600
