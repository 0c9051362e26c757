"""A whole collection as one Triton kernel, made from the definition of an environment.

A program has a block of environments of a run and plays them to the end: their states, and the
policy, never leave the chip. Then it goes back over its rows, from the last one to the first, and
writes what each action earned.
"""

import functools
import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl

from vecpg.envs.cuda import device_functions, from_source, names
from vecpg.envs.definition import Definition, name_of
from vecpg.kernels.cuda import (
    as_uniform,
    cos,
    exp,
    is_finite,
    log,
    sin,
    stamp,
    tanh,
    uniform,
    words,
)
from vecpg.kernels.iteration import Memory, Setting, Shape, Stamp, Tally
from vecpg.noise import Purpose
from vecpg.policy.cuda import standard_deviation
from vecpg.rollout.cuda import next_row
from vecpg.rollout.data import FINISHED, PLAYING, RESETTING

_SIZES = ["slots", "envs_of_shard", "capacity", "num_steps", "max_episode_steps"]
# Rows that are read together on the way back: each waits for memory, and none for the other.
_ROWS = 8
# Units of the first layer that are made at a time.
_SLICE = 16
# Of what fixes an action. It is read whenever it is needed: kept, it would take 20 registers.
_KEY = "tl.load(key), tl.load(key + 1), tl.load(key + 2)"


def play(
    memory: Memory,
    definition: type[Definition],
    num_variables: int,
    shape: Shape,
    *,
    num_steps: int,
    max_episode_steps: int,
    given: bool = False,
    full_return: bool = False,
    precision: str | None = None,
) -> None:
    """Collect an iteration of all runs, in one launch. Nothing waits for the GPU.

    Of `memory` it reads at, keys, settings, bounds and states, and writes the rows and episodes,
    and when it began. Rows before a block's `last` are written for all of its environments; they
    are those of `vecpg.rollout.cpu`, with its bits for equal actions, and so are the actions but
    where rounding decides. Of those that do not count, observations and actions mean nothing.

    weights[t] is sum over k >= t of gamma^(k - t) r_k over the rest of the episode, with the bits
    of `vecpg.returns.reward_to_go` on a CPU.

    Args:
        memory: of whole iterations.
        definition: of the environments, whose spaces are those of the policy.
        num_variables: how many numbers a state of it is.
        shape: of the policy.
        num_steps: the start window.
        max_episode_steps: the time limit.
        given: actions are read from memory.actions and not drawn.
        full_return: all weights of an episode are that of its first row.
        precision: of matrix products, as `tl.dot` has it; None: tf32 in three parts, and where few
            environments are a block, float32.

    Raises:
        ValueError: a function of the definition makes no kernel.
    """
    kernel = _kernel(definition, num_variables, shape)
    slots, runs = memory.keys.shape[:2]
    shards = memory.parts.shape[1]
    envs_of_shard = memory.flags.shape[2] // shards
    block = memory.block
    with torch.cuda.device_of(memory.at):
        kernel[(shards * triton.cdiv(envs_of_shard, block), runs)](
            memory.at,
            memory.keys,
            memory.settings,
            memory.bounds,
            memory.states,
            memory.obs,
            memory.actions,
            memory.rewards,
            memory.flags,
            memory.weights,
            memory.last,
            memory.starts,
            memory.stops,
            memory.numbers,
            memory.longest,
            memory.tallies,
            memory.stamps,
            slots,
            envs_of_shard,
            memory.flags.shape[1],
            num_steps,
            max_episode_steps,
            GIVEN=given,
            FULL=full_return,
            PRECISION=precision or ("tf32x3" if block >= 64 else "ieee"),
            CLOCK=isinstance(kernel, triton.JITFunction),
            BLOCK=block,
            num_warps=4 if block > 16 else 8,
            enable_fp_fusion=False,
        )


