"""The first hour on a GPU, without one: what runs, what is kept, and what is refused."""

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from fused_twins import fused_twins
from pretend import pretended
from twins import twins

sys.path.insert(0, str(ROOT / "benchmarks"))

import first_hour
from hour import clock, job, parts, record, tables, tiles
from hour.job import BROKEN, Job, Wrong
from hour.parts import GRACE, OWN_SECONDS, PARTS, USUAL

COMMAND = [sys.executable, "benchmarks/first_hour.py"]
# What a site without some packages is like, in this process and in all that it starts.
HIDING = """
import importlib.machinery, sys

class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in {HIDDEN}:
            return super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, context=importlib.machinery.PathFinder):
        hidden = getattr(context, "name", None) in {HIDDEN}
        return [] if hidden else super().find_distributions(context)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Hiding
"""


def hour(*args, env=None):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | (env or {})
    return subprocess.run([*COMMAND, *args], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_with_torch_and_triton_alone_the_returns_kernels_are_looked_at(tmp_path):
    pytest.importorskip("triton", reason="needs triton, which is for Linux")
    hidden = {"gymnasium", "numba", "tensorboard", "tyro", "tqdm", "matplotlib"}
    (tmp_path / "sitecustomize.py").write_text(HIDING.replace("{HIDDEN}", repr(hidden)))
    done = hour("--out-dir", str(tmp_path / "out"), env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    for letter in "bcef":
        (line,) = [each for each in done.stderr.splitlines() if each.startswith(f"({letter})")]
        assert "WON'T RUN: numba, gymnasium" in line
    assert "pip install -c constraints.txt numba gymnasium tensorboard tqdm tyro" in done.stderr
    assert done.stderr.index("pip install") < done.stderr.index("    returns"), "before it starts"
    kept = {path.stem[-1]: path.read_text() for path in (tmp_path / "out").glob("*.json")}
    assert set(kept) == {"a", "d"}
    for text in kept.values():
        found = json.loads(text)
        assert found["miniature"]
        assert len(found["rows"]) > 5
        assert found["machine"]["numba"] is None
        assert not found["problems"]
        assert socket.gethostname() not in text
        assert str(ROOT) not in text
    assert "in miniature, no figure" in done.stdout


@pytest.mark.slow
def test_without_a_gpu_every_other_part_runs_in_miniature_or_says_that_it_needs_one(tmp_path):
    before = sorted((ROOT / "benchmarks").rglob("*.json"))
    done = hour("f", "c", "b", "e")
    assert done.returncode == 0, done.stderr
    assert "finds no CUDA device here: there will be no figures\n" in done.stderr
    assert "(f) scripts/benchmark.py --devices cpu cuda: WON'T RUN: needs a GPU\n" in done.stderr
    headings = [line[:3] for line in done.stdout.splitlines() if line.startswith("(")]
    assert headings == ["(b)", "(c)", "(e)"]
    assert done.stdout.count("cases ran and were right") == 2
    assert "1 case ran and was right" in done.stdout
    assert sorted((ROOT / "benchmarks").rglob("*.json")) == before


def test_a_part_that_is_not_there_is_refused():
    done = hour("a", "z")
    assert done.returncode == 2
    assert "expected of a, b, c, d, e, f, t, got z" in done.stderr


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--record", "a"], "--record: expected no PART"),
        (["--record", "--out-dir", "tests"], "first-hour-<part>.json in tests, got none; measure"),
        (["--out-dir", "README.md"], "--out-dir README.md: expected a folder, got File exists"),
    ],
)
def test_what_cannot_be_done_is_refused(monkeypatch, capsys, args, problem):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["first_hour.py", *args])
    monkeypatch.setattr(first_hour, "why_no_gpu", lambda: "here is none")
    monkeypatch.setattr(first_hour, "plan", lambda chosen, why: chosen)
    with pytest.raises(SystemExit, match="^2$"):
        first_hour.main()
    assert problem in capsys.readouterr().err


def test_where_nothing_can_be_measured_that_is_said_and_no_success(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["first_hour.py", "f"])
    monkeypatch.setattr(first_hour, "why_no_gpu", lambda: "here is none")
    with pytest.raises(SystemExit, match="^1$"):
        first_hour.main()
    assert capsys.readouterr().out == "nothing was measured\n"


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ({"commit": "abc", "dirty": False}, ""),
        ({"commit": "abc", "dirty": None}, ""),
        ({"commit": None, "dirty": None}, "without --commit `--record` won't take the figures\n"),
        ({"commit": "abc", "dirty": True}, "`--record` won't take the figures; commit first\n"),
    ],
)
def test_what_it_costs_and_what_becomes_of_it_is_said_before(capsys, at, said):
    first_hour.promise(list(USUAL), Path("there"), at)
    first, *rest = capsys.readouterr().err.splitlines(keepends=True)
    assert first == "all of it takes at most 477 s and is kept in there\n"
    assert "".join(rest).endswith(said)
    assert bool(rest) == bool(said)


def test_all_parts_together_take_less_than_eight_minutes():
    assert sum(PARTS[letter].seconds + GRACE for letter in USUAL) + OWN_SECONDS < 480


# A part at work.


def begun(tmp_path, **content):
    path = tmp_path / "first-hour-a.json"
    empty = {"part": "a", "now": None, "rows": [], "problems": [], "not_reached": []}
    job.write(path, {**empty, **content})
    return path


