"""What a caller of `train` hears after each iteration, and how it ends a run."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from conftest import digest, last

from vecpg.config import Config
from vecpg.evaluate import evaluate
from vecpg.run.interrupts import Interrupted
from vecpg.run.resume import stored_config
from vecpg.train import train


def short(tmp_path, **settings):
    given = {"num_envs": 4, "total_iterations": 5, "eval_episodes": 3, "progress": False}
    return Config(**(given | {"out_dir": str(tmp_path), "target_return": None} | settings))


def rows_of(run_dir):
    return [*map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())]


def left_behind(run_dir):
    """The state, and the rows without the clock."""
    state = {key: value for key, value in last(run_dir).items() if key != "seconds"}
    clock = ("charts/SPS", "perf/")
    rows = [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows_of(run_dir)]
    return digest(state), rows


@pytest.mark.parametrize("baseline", ["leave_one_out", "value"])
def test_every_row_is_heard_with_the_policy_that_acts_next(tmp_path, baseline):
    heard, policies = [], []

    def hear(row, policy):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        heard.append(dict(row))
        policies.append({name: value.clone() for name, value in policy.state_dict().items()})
        row.clear()  # it is the caller's own

    result = train(short(tmp_path, baseline=baseline, value_steps=2), hear)
    assert heard == rows_of(result.run_dir)
    assert digest(policies[-1]) == digest(last(result.run_dir)["policy"]["parameters"])
    assert len({digest(each) for each in policies}) == 5


@pytest.mark.parametrize("answer", [False, np.False_])
def test_false_ends_the_run_which_can_go_on(tmp_path, answer):
    whole = train(short(tmp_path / "whole"))
    part = train(short(tmp_path / "part"), lambda row, policy: row["iteration"] < 2 or answer)
    assert part.summary["iterations"] == len(rows_of(part.run_dir)) == 2
    assert part.summary["solved"] is None
    assert part.summary["eval_episodes"] == 3
    heard = []
    again = train(stored_config(part.run_dir), lambda row, policy: heard.append(row["iteration"]))
    assert heard == [3, 4, 5]
    assert left_behind(again.run_dir) == left_behind(whole.run_dir)


def test_a_run_that_is_ended_is_solved_by_its_own_rule_only(tmp_path):
    easy = {"target_return": 5.0, "return_window": 4}
    result = train(short(tmp_path, **easy), lambda row, policy: False)
    assert result.summary["solved"] is True
    hard = {"target_return": 400.0, "return_window": 4}
    result = train(short(tmp_path, **hard), lambda row, policy: False)
    assert (result.summary["solved"], result.summary["iterations"]) == (False, 1)


@pytest.mark.parametrize("answer", [None, 0, "", 0.0, [], True])
def test_no_other_answer_ends_it(tmp_path, answer):
    assert train(short(tmp_path), lambda row, policy: answer).summary["iterations"] == 5


def test_what_it_raises_ends_the_run_saved(tmp_path, caplog):
    caplog.set_level("INFO", logger="vecpg")
    whole = train(short(tmp_path / "whole"))

    def hear(row, policy):
        if row["iteration"] == 3:
            raise KeyError("of my own")

    with pytest.raises(KeyError, match="of my own"):
        train(short(tmp_path / "part"), hear)
    assert "saved after iteration 3; resume: " in caplog.text
    (run_dir,) = (tmp_path / "part").iterdir()
    assert len(rows_of(run_dir)) == 3
    assert left_behind(train(stored_config(run_dir)).run_dir) == left_behind(whole.run_dir)


def test_a_signal_interrupts_it_at_once(tmp_path):
    whole, reached = train(short(tmp_path / "whole")), []

    def hear(row, policy):
        if row["iteration"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append(row)

    with pytest.raises(Interrupted):
        train(short(tmp_path / "part"), hear)
    assert reached == []
    (run_dir,) = (tmp_path / "part").iterdir()
    assert len(rows_of(run_dir)) == 2
    assert left_behind(train(stored_config(run_dir)).run_dir) == left_behind(whole.run_dir)


def test_what_it_does_with_the_policy_beside_the_run_changes_no_bit(tmp_path):
    def hear(row, policy):
        evaluate(policy, "CartPole-v1", 2)
        policy.act(np.zeros(4), greedy=False)
        torch.manual_seed(0)
        torch.rand(3)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.zero_()  # it is a copy

    for vectorization in ("tensor", "sync"):
        how = {"vectorization": vectorization}
        plain = train(short(tmp_path / "plain", **how))
        heard = train(short(tmp_path / "heard", **how), hear)
        assert left_behind(heard.run_dir) == left_behind(plain.run_dir)


def test_no_checkpoint_is_newer_than_what_was_heard(tmp_path):
    """A caller that keeps something of its own finds it no older than the run."""
    heard = []
    seen = []

    def hear(row, policy):
        heard.append(row["iteration"])
        (run_dir,) = tmp_path.iterdir()
        seen.append(max(int(each.name) for each in (run_dir / "checkpoints").iterdir()))

    train(short(tmp_path, save_every=1e-9), hear)
    assert seen == [0, 1, 2, 3, 4]
    assert heard == [1, 2, 3, 4, 5]