@functools.cache
def _kernel(definition: type[Definition], num_variables: int, shape: Shape) -> Any:
    known = {
        "tl": tl,
        "words": words,
        "as_uniform": as_uniform,
        "uniform": uniform,
        "exp": exp,
        "log": log,
        "cos": cos,
        "sin": sin,
        "activated": tanh if shape.tanh else _relu,
        "standard_deviation": standard_deviation,
        "is_finite": is_finite,
        "next_row": next_row,
        "row_before": _row_before,
        "stamp": stamp,
        **device_functions(definition, num_variables),
    }
    text = _source(definition, num_variables, shape)
    made = from_source(text, name_of(definition), known, do_not_specialize=_SIZES)
    return made["play"]


@triton.jit
def _row_before(reward, flag, gamma, earned, paid, total, lowest, highest, lengths, most):
    """What comes of a row on the way back: of its episode `earned`, with discounts, and `paid`.

    A row that does not count is before every episode.
    """
    counts, before = flag > 0, (flag == 0) & (lengths > 0)
    lowest = tl.where(before & (paid < lowest), paid, lowest)
    highest = tl.where(before & (paid > highest), paid, highest)
    most = tl.where(lengths > most, lengths, most)
    earned = reward + gamma * tl.where(flag > 1, 0.0, earned)
    earned = tl.where(counts, earned, 0.0)
    paid = tl.where(counts, paid + reward, 0.0)
    total += reward
    return earned, paid, total, lowest, highest, tl.where(counts, lengths + 1, 0), most


@triton.jit
def _relu(x):
    return tl.where(x < 0.0, 0.0, x)