def test_an_error_costs_only_its_own_case(tmp_path):
    def fails():
        raise OSError("no file /home/somebody/x.py: lost")

    def too_fast():
        raise Wrong("too fast")

    path = begun(tmp_path)
    cases = [("one", lambda: {"x": 1 / 3}), ("two", fails), ("three", lambda: {"x": float("inf")})]
    Job(path, 60, miniature=True).run([*cases, ("four", too_fast)])
    found = job.read(path)
    assert found["rows"] == [{"what": "one", "x": 0.333333}, {"what": "three", "x": None}]
    assert found["problems"] == [
        {"what": "two", "problem": "OSError: no file x.py: lost"},
        {"what": "four", "problem": "too fast"},
    ]
    assert (found["now"], found["not_reached"]) == (None, [])


def test_what_was_found_is_kept_before_the_next_begins(tmp_path):
    path, seen = begun(tmp_path), []

    def look():
        seen.append(job.read(path))
        return {}

    Job(path, 60, miniature=True).run([("one", dict), ("two", look)])
    assert [row["what"] for row in seen[0]["rows"]] == ["one"]
    assert seen[0]["now"] == "two"


def test_what_there_is_no_time_for_is_named(tmp_path):
    path = begun(tmp_path)
    own = Job(path, 0.05, miniature=True)
    own.run([("one", lambda: time.sleep(0.06) or {}), ("two", dict), ("three", dict)])
    assert [row["what"] for row in job.read(path)["rows"]] == ["one"]
    assert job.read(path)["not_reached"] == ["two", "three"]


def test_what_goes_on_does_not_begin_again(tmp_path):
    problem = {"what": "two", "problem": "its process ended"}
    path = begun(tmp_path, rows=[{"what": "one"}], problems=[problem])
    cases = [("one", pytest.fail), ("two", pytest.fail), ("three", dict)]
    Job(path, 60, miniature=True).run(cases)
    assert [row["what"] for row in job.read(path)["rows"]] == ["one", "three"]


