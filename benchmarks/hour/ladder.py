"""(c) Environment steps per second: op by op, in CUDA graphs, and the CPU's machine code.

CartPole-v1 and a 4-64-64-2 policy; every rung plays the same window at a number of copies.
"""

import functools
import time

import torch

from hour import clock
from hour.job import Wrong
from vecpg.adam import Adam
from vecpg.advantage import advantages
from vecpg.config import Config
from vecpg.envs import make_envs
from vecpg.kernels import threads
from vecpg.kernels.cores import cores
from vecpg.measure import cells
from vecpg.measure.results import statistics_of
from vecpg.policy import Policy
from vecpg.rollout import choose_collector, collect
from vecpg.rollout.statistics import episode_statistics
from vecpg.update import choose_learner

# The start window at each number of copies; those that count first come first.
COPIES = {4096: 128, 64: 512, 65536: 64}
WAYS = {"in graphs": "cuda", "CPU": "cpu", "op by op": "cuda"}
# Seconds of each figure, and the rounds at least and at most.
_SECONDS, _FEWEST, _MOST = 1.0, 5, 30


def measure(job):
    copies, ways = COPIES, WAYS
    if job.miniature:
        copies, ways = {4: 8}, {"CPU": "cpu", "op by op": "cpu"}
    job.run(
        [
            (
                f"{thing}, {number} copies, {way}",
                functools.partial(timed, thing, number, window, way, device),
            )
            for number, window in copies.items()
            for thing in ("collect", "train")
            for way, device in ways.items()
        ],
        limit=40,
    )


def timed(thing, copies, window, way, device):
    """One rung: checked, then timed."""
    envs = make_envs(cells.ENV_ID, copies, vectorization="tensor", device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(envs.single_observation_space, envs.single_action_space).to(device)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threads.using(cores()):
            return _timed(thing, copies, window, way, device, envs, policy)
    finally:
        torch.set_num_threads(before)


def _timed(thing, copies, window, way, device, envs, policy):
    began = time.perf_counter()
    backend = "reference"
    if way != "op by op":
        backend = choose_collector(envs, policy)
        backend.prepare(envs, policy)
    gather = functools.partial(
        collect, envs, policy, num_steps=window, seed=1, iteration=0, backend=backend
    )
    config = Config(num_envs=copies, num_steps=window)
    optimizer = Adam(policy.parameters(), lr=0.0)  # every round does the same work
    learner = choose_learner(policy)
    learner.prepare(policy)

    def iterate():
        rollout = gather()
        episode_statistics(rollout)
        learner.update(policy, optimizer, rollout, advantages(rollout, config), config)

    function = gather if thing == "collect" else iterate
    counted = _checked(gather(), policy, window)
    function()
    cells.wait_for(device)
    ready = time.perf_counter() - began
    seconds = []
    started = time.perf_counter()
    while len(seconds) < _MOST and (
        len(seconds) < _FEWEST or time.perf_counter() - started < _SECONDS
    ):
        seconds.append(cells.seconds_of(function, 1, device))
    # It still does what was checked.
    if _checked(gather(), policy, window) != counted:
        raise Wrong("the rollout after the rounds counts other rows than the one before")
    speed = statistics_of(counted, seconds)
    operations = cells.FLOPS[thing]
    if device == "cuda" and speed["median"] * operations > clock.product_speed():
        raise Wrong(f"{speed['median']:.3g} steps/s are more products than the GPU computes")
    return {
        "thing": thing,
        "copies": copies,
        "num_steps": window,
        "way": way,
        "device": device,
        "vectorization": "tensor",
        **speed,
        "rounds": len(seconds),
        "counted": counted,
        "ready_seconds": ready,
        "how": str(backend),
    }


def _checked(rollout, policy, window):
    cells.check_rollout(rollout, policy, window)
    return int(rollout.mask.sum())
