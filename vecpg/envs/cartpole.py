"""Gymnasium's CartPole-v1 on tensors: `vecpg/CartPole-v1`."""

import math

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from vecpg.envs.tensor import TensorVectorEnv
from vecpg.kernels.jit import jit

GRAVITY = 9.8
MASS_POLE = 0.1
TOTAL_MASS = 1.1
LENGTH = 0.5  # half the pole's
POLE_MOMENT = MASS_POLE * LENGTH
FORCE = 10.0
TAU = 0.02  # seconds between two states
X_LIMIT = 2.4
THETA_LIMIT = 12 * 2 * math.pi / 360


class CartPoleDynamics:
    """The state is position, velocity, angle and angular velocity of cart and pole, (4, N).

    Source: Barto, Sutton & Anderson (1983); Gymnasium's CartPole-v1, by explicit Euler steps.
    """

    def __init__(self) -> None:
        high = np.array([2 * X_LIMIT, np.inf, 2 * THETA_LIMIT, np.inf])
        self.observation_space = spaces.Box(-high, high, dtype=np.float64)
        self.action_space = spaces.Discrete(2)
        self.num_uniforms = 4

    def start(self, uniforms: Tensor) -> Tensor:
        """Uniform in [-0.05, 0.05), every variable."""
        return 0.1 * uniforms - 0.05

    def transition(self, state: Tensor, actions: Tensor) -> Tensor:
        """Push right where the action is 1, left where it is 0."""
        x, x_dot, theta, theta_dot = state
        force = torch.where(actions == 1, FORCE, -FORCE).to(state.dtype)
        cos, sin = torch.cos(theta), torch.sin(theta)
        pushed = (force + POLE_MOMENT * theta_dot.square() * sin) / TOTAL_MASS
        theta_acc = (GRAVITY * sin - cos * pushed) / (
            LENGTH * (4.0 / 3.0 - MASS_POLE * cos.square() / TOTAL_MASS)
        )
        x_acc = pushed - POLE_MOMENT * theta_acc * cos / TOTAL_MASS
        return torch.stack(
            [
                x + TAU * x_dot,
                x_dot + TAU * x_acc,
                theta + TAU * theta_dot,
                theta_dot + TAU * theta_acc,
            ]
        )

    def observation(self, state: Tensor) -> Tensor:
        """The state itself, (N, 4)."""
        return state.mT

    def terminated(self, state: Tensor) -> Tensor:
        """Outside the track, or the pole too far from upright."""
        return (state[0].abs() > X_LIMIT) | (state[2].abs() > THETA_LIMIT)

    def reward(self, state: Tensor, actions: Tensor, following: Tensor) -> Tensor:
        """1 for every step, the last one too."""
        return torch.ones_like(state[0])


@jit(as_written=True)
def start(a, b, c, d):
    """As `CartPoleDynamics.start`, of one copy. These functions enter the kernels of rollouts."""
    scale, shift = np.float32(0.1), np.float32(0.05)
    return scale * a - shift, scale * b - shift, scale * c - shift, scale * d - shift


@jit(as_written=True)
def transition(x, x_dot, theta, theta_dot, action):
    """As `CartPoleDynamics.transition`."""
    force = np.float32(FORCE) if action == 1 else np.float32(-FORCE)
    cos, sin = _cos_sin(theta)
    pushed = force + np.float32(POLE_MOMENT) * (theta_dot * theta_dot) * sin
    pushed = pushed / np.float32(TOTAL_MASS)
    theta_acc = (np.float32(GRAVITY) * sin - cos * pushed) / (
        np.float32(LENGTH)
        * (np.float32(4.0 / 3.0) - np.float32(MASS_POLE) * (cos * cos) / np.float32(TOTAL_MASS))
    )
    x_acc = pushed - np.float32(POLE_MOMENT) * theta_acc * cos / np.float32(TOTAL_MASS)
    tau = np.float32(TAU)
    return (
        x + tau * x_dot,
        x_dot + tau * x_acc,
        theta + tau * theta_dot,
        theta_dot + tau * theta_acc,
    )


@jit(as_written=True)
def _cos_sin(angle):
    """Within 1e-7 up to an angle of 1; in states that go on it is below 0.21. It vectorizes."""
    square = angle * angle
    cos = np.float32(-1.0 / 3628800.0)
    cos = cos * square + np.float32(1.0 / 40320.0)
    cos = cos * square - np.float32(1.0 / 720.0)
    cos = cos * square + np.float32(1.0 / 24.0)
    cos = cos * square - np.float32(0.5)
    cos = cos * square + np.float32(1.0)
    sin = np.float32(1.0 / 362880.0)
    sin = sin * square - np.float32(1.0 / 5040.0)
    sin = sin * square + np.float32(1.0 / 120.0)
    sin = sin * square - np.float32(1.0 / 6.0)
    return cos, sin * (square * angle) + angle


@jit(as_written=True)
def observation(x, x_dot, theta, theta_dot):
    """As `CartPoleDynamics.observation`."""
    return x, x_dot, theta, theta_dot


@jit(as_written=True)
def terminated(x, x_dot, theta, theta_dot):
    """As `CartPoleDynamics.terminated`."""
    return abs(x) > np.float32(X_LIMIT) or abs(theta) > np.float32(THETA_LIMIT)


@jit(as_written=True)
def reward(x, x_dot, theta, theta_dot, action, after_x, after_x_dot, after_theta, after_theta_dot):
    """As `CartPoleDynamics.reward`."""
    return np.float32(1.0)


class CartPole(TensorVectorEnv):
    """`gymnasium.make_vec("vecpg/CartPole-v1", num_envs=N, device="cuda", dtype="float64")`.

    Example:
        >>> envs = CartPole(3)
        >>> obs, info = envs.reset(seed=1)
        >>> obs, rewards, terminations, truncations, info = envs.step(torch.tensor([0, 1, 1]))
        >>> rewards
        tensor([1., 1., 1.])
    """

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int = 500,
        device: str = "cpu",
        dtype: str = "float32",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(
            CartPoleDynamics(), num_envs, max_episode_steps, device, dtype, render_mode
        )
