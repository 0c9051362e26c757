"""The runs of a population, dealt to ranks."""

import dataclasses
import json
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from ranks import Agent, Torchrun, command, flags
from test_run_files import left_behind

from vecpg import deal as module
from vecpg.config import Config, ConfigError
from vecpg.deal import Deal, Outcome
from vecpg.distributed import RanksLost
from vecpg.run.interrupts import Interrupted
from vecpg.run.members import Population, make_population_directory
from vecpg.torchrun import Place


class Killed(BaseException):
    """A rank is no more, and has said nothing."""


@pytest.fixture
def population(tmp_path):
    return Population(Config(out_dir=str(tmp_path / "runs"), seed=5, dist_timeout=60.0), 5)


@pytest.fixture
def start():
    """Call a function of `Deal` on every rank, each in a thread; what it returns or raises."""
    server = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def started(size, population, function):
        found = [None] * size

        def be(rank):
            own = population[rank] if isinstance(population, list) else population
            try:
                deal = Deal(own, Place(rank, size, rank, size, 0, 0, "x", "localhost", server.port))
                with deal:
                    try:
                        found[rank] = function(deal)
                    except Killed:
                        deal._say = lambda key, word: None
                        raise
            except BaseException as error:
                found[rank] = error

        ranks = [threading.Thread(target=be, args=(rank,)) for rank in range(size)]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join(60.0)
        return found

    return started


def begun(deal, population):
    """The directory, as the command has it."""
    if not deal.first:
        return deal.told()
    folder = deal.remembered() or make_population_directory(population)
    deal.remember(folder)
    deal.tell()
    return folder


def summary(seed):
    return {"seed": seed, "solved": True}


def test_each_run_is_one_ranks_and_all_hear_of_all(start, population):
    def rank(deal):
        begun(deal, population)
        own = list(deal.own(population.seeds))
        failed = [seed for seed in own if seed == 6]
        for seed in own:
            if seed not in failed:
                deal.ended(summary(seed))
        return own, deal.outcome(failed)

    for size, parts in {
        1: [[5, 6, 7, 8, 9]],
        2: [[5, 7, 9], [6, 8]],
        7: [[5], [6], [7], [8], [9], [], []],
    }.items():
        found = start(size, population, rank)
        assert [own for own, _ in found] == parts
        expected = Outcome([summary(seed) for seed in (5, 7, 8, 9)], [6], [], None)
        assert [outcome for _, outcome in found] == [expected] * size
        assert expected.unfinished == "1 of 5 runs failed: seed 6"


def test_without_torchrun_all_are_its_own(population):
    with Deal(population, None) as deal:
        assert deal.first
        assert deal.over_ranks == ""
        assert deal.own(population.seeds) == population.seeds
        assert deal.remembered() is None
        deal.remember(Path("x"))
        for seed in population.seeds:
            deal.ended(summary(seed))
        assert deal.outcome([]).unfinished == ""


def test_where_rank_0_has_nothing_to_begin_the_others_may(start, population):
    """All its runs had come to their end before."""

    def rank(deal):
        if deal.first:
            deal.remember(make_population_directory(population))
        else:
            deal.told()
        for seed in deal.own(population.seeds):
            deal.ended(summary(seed))
        return deal.outcome([])

    assert [outcome.missing for outcome in start(2, population, rank)] == [[], []]


