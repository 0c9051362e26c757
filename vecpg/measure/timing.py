"""Measuring: every cell checked, warmed up, and timed in turn with its limit."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vecpg.kernels.cores import cores
from vecpg.kernels.jit import Compilation
from vecpg.machine import commit, system
from vecpg.measure import results as results_file
from vecpg.measure.cells import (
    Case,
    Cell,
    CheckFailed,
    calls_for,
    cases,
    prepared,
    seconds_of,
    why_not_run,
)
from vecpg.measure.results import Results, statistics_of

# A round takes at least this: what is shorter is called several times.
ROUND_SECONDS = 0.002
# Threads of a matrix product spin for a while when it is over, and would be in the next one's way.
_QUIET_SECONDS = 0.005
# What this process may have of the memory, where a container says so.
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class Pace:
    """When a cell has been timed enough: at `rounds`, or at `seconds` and `fewest` rounds."""

    rounds: int = 20
    seconds: float = 3.0
    fewest: int = 5

    def enough(self, rounds: int, seconds: float) -> bool:
        """Whether to stop.

        Example:
            >>> Pace().enough(20, 0.1), Pace().enough(4, 60.0), Pace().enough(5, 3.0)
            (True, False, True)
        """
        return rounds >= self.rounds or (rounds >= self.fewest and seconds >= self.seconds)


FULL = Pace()
QUICK = Pace(seconds=0.3)


def measure(
    devices: tuple[str, ...],
    vectorizations: tuple[str, ...],
    num_envs: tuple[int, ...],
    *,
    quick: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Results:
    """Measure every cell that can be, on devices that are there.

    Args:
        devices: "cpu" and "cuda".
        vectorizations: as `make_envs` takes them.
        num_envs: N of the cells, any order.
        quick: stop each cell earlier.
        progress: called before each cell, with its number, how many there are, and its name.

    Returns:
        the content of a results file. "failed" are cells whose check found something wrong.
    """
    wanted, left_out = measurable(devices, vectorizations, num_envs)
    cells = []
    for number, case in enumerate(wanted, start=1):
        if progress is not None:
            progress(number, len(wanted), str(case))
        try:
            cells.append(_measured(case, QUICK if quick else FULL))
        except CheckFailed as error:
            left_out.append(_name(case) | {"reason": f"check failed: {error}", "failed": True})
        except (OSError, RuntimeError, MemoryError, ValueError, ArithmeticError) as error:
            left_out.append(_name(case) | {"reason": _words(error), "failed": True})
    return {
        "schema": results_file.SCHEMA,
        **results_file.now(),
        **commit(),
        "quick": quick,
        "machine": machine(),
        "devices": {device: why_not_there(device) for device in devices},
        "cells": cells,
        "not_run": left_out,
    }


def measurable(
    devices: tuple[str, ...],
    vectorizations: tuple[str, ...],
    num_envs: tuple[int, ...],
) -> tuple[list[Case], list[dict[str, Any]]]:
    """The cells that can be measured here, and those that are left out, with the reason.

    Args are those of `measure`.
    """
    here = tuple(device for device in devices if why_not_there(device) is None)
    taken, left_out = [], []
    for case in cases(here, vectorizations, tuple(sorted(set(num_envs)))):
        reason = why_not_run(case, cores(), memory(case.device))
        if reason is None:
            taken.append(case)
        else:
            left_out.append(_name(case) | {"reason": reason, "failed": False})
    return taken, left_out


def why_not_there(device: str) -> str | None:
    """Why a device cannot be measured; None if it is there."""
    if device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device here"
    return None


def machine() -> dict[str, Any]:
    """What a figure depends on. Never a host name, a user or a path."""
    return {
        **system(),
        "kernel_threads": cores(),
        "torch_threads": 1,
        "memory_gib": round(memory("cpu") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def memory(device: str) -> int:
    """Bytes of a device, or what this process may have of the host's."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    if not hasattr(os, "sysconf"):
        return 2**33  # unknown: what few machines have less of
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = _MEMORY_LIMIT.read_text(encoding="utf-8").strip() if _MEMORY_LIMIT.exists() else "max"
    return min(physical, int(text)) if text.isdigit() else physical


def progress_line() -> Callable[[int, int, str], None]:
    """One line on stderr that is written over at a terminal, else a line every few seconds."""
    live = sys.stderr.isatty()
    next_line = 0.0
    end = "" if live else "\n"

    def show(number: int, total: int, name: str) -> None:
        nonlocal next_line
        words = f"{number} of {total}: {name}"
        if live or time.monotonic() >= next_line or number == total:
            next_line = time.monotonic() + 5
            start = "\r\x1b[K" if live else ""
            print(
                f"{start}{words}", end="\n" if number == total else end, file=sys.stderr, flush=True
            )

    return show


def _measured(case: Case, pace: Pace) -> dict[str, Any]:
    with prepared(case) as cell:
        seconds, limit_seconds = _rounds(cell, case.device, pace)
    speed = statistics_of(cell.units, seconds)
    limit = None
    if cell.limit is not None:
        limit = statistics_of(cell.limit.units, limit_seconds)["median"]
    total = sum(sum(spent) for spent in cell.phases.values())
    return {
        **_name(case),
        "num_steps": cell.num_steps,
        "unit": cell.unit,
        **speed,
        "noisy": speed["variation"] > results_file.NOISY,
        "counted": cell.counted,
        "limit": limit,
        "limit_is": None if cell.limit is None else cell.limit.what,
        "of_limit": None if limit is None else speed["median"] / limit,
        "shares": {name: sum(spent) / total for name, spent in cell.phases.items()},
        "rounds": len(seconds),
        "seconds": seconds,
        "limit_seconds": limit_seconds,
    }


def _rounds(cell: Cell, device: str, pace: Pace) -> tuple[list[float], list[float]]:
    """Seconds of one call in each round: of the cell, and of its limit right after it.

    Raises:
        CheckFailed: something was compiled in one of them.
    """
    calls = calls_for(ROUND_SECONDS, cell.run, device)
    if cell.limit is not None:
        limit_calls = calls_for(ROUND_SECONDS, cell.limit.run, device)
    for spent in cell.phases.values():
        spent.clear()
    seconds: list[float] = []
    limit_seconds: list[float] = []
    with Compilation() as compilation:
        while not pace.enough(len(seconds), calls * sum(seconds)):
            time.sleep(_QUIET_SECONDS)
            seconds.append(seconds_of(cell.run, calls, device))
            if cell.limit is not None:
                limit_seconds.append(seconds_of(cell.limit.run, limit_calls, device))
    if compilation.seconds:
        raise CheckFailed("a kernel was compiled while it was timed")
    return seconds, limit_seconds


def _name(case: Case) -> dict[str, Any]:
    return {
        "thing": case.thing,
        "device": case.device,
        "vectorization": case.vectorization,
        "num_envs": case.num_envs,
    }


def _words(error: BaseException) -> str:
    """One line, and never a path: those of the system's errors hold some, also as a cause."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError):
            return found.strerror or type(found).__name__
        found = found.__cause__
    return " ".join(str(error).split())
