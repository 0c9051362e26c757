"""(c), the highest rung: whole iterations as one CUDA graph, and a rollout as one kernel.

Rollouts are checked as those of every rung. Iterations are made again from the same state, and have
to leave the same bits; between them nothing may be allocated.
"""

import functools
import time

import torch

from hour import clock, filled
from hour.job import Wrong
from vecpg.adam import Adam
from vecpg.config import Config
from vecpg.envs import make_envs
from vecpg.fused import Fused
from vecpg.kernels.iteration import Entry, Stamp
from vecpg.measure import cells
from vecpg.measure.results import statistics_of
from vecpg.noise import Stream
from vecpg.policy import Policy

WAY = "whole iterations"
RUNS = 64
# Iterations of a round: the host waits after the last.
_ITERATIONS = 8
_SECONDS, _FEWEST, _MOST = 1.0, 5, 30


def cases(copies):
    """Pairs of a name and what times it.

    Args:
        copies: the start window at each number of copies.
    """
    found = []
    for number, window in copies.items():
        found += [
            (f"collect, {number} copies, one kernel", functools.partial(collect, number, window)),
            (f"train, {number} copies, {WAY}", functools.partial(train, number, window)),
        ]
    many = functools.partial(train, 64, copies[64], RUNS)
    return [*found, (f"train, {RUNS} runs of 64 copies, {WAY}", many)]


def _policy(envs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Policy(envs.single_observation_space, envs.single_action_space)


def _about(thing, copies, window, how):
    about = {"thing": thing, "copies": copies, "num_steps": window, "way": WAY, "device": "cuda"}
    return about | {"how": how}


def collect(copies, window):
    """A rollout by one kernel, with what its rows earn."""
    began = time.perf_counter()
    policy = _policy(make_envs(cells.ENV_ID, copies, vectorization="tensor"))
    streams = [Stream(1, 0, 0, copies)]
    one = filled.filled(cells.ENV_ID, copies, window, "cuda", streams, policies=[policy])

    def checked():
        rollout = one.rollout()
        cells.check_rollout(rollout, policy, window)
        return int(rollout.mask.sum())

    one.play()
    counted = checked()
    ready = time.perf_counter() - began
    seconds = _timed(one.play)
    if checked() != counted:
        raise Wrong("the rollout after the rounds counts other rows than the one before")
    found = statistics_of(counted, seconds)
    _check_products("collect", found)
    about = _about("collect", copies, window, "one kernel")
    return about | found | {"rounds": len(seconds), "counted": counted, "ready_seconds": ready}


def train(copies, window, runs=1):
    """Iterations of runs of different seeds, and of a step size of 0: each does the same again."""
    began = time.perf_counter()
    envs = make_envs(cells.ENV_ID, copies, vectorization="tensor", device="cuda")
    policy = _policy(envs).to("cuda")
    configs = [
        Config(num_envs=copies, num_steps=window, seed=1 + run, device="cuda")
        for run in range(runs)
    ]
    ring = Fused(configs, envs, policy)
    iterations = min(_ITERATIONS, ring.room)
    states = []  # of each round what its iterations came to

    def load():
        for run in range(runs):
            ring.load(run, policy, Adam(policy.parameters(), lr=0.0), 0)

    def iterate():
        for _ in range(iterations):
            ring.iterate()

    def read():
        """Entries, and the stamps of the last iterations."""
        first = ring.launched - iterations
        entries, stamps = ring.read(first, iterations)
        left = torch.stack([_numbers(ring.acted(run, ring.launched)) for run in range(runs)])
        averages = ring._memory.states[ring.launched % len(ring._memory.states), :, 1:]
        states.append((torch.from_numpy(entries), left, averages.clone()))
        ring.release(ring.launched - 1)
        return stamps

    load()
    iterate()
    read()
    fields = filled.fields_of(ring._memory, ring._shape, policy, 0)
    last = Stream(1, iterations - 1, 0, copies)
    cells.check_cartpole(filled.rollout_of(fields, last))
    ready = time.perf_counter() - began
    stamps, allocated = [], []

    def before():
        load()
        allocated.append(_allocations())

    def after():
        allocated.append(_allocations())
        stamps.append(read())

    seconds = _timed(iterate, before, after)
    entries = states[0][0]
    if not (entries[..., [Entry.ROLLOUT_FINITE, Entry.UPDATE_FINITE]] == 1).all():
        raise Wrong("numbers are not finite")
    for other in states[1:]:
        if not all(map(torch.equal, states[0], other)):
            raise Wrong("the same iterations again came to other bits")
    if allocated[::2] != allocated[1::2]:
        raise Wrong("iterations allocate memory of the device")
    counted = int(entries[..., Entry.COUNTED].sum())
    found = statistics_of(counted, seconds)
    _check_products("train", found)
    thing = "train" if runs == 1 else f"train, {runs} runs"
    return (
        _about(thing, copies, window, str(ring))
        | found
        | {"rounds": len(seconds), "iterations": iterations, "counted": counted}
        | {"ready_seconds": ready, "phases": _phases(stamps)}
    )


def _numbers(parameters):
    return torch.cat([each.flatten() for each in parameters.values()])


def _timed(function, before=lambda: None, after=lambda: None):
    """Seconds of rounds, in each of which `before` and `after` are not timed."""
    for _ in range(2):
        before()
        function()
        after()
    seconds, started = [], time.perf_counter()
    while len(seconds) < _MOST and (
        len(seconds) < _FEWEST or time.perf_counter() - started < _SECONDS
    ):
        before()
        seconds.append(cells.seconds_of(function, 1, "cuda"))
        after()
    return seconds


def _phases(stamps):
    """Shares of the device's time: collecting, means by age, and gradient with step."""
    spans = sum(each[:, 0].astype(float) for each in stamps).sum(axis=0)
    begins = spans[[Stamp.COLLECT, Stamp.RETURNS, Stamp.UPDATE, Stamp.END]]
    spent = begins[1:] - begins[:-1]
    return dict(zip(("collect", "returns", "update"), (spent / spent.sum()).tolist(), strict=True))


def _allocations():
    """How often memory of the device was asked for, since the process began."""
    return torch.cuda.memory_stats().get("allocation.all.allocated")


def _check_products(thing, found):
    if cells.FLOPS[thing] * found["median"] > clock.product_speed():
        raise Wrong(f"{found['median']:.3g} steps/s are more products than the GPU computes")
