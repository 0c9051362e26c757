"""What a cell times is what it counts, and what bounds it."""

import dataclasses
import platform

import numba
import numpy as np
import pytest
import torch
from pretend import pretended
from torch.utils.flop_counter import FlopCounterMode
from twins import twins

from vecpg.advantage import advantages
from vecpg.envs import make_envs
from vecpg.kernels import threads
from vecpg.measure import cells, timing
from vecpg.measure.cells import FLOPS, Case, Cell, CheckFailed, Limit, prepared
from vecpg.measure.timing import Pace
from vecpg.policy import Policy
from vecpg.rollout import collect
from vecpg.update import update

TRAIN = Case("train", "cpu", "sync", 2)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(cells, "_STEPS", {"sync": 64})
    monkeypatch.setattr(cells, "_STEPS_ELSEWHERE", 64)
    monkeypatch.setattr(cells, "_PRODUCT_SIDE", {"cpu": 16})


@pytest.fixture
def spy(monkeypatch):
    """Calls of the functions that a cell uses: name, arguments and result of each."""
    calls = []

    def watch(*names):
        for name in names:
            monkeypatch.setattr(cells, name, watched(name, getattr(cells, name)))
        return calls

    def watched(name, real):
        def call(*args, **settings):
            result = real(*args, **settings)
            calls.append((name, args, settings, result))
            return result

        return call

    return watch


def test_operations_are_those_that_torch_counts():
    envs = make_envs("CartPole-v1", 1, vectorization="sync")
    policy = Policy(envs.single_observation_space, envs.single_action_space)
    rows = 8
    with FlopCounterMode(display=False) as counter:
        log_probs, _ = policy.log_probs_and_entropy(torch.randn(rows, 4), torch.zeros(rows).long())
    forwards = counter.get_total_flops()
    with counter:
        log_probs.sum().backward()
    backwards = counter.get_total_flops()
    assert forwards == rows * FLOPS["collect"]
    assert forwards + backwards == rows * FLOPS["update"]
    assert FLOPS["train"] == FLOPS["collect"] + FLOPS["update"]


def test_a_product_is_on_every_core_and_leaves_torch_one_thread(monkeypatch):
    seen = []
    real = torch.mm

    def mm(*args, **settings):
        seen.append(torch.get_num_threads())
        return real(*args, **settings)

    monkeypatch.setattr(cells, "cores", lambda: 3)
    with prepared(Case("collect", "cpu", "tensor", 2)) as cell:
        monkeypatch.setattr(torch, "mm", mm)
        product = cell.limit.run()
        assert torch.get_num_threads() == 1
    assert seen == [3]
    assert product.shape == (16, 16)
    assert product.unique().tolist() == [16.0]
    assert cell.limit.units == 2 * 16**3 / FLOPS["collect"]


@pytest.mark.parametrize(
    ("case", "moved"),
    [
        (Case("returns", "cpu", None, 2), 9 * 256),
        # Four variables, an action and a length in; these without the action, with an observation,
        # a reward and two flags, out.
        (Case("stepping", "cpu", "tensor", 2), 2 * (16 + 8 + 8 + 16 + 8 + 16 + 4 + 2)),
    ],
)
def test_a_copy_reads_and_writes_what_its_cell_has_to(case, moved):
    with prepared(case) as cell:
        copied = cell.limit.run()
    assert copied.nbytes == moved // 2
    assert cell.limit.units == (256 if case.thing == "returns" else 2)


def test_bare_steps_are_counted_one_by_one():
    class Envs:
        rows = 0

        def step(self, actions):
            assert len(actions) == 2
            self.rows += 1

    envs = Envs()
    limit = cells._limit_of_steps(envs, TRAIN)
    limit.run()
    assert limit.units == 2 * envs.rows > 0


@pytest.mark.parametrize("thing", ["collect", "train"])
@pytest.mark.parametrize("kind", ["sync", "tensor"])
def test_what_is_timed_is_what_was_checked_and_counted(spy, thing, kind):
    calls = spy("collect", "check_cartpole")
    with prepared(Case(thing, "cpu", kind, 2)) as cell:
        checked = next(args[0] for name, args, _, _ in calls if name == "check_cartpole")
        calls.clear()
        cell.run()
        _, _, settings, rollout = next(call for call in calls if call[0] == "collect")
    assert settings == {"num_steps": 32, "seed": 1, "iteration": 0}
    assert torch.equal(rollout.mask, checked.mask)
    assert torch.equal(rollout.obs, checked.obs)
    assert not rollout.mask.all()
    assert cell.units == rollout.mask.sum()
    assert cell.counted == pytest.approx(rollout.mask.float().mean().item())


