import json

import numpy as np
import pytest
from conftest import ROOT

from vecpg.device import faster_device
from vecpg.measure import report, results


def cell(thing, device, kind, num_envs, median, **other):
    return {
        "thing": thing,
        "device": device,
        "vectorization": kind,
        "num_envs": num_envs,
        "num_steps": 16,
        "unit": "steps",
        "median": median,
        "p5": 0.9 * median,
        "p95": 1.1 * median,
        "variation": 0.05,
        "noisy": False,
        "counted": 0.5 if thing in ("collect", "train") else None,
        "limit": 4 * median,
        "limit_is": "copy",
        "of_limit": 0.25,
        "shares": {"collect": 0.7, "update": 0.3} if thing == "train" else {},
        "rounds": 2,
        "seconds": [1.0, 2.0],
        "limit_seconds": [1.0, 2.0],
    } | other


def make_results(**other):
    speeds = {"cpu": {1: 1e5, 64: 2e5, 4096: 4e5}, "cuda": {1: 1e3, 64: 3e5, 4096: 4e6}}
    return {
        "schema": results.SCHEMA,
        "date": "2026-01-02",
        "time": "2026-01-02T03:04:05+00:00",
        "commit": "abc1234",
        "dirty": False,
        "quick": False,
        "machine": {
            "vecpg": "0.1.0",
            "torch": "2.13.0",
            "cpu": "AMD (X) 5",
            "cores": 4,
            "kernel_threads": 4,
            "gpu": "NVIDIA T",
            "load_average": 0.25,
        },
        "devices": {"cpu": None, "cuda": None},
        "cells": [
            cell(thing, device, kind, n, median)
            for device, each in speeds.items()
            for n, median in each.items()
            for thing, kind in (("train", "tensor"), ("returns", None))
        ]
        + [cell("train", "cpu", "sync", 1, 4e4, noisy=True)],
        "not_run": [
            {
                "thing": thing,
                "device": "cpu",
                "vectorization": "async",
                "num_envs": 64,
                "reason": "too many",
                "failed": False,
            }
            for thing in ("collect", "train")
        ],
    } | other


def rows(text):
    return [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines()]


def test_the_table_has_both_devices_their_ratio_and_the_crossover():
    text = report.table(make_results())
    training = text[text.index("Training") :]
    assert rows(training)[4][:7] == [
        "sync",
        "1",
        "16",
        "50%",
        "40k (36k to 44k) noisy",
        "25% of 160k",
        "70, 30",
    ]
    assert rows(training)[6] == [
        "tensor",
        "64",
        "16",
        "50%",
        "200k (180k to 220k)",
        "25% of 800k",
        "70, 30",
        "300k (270k to 330k)",
        "25% of 1.2M",
        "70, 30",
        "1.50",
    ]
    assert "* tensor: CUDA is faster from 64 environments on\n" in training
    assert "limit: copy (tensor, sync)" in training
    assert "not run: cpu, async x 64 (collect, train): too many" in text
    assert "AMD (X) 5, 4 cores, NVIDIA T" in text


def test_without_cuda_there_are_no_empty_columns():
    found = make_results(devices={"cpu": None, "cuda": "no such thing"})
    found["cells"] = [one for one in found["cells"] if one["device"] == "cpu"]
    text = report.table(found)
    assert "CUDA" not in text
    assert "* cuda: no such thing" in text
    assert "faster" not in text


@pytest.mark.parametrize(
    ("cuda", "number"),
    [((2, 2, 2), 1), ((1, 2, 2), 8), ((2, 1, 2), 64), ((2, 2, 1), None), ((0, 0, 0), None)],
)
def test_the_crossover_is_where_cuda_stays_faster(cuda, number):
    cells = [cell("train", "cpu", "tensor", n, 1.0) for n in (1, 8, 64, 512)]
    cells += [
        cell("train", "cuda", "tensor", n, speed) for n, speed in zip((1, 8, 64), cuda, strict=True)
    ]
    assert report.crossover(cells) == number