def test_a_case_that_hangs_ends_its_process(tmp_path):
    path = begun(tmp_path)
    script = (
        "import sys, time; from pathlib import Path; from hour.job import Job\n"
        "own = Job(Path(sys.argv[1]), 60, miniature=True)\n"
        "own.run([('quick', dict), ('hangs', lambda: time.sleep(60))], limit=0.2)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run([sys.executable, "-c", script, path], env=env, capture_output=True)
    assert done.returncode == -signal.SIGALRM
    assert job.read(path)["now"] == "hangs"


def test_a_device_that_answers_no_more_ends_the_process(tmp_path, monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    path = begun(tmp_path)
    with pytest.raises(SystemExit) as ended:
        Job(path, 60, miniature=False).run([("one", dict), ("two", pytest.fail)])
    assert ended.value.code == BROKEN
    assert [row["what"] for row in job.read(path)["rows"]] == ["one"]


# What starts them.


@pytest.fixture
def processes(monkeypatch, tmp_path):
    """Parts whose processes do what a list says: (status, row or None, case at work)."""

    def start(*answers):
        left, seconds = list(answers), []

        def run(letter, path, given, miniature):
            status, row, now = left.pop(0)
            content = job.read(path)
            content["rows"] += [{"what": row}] if row else []
            job.write(path, content | {"now": now})
            seconds.append(given)
            return status

        monkeypatch.setattr(first_hour, "run", run)
        found = first_hour.part("a", tmp_path, {"machine": {}}, miniature=False)
        assert not left
        assert all(0 < one <= PARTS["a"].seconds for one in seconds)
        assert job.read(tmp_path / "first-hour-a.json") == job._rounded(found)
        return found

    return start


def test_a_process_that_ends_costs_its_case_and_another_goes_on(processes):
    found = processes((-11, "one", "two"), (BROKEN, "three", None), (0, "four", None))
    assert [row["what"] for row in found["rows"]] == ["one", "three", "four"]
    assert found["problems"] == [{"what": "two", "problem": "its process ended with status -11"}]


def test_what_was_ended_is_named(processes):
    found = processes((-signal.SIGALRM, "one", "two"), (0, None, None))
    expected = {"what": "two", "problem": "it took longer than it may, and was ended"}
    assert found["problems"] == [expected]


def test_what_cannot_start_is_not_started_again(processes):
    found = processes((1, None, None))
    assert found["problems"][0]["what"] == "the start"


def test_what_was_measured_until_a_signal_is_kept(monkeypatch, tmp_path, capsys):
    def run(letter, path, seconds, miniature):
        if letter == "d":
            job.write(path, job.read(path) | {"rows": [{"what": "one"}], "now": "two"})
            first_hour.end(signal.SIGTERM, None)
        return 0

    monkeypatch.setattr(first_hour, "run", run)
    found, status = first_hour.measured(["a", "d", "e", "f"], tmp_path, {}, miniature=False)
    assert status == 128 + signal.SIGTERM
    assert [each["part"] for each in found] == ["a", "d"]
    assert found[1]["rows"] == [{"what": "one"}]
    assert found[1]["problems"] == [{"what": "two", "problem": "it was interrupted"}]
    assert found[1]["now"] is None
    assert found[1] == job.read(tmp_path / "first-hour-d.json")
    assert "not begun: (e) (f)\n" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_all_of_it_with_the_table(tmp_path, signum, status):
    pytest.importorskip("triton", reason="needs triton, which is for Linux")
    # Where this process ignores it, so would that one.
    before = signal.signal(signum, signal.SIG_DFL)
    try:
        process = subprocess.Popen(
            [*COMMAND, "d", "--out-dir", str(tmp_path)],
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signum, before)
    while not process.stderr.readline().startswith("    returns"):
        assert process.poll() is None
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in err
    assert "(d) returns and advantages beside a copy of the same bytes: in miniature" in out
    assert "it was interrupted" in out
    assert job.read(tmp_path / "first-hour-d.json")["now"] is None


def test_a_process_is_ended_at_its_time(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nsleep 60 & echo $! >$(dirname $0)/child; wait\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(first_hour, "GRACE", 0.1)
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)  # a process writes to a real one
    started = time.monotonic()
    assert first_hour.run("a", tmp_path / "x.json", 0.2, miniature=True) is None
    assert time.monotonic() - started < 5
    child = int((tmp_path / "child").read_text())
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        while Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
            assert time.monotonic() - started < 10, "what it has started goes on"
            time.sleep(0.01)


# Seconds that can be believed.


class Graph:
    """Stands in for a CUDA graph: what is called while it is captured is called again."""

    now = None

    def __init__(self):
        self.calls, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for call in self.calls:
            call()


@pytest.fixture
def graphs(monkeypatch):
    """A GPU on which a replay takes two seconds, and a graph keeps what `recorded` was called."""
    made = []

    @contextlib.contextmanager
    def captured(graph):
        made.append(graph)
        Graph.now = graph
        yield
        Graph.now = None

    event = types.SimpleNamespace(record=lambda: None, elapsed_time=lambda _: 2000.0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", captured)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    return made


def recorded(function):
    def call():
        if Graph.now is not None:
            Graph.now.calls.append(function)
        return function()

    return call


def test_device_seconds_are_those_of_one_launch_and_what_was_timed_is_checked(graphs):
    out, seen = torch.zeros(3), []
    function = recorded(lambda: out.fill_(5))
    found = clock.on_device(function, lambda result: seen.append(result.clone()), 4, 3)
    assert found == 2 / 4
    (graph,) = graphs
    assert (len(graph.calls), graph.replays) == (4, 1 + 3)
    assert seen[0].tolist() == [5, 5, 5]


def test_a_graph_that_holds_nothing_is_found_out(graphs):
    out = torch.zeros(3)

    def check(result):
        if not torch.equal(result, torch.full((3,), 5.0)):
            raise Wrong("differs")

    with pytest.raises(Wrong, match="differs"):
        clock.on_device(lambda: out.fill_(5), check)


GB = 10**9


@pytest.mark.parametrize(
    ("seconds", "moved", "copies", "problem"),
    [
        (1.0, 2000 * GB, [(2000 * GB, 1.0), (GB, 0.0002)], None),
        (1.0, 2000 * GB, [(2000 * GB, 0.95)], None),
        (0.5, 2000 * GB, [(2000 * GB, 1.0), (GB, 0.0002)], "more than a copy's"),
        # What fits into the cache may be as fast as the fastest copy there.
        (0.0002, GB, [(GB, 0.001), (GB, 0.0002)], None),
        (0.0001, GB, [(GB, 0.001), (GB, 0.0002)], "more than a copy's"),
        (2e-7, 10, [(10, 2e-6)], "less than any kernel takes"),
        (1.0, 2000 * GB, [(2000 * GB, 0.5)], "faster than the memory"),
    ],
)
def test_a_figure_beyond_the_machine_is_wrong(monkeypatch, seconds, moved, copies, problem):
    monkeypatch.setattr(clock, "memory_speed", lambda: 3000 * GB)
    monkeypatch.setattr(clock, "cache_bytes", lambda: GB)
    if problem is None:
        clock.check_bytes(seconds, moved, copies)
    else:
        with pytest.raises(Wrong, match=problem):
            clock.check_bytes(seconds, moved, copies)


@pytest.mark.parametrize(
    ("clock_rate", "expected"),
    [(3_201_000, 4.916736e12), (3201, None), (0, None)],  # kHz; not kHz; unknown
)
def test_the_speed_of_the_memory_is_that_of_the_data_sheet(monkeypatch, clock_rate, expected):
    about = types.SimpleNamespace(memory_clock_rate=clock_rate, memory_bus_width=6144)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    assert clock.memory_speed() == expected


# Parity.


def rollouts(dones=()):
    """Two of 6 rows of 4 copies that are the same."""
    g = torch.Generator().manual_seed(0)
    theirs = {
        "obs": torch.randn(6, 4, 3, generator=g),
        "actions": torch.randint(0, 2, (6, 4), generator=g),
        "rewards": torch.ones(6, 4),
        "terminations": torch.zeros(6, 4, dtype=torch.bool),
        "truncations": torch.zeros(6, 4, dtype=torch.bool),
        "mask": torch.ones(6, 4, dtype=torch.bool),
    }
    return {name: each.clone() for name, each in theirs.items()}, theirs


@pytest.fixture
def apart(monkeypatch):
    """How two rollouts differ, where a draw lay so far from a boundary."""
    from hour import parity

    def find(ours, theirs, near=1.0):
        monkeypatch.setattr(parity, "_near", lambda *_: torch.full((6, 4), near))
        return parity._apart(None, ours, theirs)

    return find


def test_equal_rollouts_are_not_apart(apart):
    found = apart(*rollouts())
    assert (found["rows"], found["compared"], found["bit_equal"]) == (6, 24, 1.0)
    assert found["obs_apart"] == found["actions_on_a_boundary"] == found["ends_apart"] == 0


def test_an_action_on_a_boundary_is_counted_and_what_follows_it_is_not_compared(apart):
    ours, theirs = rollouts()
    ours["actions"][2, 1] ^= 1
    ours["obs"][3:, 1] = 7
    ours["actions"][3:, 1] ^= 1
    ours["terminations"][4, 1] = True
    found = apart(ours, theirs, near=9e-7)
    assert (found["actions_on_a_boundary"], found["ends_apart"], found["compared"]) == (1, 0, 21)
    with pytest.raises(Wrong, match="1 actions differ that were not drawn on a boundary"):
        apart(ours, theirs, near=2e-6)


def test_observations_are_compared_also_where_the_action_differs(apart):
    ours, theirs = rollouts()
    ours["actions"][2, 1] ^= 1
    ours["obs"][2, 1, 0] += 1
    with pytest.raises(Wrong, match="apart before any action differs"):
        apart(ours, theirs, near=0.0)


def test_other_ends_are_wrong(apart):
    ours, theirs = rollouts()
    ours["terminations"][4, 1] = True
    with pytest.raises(Wrong, match="1 of 4 copies end at another row"):
        apart(ours, theirs)


def test_the_distance_to_a_boundary_is_that_of_the_draw():
    from hour import parity

    theirs = {"mask": torch.ones(2, 3, dtype=torch.bool), "obs": torch.zeros(2, 3, 4)}
    draws = parity.Stream(parity.SEED, parity.ITERATION, 0, 3).uniforms(
        range(2), parity.Purpose.ACTION
    )
    logits = torch.tensor([0.2, 0.3, 0.5]).log()[:, None].expand(3, 3)
    found = parity._near(lambda obs: logits, theirs)
    expected = torch.minimum((draws - 0.2).abs(), (draws - 0.5).abs())
    torch.testing.assert_close(found, expected.double(), atol=1e-6, rtol=0)


# Correctness finds what is wrong.


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (lambda out, calls: out.add_(1e-3), "expected an error of at most 2e-07"),
        (lambda out, calls: out[0, :1].fill_(float("nan")), "expected an error of at most 2e-07"),
        (lambda out, calls: out.mul_(1 + 2e-7 * calls), "other bits"),
    ],
)
def test_a_wrong_kernel_is_found(monkeypatch, wrong, problem):
    pytest.importorskip("triton", reason="needs triton, which is for Linux")
    from hour import correctness

    from vecpg.returns import reward_to_go

    calls = []

    def kernel(rewards, dones, gamma, final_values, last_values, mask, mode, out):
        given = {"final_values": final_values, "last_values": last_values, "mask": mask}
        out.copy_(reward_to_go(rewards, dones, gamma, **given, mask_mode=mode, backend="reference"))
        wrong(out, len(calls))
        calls.append(mode)

    monkeypatch.setattr(correctness.cuda, "reward_to_go", kernel)
    case = (9, 5), torch.float32, "skip", "sliced", ("mask", "last_values"), None
    with pytest.raises(Wrong, match=problem):
        correctness._check_returns("cpu", "returns", *case)


def test_cases_differ_and_are_the_same_in_every_process():
    pytest.importorskip("triton", reason="needs triton, which is for Linux")
    from hour import correctness

    first, again = (
        [name for name, _ in correctness.drawn_cases(correctness.SHAPES, 84, "cpu")]
        for _ in range(2)
    )
    assert first == again
    assert len(set(first)) == len(first) > 80


# What is kept, and shown.

MACHINE = {"cpu": "AMD EPYC", "cores": 16, "gpu": "NVIDIA T", "torch": "2.13", "triton": "3.7"}


def kept(letter, rows, **other):
    return {
        "schema": 1,
        "part": letter,
        "title": PARTS[letter].title,
        "date": "2026-12-01",
        "time": "2026-12-01T10:00:00+00:00",
        "commit": "1a2b3c4",
        "dirty": False,
        "machine": MACHINE,
        "miniature": False,
        "seconds": 10.0,
        "problems": [],
        "not_reached": [],
        "rows": rows,
    } | other


def speed(way, thing, median):
    about = {"what": f"{thing} {way}", "way": way, "thing": thing, "copies": 64, "num_steps": 512}
    return about | {"device": "cuda", "median": median, "ready_seconds": 1.5}


def cell(device, speed):
    return {
        "thing": "train",
        "device": device,
        "vectorization": "tensor",
        "num_envs": 64,
        "median": speed,
        "p5": 0.9 * speed,
        "p95": 1.1 * speed,
        "of_limit": 0.25,
        "limit_is": "matrix product",
    }


FOUND = {
    "a": [{"what": "x", "kernel": "returns", "dtype": "float32", "error": 1e-7, "tolerance": 2e-7}],
    "b": [
        {
            "what": "CartPole-v1, in graphs",
            "env_id": "CartPole-v1",
            "way": "in graphs",
            "copies": 1000,
            "rows": 50,
            "bit_equal": 0.5,
            "obs_apart": 1e-6,
            "rewards_apart": 0.0,
            "actions_apart": None,
            "actions_on_a_boundary": 3,
            "ends_apart": 0,
        }
    ],
    "c": [speed("op by op", "collect", 1.6e5), speed("in graphs", "collect", 2.5e6)],
    "d": [
        {
            "what": "returns, 128 x 64, time",
            "name": "returns",
            "length": 128,
            "num_envs": 64,
            "layout": "time",
            "device_us": 3.04,
            "of_copy": 0.81,
            "call_us": 22.4,
            "cpu_us": None,
        }
    ],
    "e": [
        {
            "what": "64",
            "copies": 64,
            "device": "cuda",
            "warm_up": False,
            "way": "iterations: whole iterations in one CUDA graph",
            "solved": True,
            "solved_seconds": 0.815,
            "wall_seconds": 0.1234,
            "solved_env_steps": 180559,
            "compile_seconds": 2.5,
        }
    ],
    "f": [{"what": "64", "results": {"cells": [cell("cpu", 1e6), cell("cuda", 4e6)]}}],
    "t": [
        {
            "layout": layout,
            "length": 128,
            "num_envs": n,
            "tile": tile,
            "device_us": us,
            "of_copy": c,
        }
        for layout, n, tile, us, c in [
            ("time", 64, "short", 3.0, 0.5),
            ("time", 64, "tall", 2.0, 0.75),
            ("time", 4096, "tall", 9.0, 0.5),
            ("time", 4096, "short", 8.0, 0.6),
            ("batch", 64, "many", 4.0, 0.4),
        ]
    ],
}
SHOWN = {
    "a": "| returns | float32 | 1     | 1e-07         | 2e-07      |",
    "b": "| CartPole-v1 | in graphs | 1000 x 50     | 50.0%     | 1e-06        | 0       |",
    "c": "| collect          | 64     | 512    | 160k     | 2.5M      | 1.5, 1.5           |",
    "d": "| returns | 128 x 64 | time   | 3.0               | 0.81      | 22         |",
    "e": "| 64     | cuda   | 1 of 1 | 0.123                 | 0.81               | 181k ",
    "t": "| time   | 128 x 64   | tall    | 0.75      | short 0.50 |",
    "f": "| train    | tensor | 64       | 1M  | 0.25 of matrix product | 4M   |",
}


@pytest.mark.parametrize("letter", SHOWN)
def test_a_table_has_the_figures_with_their_machine(letter):
    text = tables.table(kept(letter, FOUND[letter]))
    assert SHOWN[letter] in text
    assert f"({letter}) {PARTS[letter].title}: NVIDIA T, AMD EPYC with 16 cores, torch 2.13" in text
    assert "vecpg at 1a2b3c4, 2026-12-01" in text


def test_whole_iterations_have_tables_of_their_own():
    drifted = {
        "what": "12 iterations",
        "env_id": "CartPole-v1",
        "way": "whole iterations",
        "copies": 64,
        "iterations": 2,
        "parameters_apart": [1e-7, 3e-4],
        "first_draw": None,
    }
    draw = {"iteration": 2, "row": 7, "copy": 5, "from_a_boundary": 3e-7}
    text = tables.table(kept("b", [*FOUND["b"], drifted, drifted | {"first_draw": draw}]))
    assert SHOWN["b"] in text
    assert "| CartPole-v1 | 64     | 2                | 1e-07 to 0.0003 " in text
    assert "another action in iteration 2, row 7, copy 5: drawn 3e-07 from a boundary" in text
    assert "not looked further" in tables.table(kept("b", [drifted]))
    phases = {"collect": 0.61, "returns": 0.02, "update": 0.37}
    graph = speed("whole iterations", "train", 6e8) | {"phases": phases}
    text = tables.table(kept("c", [graph, speed("in graphs", "train", 1e6)]))
    assert "| train            | 64     | 512    | 600M             | 1M        |" in text
    assert "* train, 64 copies, whole iterations: collect 61%, returns 2%, update 37%" in text
    text = tables.table(kept("e", FOUND["e"]))
    assert "* cuda: iterations: whole iterations in one CUDA graph" in text


def test_what_is_wrong_or_was_not_reached_is_in_the_table():
    problem = {"what": "128 x 64", "problem": "9 bytes/s are more than a copy's 8"}
    text = tables.table(kept("d", [], problems=[problem], not_reached=["512 x 64"]))
    assert "* FAILED: 128 x 64: 9 bytes/s are more than a copy's 8" in text
    assert "* no time for: 512 x 64" in text


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "vecpg").mkdir()
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    text = f"before\n{record.BEGIN}\nold\n{record.END}\nafter\n"
    (tmp_path / "benchmarks" / "README.md").write_text(text)
    return tmp_path


