"""The returns kernels beside a loop, a copy, other packages' ways, and each other.

    python benchmarks/bench_returns.py
    python benchmarks/bench_returns.py --only tokens --rounds 5

Writes benchmarks/results/<machine>/returns.json, unless only some tables are asked for, and prints
its tables in Markdown. Before anything is timed, everything that computes is compared with float64.
Then all of a line are timed in turn, each for about a millisecond or one call; figures are medians,
and ratios are of medians. Every buffer has been written before: memory that never was is read from
one page of zeros, and makes a copy look twice as fast. Under pytest nothing is timed.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections import namedtuple

import pytest
import torch

from vecpg.returns import (
    generalized_advantage,
    packed_generalized_advantage,
    packed_reward_to_go,
    reward_to_go,
)

GAMMA, LAMBDA = 0.99, 0.95
CHUNK = 128

# A line of a table: its name, the threads it runs on, and what is timed, by name.
Line = namedtuple("Line", "name threads functions")


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flags(*shape, chance, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < chance


def written(tensor):
    """A tensor like this one whose memory has been written to."""
    return torch.empty_like(tensor).fill_(1)


def wide(value):
    return (
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    )


def exact(function, *arguments, **options):
    """By the plain loop, in float64."""
    options = {name: wide(value) for name, value in options.items()}
    return function(*map(wide, arguments), **options, backend="reference")


def check(result, expected, tolerance=1e-6):
    error = (result.double() - expected).abs().max()
    assert error <= tolerance * max(1.0, expected.abs().max()), error


# ---- Rollouts, time-major


def loop(rewards, dones, out):
    """The fastest loop over time we found: one fused operation a step, in float32."""
    discounts = torch.where(dones, 0.0, GAMMA).unbind()
    rows = rewards.unbind()
    places = out.unbind()
    places[-1].copy_(rows[-1])
    for t in range(len(rows) - 2, -1, -1):
        torch.addcmul(rows[t], discounts[t], places[t + 1], out=places[t])


def rollout(length, num_envs):
    rewards, dones = numbers(length, num_envs), flags(length, num_envs, chance=0.02)
    mask = flags(length, num_envs, chance=0.9, seed=2)
    expected = exact(reward_to_go, rewards, dones, GAMMA)
    out, looped = written(rewards), written(rewards)
    check(reward_to_go(rewards, dones, GAMMA, out=out), expected)
    loop(rewards, dones, looped)
    check(looped, expected)
    batch, batch_dones = rewards.t().contiguous(), dones.t().contiguous()
    batch_out = written(batch)
    check(reward_to_go(batch.mT, batch_dones.mT, GAMMA, out=batch_out.mT), expected)

    # The same episodes one after the other; the last of an environment ends with its last row.
    closed = batch_dones.clone()
    closed[:, -1] = True
    offsets = torch.cat([torch.tensor([0]), closed.reshape(-1).nonzero()[:, 0] + 1])
    flat = batch.reshape(-1)
    check(packed_reward_to_go(flat, offsets, GAMMA).view(num_envs, length).t(), expected)

    moved = rewards.numel() * 9  # a reward and a return of four bytes, and a flag
    source = written(torch.empty(moved // 2, dtype=torch.uint8))
    target = written(source)
    functions = {
        "ours": lambda: reward_to_go(rewards, dones, GAMMA, out=out),
        "copy": lambda: target.copy_(source),
        "loop": lambda: loop(rewards, dones, looped),
        "masked": lambda: reward_to_go(rewards, dones, GAMMA, mask=mask, out=out),
        "batch_major": lambda: reward_to_go(batch.mT, batch_dones.mT, GAMMA, out=batch_out.mT),
        "call": lambda: reward_to_go(rewards, dones, GAMMA),
        "packed": lambda: packed_reward_to_go(flat, offsets, GAMMA),
    }
    # It pads every episode to the longest: at the largest shape that is more than memory holds.
    if importlib.util.find_spec("torchrl") and rewards.numel() < 10**6:
        from torchrl.objectives.value.functional import reward2go

        rows = batch[..., None], closed[..., None]
        check(reward2go(*rows, GAMMA)[..., 0].t(), expected, 1e-5)
        functions["torchrl"] = lambda: reward2go(*rows, GAMMA)
    return Line(f"{length} x {num_envs}", 1, functions)


def rollouts():
    for shape in [(128, 64), (500, 64), (128, 4096), (512, 16384)]:
        yield rollout(*shape)


def rollouts_table(us):
    return {
        "time-major": f"{us['ours']:,.1f}",
        "times a loop": f"{us['loop'] / us['ours']:,.0f}",
        "times TorchRL": f"{us['torchrl'] / us['ours']:,.0f}" if "torchrl" in us else "",
        "of a copy's speed": f"{us['copy'] / us['ours']:.0%}",
        "with a mask": f"{us['masked']:,.1f}",
        "batch-major": f"{us['batch_major']:,.1f}",
        "without `out`": f"{us['call']:,.1f}",
        "packed": f"{us['packed']:,.1f}",
    }


# ---- Tokens, batch-major


def loop_returns(rewards, mask):
    """Returns of a (B, T) batch over time, masked tokens passed over: the shape of verl's loops."""
    running, rows = 0.0, []
    for t in reversed(range(rewards.shape[1])):
        real = mask[:, t]
        running = real * (rewards[:, t] + GAMMA * running) + (1 - real) * running
        rows.append(running)
    return torch.stack(rows[::-1], dim=1) * mask


