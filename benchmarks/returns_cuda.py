"""Check and time every CUDA returns kernel, beside a copy of the same bytes and the CPU's kernel.

    python benchmarks/returns_cuda.py

Needs a CUDA GPU with triton. Each shape is compared with the reference first. Device time is that
of a CUDA graph of many launches, so that launching costs nothing; what fits stays in the GPU's
cache. A call is timed from Python, with the GPU waited for on both sides. Writes
benchmarks/results/<machine>/returns-cuda.json and prints a table.
"""

import argparse
import json
import statistics
import sys
import time

import torch

from vecpg.machine import commit, results_folder, system
from vecpg.returns import packed_reward_to_go, reference, reward_to_go

GAMMA = 0.99
BYTES = 9  # a reward and a return of four bytes, and a flag
# Time-major, then batch-major, then packed into one row.
SHAPES = [
    (8, 32768),
    (32, 4096),
    (128, 64),
    (128, 4096),
    (128, 32768),
    (512, 16384),
    (1024, 65536),
    (65536, 64),
]


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device is there: nothing was measured")
    rows = []
    for length, num_envs in SHAPES:
        rows += [measure(length, num_envs, layout) for layout in ("time", "batch", "packed")]
        for row in rows[-3:]:
            print(json.dumps(row), flush=True)
    machine = system()
    result = {"commit": commit()["commit"], "machine": machine, "shapes": rows}
    path = results_folder(machine) / "returns-cuda.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("| T x N | layout | device us | call us | of copy | CPU us |\n|-|-|-|-|-|-|")
    for row in rows:
        print(
            f"| {row['length']} x {row['num_envs']} | {row['layout']} | {row['device_us']:.1f} |"
            f" {row['call_us']:.1f} | {row['of_copy']:.2f} | {row['cpu_us']:.0f} |"
        )


def measure(length, num_envs, layout):
    """One shape in one layout: checked, then timed."""
    g = torch.Generator(device="cuda").manual_seed(0)
    shape = (length, num_envs) if layout == "time" else (num_envs, length)
    rewards = torch.randn(shape, generator=g, device="cuda")
    dones = torch.rand(shape, generator=g, device="cuda") < 0.02
    out = torch.ones_like(rewards)
    if layout == "packed":
        dones[:, -1] = True
    offsets = torch.cat([dones.new_zeros(1).long(), dones.reshape(-1).nonzero()[:, 0] + 1])

    def kernel(rewards, dones, offsets, out):
        if layout == "packed":
            return packed_reward_to_go(rewards.reshape(-1), offsets, GAMMA).view(rewards.shape)
        if layout == "batch":
            return reward_to_go(rewards.mT, dones.mT, GAMMA, out=out.mT).mT
        return reward_to_go(rewards, dones, GAMMA, out=out)

    result = kernel(rewards, dones, offsets, out)
    discount = torch.tensor(GAMMA, dtype=torch.float64, device="cuda")
    turned = (rewards, dones) if layout == "time" else (rewards.mT, dones.mT)
    expected = reference.reward_to_go(*turned, discount, None, None, None, "cut")
    expected = expected if layout == "time" else expected.mT
    assert (result - expected).abs().max() <= 1e-6 * expected.abs().max()

    # A copy moves every byte twice: once read, once written.
    source = torch.ones(max(1, rewards.numel() * BYTES // 2), dtype=torch.uint8, device="cuda")
    target = torch.ones_like(source)
    device_seconds = on_device(lambda: kernel(rewards, dones, offsets, out))
    copy_seconds = on_device(lambda: target.copy_(source))
    here = [tensor.cpu() for tensor in (rewards, dones, offsets, out)]
    return {
        "length": length,
        "num_envs": num_envs,
        "layout": layout,
        "device_us": 1e6 * device_seconds,
        "call_us": 1e6 * called(lambda: kernel(rewards, dones, offsets, out)),
        "copy_us": 1e6 * copy_seconds,
        "of_copy": copy_seconds / device_seconds,
        "bytes_per_second": rewards.numel() * BYTES / device_seconds,
        "cpu_us": 1e6 * called(lambda: kernel(*here), calls=5),
    }


def on_device(function, launches=20, replays=20):
    """Median seconds of one launch, within replays of a graph of many."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            function()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000 / launches)
    return statistics.median(times)


def called(function, calls=50):
    """Median seconds of a call, with the GPU waited for on both sides."""
    function()
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