@pytest.mark.parametrize(
    ("error", "others"),
    [
        (ConfigError("--gamma: no"), ConfigError("--gamma: no")),
        (Interrupted(signal.SIGTERM), Interrupted(signal.SIGTERM)),
        (ZeroDivisionError(), RanksLost("rank 0 failed")),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_as_rank_0_leaves_the_others_do(start, population, error, others, when):
    def rank(deal):
        if deal.first and when == "before":
            raise error
        begun(deal, population)
        if deal.first:
            raise error
        deal.outcome([])

    first, *rest = start(3, population, rank)
    assert first is error
    for each in rest:
        assert repr(each) == repr(others)
        assert vars(each) == vars(others)


def test_who_is_stopped_is_not_waited_for(start, population):
    def rank(deal):
        begun(deal, population)
        deal.ended(summary(deal.own(population.seeds)[0]))
        if not deal.first:
            raise Interrupted(signal.SIGINT)
        return deal.outcome([7])

    outcome = start(2, population, rank)[0]
    assert outcome == Outcome([summary(5), summary(6)], [7], [8, 9], signal.SIGINT)
    assert outcome.unfinished == (
        "1 of 5 runs failed: seed 7; 2 of 5 runs did not come to their end: seed 8, seed 9"
    )


@pytest.mark.slow
def test_who_is_alive_is_waited_for_and_who_is_dead_is_not(start, population):
    brief = Population(dataclasses.replace(population.config, dist_timeout=2.0), 5)

    def rank(deal):
        begun(deal, brief)
        (first, *_) = own = deal.own(brief.seeds)
        if first == 6:
            raise Killed
        if first == 7:
            time.sleep(3.0)
        for seed in own:
            deal.ended(summary(seed))
        return deal.outcome([])

    first, dead, slow = start(3, brief, rank)
    assert isinstance(dead, Killed)
    assert first == slow == Outcome([summary(seed) for seed in (5, 7, 8)], [], [6, 9], None)


def test_rank_0_may_die_too(start, population):
    brief = Population(dataclasses.replace(population.config, dist_timeout=1.0), 5)

    def rank(deal):
        if deal.first:
            raise Killed
        deal.told()

    error = start(2, brief, rank)[1]
    assert str(error) == "rank 0 has not been heard of for --dist-timeout 1 s"


def test_other_settings_and_another_disk_are_refused(start, population, tmp_path):
    other = dataclasses.replace(population.config, gamma=0.5)
    shown = dataclasses.replace(population.config, progress=True, resume="auto")
    words = "expected the same on every rank, got"
    for wrong, refusal in (
        (Population(other, 5), f"--gamma: {words} 0.99 on rank 0 and 0.5 on rank 2"),
        (Population(population.config, 4), f"--num-seeds: {words} 5 on rank 0 and 4 on rank 2"),
    ):
        found = start(3, [population, Population(shown, 5), wrong], pytest.fail)
        assert [str(each) for each in found] == [refusal] * 3
    found = start(2, [population, Population(shown, 5)], lambda deal: begun(deal, population))
    assert found[1] == found[0]

    def rank(deal):
        if not deal.first:
            return deal.told()
        deal.remember(tmp_path / "elsewhere")
        deal.tell()
        return None

    error = start(2, population, rank)[1]
    assert isinstance(error, ConfigError)
    assert "give an --out-dir that all machines share" in str(error)


def test_after_a_restart_the_directory_is_known_and_nothing_else(start, population):
    def rank(deal):
        folder = begun(deal, population)
        for seed in deal.own(population.seeds):
            deal.ended(summary(seed))
        return folder, deal.outcome([])

    (folder, _), _ = start(2, population, rank)
    # Of those it is told of now, none has ended.
    again = start(3, population, lambda deal: (begun(deal, population), deal.outcome([])))
    assert [found for found, _ in again] == [folder] * 3
    assert [outcome.missing for _, outcome in again] == [list(population.seeds)] * 3
    (folder / "population.json").unlink()  # as where nothing could be begun
    assert start(1, population, lambda deal: deal.remembered()) == [None]


def test_where_there_is_no_store_no_rank_begins(population, monkeypatch):
    def agent_store(place, seconds):
        raise torch.distributed.DistNetworkError("no connection")

    monkeypatch.setattr(module, "agent_store", agent_store)
    with pytest.raises(ConfigError, match="torchrun: the ranks did not come together: no connect"):
        Deal(population, Place(0, 2, 0, 2, 0, 0, "x", "localhost", 1))


def test_the_store_may_be_gone(population):
    server = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with Deal(population, Place(0, 1, 0, 1, 0, 0, "x", "localhost", server.port)) as deal:
        del server
        with pytest.raises(RanksLost, match="torchrun's store is gone"):
            deal.outcome([])


# -- The command, over ranks ---------------------------------------------------------------------

SETTINGS = {
    "num_envs": 6,
    "hidden_sizes": (8,),
    "max_episode_steps": 100,
    "learning_rate": 1e-4,
    "total_iterations": 150,
    "eval_episodes": 2,
    "return_window": 10,
    "progress": False,
    "out_dir": "../runs",
}


def given(num_seeds, **settings):
    return [*flags(**SETTINGS | settings), "--num-seeds", str(num_seeds)]


@pytest.fixture
def left(tmp_path):
    """What every run of the one population there has left behind."""

    def found(agent):
        (folder,) = (agent.folder / "runs").iterdir()
        runs = [path.parent for path in folder.glob("*/summary.json")]
        assert len(runs) == len(list(folder.glob("*/config.json")))
        return {
            json.loads((run / "summary.json").read_text())["seed"]: left_behind(run) for run in runs
        }

    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Five runs of one process, as its files and its stderr have them."""
    folder = tmp_path_factory.mktemp("alone")
    with Agent(folder) as agent:
        (ended,) = agent.run(None, command, *given(5))
    assert ended.code == 0
    (population,) = (folder / "runs").iterdir()
    return {
        json.loads((run.parent / "summary.json").read_text())["seed"]: left_behind(run.parent)
        for run in population.glob("*/summary.json")
    }, table(ended.stderr)


def table(stderr):
    lines = stderr.splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith("solved ")]
    return lines[start : start + 4]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_bit_depends_on_the_number_of_ranks(tmp_path, left, alone, ranks):
    with Agent(tmp_path) as agent:
        ended = agent.run(ranks, command, *given(5))
        assert [each.code for each in ended] == [0] * ranks
        assert left(agent) == alone[0]
    for rank, each in enumerate(ended):
        told = sorted(json.loads(line)["seed"] for line in each.stdout.splitlines())
        assert told == list(range(1, 6))[rank::ranks]
        assert each.stderr == "" or rank == 0
    assert table(ended[0].stderr) == alone[1]


@pytest.mark.slow
def test_killed_they_go_on_with_another_number_of_ranks(tmp_path, left, alone):
    settings = given(5, save_every=0.01)
    with Agent(tmp_path, max_restarts=2, stops_others=True) as agent:
        agent.start(3, command, *settings)
        agent.wait_for(lambda: any(agent.folder.glob("runs/*/*__2__*/checkpoints/[1-9]*")))
        agent.signal(signal.SIGKILL, 1)
        assert -signal.SIGKILL in [each.code for each in agent.wait()]
        # A membership change is no restart to torchrun.
        ended = agent.run(2, command, *settings)
        assert [each.code for each in ended] == [0, 0]
        assert left(agent) == alone[0]
    assert table(ended[0].stderr) == alone[1]


@pytest.mark.slow
@pytest.mark.parametrize("max_restarts", [0, 3])
def test_a_signal_to_all_saves_all(tmp_path, max_restarts):
    with Agent(tmp_path, max_restarts=max_restarts) as agent:
        agent.start(2, command, *given(5, total_iterations=100_000))
        agent.wait_for(lambda: len(list(agent.folder.glob("runs/*/*/checkpoints/0"))) >= 2)
        agent.signal(signal.SIGTERM)
        ended = agent.wait()
        assert [each.code for each in ended] == [0 if max_restarts else 143] * 2
        assert "every run was saved; resume: " in ended[0].stderr
        assert ended[1].stderr == ""


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_its_runs(tmp_path):
    with Agent(tmp_path, max_restarts=1) as agent:
        agent.start(2, command, *given(4, total_iterations=500))
        agent.wait_for(lambda: any(agent.folder.glob("runs/*/*__2__*/checkpoints/0")))
        agent.signal(signal.SIGTERM, 1)
        ended = agent.wait()
    assert [each.code for each in ended] == [0, 0]
    assert [json.loads(line)["seed"] for line in ended[0].stdout.splitlines()] == [1, 3]
    assert ended[0].stderr.count("solved ") == 1
    assert (
        "error: 2 of 4 runs did not come to their end: seed 2, seed 4; resume: " in ended[0].stderr
    )
    assert ended[0].stderr.endswith("stopped by SIGTERM\n")
    assert ended[1].stdout == ended[1].stderr == ""


@pytest.mark.slow
def test_runs_that_fail_are_named_once_and_all_ranks_exit_1(tmp_path):
    with Agent(tmp_path) as agent:
        ended = agent.run(2, command, *given(3, total_iterations=9, learning_rate=3e38))
    assert [each.code for each in ended] == [1, 1]
    (line,) = re.findall("^error: .*", "\n".join(each.stderr for each in ended), re.MULTILINE)
    assert line.startswith("error: 3 of 3 runs failed: seed 1, seed 2, seed 3; resume: ")
    assert "[rank 1] seed 2 failed: FloatingPointError" in ended[1].stderr


@pytest.mark.slow
def test_what_no_rank_can_begin_is_said_once_and_nothing_is_left(tmp_path):
    with Agent(tmp_path) as agent:
        ended = agent.run(3, command, *given(4, network="os:getcwd"))
    assert [each.code for each in ended] == [2, 2, 2]
    assert (
        len(re.findall("^.*error: .*", "".join(each.stderr for each in ended), re.MULTILINE)) == 1
    )
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_torchrun_itself_deals_them_and_a_rank_that_is_killed_is_no_loss(tmp_path, alone):
    options = ["--max-restarts", "2"]
    settings = given(5, out_dir="runs", save_every=0.01)
    with Torchrun(tmp_path, *settings, options=options) as real:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("runs/*/*__2__*/checkpoints/[1-9]*")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        real.ranks()[1].kill()
        ended = real.wait()
    assert ended.code == 0
    assert "(exitcode: -9)" in ended.stderr
    assert table(ended.stderr) == alone[1]
    told = [json.loads(line) for line in ended.stdout.splitlines()]
    assert {each["seed"] for each in told} == {1, 2, 3, 4, 5}
    found = {each["seed"]: left_behind(tmp_path / each["run_dir"]) for each in told}
    assert found == alone[0]
