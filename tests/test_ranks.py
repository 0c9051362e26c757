"""Any number of ranks leaves the same behind; and how often they wait for each other."""

import json
import os
import signal

import pytest
import torch
from conftest import last
from ranks import Agent, Hung, Torchrun, command, flags, train_and_count, train_here
from test_run_files import left_behind, rows, the_run

BASE = {
    "num_envs": 48,
    "shards": 12,
    "total_iterations": 20,
    "max_episode_steps": 30,
    "hidden_sizes": (16, 16),
    "target_return": None,
    "eval_episodes": 3,
}


# -- What starts ranks ---------------------------------------------------------------------------


def report(*args):
    print("out", flush=True)
    os.system("echo err >&2")
    return (os.environ.get("RANK"), os.environ.get("WORLD_SIZE"), os.getcwd(), *args)


def end(how):
    if how == "raise":
        raise ZeroDivisionError("oh")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        signal.pause()
    raise SystemExit(how)


@pytest.mark.slow
def test_ranks_are_what_they_are_said_to_be(tmp_path):
    with Agent(tmp_path) as agent:
        ended = agent.run(3, report, "a", 1)
        assert [each.result for each in ended] == [
            (str(rank), "3", str(tmp_path / "start 1"), "a", 1) for rank in range(3)
        ]
        assert [each[:1] + each[2:] for each in ended] == [(0, "out\n", "err\n")] * 3
        (alone,) = agent.run(None, report)
        assert alone.result == (None, None, str(tmp_path / "start 2"))
        codes = [agent.run(1, end, how)[0].code for how in (0, None, 2, "words", "kill", "raise")]
        assert codes == [0, 0, 2, 1, -9, 1]
        with pytest.raises(Hung, match=r"ranks \[0, 1\] had not ended after 0.1 s"):
            agent.run(2, end, "hang", seconds=0.1)


# -- The same, whatever the number of ranks ------------------------------------------------------

