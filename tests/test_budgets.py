"""What an iteration asks of a GPU, and how often the host waits for it: counted, so as not to rise.

Whole runs on a device that is not there (`pretend`), with twins in place of Triton's kernels.
"""

import json
import sys
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from pretend import Tally, pretended

pytest.importorskip("triton", reason="needs triton, which is for Linux")

from twins import twins, without_triton

from vecpg import distributed
from vecpg.config import Config
from vecpg.envs import make_envs
from vecpg.kernels import graphs
from vecpg.policy import Policy
from vecpg.returns.checks import check_gamma
from vecpg.rollout import Rollout, choose_collector, collect
from vecpg.rollout.statistics import episode_statistics
from vecpg.train import train

LOOP: Any = sys.modules[train.__module__]
PHASES = ("collect", "episode_statistics", "predict", "advantages", "update", "fit", "commit")
# Each function that is called in one, the phase, and where the loop finds it.
CALLED = {
    "weigh": ("advantages", LOOP),
    "advantages_of": ("advantages", LOOP),
    "episode_statistics": ("episode_statistics", distributed),
    "commit": ("commit", LOOP.Outcomes),
    **{name: (name, LOOP) for name in ("collect", "predict", "update", "fit")},
}
ITERATIONS = 4
BLOCK = 16


class Iteration(NamedTuple):
    """Of how many rows it was, and what was counted."""

    length: int
    operations: Tally
    waits: Tally
    looks: Tally
    unordered: Tally

    def phases(self) -> dict[str, int]:
        """The operations of each phase; "" = outside of all."""
        return {name: self.operations.of(name) for name in (*PHASES, "")}


class Counted(NamedTuple):
    """A run: its iterations, the lines of metrics.jsonl without times, its last parameters."""

    iterations: list[Iteration]
    rows: list[dict[str, float]]
    parameters: list[torch.Tensor]


def run(tmp_path, *, triton=True, replayed=True, device="cuda", **settings):
    """Train, and count.

    triton: is installed, and its kernels' twins are called.
    replayed: CUDA graphs are there; else everything is done op by op.
    """
    settings = {
        "env_id": "CartPole-v1",
        "num_envs": 8,
        "num_steps": 20,
        "max_episode_steps": 30,
        "total_iterations": ITERATIONS,
        "target_return": None,
        "eval_episodes": 1,
        "value_steps": 3,
        "progress": False,
        "log_every": 1e9,
        "save_every": 1e9,
    } | settings
    config = Config(device=device, vectorization="tensor", out_dir=str(tmp_path), **settings)
    iterations, lengths = [], []
    with ExitStack() as undone:
        on = undone.enter_context(pretended())
        undone.enter_context(twins() if triton else without_triton())
        if not replayed:
            as_it_is = mock.patch.object(graphs, "capture", lambda function, *of: function)
            undone.enter_context(as_it_is)

        def cut():
            if lengths:
                tallies = on.operations, on.waits, on.looks, on.unordered
                iterations.append(Iteration(lengths[-1], *tallies))
            on.clear()

        def counting(phase, function):
            def call(*args, **kwargs):
                if phase == "collect":
                    cut()
                with on.phase(phase):
                    result = function(*args, **kwargs)
                if isinstance(result, Rollout):
                    lengths.append(len(result.mask))
                return result

            return call

        for name, (phase, owner) in CALLED.items():
            new = counting(phase, getattr(owner, name))
            undone.enter_context(mock.patch.object(owner, name, new))
        result = train(config)
        cut()
        parameters = [each.detach().cpu() for each in result.policy.parameters()]
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    return Counted(iterations, [*map(without_times, lines)], parameters)


def without_times(line):
    row = json.loads(line)
    return {name: row[name] for name in row if name != "charts/SPS" and "perf/" not in name}