def test_what_is_recorded_is_kept_and_makes_the_tables(repository, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    for letter in "cf":
        job.write(out / f"first-hour-{letter}.json", kept(letter, FOUND[letter]))
    written = record.record(repository, out)
    own = repository / "benchmarks" / "results" / "AMD-EPYC-16-cores-NVIDIA-T"
    readme, speeds = repository / "benchmarks" / "README.md", repository / "vecpg" / "speeds.json"
    assert written == [own / "first-hour-c.json", own / "first-hour-f.json", readme, speeds]
    text = readme.read_text()
    assert text.startswith(f"before\n{record.BEGIN}\n")
    assert text.endswith(f"{record.END}\nafter\n")
    assert "old" not in text
    assert SHOWN["c"] in text
    assert f"* (a) {PARTS['a'].title}: unmeasured" in text

    from vecpg import device as device_module

    monkeypatch.setattr(device_module, "_SPEEDS", speeds)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T")
    device, reason = device_module.resolve_device("auto", "tensor", 64)
    assert device.type == "cuda", reason
    assert record.record(repository, None) == [readme, speeds]
    assert readme.read_text() == text


def test_a_whole_benchmark_of_a_machine_stands_before_its_first_hour(repository):
    from vecpg.measure import results

    own = repository / "benchmarks" / "results" / "AMD-EPYC-16-cores-NVIDIA-T"
    own.mkdir()
    job.write(own / "first-hour-f.json", kept("f", FOUND["f"]))
    (found,) = results.of_every_machine(own.parent)
    assert [each["median"] for each in found["cells"]] == [1e6, 4e6]
    whole = kept("f", []) | {"cells": [cell("cpu", 7e6)], "devices": {}, "not_run": []}
    job.write(own / "2026-12-02-abc.json", whole)
    (found,) = results.of_every_machine(own.parent)
    assert [each["median"] for each in found["cells"]] == [7e6]


def test_the_fastest_tiles_become_the_table_of_their_gpu(repository, tmp_path):
    path = repository / "vecpg" / "returns" / "cuda.json"
    path.parent.mkdir()
    path.write_text('{"default": [{"layout": "time", "tile": "tall"}], "NVIDIA T": []}')
    job.write(tmp_path / "first-hour-t.json", kept("t", FOUND["t"]))
    assert path in record.record(repository, tmp_path)
    assert json.loads(path.read_text()) == {
        "default": [{"layout": "time", "tile": "tall"}],
        "NVIDIA T": [
            {"layout": "time", "min_envs": 513, "tile": "short"},
            {"layout": "time", "tile": "tall"},
            {"layout": "batch", "tile": "many"},
        ],
    }
    assert max(map(len, path.read_text().splitlines())) < 100


def test_every_measured_shape_gets_its_fastest_tile():
    g = random.Random(0)
    for _ in range(200):
        lengths, widths = (g.sample(range(1, 40), g.randint(1, 4)) for _ in range(2))
        rows = [
            {"layout": layout, "length": t, "num_envs": n, "tile": tile, "device_us": g.random()}
            for layout in ("time", "batch")
            for t in lengths
            for n in widths
            for tile in "abc"
            if g.random() < 0.9
        ]
        found = tiles.rules(rows)
        for one in rows:
            place = {name: one[name] for name in ("layout", "length", "num_envs")}
            same = [row for row in rows if place.items() <= row.items()]
            taken = next(
                rule["tile"]
                for rule in found
                if rule["layout"] == one["layout"]
                and one["length"] <= rule.get("max_rows", one["length"])
                and one["num_envs"] >= rule.get("min_envs", 0)
            )
            assert taken == min(same, key=lambda row: row["device_us"])["tile"]


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"miniature": True}, "got a run in miniature"),
        ({"commit": None}, "belong to no commit"),
        ({"dirty": True}, "belong to no commit"),
    ],
)
def test_what_is_no_figure_of_a_commit_is_not_recorded(repository, tmp_path, other, problem):
    (tmp_path / "out").mkdir()
    job.write(tmp_path / "out" / "first-hour-d.json", kept("d", FOUND["d"], **other))
    with pytest.raises(ValueError, match=f"first-hour-d.json: .*{problem}"):
        record.record(repository, tmp_path / "out")
    assert not list((repository / "benchmarks" / "results").iterdir())
    # Nor where it was measured into the folder that is kept.
    own = repository / "benchmarks" / "results" / "X"
    own.mkdir()
    job.write(own / "first-hour-d.json", kept("d", FOUND["d"], **other))
    with pytest.raises(ValueError, match=f"first-hour-d.json: .*{problem}"):
        record.record(repository, None)


