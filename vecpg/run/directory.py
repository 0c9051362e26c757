"""The directory of a run: its name, its settings, the machine. Never overwritten."""

import json
import time
from pathlib import Path
from typing import Any

from vecpg.config import Config
from vecpg.machine import system
from vecpg.run.checkpoint import write_atomically


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
