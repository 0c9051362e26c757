"""The learned baseline V(s): predicted before the policy's step, fitted after it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from vecpg.adam import Adam
from vecpg.kernels.finite import check_parameters, finite
from vecpg.kernels.gathered import Gradient, rows_at_once
from vecpg.kernels.sums import Combine, Whole, gradient_in_order, here, in_order
from vecpg.policy.network import Encoder, fully_connected
from vecpg.returns import reward_to_go
from vecpg.rollout.data import Rollout, when

if TYPE_CHECKING:
    from vecpg.config import Config

# Rows of one forward pass on the CPU; of images fewer.
_CHUNK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class FitStats:
    """What fitting V did, as tensors without dimensions on its device.

    value_loss: before the first step.
    finite:     bool, whether all losses, all parameters after the last step and what the optimizer
                keeps are finite; None where that was looked at, and they are.
    """

    value_loss: Tensor
    finite: Tensor | None = None


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

    def chunk_rows(self, device: torch.device) -> int:
        """How many rows go through together, forwards and backwards."""
        most = _CHUNK_ROWS if device.type == "cpu" else rows_at_once(self.network)
        return self.encoder.rows_at_once(most)


class Critic:
    """A value function with its own optimizer (Adam)."""

    def __init__(self, value_function: ValueFunction, learning_rate: float) -> None:
        self.value_function = value_function
        self.optimizer = Adam(value_function.parameters(), learning_rate)
        self._gradient: Gradient | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of: what was captured is of this one's memory."""
        return {**self.__dict__, "_gradient": None}

    def gradient(self, device: torch.device) -> Gradient | None:
        """That of the mean squared error, with CUDA graphs that are kept; None on the CPU."""
        if self._gradient is None and device.type != "cpu":
            self._gradient = gradient_of(
                self.value_function, self.value_function.chunk_rows(device)
            )
        return self._gradient

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
        own, at = torch.zeros_like(shard.rewards), _rows_of(shard, shard.places())
        own[at] = _in_chunks(critic.value_function, shard.obs, at)
        values.append(own)
        final = torch.arange(len(shard.final_obs), device=own.device)
        final_values.append(_in_chunks(critic.value_function, shard.final_obs, (final,)))
    return rollout.join(values), rollout.join_final(final_values)


