"""Environments whose state is a tensor, all copies stepped at once on any torch device.

An environment is a handful of pure functions (`Dynamics`); the vector environment around them is
written once, and follows Gymnasium's in NEXT_STEP mode. Nothing in `step` waits for the device.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from vecpg.noise import Purpose, StepNoise, Stream

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Dynamics(Protocol):
    """What an environment on tensors supplies. A state is (variables, N).

    observation_space, action_space: of one copy.
    num_uniforms:                    how many uniform numbers make a start state.
    """

    observation_space: Any
    action_space: Any
    num_uniforms: int

    def start(self, uniforms: Tensor) -> Tensor:
        """(num_uniforms, N) numbers in [0, 1) to start states."""

    def transition(self, state: Tensor, actions: Tensor) -> Tensor:
        """The state after an action."""

    def observation(self, state: Tensor) -> Tensor:
        """(N, *shape), dtype of the state."""

    def terminated(self, state: Tensor) -> Tensor:
        """(N,) bool, of the state after an action."""

    def reward(self, state: Tensor, actions: Tensor, following: Tensor) -> Tensor:
        """(N,), for the action that led from one state to the following."""


class TensorVectorEnv(VectorEnv[Tensor, Tensor, Tensor]):
    """N copies of an environment on tensors, in NEXT_STEP mode.

    The step after an episode's end only resets: its action is ignored, its reward is 0, and it
    returns a fresh start state. Start states are a function of (reset seed, copy, step), so what
    other copies do never changes them. `unwrapped.state` is the (variables, N) state, which may be
    assigned. Tensors go in and come out; those that come out are never written to again.

    Args:
        dynamics: the environment.
        num_envs: copies, at least 1.
        max_episode_steps: time limit, at least 1.
        device: any torch device.
        dtype: "float32" or "float64", of states and observations.
        render_mode: None; there is no rendering.

    Raises:
        ValueError: an argument that is not as above.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium's own form
        "render_modes": [],
        "autoreset_mode": AutoresetMode.NEXT_STEP,
        "torch": True,
    }

    def __init__(
        self,
        dynamics: Dynamics,
        num_envs: int,
        max_episode_steps: int,
        device: str = "cpu",
        dtype: str = "float32",
        render_mode: str | None = None,
    ) -> None:
        for name, value in (("num_envs", num_envs), ("max_episode_steps", max_episode_steps)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: expected {' or '.join(_DTYPES)}, got {dtype!r}")
        if render_mode is not None:
            raise ValueError(
                f"render_mode: expected None, got {render_mode!r}; render Gymnasium's own"
                " environment"
            )
        try:
            self.device = torch.zeros(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"device: expected one that is here, got {device!r} ({reason})"
            ) from None
        self.dynamics = dynamics
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.dtype = _DTYPES[dtype]
        self.render_mode = render_mode
        low, high = dynamics.observation_space.low, dynamics.observation_space.high
        kind = np.float32 if dtype == "float32" else np.float64
        self.single_observation_space = spaces.Box(low.astype(kind), high.astype(kind), dtype=kind)
        self.single_action_space = dynamics.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.state = torch.empty(0, num_envs)
        self._seed, self._draw = int(np.random.SeedSequence().generate_state(1)[0]), -1

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Start every copy anew, or those where `options["reset_mask"]` is True.

        Args:
            seed: fixes all start states until the next seed; None goes on with further ones.
            options: may hold "reset_mask", (N,) bool: the other copies go on as they are; and
                "first_env", the index of the first copy in the whole run, by default 0: start
                states are a function of a copy's index there.
        """
        mask = (options or {}).get("reset_mask")
        first_env = (options or {}).get("first_env", 0)
        if seed is not None and not 0 <= seed < 2**64:
            raise ValueError(f"seed: expected a number from 0 to 2**64 - 1, got {seed}")
        super().reset(seed=seed)
        self._seed, self._draw = (self._seed, self._draw + 1) if seed is None else (seed, 0)
        stream = Stream(self._seed, self._draw, first_env, self.num_envs)
        self._noise = StepNoise(stream, Purpose.START, self.device, self.dynamics.num_uniforms)
        self._step = 0
        fresh = self._start()
        zeros = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        if mask is None:
            self.state, self._lengths, self._over = fresh, zeros, zeros > 0
        else:
            chosen = torch.as_tensor(mask, device=self.device)
            if chosen.shape != (self.num_envs,) or chosen.dtype != torch.bool:
                raise ValueError(
                    f"reset_mask: expected bool, shape ({self.num_envs},), got {chosen.dtype},"
                    f" shape {tuple(chosen.shape)}"
                )
            self.state = torch.where(chosen, fresh, self.state)
            self._lengths = torch.where(chosen, 0, self._lengths)
            self._over = self._over & ~chosen
        return self.dynamics.observation(self.state).clone(), {}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step of every copy.

        Args:
            actions: (N,) integers for `Discrete`, (N, *shape) floats for `Box`, on any device.

        Returns:
            observations (N, *shape), rewards (N,) in the environment's dtype, terminations and
            truncations (N,) bool, and an empty dictionary.

        Raises:
            ValueError: actions of another shape or type, or, on the CPU, outside the space.
        """
        actions = self._checked(actions)
        resets = self._over
        following = self.dynamics.transition(self.state, actions)
        rewards = self.dynamics.reward(self.state, actions, following)
        self._step += 1
        self.state = torch.where(resets, self._start(), following)
        self._lengths = torch.where(resets, 0, self._lengths + 1)
        terminations = self.dynamics.terminated(following) & ~resets
        truncations = (self._lengths >= self.max_episode_steps) & ~resets
        self._over = terminations | truncations
        rewards = torch.where(resets, 0.0, rewards)
        return self.dynamics.observation(self.state).clone(), rewards, terminations, truncations, {}

    def _start(self) -> Tensor:
        return self.dynamics.start(self._noise(self._step).to(self.dtype))

    def _checked(self, actions: Tensor | Sequence[Any]) -> Tensor:
        actions = torch.as_tensor(actions)
        space: Any = self.single_action_space
        discrete = isinstance(space, spaces.Discrete)
        if actions.shape != (self.num_envs, *space.shape):
            raise ValueError(
                f"actions: expected shape {(self.num_envs, *space.shape)},"
                f" got {tuple(actions.shape)}"
            )
        no_number = actions.dtype == torch.bool or actions.is_complex()
        if no_number or actions.is_floating_point() == discrete:
            wanted = "integers" if discrete else "floats"
            raise ValueError(f"actions: expected {wanted}, got {actions.dtype}")
        if actions.device.type == "cpu":
            low = space.start if discrete else torch.from_numpy(space.low)
            high = space.start + space.n - 1 if discrete else torch.from_numpy(space.high)
            if not bool(((actions >= low) & (actions <= high)).all()):
                raise ValueError(
                    f"actions: expected numbers from {low} to {high}, got"
                    f" {actions.min().item()} to {actions.max().item()}"
                )
        return actions.to(self.device)