def test_an_iteration_is_whole_and_leaves_the_policy_as_it_was(spy, monkeypatch):
    calls = spy("collect", "episode_statistics", "advantages", "update")
    waits = []
    with prepared(TRAIN) as cell:
        calls.clear()
        monkeypatch.setattr(cells, "wait_for", waits.append)
        cell.run()
    assert [name for name, *_ in calls] == ["collect", "episode_statistics", "advantages", "update"]
    rollout, weights = calls[0][3], calls[2][3]
    policy, optimizer, updated, given, config = calls[3][1]
    assert (updated, given) == (rollout, weights)
    assert optimizer.lr == 0.0
    assert optimizer.parameters == list(policy.parameters())
    assert (config.num_envs, config.num_steps, config.baseline) == (2, 32, "leave_one_out")
    assert waits == ["cpu"] * 4, "the device has nothing left to do at the end of each phase"


def test_returns_and_the_update_are_of_every_row(spy):
    calls = spy("reward_to_go", "update")
    with prepared(Case("returns", "cpu", None, 2)) as cell:
        calls.clear()
        cell.run()
    (_, (rewards, dones, gamma), settings, _) = calls.pop()
    assert (rewards.shape, dones.shape, gamma) == ((128, 2), (128, 2), 0.99)
    assert settings["out"].shape == (128, 2)
    with prepared(Case("update", "cpu", None, 2)) as cell:
        calls.clear()
        cell.run()
    (_, (_, optimizer, rollout, weights, _), _, _) = calls.pop()
    assert rollout.mask.all()
    assert cell.units == rollout.mask.numel() == weights.numel() == 64
    assert optimizer.lr == 0.0


def test_kernels_have_every_core_and_torch_has_one_thread(monkeypatch):
    monkeypatch.setattr(cells, "cores", lambda: 5)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with prepared(Case("returns", "cpu", None, 2)):
            assert (torch.get_num_threads(), threads.count()) == (1, 5)
        assert (torch.get_num_threads(), threads.count()) == (2, 2)
    finally:
        torch.set_num_threads(before)


def spoilt(spoil):
    def wrong(envs, policy, **settings):
        rollout = collect(envs, policy, **settings)
        spoil(rollout)
        return rollout

    return wrong


def no_end(rollout):
    rollout.terminations[:, 1] = rollout.truncations[:, 1] = False


def paid_twice(rollout):
    rollout.rewards[0, 0] = 2.0


def wrong_here_and_there(rollout):
    rollout.obs[3:6] += 0.01  # no episode is over by then, so none starts there


def cut(rollout):
    rollout.terminations[2] = True
    rollout.mask[3:] = False
    rollout.rewards[3:] = 0
    rollout.terminations[3:] = rollout.truncations[3:] = False


def ends_as_by_the_limit(rollout):
    rollout.truncations.logical_or_(rollout.terminations)


def started_elsewhere(rollout):
    rollout.obs[0, 0, 0] = 0.06


def another_action(rollout):
    place = rollout.dones[:, 1].nonzero()[0, 0]  # the replay of it would still end
    rollout.actions[place, 1] = 1 - rollout.actions[place, 1]


def without_its_last_episode(rollout):
    last = rollout.dones[:, 1].nonzero()[-1, 0]
    before = rollout.dones[:last, 1].nonzero()[-1, 0]
    for field in ("mask", "terminations", "truncations"):
        getattr(rollout, field)[before + 1 :, 1] = False
    rollout.rewards[before + 1 :, 1] = 0


@pytest.mark.parametrize(
    ("spoil", "problem", "kind"),
    [
        (no_end, "a copy finished no episode", "sync"),
        (paid_twice, "a reward is not 1", "tensor"),
        (wrong_here_and_there, "is not CartPole's", "sync"),
        (wrong_here_and_there, "is not CartPole's", "tensor"),
        (cut, "is not CartPole's", "tensor"),
        (ends_as_by_the_limit, "a limit is not 500 steps", "sync"),
        (started_elsewhere, "does not start as CartPole does", "tensor"),
        (another_action, "actions differ from what the policy draws|is not CartPole's", "sync"),
        (another_action, "actions differ from what the policy draws|is not CartPole's", "tensor"),
        (without_its_last_episode, "was not played for 32 steps and to an end", "sync"),
    ],
)
def test_what_is_wrong_in_a_few_rows_is_not_timed(monkeypatch, spoil, problem, kind):
    monkeypatch.setattr(cells, "collect", spoilt(spoil))
    with pytest.raises(CheckFailed, match=problem), prepared(Case("collect", "cpu", kind, 2)):
        pass