def check_waits(counted, target=False):
    """Nothing is waited for but, with a target, once an iteration for all of its numbers."""
    assert len(counted.iterations) == ITERATIONS
    # The first comes to a log line; after the last there is an evaluation.
    for each in counted.iterations[1:-1]:
        assert each.waits.of() == each.waits.of("commit", "tolist") == target, each.waits
        assert each.looks.of() == each.looks.of("collect") <= each.length // BLOCK
    last = counted.iterations[-1]
    assert last.waits.of("commit") == 1
    assert not any(last.waits.of(phase) for phase in PHASES[:-1]), last.waits
    assert not any(each.unordered for each in counted.iterations)


# -- A row ---------------------------------------------------------------------------------------

# Operations that begin a collection, of a block of rows, and of the random numbers of 256 rows.
ROWS = {
    ("CartPole-v1", "cuda"): (1, 134, 0),
    ("CartPole-v1", "reference"): (149, 935, 148),
    ("Pendulum-v1", "cuda"): (1, 118, 0),
    ("Pendulum-v1", "reference"): (148, 886, 145),
}
LIMITS = {"cuda": 12, "reference": 60}


@pytest.mark.parametrize(("env_id", "backend"), ROWS)
def test_a_row(monkeypatch, env_id, backend):
    monkeypatch.setattr(graphs, "capture", lambda function, *of: function)
    with pretended() as on, twins():
        envs = make_envs(env_id, 8, vectorization="tensor", device="cuda", max_episode_steps=500)
        policy = Policy(envs.single_observation_space, envs.single_action_space).to("cuda")
        kept = choose_collector(envs, policy, backend).prepare(envs, policy, 40).kept

        def operations(function):
            on.clear()
            with torch.inference_mode():
                function()
            assert not on.waits
            assert not on.unordered
            return on.operations.of()

        numbers = 0 if backend == "cuda" else operations(kept._draw_all_numbers)
        counted = operations(kept._begin), operations(kept._block), numbers
    assert counted == ROWS[env_id, backend]
    assert kept.between == BLOCK
    assert backend == "cuda" or kept._rows_of_noise == 256
    assert counted[1] / BLOCK + numbers / 256 <= LIMITS[backend]


def test_a_discount_in_a_tensor_of_the_host_is_a_number():
    """Copied to the device it would be waited for, and read again with every reward."""
    rewards = torch.ones(5, 2, device="meta")
    assert check_gamma("gamma", torch.tensor(0.5), rewards) == (0.5, None)


# -- A run ---------------------------------------------------------------------------------------


def test_nothing_is_waited_for_between_log_lines(tmp_path):
    check_waits(run(tmp_path))


def test_with_a_target_the_host_reads_once_an_iteration(tmp_path):
    check_waits(run(tmp_path, target_return=1e9), target=True)


def test_the_best_of_iterations_that_are_read_late_is_the_policy_that_collected(tmp_path):
    late, at_once = (run(tmp_path, device=each, return_window=8) for each in ("cuda", "cpu"))
    for best, expected in zip(late.parameters, at_once.parameters, strict=True):
        torch.testing.assert_close(best, expected, rtol=1e-4, atol=1e-5)


def test_what_is_to_be_saved_is_read(tmp_path):
    counted = run(tmp_path, save_every=1e-6, total_iterations=3)
    assert [each.waits.of("commit", "tolist") for each in counted.iterations] == [1, 1, 1]


def test_who_reads_a_number_is_found(tmp_path, monkeypatch):
    """And where, by this test."""
    module = sys.modules["vecpg.update"]
    finite = module.finite

    def read(parameters):
        found = finite(parameters)
        found.item()
        return found

    monkeypatch.setattr(module, "finite", read)
    counted = run(tmp_path)
    with pytest.raises(AssertionError):
        check_waits(counted)
    for each in counted.iterations[1:-1]:
        assert each.waits.of() == each.waits.of("update", "item", "tests/test_budgets.py") == 1


