"""Operations that are launched together: a CUDA graph, where there is one."""

from collections.abc import Callable

import torch


def capture(function: Callable[[], None], device: torch.device, what: str) -> Callable[[], None]:
    """The function itself off CUDA."""
    return function
