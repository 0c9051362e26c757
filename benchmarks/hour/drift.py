"""(b), whole iterations: how far the parameters are from the CPU's, and when a first draw differs.

Both begin with the same parameters and use the same random numbers. Sums differ in their order, so
parameters do in their last digits, and a draw on the boundary of two actions may give the other
one; from there on two different runs go on, and nothing more is compared.
"""

import copy
import functools

import torch

from hour import filled
from hour.job import Wrong
from hour.parity import SEED, distances
from vecpg.adam import Adam
from vecpg.advantage import advantages
from vecpg.config import Config
from vecpg.envs import make_envs
from vecpg.fused import Fused
from vecpg.noise import Stream
from vecpg.policy.shape import shape_of
from vecpg.rollout import collect
from vecpg.update import update

ITERATIONS = 12
# How far parameters may be, in parts of the way that they have come: where a gradient is as small
# as its rounding, the first steps of Adam are as large as any, and may go to the other side.
_APART = 0.1
# And how far from a boundary a draw that differs, when parameters do.
_AT_A_BOUNDARY = 1e-3


def cases():
    return [
        (f"{ITERATIONS} iterations, {env_id}, {copies} copies", check)
        for env_id, copies in (("CartPole-v1", 64), ("CartPole-v1", 4200), ("Pendulum-v1", 64))
        for check in [functools.partial(drifted, env_id, copies, ITERATIONS, "cuda")]
    ]


def drifted(env_id, copies, iterations, device):
    """One line: whole iterations on the device beside the CPU's."""
    config = Config(env_id=env_id, num_envs=copies, seed=SEED, device=device)
    envs = make_envs(env_id, copies, vectorization="tensor")
    policy = filled.policy_of(envs)
    start = _in_a_row(policy.state_dict())
    there = copy.deepcopy(policy).to(device)
    ring = Fused([config], make_envs(env_id, copies, vectorization="tensor", device=device), there)
    ring.load(0, there, Adam(there.parameters(), lr=config.learning_rate), 0)
    optimizer = Adam(policy.parameters(), lr=config.learning_rate)
    apart, first = [], None
    for number in range(iterations):
        theirs = collect(
            envs, policy, num_steps=config.num_steps, seed=SEED, iteration=number, backend="cpu"
        )
        ring.iterate()
        ring.read(number, 1)
        first = _first_draw(ring, policy, theirs, number)
        if first is not None:
            break
        update(policy, optimizer, theirs, advantages(theirs, config), config)
        here, far = _in_a_row(policy.state_dict()), _in_a_row(ring.acted(0, number + 1))
        apart.append(((far - here).norm() / (here - start).norm()).item())
        if not apart[-1] <= _APART:
            raise Wrong(f"after {number + 1} iterations parameters are {apart[-1]:.2g} apart")
        ring.release(number)
    if first is not None and not first["from_a_boundary"] <= _AT_A_BOUNDARY:
        raise Wrong(
            f"in iteration {first['iteration']} a draw differs {first['from_a_boundary']:.2g} from"
            " the boundary of two actions"
        )
    return {
        "env_id": env_id,
        "way": "whole iterations",
        "how": str(ring),
        "copies": copies,
        "iterations": len(apart),
        "parameters_apart": apart,
        "first_draw": first,
    }


def _first_draw(ring, policy, theirs, number):
    """Which action is the first that differs, and how near a boundary it was drawn; None."""
    shape = shape_of(policy)
    if shape.gaussian:
        return None
    ours = filled.fields_of(ring._memory, shape, policy, 0)
    rows = min(len(ours["mask"]), len(theirs.mask))
    names = ("actions", "mask", "obs")
    theirs = {name: getattr(theirs, name)[:rows] for name in names}
    parted = (ours["actions"][:rows] != theirs["actions"]) & theirs["mask"]
    if not parted.any():
        if not torch.equal(ours["mask"][:rows], theirs["mask"]):
            raise Wrong(f"in iteration {number} the same actions have other ends")
        return None
    t, n = parted.nonzero()[0].tolist()
    stream = Stream(SEED, number, 0, parted.shape[1])
    near = distances(policy, theirs, stream)[t, n].item()
    return {"iteration": number, "row": t, "copy": n, "from_a_boundary": near}


def _in_a_row(parameters):
    return torch.cat([each.detach().cpu().double().flatten() for each in parameters.values()])
