"""The policy: a network from observations to a distribution over actions."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, MultiBinary, MultiDiscrete, Space
from numpy.typing import NDArray
from torch import Tensor, nn

from vecpg import images
from vecpg.policy.distributions import distribution_for, masked
from vecpg.policy.network import ACTIVATIONS, Encoder, fully_connected, through
from vecpg.policy.spaces import describe, from_description

# Numbers that an observation for a user's own network may have, whatever a file says.
MOST_SEEN = 2**22


class Policy(nn.Module):
    """pi(a|s): an encoder of observations, a fully connected network, a distribution over actions.

    What the encoder does is said by `network`: see `vecpg.policy.network.Encoder`.

    Actions are categorical for `Discrete`, independently so for each component of a
    `MultiDiscrete` or `MultiBinary`, and Gaussian with a diagonal covariance for a `Box`.

    Args:
        observation_space: a `Box` or `MultiBinary` of any shape, a `Discrete` or a
            `MultiDiscrete`, for one environment.
        action_space: a `Discrete`, a `MultiDiscrete` of one dimension, a `MultiBinary`, or a `Box`.
        hidden_sizes: widths of the hidden layers.
        activation: "tanh" or "relu".
        dropout: probability with which a hidden unit is dropped while training data is collected
            and differentiated; evaluation drops none.
        embedding_size: length of the learned vectors that stand for discrete observations.
        normalize_obs: shift and scale observations by their running statistics (`observe`).
        log_std: of a Gaussian: "parameter", the same everywhere, or from the "network".
        network: what makes features of observations: "mlp", "cnn", "module:function" of the user's
            own, which is imported, or "auto", which is "cnn" for images of uint8 and else "mlp".

    Raises:
        ValueError: a space that is not supported, or a network that does not serve.

    Example:
        >>> from gymnasium import spaces
        >>> policy = Policy(spaces.Box(-1, 1, (4,)), spaces.Discrete(2))
        >>> policy.act(np.zeros((3, 4))).shape
        (3,)
    """

    # Whoever builds it while they only infer may train it later.
    @torch.inference_mode(False)
    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        *,
        hidden_sizes: Sequence[int] = (64, 64),
        activation: str = "tanh",
        dropout: float = 0.0,
        embedding_size: int = 8,
        normalize_obs: bool = False,
        log_std: str = "parameter",
        network: str = "auto",
    ) -> None:
        super().__init__()
        self.encoder = Encoder(observation_space, embedding_size, normalize_obs, network)
        self.distribution = distribution_for(action_space, log_std)
        self.hidden_sizes = tuple(hidden_sizes)
        self.activation = activation
        self.dropout = dropout
        # The last layer is small: a policy that starts with a preference may never see the reward
        # that would correct it. At step size 2e-2 the median run of CartPole-v1 took 150 k steps,
        # against 180 k with torch's own initialization and a small last layer.
        self.network = fully_connected(
            self.encoder.features,
            self.hidden_sizes,
            self.distribution.num_parameters,
            activation,
            last_gain=0.01,
        )
        self._settings = {
            "hidden_sizes": list(hidden_sizes),
            "activation": activation,
            "dropout": dropout,
            "embedding_size": embedding_size,
            "normalize_obs": normalize_obs,
            "log_std": log_std,
            "network": self.encoder.network,
        }

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return self.encoder.shape

    @property
    def obs_dtype(self) -> torch.dtype:
        """float32 for a `Box` or `MultiBinary`, uint8 for a `Box` of uint8, else int64."""
        return self.encoder.dtype

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of one action: (), or (A,)."""
        return self.distribution.shape

    @property
    def action_dtype(self) -> torch.dtype:
        """int64 or float32."""
        return self.distribution.dtype

    @property
    def num_uniforms(self) -> int:
        """How many uniform numbers one drawn action takes."""
        return self.distribution.num_uniforms

    @property
    def dropout_units(self) -> int:
        """How many uniform numbers the dropout of one observation takes; 0 without dropout."""
        return sum(self.hidden_sizes) if self.dropout > 0 else 0

    def forward(
        self, obs: Tensor, dropout: Tensor | None = None, action_mask: Tensor | None = None
    ) -> Tensor:
        """The distribution's parameters: for categorical actions unnormalized log-probabilities.

        Args:
            obs: (B, *obs_shape), of `obs_dtype`, or float32 where that is uint8: 0 to 255 alike.
            dropout: (dropout_units, B) in [0, 1), which say what is dropped; None drops nothing.
            action_mask: of `Discrete` and `MultiDiscrete` actions, (B, A) bool, True = allowed,
                at least one of every component; the components of a `MultiDiscrete` stand one
                behind the other. The parameters of the others are -inf. None allows all.

        Returns:
            (parameters, B) float32, rows contiguous.
        """
        features = self.encoder(obs)
        if dropout is None:
            output: Tensor = self.network(features)
        else:
            output = through(self.network, features, self.dropout, dropout)
        output = output.t().contiguous()
        return output if action_mask is None else masked(output, *self._columns(action_mask))

    def sample(
        self,
        obs: Tensor,
        uniforms: Tensor,
        dropout: Tensor | None = None,
        action_mask: Tensor | None = None,
    ) -> Tensor:
        """Draw actions.

        Args:
            obs: (B, *obs_shape).
            uniforms: (num_uniforms, B) in [0, 1).
            dropout: as in `forward`.
            action_mask: as in `forward`. What it does not allow is never drawn.

        Returns:
            (B, *action_shape) actions; a Gaussian's may lie outside the environment's bounds.
        """
        columns = self._columns(action_mask)
        return self.distribution.sample(self._output(obs, dropout), uniforms, *columns)

    def mode(self, obs: Tensor, action_mask: Tensor | None = None) -> Tensor:
        """The most probable actions, (B, *action_shape), of those that a mask allows."""
        return self.distribution.mode(self(obs), *self._columns(action_mask))

    def log_probs_and_entropy(
        self,
        obs: Tensor,
        actions: Tensor,
        dropout: Tensor | None = None,
        action_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The log-probabilities log pi(actions|obs), and the entropy of pi(.|obs) in nats.

        Args:
            obs: (B, *obs_shape).
            actions: (B, *action_shape), as `sample` gave them.
            dropout: as in `forward`.
            action_mask: as in `forward`.

        Returns:
            two (B,) float32 tensors; for `Box` actions a log-density and a differential entropy.
        """
        return self.distribution.log_probs_and_entropy(
            self._output(obs, dropout), actions, *self._columns(action_mask)
        )

    def _output(self, obs: Tensor, dropout: Tensor | None) -> Tensor:
        # A network of the user's own need not know of dropout.
        parameters: Tensor = self(obs) if dropout is None else self(obs, dropout)
        return parameters

    def _columns(self, action_mask: Tensor | None) -> tuple[Tensor, ...]:
        """The mask as the distribution takes it, or nothing: not every distribution takes one."""
        if action_mask is None:
            return ()
        self._mask_sizes()
        return (action_mask.t(),)

    def _mask_sizes(self) -> list[int]:
        if not self.distribution.mask_sizes:
            raise ValueError(
                "action_mask: expected none for actions that are neither Discrete nor"
                f" MultiDiscrete, got one for {self.distribution.space}"
            )
        return self.distribution.mask_sizes

    def for_env(self, actions: Tensor | NDArray[Any]) -> NDArray[Any]:
        """Actions (B, *action_shape) as the environment takes them, a `Box`'s inside its bounds."""
        if isinstance(actions, Tensor):
            actions = actions.cpu().numpy()
        return self.distribution.for_env(actions)

    def observe(self, obs: Tensor, mask: Tensor, counted: Tensor | None = None) -> None:
        """Take counted rows into the statistics of `normalize_obs`; without it nothing changes.

        Args:
            obs: (T, N, *obs_shape).
            mask: (T, N) bool, True = counted; other rows are not looked at.
            counted: (C,) int64, the places t * N + n where the mask is True: given them the host
                does not wait for the device. None where nobody has gathered them yet.
        """
        self.encoder.observe(obs, mask, counted)

    @torch.no_grad()
    def act(
        self,
        obs: NDArray[Any] | Tensor,
        greedy: bool = True,
        generator: torch.Generator | None = None,
        action_mask: Any = None,
    ) -> Any:
        """Choose actions for one observation or a batch. Nothing is dropped.

        Args:
            obs: (*obs_shape) or (B, *obs_shape), an array or a tensor of any real type.
            greedy: True = the most probable action; False = draw one.
            generator: where draws come from; torch's own when not given.
            action_mask: what is allowed, as in `forward`: (A,) for one observation or (B, A) for a
                batch, an array or tensor of bools, or of 1 and 0, such as `info["action_mask"]` of
                Taxi-v4. None allows all.

        Returns:
            what the environment takes, one action or (B, ...): an array (a NumPy integer for one
            action of a `Discrete` space) or a tensor as `obs`.

        Raises:
            ValueError: a shape that is neither; a mask that allows nothing, or is of other
                actions.
        """
        # Numbers that a uint8 has not are not cut off to one that it has.
        looked_up = self.obs_dtype == torch.int64
        if isinstance(obs, Tensor):
            rows = obs.to(device=self.device, dtype=torch.int64 if looked_up else torch.float32)
        else:
            # A copy: torch takes neither reversed nor foreign-endian arrays.
            kind = np.int64 if looked_up else np.float32
            rows = torch.from_numpy(np.array(obs, kind)).to(self.device)
        if rows.shape[rows.ndim - len(self.obs_shape) :] != self.obs_shape or rows.ndim not in (
            len(self.obs_shape),
            len(self.obs_shape) + 1,
        ):
            raise ValueError(
                f"obs: expected shape {self.obs_shape} or (B, *{self.obs_shape}),"
                f" got {tuple(rows.shape)}"
            )
        single = rows.ndim == len(self.obs_shape)
        rows = rows[None] if single else rows
        masks = self._masks_of(action_mask, rows, single)
        if greedy:
            actions = self.mode(rows, *masks)
        else:
            shape = self.num_uniforms, rows.shape[0]
            uniforms = torch.rand(shape, generator=generator, dtype=torch.float32)
            actions = self.sample(rows, uniforms.to(rows.device), None, *masks)
        chosen = self.for_env(actions)
        chosen = chosen[0] if single else chosen
        if isinstance(obs, Tensor):
            return torch.as_tensor(chosen, device=obs.device)
        return chosen

    def _masks_of(self, action_mask: Any, rows: Tensor, single: bool) -> tuple[Tensor, ...]:
        """What `act` was given as (B, A) bool for these rows; nothing where that is None."""
        if action_mask is None:
            return ()
        given = action_mask.cpu().numpy() if isinstance(action_mask, Tensor) else action_mask
        numbers, sizes = np.asarray(given), self._mask_sizes()
        shape = (sum(sizes),) if single else (len(rows), sum(sizes))
        mask: NDArray[np.bool_] = numbers == 1
        if numbers.shape != shape or not (mask | (numbers == 0)).all():
            raise ValueError(
                f"action_mask: expected numbers 0 and 1, or bools, of shape {shape}, got"
                f" {numbers.tolist()} of shape {numbers.shape}"
            )
        allowed = torch.from_numpy(mask.reshape(len(rows), sum(sizes)))
        for component in torch.split(allowed, sizes, dim=1):
            if not bool(component.any(dim=1).all()):
                raise ValueError(
                    f"action_mask: expected one that allows an action, got {mask.tolist()}"
                )
        return (allowed.to(self.device),)

    def description(self) -> dict[str, Any]:
        """What `Policy.from_description` needs to build this network again, in plain types."""
        return {
            "observation_space": describe(self.encoder.space),
            "action_space": describe(self.distribution.space),
            **self._settings,
        }

    @classmethod
    def from_description(
        cls, description: Any, *, largest: int | None = None, network: str | None = None
    ) -> "Policy":
        """A policy of that shape, with fresh parameters.

        Args:
            description: may come from anywhere: all of it is checked before anything is built.
            largest: how many parameters it may have; None: any number.
            network: as it is named by the user: a "module:function" is not imported because it
                stands in a description. None: it has none.

        Raises:
            ValueError: it describes no policy, with the first part that is wrong; or its network is
                another than the user's.
        """
        _check(isinstance(description, dict), "policy.description", "a dictionary", description)
        keys = {"observation_space", "action_space", *_SETTINGS}
        right = description.keys() == keys
        _check(right, "policy.description", f"{sorted(keys)}", [*description])
        for name, (expected, holds) in _SETTINGS.items():
            _check(
                holds(description[name]), f"policy.description.{name}", expected, description[name]
            )
        settings = dict(description)
        described = settings["network"]
        _check_named(described, network)
        seen = largest
        if largest is not None and described == "cnn":
            # They have few parameters for what they see, so that those are counted first.
            seen = _most_seen(description["observation_space"], largest)
        elif largest is not None and described != "mlp":
            seen = max(largest, MOST_SEEN)
        observations, actions = (
            from_description(settings.pop(name), largest=most, where=f"policy.description.{name}")
            for name, most in (("observation_space", seen), ("action_space", largest))
        )
        if largest is not None:
            count = _num_parameters(observations, actions, settings)
            wanted = f"sizes that make at most {largest} parameters"
            _check(count <= largest, "policy.description", wanted, count)
        return cls(observations, actions, **settings)


def _most_seen(described: Any, largest: int) -> int:
    """How many numbers an image may have whose convolutions have at most `largest` parameters.

    Nothing of its size is made.
    """
    found = described.get("shape", described.get("n")) if isinstance(described, dict) else None
    shape: tuple[Any, ...] = tuple(found) if isinstance(found, list) else ()
    if len(shape) not in (2, 3) or not all(map(_is_whole, shape)):
        return largest  # it is refused where the space is made, or the network
    count = images.num_parameters(images.image_of_shape(shape))
    wanted = f"sizes that make at most {largest} parameters"
    _check(count <= largest, "policy.description", wanted, count)
    return math.prod(shape)


def _check_named(described: str, given: str | None) -> None:
    """Refuse to import what only a description names, and another network than the user's."""
    shown = ascii(described)[:120]
    if ":" in described and given in (None, "auto"):
        raise ValueError(
            f"policy.description.network: expected mlp or cnn, got {shown}, which is imported only"
            f" if you name it too; if you trust it, pass network={shown}"
        )
    if given not in (None, "auto", described):
        raise ValueError(
            f"network: expected {shown}, with which the policy was trained, got"
            f" {ascii(given)[:120]}"
        )


def _num_parameters(observations: Space[Any], actions: Space[Any], settings: dict[str, Any]) -> int:
    """How many numbers are in the tables and layers of a network, without building it.

    A network of the user's own is asked how many features it makes, and its parameters are not
    counted.
    """
    network = settings["network"]
    below, features = 0, math.prod(observations.shape or ())
    if network == "cnn":
        below, features = images.num_parameters(images.image_of(observations)), images.UNITS
    elif network != "mlp":
        features = Encoder(observations, network=network).features
    elif not isinstance(observations, Box | MultiBinary):
        below = _num_values(observations) * settings["embedding_size"]
        features *= settings["embedding_size"]
    outputs = _num_values(actions)
    if isinstance(actions, Box) and settings["log_std"] == "network":
        outputs *= 2
    widths = [features, *settings["hidden_sizes"], outputs]
    layers: int = sum(following * (width + 1) for width, following in pairwise(widths))
    return below + layers


def _num_values(space: Any) -> int:
    """Components of a `Box`; for the others all values that there are to choose from."""
    if isinstance(space, Box):
        return math.prod(space.shape)
    if isinstance(space, MultiBinary):
        return 2 * math.prod(space.shape)
    sizes = space.nvec if isinstance(space, MultiDiscrete) else [space.n]
    return sum(int(size) for size in np.ravel(sizes))


def _is_whole(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**63


# Of each setting what it may be, in words and as a test; as in `Config`.
_SETTINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "hidden_sizes": (
        "a list of whole numbers of at least 1",
        lambda value: isinstance(value, list) and all(map(_is_whole, value)),
    ),
    "activation": (
        " or ".join(ACTIVATIONS),
        lambda value: isinstance(value, str) and value in ACTIVATIONS,
    ),
    "dropout": (
        "a number in [0, 1)",
        lambda value: type(value) in (int, float) and 0 <= value < 1,
    ),
    "embedding_size": ("a whole number of at least 1", _is_whole),
    "normalize_obs": ("true or false", lambda value: isinstance(value, bool)),
    "log_std": (
        "parameter or network",
        lambda value: isinstance(value, str) and value in ("parameter", "network"),
    ),
    "network": (
        "mlp, cnn or module:function",
        lambda value: isinstance(value, str) and (value in ("mlp", "cnn") or ":" in value),
    ),
}


def _check(holds: bool, where: str, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{where}: expected {expected}, got {ascii(got)[:80]}")
