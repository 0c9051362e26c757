"""The directory of a run: its name, its settings, the machine. Never overwritten."""

import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vecpg
from vecpg.checkpoint import write_atomically
from vecpg.config import Config


def make_run_directory(config: Config) -> Path:
    """A new directory under `config.out_dir` with system.json and checkpoints/.

    Raises:
        OSError: it cannot be made.
    """
    env_id = config.env_id.replace("/", "-").replace(":", "-")
    name = f"{env_id}__{config.exp_name}__{config.seed}__{int(time.time())}"
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for attempt in range(1000):
        run_dir = out_dir / (f"{name}-{attempt}" if attempt else name)
        try:
            run_dir.mkdir()
            break
        except FileExistsError:
            continue
    (run_dir / "checkpoints").mkdir()
    write_json(run_dir / "system.json", system())
    return run_dir


def write_json(path: Path, content: dict[str, Any]) -> None:
    """One JSON object, indented; written whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def system() -> dict[str, Any]:
    """Versions and hardware. Never a host name, a user or a path."""
    packages = ("torch", "gymnasium", "numpy", "numba", "tensorboard")
    return {
        "vecpg": vecpg.__version__,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
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
