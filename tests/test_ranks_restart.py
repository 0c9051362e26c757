"""Ranks that are killed, hang, fail, are told to stop, or start again; and what is refused."""

import json
import re
import signal
import time

import pytest
from conftest import last
from ranks import (
    Agent,
    Torchrun,
    command,
    each_its_own,
    evaluating_for,
    failing,
    failing_and_closing_never,
    flags,
    in_ranks,
    making_slowly,
    saving_slowly,
    signalled_after,
    train_and_die,
    train_and_die_at,
    train_here,
    train_then_die,
    train_twice,
    train_until_false,
)
from test_run_files import left_behind, rows, the_run

BASE = {
    "num_envs": 24,
    "shards": 12,
    "total_iterations": 8,
    "max_episode_steps": 30,
    "hidden_sizes": (8,),
    "target_return": None,
    "eval_episodes": 3,
    "save_every": 1e-9,
    "dist_timeout": 20.0,
}
ENDLESS = BASE | {"total_iterations": 1_000_000, "total_timesteps": None}


@pytest.fixture
def whole(tmp_path):
    """What a run leaves that one process makes, and nobody stops."""

    def run(**settings):
        out_dir = tmp_path / "whole"
        given = BASE | settings | {"out_dir": str(out_dir)}
        (ended,) = in_ranks(None, train_here, given, folder=tmp_path / "of the whole")
        assert ended.code == 0, ended.stderr
        return left_behind(the_run(out_dir))

    return run


def lines(out_dir):
    """How many iterations a run has made; 0 before there is one."""
    return sum(path.read_text().count("\n") for path in out_dir.glob("*/metrics.jsonl"))


def complaints(ended):
    """What a rank says that is not of every run."""
    usual = (
        "[a-zA-Z].* x |collecting|gradient|returns on|run directory|iteration|saved|every episode"
    )
    return re.findall(rf"^(?!{usual}|24 envs).+$", ended.stderr, re.M)


# -- Another number of ranks ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("vectorization", ["tensor", "sync"])
def test_a_run_that_is_killed_goes_on_with_other_numbers_of_ranks(tmp_path, whole, vectorization):
    settings = BASE | {"vectorization": vectorization, "out_dir": str(tmp_path / "runs")}
    reached = []
    for ranks, killed in ((4, 0), (2, 1), (3, 2), (None, None)):
        with Agent(tmp_path / f"of {ranks}") as agent:
            if killed is None:
                (ended,) = agent.run(ranks, train_here, settings)
                assert ended.code == 0, ended.stderr
            else:
                at = reached[-1] + 3 if reached else 2
                ended = agent.run(ranks, train_and_die, settings, killed, at)
                assert ended[killed].code == -signal.SIGKILL
                assert all(each.code != 0 for each in ended)
        run_dir = the_run(tmp_path / "runs")
        settings["resume"] = str(run_dir)
        reached.append(last(run_dir)["counters"]["iteration"])
    assert reached[0] >= 1
    assert reached == sorted(set(reached))
    assert left_behind(run_dir) == whole(vectorization=vectorization)


@pytest.mark.slow
def test_a_number_of_ranks_that_does_not_divide_is_refused_once(tmp_path):
    """By one line, whoever asks, also where it was started anew; nothing is written."""
    settings = BASE | {"out_dir": str(tmp_path / "runs"), "progress": False}
    with Agent(tmp_path / "before") as agent:
        assert agent.run(2, command, *flags(**settings))[0].code == 0
    run_dir = the_run(tmp_path / "runs")
    before = left_behind(run_dir)
    more = flags(resume=str(run_dir), total_iterations=9, progress=False)
    with Agent(tmp_path / "after", max_restarts=3) as agent:
        for restarts in (0, 1):
            ended = agent.run(5, command, *more, restarts=restarts)
            assert [each.code for each in ended] == [2] * 5
            said = [each.stderr for each in ended]
            assert said[1:] == [""] * 4
            if restarts == 0:
                (line,) = said[0].splitlines()
                assert "the run's 12 shards (1, 2, 3, 4, 6, 12), got 5" in line
            else:
                assert said[0] == ""
    assert left_behind(run_dir) == before


