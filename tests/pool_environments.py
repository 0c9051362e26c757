"""Small environments for what is special where several share a process."""

import time

import gymnasium
import numpy as np
from gymnasium import spaces


class Walk(gymnasium.Env):
    """A walk that draws its length, and adds what its actions and the options say.

    Observation (total, steps), or the step's number where `discrete`.
    """

    def __init__(self, discrete=False):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        if discrete:
            self.observation_space = spaces.Discrete(9)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self.discrete = discrete

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if set(options or ()) - {"more"}:
            raise KeyError(f"unknown options: {options}")
        self.length = int(self.np_random.integers(1, 6))
        self.total = self.np_random.normal() + (options or {}).get("more", 0.0)
        self.steps = 0
        self.kept = []
        return self._obs(), {}

    def step(self, action):
        self.steps += 1
        # Kept, not copied: all of an episode's actions count at every step.
        self.kept.append(action)
        self.total += float(sum(one.sum() for one in self.kept))
        over = self.steps == self.length
        return self._obs(), self.total, over and self.total > 0, over and self.total < 1, {}

    def _obs(self):
        return self.steps if self.discrete else np.array([self.total, self.steps])


class Sleeping(gymnasium.Env):
    """Its constructor, or every step, takes so many seconds."""

    def __init__(self, making=0.0, stepping=0.0):
        self.observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.stepping = stepping
        time.sleep(making)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        time.sleep(self.stepping)
        return np.zeros(1, np.float32), 1.0, False, False, {}


class Lasting(Sleeping):
    """Closing takes so many seconds, and is then noted in a file; with seed `hanging` it hangs."""

    def __init__(self, closing, noted, hanging=-1):
        super().__init__()
        self.closing, self.noted, self.hanging = closing, noted, hanging

    def reset(self, *, seed=None, options=None):
        self.seed = seed
        return super().reset(seed=seed)

    def close(self):
        time.sleep(100 if self.seed == self.hanging else self.closing)
        with open(self.noted, "a") as file:
            file.write(f"{self.seed} ")


class Keyed(Sleeping):
    """Observations that are no array."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Dict({"x": spaces.Discrete(3)})


class Blocked(gymnasium.Env):
    """Allows all but one action, which moves with the steps; an episode has three.

    `how` says what is wrong with the mask after the second step, or at the end.
    """

    def __init__(self, how="right", multi=False):
        self.observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = spaces.MultiDiscrete([2, 3]) if multi else spaces.Discrete(5)
        self.how, self.multi = how, multi

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), self._info()

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), 1.0, self.steps == 3, False, self._info()

    def _info(self):
        mask = np.ones(5, np.int8)
        mask[self.steps] = 0
        if self.how == "none at the end" and self.steps == 3:
            return {"other": object()}
        if self.how == "none at reset" and self.steps == 0:
            return {}
        if self.how == "none" and self.steps == 2:
            return {}
        if self.how == "short" and self.steps == 2:
            mask = mask[1:]
        return {"action_mask": (mask[:2], mask[2:] == 1) if self.multi else mask}


for _env in (Walk, Sleeping, Lasting, Keyed, Blocked):
    gymnasium.register(
        f"{_env.__name__}-v0", f"pool_environments:{_env.__name__}", max_episode_steps=50
    )