# Operations of an iteration of 3 blocks, where all is done op by op; "" = outside of the phases.
DEFAULT = {
    "collect": 555,
    "episode_statistics": 32,
    "predict": 0,
    "advantages": 7,
    "update": 96,
    "fit": 0,
    "commit": 0,
    "": 10,
}
WITH_VALUES = {"predict": 19, "fit": 144}
PENDULUM = {"collect": 372, "update": 111, "": 11}
CASES = {
    "leave_one_out": ({}, {}),
    "none": ({"baseline": "none"}, {"advantages": 2}),
    "mean": ({"baseline": "mean"}, {"advantages": 14}),
    "timestep_mean": ({"baseline": "timestep_mean"}, {}),
    "value": ({"baseline": "value"}, WITH_VALUES | {"advantages": 5}),
    "bootstrapped": (
        {"baseline": "value", "bootstrap_truncations": True},
        WITH_VALUES | {"advantages": 13, "fit": 152},
    ),
    "gae": ({"baseline": "value", "weights": "gae"}, WITH_VALUES | {"advantages": 2}),
    "full_return": ({"weights": "full_return"}, {"advantages": 19}),
    "normalized": ({"normalize": True}, {"advantages": 36}),
    "clipped": ({"max_grad_norm": 0.5}, {"update": 101}),
    "entropy": ({"ent_coef": 0.01}, {}),
    "dropout": ({"dropout": 0.1}, {"collect": 1135, "update": 238}),
    "observed": ({"normalize_obs": True}, {"collect": 1195, "update": 131, "": 13}),
    "target": ({"target_return": 1e9}, {"commit": 8, "": 4}),
    "Pendulum": ({"env_id": "Pendulum-v1"}, PENDULUM),
    "own_log_std": (
        {"env_id": "Pendulum-v1", "log_std": "network"},
        PENDULUM | {"collect": 1239, "": 10},
    ),
}
# The same where graphs are replayed: what the host launches.
REPLAYED = DEFAULT | {"collect": 23, "update": 41}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_of_the_cpu_and_replayed_bit_for_bit(tmp_path, case):
    settings, expected = CASES[case]
    replayed = run(tmp_path, **settings)
    one_by_one = run(tmp_path, replayed=False, **settings)
    assert one_by_one.iterations[2].phases() == DEFAULT | expected
    if case == "leave_one_out":
        assert replayed.iterations[2].phases() == REPLAYED
    for counted in (replayed, one_by_one):
        check_waits(counted, target="target_return" in settings)
    check_same_bits(replayed, one_by_one)
    check_close(replayed.rows, run(tmp_path, device="cpu", **settings).rows)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["leave_one_out", "bootstrapped", "dropout", "Pendulum"])
def test_so_is_one_without_triton(tmp_path, case):
    settings, _ = CASES[case]
    replayed = run(tmp_path, triton=False, **settings)
    check_waits(replayed)
    check_same_bits(replayed, run(tmp_path, triton=False, replayed=False, **settings))
    check_close(replayed.rows, run(tmp_path, device="cpu", **settings).rows)


def check_same_bits(one, other):
    assert one.rows == other.rows
    assert len(one.rows) == ITERATIONS
    assert all(map(torch.equal, one.parameters, other.parameters))


def check_close(rows, expected):
    """Of the same actions."""
    for row, wanted in zip(rows, expected, strict=True):
        numbers = {name: number for name, number in wanted.items() if number is not None}
        assert [name for name in row if row[name] is not None] == [*numbers]
        assert {name: row[name] for name in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-5)


def test_what_the_host_has_stepped_it_counts():
    """Nothing that is made of such a rollout waits: see `Rollout.counted`."""
    with pretended() as on:
        envs = make_envs("CartPole-v1", 3, vectorization="sync")
        policy = Policy(envs.single_observation_space, envs.single_action_space).to("cuda")
        rollout = collect(envs, policy, num_steps=5, seed=1, iteration=0, wait=False)
        on.clear()
        episodes = episode_statistics(rollout)
        assert not on.waits
        places = rollout.mask.cpu().reshape(-1).nonzero()[:, 0]
        assert torch.equal(rollout.places().cpu(), places)
        assert int(episodes.lengths.sum().cpu()) == len(places)
        assert len(episodes.returns) == int(rollout.dones.sum().cpu())
    envs.close()