def loop_advantages(rewards, values, mask):
    """As verl computes them (its whitening apart): value and advantage pass over masked tokens."""
    following, running, rows = 0.0, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        real = mask[:, t]
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        running = real * (delta + GAMMA * LAMBDA * running) + (1 - real) * running
        following = real * values[:, t] + (1 - real) * following
        rows.append(running)
    return torch.stack(rows[::-1], dim=1) * mask


def chunked(terms, weight):
    """sum over k >= t of weight^(k - t) * terms[k] for (B, T): the fastest trick of the field.

    Within chunks of 128 a product with a triangular matrix of powers, then a loop over the chunks
    that carries what follows each: slime's way. It knows no mask, and makes its matrix anew.
    """
    batch, length = terms.shape
    short = -length % CHUNK
    chunks = torch.nn.functional.pad(terms, (0, short)).view(batch, -1, CHUNK)
    powers = weight ** torch.arange(CHUNK + 1, dtype=terms.dtype)
    apart = torch.arange(CHUNK)[:, None] - torch.arange(CHUNK)
    within = chunks @ torch.where(apart >= 0, powers[apart.clamp(min=0)], 0.0)
    carries = torch.zeros(batch, chunks.shape[1])
    for i in range(chunks.shape[1] - 2, -1, -1):
        carries[:, i] = within[:, i + 1, 0] + powers[-1] * carries[:, i + 1]
    whole = within + carries[..., None] * powers[1:].flip(0)
    return whole.view(batch, -1)[:, :length]


def chunked_advantages(rewards, values):
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    return chunked(rewards + GAMMA * following - values, GAMMA * LAMBDA)