@pytest.mark.slow
def test_without_shards_a_run_keeps_those_of_the_ranks_it_began_with(tmp_path, whole):
    """So a number of ranks that divides theirs goes on, to rounding, and another is refused."""
    settings = BASE | {"shards": None, "out_dir": str(tmp_path / "runs"), "total_iterations": 4}
    ended = in_ranks(2, train_here, settings, folder=tmp_path / "two")
    assert [each.code for each in ended] == [0, 0], ended
    run_dir = the_run(tmp_path / "runs")
    settings = BASE | {"shards": None, "resume": str(run_dir)}
    for each in in_ranks(3, train_here, settings, folder=tmp_path / "three"):
        assert "2 shards (1, 2), got 3" in each.stderr
    (ended,) = in_ranks(1, train_here, settings, folder=tmp_path / "one")
    assert ended.code == 0, ended.stderr
    *_, summary = left_behind(run_dir)
    *_, expected = whole(shards=None)
    assert summary.pop("shards") == 2
    assert expected.pop("shards") == 1
    assert summary == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ({"num_envs": 10, "shards": None}, "9 and 12"),
        ({"num_envs": 24, "shards": 8}, "6 and 12"),
    ],
)
def test_what_ranks_do_not_divide_is_refused_once(tmp_path, given, nearest):
    settings = BASE | given | {"out_dir": str(tmp_path / "runs"), "progress": False}
    with Agent(tmp_path / "ranks", max_restarts=1) as agent:
        for restarts, said in ((0, [1, 0, 0]), (1, [0, 0, 0])):
            ended = agent.run(3, command, *flags(**settings), restarts=restarts)
            assert [each.code for each in ended] == [2] * 3
            assert [len(each.stderr.splitlines()) for each in ended] == said, ended
            if restarts == 0:
                assert f"nearest: {nearest}" in ended[0].stderr
    assert not list(tmp_path.glob("runs/*"))


# -- Started again by torchrun -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "then", "stops_others"), [(0, 4, False), (1, 2, True), (3, 1, False)]
)
def test_ranks_that_are_started_again_go_on(tmp_path, whole, killed, then, stops_others):
    """Without a flag; by another number of them too."""
    settings = BASE | {"out_dir": str(tmp_path / "runs")}
    with Agent(tmp_path / "ranks", max_restarts=5, stops_others=stops_others) as agent:
        ended = agent.run(4, train_and_die, settings, killed, 3)
        assert ended[killed].code == -signal.SIGKILL
        reached = last(the_run(tmp_path / "runs"))["counters"]["iteration"]
        assert reached >= 2
        again = agent.run(then, train_here, settings, restarts=1)
        assert [each.code for each in again] == [0] * then, again
        assert not any("[rank 0]" in each.stderr for each in again)
    assert left_behind(the_run(tmp_path / "runs")) == whole()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "where"), [(0, "make_envs"), (1, "make_envs"), (1, "share"), (1, "collect")]
)
def test_ranks_that_are_killed_before_the_first_iteration_begin_again(tmp_path, whole, rank, where):
    """In the directory that was made, if one was."""
    settings = BASE | {"out_dir": str(tmp_path / "runs")}
    with Agent(tmp_path / "ranks", max_restarts=5) as agent:
        ended = agent.run(2, train_and_die_at, settings, rank, where)
        assert ended[rank].code == -signal.SIGKILL
        assert ended[1 - rank].code != 0
        again = agent.run(2, train_here, settings, restarts=1)
        assert [each.code for each in again] == [0, 0], again
    assert left_behind(the_run(tmp_path / "runs")) == whole()


@pytest.mark.slow
def test_ranks_go_on_after_others_joined_or_left_which_torchrun_counts_as_no_restart(
    tmp_path, whole
):
    """It stops all of them by SIGTERM, and starts as many as there are now."""
    settings = ENDLESS | {"out_dir": str(tmp_path / "runs"), "progress": False}
    with Agent(tmp_path / "ranks", max_restarts=5) as agent:
        for ranks in (2, 3):
            agent.start(ranks, command, *flags(**settings))
            so_far = lines(tmp_path / "runs")
            agent.wait_for(lambda so_far=so_far: lines(tmp_path / "runs") >= so_far + 3)
            agent.signal(signal.SIGTERM)
            ended = agent.wait()
            assert len({each.code for each in ended}) == 1, ended
        reached = last(the_run(tmp_path / "runs"))["counters"]["iteration"]
        assert reached == lines(tmp_path / "runs") >= 6
        settings["total_iterations"] = reached + 2
        ended = agent.run(1, command, *flags(**settings))
        assert ended[0].code == 0, ended[0].stderr
    assert left_behind(the_run(tmp_path / "runs")) == whole(total_iterations=reached + 2)


