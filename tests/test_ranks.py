"""Any number of ranks leaves the same behind; and how often they wait for each other."""

import json
import os
import signal

import pytest
import torch
from conftest import last
from ranks import (
    Agent,
    Hung,
    Torchrun,
    combine,
    command,
    flags,
    in_ranks,
    train_and_count,
    train_here,
)
from test_run_files import left_behind, rows, the_run

from vecpg.kernels.sums import in_order

BASE = {
    "num_envs": 24,
    "shards": 12,
    "total_iterations": 6,
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


def run_of(ranks, folder, **settings):
    """The directory of a run of so many ranks; None: of one process that torchrun did not start."""
    out_dir = folder / f"runs of {ranks}"
    given = BASE | settings | {"out_dir": str(out_dir)}
    ended = in_ranks(ranks, train_here, given, folder=folder / f"of {ranks}")
    assert [each.code for each in ended] == [0] * (ranks or 1), ended
    return the_run(out_dir)


# Of each which numbers of ranks are to be like one process.
LONG = {"num_envs": 48, "total_iterations": 20}
SETTINGS = {
    "the default": (LONG | {"max_episode_steps": None}, (1, 2, 3, 4)),
    "sync": (LONG | {"vectorization": "sync"}, (2, 3, 4)),
    "async": ({"vectorization": "async"}, (2,)),
    "a pool": ({"vectorization": "async", "envs_per_worker": 3, "baseline": "none"}, (3,)),
    "Gaussian": ({"env_id": "Pendulum-v1"}, (2, 4)),
    "Gaussian, its deviation of each observation": (
        {"env_id": "Pendulum-v1", "log_std": "network", "normalize_obs": True},
        (4,),
    ),
    "dropout": ({"dropout": 0.2}, (3,)),
    "normalized": ({"normalize": True}, (2, 4)),
    "normalized observations": ({"normalize_obs": True, "weights": "full_return"}, (3,)),
    "value": ({"baseline": "value", "value_steps": 3}, (4,)),
    "gae": (
        {
            "env_id": "Pendulum-v1",
            "weights": "gae",
            "baseline": "value",
            "value_steps": 2,
            "bootstrap_truncations": True,
            "normalize": True,
            "normalize_obs": True,
        },
        (3,),
    ),
    "mean": ({"baseline": "mean", "reduction": "step"}, (2,)),
    "timestep_mean": ({"baseline": "timestep_mean", "reduction": "sum"}, (3,)),
    "of all sizes": ({"max_grad_norm": 0.1, "ent_coef": 0.01}, (4,)),
    "masked": ({"env_id": "environments:Masked-v0", "action_masks": True}, (2,)),
    "several episodes": ({"num_steps": 60}, (4,)),
    "a network of one's own": ({"network": "networks:small"}, (4,)),
    "numbers for observations": ({"env_id": "FrozenLake-v1", "num_steps": 40}, (2,)),
    "a run that is solved": (
        {"target_return": 24, "return_window": 20, "total_iterations": 100},
        (4,),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_any_number_of_ranks_leaves_the_same_behind(tmp_path, name):
    """Every bit of parameters, optimizers, statistics, return window, metrics, curves, summary."""
    settings, several = SETTINGS[name]
    alone = left_behind(run_of(None, tmp_path, **settings))
    *_, summary = alone
    assert summary["shards"] == 12
    assert summary["solved"] is (True if name == "a run that is solved" else None)
    for ranks in several:
        found = left_behind(run_of(ranks, tmp_path, **settings))
        for one, other in zip(found, alone, strict=True):
            assert one == other, f"{ranks} ranks"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 12])
def test_shards_of_all_ranks_are_added_in_their_order(tmp_path, ranks):
    """Numbers of all sizes, whose sum depends on it; what a run adds seldom is of such."""
    numbers = torch.Generator().manual_seed(ranks)
    sizes = 10.0 ** torch.randint(-12, 12, (12, 500), generator=numbers)
    added = [*torch.randn(12, 500, generator=numbers, dtype=torch.float64) * sizes]
    kept = [*torch.randn(12, 3, generator=numbers, dtype=torch.float64)]
    assert not torch.equal(in_order(added), in_order(added[::-1]))
    for each in in_ranks(ranks, combine, BASE, added, kept, folder=tmp_path / "ranks"):
        assert each.code == 0, each.stderr
        total, every = each.result
        assert torch.equal(total, in_order(added))
        assert torch.equal(torch.stack(every), torch.stack(kept))


@pytest.mark.slow
def test_eight_ranks_are_one(tmp_path):
    one, eight = (left_behind(run_of(ranks, tmp_path, num_envs=16, shards=8)) for ranks in (1, 8))
    assert one == eight


@pytest.mark.slow
def test_without_shards_ranks_differ_by_rounding(tmp_path):
    found = {ranks: run_of(ranks, tmp_path, **LONG, shards=None) for ranks in (None, 1, 2, 4)}
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
            assert ours.keys() == theirs.keys()
            pairs = [(ours[key], theirs[key]) for key in ours if theirs[key] is not None]
            for one, other in pairs:
                assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_torchrun_leaves_what_one_process_does(tmp_path):
    """Real ranks, from the command line; stdout carries one line."""
    settings = BASE | {"progress": False}
    words = flags(**settings, out_dir=str(tmp_path / "alone"))
    (alone,) = in_ranks(None, command, *words, folder=tmp_path / "of one")
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
    "several episodes": ({"num_steps": 70}, 2),
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
@pytest.mark.parametrize(
    ("name", "shards"),
    [(name, 4) for name in PER_ITERATION]
    + [(name, None) for name in ("the default", "everything")],
)
def test_collectives_of_an_iteration_are_counted(tmp_path, name, shards):
    """For each option as often as it says, with shards and without."""
    settings, expected = PER_ITERATION[name]
    given = BASE | {"num_envs": 8, "shards": shards, "total_iterations": 4} | settings
    given["out_dir"] = str(tmp_path / "runs")
    ended = in_ranks(2, train_and_count, given, folder=tmp_path / "ranks")
    assert [each.code for each in ended] == [0, 0], ended
    assert ended[0].result == ended[1].result
    called = [[]]
    for name in ended[0].result:
        if name is None:
            called.append([])
        else:
            called[-1].append(name)
    before_and_first, *others, after = called
    assert [len(each) for each in others] == [expected] * 3
    kinds = {name for each in others for name in each}
    assert len(kinds) == 1
    assert kinds <= ({"allgather", "_allgather_base"} if shards else {"allreduce"})
    assert before_and_first.count("broadcast") == 1  # of the parameters
    assert len(after) <= 2


@pytest.mark.slow
def test_one_rank_alone_waits_for_nobody(tmp_path):
    settings = BASE | {"out_dir": str(tmp_path / "runs")}
    (ended,) = in_ranks(1, train_and_count, settings, folder=tmp_path / "ranks")
    assert (ended.code, ended.result) == (0, [None] * 6)
