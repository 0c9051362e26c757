"""Gymnasium's CartPole-v1: `vecpg/CartPole-v1`."""

import math

import numpy as np
from gymnasium import spaces

from vecpg.envs import ops

GRAVITY = 9.8
MASS_POLE = 0.1
TOTAL_MASS = 1.1
LENGTH = 0.5  # half the pole's
POLE_MOMENT = MASS_POLE * LENGTH
FORCE = 10.0
TAU = 0.02  # seconds between two states
X_LIMIT = 2.4
THETA_LIMIT = 12 * 2 * math.pi / 360
_HIGH = np.array([2 * X_LIMIT, np.inf, 2 * THETA_LIMIT, np.inf])


class CartPole:
    """The state is position, velocity, angle and angular velocity of cart and pole.

    Source: Barto, Sutton & Anderson (1983); Gymnasium's CartPole-v1, by explicit Euler steps.
    """

    observation_space = spaces.Box(-_HIGH, _HIGH, dtype=np.float64)
    action_space = spaces.Discrete(2)
    num_uniforms = 4

    @staticmethod
    def start(uniforms):
        """Uniform in [-0.05, 0.05), every variable."""
        a, b, c, d = uniforms
        return 0.1 * a - 0.05, 0.1 * b - 0.05, 0.1 * c - 0.05, 0.1 * d - 0.05

    @staticmethod
    def transition(state, action):
        """Push right where the action is 1, left where it is 0."""
        x, x_dot, theta, theta_dot = state
        force = ops.where(action == 1, FORCE, -FORCE)
        cos, sin = ops.cos(theta), ops.sin(theta)
        pushed = (force + POLE_MOMENT * (theta_dot * theta_dot) * sin) / TOTAL_MASS
        theta_acc = (GRAVITY * sin - cos * pushed) / (
            LENGTH * (4.0 / 3.0 - MASS_POLE * (cos * cos) / TOTAL_MASS)
        )
        x_acc = pushed - POLE_MOMENT * theta_acc * cos / TOTAL_MASS
        return (
            x + TAU * x_dot,
            x_dot + TAU * x_acc,
            theta + TAU * theta_dot,
            theta_dot + TAU * theta_acc,
        )

    @staticmethod
    def observation(state):
        """The state itself."""
        return state

    @staticmethod
    def terminated(state):
        """Outside the track, or the pole too far from upright."""
        return (abs(state[0]) > X_LIMIT) | (abs(state[2]) > THETA_LIMIT)

    @staticmethod
    def reward(state, action, following):
        """1 for every step, the last one too."""
        return 1.0