@pytest.mark.slow
def test_ranks_that_are_started_again_find_the_first_of_two_runs_done(tmp_path, whole):
    """A script may train twice: after a restart it begins with the first again."""
    first = BASE | {"out_dir": str(tmp_path / "first"), "gamma": 0.9}
    second = BASE | {"out_dir": str(tmp_path / "runs")}
    with Agent(tmp_path / "ranks", max_restarts=5) as agent:
        ended = agent.run(2, train_twice, first, second, 1, 3)
        assert ended[1].code == -signal.SIGKILL
        before = left_behind(the_run(tmp_path / "first"))
        again = agent.run(2, train_twice, first, second, restarts=1)
        assert [each.code for each in again] == [0, 0], again
        assert "already at its end" in again[0].stderr
    assert left_behind(the_run(tmp_path / "first")) == before
    assert left_behind(the_run(tmp_path / "runs")) == whole()


@pytest.mark.slow
def test_ranks_that_are_started_again_after_the_end_leave_it(tmp_path, whole):
    settings = BASE | {"out_dir": str(tmp_path / "runs")}
    with Agent(tmp_path / "ranks", max_restarts=5) as agent:
        ended = agent.run(2, train_then_die, settings, 1)
        assert [each.code for each in ended] == [0, -signal.SIGKILL]
        again = agent.run(2, train_here, settings, restarts=1)
        assert [each.code for each in again] == [0, 0], again
    assert left_behind(the_run(tmp_path / "runs")) == whole()


@pytest.mark.slow
def test_a_rank_of_torchruns_that_is_killed_is_no_loss(tmp_path, whole):
    """The whole run goes on where it was, without a flag."""
    settings = BASE | {"total_iterations": 120, "progress": False}
    options = ["--max-restarts", "5", "--monitor-interval", "0.1"]
    runs = tmp_path / "ranks" / "runs"
    with Torchrun(tmp_path / "ranks", *flags(**settings), options=options) as real:
        deadline = time.monotonic() + 60
        while lines(runs) < 5:
            assert time.monotonic() < deadline, real.stderr()
            time.sleep(0.005)
        real.ranks()[1].kill()
        ended = real.wait()
    assert ended.code == 0, ended.stderr
    assert "saved after iteration" in ended.stderr
    assert len(ended.stdout.splitlines()) == 1
    found = left_behind(the_run(runs))
    assert found == whole(total_iterations=120)


# -- Ranks that die, hang or fail ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_ends_the_others(tmp_path, rank):
    """Within the time-out, with one line."""
    settings = ENDLESS | {"out_dir": str(tmp_path / "runs"), "progress": False, "dist_timeout": 2.0}
    with Agent(tmp_path / "ranks") as agent:
        agent.start(3, command, *flags(**settings))
        agent.wait_for(lambda: lines(tmp_path / "runs") >= 3)
        agent.signal(signal.SIGSTOP, rank)
        begun = time.monotonic()
        ended = agent.wait(20.0, but=[rank])
        assert time.monotonic() - begun < 2.0 + 8.0
    others = [each for k, each in enumerate(ended) if k != rank]
    assert [each.code for each in others] == [1, 1], others
    (line,) = [line for each in others for line in complaints(each)]
    assert "--dist-timeout" in line
    if rank != 0:
        assert last(the_run(tmp_path / "runs"))["counters"]["iteration"] == lines(tmp_path / "runs")