def _source(definition: type[Definition], num_variables: int, shape: Shape) -> str:
    """The text of the kernel: numbers of a state, an action or an observation have names each.

    s: the state; f: after the action; b: fresh. o: what is seen of s; p: what the network gives of
    it; d: the action as drawn, and a: as the environment takes it; u: uniform numbers; w: their
    words; r and q: rewards and flags of rows that are read together.
    """
    state, following, fresh = (names(each, num_variables) for each in "sfb")
    seen, given = names("o", shape.features), names("p", shape.outputs)
    action = names("a", shape.outputs if shape.gaussian else 1)
    drawn = names("d", len(action))
    uniforms = names("u", definition.num_uniforms)
    w = names("w", len(uniforms) + 3)

    def lines(*parts: str, indent: int = 4) -> str:
        return ("\n" + " " * indent).join(parts)

    def all_finite(numbers: list[str]) -> str:
        return " & ".join(f"is_finite({each})" for each in numbers)

    begun = [
        f"{', '.join(w[i : i + 4])} = words(tl.load(key + 3), tl.load(key + 4), none, step, env,"
        f" {Purpose.START + 64 * i})"
        for i in range(0, len(uniforms), 4)
    ]
    begun += [f"{u} = as_uniform({word})" for u, word in zip(uniforms, w, strict=False)]
    begun += [f"{', '.join(fresh)} = start({', '.join(uniforms)})"]
    looked = [f"{', '.join(seen)} = observation({', '.join(state)})"]
    looked += [
        f"tl.store(obs + (next + n) * {shape.features} + {i}, {each}, mask=inside)"
        for i, each in enumerate(seen)
    ]
    moved = [f"{s} = tl.where(plays, {f}, {s})" for s, f in zip(state, following, strict=True)]
    replaced = [f"{s} = tl.where(resets, {b}, {s})" for s, b in zip(state, fresh, strict=True)]
    read = [
        line
        for i in range(_ROWS)
        for line in (
            f"r{i} = tl.load(rewards + at - {i} * num_envs, mask=inside & (t >= {i}), other=0.0)",
            f"q{i} = tl.load(flags + at - {i} * num_envs, mask=inside & (t >= {i}), other=0)",
        )
    ]
    earned = [
        line
        for i in range(_ROWS)
        for line in (
            f"earned, paid, total, lowest, highest, lengths, most = row_before(r{i}, q{i}, gamma,"
            " earned, paid, total, lowest, highest, lengths, most)",
            f"tl.store(weights + at - {i} * num_envs, earned.to(tl.float32),"
            f" mask=inside & (t >= {i}))",
        )
    ]
    return f"""\
def play(
    iteration, keys, settings, bounds, states, obs, actions, rewards, flags, weights, last,
    starts, stops, numbers, longest, tallies, stamps,
    slots: tl.int64, envs_of_shard: tl.int64, capacity: tl.int64,
    num_steps: tl.int64, max_episode_steps: tl.int64,
    GIVEN: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr, CLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, run = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks, runs = tl.num_programs(0), tl.num_programs(1)
    slot = tl.load(iteration) % slots * runs + run
    if block == 0:
        stamp(stamps + slot * {len(Stamp)} + {Stamp.COLLECT}, CLOCK)

    of_shard = tl.cdiv(envs_of_shard, BLOCK)
    first = block % of_shard * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = first + lane < envs_of_shard
    n = block // of_shard * envs_of_shard + first + lane
    num_envs = blocks // of_shard * envs_of_shard
    obs += run * (capacity + 1) * num_envs * {shape.features}
    actions += run * capacity * num_envs * {len(action)}
    rewards += run * capacity * num_envs
    flags += run * capacity * num_envs
    weights += run * capacity * num_envs
    starts += run * num_steps * num_envs
    stops += run * num_steps * num_envs

    key = keys + slot * 6
    none = slot * 0  # start states are those of one iteration
    env = tl.load(key + 5) + n
    policy = states + slot * {3 * shape.stride}
    k = tl.arange(0, {_padded(shape.features + 1)})
    slice = tl.arange(0, {_SLICE})
    j = tl.arange(0, {_padded(shape.units[1])})
    p = tl.arange(0, {_padded(shape.outputs)})

    now = tl.where(inside, {PLAYING}, {FINISHED})
    lengths = tl.zeros((BLOCK,), tl.int32)
    steps = tl.zeros((BLOCK,), tl.int32)
    episodes = tl.zeros((BLOCK,), tl.int32)
    t = none
    step, next = t, t
    {lines(*begun)}
    {lines(*(f"{s} = {b}" for s, b in zip(state, fresh, strict=True)))}
    {lines(*looked)}
    bad = ~({all_finite(seen)})
    tl.store(starts + n, 0, mask=inside)
    doing = tl.max(now, 0)
    while (doing > 0) & (t < capacity):
        at = t * num_envs + n
        {lines(*_network(shape), indent=8)}
        {lines(*_drawn(shape, given, drawn, action), indent=8)}
        {", ".join(following)} = transition({", ".join(state + action)})
        paid = reward({", ".join(state + action + following)})
        plays, resets = now == {PLAYING}, now == {RESETTING}
        ended, truncated, lengths, steps, now = next_row(
            now, terminated({", ".join(following)}), lengths, steps, num_steps, max_episode_steps
        )
        over = ended | truncated
        paid = tl.where(plays, paid, 0.0)
        tl.store(rewards + at, paid, mask=inside)
        flag = plays.to(tl.int8) + 2 * ended.to(tl.int8) + 4 * truncated.to(tl.int8)
        tl.store(flags + at, flag, mask=inside)
        bad |= plays & ~({all_finite(["paid", *(drawn if shape.gaussian else [])])})
        t += 1
        step, next = t, t * num_envs
        row = t.to(tl.int32)
        tl.store(stops + episodes.to(tl.int64) * num_envs + n, row, mask=over)
        episodes += over.to(tl.int32)
        {lines(*moved, indent=8)}
        if doing == {RESETTING}:  # the largest of all
            {lines(*begun, *replaced, indent=12)}
            tl.store(starts + episodes.to(tl.int64) * num_envs + n, row, mask=resets)
        {lines(*looked, indent=8)}
        bad |= (truncated | (now == {PLAYING})) & ~({all_finite(seen)})
        # Of two dimensions: Triton 3.7 compiles for no Blackwell what comes of a matrix product
        # and is reduced in one.
        doing = tl.max(tl.max(now[None, :], 1), 0)

    tl.store(last + run * blocks + block, t.to(tl.int32))
    tl.store(numbers + run * num_envs + n, episodes, mask=inside)
    wrong = tl.max((inside & bad).to(tl.int32), 0)

    tl.debug_barrier()  # what other threads wrote is there
    gamma = tl.load(settings + run * {len(Setting)} + {Setting.GAMMA})
    earned = tl.zeros((BLOCK,), tl.float64)
    paid = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    lowest = tl.full((BLOCK,), float("inf"), tl.float64)
    highest = tl.full((BLOCK,), float("-inf"), tl.float64)
    most = tl.zeros((BLOCK,), tl.int32)
    rows = t
    t -= 1
    while t >= -1:  # a row before the first ends its episode
        at = t * num_envs + n
        {lines(*read, indent=8)}
        {lines(*earned, indent=8)}
        t -= {_ROWS}
    tl.store(longest + run * num_envs + n, most, mask=inside)
    tally = tallies + (run * blocks + block) * {len(Tally)}
    tl.store(tally + {Tally.COUNTED}, tl.sum(steps, 0).to(tl.float64))
    tl.store(tally + {Tally.EPISODES}, tl.sum(episodes, 0).to(tl.float64))
    tl.store(tally + {Tally.RETURN_SUM}, tl.sum(total, 0))
    tl.store(tally + {Tally.RETURN_LOW}, tl.min(lowest, 0))
    tl.store(tally + {Tally.RETURN_HIGH}, tl.max(highest, 0))
    tl.store(tally + {Tally.FINITE}, (1 - wrong).to(tl.float64))
    if FULL:
        tl.debug_barrier()
        whole = tl.zeros((BLOCK,), tl.float32)
        begins = inside
        t = none
        while t < rows:
            at = t * num_envs + n
            flag = tl.load(flags + at, mask=inside, other=0)
            whole = tl.where(begins, tl.load(weights + at, mask=inside, other=0.0), whole)
            tl.store(weights + at, tl.where(flag > 0, whole, 0.0), mask=inside)
            begins = flag != 1
            t += 1
"""