SETTINGS = {
    "the default": {"max_episode_steps": None},
    "sync": {"vectorization": "sync"},
    "async": {"vectorization": "async"},
    "a pool": {"vectorization": "async", "envs_per_worker": 2},
    "Gaussian": {"env_id": "Pendulum-v1"},
    "Gaussian, its deviation of each observation": {
        "env_id": "Pendulum-v1",
        "log_std": "network",
        "normalize_obs": True,
    },
    "dropout": {"dropout": 0.2},
    "normalized": {"normalize": True},
    "normalized observations": {"normalize_obs": True},
    "value": {"baseline": "value", "value_steps": 3},
    "gae": {
        "env_id": "Pendulum-v1",
        "weights": "gae",
        "baseline": "value",
        "value_steps": 2,
        "bootstrap_truncations": True,
        "normalize": True,
        "normalize_obs": True,
    },
    "no baseline": {"baseline": "none", "weights": "full_return"},
    "mean": {"baseline": "mean", "reduction": "step"},
    "timestep_mean": {"baseline": "timestep_mean", "reduction": "sum", "learning_rate": 1e-4},
    "of all sizes": {"max_grad_norm": 0.1, "ent_coef": 0.01},
    "masked": {"env_id": "environments:Masked-v0", "action_masks": True},
    "several episodes": {"num_steps": 60, "vectorization": "sync", "baseline": "mean"},
    "a network of one's own": {"network": "networks:small"},
    "numbers for observations": {"env_id": "FrozenLake-v1", "num_steps": 40},
    "a run that is solved": {
        "target_return": 25,
        "return_window": 20,
        "total_iterations": 100,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_any_number_of_ranks_leaves_the_same_behind(tmp_path, name):
    """Every bit of parameters, optimizers, statistics, return window, metrics, curves, summary."""
    found = {}
    with Agent(tmp_path) as agent:
        for ranks in (None, 1, 2, 3, 4):
            out_dir = tmp_path / str(ranks)
            settings = BASE | SETTINGS[name] | {"out_dir": str(out_dir)}
            ended = agent.run(ranks, train_here, settings)
            assert [each.code for each in ended] == [0] * (ranks or 1), ended
            found[ranks] = left_behind(the_run(out_dir))
    alone = found[None]
    *_, summary = alone
    assert summary["shards"] == 12
    assert summary["solved"] is (True if name == "a run that is solved" else None)
    for ranks, each in found.items():
        for one, other in zip(each, alone, strict=True):
            assert one == other, f"{ranks} ranks"


@pytest.mark.slow
def test_eight_ranks_are_one(tmp_path):
    found = []
    with Agent(tmp_path) as agent:
        for ranks in (1, 8):
            settings = BASE | {"num_envs": 16, "shards": 8, "out_dir": str(tmp_path / str(ranks))}
            ended = agent.run(ranks, train_here, settings)
            assert {each.code for each in ended} == {0}, ended
            found.append(left_behind(the_run(tmp_path / str(ranks))))
    assert found[0] == found[1]


@pytest.mark.slow
def test_without_shards_ranks_differ_by_rounding(tmp_path):
    found = {}
    with Agent(tmp_path) as agent:
        for ranks in (None, 1, 2, 4):
            settings = BASE | {"shards": None, "out_dir": str(tmp_path / str(ranks))}
            ended = agent.run(ranks, train_here, settings)
            assert {each.code for each in ended} == {0}, ended
            found[ranks] = the_run(tmp_path / str(ranks))
    assert left_behind(found[None]) == left_behind(found[1])
    alone = last(found[None])
    for ranks in (2, 4):
        state = last(found[ranks])
        assert state["counters"] == alone["counters"]
        assert state["policy"]["parameters"].keys() == alone["policy"]["parameters"].keys()
        for name, tensor in alone["policy"]["parameters"].items():
            ours = state["policy"]["parameters"][name]
            torch.testing.assert_close(ours, tensor, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(rows(found[ranks]), rows(found[None]), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_torchrun_leaves_what_one_process_does(tmp_path):
    """Real ranks, from the command line; stdout carries one line."""
    settings = BASE | {"progress": False}
    with Agent(tmp_path) as agent:
        (alone,) = agent.run(None, command, *flags(**settings, out_dir=str(tmp_path / "alone")))
        assert alone.code == 0, alone
    with Torchrun(tmp_path / "ranks", *flags(**settings), ranks=3) as real:
        ended = real.wait()
    assert ended.code == 0, ended.stderr
    run_dir = the_run(tmp_path / "ranks" / "runs")
    assert left_behind(run_dir) == left_behind(the_run(tmp_path / "alone"))
    assert json.loads(ended.stdout) == json.loads((run_dir / "summary.json").read_text())


# -- How often they wait for each other ----------------------------------------------------------

PER_ITERATION = {
    "the default": ({}, 2),
    "normalized": ({"normalize": True}, 3),
    "value": ({"baseline": "value", "value_steps": 4}, 2 + 4),
    "normalized observations": ({"normalize_obs": True}, 2),
    "mean": ({"baseline": "mean"}, 2),
    "timestep_mean": ({"baseline": "timestep_mean"}, 2),
    "no baseline": ({"baseline": "none"}, 2),
    "everything": (
        {
            "baseline": "value",
            "value_steps": 2,
            "weights": "gae",
            "normalize": True,
            "normalize_obs": True,
            "max_grad_norm": 0.1,
            "ent_coef": 0.1,
        },
        2 + 1 + 2,
    ),
    "Gaussian": ({"env_id": "Pendulum-v1", "log_std": "network"}, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("shards", [4, None])
@pytest.mark.parametrize("name", PER_ITERATION)
def test_collectives_of_an_iteration_are_counted(tmp_path, name, shards):
    """Those of the beginning and the end do not depend on how many iterations there are."""
    settings, expected = PER_ITERATION[name]
    counts = {}
    with Agent(tmp_path) as agent:
        for iterations in (2, 7):
            ended = agent.run(
                2,
                train_and_count,
                BASE
                | {"num_envs": 8, "shards": shards, "out_dir": str(tmp_path / str(iterations))}
                | {"total_iterations": iterations}
                | settings,
            )
            assert [each.code for each in ended] == [0, 0], ended
            assert ended[0].result == ended[1].result
            counts[iterations] = ended[0].result
    assert sum(counts[7].values()) - sum(counts[2].values()) == 5 * expected, counts
    kinds = {kind for kind in counts[7] if counts[7][kind] > counts[2][kind]}
    assert len(kinds) == 1
    gathers = kinds <= {"allgather", "_allgather_base"}
    assert gathers if shards else kinds == {"allreduce"}


@pytest.mark.slow
def test_one_rank_alone_waits_for_nobody(tmp_path):
    with Agent(tmp_path) as agent:
        (ended,) = agent.run(1, train_and_count, BASE | {"out_dir": str(tmp_path / "runs")})
    assert (ended.code, ended.result) == (0, {})
