"""EnvPool's CartPole-v1 in C++, stepped with random actions.

Equal: the environment (checked against Gymnasium's here, and the limit of 500 steps), actions
prepared beforehand, rows that only reset are not counted. Not equal: EnvPool's pool of threads
serves any environment and can hand out whichever copies are ready first; that mode (`async`) does
not keep the copies in step, and is tried because it is the one its authors recommend for speed.
"""

import functools

import numpy as np
from harness import Entrant, check_limit, check_rows, stepping, steps_of

NEEDS = ("envpool",)
PACKAGES = ("envpool",)


def entrants():
    return [
        Entrant(
            stepping(n),
            "EnvPool",
            {
                "sync, 1 thread": functools.partial(make, n, 1),
                "sync, 2 threads": functools.partial(make, n, 2),
                "async, 2 threads": functools.partial(make_async, n),
            },
            "any copies that are ready, where async",
        )
        for n in (64, 4096)
    ]


def make(num_envs, threads):
    import envpool

    envs = envpool.make(
        "CartPole-v1", env_type="gymnasium", num_envs=num_envs, num_threads=threads, seed=1
    )
    actions = np.random.default_rng(0).integers(0, 2, (100, num_envs))
    check(envs, actions)
    return steps_of(envs, actions)


def make_async(num_envs):
    import envpool

    batch = num_envs // 2
    envs = envpool.make(
        "CartPole-v1",
        env_type="gymnasium",
        num_envs=num_envs,
        batch_size=batch,
        num_threads=2,
        seed=1,
    )
    actions = np.random.default_rng(0).integers(0, 2, (200, batch))
    envs.async_reset()

    def step():
        ends = 0
        for row in actions:
            _, _, terminations, truncations, info = envs.recv()
            ends += np.count_nonzero(terminations | truncations)
            envs.send(row, info["env_id"])
        return actions.size - ends

    return step


def check(envs, actions):
    obs, _ = envs.reset()
    rows, over = [], np.zeros(len(obs), bool)
    for row in actions:
        following, _, terminations, truncations, _ = envs.step(row)
        ended = terminations | truncations
        real = ~over  # the row after an end only resets
        rows.append((obs[real], row[real], following[real], ended[real]))
        obs, over = following, ended
    check_rows(*(np.concatenate(part) for part in zip(*rows, strict=True)))

    def step(chosen):
        after, _, terminations, truncations, _ = envs.step(chosen)
        return after, terminations | truncations

    check_limit(step, envs.reset()[0])
