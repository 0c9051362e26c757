import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import ROOT

from vecpg import machine
from vecpg.measure import cli as measure_cli
from vecpg.measure import comparison
from vecpg.measure.comparison import TooOld, ratio_of_medians, resolve
from vecpg.measure.timing import Pace

RETURNS = ("returns", "cpu", None, 1)
COLLECT = ("collect", "cpu", "sync", 1)


def test_the_interval_holds_the_ratio_and_narrows_with_rounds():
    rng = np.random.default_rng(1)
    widths = []
    for count in (10, 1000):
        here, there = 1.5 * rng.gamma(25, size=count), rng.gamma(25, size=count)
        ratio = ratio_of_medians(here, there)
        assert ratio.low < 1.5 < ratio.high
        assert ratio == ratio_of_medians(here, there), "drawn from a seed"
        widths.append(ratio.high - ratio.low)
    assert widths[1] < widths[0] / 5


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(60):
        ratio = ratio_of_medians(rng.normal(10, 1, 20), rng.normal(10, 1, 20))
        held += ratio.low <= 1 <= ratio.high
    assert held >= 53


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.26, 1.4, "slower"),
        (1.24, 9.0, "no difference found"),
        (0.5, 0.79, "faster"),
        (0.5, 0.81, "no difference found"),
        (0.81, 1.24, "no difference"),
    ],
)
def test_only_confidence_is_a_verdict(low, high, verdict):
    assert comparison.Ratio(1.3, low, high).verdict == verdict


