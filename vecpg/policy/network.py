"""From observations to features, and from features through fully connected layers.

The policy and the value function are built of these.
"""

import functools
import itertools
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from vecpg.images import UNITS, image_of, outputs_of, resolve_network
from vecpg.kernels import threads
from vecpg.kernels.sums import merged, moments
from vecpg.policy import own
from vecpg.policy.convolutions import Convolutions

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}

# A normalized observation is cut off here: one that was never seen before may be far away.
_MOST_DEVIATIONS = 10.0
# Rows that are taken into the statistics at once, and the numbers in them.
_ROWS = 2**16
_MOST_OBSERVED = 2**25
# Numbers that one pass forwards and backwards keeps of the observations and their features; see
# `Encoder.rows_at_once`.
_MOST_KEPT = 2**24
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
    """Parameters that are made on the CPU inside are functions of the seed alone.

    They are drawn by one thread at a time, and on one of torch's threads: an initialization may
    depend on their number in its last bits. Torch's own generator is as before afterwards; those of
    other devices are left alone.

    Example:
        >>> with drawn_from(1):
        ...     first = nn.Linear(2, 2)
        >>> with drawn_from(1):
        ...     torch.equal(nn.Linear(2, 2).weight, first.weight)
        True
    """
    with _drawing, threads.torch_using(1), torch.random.fork_rng(devices=[]):
        # Not `torch.manual_seed`, which seeds those of all devices, where nothing restores them.
        torch.default_generator.manual_seed(seed)
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

    The numbers of a `Box` or `MultiBinary` are taken as float32. Those of a `Box` of uint8 are
    divided by the largest that the space allows (255 for images): before that they stay uint8. They
    are normalized on request. The network "mlp" takes them flattened, and looks up what is
    `Discrete` in a table of learned vectors, and so every component of a `MultiDiscrete`; "cnn"
    convolves images, see `vecpg.policy.convolutions`; and a user's own is called with them, with
    int64 ones where they are `Discrete` or `MultiDiscrete`, see `vecpg.policy.own`.

    Args:
        space: of one environment's observations.
        embedding_size: length of the learned vectors.
        normalize: subtract the running mean and divide by the running standard deviation; for a
            `Box` or `MultiBinary` only.
        network: "auto", "mlp", "cnn", or "module:function", which is imported, called as
            function(space) and returns a `torch.nn.Module`. "auto": see
            `vecpg.images.resolve_network`.

    Raises:
        ValueError: a space that is not supported, cannot be normalized, or is not for the network;
            or a network of the user's own that does not serve.

    Example:
        >>> encoder = Encoder(spaces.Discrete(5, start=1), embedding_size=3)
        >>> encoder(torch.tensor([1, 5])).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        space: spaces.Space[Any],
        embedding_size: int = 8,
        normalize: bool = False,
        network: str = "auto",
    ) -> None:
        super().__init__()
        self.space = space
        self.shape: tuple[int, ...] = space.shape or ()
        self.network = resolve_network(network, space)
        self.normalizer: Normalizer | None = None
        # What stands for 1 among uint8 numbers.
        self._largest = 1.0
        check_numbers("observation", space)
        if isinstance(space, spaces.Box | spaces.MultiBinary):
            self.features = math.prod(self.shape)
            self.dtype = torch.float32
            if isinstance(space, spaces.Box) and space.dtype == np.uint8:
                self.dtype = torch.uint8
                self._largest = max(1.0, float(space.high.max()))
            if normalize:
                self.normalizer = Normalizer(self.features)
        elif isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            if normalize:
                raise ValueError(
                    f"normalize_obs: expected a Box or MultiBinary observation space, got {space}"
                )
            self.dtype = torch.int64
            if self.network == "mlp":
                self._make_table(space, embedding_size)
        else:
            raise ValueError(
                f"observation space {space} is not supported; supported: Box, Discrete,"
                " MultiBinary, MultiDiscrete; many others become a Box by --wrappers"
                " gymnasium.wrappers:FlattenObservation"
            )
        self.body: nn.Module | None = None
        # Numbers that are kept of one observation until its gradient is formed.
        self._kept = self.features if self.network == "mlp" else 0
        if self.network == "cnn":
            image = image_of(space)
            self.body, self.features = Convolutions(image), UNITS
            # What goes into a layer, and what comes out of it before the ReLU.
            self._kept = math.prod(self.shape) + 2 * sum(map(math.prod, outputs_of(image)))
        elif self.network != "mlp":
            self.body, self.features, self._kept = own.make(self.network, space, self._entering)

    def _make_table(
        self, space: "spaces.Discrete | spaces.MultiDiscrete", embedding_size: int
    ) -> None:
        sizes = np.atleast_1d(space.nvec if isinstance(space, spaces.MultiDiscrete) else space.n)
        sizes = sizes.astype(np.int64)  # unsigned ones would become floats below
        starts = np.broadcast_to(space.start, sizes.shape).astype(np.int64)
        # Where each component's rows begin in the one table, less its first value.
        first = np.concatenate([[0], sizes.reshape(-1).cumsum()[:-1]]) - starts.reshape(-1)
        self.first: Tensor
        self.register_buffer("first", torch.from_numpy(first), persistent=False)
        self.table = nn.Embedding(int(sizes.sum()), embedding_size, dtype=torch.float32)
        self.features = sizes.size * embedding_size

    def forward(self, obs: Tensor) -> Tensor:
        """(B, *obs_shape) to (B, features).

        Observations are of `dtype`, or float32 where that is uint8.
        """
        rows = obs.shape[0]
        entering = self._entering(obs)
        if self.normalizer is not None:
            flat = entering.reshape(rows, math.prod(self.shape))
            entering = self.normalizer(flat).reshape(entering.shape)
        if self.body is not None:
            if rows == 0:  # with which a user's module need not know what to do
                return torch.zeros(0, self.features, dtype=torch.float32, device=obs.device)
            made: Tensor = self.body(entering)
            return made
        if self.dtype != torch.int64:
            return entering.reshape(rows, self.features)
        found: Tensor = self.table(entering.reshape(rows, len(self.first)) + self.first)
        return found.reshape(rows, self.features)

    def _entering(self, obs: Tensor) -> Tensor:
        """Observations as they enter the network: those of uint8 scaled, as real numbers."""
        if self.dtype != torch.uint8:
            return obs
        numbers = obs if obs.is_floating_point() else obs.to(torch.float32)
        return numbers / self._largest

    def rows_at_once(self, most: int) -> int:
        """How many observations, at most so many, go through forwards and backwards together.

        All of them where one takes up to 4096 numbers; fewer of images, so that what is kept of
        them until the gradient is formed does not grow with their size.
        """
        return max(1, min(most, _MOST_KEPT // max(1, self._kept)))

    def observe(self, obs: Tensor, mask: Tensor, counted: Tensor | None = None) -> None:
        """Take the counted rows of (T, N, *obs_shape) into the running statistics, where kept.

        Nothing changes between two calls: an iteration sees one and the same normalization. As
        `Policy.observe` has it.
        """
        if self.normalizer is not None:
            self.merge([self.moments(obs, mask, counted)])

    def merge(self, observed: Iterable[Tensor]) -> None:
        """Take groups of rows into the running statistics, where kept, by their `moments`."""
        if self.normalizer is not None:
            for own in observed:
                self.normalizer.merge(own)

    def moments(self, obs: Tensor, mask: Tensor, counted: Tensor | None = None) -> Tensor:
        """Those of the counted rows, as they enter: see `vecpg.kernels.sums`; else as `observe`."""
        numbers = math.prod(self.shape)
        every = obs.reshape(-1, numbers)
        if counted is not None:
            places = torch.split(counted, max(1, _MOST_OBSERVED // numbers))
            rows = (every.index_select(0, own) for own in places)
        else:
            at_once = max(1, min(_ROWS, _MOST_OBSERVED // numbers))
            chunks = zip(
                torch.split(every, at_once), torch.split(mask.reshape(-1), at_once), strict=True
            )
            rows = (chunk[kept] for chunk, kept in chunks)
        return functools.reduce(merged, (moments(self._entering(chunk)) for chunk in rows))


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
        self.merge(moments(x))

    @torch.no_grad()
    def merge(self, own: Tensor) -> None:
        """Take the `moments` of some rows into the running ones; of none they change nothing."""
        before = torch.cat([self.count[None], self.mean, self.squares])
        sizes = [1, len(self.mean), len(self.mean)]
        count, mean, squares = torch.split(merged(before, own), sizes)
        self.count.copy_(count[0])
        self.mean.copy_(mean)
        self.squares.copy_(squares)


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