def test_the_picture_has_every_line_its_limit_and_units():
    figure = report.picture(make_results())
    drawn = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in drawn] == ["returns", "training, whole iterations"]
    training = drawn[1]
    assert (training.get_xscale(), training.get_yscale()) == ("log", "log")
    assert training.get_xlabel() == "environments, num_envs"
    assert training.get_ylabel() == "environment steps / s"
    # tensor on both, and sync; each a line with error bars, and a dashed limit.
    assert len(training.containers) == 3
    limits = [line for line in training.lines if line.get_marker() == "_" and line.is_dashed()]
    assert sorted(tuple(line.get_ydata()) for line in limits) == [
        (4e3, 1.2e6, 1.6e7),
        (1.6e5,),
        (4e5, 8e5, 1.6e6),
    ]
    speeds, whiskers = training.containers[0].get_children()[0], training.containers[0].lines[2][0]
    for n, segment in zip((1, 64, 4096), whiskers.get_segments(), strict=True):
        median = {1: 1e5, 64: 2e5, 4096: 4e5}[n]
        np.testing.assert_allclose(segment, [[n, 0.9 * median], [n, 1.1 * median]])
    assert speeds.get_ydata().tolist() == [1e5, 2e5, 4e5]
    (legend,) = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    words = [text.get_text() for text in legend.get_texts()]
    assert words[:3] == ["sync on CPU", "tensor on CPU", "returns, update on CPU"]
    assert "tensor on CUDA" in words


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "vecpg").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    readme = f"before\n{report._BEGIN}\nold\n{report._END}\nafter\n"
    (tmp_path / "benchmarks" / "README.md").write_text(readme)
    return tmp_path


def test_what_is_recorded_is_small_and_makes_the_tables(repository, monkeypatch):
    found = make_results()
    written = report.record(found, repository)
    assert [str(path.relative_to(repository)) for path in written] == [
        "benchmarks/results/AMD-X-5-4-cores-NVIDIA-T/2026-01-02-abc1234.json",
        "benchmarks/results/AMD-X-5-4-cores-NVIDIA-T/benchmark.png",
        "benchmarks/README.md",
        "vecpg/speeds.json",
    ]
    kept = results.read(written[0])
    assert kept["machine"] == found["machine"]
    assert [one["median"] for one in kept["cells"]] == [one["median"] for one in found["cells"]]
    assert not any("seconds" in one or "limit_seconds" in one for one in kept["cells"])
    readme = written[2].read_text()
    assert readme.startswith("before\n")
    assert readme.endswith(f"{report._END}\nafter\n")
    assert "old" not in readme
    assert report.table(found) in readme
    assert "(results/AMD-X-5-4-cores-NVIDIA-T/benchmark.png)" in readme
    rows = json.loads(written[3].read_text())["rows"]
    trained = [one for one in found["cells"] if one["thing"] == "train"]
    assert [row["median"] for row in rows] == [one["median"] for one in trained]
    assert faster_device(rows, "NVIDIA T", "tensor", 64)[0] == "cuda"
    assert faster_device(rows, "NVIDIA T", "tensor", 63)[0] == "cpu"

    assert (repository / "benchmarks/results/AMD-X-5-4-cores-NVIDIA-T/benchmark.png").stat().st_size
    monkeypatch.setattr(report, "save_picture", lambda *_: None)  # it takes a second
    # The newer one is shown, and a machine without a GPU says nothing about one.
    report.record(make_results(time="2026-01-02T03:04:06+00:00", commit="0000000"), repository)
    other = make_results(machine=found["machine"] | {"gpu": None, "cores": 2})
    report.record(other, repository)
    hour = {**make_results(commit="f00"), "rows": [{"results": {"cells": found["cells"]}}]}
    hour["machine"] = hour["machine"] | {"gpu": "NVIDIA U"}
    (repository / "benchmarks/results/U").mkdir()
    (repository / "benchmarks/results/U/first-hour-f.json").write_text(json.dumps(hour))
    report.record(other, repository)
    readme = written[2].read_text()
    assert readme.count("### ") == 2
    assert "0000000" in readme
    rows = json.loads(written[3].read_text())["rows"]
    assert {(row["gpu"], row["commit"]) for row in rows} == {
        ("NVIDIA T", "0000000"),
        ("NVIDIA U", "f00"),  # of which there is a first hour only
    }


@pytest.mark.parametrize("other", [{"quick": True}, {"dirty": True}, {"commit": None}])
def test_what_belongs_to_no_commit_or_is_quick_is_not_recorded(repository, other):
    with pytest.raises(ValueError, match="--record"):
        report.record(make_results(**other), repository)
    assert list((repository / "benchmarks" / "results").iterdir()) == []


def test_a_kept_file_of_another_schema_is_named(repository):
    machine = repository / "benchmarks" / "results" / "old"
    machine.mkdir()
    (machine / "2025-01-01-abc.json").write_text('{"schema": 99}')
    with pytest.raises(
        ValueError, match="2025-01-01-abc.json: expected results of schema 1, got 99"
    ):
        report.record(make_results(), repository)


def test_the_tables_of_this_repository_are_made_from_its_results():
    newest = results.newest_of_each_machine(ROOT / "benchmarks" / "results")
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    assert report.with_figures(readme, newest) == readme
    assert (ROOT / "vecpg" / "speeds.json").read_text() == report.speeds_of(newest)
