"""Gymnasium's own vector environments, stepped with random actions.

Equal: the environment (it is the definition), float32 observations, actions prepared beforehand,
rows that only reset are not counted. Not equal: `sync` steps ordinary environments in Python one
after the other; `vector_entry_point` is Gymnasium's NumPy form of CartPole alone.
"""

import functools

import numpy as np
from harness import Entrant, stepping, steps_of

NEEDS = ("gymnasium",)
PACKAGES = ("gymnasium", "numpy")


def entrants():
    cases = [(64, "sync"), (64, "vector_entry_point"), (4096, "vector_entry_point")]
    return [
        Entrant(stepping(n), f"Gymnasium, {kind}", {"": functools.partial(make, n, kind)})
        for n, kind in cases
    ]


def make(num_envs, kind):
    import gymnasium

    without = {"disable_env_checker": True} if kind == "sync" else {}
    envs = gymnasium.make_vec("CartPole-v1", num_envs, vectorization_mode=kind, **without)
    envs.reset(seed=1)
    actions = np.random.default_rng(0).integers(0, 2, (100, num_envs))
    return steps_of(envs, actions)
