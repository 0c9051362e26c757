"""Gymnasium's Acrobot-v1: `vecpg/Acrobot-v1`."""

import math

import numpy as np
from gymnasium import spaces

from vecpg.envs import ops

# Two links of length 1, mass 1 and moment of inertia 1, their masses in the middle.
GRAVITY = 9.8
FALLING_1, FALLING_2 = 1.5 * GRAVITY, 0.5 * GRAVITY
TAU = 0.2  # seconds between two states
HALF_TAU, SIXTH_TAU = TAU / 2, TAU / 6
MAX_SPEED_1 = 4 * math.pi
MAX_SPEED_2 = 9 * math.pi
PI = math.pi
TURN = 2 * math.pi
_HIGH = np.array([1.0, 1.0, 1.0, 1.0, MAX_SPEED_1, MAX_SPEED_2])


class Acrobot:
    """The state is the angle of the first link from hanging, the second's from the first, speeds.

    Source: Sutton (1996), with the equations of Sutton & Barto's book; Gymnasium's Acrobot-v1, by
    one step of Runge and Kutta's fourth order.
    """

    observation_space = spaces.Box(-_HIGH, _HIGH, dtype=np.float64)
    action_space = spaces.Discrete(3)
    num_uniforms = 4

    @staticmethod
    def start(uniforms):
        """Uniform in [-0.1, 0.1), every variable."""
        a, b, c, d = uniforms
        return 0.2 * a - 0.1, 0.2 * b - 0.1, 0.2 * c - 0.1, 0.2 * d - 0.1

    @staticmethod
    def transition(state, action):
        """A torque of -1, 0 or 1 on the joint between the links, its number less 1."""
        torque = action - 1.0
        slope_1 = slopes(state, torque)
        slope_2 = slopes(moved(state, HALF_TAU, slope_1), torque)
        slope_3 = slopes(moved(state, HALF_TAU, slope_2), torque)
        slope_4 = slopes(moved(state, TAU, slope_3), torque)
        theta_1, theta_2, speed_1, speed_2 = state
        return (
            inside_turn(theta_1 + step(slope_1[0], slope_2[0], slope_3[0], slope_4[0])),
            inside_turn(theta_2 + step(slope_1[1], slope_2[1], slope_3[1], slope_4[1])),
            ops.clip(
                speed_1 + step(slope_1[2], slope_2[2], slope_3[2], slope_4[2]),
                -MAX_SPEED_1,
                MAX_SPEED_1,
            ),
            ops.clip(
                speed_2 + step(slope_1[3], slope_2[3], slope_3[3], slope_4[3]),
                -MAX_SPEED_2,
                MAX_SPEED_2,
            ),
        )

    @staticmethod
    def observation(state):
        """Cosines and sines of both angles, and the speeds."""
        theta_1, theta_2, speed_1, speed_2 = state
        return (
            ops.cos(theta_1),
            ops.sin(theta_1),
            ops.cos(theta_2),
            ops.sin(theta_2),
            speed_1,
            speed_2,
        )

    @staticmethod
    def terminated(state):
        """The tip is more than a link's length above the joint that is fixed."""
        return is_up(state)

    @staticmethod
    def reward(state, action, following):
        """-1 for every step, but 0 for the one that gets there."""
        return ops.where(is_up(following), 0.0, -1.0)


def is_up(state):
    """Whether the episode has reached its goal."""
    return -ops.cos(state[0]) - ops.cos(state[1] + state[0]) > 1.0


def slopes(state, torque):
    """The state's derivative in time."""
    theta_1, theta_2, speed_1, speed_2 = state
    cos_2, sin_2 = ops.cos(theta_2), ops.sin(theta_2)
    d1 = 3.5 + cos_2
    d2 = 1.25 + 0.5 * cos_2
    phi_2 = FALLING_2 * ops.sin(theta_1 + theta_2)
    phi_1 = (
        -0.5 * (speed_2 * speed_2) * sin_2
        - speed_2 * speed_1 * sin_2
        + FALLING_1 * ops.sin(theta_1)
        + phi_2
    )
    acceleration_2 = (torque + d2 / d1 * phi_1 - 0.5 * (speed_1 * speed_1) * sin_2 - phi_2) / (
        1.25 - d2 * d2 / d1
    )
    acceleration_1 = -(d2 * acceleration_2 + phi_1) / d1
    return speed_1, speed_2, acceleration_1, acceleration_2


def moved(state, time, slope):
    """The state after some time at a slope."""
    return (
        state[0] + time * slope[0],
        state[1] + time * slope[1],
        state[2] + time * slope[2],
        state[3] + time * slope[3],
    )


def step(slope_1, slope_2, slope_3, slope_4):
    """What Runge and Kutta's method adds to a variable."""
    return SIXTH_TAU * (slope_1 + 2.0 * slope_2 + 2.0 * slope_3 + slope_4)


def inside_turn(angle):
    """The same angle between -pi and pi; both of them stay."""
    turns = TURN * ops.floor((PI - abs(angle)) / TURN)
    return ops.where(angle > 0.0, angle + turns, angle - turns)
