"""A row of collecting as one Triton kernel, made from the definition of an environment.

Beside it another one begins a collection. Both are launched for all N environments; which row it is
says a counter on the device, so that a captured launch can be replayed.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from gymnasium import spaces

from vecpg.envs.cuda import device_functions, from_source, names
from vecpg.envs.definition import Definition, name_of, num_components, num_observations
from vecpg.kernels.cuda import as_uniform, is_finite, words
from vecpg.noise import Purpose
from vecpg.rollout.data import FINISHED, PLAYING, RESETTING

# Environments of a program.
_BLOCK = 128
_FINISHED, _PLAYING, _RESETTING = map(tl.constexpr, (FINISHED, PLAYING, RESETTING))
_SIZES = ["num_envs", "offset", "num_steps", "max_episode_steps"]


def make_start(definition: type[Definition], num_variables: int) -> Callable[[Any, Any], None]:
    """What begins a collection, in one launch: `start(copies, rows)`.

    Of `copies` it reads `key`, and writes all others but `acted`; of `rows`, obs row 0. Both are as
    `make_step` has them.

    Args:
        definition: of the environments.
        num_variables: how many numbers a state of it is.

    Raises:
        ValueError: a function of the definition makes no kernel.
    """
    kernel = _kernels(definition, num_variables)["begin"]

    def start(copies: Any, rows: Any) -> None:
        _launch(kernel, copies.now.shape[0], rows.obs, *_of(copies))

    return start


def make_step(definition: type[Definition], num_variables: int) -> Callable[..., None]:
    """One row of N environments, in one launch.

        step(copies, rows, offset, *, num_steps, max_episode_steps)

    It plays row t = copies.t[0] + offset by the rule of `data.NEXT`. Both are read on the device,
    and nothing waits. All numbers have the bits of `vecpg.rollout.cpu` for equal actions. States of
    copies that have finished stay as they are.

    copies, tensors on one device, contiguous:
        state:    (V, N) float32.
        lengths:  (N,) int32, steps since its episode began.
        steps:    (N,) int32, real steps in this iteration.
        now:      (N,) int8, what a copy does at row t, as in `data.NEXT`.
        episodes: (N,) int32, how many of its episodes have ended.
        cut:      (N,) int32, how many of those by the limit.
        bad:      (N,) bool, True = a number that counts was NaN or infinite: an observation, a
                  reward, the observation after a truncation, an action as drawn. It stays True.
        seen:     (N, F) float32, the observation of row t, and then that of row t + 1.
        acted:    (N, A) float32, the action as the environment takes it.
        t:        (1,) int64.
        key:      (6,) int64: lower and upper word of the seed, the iteration, lower and upper word
                  of the seed of start states, the index in the whole run of the first copy.
    rows, contiguous from row 0 on: obs (R + 1, N, ...) float32, of which row t + 1 is written, and
        row t of rewards (R, N) float32, terminations, truncations and mask (R, N) bool, 0 and False
        where masked. Where actions are a Box, `actions` (R, N, A) float32 as drawn are read.

    Args:
        definition: of the environments.
        num_variables: V.

    Raises:
        ValueError: a function of the definition makes no kernel.
    """
    kernel = _kernels(definition, num_variables)["play"]

    def step(
        copies: Any, rows: Any, offset: int, *, num_steps: int, max_episode_steps: int
    ) -> None:
        _launch(
            kernel,
            copies.now.shape[0],
            rows.obs,
            *_of(copies),
            copies.acted,
            rows.actions,
            rows.rewards,
            rows.terminations,
            rows.truncations,
            rows.mask,
            offset,
            num_steps,
            max_episode_steps,
        )

    return step


def prepare(definition: type[Definition], num_variables: int, device: torch.device) -> None:
    """Compile, or load, both kernels, by playing a row of one environment.

    Raises:
        ValueError: a function of the definition makes no kernel.
    """

    def zeros(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=of, device=device)

    features, components = num_observations(definition), num_components(definition)
    counts = {name: zeros(1, of=torch.int32) for name in ("lengths", "steps", "episodes", "cut")}
    flags = {name: zeros(1, 1, of=torch.bool) for name in ("terminations", "truncations", "mask")}
    box = isinstance(definition.action_space, spaces.Box)
    copies = SimpleNamespace(
        state=zeros(num_variables, 1),
        now=zeros(1, of=torch.int8),
        bad=zeros(1, of=torch.bool),
        seen=zeros(1, features),
        acted=zeros(1, components),
        t=zeros(1, of=torch.int64),
        key=zeros(6, of=torch.int64),
        **counts,
    )
    rows = SimpleNamespace(
        obs=zeros(2, 1, features),
        actions=zeros(1, 1, components, of=torch.float32 if box else torch.int64),
        rewards=zeros(1, 1),
        **flags,
    )
    make_start(definition, num_variables)(copies, rows)
    make_step(definition, num_variables)(copies, rows, 0, num_steps=1, max_episode_steps=1)


@triton.jit
def next_row(now, terminated, lengths, steps, num_steps, max_episode_steps):
    """What comes of a row, by the rule of `data.NEXT`, for a block of copies.

    Args:
        now: what they do at it.
        terminated: where the task's rule ends an episode; it counts where they play.
        lengths: steps since their episodes began, int32.
        steps: real steps in this iteration, int32.
        num_steps: the start window.
        max_episode_steps: the time limit.

    Returns:
        terminations, truncations, and `lengths`, `steps` and `now` for the next row.
    """
    plays = now == _PLAYING
    lengths += plays.to(tl.int32)
    steps += plays.to(tl.int32)
    terminated = plays & terminated
    truncated = plays & (lengths >= max_episode_steps)
    over = terminated | truncated
    again = tl.where(steps < num_steps, _RESETTING, _FINISHED)
    following = tl.where(over, again, tl.where(now == _RESETTING, _PLAYING, now))
    return terminated, truncated, tl.where(over, 0, lengths), steps, following


def _of(copies: Any) -> tuple[torch.Tensor, ...]:
    return (
        copies.state,
        copies.lengths,
        copies.steps,
        copies.now,
        copies.episodes,
        copies.cut,
        copies.bad,
        copies.seen,
        copies.t,
        copies.key,
    )


def _launch(kernel: Any, num_envs: int, *given: Any) -> None:
    with torch.cuda.device_of(given[0]):
        kernel[(triton.cdiv(num_envs, _BLOCK),)](
            num_envs, *given, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False
        )


@functools.cache
def _kernels(definition: type[Definition], num_variables: int) -> dict[str, Any]:
    known = {
        "tl": tl,
        "words": words,
        "as_uniform": as_uniform,
        "is_finite": is_finite,
        "next_row": next_row,
        **device_functions(definition, num_variables),
    }
    text = _source(definition, num_variables)
    return from_source(text, name_of(definition), known, do_not_specialize=_SIZES)


def _source(definition: type[Definition], num_variables: int) -> str:
    """The text of both kernels: numbers of a state, an action or an observation have names each.

    s: the state before; f: after the action; b: fresh; x: at the next row. a: the action; o: what
    is seen at the next row; u: uniform numbers; w: their words.
    """
    state, following, fresh, after = (names(each, num_variables) for each in "sfbx")
    action, seen = names("a", num_components(definition)), names("o", num_observations(definition))
    uniforms = names("u", definition.num_uniforms)
    w = names("w", len(uniforms) + 3)
    drawn = len(action) if isinstance(definition.action_space, spaces.Box) else 0

    def lines(*parts: str, indent: int = 4) -> str:
        return ("\n" + " " * indent).join(parts)

    def all_finite(numbers: list[str]) -> str:
        return " & ".join(f"is_finite({each})" for each in numbers)

    loads = [
        f"{each} = tl.load(state + {v} * num_envs + n, mask=inside, other=0.0)"
        for v, each in enumerate(state)
    ]
    loads += [
        f"{each} = tl.load(acted + n * {len(action)} + {i}, mask=inside, other=0.0)"
        for i, each in enumerate(action)
    ]
    loads += [
        f"d{i} = tl.load(actions + at * {drawn} + {i}, mask=inside, other=0.0)"
        for i in range(drawn)
    ]
    begun = [
        f"{', '.join(w[i : i + 4])} = words(low, high, none, step, env, {Purpose.START + 64 * i})"
        for i in range(0, len(uniforms), 4)
    ]
    begun += [f"{u} = as_uniform({word})" for u, word in zip(uniforms, w, strict=False)]
    begun += [f"{', '.join(fresh)} = start({', '.join(uniforms)})"]
    stores = [
        f"tl.store(state + {v} * num_envs + n, {each}, mask=inside)" for v, each in enumerate(after)
    ]
    stores += [f"{', '.join(seen)} = observation({', '.join(after)})"]
    for i, each in enumerate(seen):
        stores += [
            f"tl.store(seen + n * {len(seen)} + {i}, {each}, mask=inside)",
            f"tl.store(obs + next * {len(seen)} + {i}, {each}, mask=inside)",
        ]
    moved = [
        f"{x} = tl.where(plays, {f}, {s})" for x, f, s in zip(after, following, state, strict=True)
    ]
    replaced = [f"{x} = tl.where(resets, {b}, {x})" for x, b in zip(after, fresh, strict=True)]
    whose = lines(
        "n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)",
        "inside = n < num_envs",
        "low, high = tl.load(key + 3), tl.load(key + 4)",
        "none = low * 0",  # start states are those of one iteration
        "env = tl.load(key + 5) + n",
    )
    return f"""\
