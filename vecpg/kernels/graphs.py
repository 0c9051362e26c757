"""What a device does again and again, recorded once in a CUDA graph: one launch for all of it."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from vecpg.kernels.announce import once

_log = logging.getLogger(__name__)


def room(device: torch.device) -> int:
    """Bytes of a GPU that are free, and those that torch has but uses for nothing: of a run before.

    Args:
        device: a GPU.
    """
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def capture(function: Callable[[], None], device: torch.device, what: str) -> Callable[[], None]:
    """What does again, at each call, all that a function does on a device.

    To be recorded the function is called twice, and the first call has its effects. What it does
    must depend on tensors alone, which stay where they are, and never on what changes in Python
    between two calls. Memory that it takes is the graph's, as long as that lives.

    Args:
        function: does not wait for the device.
        device: what it computes on. On the CPU nothing is recorded.
        what: it does, in words, for the log where it cannot be recorded.

    Returns:
        the graph's replay; `function` itself where there is no graph.

    Example:
        >>> total = torch.zeros(1)
        >>> def count():
        ...     total.add_(1)
        >>> again = capture(count, total.device, "counting")
        >>> again()
        >>> total
        tensor([1.])
    """
    if device.type != "cuda":
        return function
    current: Any = torch.cuda.current_stream(device)
    side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        function()  # what is made at a first call, as a library's workspace, is no part of a graph
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # Another thread's run may wait for the device meanwhile. Where something was refused torch
        # cannot end the capture: it says only that, and leaves `side` the current stream.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"),
        ):
            function()
    # A function of the user's own may wait for the device, or do anything else that none can hold.
    except RuntimeError as error:
        reason: BaseException = error
        while reason.__context__ is not None:
            reason = reason.__context__
        words = (str(reason) or repr(reason)).splitlines()[0]
        once(_log, f"{what}: op by op, as a CUDA graph cannot hold it: {words}", logging.WARNING)
        return function
    return graph.replay