@torch.inference_mode(False)
@torch.enable_grad()
def fit(
    critic: Critic | None,
    rollout: Rollout,
    final_values: Tensor | None,
    config: "Config",
    *,
    wait: bool = True,
    whole: Whole | None = None,
    observed: Sequence[Tensor] | None = None,
) -> FitStats | None:
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
        wait: for the device, once at the end (on the CPU, at every step), to see whether all is
            well. If not, nothing is raised for numbers that are not finite: `FitStats.finite` says
            it.
        whole: of which the rollout is a part, with `config.resolved_shards` of its shards. The mean
            is over its counted rows, and its `combine` is called once for every step. None: the
            rollout is the whole.
        observed: as `UpdateStats` has it, to be taken into the running statistics of observations.
            None: they are formed of this rollout, which then is to be the whole.

    Returns:
        `FitStats`; None without a critic.

    Raises:
        FloatingPointError: with `wait`, a loss is not finite, or a parameter after a step.

    Source: Sutton & Barto (2018), section 13.4; the number of steps is Spinning Up's.
    """
    if critic is None:
        return None
    shards = rollout.shards(config.resolved_shards)
    continued: list[Tensor | None] = [None] * len(shards)
    if config.bootstrap_truncations and final_values is not None:
        continued = [*rollout.split(rollout.values_at_truncations(final_values), shards)]
    examples = [_examples(*pair, config.gamma) for pair in zip(shards, continued, strict=True)]
    rows: Tensor | int = sum(len(places) for places, _ in examples)
    combine: Combine = here
    if whole is not None:
        rows, combine = whole.counted, whole.combine
    value_function, optimizer = critic.value_function, critic.optimizer
    gradient = critic.gradient(rollout.mask.device)
    chosen = []
    if gradient is None:
        pairs = zip(shards, examples, strict=True)
        chosen = [(_rows_of(shard, places), wanted[places]) for shard, (places, wanted) in pairs]
    losses: list[Tensor] = []

    def differentiate(shard: int) -> Tensor:
        obs = shards[shard].obs
        if gradient is None:
            return _add_gradient(value_function, obs, *chosen[shard], rows)
        if len(shards) > 1 or not losses:
            places, targets = examples[shard]
            flat = obs.reshape(len(targets), *value_function.encoder.shape)
            gradient.load(places, [flat, targets], [rows])
        return gradient.add()

    def add(vectors: Iterable[Tensor]) -> Tensor:
        return combine(vectors, ())[0]

    given = value_function, differentiate, len(shards), in_order if combine is here else add
    try:
        for _ in range(config.value_steps):
            (total,) = gradient_in_order(*given)
            if wait and gradient is None:
                _check([total])
            optimizer.step()
            losses.append(total)
        if wait and (gradient is None or not bool(_finite(losses, critic))):
            _check(losses)
            check_parameters(value_function, optimizer.averages())
    except FloatingPointError as error:
        raise FloatingPointError(
            f"fitting the value function{when(rollout)}: {error}; scale the rewards, or lower"
            f" --value-learning-rate (now {config.value_learning_rate:g})"
        ) from None
    encoder = value_function.encoder
    if observed is None and encoder.normalizer is not None:
        observed = [encoder.moments(each.obs, each.mask, each.counted) for each in shards]
    encoder.merge(observed or ())
    return FitStats(losses[0], None if wait else _finite(losses, critic))


def _finite(losses: list[Tensor], critic: Critic) -> Tensor:
    """As `FitStats.finite`."""
    numbers = [*critic.value_function.parameters(), *critic.optimizer.averages()]
    return torch.stack(losses).isfinite().all() & finite(numbers)


def _check(losses: list[Tensor]) -> None:
    for loss in losses:
        if not math.isfinite(number := loss.item()):
            raise FloatingPointError(f"the loss is {number}")


def gradient_of(value_function: ValueFunction, rows: int) -> Gradient:
    """What `fit` follows, of so many rows at a time."""

    def terms(
        padding: Tensor, settings: tuple[Tensor], obs: Tensor, targets: Tensor
    ) -> tuple[Tensor]:
        errors = (value_function(obs) - targets).square()
        return (errors.masked_fill(padding, 0.0).sum() / settings[0],)

    return Gradient(value_function, terms, 1, 1, most=rows, what="fitting V", replayed=True)


def _rows_of(rollout: Rollout, places: Tensor) -> tuple[Tensor, Tensor]:
    """The t and n of places."""
    num_envs = rollout.mask.shape[1]
    return places // num_envs, places % num_envs


def _examples(rollout: Rollout, continued: Tensor | None, gamma: float) -> tuple[Tensor, Tensor]:
    """The places of counted rows, and the targets of all (T * N)."""
    mask = rollout.mask
    targets = reward_to_go(rollout.rewards, rollout.dones, gamma, final_values=continued, mask=mask)
    return rollout.places(), targets.reshape(-1)


def _add_gradient(
    value_function: ValueFunction,
    obs: Tensor,
    at: tuple[Tensor, ...],
    targets: Tensor,
    divisor: Tensor | int,
) -> Tensor:
    """Add that of a sum of squared errors / `divisor` to every `.grad`, and return it, (1,)."""
    total = torch.zeros(1, dtype=torch.float64, device=obs.device)
    chunk_rows = value_function.chunk_rows(obs.device)
    for rows, wanted in zip(
        _chunks(obs, at, chunk_rows), torch.split(targets, chunk_rows), strict=True
    ):
        loss = (value_function(rows) - wanted).square().sum() / divisor
        torch.autograd.backward(loss)
        total += loss.detach()
    return total


def _in_chunks(value_function: ValueFunction, obs: Tensor, at: tuple[Tensor, ...]) -> Tensor:
    chunk_rows = value_function.chunk_rows(obs.device)
    return torch.cat([value_function(rows) for rows in _chunks(obs, at, chunk_rows)])


def _chunks(obs: Tensor, at: tuple[Tensor, ...], chunk_rows: int) -> Iterator[Tensor]:
    """The observations at these places, so many at a time: all of them may be large."""
    for places in zip(*(torch.split(each, chunk_rows) for each in at), strict=True):
        yield obs[places]
