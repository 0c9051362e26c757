"""(c) Environment steps per second: op by op, in CUDA graphs, by kernels, and on the CPU.

CartPole-v1 and a 4-64-64-2 policy; every rung plays the same window at a number of copies. The
highest is `hour.rung`.
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
from vecpg.kernels.jit import Compilation
from vecpg.measure import cells
from vecpg.measure.results import statistics_of
from vecpg.policy import Policy
from vecpg.rollout import choose_collector, collect
from vecpg.rollout.statistics import episode_statistics
from vecpg.update import choose_learner

# The start window at each number of copies; those that count first come first.
COPIES = {4096: 128, 64: 512, 65536: 64}
# The device of each way, its backend, and whether it has memory and CUDA graphs of its own.
WAYS = {
    "kernels in graphs": ("cuda", "cuda", True),
    "CPU": ("cpu", "cpu", True),
    "torch in graphs": ("cuda", "reference", True),
    "torch, op by op": ("cuda", "reference", False),
}
# Seconds of each figure, and the rounds at least and at most.
_SECONDS, _FEWEST, _MOST = 1.0, 5, 30


def measure(job):
    copies, ways, highest = COPIES, WAYS, []
    if job.miniature:
        copies = {4: 8}
        ways = {"CPU": WAYS["CPU"], "torch, op by op": ("cpu", "reference", False)}
    else:
        from hour import rung

        highest = rung.cases(copies)
    job.run(
        highest
        + [
            (
                f"{thing}, {number} copies, {way}",
                functools.partial(timed, thing, number, window, way, *how),
            )
            for number, window in copies.items()
            for thing in ("collect", "train")
            for way, how in ways.items()
        ],
        limit=40,
    )


def timed(thing, copies, window, way, device, backend, prepared):
    """One rung: checked, then timed."""
    envs = make_envs(cells.ENV_ID, copies, vectorization="tensor", device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(envs.single_observation_space, envs.single_action_space).to(device)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threads.using(cores()):
            began = time.perf_counter()
            collector = choose_collector(envs, policy, backend)
            learner = choose_learner(policy)
            if prepared:
                collector = collector.prepare(envs, policy, window)
                learner.prepare(policy)
            found = _timed(thing, envs, policy, window, collector, learner, began)
    finally:
        torch.set_num_threads(before)
    operations = cells.FLOPS[thing] * found["median"]
    if device == "cuda" and operations > clock.product_speed():
        raise Wrong(f"{found['median']:.3g} steps/s are more products than the GPU computes")
    about = {"thing": thing, "copies": copies, "num_steps": window, "way": way, "device": device}
    return about | found | {"how": str(collector)}


def _timed(thing, envs, policy, window, collector, learner, began):
    device = policy.device.type
    wait = device == "cpu"  # as the loop of training does
    gather = functools.partial(
        collect, envs, policy, num_steps=window, seed=1, iteration=0, backend=collector, wait=wait
    )
    config = Config(num_envs=envs.num_envs, num_steps=window)
    optimizer = Adam(policy.parameters(), lr=0.0)  # every round does the same work
    finite = []

    def iterate():
        rollout = gather()
        episode_statistics(rollout)
        weights = advantages(rollout, config)
        stats = learner.update(policy, optimizer, rollout, weights, config, wait=wait)
        finite[:] = rollout.finite, stats.finite

    function = gather if thing == "collect" else iterate
    counted = _checked(gather(), policy, window)
    for _ in range(2):
        function()
    cells.wait_for(device)
    ready = time.perf_counter() - began
    seconds = []
    with Compilation() as compilation:
        started = time.perf_counter()
        while len(seconds) < _MOST and (
            len(seconds) < _FEWEST or time.perf_counter() - started < _SECONDS
        ):
            seconds.append(cells.seconds_of(function, 1, device))
    if compilation.seconds:
        raise Wrong("a kernel was compiled while it was timed")
    if not all(each is None or bool(each) for each in finite):
        raise Wrong("numbers are not finite")
    # It still does what was checked.
    if _checked(gather(), policy, window) != counted:
        raise Wrong("the rollout after the rounds counts other rows than the one before")
    return {
        **statistics_of(counted, seconds),
        "rounds": len(seconds),
        "counted": counted,
        "ready_seconds": ready,
    }


def _checked(rollout, policy, window):
    cells.check_rollout(rollout, policy, window)
    return int(rollout.mask.sum())
