"""Environments on tensors as a user writes them; `on_tensors:Name-v0` makes one by id."""

import math

import numpy as np
from gymnasium import spaces

from vecpg.envs import ops, register

STEP = 0.5
PI, TURN = math.pi, 2 * math.pi


class Slide:
    """One variable: a place on a line, which every action moves; near 0 it pays most."""

    observation_space = spaces.Box(-9, 9, (2,))
    action_space = spaces.Discrete(3, start=-1)
    num_uniforms = 1

    @staticmethod
    def start(uniforms):
        return (2.0 * uniforms[0] - 1.0,)

    @staticmethod
    def transition(state, action):
        return (state[0] + STEP * action,)

    @staticmethod
    def observation(state):
        (place,) = state
        return place, place * place

    @staticmethod
    def terminated(state):
        return abs(state[0]) > 1.5

    @staticmethod
    def reward(state, action, following):
        return 1.0 - 0.5 * abs(following[0]) - ops.where(action == 0, 0.0, 0.125)


class Dock:
    """Seven variables, three forces, five uniform numbers, and every operation there is."""

    observation_space = spaces.Box(-np.inf, np.inf, (2, 4))
    action_space = spaces.Box(
        np.array([-1.0, -0.5, 0.0], np.float32), np.array([1.0, 2.0, 0.75], np.float32)
    )
    num_uniforms = 5

    @staticmethod
    def start(uniforms):
        a, b, c, d, e = uniforms
        return 2.0 * a - 1.0, b - 0.5, c, 0.1 * d, 0.0, TURN * e - PI, 1.0

    @staticmethod
    def transition(state, action):
        x, y, z, u, v, angle, fuel = state
        a, b, c = action
        used = 0.05 * (abs(a) + abs(b) + c)
        turned = (angle + 0.3 * b + PI) % TURN - PI
        return (
            x + 0.1 * u,
            y + 0.1 * v,
            ops.clip(z + 0.1 * c - 0.04, -1.0, 1.0),
            0.9 * u + ops.cos(angle) * a,
            0.9 * v + ops.sin(angle) * a - wind(y),
            turned,
            ops.maximum(fuel - used, 0.0),
        )

    @staticmethod
    def observation(state):
        x, y, z, u, v, angle, fuel = state
        distance = ops.sqrt(x * x + y * y + 0.01)
        return distance, ops.log(distance), z, u, v, ops.cos(angle), ops.sin(angle), fuel

    @staticmethod
    def terminated(state):
        return (ops.minimum(abs(state[0]), abs(state[1])) > 0.9) | (
            (state[6] <= 0.0) & (state[2] < 0.5)
        )

    @staticmethod
    def reward(state, action, following):
        paid = ops.exp(-(following[0] * following[0])) + ops.tanh(following[2])
        return ops.where(following[6] > 0.0, paid, -1.0) + 0.125 * ops.floor(4.0 * following[2])


def wind(height):
    """Another function of the module."""
    return 0.02 * gust(height) * height


def gust(height):
    return ops.where(height > 0.0, 1.0, 0.5)


class Panel:
    """A MultiDiscrete action: pays 1 for every component that matches what is shown."""

    observation_space = spaces.Box(-9, 9, (2,))
    action_space = spaces.MultiDiscrete([2, 3], np.int64, start=[1, -1])
    num_uniforms = 2

    @staticmethod
    def start(uniforms):
        return ops.floor(2.0 * uniforms[0]) + 1.0, ops.floor(3.0 * uniforms[1]) - 1.0, 0.0

    @staticmethod
    def transition(state, action):
        return 3.0 - state[0], -state[1], state[2] + 1.0

    @staticmethod
    def observation(state):
        return state[0], state[1]

    @staticmethod
    def terminated(state):
        return state[2] >= 6.0

    @staticmethod
    def reward(state, action, following):
        first, second = action
        return ops.where(first == state[0], 1.0, 0.0) + ops.where(second == state[1], 1.0, 0.0)


class Fading:
    """Ends by rule, by limit or both; the reward is the action, the observation the length."""

    observation_space = spaces.Box(0, 100, (2,))
    action_space = spaces.Discrete(3)
    num_uniforms = 1

    @staticmethod
    def start(uniforms):
        return 0.0, ops.floor(8.0 * uniforms[0]) + 1.0

    @staticmethod
    def transition(state, action):
        return state[0] + 1.0, state[1]

    @staticmethod
    def observation(state):
        return state

    @staticmethod
    def terminated(state):
        return state[0] >= state[1]

    @staticmethod
    def reward(state, action, following):
        return action


class Whole(Slide):
    """A number that is not a float, which torch takes and machine code does not."""

    @staticmethod
    def transition(state, action):
        return (state[0] + action / 2,)


for _env, _limit in ((Slide, 20), (Dock, 30), (Panel, 10), (Fading, 5), (Whole, 5)):
    register(
        f"{_env.__name__}-v0",
        f"on_tensors:{_env.__name__}",
        max_episode_steps=_limit,
        reward_threshold=12.0 if _env is Slide else None,
    )
