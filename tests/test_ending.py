"""What ranks say as they end: in one process, one after the other, and as torchrun starts them."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from vecpg import cli, ending, signals
from vecpg.distributed import RanksLost
from vecpg.run.interrupts import Interrupted
from vecpg.train import TrainResult


@pytest.fixture
def rank(monkeypatch):
    """Make this process a rank of torchrun's, whose store it has too."""
    server = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ending, "_REFUSAL_SECONDS", 0.1)
    monkeypatch.setattr(ending, "_FAILURE_SECONDS", 0.1)

    def become(rank, world_size=2, restarts=0, max_restarts=3, port=server.port):
        variables = {
            "TORCHELASTIC_RUN_ID": "run",
            "RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": world_size,
            "TORCHELASTIC_RESTART_COUNT": restarts,
            "TORCHELASTIC_MAX_RESTARTS": max_restarts,
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    yield become
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def said(capsys):
    """What `ending.say` writes to stderr."""

    def say(lines, refusal, **more):
        ending.say(lines, refusal=refusal, **more)
        return capsys.readouterr().err

    return say


@pytest.mark.parametrize("refusal", [True, False])
def test_a_process_alone_says_it_and_leaves_signals_alone(rank, said, monkeypatch, refusal):
    before = signal.getsignal(signal.SIGTERM)
    assert said("error: x", refusal) == "error: x\n"
    rank(0, world_size=1, max_restarts=0, port=1)
    assert said("error: x", refusal) == "error: x\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("refusal", [True, False])
def test_what_all_have_is_said_by_rank_0(rank, said, refusal):
    rank(0)
    assert said("error: x", refusal) == "error: x\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    rank(1)
    assert said("error: x", refusal) == ""


@pytest.mark.parametrize("refusal", [True, False])
def test_what_rank_0_does_not_have_is_said_by_who_has_it(rank, said, refusal):
    rank(0, world_size=3)
    assert said("error: x", refusal) == "error: x\n"
    rank(2, world_size=3)
    assert said("of an environment\n  line 1\nerror: y", refusal) == (
        "[rank 2] of an environment\n[rank 2]   line 1\n[rank 2] error: y\n"
    )
    rank(1, world_size=3)
    assert said("of an environment\n  line 1\nerror: y", refusal) == ""


def test_a_rank_waits_for_rank_0_only_so_long(rank, said):
    rank(1)
    assert said("error: x", True) == "[rank 1] error: x\n"


@pytest.mark.parametrize("refusal", [True, False])
def test_a_refusal_is_not_said_again_after_a_restart_and_a_failure_is(rank, said, refusal):
    for restarts in range(3):
        rank(0, restarts=restarts)
        again = restarts == 0 or not refusal
        assert said("error: x", refusal) == ("error: x\n" if again else "")
        rank(1, restarts=restarts)
        assert said("error: x", refusal) == ""
    rank(0, world_size=1, restarts=3)
    assert said("error: x", refusal) == ("" if refusal else "error: x\n")


def test_what_became_of_rank_0_it_has_said_itself(rank, said):
    rank(1)
    assert said("error: rank 0 left", False, of_another=True) == "[rank 1] error: rank 0 left\n"
    rank(0)
    assert said("error: no room", False) == "error: no room\n"
    rank(1)
    assert said("error: my own", False) == "[rank 1] error: my own\n"
    assert said("error: rank 0 failed: no room", False, of_another=True) == ""


def test_ranks_that_are_refused_wait_for_all(rank, said, monkeypatch):
    """Else torchrun would end the last by SIGTERM."""
    waited = []
    monkeypatch.setattr(ending, "_comes", lambda store, key, _: waited.append(key) or True)
    rank(0)
    said("error: x", True)
    rank(1)
    said("error: x", True)
    assert waited == ["ended/0/all", "ended/0/rank 0", "ended/0/all"]
    monkeypatch.undo()


@pytest.mark.parametrize("number", [0, 1])
def test_where_torchrun_has_ended_each_says_it(rank, said, monkeypatch, number):
    def unreachable(where, seconds):
        raise torch.distributed.DistNetworkError("the client socket has timed out")

    monkeypatch.setattr("vecpg.rendezvous.agent_store", unreachable)
    rank(number)
    assert said("error: x", True) == ("[rank 1] " if number else "") + "error: x\n"


# -- The command line ----------------------------------------------------------------------------


def test_settings_that_ranks_do_not_divide_are_refused(rank, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rank(0, world_size=3)
    for args, message in (
        ([], "--num-envs: expected a number that 3 ranks divide, got 64; nearest: 63 and 66"),
        (
            ["--num-envs", "48", "--shards", "8"],
            "--shards: expected a multiple of the 3 ranks that divides --num-envs 48, got 8;"
            " nearest: 6 and 12",
        ),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["train", *args])
        assert caught.value.code == 2
        assert capsys.readouterr().err == f"error: {message}\n"


def test_what_ranks_cannot_share_is_refused_before_torch_is_asked(rank, capsys, tmp_path):
    rank(0, world_size=2)
    for args, message in (
        (
            ["--vectorization", "vector_entry_point"],
            "--vectorization vector_entry_point: its copies draw from one generator, which cannot"
            " be split over 2 ranks; use sync or async",
        ),
        (
            ["--vectorization", "sync", "--num-envs", "1e12"],
            r"--num-envs: expected at most [\d,]+ on each rank, got 500,000,000,000, which take .*",
        ),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["train", "--out-dir", str(tmp_path / "runs"), *args])
        assert caught.value.code == 2
        assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)


def test_after_a_restart_the_run_that_goes_on_is_not_measured_by_other_settings(rank, tmp_path):
    config = cli.parse_config(["--num-envs", "64", "--out-dir", str(tmp_path)])
    where = ending.place()
    for restarts, refused in ((0, True), (1, False)):
        rank(0, world_size=3, restarts=restarts)
        where = ending.place()
        try:
            cli.check_cheaply(config, where)
        except cli.ConfigError:
            assert refused
        else:
            assert not refused


@pytest.mark.parametrize("command", sorted(set(cli.COMMANDS) - {"train"}))
def test_only_training_is_split_over_ranks(rank, capsys, command):
    rank(0)
    with pytest.raises(SystemExit) as caught:
        cli.main([command])
    assert caught.value.code == 2
    message = f"error: vecpg {command}: expected one process, got 2 ranks; only training is split"
    assert capsys.readouterr().err.startswith(message)
    rank(0, world_size=1)
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0


@pytest.mark.parametrize(
    "args", [[], ["--version"], ["train", "--help"], ["train", "--recipe", "list"]], ids=" ".join
)
def test_what_is_asked_for_is_answered_by_rank_0(rank, capsys, args):
    for number in (0, 1):
        rank(number)
        with contextlib.suppress(SystemExit):
            cli.main(args)
        captured = capsys.readouterr()
        assert captured.err == ""
        assert bool(captured.out) == (number == 0)


def test_what_a_run_came_to_is_said_by_rank_0(rank, capfd, monkeypatch, tmp_path):
    result = TrainResult(None, tmp_path, {"run_dir": str(tmp_path), "iterations": 3})
    monkeypatch.setattr("vecpg.train.train", lambda config: result)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for number in (0, 1):
        rank(number)
        cli.main(["train", "--out-dir", str(tmp_path)])
        out, err = capfd.readouterr()
        assert out == ("" if number else json.dumps(result.summary) + "\n")
        assert bool(err) == (number == 0)


@pytest.mark.parametrize(("max_restarts", "statuses"), [(0, (130, 143, 143)), (3, (0, 0, 0))])
def test_a_signal_is_said_by_rank_0_and_restarts_nothing(
    rank, capsys, monkeypatch, max_restarts, statuses
):
    monkeypatch.setattr(os, "_exit", lambda status: None)
    for number in (0, 1):
        rank(number, max_restarts=max_restarts)
        monkeypatch.setattr(signals, "together", True)
        for signum, status in zip(signals.STOPPING, statuses, strict=True):
            monkeypatch.setattr(signals, "said", False)
            with pytest.raises(SystemExit) as caught, cli.exit_codes():
                raise KeyboardInterrupt if signum == signal.SIGINT else Interrupted(signum)
            assert caught.value.code == status == signals.exit_status(signum)
            line = f"stopped by {signum.name}{signals.remark}\n"
            assert capsys.readouterr().err == ("" if number else line)
            written = []
            monkeypatch.setattr(os, "write", lambda to, text, into=written: into.append((to, text)))
            monkeypatch.setattr(signals, "said", False)
            signals.end_process(signum)
            monkeypatch.undo()
            rank(number, max_restarts=max_restarts)
            monkeypatch.setattr(signals, "together", True)
            monkeypatch.setattr(os, "_exit", lambda status: None)
            assert written == ([] if number else [(2, line.encode())])


def test_ranks_that_have_lost_another_end_with_one_line(rank, capsys):
    for number in (0, 1):
        rank(number)
        with pytest.raises(SystemExit) as caught, cli.exit_codes():
            raise RanksLost("rank 2 has ended")
        assert caught.value.code == 1
        assert capsys.readouterr().err == ("" if number else "error: rank 2 has ended\n")


def test_other_ranks_only_warn_and_say_who_they_are(rank):
    rank(3, world_size=4)
    program = (
        "import logging; from vecpg import cli; cli.prepare_process()\n"
        "logging.getLogger('vecpg.train').info('so far')\n"
        "logging.getLogger('vecpg.train').warning('no film')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "[rank 3] no film\n")


# -- Under torchrun ------------------------------------------------------------------------------


def torchrun(*args, cwd, ranks=2, restarts=1):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*command, "--max-restarts", str(restarts), *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--num-envs", "63"],
            "--num-envs: expected a number that 2 ranks divide, got 63; nearest",
        ),
        (["--num-envz", "64"], "Unrecognized options: --num-envz"),
    ],
)
def test_a_refusal_is_one_line_over_ranks_and_restarts_and_each_exits_2(tmp_path, args, message):
    done = torchrun(str(ROOT / "scripts/train.py"), *args, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("error: --") + done.stderr.count("error: Unrec") == 1, done.stderr
    assert f"\nerror: {message}" in f"\n{done.stderr}"
    assert "stopped by" not in done.stderr
    assert "[rank 1]" not in done.stderr
    assert re.findall(r"exitcode +: (-?\d+)", done.stderr) == ["2", "2"], done.stderr


@pytest.mark.slow
def test_a_fault_of_one_rank_is_said_by_it(tmp_path):
    program = tmp_path / "differing.py"
    program.write_text(
        "import os, sys, time\n"
        "from vecpg.__main__ import main\n"
        "if os.environ['RANK'] == '0':\n"
        "    time.sleep(60)\n"
        "from vecpg import ending\n"
        "ending._REFUSAL_SECONDS = 1.0\n"
        "main(['train', '--num-envs', '63'])\n"
    )
    done = torchrun(str(program), cwd=tmp_path, restarts=0)
    assert done.stderr.count("error: --num-envs") == 1, done.stderr
    assert "\n[rank 1] error: --num-envs: expected" in f"\n{done.stderr}"
