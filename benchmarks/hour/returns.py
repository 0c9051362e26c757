"""(d) Returns and advantages beside a copy of the same bytes, at six shapes.

Each is compared with the reference first, and again in what a graph of many launches has written:
device time is that of such a graph, so that launching costs nothing. What fits stays in the GPU's
cache, for the copy too.
"""

import functools
import importlib.util

import torch

from hour import clock
from hour.job import Wrong
from vecpg.returns import (
    generalized_advantage,
    packed_generalized_advantage,
    packed_reward_to_go,
    reward_to_go,
)

GAMMA, LAMBDA = 0.99, 0.95
SHAPES = [(128, 4096), (512, 16384), (128, 64), (128, 32768), (65536, 64), (512, 131072)]
LAYOUTS = ("time", "batch", "packed")
# A reward, a return or an advantage, perhaps a value, of four bytes each, and a flag.
BYTES = {"returns": 9, "advantages": 13}
# What the widest shape takes of the GPU's memory, an element: inputs, results, what is expected,
# two of a copy, and what the reference makes.
_BYTES_NEEDED = 80
# A loop over more rows than this is faster on the host.
_LONG = 2000


def measure(job):
    if job.miniature:
        from hour.correctness import packed_cases, usual_cases

        job.run(usual_cases([(5, 3), (40, 2)], "cpu") + packed_cases((30,), "cpu"))
        return
    cases = [
        (f"{name}, {length} x {num_envs}, {layout}", (name, length, num_envs, layout))
        for length, num_envs in SHAPES
        for name in BYTES
        for layout in LAYOUTS
    ]
    job.run([(what, functools.partial(timed, *case)) for what, case in cases])


def timed(name, length, num_envs, layout):
    """One line: checked, then timed; also as it is called from Python, and on the CPU."""
    row = on_device(name, length, num_envs, layout)
    laid_out = _laid_out(_case(name, length, num_envs)[0], layout)
    call = functools.partial(_call, name, layout, *laid_out)
    return row | {
        "call_us": 1e6 * clock.called(call),
        "cpu_us": _on_host(name, layout, laid_out),
    }


def on_device(name, length, num_envs, layout):
    """Checked, and timed beside a copy, in CUDA graphs.

    Raises:
        Wrong: it differs from the reference, or is faster than it can be.
    """
    if _BYTES_NEEDED * length * num_envs > torch.cuda.mem_get_info()[0]:
        raise Wrong("the GPU has no memory for it")
    inputs, expected = _case(name, length, num_envs)
    function = functools.partial(_call, name, layout, *_laid_out(inputs, layout))
    tolerance = 1e-6 * expected.abs().max()

    def check(result):
        found = result.mT if layout != "time" else result
        if not (found - expected).abs().max() <= tolerance:
            raise Wrong("differs from the reference")

    result, first_seconds = clock.first_call(function)
    check(result)
    moved = BYTES[name] * length * num_envs
    copy_seconds = _copy_seconds(moved)
    seconds = clock.on_device(function, check)
    clock.check_bytes(seconds, moved, [(moved, copy_seconds), *_cached_copies()])
    return {
        "name": name,
        "length": length,
        "num_envs": num_envs,
        "layout": layout,
        "device_us": 1e6 * seconds,
        "copy_us": 1e6 * copy_seconds,
        "of_copy": copy_seconds / seconds,
        "bytes_per_second": moved / seconds,
        "first_call_seconds": first_seconds,
    }


# The oracle and the inputs are the same for every layout of a shape.
@functools.lru_cache(maxsize=1)
def _case(name, length, num_envs):
    """Inputs (T, N) on the GPU, and what is expected, by the reference in float64."""
    g = torch.Generator(device="cuda").manual_seed(0)
    shape = length, num_envs
    rewards = torch.randn(shape, generator=g, device="cuda")
    dones = torch.rand(shape, generator=g, device="cuda") < 0.02
    dones[-1] = True  # packed, the next copy begins there
    given = (rewards,)
    if name == "advantages":
        given = rewards, torch.randn(shape, generator=g, device="cuda")
    where = "cpu" if length > _LONG else "cuda"
    wide = [each.to(where, torch.float64) for each in given]
    if name == "returns":
        expected = reward_to_go(*wide, dones.to(where), GAMMA, backend="reference")
    else:
        expected = generalized_advantage(*wide, dones.to(where), GAMMA, LAMBDA, backend="reference")
    return (*given, dones), expected.float().cuda()


def _laid_out(inputs, layout):
    """As `_call` takes them: the inputs, the places where episodes end, and where to write."""
    if layout != "time":
        inputs = [each.t().contiguous() for each in inputs]
    ends = inputs[-1].reshape(-1).nonzero()[:, 0] + 1
    offsets = torch.cat([ends.new_zeros(1), ends])
    return inputs, offsets, torch.ones_like(inputs[0])


def _call(name, layout, inputs, offsets, out):
    given, dones = inputs[:-1], inputs[-1]
    decay = (GAMMA,) if name == "returns" else (GAMMA, LAMBDA)
    if layout == "packed":
        packed = packed_reward_to_go if name == "returns" else packed_generalized_advantage
        flat = [each.reshape(-1) for each in given]
        return packed(*flat, offsets, *decay).view(dones.shape)
    function = reward_to_go if name == "returns" else generalized_advantage
    if layout == "batch":
        turned = [each.mT for each in given]
        return function(*turned, dones.mT, *decay, out=out.mT).mT
    return function(*given, dones, *decay, out=out)


def _on_host(name, layout, laid_out):
    """Microseconds of a call on the CPU; None where there is no Numba."""
    if importlib.util.find_spec("numba") is None:
        return None
    inputs, offsets, out = laid_out
    here = [each.cpu() for each in inputs], offsets.cpu(), out.cpu()
    call = functools.partial(_call, name, layout, *here)
    return 1e6 * clock.called(call, device="cpu", calls=10, seconds=0.3)


@functools.lru_cache(maxsize=8)
def _copy_seconds(moved):
    """Of a copy that moves so many bytes, each twice: once read, once written."""
    source = torch.ones(max(1, moved // 2), dtype=torch.uint8, device="cuda")
    target = torch.ones_like(source)
    return clock.on_device(functools.partial(target.copy_, source), lambda _: None)


def _cached_copies():
    """Bytes and seconds of copies that stay in the cache: nothing moves bytes faster."""
    return [(2**power, _copy_seconds(2**power)) for power in (21, 23, 25)]
