"""The memory of whole iterations, filled as their host fills it, and what kernels leave there."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vecpg import fused
from vecpg.adam import Adam
from vecpg.config import Config
from vecpg.envs import make_envs
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.kernels.iteration import Memory, Scalar, Shape
from vecpg.noise import Stream
from vecpg.policy import Policy
from vecpg.policy.shape import in_a_row, shape_of
from vecpg.rollout import Rollout
from vecpg.rollout.cuda import persistent


@dataclass(frozen=True)
class Filled:
    """Some runs before their next iteration, of which `memory` has all that the kernels read."""

    config: Config
    envs: TensorVectorEnv
    policies: list[Policy]  # of each run, on the CPU
    streams: list[Stream]
    shape: Shape
    memory: Memory

    def play(self, **options: Any) -> None:
        """Collect one iteration of all runs."""
        persistent.play(
            self.memory,
            self.envs.definition,
            self.envs.dynamics.num_variables,
            self.shape,
            num_steps=self.config.num_steps,
            max_episode_steps=self.envs.max_episode_steps,
            **options,
        )

    def fields(self, run: int = 0) -> dict[str, Tensor]:
        """As `fields_of`."""
        return fields_of(self.memory, self.shape, self.policies[run], run)

    def rollout(self, run: int = 0) -> Rollout:
        """What was collected, on the CPU, without the observations after truncations."""
        return rollout_of(self.fields(run), self.streams[run])


def fields_of(memory: Memory, shape: Shape, policy: Policy, run: int) -> dict[str, Tensor]:
    """What a rollout of a run consists of, (T, N, ...) on the CPU, and what its rows weigh.

    T is the most rows of any block. Where one has fewer, nothing counts.
    """
    last, (shards, num_envs) = (
        memory.last[run].cpu(),
        (memory.parts.shape[1], memory.flags.shape[2]),
    )
    rows = int(last.max())
    of_block = torch.arange(num_envs // shards) // memory.block
    until = torch.cat([own[of_block] for own in last.view(shards, -1)])
    real = torch.arange(rows)[:, None] < until

    def read(tensor: Tensor, *size: int) -> Tensor:
        numbers = tensor[run, :rows].cpu().view(rows, num_envs, *size)
        return numbers.where(real.view(rows, num_envs, *[1] * len(size)), 0)

    flags, actions = read(memory.flags), read(memory.actions, *policy.action_shape)
    return {
        "obs": read(memory.obs, *policy.obs_shape),
        "actions": actions if shape.gaussian else actions.long() + shape.first_action,
        "rewards": read(memory.rewards),
        "terminations": (flags & 2) != 0,
        "truncations": (flags & 4) != 0,
        "mask": (flags & 1) != 0,
        "weights": read(memory.weights),
    }


def rollout_of(fields: dict[str, Tensor], stream: Stream) -> Rollout:
    """A rollout of these, without the observations after truncations."""
    return Rollout(
        **{name: each for name, each in fields.items() if name != "weights"},
        final_obs=fields["obs"][0, :0],
        final_rows=torch.zeros(0, 2, dtype=torch.int64),
        stream=stream,
    )


def policy_of(envs: TensorVectorEnv, seed: int = 0) -> Policy:
    """One whose actions differ from one observation to the next; usually it begins without."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = Policy(envs.single_observation_space, envs.single_action_space)
    with torch.no_grad():
        policy.network[-1].weight.mul_(50)
    return policy


def filled(
    env_id: str,
    copies: int,
    window: int,
    device: str,
    streams: list[Stream],
    policies: list[Policy] | None = None,
    **settings: Any,
) -> Filled:
    """Runs of so many copies, each with the random numbers of a stream and a policy of its own.

    Args:
        policies: None: some are made.
        settings: of a `Config`.
    """
    config = Config(env_id=env_id, num_envs=copies, num_steps=window, **settings)
    envs = make_envs(
        env_id, copies, vectorization="tensor", max_episode_steps=config.max_episode_steps
    )
    policies = policies or [policy_of(envs, run) for run in range(len(streams))]
    shape = shape_of(policies[0])
    memory = fused._memory_of(config, envs, shape, len(streams), torch.device(device))
    divisor = {"episode": copies, "step": 0, "sum": 1}[config.reduction]
    norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
    numbers = torch.tensor([config.gamma, config.ent_coef, norm, divisor], dtype=torch.float64)
    memory.settings.copy_(numbers.expand(len(streams), -1))
    for run, (policy, stream) in enumerate(zip(policies, streams, strict=True)):
        memory.keys[:, run] = torch.tensor(stream.device_key())
        row = torch.cat([each.detach().flatten() for each in in_a_row(policy)])
        memory.states[0, run, 0, : shape.size] = row.to(device)
    if shape.gaussian:
        distribution = policies[0].distribution
        memory.bounds.copy_(torch.stack([distribution.low, distribution.high]).flatten(1))
    beta1, beta2 = Adam([]).betas
    memory.scalars[..., Scalar.STEP_SIZE] = config.learning_rate / (1 - beta1)
    memory.scalars[..., Scalar.ROOT] = (1 - beta2) ** 0.5
    # Nothing may be read that was not written.
    for rows in (memory.obs, memory.rewards, memory.weights, memory.parts):
        rows.fill_(math.nan)
    return Filled(config, envs, policies, streams, shape, memory)
