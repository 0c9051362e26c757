"""What is measured: five things, each proved right before its clock is started.

This file imports nothing of its own package. To compare two commits, one copy of it runs on either.
"""

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vecpg.adam import Adam
from vecpg.advantage import advantages
from vecpg.config import Config
from vecpg.envs import has_one_generator, make_envs
from vecpg.kernels import threads
from vecpg.kernels.cores import cores
from vecpg.noise import Purpose, Stream
from vecpg.policy import Policy
from vecpg.returns import reward_to_go
from vecpg.rollout import Rollout, choose_collector, collect
from vecpg.rollout.statistics import episode_statistics
from vecpg.update import by_autograd, choose_learner, update

ENV_ID = "CartPole-v1"

# Real steps of one collection, about: what is stepped copy by copy would take seconds for more.
_STEPS = {"sync": 4096, "async": 4096}
_STEPS_ELSEWHERE = 32768
_MOST_NUM_STEPS = 512
_RETURNS_ROWS = 128
_FEWEST_UPDATE_ROWS = 16

_MOST_IN_PROCESS = 512
# What one row of one copy takes in a whole iteration: observations, actions, weights, copies.
_BYTES_PER_ROW = 200
_TIME_LIMIT = 500

# Multiply-adds of the 4-64-64-2 policy for one row: forwards; and for the gradient, in weights and
# in activations, of which those of the first layer are not needed.
_FORWARDS = 4 * 64 + 64 * 64 + 64 * 2
_BACKWARDS = _FORWARDS + 64 * 64 + 64 * 2
# Floating point operations for one environment step. Training acts once and differentiates once.
FLOPS = {
    "collect": 2 * _FORWARDS,
    "update": 2 * (_FORWARDS + _BACKWARDS),
    "train": 2 * (2 * _FORWARDS + _BACKWARDS),
}
# Side of the square matrices whose product is the limit: large enough for full speed.
_PRODUCT_SIDE = {"cpu": 1024, "cuda": 8192}
# What a step of one CartPole on tensors has to read and write: state, action and length; state,
# observation, length, reward and two flags.
_BYTES_PER_TENSOR_STEP = (16 + 8 + 8) + (16 + 16 + 8 + 4 + 2)
# How many transitions, and as many ends, are replayed; and of which rows actions are drawn again.
_REPLAYED = 100
_DRAWN_ROWS, _DRAWN_COPIES = 40, 1024
# Copies of fewer bytes than this are over before a second thread has begun.
_BYTES_PER_THREAD = 2**19


class CheckFailed(Exception):
    """What was to be timed is not right."""


@dataclass(frozen=True, slots=True)
class Case:
    """One cell of the table.

    thing:         "stepping", "collect", "returns", "update" or "train".
    device:        of the policy, "cpu" or "cuda"; and of environments on tensors.
    vectorization: None for "returns" and "update", which do not depend on it.
    num_envs:      N.
    """

    thing: str
    device: str
    vectorization: str | None
    num_envs: int

    def __str__(self) -> str:
        how = "" if self.vectorization is None else f"{self.vectorization} "
        return f"{self.thing}, {how}x {self.num_envs}, {self.device}"


@dataclass(frozen=True, slots=True)
class Limit:
    """What a figure cannot exceed, as something that can be timed.

    what:  in words.
    run:   one call of it.
    units: what the cell could do at best in the time of one call.
    """

    what: str
    run: Callable[[], object]
    units: float


@dataclass(frozen=True, slots=True)
class Cell:
    """A case that is ready to be timed.

    run:       one call of it.
    unit:      what it does, in words.
    units:     how many of them one call does.
    num_steps: rows, or the start window where something is collected.
    counted:   the share of the stepped rows that count; None where nothing is collected.
    limit:     None where the case is a limit itself.
    phases:    seconds of each phase of a whole iteration, added to by every call.
    """

    run: Callable[[], object]
    unit: str
    units: int
    num_steps: int
    counted: float | None = None
    limit: Limit | None = None
    phases: dict[str, list[float]] = field(default_factory=dict)


def cases(
    devices: tuple[str, ...], vectorizations: tuple[str, ...], num_envs: tuple[int, ...]
) -> list[Case]:
    """Every cell, small numbers of environments first.

    Example:
        >>> [str(case) for case in cases(("cpu", "cuda"), ("sync",), (8,))][:3]
        ['stepping, sync x 8, cpu', 'collect, sync x 8, cpu', 'train, sync x 8, cpu']
    """
    found: dict[Case, None] = {}
    for number in num_envs:
        for device in devices:
            for vectorization in vectorizations:
                # Gymnasium's environments are stepped on the host, whatever the policy's device.
                where = device if vectorization == "tensor" else "cpu"
                found[Case("stepping", where, vectorization, number)] = None
                found[Case("collect", device, vectorization, number)] = None
                found[Case("train", device, vectorization, number)] = None
            found[Case("returns", device, None, number)] = None
            found[Case("update", device, None, number)] = None
    return list(found)


