"""Sums, and means, over rows of the same age: steps since the episode began."""

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vecpg.advantage import cpu, reference
from vecpg.kernels.sums import in_order


def sums_by_age(weights: Tensor, mask: Tensor, dones: Tensor) -> Tensor:
    """The sum, and the number, of a shard's weights of each age: steps since the episode began.

    On one machine they are the same bits at every call, and no device is waited for.

    Args:
        weights: (T, N).
        mask: (T, N) bool, True = counted; other rows are not read.
        dones: (T, N) bool, True = the episode ends here.

    Returns:
        (2, T) float64, sums and numbers.

    Example:
        >>> whole = torch.tensor([[True, True], [True, False]])
        >>> ends = torch.tensor([[False, True], [True, False]])
        >>> sums_by_age(torch.tensor([[1.0, 2.0], [4.0, torch.nan]]), whole, ends).tolist()
        [[3.0, 4.0], [2.0, 1.0]]
    """
    if _on_host(weights):
        sums = torch.zeros(2, len(mask), dtype=torch.float64)
        cpu.sums_by_age(weights, mask, dones, sums)
        return sums
    if on_gpu(weights.device):
        from vecpg.advantage import cuda

        return cuda.sums_by_age(weights, mask, dones)
    return reference.sums_by_age(weights, mask, dones)


def add_by_age(parts: Sequence[Tensor]) -> Tensor:
    """The shards' `sums_by_age`, (2, T of each), added in their order: (2, the longest T)."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.shape[1] for part in parts)
    return in_order([nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts])


def subtract_mean_by_age(
    weights: Tensor, mask: Tensor, dones: Tensor, sums: Tensor, *, others: bool
) -> None:
    """Subtract from a shard's weights, in place, the mean over all counted rows of the same age.

    Args:
        weights: (T, N); 0 where masked afterwards.
        mask: as in `sums_by_age`.
        dones: the same.
        sums: of all shards, as `add_by_age` gives them: no shorter than T.
        others: leave out the rows of the own environment; where no other has that age, subtract 0.
    """
    if _on_host(weights):
        cpu.subtract_mean_by_age(weights, mask, dones, sums, others)
    elif on_gpu(weights.device):
        from vecpg.advantage import cuda

        cuda.subtract_mean_by_age(weights, mask, dones, sums, others)
    else:
        reference.subtract_mean_by_age(weights, mask, dones, sums, others)


def on_gpu(device: torch.device) -> bool:
    """Whether kernels in Triton serve a device."""
    return device.type == "cuda" and _has_triton()


def _on_host(weights: Tensor) -> bool:
    return weights.device.type == "cpu" and weights.dtype == torch.float32


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
