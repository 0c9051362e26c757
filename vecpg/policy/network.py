"""From observations to features, and from features through fully connected layers.

The policy and the value function are built of these.
"""

import itertools
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from vecpg.kernels import threads

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}

# A normalized observation is cut off here: one that was never seen before may be far away.
_MOST_DEVIATIONS = 10.0
# Rows that are taken into the statistics at once.
_ROWS = 2**16
# Torch's own generator is there once.
_drawing = threading.RLock()


def _forget_others() -> None:
    """The thread that was drawing is not in a child made by fork."""
    global _drawing
    _drawing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_others)


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Parameters that are made inside are functions of the seed alone.

    They are drawn by one thread at a time, and on one of torch's threads: an initialization may
    depend on their number in its last bits. Torch's own generator is as before afterwards.

    Example:
        >>> with drawn_from(1):
        ...     first = nn.Linear(2, 2)
        >>> with drawn_from(1):
        ...     torch.equal(nn.Linear(2, 2).weight, first.weight)
        True
    """
    with _drawing, threads.torch_using(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def fully_connected(
    inputs: int, hidden_sizes: Sequence[int], outputs: int, activation: str, last_gain: float
) -> nn.Sequential:
    """Linear float32 layers with an activation between them, orthogonal weights, biases of 0.

    The last layer's weights are scaled by `last_gain`, the others by the square root of 2.
    """
    widths = [inputs, *hidden_sizes]
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise(widths):
        layers += [nn.Linear(width, next_width, dtype=torch.float32), ACTIVATIONS[activation]()]
    network = nn.Sequential(*layers, nn.Linear(widths[-1], outputs, dtype=torch.float32))
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, last_gain if layer is network[-1] else math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return network


def check_numbers(what: str, space: spaces.Space[Any]) -> None:
    """Refuse a space of observations or actions that hold no number at all, such as shape (0,)."""
    if 0 in (space.shape or ()):
        raise ValueError(
            f"{what} space {space} holds no numbers: expected at least one, got shape {space.shape}"
        )


class Encoder(nn.Module):
    """Observations as features: (B, *obs_shape) to (B, features) float32.

    A `Box` is flattened, and normalized on request, and so is a `MultiBinary`, whose numbers are 0
    and 1; a `Discrete` is looked up in a table of learned vectors, and so is every component of a
    `MultiDiscrete`.

    Args:
        space: of one environment's observations.
        embedding_size: length of the learned vectors.
        normalize: subtract the running mean and divide by the running standard deviation; for a
            `Box` or `MultiBinary` only.

    Raises:
        ValueError: a space that is not supported, or cannot be normalized.

    Example:
        >>> encoder = Encoder(spaces.Discrete(5, start=1), embedding_size=3)
        >>> encoder(torch.tensor([1, 5])).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, space: spaces.Space[Any], embedding_size: int = 8, normalize: bool = False
    ) -> None:
        super().__init__()
        self.space = space
        self.shape: tuple[int, ...] = space.shape or ()
        self.normalizer: Normalizer | None = None
        check_numbers("observation", space)
        if isinstance(space, spaces.Box | spaces.MultiBinary):
            self.features = math.prod(self.shape)
            self.dtype = torch.float32
            if normalize:
                self.normalizer = Normalizer(self.features)
            return
        if not isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            raise ValueError(
                f"observation space {space} is not supported; supported: Box, Discrete,"
                " MultiBinary, MultiDiscrete; many others become a Box by --wrappers"
                " gymnasium.wrappers:FlattenObservation"
            )
        if normalize:
            raise ValueError(
                f"normalize_obs: expected a Box or MultiBinary observation space, got {space}"
            )
        sizes = np.atleast_1d(space.nvec if isinstance(space, spaces.MultiDiscrete) else space.n)
        sizes = sizes.astype(np.int64)  # unsigned ones would become floats below
        starts = np.broadcast_to(space.start, sizes.shape).astype(np.int64)
        # Where each component's rows begin in the one table, less its first value.
        first = np.concatenate([[0], sizes.reshape(-1).cumsum()[:-1]]) - starts.reshape(-1)
        self.first: Tensor
        self.register_buffer("first", torch.from_numpy(first), persistent=False)
        self.table = nn.Embedding(int(sizes.sum()), embedding_size, dtype=torch.float32)
        self.features = sizes.size * embedding_size
        self.dtype = torch.int64

    def forward(self, obs: Tensor) -> Tensor:
        """(B, *obs_shape), float32 or int64 by the space, to (B, features)."""
        rows = obs.shape[0]
        if self.dtype == torch.float32:
            flat = obs.reshape(rows, self.features)
            return flat if self.normalizer is None else self.normalizer(flat)
        found: Tensor = self.table(obs.reshape(rows, len(self.first)) + self.first)
        return found.reshape(rows, self.features)

    def observe(self, obs: Tensor, mask: Tensor) -> None:
        """Take the counted rows of (T, N, *obs_shape) into the running statistics, where kept.

        Nothing changes between two calls: an iteration sees one and the same normalization.
        """
        if self.normalizer is None:
            return
        flat, counted = obs.reshape(mask.numel(), self.features), mask.reshape(-1)
        for rows, kept in zip(torch.split(flat, _ROWS), torch.split(counted, _ROWS), strict=True):
            self.normalizer.observe(rows[kept])


