"""Whole iterations on a GPU: {rollout, returns, baseline, gradient, Adam} as one CUDA graph.

The host launches an iteration after the other and waits for none. What an iteration began with and
what it came to lie in a ring, from which the host reads when it likes, and takes up the state after
any iteration that it has not released: those that it launched beyond are as if they had not been.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vecpg.adam import Adam
from vecpg.config import Config, flag
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.fused.memory import Memory, Scalar, Stamp, make_memory
from vecpg.kernels import graphs
from vecpg.memory import in_words
from vecpg.noise import Stream
from vecpg.policy import Policy
from vecpg.policy import shape as shapes
from vecpg.rollout import tensor
from vecpg.value import Critic

# Bytes that the rings may hold, of as many slots as fit between these two, powers of 2.
_MOST_BYTES, _FEWEST_SLOTS, _MOST_SLOTS = 2**28, 4, 256
# Of how many iterations keys and scalars are written together.
_AHEAD = 8
# Parts of a shard's rows, of which each has a gradient: enough programs, and few to add in the end.
_FEWEST_PARTS, _MOST_PARTS = 16, 256

_BY_AGE = ("timestep_mean", "leave_one_out")
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


def why_not(
    config: Config, envs: Any, policy: Policy, critic: Critic | None, *, runs: int = 1
) -> str | None:
    """Why whole iterations are not played by these kernels, in words; None if they are.

    Args:
        config: of a run.
        envs: its environments.
        policy: on its device.
        critic: V; None without a learned baseline.
        runs: how many like it go on at once.
    """
    reason = tensor.why_no_kernels(envs, policy) or shapes.why_not(policy)
    if reason is not None:
        return reason
    if critic is not None or config.baseline not in ("none", *_BY_AGE):
        return f"the baseline is {config.baseline}"
    if config.weights not in ("reward_to_go", "full_return"):
        return f"the weights are {config.weights}"
    if config.bootstrap_truncations:
        return "truncated episodes are continued"
    if config.normalize:
        return "the weights are normalized"
    shape = shapes.shape_of(policy)
    memory = _make_memory(config, envs, shape, runs, torch.device("meta"))
    need = sum(each.nbytes for each in memory)
    free = torch.cuda.mem_get_info(policy.device)[0]
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
    were loaded with.

    Args:
        configs: of the runs; `why_not_together` has nothing against them.
        envs: those of one of them, which themselves are left as they were.
        policy: of one of them, on their device; only its kind is taken.
    """

    @torch.inference_mode(False)
    def __init__(self, configs: Sequence[Config], envs: TensorVectorEnv, policy: Policy) -> None:
        self.launched = 0
        self._configs, self._envs, self._device = configs, envs, policy.device
        self._shape = shapes.shape_of(policy)
        self._betas, self._eps = Adam([]).betas, Adam([]).eps
        config, runs = configs[0], len(configs)
        self._memory = _make_memory(config, envs, self._shape, runs, self._device)
        self._write_settings(policy)
        # Of every place in the ring what the host writes, or has read; and until when it is busy.
        memory = self._memory
        self._slots = len(memory.keys)
        self._ahead = min(_AHEAD, self._slots // _FEWEST_SLOTS)
        self._keys, self._scalars, self._entries, self._stamps = (
            torch.zeros(each.shape, dtype=each.dtype, pin_memory=True)
            for each in (memory.keys, memory.scalars, memory.entries, memory.stamps)
        )
        self._sent = [_event() for _ in range(self._slots // self._ahead)]
        self._done = [_event() for _ in range(self._slots)]
        self._arrived = _event()
        self._reading: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._origins: list[_Origin | None] = [None] * runs
        self._written = 0  # iterations whose keys and scalars are on the device
        self._released = 0
        # In a recorder's first call parameters are 0, and what comes of it is for nobody.
        self._play = graphs.capture(self._iteration, self._device, "whole iterations")
        self.graph = self._play != self._iteration
        memory.at.zero_()

    def __str__(self) -> str:
        way = "whole iterations in one CUDA graph" if self.graph else "whole iterations in kernels"
        runs = len(self._configs)
        return way if runs == 1 else f"{way}, {runs} runs at once"

    @property
    def room(self) -> int:
        """How many iterations may be launched before some have to be released."""
        return self._slots - 1 - (self.launched - self._released)

    def load(self, run: int, policy: Policy, optimizer: Adam, iteration: int) -> None:
        """Have a run's next iteration, number `launched`, begin with this state.

        What it came to before in that place of the ring is lost. The host does not wait.

        Args:
            run: its place in `configs`.
            policy: the parameters are copied.
            optimizer: of them; its averages are copied, its step count and step size noted.
            iteration: how many the run has made: the next one's number in its `Stream`.

        Raises:
            ValueError: an Adam with other betas or eps than its defaults.
        """
        raise NotImplementedError

    def iterate(self) -> None:
        """Launch one iteration of every run. The host does not wait.

        Raises:
            RuntimeError: there is no room, or a run was not loaded.
        """
        raise NotImplementedError

    def read(self, first: int, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """What iterations came to. The host waits until they are done, and for no later ones.

        Args:
            first: the number of the first; it was not released.
            count: how many; all were launched.

        Returns:
            (count, R, len(Entry)) and (count, R, len(Stamp)), the caller's own.
        """
        raise NotImplementedError

    def phases(self, stamps: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Seconds that phases took: "collect", "returns" and "update", each of (...,).

        Args:
            stamps: (..., len(Stamp)), as `read` gives them.
        """
        raise NotImplementedError

    def acted(self, run: int, number: int) -> dict[str, Tensor]:
        """A copy of the parameters with which an iteration acted, as `policy.state_dict()`.

        Args:
            run: its place in `configs`.
            number: of the iteration; it was not released. It need not have been launched: the next
                one's is what the last one left.
        """
        raise NotImplementedError

    def restore(self, run: int, number: int, policy: Policy, optimizer: Adam) -> None:
        """Bring them to what an iteration left: the same bits, and Adam's step count.

        Args:
            run: its place in `configs`.
            number: of the iteration; it was not released, or was the last one that was. Before any
                was launched -1 is what was loaded.
            policy: gets the parameters.
            optimizer: of them; its step size stays.
        """
        raise NotImplementedError

    def release(self, number: int) -> None:
        """Iterations up to this one are not needed any more, but for what the last of them left."""
        raise NotImplementedError

    def _write_settings(self, policy: Policy) -> None:
        raise NotImplementedError

    def _iteration(self) -> None:
        raise NotImplementedError


def _event() -> Any:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _make_memory(
    config: Config, envs: TensorVectorEnv, shape: shapes.Shape, runs: int, device: torch.device
) -> Memory:
    raise NotImplementedError