@pytest.mark.slow
def test_a_rank_whose_environment_raises_ends_all_with_its_words(tmp_path):
    """And all at the same commit."""
    settings = ENDLESS | {
        "vectorization": "sync",
        "wrappers": ("ranks:raising_on_rank_1",),
        "out_dir": str(tmp_path / "runs"),
        "progress": False,
    }
    with Agent(tmp_path / "ranks") as agent:
        ended = agent.run(3, command, *flags(**settings))
    assert [each.code for each in ended] == [1, 1, 1], ended
    said = "".join(each.stderr for each in ended)
    assert "the pole fell off" in said
    assert "[rank 1]" in said
    assert "--dist-timeout" not in said
    assert "Traceback" not in ended[0].stderr
    reached = {
        int(found)
        for each in ended
        for found in re.findall(r"saved after iteration (\d+)", each.stderr)
    }
    state = last(the_run(tmp_path / "runs"))
    assert reached == {state["counters"]["iteration"]}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_who_fails_says_so_before_it_closes_what_it_has(tmp_path, rank):
    """An environment's own end may take for ever."""
    settings = BASE | {"out_dir": str(tmp_path / "runs"), "dist_timeout": 60.0, "progress": False}
    with Agent(tmp_path / "ranks") as agent:
        agent.start(3, failing_and_closing_never, rank, *flags(**settings))
        ended = agent.wait(20.0, but=[rank])
    others = [each for k, each in enumerate(ended) if k != rank]
    assert [each.code for each in others] == [1, 1], others
    assert all("no more of it" in each for end in others for each in complaints(end))


@pytest.mark.slow
def test_an_evaluation_may_take_longer_than_the_time_out(tmp_path, whole):
    """Nobody cuts it while rank 0 is alive: neither the one that confirms nor the last."""
    settings = BASE | {
        "dist_timeout": 1.0,
        "target_return": 20.0,
        "return_window": 24,
        "total_iterations": 30,
    }
    with Agent(tmp_path / "ranks") as agent:
        ended = agent.run(
            2,
            evaluating_for,
            2.0,
            train_here,
            settings | {"out_dir": str(tmp_path / "runs")},
        )
    assert [each.code for each in ended] == [0, 0], ended
    assert "evaluating" in ended[0].stderr
    assert "evaluating" not in ended[1].stderr
    assert "time" not in ended[1].stderr  # as torch warns of each of its own
    assert left_behind(the_run(tmp_path / "runs")) == whole(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("target", [None, 10.0])
def test_rank_0_that_is_killed_while_it_evaluates_ends_the_others(tmp_path, target):
    settings = BASE | {"target_return": target, "return_window": 24, "dist_timeout": 1.0}
    settings |= {"out_dir": str(tmp_path / "runs")}
    with Agent(tmp_path / "ranks") as agent:
        agent.start(3, evaluating_for, 60.0, train_here, settings)
        agent.wait_for(lambda: "evaluating" in agent.stderr(0))
        agent.signal(signal.SIGKILL, 0)
        begun = time.monotonic()
        ended = agent.wait(20.0)
        assert time.monotonic() - begun < 1.0 + 5.0
    assert [each.code for each in ended] == [-9, 1, 1], ended


# -- Signals -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "rank", "max_restarts"),
    [
        (signal.SIGTERM, 0, 0),
        (signal.SIGTERM, 1, 0),
        (signal.SIGTERM, 2, 3),
        (signal.SIGINT, 1, 0),
    ],
)
def test_a_signal_to_one_rank_stops_all(tmp_path, whole, max_restarts, rank, signum):
    """At the same iteration, saved; where it may, torchrun would start again what fails."""
    settings = ENDLESS | {"out_dir": str(tmp_path / "runs"), "progress": False}
    with Agent(tmp_path / "ranks", max_restarts=max_restarts) as agent:
        agent.start(3, evaluating_for, 0.0, command, *flags(**settings))
        agent.wait_for(lambda: lines(tmp_path / "runs") >= 3)
        agent.signal(signum, rank)
        ended = agent.wait(10.0)
    expected = 0 if max_restarts else 128 + signum
    assert [each.code for each in ended] == [expected] * 3, ended
    assert "evaluating" not in ended[0].stderr
    run_dir = the_run(tmp_path / "runs")
    reached = last(run_dir)["counters"]["iteration"]
    assert reached == lines(tmp_path / "runs") == rows(run_dir)[-1]["iteration"]
    assert f"saved after iteration {reached}; resume: " in ended[0].stderr
    settings = BASE | {"total_iterations": reached + 2, "resume": str(run_dir)}
    with Agent(tmp_path / "after") as agent:
        ended = agent.run(2, train_here, settings)
    assert [each.code for each in ended] == [0, 0], ended
    assert left_behind(run_dir) == whole(total_iterations=reached + 2)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_who_waits_for_another_to_begin_stops_all(tmp_path, rank):
    settings = BASE | {"out_dir": str(tmp_path / "runs"), "progress": False}
    with Agent(tmp_path / "ranks") as agent:
        agent.start(3, making_slowly, 1 - rank, command, *flags(**settings))
        agent.wait_for(lambda: all("making" in agent.stderr(each) for each in range(3)))
        time.sleep(0.5)
        agent.signal(signal.SIGTERM, rank)
        ended = agent.wait(10.0)
    assert [each.code for each in ended] == [143, 143, 143], ended
    said = "".join(each.stderr for each in ended)
    assert "error" not in said
    assert "stopped by SIGTERM" in said


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_during_an_evaluation_stops_all(tmp_path, rank):
    settings = BASE | {"out_dir": str(tmp_path / "runs"), "progress": False}
    with Agent(tmp_path / "ranks") as agent:
        agent.start(2, evaluating_for, 3.0, command, *flags(**settings))
        agent.wait_for(lambda: "evaluating" in agent.stderr(0))
        agent.signal(signal.SIGTERM, rank)
        ended = agent.wait(15.0)
    assert [each.code for each in ended] == [143, 143], ended
    run_dir = the_run(tmp_path / "runs")
    assert last(run_dir)["counters"]["iteration"] == 8
    assert not (run_dir / "summary.json").exists()


