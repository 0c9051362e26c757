"""Seconds on a GPU and from the host, and figures that cannot be."""

import functools
import statistics
import time

import torch

from hour.job import Wrong

# No kernel is over in less, however little it does.
_LEAST_SECONDS = 3e-7
# A kernel may read more than it writes, which is faster than a copy of as many bytes.
_ROOM = 1.15
# Bytes per second: with less, the clock that torch names is not in the unit that it should be.
_SLOWEST_MEMORY = 5e10


def on_device(function, check, launches=20, replays=15):
    """Median seconds of one call, within replays of a CUDA graph of many; `check` is given what it
    made there.

    What it writes to is filled with another number before the replay that is checked.
    """
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            result = function()
    result.fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    check(result)
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000 / launches)
    return statistics.median(times)


def called(function, device="cuda", calls=30, seconds=1.0):
    """Median seconds of a call from Python, with the device waited for on both sides."""

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    function()
    times = []
    began = time.perf_counter()
    while len(times) < calls and (len(times) < 3 or time.perf_counter() - began < seconds):
        wait()
        started = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def first_call(function):
    """What a call gives, and its seconds: with compiling, where it compiles."""
    started = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def check_bytes(seconds, moved, copies):
    """Refuse a time in which so many bytes cannot be moved.

    Args:
        seconds: of one call.
        moved: bytes that it reads and writes, together.
        copies: pairs (bytes, seconds) of copies in this run, the one of as many bytes first; bytes
            are those read and written.

    Raises:
        Wrong: it is faster than any kernel, than the fastest copy, or, where the bytes are more
            than a cache holds, than the copy of as many; or the copy is faster than the memory.
    """
    if seconds < _LEAST_SECONDS:
        raise Wrong(f"{1e9 * seconds:.0f} ns is less than any kernel takes")
    speeds = [size / spent for size, spent in copies]
    own, fastest = speeds[0], max(speeds)
    memory, cache = memory_speed(), cache_bytes()
    beyond = cache is not None and moved > 4 * cache
    if beyond and memory is not None and own > memory:
        raise Wrong(f"a copy at {own:.3g} bytes/s is faster than the memory, {memory:.3g}")
    bound = own if beyond else fastest
    if moved / seconds > _ROOM * bound:
        raise Wrong(f"{moved / seconds:.3g} bytes/s are more than a copy's {bound:.3g}")


def memory_speed():
    """Bytes per second that the GPU's memory has by its data sheet; None where torch cannot say."""
    about = torch.cuda.get_device_properties(0)
    kilohertz, bits = (getattr(about, n, 0) for n in ("memory_clock_rate", "memory_bus_width"))
    speed = 2 * 1000 * kilohertz * bits / 8  # twice a clock, eight bits a byte
    return speed if speed > _SLOWEST_MEMORY else None


def cache_bytes():
    """Of the GPU's last cache; None where torch cannot say."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or None


@functools.cache
def product_speed():
    """Operations per second of a large matrix product with TF32: no network computes faster."""
    side = 8192
    a, b, c = torch.ones(3, side, side, device="cuda")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        torch.mm(a, b, out=c)
        return 2 * side**3 / called(lambda: torch.mm(a, b, out=c), calls=5)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
