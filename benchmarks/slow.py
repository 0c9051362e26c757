"""An environment that takes a given time for a step, to see when processes pay."""

import time

import gymnasium
import numpy as np
from gymnasium import spaces


class Slow(gymnasium.Env):
    """Sleeps or computes for `seconds` a step; episodes of 20 steps."""

    def __init__(self, seconds=0.001, how="sleep"):
        self.observation_space = spaces.Box(-1, 1, (4,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.seconds, self.how = seconds, how

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(4, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.how == "sleep":
            time.sleep(self.seconds)
        else:
            # Time of this process, not of the wall: a core is needed, not just a moment.
            until = time.thread_time() + self.seconds
            while time.thread_time() < until:
                pass
        return np.zeros(4, np.float32), 1.0, self.steps == 20, False, {}


gymnasium.register("Slow-v0", "slow:Slow", max_episode_steps=100)