def begin(
    num_envs: tl.int64, obs, state, lengths, steps, now, episodes, cut, bad, seen, counter, key,
    BLOCK: tl.constexpr,
):
    {whose}
    next, step = n, none
    {lines(*begun)}
    {lines(*(f"{x} = {b}" for x, b in zip(after, fresh, strict=True)))}
    {lines(*stores)}
    tl.store(lengths + n, 0, mask=inside)
    tl.store(steps + n, 0, mask=inside)
    tl.store(now + n, {PLAYING}, mask=inside)
    tl.store(episodes + n, 0, mask=inside)
    tl.store(cut + n, 0, mask=inside)
    tl.store(bad + n, ~({all_finite(seen)}), mask=inside)
    tl.store(counter, none)


def play(
    num_envs: tl.int64, obs, state, lengths, steps, now, episodes, cut, bad, seen, counter, key,
    acted, actions, rewards, terminations, truncations, mask,
    offset: tl.int64, num_steps: tl.int64, max_episode_steps: tl.int64, BLOCK: tl.constexpr,
):
    {whose}
    t = tl.load(counter) + offset
    at = t * num_envs + n
    next, step = at + num_envs, t + 1
    {lines(*loads)}
    was = tl.load(now + n, mask=inside, other={FINISHED})
    plays, resets = was == {PLAYING}, was == {RESETTING}
    {", ".join(following)} = transition({", ".join(state + action)})
    paid = reward({", ".join(state + action + following)})
    ended, truncated, length, made, follows = next_row(
        was,
        terminated({", ".join(following)}),
        tl.load(lengths + n, mask=inside, other=0),
        tl.load(steps + n, mask=inside, other=0),
        num_steps,
        max_episode_steps,
    )
    over = ended | truncated
    tl.store(rewards + at, tl.where(plays, paid, 0.0), mask=inside)
    tl.store(terminations + at, ended, mask=inside)
    tl.store(truncations + at, truncated, mask=inside)
    tl.store(mask + at, plays, mask=inside)
    tl.store(lengths + n, length, mask=inside)
    tl.store(steps + n, made, mask=inside)
    tl.store(now + n, follows, mask=inside)
    tl.store(episodes + n, tl.load(episodes + n, mask=over, other=0) + 1, mask=over)
    tl.store(cut + n, tl.load(cut + n, mask=truncated, other=0) + 1, mask=truncated)
    {lines(*moved)}
    if tl.max(resets.to(tl.int32), 0) > 0:
        {lines(*begun, *replaced, indent=8)}
    {lines(*stores)}
    wrong = plays & ~({all_finite(["paid", *names("d", drawn)])})
    counts = truncated | (follows == {PLAYING})
    wrong = wrong | (counts & ~({all_finite(seen)}))
    tl.store(bad + n, wrong, mask=inside & wrong)
"""
