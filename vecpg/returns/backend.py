"""Which backend serves a call, and where it writes."""

import importlib.util
import logging

import torch
from torch import Tensor

from vecpg.kernels import kept
from vecpg.kernels.announce import once
from vecpg.returns.checks import is_eager

_BACKENDS = ("auto", "reference", "cpu", "cuda")
_log = logging.getLogger("vecpg.returns")


def say_cpu() -> None:
    """Say once that a call was served by machine code."""
    once(_log, "returns on cpu: machine code")


def is_served(backend: str, rewards: Tensor) -> bool:
    """Whether a kernel serves a tensor, rather than the reference; says once which it is."""
    device = rewards.device.type
    if backend not in _BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(_BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return False
    if backend != "auto" and backend != device:
        raise RuntimeError(
            f"backend: expected one for {device} tensors, got {backend!r}; move the tensors to"
            f' {backend}, or pass backend="auto"'
        )
    has_triton = device == "cuda" and importlib.util.find_spec("triton") is not None
    if backend == "cuda" and not has_triton:
        raise RuntimeError(
            'backend: expected triton to be installed for "cuda", found none; pip install triton,'
            ' or pass backend="reference"'
        )
    served = device == "cpu" or has_triton
    if is_eager():
        how = "machine code" if served else "the reference backend, a loop over time"
        once(_log, f"returns on {device}: {how}")
    return served


def writable(rewards: Tensor, out: Tensor | None) -> Tensor:
    """`out`, with autograd told that it changes, or a new tensor."""
    if out is None:
        return kept.empty_like(rewards)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out
