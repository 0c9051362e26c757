"""Gymnasium's Pendulum-v1: `vecpg/Pendulum-v1`."""

import math

import numpy as np
from gymnasium import spaces

from vecpg.envs import ops

GRAVITY = 10.0
MASS = 1.0
LENGTH = 1.0
FALLING = 3 * GRAVITY / (2 * LENGTH)
TURNING = 3.0 / (MASS * LENGTH**2)
TAU = 0.05  # seconds between two states
MAX_SPEED = 8.0
MAX_TORQUE = 2.0
PI = math.pi
TURN = 2 * math.pi
_HIGH = np.array([1.0, 1.0, MAX_SPEED])


class Pendulum:
    """The state is angle from upright and angular velocity. Actions are torques.

    Source: Gymnasium's Pendulum-v1.
    """

    observation_space = spaces.Box(-_HIGH, _HIGH, dtype=np.float64)
    action_space = spaces.Box(-MAX_TORQUE, MAX_TORQUE, (1,), np.float32)
    num_uniforms = 2

    @staticmethod
    def start(uniforms):
        """Any angle, and an angular velocity between -1 and 1."""
        a, b = uniforms
        return PI * (2.0 * a - 1.0), 2.0 * b - 1.0

    @staticmethod
    def transition(state, action):
        """One step of the pendulum, its speed limited."""
        theta, theta_dot = state
        (torque,) = action
        acceleration = FALLING * ops.sin(theta) + TURNING * torque
        speed = ops.clip(theta_dot + acceleration * TAU, -MAX_SPEED, MAX_SPEED)
        return theta + speed * TAU, speed

    @staticmethod
    def observation(state):
        """Cosine and sine of the angle, and the angular velocity."""
        theta, theta_dot = state
        return ops.cos(theta), ops.sin(theta), theta_dot

    @staticmethod
    def terminated(state):
        """Never."""
        return False

    @staticmethod
    def reward(state, action, following):
        """Minus angle^2 from upright, minus 0.1 speed^2, minus 0.001 torque^2."""
        theta, theta_dot = state
        (torque,) = action
        angle = (theta + PI) % TURN - PI
        cost = angle * angle + 0.1 * (theta_dot * theta_dot) + 0.001 * (torque * torque)
        return -cost
