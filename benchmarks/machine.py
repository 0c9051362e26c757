"""Where, and at which commit, a figure was measured."""

from pathlib import Path

from vecpg.benchmark.results import folder_name, git

ROOT = Path(__file__).parent.parent


def commit():
    """The short name of the commit; empty where there is no repository."""
    return git(ROOT, "rev-parse", "--short", "HEAD") or ""


def results_folder(machine):
    """The folder of results for a machine that `vecpg.run_directory.system` describes."""
    folder = ROOT / "benchmarks" / "results" / folder_name(machine)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
