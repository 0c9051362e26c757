"""Stable-Baselines3: A2C, whose iteration is the nearest to one of REINFORCE; PPO to solve.

Equal: Gymnasium's CartPole-v1 in Python (so its fair partner is vecpg's `sync`), two layers of 64
tanh units, float32, one gradient step for all rows of an iteration, one process on the CPU. With 64
copies 512 rows an iteration; with 4096 copies 16 rows, since 512 take a minute here.
Not equal: A2C also has a critic of the same size, which it evaluates and trains with the policy. It
takes windows of rows, not whole episodes, and continues them with V.

To solve: PPO with the settings that RL Baselines3 Zoo tuned for CartPole-v1. After every second
rollout (512 steps) its greedy policy plays 100 episodes; solved when their mean reaches 475. The
time of these evaluations is not counted (vecpg's counts the one that confirms, and vecpg's policy
that draws its actions has to reach 475 first, over at least 100 episodes of training).
"""

import functools
import time

import numpy as np
from harness import LEARNING_RATE, LENGTH, Entrant, training

NEEDS = ("stable_baselines3",)
PACKAGES = ("stable-baselines3",)

ROWS_MANY = 16  # of an iteration with 4096 copies
EVALUATE_EVERY = 512
STEPS = 100_000


def entrants():
    from vecpg.kernels.cores import cores

    return [
        Entrant(
            training(n),
            "Stable-Baselines3, A2C",
            {
                f"{threads} threads": functools.partial(make, n, threads)
                for threads in sorted({1, cores()})
            },
            "trains a critic too; windows of rows" + (", of 16" if n > 64 else ""),
        )
        for n in (64, 4096)
    ]


def make_copies(num_envs):
    import gymnasium
    from stable_baselines3.common.vec_env import DummyVecEnv

    maker = functools.partial(gymnasium.make, "CartPole-v1", disable_env_checker=True)
    return DummyVecEnv([maker] * num_envs)


def make(num_envs, threads):
    import torch
    from stable_baselines3 import A2C

    rows = LENGTH if num_envs == 64 else ROWS_MANY
    model = A2C(
        "MlpPolicy",
        make_copies(num_envs),
        learning_rate=LEARNING_RATE,
        n_steps=rows,
        device="cpu",
        seed=1,
    )

    def iterate():
        torch.set_num_threads(threads)
        model.learn(num_envs * rows, log_interval=10**9, reset_num_timesteps=False)
        return num_envs * rows

    return iterate


def solve(seed):
    """Seconds, and environment steps, until solved; None where it was not."""
    import gymnasium
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback

    torch.set_num_threads(1)
    judges = gymnasium.make_vec("CartPole-v1", 100, vectorization_mode="vector_entry_point")

    def mean_return(model, draw):
        """Of 100 greedy episodes, one for each copy; less, once 475 is out of reach."""
        obs, _ = judges.reset(seed=10_000 * (seed + 1) + draw)
        lengths, alive = np.zeros(100), np.ones(100, bool)
        for left in range(500, 0, -1):
            if not alive.any() or (lengths + alive * left).mean() < 475:
                break
            actions, _ = model.predict(obs, deterministic=True)
            obs, _, terminations, truncations, _ = judges.step(actions)
            lengths += alive
            alive &= ~(terminations | truncations)
        return lengths.mean()

    class Judge(BaseCallback):
        def __init__(self):
            super().__init__()
            self.evaluating, self.due = 0.0, EVALUATE_EVERY
            self.solved = None, None

        def _on_rollout_start(self):
            if self.num_timesteps < self.due:
                return
            self.due += EVALUATE_EVERY
            began = time.perf_counter()
            if mean_return(self.model, self.num_timesteps) >= 475:
                self.solved = began - started - self.evaluating, self.num_timesteps
            self.evaluating += time.perf_counter() - began

        def _on_step(self):
            return self.solved[0] is None

    model = PPO(
        "MlpPolicy",
        make_copies(8),
        n_steps=32,
        batch_size=256,
        gae_lambda=0.8,
        gamma=0.98,
        n_epochs=20,
        ent_coef=0.0,
        learning_rate=lambda left: left * 1e-3,
        clip_range=lambda left: left * 0.2,
        device="cpu",
        seed=seed,
    )
    judge = Judge()
    started = time.perf_counter()
    model.learn(STEPS, callback=judge, log_interval=10**9)
    return judge.solved