def test_where_nothing_was_measured_nothing_is_recorded(repository):
    with pytest.raises(ValueError, match="results/<machine>, got none; measure first"):
        record.record(repository, None)


def test_the_tables_of_this_repository_are_made_from_its_files():
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    found = record.machines(ROOT / "benchmarks" / "results")
    assert record.with_tables(readme, found) == readme
    if not found:
        assert readme.count(": unmeasured") == len(USUAL)


def test_without_torch_it_says_what_adds_it(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        parts.importlib.util, "find_spec", lambda name: None if name == "torch" else name
    )
    assert first_hour.why_no_gpu() == "there is no torch"
    assert first_hour.plan(list(PARTS), "there is no torch") == []
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "is added by" in each]
    assert line.endswith("pip install -c constraints.txt torch")


def test_what_is_missing_is_added_to_this_python_wherever_it_is_called(monkeypatch, tmp_path):
    bin = tmp_path / "of its own" / "bin"
    bin.mkdir(parents=True)
    (bin / "pip").touch()
    monkeypatch.setattr(sys, "executable", str(bin / "python"))
    monkeypatch.chdir(ROOT / "tests")
    line = parts.pip_line(["torch"])
    assert line == f"'{bin}/pip' install -c ../constraints.txt torch"


# What runs on a GPU, on one that is pretended.


