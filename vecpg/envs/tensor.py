"""Environments whose state is a tensor, all copies stepped at once on any torch device.

What an environment does is its definition (`vecpg.envs.definition`); the vector environment around
it is written once, and follows Gymnasium's in NEXT_STEP mode. Nothing in `step` waits for the
device.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from vecpg.envs.definition import Definition, bound, find, name_of, num_observations
from vecpg.envs.ops.tensor import TensorOps
from vecpg.noise import Purpose, StepNoise, Stream

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Dynamics:
    """A definition's functions for N copies at once, with torch's operations. A state is (V, N).

    Args:
        definition: of one copy.
        dtype: of states, observations and rewards.

    Raises:
        ValueError: a function does not work on tensors, or does not return what it should.

    Example:
        >>> from vecpg.envs.cartpole import CartPole
        >>> dynamics = Dynamics(CartPole, torch.float64)
        >>> following, rewards, ended = dynamics.step(torch.zeros(4, 2), torch.tensor([0, 1]))
        >>> following.shape, rewards.tolist(), ended.tolist()
        (torch.Size([4, 2]), [1.0, 1.0], [False, False])
    """

    def __init__(self, definition: type[Definition], dtype: torch.dtype) -> None:
        self.definition = definition
        self.dtype = dtype
        self._discrete = isinstance(definition.action_space, spaces.Discrete)
        self._ops = TensorOps(dtype)
        self._functions = bound(definition, self._ops)
        self.num_variables = self._check()

    def start(self, uniforms: Tensor) -> Tensor:
        """(num_uniforms, *shape) numbers in [0, 1) to (V, *shape) start states."""
        numbers = self._functions["start"](uniforms.unbind())
        return torch.stack([self._row(each, uniforms[0]) for each in numbers])

    def step(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The states after actions, (N,) or (N, *shape), rewards (N,) and terminations (N,)."""
        before, action = state.unbind(), self._reals(actions)
        like = before[0]
        numbers = self._functions["transition"](before, action)
        after = tuple([self._row(each, like) for each in numbers])
        rewards = self._row(self._functions["reward"](before, action, after), like)
        ended = self._row(self._functions["terminated"](after), like)
        return torch.stack(after), rewards, ended

    def observation(self, state: Tensor) -> Tensor:
        """(N, *shape), in memory of its own."""
        if self._shows_state:
            return state.mT.clone(memory_format=torch.contiguous_format)
        numbers = self._functions["observation"](state.unbind())
        seen = torch.stack([self._row(each, state[0]) for each in numbers], dim=1)
        return seen.reshape(-1, *self.definition.observation_space.shape)

    def _reals(self, actions: Tensor) -> Any:
        reals = actions.to(self.dtype)
        return reals if self._discrete else reals.reshape(len(reals), -1).unbind(1)

    def _row(self, number: Any, like: Tensor) -> Tensor:
        """A number of every copy. A constant stands for the same in all of them."""
        if isinstance(number, Tensor):
            return number
        return self._ops.constant(number, like.device).expand(like.shape)

    def _check(self) -> int:
        """Call every function once, of three copies. Returns the number of variables."""
        functions, definition = self._functions, self.definition

        def numbers(count: int) -> tuple[Tensor, ...]:
            return torch.full((count, 3), 0.25, dtype=self.dtype).unbind()

        def returned(name: str, *given: Any) -> Any:
            try:
                return functions[name](*given)
            # A function of the user's own, which may raise anything.
            except Exception as error:
                words = " ".join(f"{type(error).__name__}: {error}".split())
                raise ValueError(
                    f"`{name_of(definition, name)}`: expected a function that works on tensors of"
                    f" many copies, got {words}; choose with ops.where instead of if, and use what"
                    " else is in vecpg.envs.ops"
                ) from error

        def check(name: str, count: int | None, *given: Any) -> int:
            """Returns how many numbers there were."""
            found = returned(name, *given)
            right = isinstance(found, tuple) and count in (None, len(found)) and len(found) > 0
            if not right or not all(_is_number(each, self.dtype) for each in found):
                wanted = "at least one number" if count is None else _counted(count)
                raise ValueError(
                    f"`{name_of(definition, name)}`: expected a tuple of {wanted} of"
                    f" {_name(self.dtype)}, got {_described(found)}"
                )
            return len(found)

        state = numbers(check("start", None, numbers(definition.num_uniforms)))
        space: Any = definition.action_space
        actions = torch.from_numpy(np.stack([np.asarray(space.sample()) for _ in range(3)]))
        action = self._reals(actions)
        check("transition", len(state), state, action)
        check("observation", num_observations(definition), state)
        one_axis = len(definition.observation_space.shape) == 1
        self._shows_state = one_axis and returned("observation", state) is state
        flag = returned("terminated", state)
        if not isinstance(flag, bool) and not (
            isinstance(flag, Tensor) and flag.dtype == torch.bool and flag.shape == (3,)
        ):
            raise ValueError(
                f"`{name_of(definition, 'terminated')}`: expected one flag, got {_described(flag)}"
            )
        paid = returned("reward", state, action, state)
        if not _is_number(paid, self.dtype):
            raise ValueError(
                f"`{name_of(definition, 'reward')}`: expected one number of {_name(self.dtype)},"
                f" got {_described(paid)}"
            )
        return len(state)


