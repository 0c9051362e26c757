"""The harnesses of benchmarks/peers, without the packages that they measure."""

import importlib
import json
import subprocess
import sys

import pytest
from conftest import ROOT

PEERS = ROOT / "benchmarks" / "peers"


@pytest.fixture
def peers(monkeypatch):
    """The module run.py, importable names beside it, and nothing left behind."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [str(PEERS), *sys.path])
    yield importlib.import_module("run")
    for name in set(sys.modules) - before:
        if str(PEERS) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def test_every_harness_imports_without_its_package_and_says_so():
    code = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
import run
peers = [name for name in run.HARNESSES if name not in ("ours", "gymnasium_stepping")]
blocked = ("stable_baselines3", "jax", "gymnax", "optax", "rlox", "envpool", "torchrl")
for name in blocked:
    sys.modules[name] = None  # as if it were not installed
for name in peers:
    print(run.why_not(importlib.import_module(name)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(PEERS)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "not installed: stable_baselines3",
        "not installed: jax",
        "not installed: rlox",
        "not installed: envpool",
        "not installed: torchrl",
    ]


def test_there_is_a_harness_in_the_table_for_every_file(peers):
    files = {path.stem for path in PEERS.glob("*.py")} - {"run", "harness"}
    assert files == set(peers.HARNESSES)
    for name in peers.HARNESSES:
        harness = importlib.import_module(name)
        assert harness.__doc__
        assert harness.NEEDS
        # A file that is called like the package it imports would import itself.
        assert name not in harness.NEEDS


class Fake:
    """A harness whose rounds, or seeds, give these numbers; None is a failure."""

    def __init__(self, peers, name, numbers):
        self.peers, self.name, self.numbers = peers, name, iter(numbers)

    def ask(self, verb, *rest):
        if verb == "make":
            return 1.0, 0.01
        if verb in ("keep", "drop") or (verb, *rest) == ("solve", 0):
            return None
        number = next(self.numbers)
        if number is None:
            raise self.peers.Failure("it died")
        return number


def test_what_fails_in_a_round_costs_only_itself(peers):
    workers = [
        Fake(peers, "ours", [5.0, 7.0, 6.0]),
        Fake(peers, "jax_reinforce", [1.0, None]),
    ]
    entries = [
        (worker, index, "training", worker.name, [""], "") for index, worker in enumerate(workers)
    ]
    not_run = []
    (row,) = peers.compare(entries, 3, not_run)
    assert (row["name"], row["rounds"], row["median"]) == ("ours", [5.0, 7.0, 6.0], 6.0)
    assert not_run == [{"harness": "jax_reinforce", "reason": "failed in round 2: it died"}]


def test_what_fails_on_a_seed_did_not_solve_it(peers):
    workers = [Fake(peers, "ours", [(0.5, 10), None])]
    (row,) = peers.solve(workers, 2, [])
    assert [(run["seconds"], run["env_steps"]) for run in row["runs"]] == [(0.5, 10), (None, None)]


def test_the_table_holds_medians_ratios_and_what_did_not_run(peers):
    def row(name, *rounds):
        middle = sorted(rounds)[len(rounds) // 2]
        return {"name": name, "variant": "", "unequal": "", "rounds": rounds, "median": middle}

    def runs(*seconds):
        return [
            {"seed": seed, "seconds": each, "env_steps": None if each is None else 1000 * seed}
            for seed, each in enumerate(seconds, start=1)
        ]

    lines = peers.table(
        {
            "machine": {"cpu": "Abacus", "cores": 3, "python": "3.11"},
            "packages": {"slowly": "1.2"},
            "commit": "abc",
            "groups": [
                {
                    "name": "training, 64 copies",
                    "rows": [row("vecpg", 1e6, 2e6, 4e6), row("slowly", 900.0, 1000.0, 1100.0)],
                }
            ],
            "solve": [
                {"name": "vecpg", "runs": runs(0.5, 1.5, 1.0)},
                {"name": "slowly", "runs": runs(3.0, None, 5.0)},
            ],
            "not_run": [{"harness": "absent", "reason": "not installed: absent"}],
        }
    ).splitlines()
    assert lines[0] == "Abacus, 3 cores; Python 3.11, slowly 1.2; commit abc."
    assert "| vecpg | 2 M | 1 M to 4 M | 1 |  |  |" in lines
    assert "| slowly | 1 k | 900 to 1.1 k | 0.0005 |  |  |" in lines
    assert "| 2 | 1.50 (2,000) | not solved |" in lines
    assert "| median | 1.00 |  |" in lines
    assert "| worst | 1.50 |  |" in lines
    assert lines[-1] == "* absent: not installed: absent"


def test_the_committed_table_is_made_from_the_committed_numbers(peers):
    (path,) = (ROOT / "benchmarks" / "results").glob("*/peers.json")
    table = peers.table(json.loads(path.read_text(encoding="utf-8")))
    assert table in (PEERS / "README.md").read_text(encoding="utf-8")