@pytest.fixture
def pretended_gpu(monkeypatch):
    pytest.importorskip("triton", reason="needs triton, which is for Linux")
    monkeypatch.setattr(clock, "product_speed", lambda: float("inf"))
    monkeypatch.setattr(clock, "memory_speed", lambda: None)
    monkeypatch.setattr(clock, "cache_bytes", lambda: None)
    with pretended(), twins():
        yield


@pytest.mark.slow
def test_returns_are_timed_and_wrong_ones_are_not(pretended_gpu, monkeypatch):
    from hour import returns

    monkeypatch.setattr(returns, "_cached_copies", lambda: [])  # of many bytes
    few = functools.partial(clock.on_device, launches=2, replays=2)
    monkeypatch.setattr(clock, "on_device", few)
    for name in returns.BYTES:
        for layout in returns.LAYOUTS:
            found = returns.timed(name, 9, 5, layout)
            assert (found["name"], found["layout"]) == (name, layout)
            assert min(found[each] for each in ("device_us", "copy_us", "call_us", "cpu_us")) > 0
    asked = []
    tiles.measure(types.SimpleNamespace(run=asked.extend))
    assert {"128 x 4096, time, wide", "2048 x 64, batch, many"} < {what for what, _ in asked}
    found = tiles.timed(9, 5, "time", "tall")
    assert (found["tile"], found["length"], found["num_envs"]) == ("tall", 9, 5)

    real = returns.reward_to_go

    def off(*given, **options):
        result = real(*given, **options)
        return result if "backend" in options else result.mul_(1.001)

    monkeypatch.setattr(returns, "reward_to_go", off)
    with pytest.raises(Wrong, match="differs from the reference"):
        returns.timed("returns", 9, 6, "time")


