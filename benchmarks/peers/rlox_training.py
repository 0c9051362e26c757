"""rlox: environments in Rust, a policy gradient (VPG) in torch, and a PPO that collects in Rust.

Equal: CartPole-v1 (checked against Gymnasium's here, and the limit of 500 steps), two layers of 64
tanh units, the same number of copies and rows, float32. VPG takes one gradient step for all rows.
HybridPPO, whose rollouts are Rust from end to end, is given one pass in one batch, which is as near
to REINFORCE as its settings come.
Not equal: both also have a critic of the same size, trained with the policy. Both take windows of
rows, not whole episodes: 512 with 64 copies, and 64 with 4096, since 512 take too long here. The
clock runs from the end of the first iteration to the end of the last, because the first one's rows
are collected while it is being made.
"""

import functools
import time

import numpy as np
from harness import LEARNING_RATE, LENGTH, Entrant, check_limit, check_rows, stepping, training

NEEDS = ("rlox",)
PACKAGES = ("rlox",)

ROWS_MANY = 64  # of an iteration with 4096 copies


def entrants():
    from vecpg.kernels.cores import cores

    steppers = [
        Entrant(stepping(n), "rlox", {"": functools.partial(make_stepping, n)}) for n in (64, 4096)
    ]
    learners = [
        Entrant(
            training(n),
            f"rlox, {kind}",
            {
                f"{threads} threads": functools.partial(make_training, n, kind, threads)
                for threads in sorted({1, cores()})
            },
            "trains a critic too; windows of rows" + (f", of {ROWS_MANY}" if n > 64 else ""),
        )
        for n in (64, 4096)
        for kind in ("VPG", "HybridPPO")
    ]
    return [*steppers, *learners]


def make_stepping(num_envs):
    import rlox

    envs = rlox.VecEnv(n=num_envs, seed=1, env_id="CartPole-v1")
    actions = np.random.default_rng(0).integers(0, 2, (100, num_envs))
    lists = [row.tolist() for row in actions]  # as it takes them
    check(envs, actions)

    def step():
        for row in lists:
            envs.step_all(row)
        return actions.size

    return step


def check(envs, actions):
    obs, rows = envs.reset_all(), []
    for row in actions:
        found = envs.step_all(row.tolist())
        ended = (np.asarray(found["terminated"]) != 0) | (np.asarray(found["truncated"]) != 0)
        rows.append((obs, row, found["obs"], ended))
        obs = found["obs"]
    check_rows(*(np.concatenate(part) for part in zip(*rows, strict=True)))

    def step(chosen):
        found = envs.step_all(chosen.tolist())
        return found["obs"], (found["terminated"] != 0) | (found["truncated"] != 0)

    check_limit(step, envs.reset_all())


def make_training(num_envs, kind, threads):
    import torch
    from rlox.algorithms.hybrid_ppo import HybridPPO
    from rlox.algorithms.vpg import VPG
    from rlox.callbacks import Callback

    class Clock(Callback):
        def __init__(self):
            self.times = []

        def on_step(self, **_):
            self.times.append(time.perf_counter())
            return True

    rows = LENGTH if num_envs == 64 else ROWS_MANY
    size = num_envs * rows
    settings = {
        "VPG": {"vf_epochs": 1},
        "HybridPPO": {"n_epochs": 1, "batch_size": size, "anneal_lr": False},
    }[kind]
    algorithm = {"VPG": VPG, "HybridPPO": HybridPPO}[kind]
    iterations = 4

    def work():
        torch.set_num_threads(threads)
        clock = Clock()
        learner = algorithm(
            env_id="CartPole-v1",
            n_envs=num_envs,
            n_steps=rows,
            learning_rate=LEARNING_RATE,
            callbacks=[clock],
            **settings,
        )
        learner.train(iterations * size)
        return (iterations - 1) * size, clock.times[-1] - clock.times[0]

    return work