class Fake:
    """A worker whose rounds take given seconds: of each opening a number, or one for each round."""

    def __init__(self, log, name, seconds, problem=None):
        self.log, self.name, self.seconds, self.problem = log, name, iter(seconds), problem

    def opened(self, case):
        self.now, self.warm = next(self.seconds, None), False
        return self.problem

    def ask(self, question):
        if "calibrate" in question:
            self.warm = True
            return {"calls": 3}
        assert self.warm
        assert question == {"round": 3}
        self.log.append(self.name)
        return {"seconds": next(self.now) if isinstance(self.now, Iterator) else self.now}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Compare two workers that measure nothing."""

    def run(here, there, cases=(RETURNS,), problem=None, here_problem=None):
        log = []
        workers = iter([Fake(log, "here", here, here_problem), Fake(log, "there", there, problem)])

        @contextmanager
        def given(_):
            yield next(workers)

        @contextmanager
        def tree(_):
            yield tmp_path

        monkeypatch.setattr(comparison, "_worker", given)
        monkeypatch.setattr(comparison, "_tree_of", tree)
        monkeypatch.setattr(comparison, "checkout", lambda: ROOT)
        return comparison.compare("0" * 40, cases, Pace(rounds=4).enough, 0.002), log

    return run


def test_rounds_are_in_turn_and_the_first_changes(fake):
    (found,), log = fake([1.0], [1.0])
    assert log == ["there", "here", "here", "there", "there", "here", "here", "there"]
    assert found["verdict"] == "no difference"
    assert len(found["seconds_here"]) == len(found["seconds_there"]) == 4


def test_what_says_nothing_is_given_more_rounds(fake):
    noisy = [1.0, 3.0, 1.0, 3.0, *[1.0] * 8]
    (found,), log = fake([iter(noisy)], [1.0])
    assert len(log) == 2 * 12
    assert len(found["seconds_here"]) == len(found["seconds_there"]) == 12
    assert found["verdict"] == "no difference"
    (found,), log = fake([iter([1.0, 3.0] * 6)], [1.0])
    assert (found["verdict"], len(log)) == ("no difference found", 2 * 12)
    assert "1 of them with an interval too wide to exclude one" in comparison.table([found])


def test_what_is_slower_twice_is_slower(fake):
    (found,), log = fake([1.5, 1.5], [1.0, 1.0])
    assert (found["verdict"], found["ratio"], len(log)) == ("slower", 1.5, 16)


def test_what_is_slower_only_once_was_bad_luck(fake):
    (found,), _ = fake([1.5, 1.0], [1.0, 1.0])
    assert (found["verdict"], found["ratio"]) == ("no difference", 1.0)


def test_what_one_commit_cannot_run_is_left_out_and_nothing_at_all_is_an_error(fake):
    with pytest.raises(TooOld, match="0000000 can run none of these: no such thing"):
        fake([1.0], [1.0], problem="no such thing")


def test_what_fails_only_here_is_no_fault_of_the_commit(fake):
    (found,), _ = fake([1.0], [1.0], here_problem="a reward is not 1")
    assert (found["verdict"], found["problem"]) == ("failed here", "a reward is not 1")
    assert "| | failed here: a reward" in comparison.table([found])


def test_the_table_says_how_many_are_slower(fake):
    found, _ = fake([1.5, 1.5, 1.0], [1.0, 1.0, 1.0], cases=(RETURNS, COLLECT))
    text = comparison.table([*found, {**found[0], "problem": "too old", "verdict": "not compared"}])
    assert "| returns, any x 1, cpu | 1.50 (1.50 to 1.50) | slower |" in text
    assert "| collect, sync x 1, cpu | 1.00 (1.00 to 1.00) | no difference |" in text
    assert "not compared: too old" in text
    assert text.endswith(
        "2 compared: 1 slower by more than 25%, 0 faster by as much, 1 without such a difference."
    )


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with this package, of one commit; machine code that is there comes along."""
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "vecpg", root / "vecpg")
    (root / ".gitignore").write_text("__pycache__/\n")
    settings = ["-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*settings, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    monkeypatch.setattr(comparison, "checkout", lambda: root)
    return root


def test_a_commit_is_found_or_refused(repository):
    assert resolve("HEAD") == machine.git(repository, "rev-parse", "HEAD")
    for ref in ("nothing", "--all", "HEAD:vecpg", ""):
        with pytest.raises(ValueError, match="expected a commit of this repository, got"):
            resolve(ref)


def test_an_unknown_commit_is_one_line_and_status_2(repository, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        measure_cli.benchmark_main(["--compare", "nothing", "--out-dir", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    assert captured.err == ("error: --compare: expected a commit of this repository, got nothing\n")


def test_the_command_keeps_what_was_compared_and_where(monkeypatch, repository, tmp_path, capsys):
    asked = []

    def compared(commit, cases, enough, round_seconds, progress):
        asked.append((commit, cases, enough(19, 0.29), enough(5, 0.31)))
        one = {"thing": "returns", "device": "cpu", "vectorization": None, "num_envs": 1}
        return [one | {"ratio": 1.5, "low": 1.4, "high": 1.6, "verdict": "slower"}]

    monkeypatch.setattr(comparison, "compare", compared)
    args = ["--compare", "HEAD", "--num-envs", "1", "--vectorizations", "tensor"]
    with pytest.raises(SystemExit) as caught:
        measure_cli.benchmark_main([*args, "--quick", "--out-dir", str(tmp_path / "out")])
    assert caught.value.code == 1
    head = machine.git(repository, "rev-parse", "HEAD")
    ((commit, cases, *enough),) = asked
    assert (commit, enough) == (head, [False, True])
    assert ("train", "cpu", "tensor", 1) in cases
    (path,) = (tmp_path / "out").iterdir()
    assert path.name.endswith(f"-compared-with-{head[:7]}.json")
    kept = json.loads(path.read_text())
    assert kept["compared_with"] == head[:7]
    assert kept["machine"]["cpu"]
    assert kept["cells"][0]["verdict"] == "slower"


WORKER = """
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from vecpg.measure import worker

@contextmanager
def prepared(case):
    print("an environment says something")
    print("opened", case, file=sys.stderr)
    if case[0] == "bad":
        raise ValueError("no such\\nthing")
    yield SimpleNamespace(run=lambda: None)
    print("closed", case, file=sys.stderr)

worker._load_cells = lambda: SimpleNamespace(
    Case=lambda thing, device, kind, n: Case((thing, device)),
    prepared=prepared,
    calls_for=lambda seconds, run, device: int(seconds),
    seconds_of=lambda run, calls, device: calls / 2,
)

class Case(tuple):
    device = "cpu"

worker.work()
"""


def test_a_worker_answers_line_by_line():
    asked = [
        {"open": ["returns", "cpu", None, 1]},
        {"calibrate": 7.0},
        {"round": 5},
        {"open": ["bad", "cpu", None, 1]},
        {"open": ["update", "cpu", None, 1]},
    ]
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        input="".join(json.dumps(each) + "\n" for each in asked),
        capture_output=True,
        text=True,
        check=True,
    )
    hello, *answers = map(json.loads, done.stdout.splitlines())
    assert hello == {"vecpg": str(ROOT / "vecpg")}
    assert answers == [
        {"ready": True},
        {"calls": 7},
        {"seconds": 2.5},
        {"problem": "ValueError: no such\nthing"},
        {"ready": True},
    ]
    said = [line for line in done.stderr.splitlines() if not line.startswith("an env")]
    assert said == [
        "opened ('returns', 'cpu')",
        "closed ('returns', 'cpu')",
        "opened ('bad', 'cpu')",
        "opened ('update', 'cpu')",
        "closed ('update', 'cpu')",
    ]


def test_another_package_than_that_of_the_commit_is_refused(tmp_path):
    with pytest.raises(TooOld, match="another vecpg than"), comparison._worker(tmp_path):
        pass


def test_a_commit_and_its_changes_are_those_of_the_repository(repository, monkeypatch):
    monkeypatch.setattr(machine, "checkout", lambda: repository)
    head = machine.git(repository, "rev-parse", "HEAD")
    found = machine.commit()
    assert found["dirty"] is False
    assert len(found["commit"]) >= 7
    assert head.startswith(found["commit"])
    (repository / "vecpg" / "py.typed").write_text("changed")
    assert machine.commit() == found | {"dirty": True}


@pytest.mark.slow
def test_a_sleep_in_the_collector_is_found(repository):
    stepping = repository / "vecpg" / "rollout" / "stepping.py"
    text = stepping.read_text()
    loop = "    while playing:\n"
    assert text.count(loop) == 1
    stepping.write_text(text.replace(loop, f"    import time\n{loop}        time.sleep(0.002)\n"))
    cases = [("collect", "cpu", "sync", 8), RETURNS]
    slept, other = comparison.compare(resolve("HEAD"), cases, Pace(rounds=3).enough, 0.002)
    # Several times as long. That nothing else differs is up to the machine, and not asserted.
    assert slept["verdict"] == "slower"
    assert other["seconds_here"]
    assert other["seconds_there"]


@pytest.mark.slow
def test_a_commit_without_what_is_needed_is_one_line_and_status_2(repository, capsys, tmp_path):
    shutil.rmtree(repository / "vecpg" / "advantage")
    subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", "commit", "-qam", "x"],
        cwd=repository,
        check=True,
    )
    shutil.copytree(ROOT / "vecpg" / "advantage", repository / "vecpg" / "advantage")
    with pytest.raises(SystemExit) as caught:
        measure_cli.benchmark_main(["--compare", "HEAD", "--out-dir", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    assert "No module named 'vecpg.advantage'" in captured.err
    assert captured.err.count("\n") == 1


PROGRESS = re.compile(r"\d+ of \d+: [a-z]+, \w+ x \d+, cpu\n")


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_neither_processes_nor_files(tmp_path, signum, status):
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "--compare", "HEAD"]
    process = subprocess.Popen(
        [*command, "--vectorizations", "sync", "--out-dir", str(tmp_path / "out")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        start_new_session=True,
    )
    first = process.stderr.readline()
    assert PROGRESS.fullmatch(first), first
    assert len(list(tmp_path.glob("vecpg-*"))) == 1
    # As a terminal does for Ctrl-C: to every process of the group.
    (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
    _, said = process.communicate(timeout=30)
    assert process.returncode == status
    *before, last = said.splitlines(keepends=True)
    assert last == f"stopped by {signum.name}\n"
    # Measuring goes on until the signal is heard.
    assert all(map(PROGRESS.fullmatch, before)), said
    assert list(tmp_path.glob("vecpg-*")) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