def _padded(size: int) -> int:
    """The side of a tile."""
    side: int = max(16, triton.next_power_of_2(size))
    return side


def _offsets(shape: Shape) -> list[int]:
    """Where each parameter begins in a row, and where they end."""
    offsets = [0, *itertools.accumulate(shape.sizes)]
    return offsets


def _network(shape: Shape) -> list[str]:
    """What the policy's network gives for what is seen.

    All of it would not stay in a thread's registers. So some units of the first layer are made at a
    time, and go into all of the second; weights are read whenever they are needed.
    """
    w1, b1, w2, b2, w3, b3 = _offsets(shape)[:6]
    features, (first, second), outputs = shape.features, shape.units, shape.outputs
    # Gathered, numbers lie like those of environments, and not like those of matrices. Triton 3.2,
    # which torch 2.6 comes with, cannot gather.
    gathered = "tl.gather({}, lane, 0)" if hasattr(tl, "gather") else "{}"
    seen = "0.0"
    for i, each in reversed([*enumerate([*names("o", features), "1.0"])]):
        one = each if i == features else f"{each}[:, None]"
        seen = f"tl.where(k[None, :] == {i}, {one}, {seen})"
    return [
        f"x = {seen}",
        f"bias = tl.load(policy + {b2} + j, mask=j < {second}, other=0.0)",
        f"z = tl.zeros((BLOCK, {_padded(second)}), tl.float32) + bias[None, :]",
        f"for part in tl.static_range({_padded(first) // _SLICE}):",
        f"    i = part * {_SLICE} + slice",
        # Behind the weights of an observation's numbers, those of 1, which are the bias.
        f"    weight = policy + {w1} + i[None, :] * {features} + k[:, None]",
        f"    weight = tl.where(k[:, None] < {features}, weight, policy + {b1} + i[None, :])",
        f"    there = (k[:, None] <= {features}) & (i[None, :] < {first})",
        "    matrix = tl.load(weight, mask=there, other=0.0)",
        "    h = activated(tl.dot(x, matrix, input_precision=PRECISION))",
        f"    weight = policy + {w2} + j[None, :] * {first} + i[:, None]",
        f"    there = (i[:, None] < {first}) & (j[None, :] < {second})",
        "    matrix = tl.load(weight, mask=there, other=0.0)",
        "    z = tl.dot(h, matrix, z, input_precision=PRECISION)",
        f"weight = policy + {w3} + p[None, :] * {second} + j[:, None]",
        f"there = (j[:, None] < {second}) & (p[None, :] < {outputs})",
        "matrix = tl.load(weight, mask=there, other=0.0)",
        "y = tl.dot(activated(z), matrix, input_precision=PRECISION)",
        *(
            f"{each} = {gathered.format(f'tl.sum(tl.where(p[None, :] == {i}, y, 0.0), 1)')}"
            f" + tl.load(policy + {b3 + i})"
            for i, each in enumerate(names("p", outputs))
        ),
    ]


