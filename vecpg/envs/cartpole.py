"""Gymnasium's CartPole-v1 on tensors: `vecpg/CartPole-v1`."""

import math

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from vecpg.envs.tensor import TensorVectorEnv

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