@pytest.mark.slow
def test_no_rank_ends_before_rank_0_has_saved(tmp_path):
    """Where one ends torchrun sends another signal to the rest, and a second one is not awaited."""
    settings = ENDLESS | {"save_every": 1e9, "out_dir": str(tmp_path / "runs"), "progress": False}
    with Agent(tmp_path / "ranks", stops_others=True) as agent:
        agent.start(2, saving_slowly, 1.0, *flags(**settings))
        agent.wait_for(lambda: lines(tmp_path / "runs") >= 3)
        agent.signal(signal.SIGTERM)
        ended = agent.wait(20.0)
    assert [each.code for each in ended] == [143, 143], ended
    reached = last(the_run(tmp_path / "runs"))["counters"]["iteration"]
    assert reached == lines(tmp_path / "runs") >= 3
    assert f"saved after iteration {reached}; resume: " in ended[0].stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "calls", "module", "name", "target"),
    [
        (0, 1, "vecpg.train", "update", 10.0),
        (0, 9, "vecpg.run.clock", "Clock.without_evaluations", None),
        (1, 9, "vecpg.run.clock", "Clock.without_evaluations", None),
    ],
    ids=["before it is confirmed", "before the last", "before the last, another"],
)
def test_a_signal_just_before_an_evaluation_stops_all(tmp_path, rank, calls, module, name, target):
    """At once: nobody waits for who has left."""
    settings = BASE | {"target_return": target, "return_window": 24, "dist_timeout": 60.0}
    words = flags(**settings, out_dir=str(tmp_path / "runs"), progress=False)
    with Agent(tmp_path / "ranks", max_restarts=1) as agent:
        agent.start(2, signalled_after, rank, calls, module, name, *words)
        ended = agent.wait(20.0)
    assert [each.code for each in ended] == [0, 0], ended
    assert "stopped by SIGTERM" in ended[0].stderr
    assert not (the_run(tmp_path / "runs") / "summary.json").exists()


@pytest.mark.slow
def test_a_signal_to_torchrun_ends_the_job_saved(tmp_path):
    settings = ENDLESS | {"progress": False}
    runs = tmp_path / "ranks" / "runs"
    with Torchrun(tmp_path / "ranks", *flags(**settings)) as real:
        deadline = time.monotonic() + 60
        while lines(runs) < 3:
            assert time.monotonic() < deadline, real.stderr()
            time.sleep(0.005)
        real.process.terminate()
        ended = real.wait(40.0)
    assert ended.code == 1
    run_dir = the_run(runs)
    reached = last(run_dir)["counters"]["iteration"]
    assert reached == lines(runs)
    assert f"saved after iteration {reached}; resume: " in ended.stderr
    assert ended.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_who_looks_at_iterations_may_end_them_on_one_rank(tmp_path, whole, rank):
    settings = BASE | {"out_dir": str(tmp_path / "runs")}
    with Agent(tmp_path / "ranks") as agent:
        ended = agent.run(2, train_until_false, settings, rank, 3)
    assert [each.code for each in ended] == [0, 0], ended
    *_, summary = found = left_behind(the_run(tmp_path / "runs"))
    assert summary["iterations"] in (3, 4)
    assert found == whole(total_iterations=summary["iterations"])


