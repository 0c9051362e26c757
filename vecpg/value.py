"""The learned baseline V(s): predicted before the policy's step, fitted after it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from vecpg.adam import Adam
from vecpg.kernels.finite import check_parameters
from vecpg.kernels.sums import gradient_in_order, in_order
from vecpg.policy.network import Encoder, fully_connected
from vecpg.returns import reward_to_go
from vecpg.rollout.data import Rollout, when

if TYPE_CHECKING:
    from vecpg.config import Config

# Rows of one forward pass; of images fewer.
_CHUNK_ROWS = 4096


class ValueFunction(nn.Module):
    """V(s): an encoder of observations and a fully connected network with one output.

    Args:
        observation_space: as `Policy` takes them.
        hidden_sizes: widths of the hidden layers.
        activation: "tanh" or "relu".
        embedding_size: length of the learned vectors that stand for discrete observations.
        normalize_obs: shift and scale observations by their running statistics.
        network: as `Policy` takes it; its parameters are this function's own.

    Example:
        >>> value_function = ValueFunction(spaces.Box(-1, 1, (4,)))
        >>> value_function(torch.zeros(3, 4)).shape
        torch.Size([3])
    """

    # Whoever builds it while they only infer may train it later.
    @torch.inference_mode(False)
    def __init__(
        self,
        observation_space: spaces.Space[Any],
        *,
        hidden_sizes: tuple[int, ...] = (64, 64),
        activation: str = "tanh",
        embedding_size: int = 8,
        normalize_obs: bool = False,
        network: str = "auto",
    ) -> None:
        super().__init__()
        self.encoder = Encoder(observation_space, embedding_size, normalize_obs, network)
        self.network = fully_connected(
            self.encoder.features, hidden_sizes, 1, activation, last_gain=1.0
        )

    def forward(self, obs: Tensor) -> Tensor:
        """(B, *obs_shape) to (B,) float32."""
        values: Tensor = self.network(self.encoder(obs))[:, 0]
        return values


class Critic:
    """A value function with its own optimizer (Adam)."""

    def __init__(self, value_function: ValueFunction, learning_rate: float) -> None:
        self.value_function = value_function
        self.optimizer = Adam(value_function.parameters(), learning_rate)

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.value_function.load_state_dict(content["parameters"])
        self.optimizer.load_state_dict(content["optimizer"])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "parameters": dict(self.value_function.state_dict()),
            "optimizer": self.optimizer.state_dict(),
        }


@torch.no_grad()
def predict(
    critic: Critic | None, rollout: Rollout, shards: int = 1
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """V of every observation, (T, N) and 0 where masked, and of every final one, (K,).

    None and None without a critic. The bits of a matrix product depend on its shape, so the rows of
    each shard go through the network by themselves.
    """
    if critic is None:
        return None, None
    values, final_values = [], []
    parts = rollout.shards(shards)
    for shard in parts:
        own = torch.zeros_like(shard.rewards)
        own[shard.mask] = _in_chunks(critic.value_function, shard.obs, _counted(shard))
        values.append(own)
        final = torch.arange(len(shard.final_obs), device=own.device)
        final_values.append(_in_chunks(critic.value_function, shard.final_obs, (final,)))
    return rollout.join(values), rollout.join_final(final_values)


@torch.inference_mode(False)
@torch.enable_grad()
def fit(
    critic: Critic | None, rollout: Rollout, final_values: Tensor | None, config: "Config"
) -> Tensor | None:
    """Fit V to the rewards-to-go of a rollout, by `config.value_steps` steps over all of its rows.

        loss = mean over counted rows of (V(s_t) - G_t)^2

    G_t is `reward_to_go`; with `config.bootstrap_truncations` it goes on with V(final_obs) where a
    limit cut the episode. To be called after the gradient step that used V: a baseline may not have
    seen the returns that it is subtracted from. Loss and gradient are formed for every shard and
    added in shard order. Whether gradients are on where this is called makes no difference.

    Args:
        critic: is changed; without one nothing happens.
        rollout: T steps of N environments.
        final_values: as `predict` gave them.
        config: `gamma`, `bootstrap_truncations`, `value_steps` and `resolved_shards` are read.

    Returns:
        the loss before the first step, without dimensions; None without a critic.

    Raises:
        FloatingPointError: the loss is not finite, or a parameter after a step.

    Source: Sutton & Barto (2018), section 13.4; the number of steps is Spinning Up's.
    """
    if critic is None:
        return None
    shards = rollout.shards(config.resolved_shards)
    continued: list[Tensor | None] = [None] * len(shards)
    if config.bootstrap_truncations and final_values is not None:
        continued = [*rollout.split(rollout.values_at_truncations(final_values), shards)]
    examples = [_examples(*pair, config.gamma) for pair in zip(shards, continued, strict=True)]
    rows = sum(len(targets) for _, targets in examples)
    value_function, optimizer = critic.value_function, critic.optimizer

    def differentiate(shard: int) -> Tensor:
        at, targets = examples[shard]
        return _add_gradient(value_function, shards[shard].obs, at, targets, rows)

    before = None
    try:
        for _ in range(config.value_steps):
            total = in_order(gradient_in_order(value_function, differentiate, len(shards)))
            if not bool(total.isfinite()):
                raise FloatingPointError(f"the loss is {total.item()}")
            optimizer.step()
            before = total if before is None else before
        check_parameters(value_function, optimizer.averages())
    except FloatingPointError as error:
        raise FloatingPointError(
            f"fitting the value function{when(rollout)}: {error}; scale the rewards, or lower"
            f" --value-learning-rate (now {config.value_learning_rate:g})"
        ) from None
    for shard in shards:
        value_function.encoder.observe(shard.obs, shard.mask)
    return before


def _counted(rollout: Rollout) -> tuple[Tensor, ...]:
    """The t and n of every counted row."""
    return rollout.mask.nonzero().unbind(dim=1)


def _examples(
    rollout: Rollout, continued: Tensor | None, gamma: float
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The place of every counted row, and its target."""
    mask = rollout.mask
    targets = reward_to_go(rollout.rewards, rollout.dones, gamma, final_values=continued, mask=mask)
    return _counted(rollout), targets[mask]


def _add_gradient(
    value_function: ValueFunction,
    obs: Tensor,
    at: tuple[Tensor, ...],
    targets: Tensor,
    divisor: int,
) -> Tensor:
    """Add that of the sum of squared errors / `divisor` to every `.grad`, and return the sum."""
    total = torch.zeros((), dtype=torch.float64, device=obs.device)
    chunk_rows = value_function.encoder.rows_at_once(_CHUNK_ROWS)
    for rows, wanted in zip(
        _chunks(obs, at, chunk_rows), torch.split(targets, chunk_rows), strict=True
    ):
        loss = (value_function(rows) - wanted).square().sum() / divisor
        torch.autograd.backward(loss)
        total += loss.detach()
    return total


def _in_chunks(value_function: ValueFunction, obs: Tensor, at: tuple[Tensor, ...]) -> Tensor:
    chunk_rows = value_function.encoder.rows_at_once(_CHUNK_ROWS)
    return torch.cat([value_function(rows) for rows in _chunks(obs, at, chunk_rows)])


def _chunks(obs: Tensor, at: tuple[Tensor, ...], chunk_rows: int) -> Iterator[Tensor]:
    """The observations at these places, so many at a time: all of them may be large."""
    for places in zip(*(torch.split(each, chunk_rows) for each in at), strict=True):
        yield obs[places]