def token_mask(batch, length):
    """Prompts of up to a quarter, answers that end early, and holes where a tool has written."""
    g = torch.Generator().manual_seed(3)
    place = torch.arange(length)
    start = torch.randint(0, length // 4, (batch, 1), generator=g)
    stop = torch.randint(length // 2, length + 1, (batch, 1), generator=g)
    tool = torch.randint(length // 4, length // 2, (batch, 1), generator=g)
    hole = (place >= tool) & (place < tool + length // 16)
    return (place >= start) & (place < stop) & ~hole


def token_batch(batch, length):
    """Two lines: returns, and advantages; the trick has no mask, and is beside ours without one."""
    mask = token_mask(batch, length)
    real = mask.float()
    rewards, values = numbers(batch, length) * real, numbers(batch, length, seed=4) * real
    out = written(rewards)
    skipping = {"mask": mask.mT, "mask_mode": "skip"}
    of_rewards = rewards.mT, None, GAMMA
    of_values = rewards.mT, values.mT, None, GAMMA, LAMBDA
    returns = {
        "ours": lambda: reward_to_go(*of_rewards, **skipping, out=out.mT).mT,
        "loop": lambda: loop_returns(rewards, real),
        "plain": lambda: reward_to_go(*of_rewards, out=out.mT).mT,
        "chunked": lambda: chunked(rewards, GAMMA),
    }
    gae = {
        "ours": lambda: generalized_advantage(*of_values, **skipping, out=out.mT).mT,
        "loop": lambda: loop_advantages(rewards, values, real),
        "plain": lambda: generalized_advantage(*of_values, out=out.mT).mT,
        "chunked": lambda: chunked_advantages(rewards, values),
    }
    for function, arguments, ways in (
        (reward_to_go, of_rewards, returns),
        (generalized_advantage, of_values, gae),
    ):
        expected = exact(function, *arguments, **skipping).mT
        check(ways["ours"](), expected)
        check(ways["loop"](), expected, 1e-5)
        expected = exact(function, *arguments).mT
        check(ways["plain"](), expected)
        check(ways["chunked"](), expected, 1e-5)
    return returns, gae


def tokens():
    for batch, length in [(64, 8192), (512, 2048)]:
        returns, gae = token_batch(batch, length)
        for threads in (1, 2):
            yield Line(f"{batch} x {length}, returns", threads, returns)
            yield Line(f"{batch} x {length}, advantages", threads, gae)


def tokens_table(us):
    return {
        "with a mask": f"{us['ours']:,.0f}",
        "a loop over tokens": f"{us['loop']:,.0f}",
        "times the loop": f"{us['loop'] / us['ours']:,.0f}",
        "without a mask": f"{us['plain']:,.0f}",
        "in chunks of 128": f"{us['chunked']:,.0f}",
        "times the chunks": f"{us['chunked'] / us['plain']:,.1f}",
    }


# ---- Advantages beside returns, 16 bits beside 32, without `out` beside with it

LAYOUTS = {
    "time-major": lambda tensor: tensor.contiguous(),
    "batch-major": lambda tensor: tensor.t().contiguous().t(),
}
OPTIONS = {
    "plain": "no options",
    "cut": "cut",
    "skip": "skip",
    "decay": "decay",
    "zero": "zero",
    "values": "values at ends and behind",
    "gammas": "a gamma for each element",
    "lambdas": "a lambda for each sequence",
}
SHAPES = [(128, 64), (128, 4096), (8192, 64), (2048, 512)]


def options_of(option, laid_out, length, num_envs):
    """Keyword options, a gamma and a lambda."""
    given, gamma, gae_lambda = {}, GAMMA, LAMBDA
    if option in ("cut", "skip", "decay", "zero"):
        given = {"mask": laid_out(flags(length, num_envs, chance=0.9, seed=2)), "mask_mode": option}
    if option == "values":
        given["final_values"] = laid_out(numbers(length, num_envs, seed=5))
        given["last_values"] = numbers(num_envs, seed=6)
    if option == "gammas":
        gamma = laid_out(torch.full((length, num_envs), GAMMA))
    if option == "lambdas":
        gae_lambda = torch.linspace(0, 1, num_envs)
    return given, gamma, gae_lambda


def beside(length, num_envs, layout, option):
    laid_out = LAYOUTS[layout]
    rewards, values, towards = (
        laid_out(numbers(length, num_envs, seed=seed)) for seed in (0, 4, 7)
    )
    dones = laid_out(flags(length, num_envs, chance=0.02))
    given, gamma, gae_lambda = options_of(option, laid_out, length, num_envs)

    def to_go(rewards, **options):
        return reward_to_go(rewards, dones, gamma, **given, **options)

    def gae(rewards, values, **options):
        return generalized_advantage(rewards, values, dones, gamma, gae_lambda, **given, **options)

    check(to_go(rewards), exact(reward_to_go, rewards, dones, gamma, **given))
    arguments = rewards, values, dones, gamma, gae_lambda
    check(gae(rewards, values), exact(generalized_advantage, *arguments, **given))
    out = written(rewards)
    leaves = rewards.clone().requires_grad_(), values.clone().requires_grad_()
    return {
        "to_go": lambda: to_go(rewards, out=out),
        "gae": lambda: gae(rewards, values, out=out),
        "to_go_new": lambda: to_go(rewards),
        "gae_new": lambda: gae(rewards, values),
        "to_go_both": lambda: torch.autograd.grad(to_go(leaves[0]), leaves[0], towards),
        "gae_both": lambda: torch.autograd.grad(gae(*leaves), leaves, towards),
    }


def advantages():
    for (length, num_envs), layout, option in itertools.product(SHAPES, LAYOUTS, OPTIONS):
        functions = beside(length, num_envs, layout, option)
        yield Line(f"{length} x {num_envs}, {layout}, {OPTIONS[option]}", 1, functions)


def advantages_table(us):
    return {
        "over returns": us["gae"] / us["to_go"],
        "with gradients": us["gae_both"] / us["to_go_both"],
        "returns without `out`": us["to_go_new"] / us["to_go"],
        "advantages without `out`": us["gae_new"] / us["gae"],
    }


def of_dtype(length, num_envs, layout, masked, dtype):
    laid_out = LAYOUTS[layout]
    rewards, values = (laid_out(numbers(length, num_envs, seed=n).to(dtype)) for n in (0, 4))
    dones = laid_out(flags(length, num_envs, chance=0.02))
    mask = laid_out(flags(length, num_envs, chance=0.9, seed=2)) if masked else None
    out = written(rewards)
    of_rewards, of_values = (rewards, dones, GAMMA), (rewards, values, dones, GAMMA, LAMBDA)

    def to_go():
        return reward_to_go(*of_rewards, mask=mask, out=out)

    def gae():
        return generalized_advantage(*of_values, mask=mask, out=out)

    tolerance = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}[dtype]
    check(to_go(), exact(reward_to_go, *of_rewards, mask=mask), tolerance)
    check(gae(), exact(generalized_advantage, *of_values, mask=mask), tolerance)
    name = str(dtype).removeprefix("torch.")
    return {f"to_go_{name}": to_go, f"gae_{name}": gae}


def halves():
    for (length, num_envs), layout, masked in itertools.product(SHAPES, LAYOUTS, (False, True)):
        functions = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            functions |= of_dtype(length, num_envs, layout, masked, dtype)
        name = f"{length} x {num_envs}, {layout}" + ", masked" * masked
        yield Line(name, 1, functions)


def halves_table(us):
    return {
        f"{title}, {dtype}": us[f"{call}_{dtype}"] / us[f"{call}_float32"]
        for call, title in (("to_go", "returns"), ("gae", "advantages"))
        for dtype in ("bfloat16", "float16")
    }


# ---- Packed


def walked(rewards, offsets, values=None, mask=None, final=None):
    """What packed calls give, one row after the other in Python's own floats."""
    mask = torch.ones_like(rewards) if mask is None else mask
    known = torch.zeros_like(rewards) if values is None else values
    weight = GAMMA if values is None else GAMMA * LAMBDA
    rows = list(zip(rewards.tolist(), known.tolist(), mask.tolist(), strict=True))
    result = [0.0] * len(rows)
    for i, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        following, value = 0.0 if final is None else final[i].item(), 0.0
        for t in range(stop - 1, start - 1, -1):
            reward, own, real = rows[t]
            if real:
                following = reward + GAMMA * value - own + weight * following
                value = own
                result[t] = following
    return torch.tensor(result, dtype=torch.float64)


def in_sequences(offsets):
    total = int(offsets[-1])
    rewards, values = numbers(total), numbers(total, seed=4)
    final, mask = numbers(len(offsets) - 1, seed=5), flags(total, chance=0.9, seed=2)
    skipping = {"mask": mask, "mask_mode": "skip"}
    of_rewards, of_values = (rewards, offsets, GAMMA), (rewards, values, offsets, GAMMA, LAMBDA)
    functions = {
        "returns": lambda: packed_reward_to_go(*of_rewards),
        "with final values": lambda: packed_reward_to_go(*of_rewards, final_values=final),
        "masked": lambda: packed_reward_to_go(*of_rewards, **skipping),
        "advantages": lambda: packed_generalized_advantage(*of_values),
        "advantages, masked": lambda: packed_generalized_advantage(*of_values, **skipping),
    }
    check(functions["returns"](), walked(rewards, offsets))
    check(functions["with final values"](), walked(rewards, offsets, final=final))
    check(functions["masked"](), walked(rewards, offsets, mask=mask))
    check(functions["advantages"](), walked(rewards, offsets, values))
    check(functions["advantages, masked"](), walked(rewards, offsets, values, mask))
    return functions


def packed():
    total = 10**6
    lengths = torch.randint(1, 4000, (500,), generator=torch.Generator().manual_seed(8))
    bounds = torch.cat([torch.tensor([0]), lengths.cumsum(0)])
    yield Line("about 2,000 each", 1, in_sequences(bounds * total // bounds[-1]))
    yield Line("200,000 and 800,000", 1, in_sequences(torch.tensor([0, total // 5, total])))
    yield Line("a million", 1, in_sequences(torch.tensor([0, total])))


def packed_table(us):
    return {name: f"{spent / 1000:.2f}" for name, spent in us.items()}


# Lines, their columns, and what stands above the table.
TABLES = {
    "rollouts": (
        rollouts,
        rollouts_table,
        "Rewards T x N in float32, microseconds; with `out`, but for the last two columns",
    ),
    "tokens": (
        tokens,
        tokens_table,
        'Tokens B x T, microseconds; the mask mode is "skip", and `out` is given',
    ),
    "advantages": (
        advantages,
        advantages_table,
        "Advantages in float32: times of returns, and times with `out`; least and most over"
        " 128 x 64, 128 x 4096, 8192 x 64 and 2048 x 512",
    ),
    "halves": (halves, halves_table, "16 bits: times of float32, over the same shapes"),
    "packed": (packed, packed_table, "A million packed rewards in sequences of, milliseconds"),
}


@pytest.mark.parametrize("name", TABLES)
def bench_returns(name):
    """Untimed, some lines of each table: what they compare is right, and runs."""
    for line in itertools.islice(TABLES[name][0](), 2):
        for function in line.functions.values():
            function()


def in_turn(functions, rounds):
    """Median microseconds of a call of each function, all of which have their turn in a round."""
    calls, times = {}, {name: [] for name in functions}
    for name, function in functions.items():
        function()
        started, number = time.perf_counter(), 0
        while number == 0 or time.perf_counter() < started + 0.001:
            function()
            number += 1
        calls[name] = number
    for number in range(rounds + 2):
        for name in list(functions)[:: 1 if number % 2 else -1]:
            function, started = functions[name], time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append((time.perf_counter() - started) / calls[name])
    return {name: round(1e6 * statistics.median(spent[2:]), 2) for name, spent in times.items()}


def markdown(name, lines):
    """A table of the figures that `returns.json` holds; of ratios the least and the most."""
    _, columns, title = TABLES[name]
    rows, threads = {}, {line["threads"] for line in lines}
    for line in lines:
        cells, label = columns(line["us"]), line["name"]
        if name in ("advantages", "halves"):
            label = label.partition(", ")[2]
        label += f", {line['threads']} of {max(threads)} threads" if len(threads) > 1 else ""
        rows.setdefault(label, []).append(cells)
    heads = list(columns(lines[0]["us"]))
    text = [f"{title}:", "", "| | " + " | ".join(heads) + " |", "|-" * (len(heads) + 1) + "|"]
    for label, found in rows.items():
        cells = [_range([cells[head] for cells in found]) for head in heads]
        text.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def _range(cells):
    if isinstance(cells[0], str):
        return cells[0]
    return f"{min(cells):.1f} to {max(cells):.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="figures are medians of so many")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=TABLES,
        default=list(TABLES),
        help="these tables, printed; the file is written with all of them only",
    )
    args = parser.parse_args()
    from vecpg.machine import commit, results_folder, system

    machine, found = system(), {}
    load = os.getloadavg()[0]
    for name in args.only:
        found[name] = []
        torch.set_num_threads(1)
        for line in TABLES[name][0]():
            torch.set_num_threads(line.threads)
            us = in_turn(line.functions, args.rounds)
            torch.set_num_threads(1)
            found[name].append({"name": line.name, "threads": line.threads, "us": us})
            print(f"{line.name}, {line.threads} threads: {us}", file=sys.stderr, flush=True)
    result = {
        "command": f"python benchmarks/bench_returns.py --rounds {args.rounds}",
        "measured_with": {**machine, "commit": commit()["commit"]},
        # What else was running: of the minute before.
        "load_before": round(load, 2),
        "tables": found,
    }
    if args.only == list(TABLES):
        path = results_folder(machine) / "returns.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"load before: {load:.2f}")
    for name, lines in found.items():
        print(f"\n{markdown(name, lines)}")


if __name__ == "__main__":
    main()