# -- What is refused, and what is said -----------------------------------------------------------


@pytest.mark.slow
def test_different_settings_on_two_ranks_are_refused(tmp_path):
    settings = BASE | {"out_dir": str(tmp_path / "runs")}
    with Agent(tmp_path / "ranks") as agent:
        ended = agent.run(2, each_its_own, [settings, settings | {"gamma": 0.5}])
    assert all(each.code != 0 for each in ended)
    said = "".join(each.stderr for each in ended)
    assert "ConfigError" in said
    assert "gamma" in said
    assert "0.5" in said
    assert "0.99" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "name"), [(None, "make_envs"), (0, "make_judge"), (1, "make_envs"), (None, None)]
)
def test_what_fails_before_the_first_step_is_said_once(tmp_path, rank, name):
    """Whoever has failed, and where there is a trace above it too."""
    words = flags(**BASE, out_dir=str(tmp_path / "runs"), progress=False)
    with Agent(tmp_path / "ranks") as agent:
        if name is None:
            words += flags(vectorization="sync", wrappers=("ranks:unmade",))
            ended = agent.run(3, command, *words)
        else:
            ended = agent.run(3, failing, rank, name, *words)
    assert [each.code for each in ended] == [2] * 3, ended
    assert [each.stderr for each in ended[1:]] == [""] * 2
    errors = re.findall("^error: .+", ended[0].stderr, re.M)
    expected = "no pole" if name is None else "no more of it"
    assert ["rank 1: " in each for each in errors] == [rank == 1]
    assert [expected in each for each in errors] == [True]
    assert ("in unmade" in ended[0].stderr) == (name is None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluate_in", "write_json"])
def test_what_fails_rank_0_after_the_first_step_fails_the_others(tmp_path, name):
    words = flags(**BASE, out_dir=str(tmp_path / "runs"), progress=False)
    with Agent(tmp_path / "ranks") as agent:
        ended = agent.run(2, failing, 0, name, *words)
    assert [each.code for each in ended] == [1, 1], ended
    assert "error: no more of it" in ended[0].stderr
    assert ended[1].stderr == ""  # rank 0 has said it


@pytest.mark.slow
def test_ranks_that_wait_for_another_in_vain_say_so(tmp_path):
    settings = BASE | {"out_dir": str(tmp_path / "runs"), "progress": False, "dist_timeout": 1.0}
    with Agent(tmp_path / "ranks") as agent:
        agent.start(3, command, *flags(**settings), only=[0, 1])
        ended = agent.wait(1.0 + 20.0)
    assert [each.code for each in ended] == [2, 2]
    (line,) = ended[0].stderr.splitlines()
    assert "--dist-timeout" in line
    assert "missed 2;" in line
    assert ended[1].stderr == ""
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.slow
def test_what_ranks_say_has_their_number_and_stdout_has_one_line(tmp_path):
    """What every run says, rank 0 says; a warning is of whoever has it."""
    settings = BASE | {
        "env_id": "environments:Unclosable-v0",
        "vectorization": "sync",
        "out_dir": str(tmp_path / "runs"),
        "progress": False,
    }
    with Agent(tmp_path / "ranks") as agent:
        ended = agent.run(3, command, *flags(**settings))
    assert [each.code for each in ended] == [0, 0, 0], ended
    run_dir = the_run(tmp_path / "runs")
    assert json.loads(ended[0].stdout) == json.loads((run_dir / "summary.json").read_text())
    assert "2 envs" not in ended[0].stderr
    for rank in (1, 2):
        assert ended[rank].stdout == ""
        said = ended[rank].stderr.splitlines()
        assert said
        assert all(line.startswith(f"[rank {rank}] closing") for line in said)
    assert "[rank" not in ended[0].stderr
    assert "close broke" in ended[0].stderr
    assert "24 envs = 3 ranks x 8" in ended[0].stderr