@pytest.mark.slow
def test_every_way_is_compared_with_the_cpu(pretended_gpu):
    from hour import parity

    for way in parity.WAYS:
        for env_id in ("CartPole-v1", "Pendulum-v1"):
            if (way, env_id) == ("kernels in graphs", "CartPole-v1"):
                continue  # of a kernel the same bits are expected, which its twin does not give
            found = parity.compared(env_id, way, 13, "cuda")
            assert (found["env_id"], found["way"], found["rows"]) == (env_id, way, 50)
            assert ("in CUDA graphs" in found["how"]) == ("in graphs" in way)
            assert ("Triton kernels" in found["how"]) == ("kernels" in way)


@pytest.mark.slow
def test_every_rung_is_timed(pretended_gpu, monkeypatch):
    from hour import ladder

    monkeypatch.setattr(ladder, "_SECONDS", 0.0)
    for way, how in ladder.WAYS.items():
        found = ladder.timed("collect" if "torch" in way else "train", 5, 4, way, *how)
        assert found["rounds"] == ladder._FEWEST
        assert found["counted"] == 84
        assert 0 < found["p5"] <= found["median"] <= found["p95"]
    monkeypatch.setattr(clock, "product_speed", lambda: 1.0)
    with pytest.raises(Wrong, match="more products than the GPU computes"):
        ladder.timed("collect", 5, 4, "torch in graphs", *ladder.WAYS["torch in graphs"])


@pytest.mark.slow
def test_whole_runs_are_timed():
    pytest.importorskip("triton", reason="needs triton, which is for Linux")
    from hour import solving

    with pretended(), fused_twins():
        found = solving.solved(4, "cuda", 1, 2)
    assert (found["device"], found["iterations"], found["warm_up"]) == ("cuda", 2, True)
    assert found["way"] == "iterations: whole iterations in one CUDA graph"
    assert found["wall_seconds"] > 0


# Whole iterations, by twins of their kernels.


@pytest.fixture
def whole(pretended_gpu):
    with fused_twins():
        yield


def refused(function, *given):
    with pytest.raises(Wrong) as error:
        function(*given)
    return str(error.value)


@pytest.fixture
def instead(whole):
    """Has a kernel followed by something that spoils what it wrote."""
    # Undone while twins are in place, which are put back then.
    with pytest.MonkeyPatch.context() as patch:

        def replace(module, name, spoil):
            kernel = getattr(module, name)

            def call(*given, **named):
                kernel(*given, **named)
                spoil(*given)

            patch.setattr(module, name, call)

        yield replace


def small(*seeds, env_id="CartPole-v1", device="cuda", copies=5):
    from hour import iterating

    made = functools.partial(iterating._filled, device, window=2, max_episode_steps=9)
    return made(env_id, copies, seeds=seeds) if seeds else made


def test_wrong_kernels_of_whole_iterations_are_found(instead):
    from hour import iterating

    found = {what: check for what, check in iterating.cases("cuda", (5, 6), limit=9, window=2)}
    assert len(found) == 4 * 2 + 2 + 3 + 2 * 2 + 3
    for check, more in (
        (iterating._check_gradient, ()),
        (iterating._check_ages, ()),
        (iterating._check_step, (2,)),
        (iterating._check_runs, (2,)),
    ):
        row = check(small(), "CartPole-v1", 5, *more)
        assert row["error"] <= row["tolerance"]
    step = functools.partial(iterating._check_step, small(), "CartPole-v1", 5, 1)
    ages = functools.partial(iterating._check_ages, small(), "CartPole-v1", 5)
    gradient = functools.partial(iterating._check_gradient, small(), "Pendulum-v1", 5)
    runs = functools.partial(iterating._check_runs, small(), "CartPole-v1", 5, 1)
    instead(iterating.gradient, "sum_gradient", lambda memory, *_: memory.parts.mul_(1 + 1e-5))
    assert "of its norm apart" in refused(gradient)
    instead(iterating.by_age, "subtract_mean_of_runs", lambda weights, *_: weights[-1].add_(1e-4))
    assert "expected an error of at most 5e-07" in refused(ages)
    instead(iterating.cuda, "step", lambda memory, *_: memory.states[1, -1, 0, 7].add_(1e-6))
    assert "of their own size apart" in refused(step)
    assert "states of run 0 beside others are not those of it alone" in refused(runs)