def test_a_longer_window_is_not_timed(monkeypatch):
    def longer(envs, policy, *, num_steps, **settings):
        return collect(envs, policy, num_steps=8 * num_steps, **settings)

    monkeypatch.setattr(cells, "collect", longer)
    with (
        pytest.raises(CheckFailed, match="was not played for 32 steps and to an end"),
        prepared(Case("collect", "cpu", "tensor", 2)),
    ):
        pass


def lazy_update(policy, optimizer, rollout, weights, config):
    """Nothing is differentiated."""


def update_of_a_quarter(policy, optimizer, rollout, weights, config):
    quarter = rollout.mask.clone()
    quarter[len(quarter) // 4 :] = False
    update(policy, optimizer, dataclasses.replace(rollout, mask=quarter), weights, config)


@pytest.mark.parametrize("thing", ["update", "train"])
@pytest.mark.parametrize("wrong", [lazy_update, update_of_a_quarter])
def test_an_update_of_less_is_not_timed(monkeypatch, thing, wrong):
    monkeypatch.setattr(cells, "update", wrong)
    kind = "sync" if thing == "train" else None
    with pytest.raises(CheckFailed, match="gradient"), prepared(Case(thing, "cpu", kind, 2)):
        pass


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rollout, config: rollout.rewards.clone(),
        lambda rollout, config: advantages(rollout, dataclasses.replace(config, baseline="none")),
        lambda rollout, config: advantages(rollout, dataclasses.replace(config, gamma=0.98)),
        lambda rollout, config: advantages(rollout, dataclasses.replace(config, baseline="mean")),
    ],
    ids=["rewards", "no baseline", "another discount", "another baseline"],
)
def test_other_advantages_are_not_timed(monkeypatch, wrong):
    monkeypatch.setattr(cells, "advantages", wrong)
    with pytest.raises(CheckFailed, match="advantages differ"), prepared(TRAIN):
        pass


@pytest.fixture
def measured(monkeypatch):
    """A cell of known times, measured; a round has so many calls."""

    def run(seconds, limit_seconds, *, calls=1, phases=None, **settings):
        phases = phases or {}
        cell = Cell(lambda: None, "things", 12, 3, 0.5, Limit("a wall", str, 60), phases)
        now, after = iter(seconds), iter(limit_seconds)

        def seconds_of(run, times, device):
            assert device == "cpu"
            assert times == calls
            for name, spent in phases.items():
                spent.append({"a": 3.0, "b": 1.0}[name])
            return next(after) if run is str else next(now)

        def calls_for(least, run, device):
            for spent in phases.values():
                spent.append(1000.0)  # while it warms up
            return calls

        class Prepared:
            def __init__(self, case):
                pass

            def __enter__(self):
                return cell

            def __exit__(self, *error):
                pass

        one = Case("returns", "cpu", None, 1)
        monkeypatch.setattr(timing, "measurable", lambda *asked: ([one], []))
        monkeypatch.setattr(timing, "prepared", Prepared)
        monkeypatch.setattr(timing, "seconds_of", seconds_of)
        monkeypatch.setattr(timing, "calls_for", calls_for)
        monkeypatch.setattr(timing, "_QUIET_SECONDS", 0)
        return timing.measure(("cpu",), (), (1,), **settings)["cells"][0]

    return run


def test_a_figure_is_units_over_seconds_beside_its_limit(measured, monkeypatch):
    monkeypatch.setattr(timing, "FULL", Pace(rounds=3))
    found = measured([2.0, 3.0, 4.0], [10.0, 12.0, 15.0], phases={"a": [], "b": []})
    assert (found["median"], found["limit"], found["of_limit"]) == (4.0, 5.0, 0.8)
    assert (found["limit_is"], found["unit"], found["rounds"]) == ("a wall", "things", 3)
    assert found["shares"] == {"a": 0.75, "b": 0.25}
    assert (found["seconds"], found["limit_seconds"]) == ([2.0, 3.0, 4.0], [10.0, 12.0, 15.0])


@pytest.mark.parametrize(("last", "noisy"), [(1.05, False), (2.0, True)])
def test_what_varies_is_marked(measured, monkeypatch, last, noisy):
    monkeypatch.setattr(timing, "FULL", Pace(rounds=4))
    assert measured([1.0, 1.0, last, last], [1.0] * 4)["noisy"] == noisy