def why_not_run(case: Case, cores: int, memory: int) -> str | None:
    """Why a cell is left out; None if it is measured.

    Args:
        case: the cell.
        cores: of this machine.
        memory: bytes, of the case's device.
    """
    processes = cores if case.vectorization == "async" else 1
    in_turn = case.vectorization in ("sync", "async")
    if in_turn and case.num_envs > _MOST_IN_PROCESS * processes:
        steps = f"{case.vectorization} steps copies in turn"
        return f"{steps}, beyond {_MOST_IN_PROCESS} in a process no faster"
    rows = {"returns": _RETURNS_ROWS, "update": _update_rows(case)}.get(
        case.thing, num_steps(case) + _TIME_LIMIT
    )
    needed = rows * case.num_envs * _BYTES_PER_ROW
    if needed > memory / 2:
        return f"may take {needed / 2**30:.1f} GiB, over half of {memory / 2**30:.1f} GiB"
    return None


def num_steps(case: Case) -> int:
    """The start window of a collection; fewer for more copies."""
    steps = _STEPS.get(case.vectorization or "", _STEPS_ELSEWHERE)
    return max(1, min(_MOST_NUM_STEPS, steps // case.num_envs))


def _update_rows(case: Case) -> int:
    return max(_FEWEST_UPDATE_ROWS, num_steps(case))


def seconds_of(run: Callable[[], object], calls: int, device: str) -> float:
    """Wall seconds of one call, with nothing left at work on the device before or after."""
    wait_for(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    wait_for(device)
    return (time.perf_counter() - started) / calls


def calls_for(seconds: float, run: Callable[[], object], device: str) -> int:
    """Warm up for at least two calls, and find how many calls take so many seconds."""
    warm = time.perf_counter()
    run()
    spent = seconds_of(run, 1, device)
    while time.perf_counter() < warm + 50 * seconds:
        spent = min(spent, seconds_of(run, 1, device))
    return max(1, math.ceil(seconds / spent))


@contextmanager
def prepared(case: Case) -> Iterator[Cell]:
    """Make what a case needs, and check it. Kernels run on every core, as in training.

    Raises:
        CheckFailed: what was to be timed is not right.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    make = {
        "stepping": _stepping,
        "collect": _collect,
        "returns": _returns,
        "update": _update,
        "train": _train,
    }[case.thing]
    try:
        with threads.using(cores()), make(case) as cell:
            yield cell
    finally:
        torch.set_num_threads(before)


@contextmanager
def _stepping(case: Case) -> Iterator[Cell]:
    with _envs(case) as envs:
        policy = _policy(envs, case.device)
        how = "reference" if case.vectorization == "tensor" else "auto"
        check_cartpole(collect(envs, policy, num_steps=1, seed=1, iteration=0, backend=how))
        run, steps = _bare(envs, case)
        limit = None
        if case.vectorization == "tensor":
            limit = _copy(_BYTES_PER_TENSOR_STEP * case.num_envs, case.num_envs, case.device)
        yield Cell(run, "steps", steps, steps // case.num_envs, limit=limit)


@contextmanager
def _collect(case: Case) -> Iterator[Cell]:
    with _envs(case) as envs:
        policy = _policy(envs, case.device)
        gather = _gathering(envs, policy, case)
        rollout = gather()
        check_rollout(rollout, policy, num_steps(case))
        counted, rows = int(rollout.mask.sum()), rollout.mask.numel()
        limit = _limit_of_steps(envs, case)
        yield Cell(gather, "environment steps", counted, num_steps(case), counted / rows, limit)


@contextmanager
def _train(case: Case) -> Iterator[Cell]:
    """Whole iterations. With a step size of 0 every round does the same work."""
    with _envs(case) as envs:
        policy = _policy(envs, case.device)
        gather = _gathering(envs, policy, case)
        rollout = gather()
        check_rollout(rollout, policy, num_steps(case))
        config = Config(num_envs=case.num_envs, num_steps=num_steps(case))
        optimizer = Adam(policy.parameters(), lr=0.0)
        weights = advantages(rollout, config)
        _check_advantages(rollout, weights, config.gamma)
        _check_gradient(policy, optimizer, rollout, weights, config)
        counted, rows = int(rollout.mask.sum()), rollout.mask.numel()
        learning = _learning(policy, case)
        phases: dict[str, list[float]] = {}

        def iteration() -> None:
            clock = [time.perf_counter()]

            def end(phase: str) -> None:
                wait_for(case.device)
                clock.append(time.perf_counter())
                phases.setdefault(phase, []).append(clock[-1] - clock[-2])

            rollout = gather()
            end("collect")
            episode_statistics(rollout)
            end("statistics")
            weights = advantages(rollout, config)
            end("returns")
            update(policy, optimizer, rollout, weights, config, **learning)
            end("update")

        yield Cell(
            iteration,
            "environment steps",
            counted,
            num_steps(case),
            counted / rows,
            _limit_of_steps(envs, case),
            phases,
        )


@contextmanager
def _returns(case: Case) -> Iterator[Cell]:
    generator = torch.Generator().manual_seed(0)
    shape = _RETURNS_ROWS, case.num_envs
    rewards = torch.randn(shape, generator=generator).to(case.device)
    dones = (torch.rand(shape, generator=generator) < 0.02).to(case.device)
    # Memory that was never written is read from one page of zeros, which flatters.
    out = torch.ones_like(rewards)
    reward_to_go(rewards, dones, 0.99, out=out)
    exact = reward_to_go(rewards.double(), dones, 0.99, backend="reference")
    _check((out - exact).abs().max() <= 1e-6 * exact.abs().max(), "returns differ")
    yield Cell(
        lambda: reward_to_go(rewards, dones, 0.99, out=out),
        "returns",
        rewards.numel(),
        _RETURNS_ROWS,
        # A reward and a return of four bytes, and a flag.
        limit=_copy(9 * rewards.numel(), rewards.numel(), case.device),
    )


@contextmanager
def _update(case: Case) -> Iterator[Cell]:
    generator = torch.Generator().manual_seed(0)
    rows = _update_rows(case)
    shape = rows, case.num_envs
    none = torch.zeros(shape, dtype=torch.bool, device=case.device)
    known: dict[str, Any] = {}
    if case.device == "cuda":  # what collecting there leaves too
        known = {"counted": torch.arange(none.numel(), device=case.device)}
    rollout = Rollout(
        obs=torch.randn(*shape, 4, generator=generator).to(case.device),
        actions=torch.randint(0, 2, shape, generator=generator).to(case.device),
        rewards=torch.ones(shape, device=case.device),
        terminations=none,
        truncations=none,
        mask=~none,
        final_obs=torch.zeros(0, 4, device=case.device),
        final_rows=torch.zeros(0, 2, dtype=torch.int64, device=case.device),
        **known,
    )
    weights = torch.randn(shape, generator=generator).to(case.device)
    with _envs(Case("update", "cpu", "vector_entry_point", 1)) as envs:
        policy = _policy(envs, case.device)
    optimizer = Adam(policy.parameters(), lr=0.0)
    config = Config(num_envs=case.num_envs)
    learning = _learning(policy, case)
    _check_gradient(policy, optimizer, rollout, weights, config)
    yield Cell(
        lambda: update(policy, optimizer, rollout, weights, config, **learning),
        "environment steps",
        none.numel(),
        rows,
        limit=_product(FLOPS["update"], case.device),
    )


@contextmanager
def _envs(case: Case) -> Iterator[Any]:
    assert case.vectorization is not None
    envs = make_envs(ENV_ID, case.num_envs, vectorization=case.vectorization, device=case.device)
    try:
        envs.reset(seed=1 if has_one_generator(envs) else list(range(case.num_envs)))  # type: ignore[arg-type]
        yield envs
    finally:
        envs.close()


def _policy(envs: Any, device: str) -> Policy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(envs.single_observation_space, envs.single_action_space)
    return policy.to(device)


def _bare(envs: Any, case: Case) -> tuple[Callable[[], None], int]:
    """Stepping with actions that cost nothing, and the number of steps of one call.

    An end is followed by a reset in the next step, so this can go on for ever.
    """
    rows = max(4, num_steps(case) // 4)
    actions: Any = np.random.default_rng(0).integers(0, 2, (rows, case.num_envs))
    if case.vectorization == "tensor":
        actions = torch.from_numpy(actions).to(case.device)

    def run() -> None:
        with torch.inference_mode():
            for row in actions:
                envs.step(row)

    return run, rows * case.num_envs


def _limit_of_steps(envs: Any, case: Case) -> Limit:
    """Of collecting and training: what the environments, or on tensors the products, allow."""
    if case.vectorization == "tensor":
        return _product(FLOPS[case.thing], case.device)
    run, steps = _bare(envs, case)
    return Limit("bare stepping", run, steps)


def _product(flops: int, device: str) -> Limit:
    """A matrix product on every core, for something that takes so many operations for a unit."""
    side = _PRODUCT_SIDE[device]
    a, b, c = torch.ones(3, side, side, device=device)

    def run() -> Tensor:
        torch.set_num_threads(cores())
        product = torch.mm(a, b, out=c)
        torch.set_num_threads(1)
        return product

    return Limit("matrix product", run, 2 * side**3 / flops)


def _copy(moved: int, units: int, device: str) -> Limit:
    """A copy that reads and writes so many bytes together, for something that does the same.

    On the host every core copies a part, as kernels do.
    """
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    parts = cores() if device == "cpu" else 1
    parts = max(1, min(parts, len(source) // _BYTES_PER_THREAD))
    pairs = list(zip(target.chunk(parts), source.chunk(parts), strict=True))

    def run() -> Tensor:
        threads.run(lambda part: pairs[part][0].copy_(pairs[part][1]), len(pairs))
        return target

    return Limit("copy", run, units)


def _gathering(envs: Any, policy: Policy, case: Case) -> Callable[[], Rollout]:
    """What collects the way that training does.

    On a GPU it is chosen and prepared once, does not wait, and its rollouts lie in one memory.
    """
    asked: dict[str, Any] = {"num_steps": num_steps(case), "seed": 1, "iteration": 0}
    if case.device == "cuda":
        collector = choose_collector(envs, policy).prepare(envs, policy, num_steps(case))
        asked |= {"backend": collector, "wait": False}
    return functools.partial(collect, envs, policy, **asked)


def _learning(policy: Policy, case: Case) -> dict[str, Any]:
    """How `update` is told to go the way that training does."""
    if case.device == "cpu":
        return {}
    learner = choose_learner(policy)
    learner.prepare(policy)
    return {"backend": learner, "wait": False}


def check_rollout(rollout: Rollout, policy: Policy, start_window: int) -> None:
    """A rollout of seed 1, iteration 0, is CartPole's, of the window asked for, by this policy.

    Raises:
        CheckFailed: it is not.
    """
    check_cartpole(rollout)
    _check_window(rollout, start_window)
    _check_actions(rollout, policy)


def check_cartpole(rollout: Rollout) -> None:
    """Counted rows are CartPole-v1: some replayed one transition at a time, all in whole episodes.

    Raises:
        CheckFailed: they are not.
    """
    mask, dones = rollout.mask.cpu(), rollout.dones.cpu()
    _check(dones.sum(dim=0).min() >= 1, "a copy finished no episode")
    _check(torch.equal(rollout.rewards.cpu(), mask.float()), "a reward is not 1")
    ages, left = _ages(rollout)
    _check(not (dones & ~mask).any(), "an episode ends in a masked row")
    _check(left[mask.numpy()].min() >= 1, "an episode has no end")
    limit_reached = torch.from_numpy(ages == _TIME_LIMIT - 1) & mask
    _check(torch.equal(rollout.truncations.cpu(), limit_reached), "a limit is not 500 steps")
    obs, actions = rollout.obs.cpu().double().numpy(), rollout.actions.cpu()
    terminations = rollout.terminations.cpu()
    starts = obs[(ages == 0) & mask.numpy()]
    _check(np.abs(starts).max() <= 0.05, "an episode does not start as CartPole does")
    inside = mask & ~dones
    inside[-1] = False
    env: Any = gymnasium.make(ENV_ID).unwrapped
    env.reset(seed=0)
    for places in (inside.nonzero(), dones.nonzero()):
        order = np.random.default_rng(0).permutation(len(places))[:_REPLAYED]
        for t, n in places[torch.from_numpy(order)].tolist():
            env.state, env.steps_beyond_terminated = obs[t, n], None
            following, _, terminated, _, _ = env.step(int(actions[t, n]))
            same = terminated == bool(terminations[t, n])
            if inside[t, n]:
                same = same and np.abs(obs[t + 1, n] - following).max() <= 1e-5
            _check(same, f"row {t} of copy {n} is not CartPole's")


def _ages(rollout: Rollout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of every counted row the steps since its episode began, and those to its end, itself too.

    The latter is 0 where no end follows. (T, N) each.
    """
    mask, dones = rollout.mask.cpu().numpy(), rollout.dones.cpu().numpy()
    ages, left = np.zeros((2, *mask.shape), np.int64)
    age, after = np.zeros((2, mask.shape[1]), np.int64)
    for t in range(len(mask)):
        ages[t] = age
        age = np.where(dones[t], 0, age + mask[t])
    for t in reversed(range(len(mask))):
        after = np.where(dones[t], 1, np.where(mask[t] & (after > 0), after + 1, after))
        left[t] = after
    return ages, left


def _check_window(rollout: Rollout, start_window: int) -> None:
    """Every copy began its last episode within the window, and made as many steps at least."""
    ages, _ = _ages(rollout)
    mask, dones = rollout.mask.cpu().numpy(), rollout.dones.cpu().numpy()
    steps = mask.sum(axis=0)
    last = len(dones) - 1 - dones[::-1].argmax(axis=0)
    begun = steps - ages[last, np.arange(len(steps))] - 1
    within = (begun < start_window) & (steps >= start_window)
    _check(bool(within.all()), f"a copy was not played for {start_window} steps and to an end")


def _check_actions(rollout: Rollout, policy: Policy) -> None:
    """Actions are those that the policy draws on the host, but where rounding decides."""
    rows, copies = min(_DRAWN_ROWS, len(rollout.mask)), min(_DRAWN_COPIES, rollout.mask.shape[1])
    noise = Stream(1, 0, 0, copies).uniforms(range(rows), Purpose.ACTION)
    on_host = copy.deepcopy(policy).cpu()
    counted = rollout.mask[:rows, :copies].cpu()
    with torch.inference_mode():
        drawn = torch.stack(
            [on_host.sample(rollout.obs[t, :copies].cpu(), noise[t : t + 1]) for t in range(rows)]
        )
    others = (drawn != rollout.actions[:rows, :copies].cpu()) & counted
    _check(others.sum() <= counted.sum() / 1000, "actions differ from what the policy draws")


def _check_advantages(rollout: Rollout, weights: Tensor, gamma: float) -> None:
    """Reward-to-go minus the mean of rows as old in other copies, where every reward is 1."""
    ages, left = _ages(rollout)
    mask = rollout.mask.cpu().numpy()
    copies = np.arange(mask.shape[1])
    to_go = (1 - gamma**left) / (1 - gamma)
    places = (ages * len(copies) + copies)[mask]
    size = (int(ages.max()) + 1) * len(copies)
    own = np.bincount(places, to_go[mask], size).reshape(-1, len(copies))
    own_count = np.bincount(places, minlength=size).reshape(-1, len(copies))
    others = own.sum(axis=1, keepdims=True) - own
    count = own_count.sum(axis=1, keepdims=True) - own_count
    baseline = (others / np.maximum(count, 1))[ages, copies]
    expected = np.where(mask, to_go - baseline, 0)
    error = np.abs(weights.cpu().double().numpy() - expected).max()
    _check(error <= 1e-5 * to_go.max(), "advantages differ from their definition")


def _check_gradient(
    policy: Policy,
    optimizer: Adam,
    rollout: Rollout,
    weights: Tensor,
    config: Config,
) -> None:
    """The gradient that `update` follows is autograd's on the host, to 1e-5 of its largest."""
    update(policy, optimizer, rollout, weights, config)
    names = ("obs", "actions", "rewards", "terminations", "truncations", "mask", "final_obs")
    on_host = Rollout(
        **{name: getattr(rollout, name).cpu() for name in names},
        final_rows=rollout.final_rows.cpu(),
    )
    expected = copy.deepcopy(policy).cpu()
    expected.zero_grad(set_to_none=True)
    by_autograd(expected, on_host, weights.cpu(), rollout.mask.shape[1], 0.0)
    pairs = list(zip(policy.parameters(), expected.parameters(), strict=True))
    scale = max(other.grad.abs().max() for _, other in pairs if other.grad is not None)
    for one, other in pairs:
        _check((one.grad is None) == (other.grad is None), "a parameter has no gradient")
        if one.grad is not None and other.grad is not None:
            difference = (one.grad.cpu() - other.grad).abs().max()
            _check(difference <= 1e-5 * scale, "the gradient is not autograd's")
    policy.zero_grad(set_to_none=True)


def _check(holds: "bool | Tensor | np.bool_", problem: str) -> None:
    if not holds:
        raise CheckFailed(problem)


def wait_for(device: str) -> None:
    """Return when the device has nothing left to do."""
    if device == "cuda":
        torch.cuda.synchronize()
