"""Gymnasium's MountainCarContinuous-v0: `vecpg/MountainCarContinuous-v0`."""

import numpy as np
from gymnasium import spaces

from vecpg.envs import ops

POWER = 0.0015
GRAVITY = 0.0025
LEFT, RIGHT, GOAL = -1.2, 0.6, 0.45  # positions
MAX_SPEED = 0.07


class MountainCarContinuous:
    """The state is position and velocity of a car in a valley. Actions are forces.

    Source: Moore (1990); Gymnasium's MountainCarContinuous-v0, which keeps its state as float32.
    """

    observation_space = spaces.Box(
        np.array([LEFT, -MAX_SPEED]), np.array([RIGHT, MAX_SPEED]), dtype=np.float64
    )
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    num_uniforms = 1

    @staticmethod
    def start(uniforms):
        """At rest, somewhere at the bottom of the valley."""
        return 0.2 * uniforms[0] - 0.6, 0.0

    @staticmethod
    def transition(state, action):
        """One step; at the left end the car stops."""
        position, velocity = state
        (force,) = action
        velocity = velocity + (force * POWER - GRAVITY * ops.cos(3.0 * position))
        velocity = ops.clip(velocity, -MAX_SPEED, MAX_SPEED)
        position = ops.clip(position + velocity, LEFT, RIGHT)
        hit = (position <= LEFT) & (velocity < 0.0)
        return position, ops.where(hit, 0.0, velocity)

    @staticmethod
    def observation(state):
        """The state itself."""
        return state

    @staticmethod
    def terminated(state):
        """At the goal, on the hill to the right, and not on the way back."""
        return is_there(state)

    @staticmethod
    def reward(state, action, following):
        """100 for reaching the goal, minus 0.1 force^2 for every step."""
        (force,) = action
        return ops.where(is_there(following), 100.0, 0.0) - 0.1 * (force * force)


def is_there(state):
    """Whether the episode has reached its goal."""
    return (state[0] >= GOAL) & (state[1] >= 0.0)