def _is_number(value: Any, dtype: torch.dtype) -> bool:
    if isinstance(value, Tensor):
        return value.dtype == dtype and value.shape == (3,)
    return isinstance(value, float)


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    if isinstance(value, Tensor):
        shape = "" if value.shape == (3,) else f" of shape {tuple(value.shape)}"
        return _name(value.dtype) + shape
    return type(value).__name__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _counted(count: int) -> str:
    return "1 number" if count == 1 else f"{count} numbers"


class TensorVectorEnv(VectorEnv[Tensor, Tensor, Tensor]):
    """N copies of an environment on tensors, in NEXT_STEP mode.

    The step after an episode's end only resets: its action is ignored, its reward is 0, and it
    returns a fresh start state. Start states are a function of (reset seed, copy, step), so what
    other copies do never changes them. `unwrapped.state` is the (variables, N) state, which may be
    assigned. Tensors go in and come out; those that come out are never written to again.

    Args:
        definition: the environment, as a class or "module:Class".
        num_envs: copies, at least 1.
        max_episode_steps: time limit, at least 1.
        device: any torch device.
        dtype: "float32" or "float64", of states and observations.
        render_mode: None; there is no rendering.

    Raises:
        ValueError: an argument that is not as above; a definition whose functions do not return
            what they should.

    Example:
        >>> envs = TensorVectorEnv("vecpg.envs.cartpole:CartPole", 3, max_episode_steps=500)
        >>> obs, info = envs.reset(seed=1)
        >>> obs, rewards, terminations, truncations, info = envs.step(torch.tensor([0, 1, 1]))
        >>> rewards
        tensor([1., 1., 1.])
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium's own form
        "render_modes": [],
        "autoreset_mode": AutoresetMode.NEXT_STEP,
        "torch": True,
    }

    def __init__(
        self,
        definition: type[Definition] | str,
        num_envs: int = 1,
        *,
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
        self.definition = find(definition)
        self.dynamics = Dynamics(self.definition, _DTYPES[dtype])
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.dtype = _DTYPES[dtype]
        self.render_mode = render_mode
        low, high = self.definition.observation_space.low, self.definition.observation_space.high
        kind = np.float32 if dtype == "float32" else np.float64
        self.single_observation_space = spaces.Box(low.astype(kind), high.astype(kind), dtype=kind)
        self.single_action_space = self.definition.action_space
        self._action_bounds = _bounds_of(self.single_action_space)
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
        self._start = StepNoise(
            stream,
            Purpose.START,
            self.device,
            self.definition.num_uniforms,
            lambda uniforms: self.dynamics.start(uniforms.to(self.dtype)),
        )
        self._step = 0
        fresh = self._start(0)
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
        return self.dynamics.observation(self.state), {}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step of every copy.

        Args:
            actions: (N,) integers for `Discrete`, (N, *shape) integers for `MultiDiscrete` and
                floats for `Box`, on any device.

        Returns:
            observations (N, *shape), rewards (N,) in the environment's dtype, terminations and
            truncations (N,) bool, and an empty dictionary.

        Raises:
            ValueError: actions of another shape or type, or, on the CPU, outside the space.
        """
        actions = self._checked(actions)
        resets = self._over
        following, rewards, ended = self.dynamics.step(self.state, actions)
        self._step += 1
        self.state = torch.where(resets, self._start(self._step), following)
        self._lengths = torch.where(resets, 0, self._lengths + 1)
        terminations = ended & ~resets
        truncations = (self._lengths >= self.max_episode_steps) & ~resets
        self._over = terminations | truncations
        rewards = torch.where(resets, 0.0, rewards)
        return self.dynamics.observation(self.state), rewards, terminations, truncations, {}

    def _checked(self, actions: Tensor | Sequence[Any]) -> Tensor:
        actions = torch.as_tensor(actions)
        space: Any = self.single_action_space
        box = isinstance(space, spaces.Box)
        if actions.shape != (self.num_envs, *space.shape):
            raise ValueError(
                f"actions: expected shape {(self.num_envs, *space.shape)},"
                f" got {tuple(actions.shape)}"
            )
        no_number = actions.dtype == torch.bool or actions.is_complex()
        if no_number or actions.is_floating_point() != box:
            wanted = "floats" if box else "integers"
            raise ValueError(f"actions: expected {wanted}, got {actions.dtype}")
        if actions.device.type == "cpu":
            low, high = self._action_bounds
            if not bool(((actions >= low) & (actions <= high)).all()):
                raise ValueError(
                    f"actions: expected numbers from {_plain(low)} to {_plain(high)}, got"
                    f" {actions.min().item()} to {actions.max().item()}"
                )
        return actions.to(self.device)


def _bounds_of(space: Any) -> tuple[Any, Any]:
    """The smallest and the largest action: numbers, or tensors of them."""
    if isinstance(space, spaces.Discrete):
        return int(space.start), int(space.start + space.n - 1)
    if isinstance(space, spaces.Box):
        return torch.from_numpy(space.low), torch.from_numpy(space.high)
    low = torch.from_numpy(space.start.astype(np.int64))
    return low, low + torch.from_numpy(space.nvec.astype(np.int64)) - 1


def _plain(bound: Any) -> Any:
    return bound.tolist() if isinstance(bound, Tensor) else bound