def _drawn(shape: Shape, given: list[str], drawn: list[str], action: list[str]) -> list[str]:
    """The action, as `vecpg.policy.cuda` draws it."""
    if shape.gaussian:
        return _drawn_gaussian(shape, given, drawn, action)
    sums = [f"below += exp({each} - largest)" for each in given]
    chosen = "chosen += (below <= reached).to(tl.int32)"
    return [
        "if GIVEN:",
        "    chosen = tl.load(actions + at, mask=inside, other=0).to(tl.int32)",
        "else:",
        f"    largest = {given[0]}",
        *(f"    largest = tl.where({p} > largest, {p}, largest)" for p in given[1:]),
        "    below = tl.zeros((BLOCK,), tl.float32)",
        *(f"    {each}" for each in sums),
        f"    reached = below * uniform({_KEY}, t, env, {Purpose.ACTION}, 0)",
        "    below = tl.zeros((BLOCK,), tl.float32)",
        "    chosen = tl.zeros((BLOCK,), tl.int32)",
        *(f"    {line}" for each in sums[:-1] for line in (each, chosen)),
        "    tl.store(actions + at, chosen.to(tl.int8), mask=inside)",
        f"{action[0]} = (chosen.to(tl.int64) + {shape.first_action}).to(tl.float32)",
    ]


def _drawn_gaussian(
    shape: Shape, given: list[str], drawn: list[str], action: list[str]
) -> list[str]:
    size, pairs = shape.outputs, (shape.outputs + 1) // 2
    log_std = _offsets(shape)[6]
    text = []
    for i, (mean, d, a) in enumerate(zip(given, drawn, action, strict=True)):
        first, second = i % pairs, pairs + i % pairs
        text += [
            "if GIVEN:",
            f"    {d} = tl.load(actions + at * {size} + {i}, mask=inside, other=0.0)",
            "else:",
            f"    radius = uniform({_KEY}, t, env, {Purpose.ACTION}, {first})",
            "    radius = tl.sqrt_rn(log(1.0 - radius) * -2.0)",
            f"    angle = uniform({_KEY}, t, env, {Purpose.ACTION}, {second}) * {2 * math.pi}",
            f"    raw = tl.zeros((BLOCK,), tl.float32) + tl.load(policy + {log_std + i})",
            f"    {d} = radius * {'cos' if i < pairs else 'sin'}(angle)",
            f"    {d} = {mean} + standard_deviation(raw) * {d}",
            f"    tl.store(actions + at * {size} + {i}, {d}, mask=inside)",
            f"least, largest = tl.load(bounds + {i}), tl.load(bounds + {size + i})",
            f"{a} = tl.where({d} < least, least, tl.where({d} > largest, largest, {d}))",
        ]
    return text
