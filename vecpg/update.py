"""One gradient step over a whole rollout, a few rows at a time, so that memory stays flat."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from vecpg.adam import Adam
from vecpg.kernels import threads
from vecpg.noise import Purpose
from vecpg.policy import Policy
from vecpg.policy import cpu as policy_cpu
from vecpg.rollout.data import Rollout

if TYPE_CHECKING:
    from vecpg.config import Config

# Rows of one forward and backward pass. Measured on two cores: 2048 to 8192 are equally fast, and
# at 4096 the activations of a 64-wide network stay in the cache.
CHUNK_ROWS = 4096
# Rows that one thread differentiates before it takes others; and into how many such slabs a rollout
# is divided at most, and what their gradients, of which each has one, hold together.
_SLAB_ROWS = 4096
_MOST_SLABS = 64
_MOST_NUMBERS = 2**22
# Random numbers that choose what one pass drops: drawing each takes some 100 bytes.
_MOST_DROPOUT = 2**19


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What an update did, as tensors without dimensions on the policy's device.

    policy_loss: the surrogate whose gradient was followed; its value means nothing by itself.
    entropy:     mean over counted rows, in nats, before the step.
    grad_norm:   length of the gradient before any clipping.
    """

    policy_loss: Tensor
    entropy: Tensor
    grad_norm: Tensor


def update(
    policy: Policy,
    optimizer: Adam | torch.optim.Optimizer,
    rollout: Rollout,
    advantages: Tensor,
    config: "Config",
) -> UpdateStats:
    """One step along the policy gradient estimate of a rollout.

        loss = -(sum of log pi(a_t|s_t) * advantages[t, n] over counted rows) / D
               - ent_coef * (mean entropy over counted rows)

    D is num_envs, the number of counted rows, or 1, by `config.reduction` "episode", "step" or
    "sum". Masked rows are never looked at. Running statistics of observations, where the policy
    normalizes, take the counted rows in after the step: until then they are those that acted.

    Args:
        policy: its gradients are overwritten and left in place.
        optimizer: over the policy's parameters.
        rollout: T steps of N environments, collected by this policy.
        advantages: (T, N) float32.
        config: `reduction`, `ent_coef` and `max_grad_norm` are read.

    Returns:
        `UpdateStats`.

    Raises:
        FloatingPointError: the gradient is not finite; nothing was changed.
    """
    count = rollout.mask.sum().clamp(min=1)
    divisors: dict[str, Tensor | int] = {
        "episode": rollout.mask.shape[1],
        "step": count,
        "sum": 1,
    }
    divisor = divisors[config.reduction]
    differentiate = by_autograd if policy_cpu.why_not(policy) else by_machine_code
    optimizer.zero_grad(set_to_none=True)
    surrogate, entropy = differentiate(
        policy, rollout, advantages, divisor, config.ent_coef / count
    )

    grad_norm = nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
    if not bool(grad_norm.isfinite()):
        raise FloatingPointError(
            f"the gradient's norm is {grad_norm.item()}, and the policy was left as it was: the"
            " rewards are too large (scale them, or --normalize), or the observations"
            " (--normalize-obs), or --learning-rate"
        )
    if config.max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(policy.parameters(), config.max_grad_norm, grad_norm)
    optimizer.step()
    policy.observe(rollout.obs, rollout.mask)
    return UpdateStats(surrogate, entropy / count, grad_norm)