class Normalizer(nn.Module):
    """(x - mean) / standard deviation, of all that was observed so far.

    Before that it is x. The result is cut off at -10 and 10. Statistics are float64 buffers, and so
    part of a checkpoint.

    Example:
        >>> normalizer = Normalizer(1)
        >>> normalizer.observe(torch.tensor([[1.0], [3.0]]))
        >>> normalizer(torch.tensor([[3.0]]))
        tensor([[1.]])
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.count: Tensor
        self.mean: Tensor
        self.squares: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(features, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """(B, features) float32 to the same."""
        # Of a feature that never changed only the mean is known.
        variance = torch.where(self.squares > 0, self.squares / self.count.clamp(min=1), 1.0)
        scaled = (x - self.mean) / variance.sqrt()
        return scaled.clamp(-_MOST_DEVIATIONS, _MOST_DEVIATIONS).to(torch.float32)

    def observe(self, x: Tensor) -> None:
        """Take (B, features) into the running statistics."""
        if x.shape[0] > 0:
            self.merge(*moments(x))

    @torch.no_grad()
    def merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Take the `moments` of some rows into the running ones.

        Source: Chan, Golub & LeVeque (1983), "Algorithms for computing the sample variance".
        """
        difference = mean - self.mean
        total = self.count + count
        between = difference.square() * self.count * count / total
        self.squares += squares + between
        self.mean += difference * count / total
        self.count += count


@torch.no_grad()
def moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """The number of rows of (B, features), and of every feature mean and sum of squares about it.

    Both are float64.
    """
    x = x.to(torch.float64)
    mean = x.mean(dim=0)
    return len(x), mean, (x - mean).square().sum(dim=0)


def through(network: nn.Sequential, features: Tensor, dropout: float, uniforms: Tensor) -> Tensor:
    """The network's output without the hidden units whose uniform number is below `dropout`.

    The others are divided by 1 - dropout, so that expectations stay.

    Args:
        network: as `fully_connected` makes it.
        features: (B, inputs).
        dropout: a probability.
        uniforms: (hidden units, B) in [0, 1), layer after layer.

    Returns:
        (B, outputs).

    Source: Srivastava et al. (2014), "Dropout", section 4 (inverted, as torch does it).
    """
    used = 0
    for layer in network:
        features = layer(features)
        if not isinstance(layer, nn.Linear):
            units = features.shape[1]
            kept = uniforms[used : used + units].mT >= dropout
            features = torch.where(kept, features / (1 - dropout), 0.0)
            used += units
    return features
