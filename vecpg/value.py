"""The learned baseline V(s): predicted before the policy's step, fitted after it."""

from typing import TYPE_CHECKING, Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from vecpg.adam import Adam
from vecpg.policy.network import Encoder, fully_connected
from vecpg.returns import reward_to_go
from vecpg.rollout.data import Rollout

if TYPE_CHECKING:
    from vecpg.config import Config

# Rows of one forward pass.
_CHUNK_ROWS = 4096


class ValueFunction(nn.Module):
    """V(s): an encoder of observations and a fully connected network with one output.

    Args:
        observation_space: as `Policy` takes them.
        hidden_sizes: widths of the hidden layers.
        activation: "tanh" or "relu".
        embedding_size: length of the learned vectors that stand for discrete observations.
        normalize_obs: shift and scale observations by their running statistics.

    Example:
        >>> value_function = ValueFunction(spaces.Box(-1, 1, (4,)))
        >>> value_function(torch.zeros(3, 4)).shape
        torch.Size([3])
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        *,
        hidden_sizes: tuple[int, ...] = (64, 64),
        activation: str = "tanh",
        embedding_size: int = 8,
        normalize_obs: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(observation_space, embedding_size, normalize_obs)
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
            "parameters": self.value_function.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }


@torch.no_grad()
def predict(critic: Critic | None, rollout: Rollout) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """V of every observation, (T, N) and 0 where masked, and of every final one, (K,).

    None and None without a critic.
    """
    if critic is None:
        return None, None
    mask = rollout.mask
    values = torch.zeros(mask.shape, device=mask.device)
    values[mask] = _in_chunks(critic.value_function, rollout.obs[mask])
    return values, _in_chunks(critic.value_function, rollout.final_obs)


def fit(
    critic: Critic | None, rollout: Rollout, final_values: Tensor | None, config: "Config"
) -> Tensor | None:
    """Fit V to the rewards-to-go of a rollout, by `config.value_steps` steps over all of its rows.

        loss = mean over counted rows of (V(s_t) - G_t)^2

    G_t is `reward_to_go`; with `config.bootstrap_truncations` it goes on with V(final_obs) where a
    limit cut the episode. To be called after the gradient step that used V: a baseline may not have
    seen the returns that it is subtracted from.

    Args:
        critic: is changed; without one nothing happens.
        rollout: T steps of N environments.
        final_values: as `predict` gave them.
        config: `gamma`, `bootstrap_truncations` and `value_steps` are read.

    Returns:
        the loss before the first step, without dimensions; None without a critic.

    Raises:
        FloatingPointError: the loss is not finite.

    Source: Sutton & Barto (2018), section 13.4; the number of steps is Spinning Up's.
    """
    if critic is None:
        return None
    mask = rollout.mask
    continued = None
    if config.bootstrap_truncations and final_values is not None:
        continued = rollout.values_at_truncations(final_values)
    targets = reward_to_go(
        rollout.rewards, rollout.dones, config.gamma, final_values=continued, mask=mask
    )[mask]
    obs = rollout.obs[mask]
    value_function, optimizer = critic.value_function, critic.optimizer
    before = None
    for _ in range(config.value_steps):
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=obs.device)
        for rows, wanted in zip(
            torch.split(obs, _CHUNK_ROWS), torch.split(targets, _CHUNK_ROWS), strict=True
        ):
            loss = (value_function(rows) - wanted).square().sum() / len(targets)
            torch.autograd.backward(loss)
            total += loss.detach()
        if not bool(total.isfinite()):
            raise FloatingPointError(
                f"the loss of the value function is {total.item()}: the rewards are too large"
                " (scale them), or so is --value-learning-rate"
            )
        optimizer.step()
        before = total if before is None else before
    value_function.encoder.observe(rollout.obs, mask)
    return before


def _in_chunks(value_function: ValueFunction, obs: Tensor) -> Tensor:
    return torch.cat([value_function(rows) for rows in torch.split(obs, _CHUNK_ROWS)])
