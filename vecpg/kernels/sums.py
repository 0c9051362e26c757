"""Sums in a fixed order: each shard's, formed as if it were alone, and then all in shard order.

Whoever adds up over environments does it here, so that no bit depends on who formed which shard's.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

Sum = TypeVar("Sum")
Result = TypeVar("Result")


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


# Adds up over shards, those of other ranks too. It is given the numbers of the shards at hand,
# float64 of one shape (K,), and what is to be kept apart of each, (M,); it returns the sum over all
# shards, in their order, and what is kept of all of them, in that order. Every rank calls it at the
# same times, with the same K and M.
Combine = Callable[[Iterable[Tensor], Sequence[Tensor]], tuple[Tensor, list[Tensor]]]


def here(added: Iterable[Tensor], kept: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
    """A `Combine` where all shards are at hand."""
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
    module: nn.Module, differentiate: Callable[[int], Result], shards: int
) -> list[Result]:
    """Leave in every parameter's `.grad` the shards' gradients, added in their order.

    Args:
        module: whose gradients are overwritten.
        differentiate: adds the gradient of the shard of that number to every `.grad`.
        shards: how many there are.

    Returns:
        what `differentiate` returned for each.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> gradient_in_order(layer, lambda k: layer(Tensor([[k + 1.0]])).sum().backward(), 3)
        [None, None, None]
        >>> layer.weight.grad
        tensor([[6.]])
    """
    parameters = list(module.parameters())
    results = []
    total: list[Tensor | None] = []
    for shard in range(shards):
        for parameter in parameters:
            parameter.grad = None
        results.append(differentiate(shard))
        own = [parameter.grad for parameter in parameters]
        total = [_sum_of(*pair) for pair in zip(total, own, strict=True)] if total else own
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient
    return results


def _sum_of(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """A parameter that a shard did not use has no gradient there."""
    if one is None or other is None:
        return one if other is None else other
    return one + other