def test_rollouts_that_are_not_the_cpus_are_found(whole, monkeypatch):
    from hour import iterating, parity

    def spoiled(name, spoil, seed, iteration, first_env, window):
        """In the kernel's place: the CPU's rollout, and then something is not as it was."""

        def play(one, given=False):
            options = {"seed": seed, "iteration": iteration, "first_env": first_env}
            options |= {"num_steps": window, "backend": "cpu"}
            theirs = iterating.collect(one.envs, one.policies[0], **options)
            memory, rows = one.memory, len(theirs.mask)
            flags = theirs.mask + 2 * theirs.terminations + 4 * theirs.truncations
            earned = theirs.rewards, theirs.dones, one.config.gamma
            written = {"obs": theirs.obs, "actions": theirs.actions, "rewards": theirs.rewards}
            written |= {"weights": iterating.reward_to_go(*earned, mask=theirs.mask)}
            for each, numbers in (written | {"flags": flags}).items():
                getattr(memory, each)[0, :rows].copy_(numbers)
            memory.last.fill_(rows)
            spoil(getattr(memory, name))

        monkeypatch.setattr(iterating.Filled, "play", play)

    key = iterating.SEED, iterating.ITERATION, iterating.FIRST_ENV, 2
    given = functools.partial(iterating._check_given, small(), "CartPole-v1", 5)
    spoiled("obs", lambda obs: None, *key)
    assert given() == iterating._row("whole rollouts")
    for name, spoil, problem in (
        ("obs", lambda obs: obs[0, 1].add_(1e-6), "observations differ"),
        ("weights", lambda weights: weights[0, 0].mul_(1 + 1e-6), "what is earned"),
        ("flags", lambda flags: flags[0, 1].fill_(3), "terminations differ"),
        ("last", lambda last: last.add_(1), "rows, got"),
    ):
        spoiled(name, spoil, *key)
        assert problem in refused(given)
    key = parity.SEED, parity.ITERATION, 0, parity.ROWS
    free = functools.partial(parity.whole_rollout, "CartPole-v1", 5, "cuda")
    spoiled("obs", lambda obs: None, *key)
    assert free()["bit_equal"] == 1
    spoiled("actions", lambda actions: actions[0, 0].sub_(1).abs_(), *key)
    assert "actions differ that were not drawn on a boundary" in refused(free)


@pytest.mark.slow
def test_whole_iterations_are_followed_until_a_draw_differs(instead, monkeypatch):
    from hour import drift

    found = drift.drifted("CartPole-v1", 5, 2, "cuda")
    assert (found["iterations"], found["first_draw"]) == (2, None)
    assert max(found["parameters_apart"]) < 1e-4
    assert found["how"] == "whole iterations in one CUDA graph"
    assert drift.drifted("Pendulum-v1", 2, 1, "cuda")["iterations"] == 1
    fields_of = drift.filled.fields_of

    def other(*given):
        fields = fields_of(*given)
        fields["actions"][3, 2] ^= 1
        return fields

    monkeypatch.setattr(drift.filled, "fields_of", other)
    assert "in iteration 0 a draw differs" in refused(drift.drifted, "CartPole-v1", 5, 2, "cuda")
    monkeypatch.setattr(drift, "distances", lambda policy, *_: torch.full((99, 5), 1e-7))
    found = drift.drifted("CartPole-v1", 5, 2, "cuda")
    assert found["iterations"] == 0
    assert found["first_draw"] == {
        **{"iteration": 0, "row": 3, "copy": 2},
        "from_a_boundary": pytest.approx(1e-7),
    }
    monkeypatch.setattr(drift.filled, "fields_of", fields_of)
    wrong = lambda policy, *_: [each.data.mul_(1.1) for each in policy.parameters()]  # noqa: E731
    instead(drift, "update", wrong)
    assert "parameters are" in refused(drift.drifted, "CartPole-v1", 5, 2, "cuda")


@pytest.mark.slow
def test_whole_iterations_are_timed_if_they_repeat_and_allocate_nothing(whole, monkeypatch):
    from hour import rung

    monkeypatch.setattr(rung, "_SECONDS", 0.0)
    monkeypatch.setattr(rung, "_FEWEST", 2)
    monkeypatch.setattr(rung, "_ITERATIONS", 2)
    assert len(rung.cases({64: 512, 9: 4})) == 5
    found = rung.collect(5, 4)
    assert (found["thing"], found["way"], found["rounds"]) == ("collect", "whole iterations", 2)
    assert found["counted"] == 84
    found = rung.train(5, 4, runs=2)
    assert (found["thing"], found["iterations"]) == ("train, 2 runs", 2)
    assert sum(found["phases"].values()) == pytest.approx(1)
    assert 0 < found["p5"] <= found["median"] <= found["p95"]

    asked = iter(range(99))
    monkeypatch.setattr(rung, "_allocations", lambda: next(asked))
    assert refused(rung.train, 5, 4) == "iterations allocate memory of the device"
    monkeypatch.setattr(rung, "_allocations", lambda: 0)
    monkeypatch.setattr(rung, "_numbers", lambda _: torch.tensor([next(asked)]))
    assert refused(rung.train, 5, 4) == "the same iterations again came to other bits"
    monkeypatch.undo()
    monkeypatch.setattr(clock, "product_speed", lambda: 1.0)
    with pytest.raises(Wrong, match="more products than the GPU computes"):
        rung._check_products("train", {"median": 1.0})
