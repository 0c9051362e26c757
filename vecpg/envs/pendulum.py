"""Gymnasium's Pendulum-v1 on tensors: `vecpg/Pendulum-v1`."""

import math

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from vecpg.envs.tensor import TensorVectorEnv
from vecpg.kernels.jit import jit

GRAVITY = 10.0
MASS = 1.0
LENGTH = 1.0
TAU = 0.05  # seconds between two states
MAX_SPEED = 8.0
MAX_TORQUE = 2.0


class PendulumDynamics:
    """The state is angle from upright and angular velocity, (2, N). Actions are torques.

    Source: Gymnasium's Pendulum-v1.
    """

    def __init__(self) -> None:
        high = np.array([1.0, 1.0, MAX_SPEED])
        self.observation_space = spaces.Box(-high, high, dtype=np.float64)
        self.action_space = spaces.Box(-MAX_TORQUE, MAX_TORQUE, (1,), np.float32)
        self.num_uniforms = 2

    def start(self, uniforms: Tensor) -> Tensor:
        """Any angle, and an angular velocity between -1 and 1."""
        angle, speed = 2 * uniforms - 1
        return torch.stack([math.pi * angle, speed])

    def transition(self, state: Tensor, actions: Tensor) -> Tensor:
        """One step of the pendulum, its speed limited."""
        theta, theta_dot = state
        torque = actions[:, 0].to(state.dtype)
        acceleration = 3 * GRAVITY / (2 * LENGTH) * torch.sin(theta)
        acceleration = acceleration + 3.0 / (MASS * LENGTH**2) * torque
        speed = (theta_dot + acceleration * TAU).clamp(-MAX_SPEED, MAX_SPEED)
        return torch.stack([theta + speed * TAU, speed])

    def observation(self, state: Tensor) -> Tensor:
        """Cosine and sine of the angle, and the angular velocity, (N, 3)."""
        theta, theta_dot = state
        return torch.stack([torch.cos(theta), torch.sin(theta), theta_dot], dim=1)

    def terminated(self, state: Tensor) -> Tensor:
        """Never."""
        return torch.zeros_like(state[0], dtype=torch.bool)

    def reward(self, state: Tensor, actions: Tensor, following: Tensor) -> Tensor:
        """Minus angle^2 from upright, minus 0.1 speed^2, minus 0.001 torque^2."""
        theta, theta_dot = state
        torque = actions[:, 0].to(state.dtype)
        angle = torch.remainder(theta + math.pi, 2 * math.pi) - math.pi
        cost: Tensor = angle.square() + 0.1 * theta_dot.square() + 0.001 * torque.square()
        return -cost


@jit(as_written=True)
def start(a, b, c, d):
    """As `PendulumDynamics.start`, of one copy. These functions enter the kernels of rollouts."""
    one, two, none = np.float32(1.0), np.float32(2.0), np.float32(0.0)
    return np.float32(math.pi) * (two * a - one), two * b - one, none, none


@jit(as_written=True)
def transition(theta, theta_dot, c, d, torque):
    """As `PendulumDynamics.transition`."""
    acceleration = np.float32(3.0 * GRAVITY / (2.0 * LENGTH)) * math.sin(theta)
    acceleration = acceleration + np.float32(3.0 / (MASS * LENGTH**2)) * torque
    speed = theta_dot + acceleration * np.float32(TAU)
    speed = min(max(speed, np.float32(-MAX_SPEED)), np.float32(MAX_SPEED))
    return theta + speed * np.float32(TAU), speed, c, d


@jit(as_written=True)
def observation(theta, theta_dot, c, d):
    """As `PendulumDynamics.observation`."""
    return math.cos(theta), math.sin(theta), theta_dot, d


@jit(as_written=True)
def terminated(theta, theta_dot, c, d):
    """As `PendulumDynamics.terminated`."""
    return False


@jit(as_written=True)
def reward(theta, theta_dot, c, d, torque, after_theta, after_theta_dot, after_c, after_d):
    """As `PendulumDynamics.reward`."""
    pi, turn = np.float32(math.pi), np.float32(2.0 * math.pi)
    angle = (theta + pi) % turn - pi
    cost = angle * angle + np.float32(0.1) * (theta_dot * theta_dot)
    return -(cost + np.float32(0.001) * (torque * torque))


class Pendulum(TensorVectorEnv):
    """`gymnasium.make_vec("vecpg/Pendulum-v1", num_envs=N)`.

    Example:
        >>> envs = Pendulum(3)
        >>> envs.reset(seed=1)[0].shape
        torch.Size([3, 3])
    """

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int = 200,
        device: str = "cpu",
        dtype: str = "float32",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(
            PendulumDynamics(), num_envs, max_episode_steps, device, dtype, render_mode
        )
