"""Where a number comes from: the machine, the versions, the commit."""

import functools
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import vecpg


def versions() -> dict[str, str | None]:
    """Of vecpg, Python and the packages whose bits a run depends on; None for what is missing."""
    packages = ("torch", "gymnasium", "numpy", "numba", "tensorboard")
    return {
        "vecpg": vecpg.__version__,
        "python": platform.python_version(),
        **{package: package_version(package) for package in packages},
    }


@functools.cache
def package_version(package: str) -> str | None:
    """Of a package as pip knows it; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def system() -> dict[str, Any]:
    """Versions and hardware. Never a host name, a user or a path."""
    return {**versions(), **hardware()}


def hardware() -> dict[str, Any]:
    """What the machine is, in words, and its number of cores."""
    import torch  # a command's mistakes are found without it

    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def folder_name(machine: dict[str, Any]) -> str:
    """A machine, as the name of a folder: CPU model, cores and GPU.

    Example:
        >>> folder_name({"cpu": "AMD EPYC", "cores": 2, "gpu": None})
        'AMD-EPYC-2-cores'
    """
    place = f"{machine['cpu']} {machine['cores']} cores {machine['gpu'] or ''}".strip()
    return re.sub(r"[^A-Za-z0-9]+", "-", place)


def checkout() -> Path:
    """The repository that this package lies in.

    Raises:
        ValueError: it lies in none.
    """
    root = Path(__file__).resolve().parents[1]
    if git(root, "rev-parse", "--show-toplevel") != str(root):
        raise ValueError(
            "expected vecpg in a checkout, got it installed without its repository; clone it, and"
            " install it with pip's -e"
        )
    return root


def commit() -> dict[str, Any]:
    """The commit of this package, and whether a file differs from it; None outside a repository."""
    try:
        root = checkout()
    except ValueError:
        return {"commit": None, "dirty": None}
    changed = git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": git(root, "rev-parse", "--short", "HEAD"), "dirty": changed != ""}


def git(root: Path, *args: str) -> str | None:
    """What a git command prints; None where it fails, or there is no git."""
    try:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def results_folder(machine: dict[str, Any]) -> Path:
    """The folder for figures of a machine that `system` describes; it is made.

    It lies beside this package, in a checkout or in a copy of its files.

    Raises:
        ValueError: the package was installed without its benchmarks.
    """
    benchmarks = Path(__file__).resolve().parents[1] / "benchmarks"
    if not benchmarks.is_dir():
        raise ValueError(
            "expected vecpg with its benchmarks beside it, got it installed alone; clone its"
            " repository, and install it with pip's -e"
        )
    folder = benchmarks / "results" / folder_name(machine)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
