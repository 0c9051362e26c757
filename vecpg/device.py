"""Which device a run uses, and why."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vecpg.torchrun import place

# `vecpg benchmark --record` writes it from benchmarks/results: speeds of training.
_SPEEDS = Path(__file__).with_name("speeds.json")


def resolve_device(
    device: str, vectorization: str = "sync", num_envs: int = 1
) -> tuple[torch.device, str]:
    """The device that `--device` names, and the reason in words.

    Where torchrun started several ranks on this machine, each has a GPU of its own: of its
    LOCAL_RANK.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:i"; with several ranks no "cuda:i".
        vectorization: how the environments are stepped; only "auto" looks at it.
        num_envs: N; only "auto" looks at it.

    Raises:
        ValueError: a device that is unknown or not there.
    """
    where = place()
    ranks = 1 if where is None else where.local_world_size
    own = "cuda" if where is None or ranks == 1 else f"cuda:{where.local_rank}"
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu"), f"torch {torch.__version__} finds no CUDA device here"
        try:
            rows = json.loads(_SPEEDS.read_text(encoding="utf-8"))["rows"]
        except (OSError, ValueError, KeyError) as error:
            return torch.device("cpu"), f"the measurements cannot be read: {error}"
        name, reason = faster_device(rows, torch.cuda.get_device_name(), vectorization, num_envs)
        if name == "cuda" and (lacking := _too_few(ranks)) is not None:
            return torch.device("cpu"), f"CUDA takes {lacking}"
        return torch.device(own if name == "cuda" else name), reason
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:i, got {device}")
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"--device {device}: torch {torch.__version__} finds no CUDA device here;"
                " use --device cpu, or install a CUDA build of torch"
            )
        if (resolved.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"--device {device}: expected an index below {torch.cuda.device_count()}"
            )
        if ranks > 1 and resolved.index is not None:
            raise ValueError(
                f"--device {device}: expected a GPU for each of {ranks} ranks on this machine, got"
                " one for all; use --device cuda, which is each rank's own"
            )
        if (lacking := _too_few(ranks)) is not None:
            raise ValueError(
                f"--device {device}: expected {lacking}; start fewer ranks, or use --device cpu"
            )
        resolved = torch.device(own) if resolved.index is None else resolved
    return resolved, "as asked"


def _too_few(ranks: int) -> str | None:
    """What is expected and what is there, where there is no GPU for every rank."""
    count = torch.cuda.device_count()
    if ranks <= max(count, 1):
        return None
    return f"at least {ranks} GPUs for {ranks} ranks on this machine, got {count}"


def faster_device(
    rows: Sequence[dict[str, Any]], gpu: str, vectorization: str, num_envs: int
) -> tuple[str, str]:
    """The device on which training was measured to be faster, and the reason in words.

    It is CUDA only if a GPU of this name was measured with this vectorization, and was faster
    beyond doubt (its 5th percentile above the CPU's 95th) at the next measured numbers of
    environments on both sides of `num_envs`, or on the one side where there are any. All figures
    are of CartPole-v1 and a small policy, on the CPU of the machine that the GPU is in.

    Args:
        rows: "gpu", "vectorization", "num_envs", "device", "p5" and "p95" of each measurement.
        gpu: the name of the one that is here.
        vectorization: how the environments are stepped.
        num_envs: N.

    Example:
        >>> rows = [dict(gpu="X", vectorization="tensor", num_envs=64, device=d, p5=s, p95=s)
        ...         for d, s in (("cpu", 1.0), ("cuda", 2.0))]
        >>> faster_device(rows, "X", "tensor", 100)[0], faster_device(rows, "Y", "tensor", 100)[0]
        ('cuda', 'cpu')
    """
    speeds = {
        (row["device"], row["num_envs"]): row
        for row in rows
        if row["gpu"] == gpu and row["vectorization"] == vectorization
    }
    sizes = [n for device, n in speeds if device == "cpu" and ("cuda", n) in speeds]
    if not sizes:
        return "cpu", f"there is no committed measurement of {gpu} with {vectorization}"
    below = max((n for n in sizes if n <= num_envs), default=None)
    above = min((n for n in sizes if n >= num_envs), default=None)
    for n in (below, above):
        if n is not None and speeds["cuda", n]["p5"] <= speeds["cpu", n]["p95"]:
            return "cpu", f"on {gpu}, {vectorization} x {n} was not measured to be faster"
    near = " and ".join(str(n) for n in dict.fromkeys((below, above)) if n is not None)
    return "cuda", f"on {gpu}, {vectorization} x {near} was measured to be faster"
