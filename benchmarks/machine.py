"""Where, and at which commit, a figure was measured."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commit():
    """The short name of the commit; empty where there is no repository."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()


def results_folder(machine):
    """The folder of results for a machine that `vecpg.run_directory.system` describes."""
    place = f"{machine['cpu']} {machine['cores']} cores {machine['gpu'] or ''}".strip()
    folder = ROOT / "benchmarks" / "results" / re.sub(r"[^A-Za-z0-9]+", "-", place)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
