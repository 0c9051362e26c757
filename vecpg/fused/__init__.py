"""Whole iterations on a GPU: {rollout, returns, baseline, gradient, Adam} as one CUDA graph.

The host launches an iteration after the other, a few ahead of the device. What an iteration began
with and what it came to lie in a ring, from which the host reads when it likes, and takes up the
state after any iteration that it has not released: those that it launched beyond are as if they had
not been.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vecpg.adam import Adam
from vecpg.config import Config, flag
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.kernels import graphs
from vecpg.kernels.iteration import Memory, Scalar, Shape, Stamp, make_memory
from vecpg.memory import in_words
from vecpg.noise import Stream
from vecpg.policy import Policy
from vecpg.policy import shape as shapes
from vecpg.policy.distributions import DiagonalGaussian
from vecpg.rollout import tensor

# Bytes that the rings may hold, of as many slots as fit between these two, powers of 2.
_MOST_BYTES, _FEWEST_SLOTS, _MOST_SLOTS = 2**28, 4, 256
# Of how many iterations keys and scalars are written together. The host is ahead of the device by
# at most twice as many: enough to keep it at work, and few enough to wait for.
_AHEAD = 8
# Shards of all runs: what CUDA allows of programs along any but the first axis.
_MOST_GROUPS = 2**16 - 1

_BY_AGE = ("timestep_mean", "leave_one_out")
# As `Adam.state_dict` names them, in the order in which a state has them.
_AVERAGES = ("exp_avg", "exp_avg_sq")
# What the kernels and their memory are made for.
_EQUAL = (
    "env_id",
    "env_kwargs",
    "max_episode_steps",
    "num_envs",
    "num_steps",
    "resolved_shards",
    "device",
    "network",
    "hidden_sizes",
    "activation",
    "weights",
    "baseline",
)


def why_not(config: Config, envs: Any, policy: Policy, *, runs: int = 1) -> str | None:
    """Why whole iterations are not played by these kernels, in words; None if they are.

    Args:
        config: of a run.
        envs: its environments.
        policy: on its device.
        runs: how many like it go on at once.
    """
    reason = tensor.why_no_kernels(envs, policy) or shapes.why_not(policy)
    if reason is not None:
        return reason
    # With these weights are no generalized advantages, and nothing follows a truncation.
    if config.baseline not in ("none", *_BY_AGE):
        return f"the baseline is {config.baseline}"
    if config.normalize:
        return "the weights are normalized"
    groups = runs * config.resolved_shards
    if groups > _MOST_GROUPS:
        return f"{groups:,} shards of all runs are more than {_MOST_GROUPS:,}"
    shape = shapes.shape_of(policy)
    memory = _memory_of(config, envs, shape, runs, torch.device("meta"))
    need = sum(each.nbytes for each in memory)
    free = graphs.room(policy.device)
    if 2 * need > free:
        return (
            f"the longest iteration takes {in_words(need)}, more than half of the"
            f" {in_words(free)} that are free; lower --num-envs (or --num-steps)"
        )
    return None


def why_not_together(configs: Sequence[Config]) -> str | None:
    """Why runs that `why_not` has nothing against are not played at once; None if they are.

    They may differ in seed, step size, discount, entropy bonus, clipping, reduction, and whatever
    no kernel asks for.

    Example:
        >>> why_not_together([Config(num_envs=8), Config(num_envs=8, gamma=0.9, seed=2)]) is None
        True
        >>> why_not_together([Config(num_envs=8), Config(num_envs=16)])
        'they differ in --num-envs: 8 and 16'
    """
    first = configs[0]
    for other in configs[1:]:
        for name in _EQUAL:
            one, two = getattr(first, name), getattr(other, name)
            if one != two:
                return f"they differ in {flag(name.removeprefix('resolved_'))}: {one} and {two}"
    return None


@dataclass(slots=True)
class _Origin:
    """What a run would have been at when nothing was launched.

    iteration: of its `Stream`.
    steps:     of its Adam.
    lr:        its step size.
    """

    iteration: int
    steps: int
    lr: float


class Fused:
    """Iterations of R runs at once, each bit for bit what it is alone.

    Iterations are numbered from 0 on as they are launched, for all runs together, whatever they
    are loaded with.

    Args:
        configs: of the runs; `why_not_together` has nothing against them.
        envs: those of one of them, which themselves are left as they were.
        policy: of one of them, on their device; only its kind is taken.
    """

    @torch.inference_mode(False)
    def __init__(self, configs: Sequence[Config], envs: TensorVectorEnv, policy: Policy) -> None:
        self.launched = 0
        self.run = 0  # where it is asked as the ring of a single one
        self._configs, self._envs, self._device = configs, envs, policy.device
        self._shape = shapes.shape_of(policy)
        parameters = shapes.in_a_row(policy)
        self._shapes = [each.shape for each in parameters]
        self._places = {
            name: _place_of(each, parameters) for name, each in policy.named_parameters()
        }
        self._adam = Adam([])
        self._memory = _memory_of(configs[0], envs, self._shape, len(configs), self._device)
        self._write_settings(policy)
        memory = self._memory
        self._slots = len(memory.keys)
        self._ahead = min(_AHEAD, self._slots // _FEWEST_SLOTS)
        # What the host has of the rings.
        self._keys, self._scalars, self._entries, self._stamps = (
            torch.zeros(each.shape, dtype=each.dtype, pin_memory=True)
            for each in (memory.keys, memory.scalars, memory.entries, memory.stamps)
        )
        self._sent = _event()  # until then what was written last is left alone
        self._done = [_event() for _ in range(self._slots)]
        self._arrived = _event()
        self._reading: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._origins: list[_Origin | None] = [None] * len(configs)
        self._written = 0  # iterations whose keys and scalars were sent
        self._released = 0
        # What comes of a first call, of parameters that are all 0, is for nobody.
        self._play = graphs.capture(self._iteration, self._device, "whole iterations")
        memory.at.zero_()

    def __str__(self) -> str:
        graph = "one CUDA graph" if self._play != self._iteration else "kernels"
        runs = len(self._configs)
        return f"whole iterations in {graph}" + (f", {runs} runs at once" if runs > 1 else "")

    @property
    def room(self) -> int:
        """How many iterations may be launched before some have to be released."""
        return self._slots - 1 - (self.launched - self._released)

    @torch.no_grad()
    def load(self, run: int, policy: Policy, optimizer: Adam, iteration: int) -> None:
        """Have a run's next iteration, number `launched`, begin with this state.

        What its last one left is lost. The host does not wait.

        Args:
            run: its place in `configs`.
            policy: the parameters are copied.
            optimizer: of them; its averages are copied, its step count and step size noted.
            iteration: how many the run has made: the next one's in its `Stream`.

        Raises:
            ValueError: an Adam with other betas or eps than its defaults.
        """
        own = self._adam
        if (optimizer.betas, optimizer.eps) != (own.betas, own.eps):
            raise ValueError(
                f"optimizer: expected betas {own.betas} and eps {own.eps}, got {optimizer.betas}"
                f" and {optimizer.eps}; make one with these"
            )
        parameters, found = shapes.in_a_row(policy), optimizer.state_dict()["state"]
        places = [_place_of(each, optimizer.parameters) for each in parameters]
        averages = [
            found[place][name] if found else torch.zeros_like(optimizer.parameters[place])
            for name in _AVERAGES
            for place in places
        ]
        numbers = torch.cat([each.flatten() for each in (*parameters, *averages)])
        at = self.launched
        state = self._memory.states[at % self._slots, run, :, : self._shape.size]
        state.copy_(numbers.view_as(state))
        steps = int(found[0]["step"]) if found else 0
        self._origins[run] = _Origin(iteration - at, steps - at, optimizer.lr)
        self._written = at

    def iterate(self) -> None:
        """Launch one iteration of every run.

        Every few iterations the host waits until the device has begun the last few before.

        Raises:
            RuntimeError: there is no room.
            ValueError: a run was not loaded.
        """
        if self.room < 1:
            raise RuntimeError(
                f"room: expected at least 1, got 0; release some of {self._slots - 1} iterations"
            )
        if self._written == self.launched:
            self._write_ahead()
        self._play()
        self._done[self.launched % self._slots].record(torch.cuda.current_stream(self._device))
        self.launched += 1

    def read(self, first: int, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """What iterations came to. The host waits until they are done, and for no later ones.

        Args:
            first: the number of the first; it was not released.
            count: how many; all were launched.

        Returns:
            (count, R, len(Entry)) and (count, R, len(Stamp)), the caller's own.
        """
        self._check(first, self.launched - 1)
        self._check(first + count - 1, self.launched - 1)
        memory, slots = self._memory, np.arange(first, first + count) % self._slots
        with torch.cuda.stream(self._reading):
            self._reading.wait_event(self._done[slots[-1]])
            for span in _spans(slots):
                self._entries[span].copy_(memory.entries[span], non_blocking=True)
                self._stamps[span].copy_(memory.stamps[span], non_blocking=True)
            self._arrived.record(self._reading)
        self._arrived.synchronize()
        return self._entries.numpy()[slots], self._stamps.numpy()[slots]

    def acted(self, run: int, number: int) -> dict[str, Tensor]:
        """A copy of the parameters with which an iteration acts, as `policy.state_dict()` has them.

        The host does not wait.

        Args:
            run: its place in `configs`.
            number: of the iteration, not released; `launched` is the next.
        """
        self._check(number, self.launched)
        row = self._memory.states[number % self._slots, run, 0, : self._shape.size].clone()
        numbers = self._split(row)
        return {name: numbers[place] for name, place in self._places.items()}

    @torch.no_grad()
    def restore(self, run: int, number: int, policy: Policy, optimizer: Adam) -> None:
        """Bring them to what an iteration left: the same bits, and the step count. No host waits.

        Args:
            run: its place in `configs`.
            number: of the iteration, since the run was loaded; not released, but for the last that
                was. One less than the first gives what was loaded.
            policy: gets the parameters.
            optimizer: of them; its step size stays.
        """
        self._check(number + 1, self.launched)
        left = self._memory.states[(number + 1) % self._slots, run, :, : self._shape.size]
        own, means, squares = map(self._split, left)
        parameters = shapes.in_a_row(policy)
        torch._foreach_copy_(parameters, own)
        places = [_place_of(each, parameters) for each in optimizer.parameters]
        optimizer.resume(
            self._origin(run).steps + number + 1,
            [means[place] for place in places],
            [squares[place] for place in places],
        )

    def release(self, number: int) -> None:
        """Iterations up to this one are not needed any more, but for what it left."""
        self._released = max(self._released, number + 1)

    # -- Memory ----------------------------------------------------------------------------------

    def _write_settings(self, policy: Policy) -> None:
        memory, distribution = self._memory, policy.distribution
        divisors = {"episode": self._envs.num_envs, "step": 0, "sum": 1}
        settings = [
            (
                config.gamma,
                config.ent_coef,
                math.inf if config.max_grad_norm is None else config.max_grad_norm,
                divisors[config.reduction],
            )
            for config in self._configs
        ]
        memory.settings.copy_(torch.tensor(settings, dtype=torch.float64))
        if isinstance(distribution, DiagonalGaussian):
            bounds = distribution.low.flatten(), distribution.high.flatten()
            memory.bounds.copy_(torch.stack(bounds))

    def _write_ahead(self) -> None:
        """Send keys and scalars of the next iterations, up to the end of a block of the ring."""
        first, num_envs = self.launched, self._envs.num_envs
        following = (first // self._ahead + 1) * self._ahead
        # The copies before, and with them all that was launched before these. Without this a ring
        # full of long iterations would be under way, and a signal or a log line had to wait for it.
        self._sent.synchronize()
        beta1, beta2 = self._adam.betas
        for number in range(first, following):
            at = number % self._slots
            for run, config in enumerate(self._configs):
                origin = self._origin(run)
                stream = Stream(config.seed, origin.iteration + number, 0, num_envs)
                self._keys.numpy()[at, run] = stream.device_key()
                t = origin.steps + number + 1
                self._scalars.numpy()[at, run, Scalar.STEP_SIZE] = origin.lr / (1 - beta1**t)
                self._scalars.numpy()[at, run, Scalar.ROOT] = (1 - beta2**t) ** 0.5
        (span,) = _spans(np.arange(first, following) % self._slots)
        self._memory.keys[span].copy_(self._keys[span], non_blocking=True)
        self._memory.scalars[span].copy_(self._scalars[span], non_blocking=True)
        self._sent.record(torch.cuda.current_stream(self._device))
        self._written = following

    def _origin(self, run: int) -> _Origin:
        origin = self._origins[run]
        if origin is None:
            raise ValueError(f"run: expected one that was loaded, got {run}; load it")
        return origin

    def _check(self, number: int, last: int) -> None:
        if not self._released <= number <= last:
            raise ValueError(
                f"number: expected that of an iteration from {self._released}, the first that was"
                f" not released, to {last}, got {number}"
            )

    def _split(self, row: Tensor) -> list[Tensor]:
        """Views of numbers in a row, of each parameter those that are its."""
        split = torch.split(row, self._shape.sizes)
        return [each.view(shape) for each, shape in zip(split, self._shapes, strict=True)]

    # -- What is done on the device --------------------------------------------------------------

    def _iteration(self) -> None:
        from vecpg.advantage import cuda as by_age
        from vecpg.fused import cuda
        from vecpg.policy.cuda import gradient
        from vecpg.rollout.cuda import persistent

        config, envs, memory = self._configs[0], self._envs, self._memory
        num_steps, limit = _limits_of(config, envs)
        persistent.play(
            memory,
            envs.definition,
            envs.dynamics.num_variables,
            self._shape,
            num_steps=num_steps,
            max_episode_steps=limit,
            full_return=config.weights == "full_return",
        )
        if config.baseline in _BY_AGE:
            by_age.subtract_mean_of_runs(
                memory.weights,
                by_age.Found(memory.starts, memory.stops, memory.numbers, memory.longest),
                limit,
                others=config.baseline == "leave_one_out",
                shards=config.resolved_shards,
                at=memory.at,
                stamps=memory.stamps[..., Stamp.RETURNS],
            )
        gradient.sum_gradient(memory, self._shape)
        cuda.step(memory, self._shape, self._adam.betas, self._adam.eps)


def _event() -> Any:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _place_of(tensor: Tensor, among: Sequence[Tensor]) -> int:
    return next(place for place, each in enumerate(among) if each is tensor)


def _spans(places: NDArray[np.int64]) -> list[slice]:
    """Places in a ring that follow each other, as ranges of it."""
    ends = np.flatnonzero(np.diff(places) < 0) + 1
    return [slice(int(own[0]), int(own[-1]) + 1) for own in np.split(places, ends)]


def _limits_of(config: Config, envs: TensorVectorEnv) -> tuple[int, int]:
    """The start window and the time limit. What no environment lives to see is no limit."""
    return min(config.num_steps, 2**31 - 1), min(envs.max_episode_steps, 2**31 - 1)


def _memory_of(
    config: Config, envs: TensorVectorEnv, shape: Shape, runs: int, device: torch.device
) -> Memory:
    from vecpg.policy.cuda import gradient

    num_steps, limit = _limits_of(config, envs)
    make = functools.partial(
        make_memory,
        shape,
        runs=runs,
        num_envs=config.num_envs,
        shards=config.resolved_shards,
        num_steps=num_steps,
        max_episode_steps=limit,
    )
    one = make(slots=1, parts=1, device=torch.device("meta"))
    blocks = one.last.shape[1] // config.resolved_shards
    rings = one.keys, one.scalars, one.states, one.entries, one.stamps
    fitting = _MOST_BYTES // sum(each.nbytes for each in rings)
    slots = min(_MOST_SLOTS, max(_FEWEST_SLOTS, fitting))
    return make(
        slots=2 ** (slots.bit_length() - 1),
        parts=gradient.num_parts(one.flags.shape[1], blocks),
        device=device,
    )
