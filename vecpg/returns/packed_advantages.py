"""Generalized advantages of packed sequences."""

from torch import Tensor

from vecpg.returns.advantages import generalized_advantage
from vecpg.returns.backend import is_served
from vecpg.returns.checks import (
    check_gamma,
    check_packed,
    check_rewards,
    check_values,
    has_derivatives,
)
from vecpg.returns.packed import Lengthened, ends_of, packed_advantages


def packed_generalized_advantage(
    rewards: Tensor,
    values: Tensor,
    offsets: Tensor,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    *,
    final_values: Tensor | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "cut",
    backend: str = "auto",
) -> Tensor:
    """Generalized advantages of sequences that lie one after the other.

        A[t] = delta[t] + gamma[t] * lambda[t] * A[t + 1],   offsets[i] <= t < offsets[i + 1],
                                                             A[offsets[i + 1]] = 0
        delta[t] = r[t] + gamma[t] * V[t + 1] - V[t],        V[offsets[i + 1]] = final_values[i]

    Each sequence gets what `generalized_advantage` gives it alone, with its final value as
    `last_values`. With lambda = 1, A + V is `packed_reward_to_go`.

    Args:
        rewards: (total,) float32, float64, bfloat16 or float16, any stride.
        values: (total,), dtype of `rewards`. V(s) of the state each action was taken in.
        offsets: (B + 1,), as in `packed_reward_to_go`.
        gamma: as in `packed_reward_to_go`.
        gae_lambda: in [0, 1]: a float, or a float tensor (total,).
        final_values: (B,), dtype of `rewards`. V after each sequence's last step: what bootstraps
            a sequence that was cut short. 0 if not given.
        mask: (total,), as in `generalized_advantage`.
        mask_mode: as in `generalized_advantage`.
        backend: as in `reward_to_go`.

    Returns:
        (total,), dtype and device of `rewards`; differentiable in everything but the flags.

    Raises:
        TypeError: as `packed_reward_to_go`.
        ValueError: as `packed_reward_to_go`.
        RuntimeError: as `packed_reward_to_go`.

    Numerics and source: as `generalized_advantage`.

    Example:
        >>> import torch
        >>> rewards, values = torch.ones(3), torch.zeros(3)
        >>> packed_generalized_advantage(rewards, values, torch.tensor([0, 2, 3]), 0.5, 1.0)
        tensor([1.5000, 1.0000, 1.0000])
    """
    check_rewards(rewards)
    check_values(values, rewards, "offsets")
    offsets, mask = check_packed(
        rewards, offsets, final_values, mask, mask_mode, "generalized_advantage"
    )
    sequences = offsets.shape[0] - 1
    scalar, gammas = check_gamma("gamma", gamma, rewards, sequences)
    scalar_lambda, lambdas = check_gamma("gae_lambda", gae_lambda, rewards, sequences)
    if (
        is_served(backend, rewards)
        and rewards.device.type == "cpu"
        and not has_derivatives(gamma, gae_lambda)
    ):
        return packed_advantages(
            *(rewards, values, offsets, scalar, gammas, scalar_lambda, lambdas, final_values),
            *(mask, mask_mode),
        )
    if mask is None:
        dones, ending = ends_of(offsets, rewards, final_values)
        return generalized_advantage(
            rewards,
            values,
            dones,
            scalar if gammas is None else gammas,
            scalar_lambda if lambdas is None else lambdas,
            final_values=ending,
            backend=backend,
        )
    longer = Lengthened(offsets, rewards.shape[0])
    after = rewards.new_zeros(sequences) if final_values is None else final_values
    # A row behind a sequence, of which the reward is the value, has the advantage 0.
    result = generalized_advantage(
        longer.put(rewards, after),
        longer.put(values, after),
        longer.dones,
        scalar if gammas is None else longer.put(gammas, 0.0),
        scalar_lambda if lambdas is None else longer.put(lambdas, 0.0),
        mask=longer.put(mask, True),
        mask_mode=mask_mode,
        backend=backend,
    )
    return result[longer.rows]