def test_a_pace_counts_the_seconds_of_every_call(measured, monkeypatch):
    monkeypatch.setattr(timing, "FULL", Pace(rounds=9, seconds=8.0, fewest=2))
    assert measured([1.0] * 9, [1.0] * 9, calls=2)["rounds"] == 4
    monkeypatch.setattr(timing, "QUICK", Pace(rounds=2))
    assert measured([1.0] * 9, [1.0] * 9, quick=True)["rounds"] == 2


def test_an_error_costs_only_its_own_cell(monkeypatch):
    def failing(case, pace):
        if case.thing == "update":
            raise RuntimeError("no\n  memory")
        return {"thing": case.thing}

    monkeypatch.setattr(timing, "_measured", failing)
    found = timing.measure(("cpu",), (), (1,))
    assert found["cells"] == [{"thing": "returns"}]
    (left_out,) = found["not_run"]
    assert (left_out["thing"], left_out["failed"]) == ("update", True)
    assert left_out["reason"] == "no memory"


def test_no_path_is_in_a_reason(monkeypatch):
    def failing(case, pace):
        try:
            raise OSError(24, "Too many open files", "/home/ada/x")
        except OSError as error:
            raise ValueError("no environment: /home/ada/x") from error

    monkeypatch.setattr(timing, "_measured", failing)
    reasons = {one["reason"] for one in timing.measure(("cpu",), (), (1,))["not_run"]}
    assert reasons == {"Too many open files"}


def test_a_container_says_how_much_memory_there_is(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "_MEMORY_LIMIT", tmp_path / "memory.max")
    physical = timing.memory("cpu")
    assert physical > 2**20
    for text, expected in (("1048576\n", 2**20), ("max\n", physical), (f"{2**60}", physical)):
        (tmp_path / "memory.max").write_text(text)
        assert timing.memory("cpu") == expected


def test_a_fingerprint_has_nothing_of_its_owner():
    found = timing.machine()
    assert set(found) == {
        "vecpg",
        "python",
        "torch",
        "gymnasium",
        "numpy",
        "numba",
        "tensorboard",
        "platform",
        "cpu",
        "cores",
        "gpu",
        "kernel_threads",
        "torch_threads",
        "memory_gib",
        "load_average",
    }
    assert found["platform"] == f"{platform.system()} {platform.machine()}"
    assert found["memory_gib"] == pytest.approx(timing.memory("cpu") / 2**30, abs=0.05)


def test_bare_actions_are_of_both_kinds():
    taken = []

    class Envs:
        def step(self, actions):
            taken.extend(np.asarray(actions).tolist())

    run, _ = cells._bare(Envs(), Case("stepping", "cpu", "sync", 8))
    run()
    assert 0.2 < np.mean(taken) < 0.8


def test_what_compiles_in_a_round_is_no_figure(monkeypatch):
    monkeypatch.setattr(timing, "calls_for", lambda *_: 1)
    add = numba.njit(lambda x: x + 1)
    rounds = iter([1, 1, 1.0, 1.0])  # the first compiles, and the third for another type
    with pytest.raises(CheckFailed, match="compiled while it was timed"):
        timing._rounds(Cell(lambda: add(next(rounds)), "calls", 1, 1), "cpu", Pace(rounds=3))
    rounds = iter([1, 1.0, 1])
    seconds, _ = timing._rounds(Cell(lambda: add(next(rounds)), "calls", 1, 1), "cpu", Pace(3))
    assert len(seconds) == 3


@pytest.mark.slow
@pytest.mark.parametrize("thing", ["collect", "train", "update", "returns"])
def test_on_a_gpu_it_goes_the_way_of_training(thing, spy, monkeypatch):
    """On one that is pretended: chosen and prepared once, in CUDA graphs, and without a wait."""
    monkeypatch.setattr(cells, "_PRODUCT_SIDE", {"cuda": 16})
    calls = spy("collect", "update", "choose_collector", "choose_learner")
    with pretended() as device, twins():
        with prepared(Case(thing, "cuda", "tensor", 5)) as cell:
            chosen = [name for name, *_ in calls if name.startswith("choose")]
            assert chosen.count("choose_collector") == (thing in ("collect", "train"))
            assert chosen.count("choose_learner") == (thing in ("update", "train"))
            cell.run()
            calls.clear()
            monkeypatch.setattr(cells, "wait_for", lambda device: None)
            device.clear()
            cell.run()
            assert device.waits.of() == 0, device.waits
        ways = {name: settings["backend"] for name, _, settings, _ in calls}
        if "collect" in ways:
            assert ways["collect"].kept.graphs
        if "update" in ways:
            assert ways["update"]._gradient is not None
