import contextlib
import dataclasses
import getpass
import json
import re
import socket
import types
from pathlib import Path

import pytest
import torch

from vecpg import machine
from vecpg import update as update_module
from vecpg.measure import cells, report, results, timing
from vecpg.measure import cli as measure_cli
from vecpg.measure.cells import Case, CheckFailed, calls_for, cases, prepared, why_not_run
from vecpg.measure.timing import Pace
from vecpg.rollout import collect

GIB = 2**30
KINDS = ("sync", "async", "vector_entry_point", "tensor")
GRADIENT = update_module, "by_machine_code"


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Few steps, one call for warming up, small limits."""
    monkeypatch.setattr(cells, "_STEPS_ELSEWHERE", 64)
    monkeypatch.setattr(cells, "_STEPS", {"sync": 64, "async": 64})
    monkeypatch.setattr(cells, "_PRODUCT_SIDE", {"cpu": 16})
    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-9)
    monkeypatch.setattr(timing, "_QUIET_SECONDS", 0)
    monkeypatch.setattr(timing, "FULL", Pace(rounds=3))


def run(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        measure_cli.benchmark_main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def test_every_cell_is_asked_for_once():
    found = cases(("cpu", "cuda"), ("sync", "tensor"), (1, 8))
    assert len(set(found)) == len(found)
    of_eight = {
        (case.thing, case.device, case.vectorization) for case in found if case.num_envs == 8
    }
    # The host steps Gymnasium's environments, on whichever device the policy is.
    assert of_eight == {
        ("stepping", "cpu", "sync"),
        ("stepping", "cpu", "tensor"),
        ("stepping", "cuda", "tensor"),
        *((thing, device, None) for thing in ("returns", "update") for device in ("cpu", "cuda")),
        *(
            (thing, device, kind)
            for thing in ("collect", "train")
            for device in ("cpu", "cuda")
            for kind in ("sync", "tensor")
        ),
    }


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("collect", "cpu", "sync", 512), None),
        (
            Case("collect", "cpu", "sync", 513),
            "sync steps copies in turn, beyond 512 in a process no faster",
        ),
        (Case("train", "cpu", "async", 1536), None),
        (
            Case("train", "cpu", "async", 1537),
            "async steps copies in turn, beyond 512 in a process no faster",
        ),
        (Case("collect", "cpu", "tensor", 4096), None),
        (Case("collect", "cpu", "tensor", 20_000), None),
        (Case("collect", "cpu", "tensor", 30_000), "may take 2.8 GiB, over half of 4.0 GiB"),
        (Case("returns", "cuda", None, 2**20), "over half of 4.0 GiB"),
    ],
)
def test_what_is_too_much_is_not_run(case, reason):
    given = why_not_run(case, cores=3, memory=4 * GIB)
    assert (given is None) if reason is None else (reason in given)


@pytest.mark.parametrize("case", cases(("cpu",), KINDS, (2,)), ids=str)
def test_every_cell_is_checked_and_counts_what_it_does(case):
    thing = case.thing
    with prepared(case) as cell:
        cell.run()
        if cell.limit is not None:
            cell.limit.run()
            assert cell.limit.units > 0
    steps = {"stepping": 16, "returns": 256, "update": 64}
    if thing in steps:
        assert cell.units == steps[thing]
    else:
        # Whole episodes: of two copies, which go on until they have made 32 steps each.
        assert 64 <= cell.units < 400
        assert 0 < cell.counted <= 1
    if thing == "train":
        assert list(cell.phases) == ["collect", "statistics", "returns", "update"]
        assert [len(spent) for spent in cell.phases.values()] == [1, 1, 1, 1]


def test_collecting_is_bounded_by_its_environments_and_by_products():
    for kind, words in (("sync", "bare stepping"), ("tensor", "matrix product")):
        with prepared(Case("collect", "cpu", kind, 1)) as cell:
            assert cell.limit.what == words


def wrong_collect(envs, policy, **settings):
    rollout = collect(envs, policy, **settings)
    rollout.obs[1:] += 0.01
    return rollout


def wrong_gradient(policy, *rest, **settings):
    result = update_module.by_autograd(policy, *rest, **settings)
    policy.network[0].bias.grad[0] += 1
    return result


@pytest.mark.parametrize(
    ("thing", "kind", "where", "wrong", "problem"),
    [
        ("stepping", "sync", (cells, "collect"), wrong_collect, "is not CartPole's"),
        ("update", None, GRADIENT, wrong_gradient, "the gradient is not autograd's"),
    ],
)
def test_what_is_wrong_is_not_timed(monkeypatch, thing, kind, where, wrong, problem):
    monkeypatch.setattr(*where, wrong)
    with pytest.raises(CheckFailed, match=problem), prepared(Case(thing, "cpu", kind, 2)):
        pass


def test_wrong_returns_are_not_timed(monkeypatch):
    right = cells.reward_to_go

    def wrong(*args, out=None, **settings):
        result = right(*args, **settings)
        return result if out is None else out.copy_(result * (1 + 1e-5))

    monkeypatch.setattr(cells, "reward_to_go", wrong)
    with (
        pytest.raises(CheckFailed, match="returns differ"),
        prepared(Case("returns", "cpu", None, 2)),
    ):
        pass


def test_the_clock_waits_for_the_device_on_both_sides(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(
        cells.time, "perf_counter", lambda: events.append("clock") or float(len(events))
    )
    cells.seconds_of(lambda: events.append("call"), 2, "cuda")
    assert events == ["wait", "clock", "call", "call", "wait", "clock"]
    events.clear()
    assert cells.seconds_of(lambda: events.append("call"), 2, "cpu") == 1.5
    assert "wait" not in events


def test_short_calls_are_made_often_enough(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(cells.time, "perf_counter", lambda: clock.now)

    def call():
        clock.now += 0.25

    assert calls_for(1.0, call, "cpu") == 4
    assert clock.now >= 50.0, "it was warm"
    assert calls_for(0.125, call, "cpu") == 1


def test_results_have_every_cell_or_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seen = []
    found = timing.measure(
        ("cpu", "cuda"),
        ("sync",),
        (2, 1, 2, 600),
        progress=lambda number, total, name: seen.append((number, total, name)),
    )
    assert "finds no CUDA device here" in found["devices"]["cuda"]
    assert found["devices"]["cpu"] is None
    left_out = {(one["thing"], one["num_envs"]) for one in found["not_run"]}
    assert left_out == {("stepping", 600), ("collect", 600), ("train", 600)}
    assert len(found["cells"]) == 5 + 5 + 2 == len(seen)
    assert seen[-1] == (12, 12, "update, x 600, cpu")
    for cell in found["cells"]:
        assert len(cell["seconds"]) == cell["rounds"] == 3
        assert cell["p5"] <= cell["median"] <= cell["p95"]
        assert (cell["limit"] is None) == (cell["limit_seconds"] == [])
        if cell["limit"] is not None:
            assert cell["of_limit"] == pytest.approx(cell["median"] / cell["limit"])
        if cell["thing"] == "train":
            assert sum(cell["shares"].values()) == pytest.approx(1)
    text = json.dumps(found)
    for secret in (
        socket.gethostname(),
        getpass.getuser() + "/",
        str(Path.home()) + "/",
        str(Path.cwd()),
    ):
        assert secret not in text


def test_a_failed_check_is_status_1_and_in_the_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cells, "collect", wrong_collect)
    args = ["--num-envs", 2, "--vectorizations", "sync", "--devices", "cpu", "--out-dir", tmp_path]
    code, out, err = run(capsys, *args)
    assert code == 1
    assert "FAILED: cpu, sync x 2 (stepping" in out
    assert "is not CartPole's" in out
    assert "Returns: rewards per second" in out, "the others were measured"
    assert "Traceback" not in err


def test_the_command_leaves_a_table_a_file_and_a_picture(tmp_path, capsys):
    measure_cli.benchmark_main(
        f"--num-envs 1 --vectorizations tensor --devices cpu --out-dir {tmp_path}".split()
    )
    captured = capsys.readouterr()
    files = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(files) == {".json", ".png"}
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    assert "Training, whole iterations" in captured.out
    assert "1 of 5: stepping, tensor x 1, cpu" in captured.err
    assert re.match(r"\d{4}-\d\d-\d\d-\d{6}-", files[".json"].name)
    shown = tmp_path / "again"
    measure_cli.benchmark_main(["--results", str(files[".json"]), "--out-dir", str(shown)])
    assert capsys.readouterr().out == captured.out
    assert [path.suffix for path in shown.iterdir()] == [".png"]


def test_what_was_measured_is_kept_before_it_is_shown(tmp_path, monkeypatch):
    def nobody_reads(found):
        raise BrokenPipeError

    monkeypatch.setattr(report, "table", nobody_reads)
    monkeypatch.setattr(measure_cli, "exit_codes", contextlib.nullcontext)
    with pytest.raises(BrokenPipeError):
        measure_cli.benchmark_main(
            f"--num-envs 1 --vectorizations sync --devices cpu --out-dir {tmp_path}".split()
        )
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--devices", "tpu"], "invalid choice 'tpu' for argument '--devices'"),
        (["--devices"], "--devices: expected at least one, got none"),
        (["--num-envs", 8, 0], "--num-envs: expected at least 1, got 0"),
        (["--num-envs", "x"], "--num-envs: Could not find valid parse for arguments: ['x']"),
        (["--vectorizations", "fast"], "invalid choice 'fast' for argument '--vectorizations'"),
        (["--out-dir", "file/x"], "--out-dir file/x cannot be written: Not a directory; give"),
        (["--compare", "HEAD", "--record"], "--compare: expected it without --record"),
        (["--results", "old.json"], "old.json: expected results of schema 1, got 0; measure again"),
        (["--results", "file"], "file: expected results in JSON, got something else; give"),
        (["--results", "compared.json"], "compared.json: expected what vecpg benchmark mea"),
        (["--results", "quick.json", "--record"], "--record keeps whole rounds only"),
        (["--quick", "--record"], "--record keeps whole rounds only"),
        (["--num-envs", 10**9, "--vectorizations", "sync"], "nothing was measured: "),
        (["--num-envs", 10**9, "--compare", "HEAD"], "nothing was compared: "),
        (["--results", "nothing"], "nothing cannot be read: No such file"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("old.json").write_text('{"schema": 0}')
    Path("compared.json").write_text('{"schema": 1, "machine": {}, "cells": [], "not_run": []}')
    kept = {"commit": "abc1234", "dirty": False, "quick": True}
    kept |= {"schema": 1, "machine": {}, "devices": {}, "cells": [], "not_run": []}
    Path("quick.json").write_text(json.dumps(kept))
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert message in err


@pytest.mark.parametrize("args", [["--record"], ["--compare", "HEAD"]])
def test_what_needs_a_checkout_says_so_before_anything_is_measured(
    capsys, tmp_path, monkeypatch, args
):
    installed = tmp_path / "site-packages" / "vecpg"
    monkeypatch.setattr(machine, "__file__", str(installed / "machine.py"))
    code, out, err = run(capsys, *args, "--out-dir", tmp_path)
    assert (code, out) == (2, "")
    expected = (
        "expected vecpg in a checkout, got it installed without its repository; clone it, and"
    )
    assert err == f"error: {args[0]}: {expected} install it with pip's -e\n"


def test_rounds_end_by_number_or_by_time():
    pace = Pace(rounds=20, seconds=3.0, fewest=5)
    assert [pace.enough(*at) for at in ((19, 2.9), (20, 0.0), (4, 99.0), (5, 3.0))] == [
        False,
        True,
        False,
        True,
    ]


def test_quick_takes_fewer_numbers_unless_they_are_given():
    everything = measure_cli.BenchmarkConfig().numbers
    assert everything == (1, 8, 64, 512, 4096, 32768)
    assert set(measure_cli.BenchmarkConfig(quick=True).numbers) < set(everything)
    assert measure_cli.BenchmarkConfig(quick=True, num_envs=(512,)).numbers == (512,)


def test_statistics_are_of_speeds():
    numbers = results.statistics_of(100, [1.0, 2.0, 4.0, 5.0, 10.0])
    assert numbers["median"] == 25.0
    assert numbers["variation"] == (50 - 20) / 25
    assert numbers["p5"] == pytest.approx(12.0)
    assert numbers["p95"] == pytest.approx(90.0)


def test_a_file_is_read_as_it_was_written_and_small_without_rounds(tmp_path):
    cell = {"thing": "returns", "median": 1234567.0, "shares": {}, "seconds": [1 / 3]}
    content = {
        "schema": results.SCHEMA,
        "machine": {"cpu": "x", "gpu": None},
        "devices": {"cpu": None},
        "cells": [cell, cell | {"seconds": [2.0], "limit_seconds": [3.0]}],
        "not_run": [],
    }
    results.write(tmp_path / "x.json", content)
    again = results.read(tmp_path / "x.json")
    assert again == content | {
        "cells": [
            {**cell, "median": 1234570.0, "seconds": [0.333333]},
            {**content["cells"][1], "median": 1234570.0},
        ]
    }
    assert [sorted(one) for one in results.small(content)["cells"]] == [
        ["median", "shares", "thing"]
    ] * 2


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({}, "2026-01-02-abc1234"),
        ({"quick": True}, "2026-01-02-abc1234-quick"),
        ({"dirty": True}, "2026-01-02-abc1234-changed"),
        ({"commit": None, "dirty": None}, "2026-01-02-no-commit"),
    ],
)
def test_a_file_is_named_for_its_commit(other, name):
    content = {"date": "2026-01-02", "commit": "abc1234", "dirty": False, "quick": False}
    assert results.file_name(content | other) == name


def test_a_case_says_what_it_is():
    assert str(Case("train", "cpu", "sync", 8)) == "train, sync x 8, cpu"
    assert dataclasses.asdict(Case("update", "cpu", None, 8))["vectorization"] is None