def by_autograd(
    policy: Policy,
    rollout: Rollout,
    advantages: Tensor,
    divisor: Tensor | int,
    ent_coef: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """The gradient of the sum over counted rows of -log pi * advantage / divisor - ent_coef * H.

    H is the entropy. Any policy, any device.

    Args:
        policy: gets the gradient.
        rollout: T steps of N environments.
        advantages: (T, N) float32.
        divisor: of the sum.
        ent_coef: what one row's entropy is worth.

    Returns:
        the first part of the sum, and the summed entropy, float64 without dimensions.
    """
    rows = rollout.mask.numel()
    mask = rollout.mask.reshape(rows)
    obs = rollout.obs.reshape(rows, *policy.obs_shape)
    actions = rollout.actions.reshape(rows, *policy.action_shape)
    weights = advantages.reshape(rows)
    surrogate_sum = torch.zeros((), dtype=torch.float64, device=obs.device)
    entropy_sum = torch.zeros_like(surrogate_sum)
    chunk_rows = CHUNK_ROWS
    if policy.dropout_units:
        chunk_rows = max(1, min(CHUNK_ROWS, _MOST_DROPOUT // policy.dropout_units))
    for start in range(0, rows, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        counted = mask[chunk]
        dropout = None
        if policy.dropout_units:
            index = start + counted.nonzero()[:, 0]
            dropout = _dropout(policy, rollout, index)
        log_probs, entropies = policy.log_probs_and_entropy(
            obs[chunk][counted], actions[chunk][counted], dropout
        )
        surrogate = -(log_probs * weights[chunk][counted]).sum() / divisor
        entropy = entropies.sum()
        torch.autograd.backward(surrogate - ent_coef * entropy)
        surrogate_sum += surrogate.detach()
        entropy_sum += entropy.detach()
    return surrogate_sum, entropy_sum


def _dropout(policy: Policy, rollout: Rollout, index: Tensor) -> Tensor:
    """The numbers that chose, when these rows were collected, what was dropped."""
    if rollout.stream is None:
        raise ValueError(
            "rollout.stream: expected the Stream that fixed what was dropped, got None; pass a"
            " rollout as `collect` made it"
        )
    num_envs = rollout.mask.shape[1]
    return rollout.stream.uniforms_at(
        index // num_envs, index % num_envs, Purpose.DROPOUT, policy.dropout_units
    )


def by_machine_code(
    policy: Policy,
    rollout: Rollout,
    advantages: Tensor,
    divisor: Tensor | int,
    ent_coef: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """As `by_autograd`, in machine code: policies that `mlp` serves, on the CPU.

    Raises:
        ValueError: observations or actions that are not of the policy's spaces.
    """
    rows = rollout.mask.numel()
    if rollout.obs.shape[2:] != policy.obs_shape:
        raise ValueError(
            f"rollout.obs: expected (T, N, *{policy.obs_shape}), got {tuple(rollout.obs.shape)};"
            " collect it with this policy"
        )
    network, first_action = policy_cpu.network_of(policy), policy_cpu.first_action_of(policy)
    obs = rollout.obs.reshape(rows, -1).numpy()
    actions, mask = rollout.actions.reshape(rows).numpy(), rollout.mask.reshape(rows).numpy()
    weights = advantages.detach().reshape(rows).numpy()
    # As many slabs for any number of threads: their sums are added in their order.
    numbers = len(network.forwards)
    most_slabs = max(1, min(_MOST_SLABS, _MOST_NUMBERS // numbers))
    size = max(_SLAB_ROWS, -(-rows // most_slabs))
    starts = range(0, rows, size)
    gradients = np.zeros((len(starts), numbers))
    scale, bonus = 1.0 / float(divisor), float(ent_coef)

    def differentiate(slab: int) -> tuple[float, float, bool]:
        chunk = slice(starts[slab], starts[slab] + size)
        sums: tuple[float, float, bool] = policy_cpu.sum_gradient(
            obs[chunk],
            actions[chunk],
            weights[chunk],
            mask[chunk],
            first_action,
            scale,
            bonus,
            network,
            gradients[slab],
        )
        return sums

    surrogates, entropies, known = zip(*threads.run(differentiate, len(starts)), strict=True)
    if not all(known):
        taken = rollout.actions[rollout.mask]
        last_action = first_action + policy.distribution.num_parameters - 1
        raise ValueError(
            f"rollout.actions: expected {first_action} to {last_action} where counted, got"
            f" {int(taken.min())} to {int(taken.max())}; collect it with this policy"
        )
    policy_cpu.set_gradients(policy, gradients.sum(axis=0))
    sums = torch.tensor([sum(surrogates), sum(entropies)], dtype=torch.float64)
    return sums[0], sums[1]
