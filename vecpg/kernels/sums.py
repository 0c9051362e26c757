"""Sums in a fixed order: each shard's, formed as if it were alone, and then all in shard order.

Whoever adds up over environments does it here, so that no bit depends on who formed which shard's.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Sum = TypeVar("Sum")


def in_order(parts: Iterable[Sum]) -> Sum:
    """The shards' sums, added from the first to the last. That of one shard is returned as it is.

    Args:
        parts: numbers, arrays or tensors of one shape, one for each shard; at least one.

    Example:
        >>> in_order([0.1, 0.2, 0.3]) == (0.1 + 0.2) + 0.3
        True
    """
    adding: Any = operator.add
    return functools.reduce(adding, parts)


# Adds up over all shards, those of other ranks too. It is given of each shard at hand, in their
# order, a vector to be added, (K,), and one to be kept as it is, (M,), both float64; of the latter
# there may be none at all, and K may be 0. It returns the sum, (K,), and what is kept of all
# shards, both in shard order. All ranks call it equally often, with the same K and M.
Combine = Callable[[Iterable[Tensor], Sequence[Tensor]], tuple[Tensor, list[Tensor]]]


def here(added: Iterable[Tensor], kept: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
    """A `Combine` where all shards are at hand. It holds one vector to be added at a time."""
    return in_order(added), list(kept)


@dataclass(frozen=True, slots=True)
class Whole:
    """All environments of an iteration, of which a rollout may have a part.

    num_envs: how many there are.
    counted:  how many of their rows count; a number, or a tensor without dimensions.
    combine:  adds up over all of their shards.
    """

    num_envs: int
    counted: Tensor | int
    combine: Combine = here


def gradient_in_order(
    module: nn.Module,
    differentiate: Callable[[int], Tensor],
    shards: int,
    add: Callable[[Iterable[Tensor]], Tensor] = in_order,
) -> Tensor:
    """Leave in every parameter's `.grad` the shards' gradients, added in their order, in float64.

    A parameter that no shard used has none.

    Args:
        module: whose gradients are overwritten.
        differentiate: leaves the gradient of the shard of that number in every `.grad`, where it
            finds none, and returns sums, (K,) float64.
        shards: how many are at hand.
        add: gives the sum of vectors over all shards, others too; it is given those at hand.

    Returns:
        (K,) float64: what `differentiate` returned, added likewise.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> def differentiate(shard):
        ...     loss = layer(torch.tensor([[shard + 1.0]])).sum()
        ...     loss.backward()
        ...     return torch.tensor([1.0], dtype=torch.float64)
        >>> gradient_in_order(layer, differentiate, 3)
        tensor([3.], dtype=torch.float64)
        >>> layer.weight.grad
        tensor([[6.]])
    """
    parameters = list(module.parameters())

    def alone(shard: int) -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        return differentiate(shard)

    if shards == 1 and add is in_order:
        return alone(0)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    used = [False] * len(trained)

    def vectors() -> Iterator[Tensor]:
        for shard in range(shards):
            sums = alone(shard)
            own = [parameter.grad is not None for parameter in trained]
            used[:] = map(operator.or_, used, own)
            flags = sums.new_zeros(1), sums.new_ones(1)  # a list would be waited for on a GPU
            # Together with float64 all become float64.
            yield torch.cat([sums, *(flags[each] for each in own), *map(_gradient, trained)])

    total = add(vectors())
    sizes = [parameter.numel() for parameter in trained]
    num_sums = len(total) - len(trained) - sum(sizes)
    sums, flags, *gradients = torch.split(total, [num_sums, len(trained), *sizes])
    for place, (parameter, gradient) in enumerate(zip(trained, gradients, strict=True)):
        # Only where no shard at hand has used it one has to ask, and wait for the device.
        if used[place] or bool(flags[place] > 0):
            parameter.grad = gradient.reshape(parameter.shape).to(parameter.dtype)
        else:
            parameter.grad = None
    return sums


def _gradient(parameter: Tensor) -> Tensor:
    """(numel,), 0 where there is none."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.detach().reshape(-1)


@torch.no_grad()
def moments(x: Tensor) -> Tensor:
    """The number of rows, and of every column its mean and the sum of squares about it.

    Args:
        x: (B, F).

    Returns:
        (1 + F + F,) float64; 0 of no rows.

    Example:
        >>> moments(torch.tensor([[1.0], [3.0]]))
        tensor([2., 2., 2.], dtype=torch.float64)
    """
    if len(x) == 0:
        return x.new_zeros(1 + 2 * x.shape[1], dtype=torch.float64)
    x = x.to(torch.float64)
    mean = x.mean(dim=0)
    return torch.cat([mean.new_full((1,), len(x)), mean, (x - mean).square().sum(dim=0)])


@torch.no_grad()
def merged(one: Tensor, other: Tensor) -> Tensor:
    """The `moments` of two groups of rows together. Those of no rows change nothing but rounding.

    Source: Chan, Golub & LeVeque (1983), "Algorithms for computing the sample variance".

    Example:
        >>> merged(moments(torch.tensor([[1.0], [3.0]])), moments(torch.tensor([[8.0]])))
        tensor([ 3.,  4., 26.], dtype=torch.float64)
    """
    sizes = [1, len(one) // 2, len(one) // 2]
    count, mean, squares = torch.split(one, sizes)
    own, own_mean, own_squares = torch.split(other, sizes)
    difference = own_mean - mean
    total = count + own
    divisor = total.clamp(min=1)
    between = difference.square() * count * own / divisor
    return torch.cat([total, mean + difference * own / divisor, squares + (own_squares + between)])
