"""Gradients of sums over rows that are gathered, a chunk at a time, into memory that stays.

So a device can replay them: there are few sizes of chunks, and what is done with one depends on
tensors alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vecpg.kernels import graphs

# Rows of a chunk, and numbers that its fully connected layers give: they are kept until the
# gradient is formed.
_ROWS = 2**18
_MOST_ACTIVATIONS = 2**26
# The smallest chunk is this part of the largest: of every size there is a graph.
_SMALLEST = 64

# What is gathered: of a tensor the rows (index) along its first dimension; or what a function makes
# of an index (B,).
Source = Tensor | Callable[[Tensor], Tensor]
# From padding (B,) bool, True = select this row away; settings, float64 without dimensions; and the
# sources' rows, to sums over rows without dimensions. The first is differentiated.
Terms = Callable[..., Sequence[Tensor]]


def rows_at_once(network: nn.Sequential) -> int:
    """How many rows go through fully connected layers together, forwards and backwards.

    Example:
        >>> rows_at_once(nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2)))
        262144
    """
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    return max(1, min(_ROWS, _MOST_ACTIVATIONS // sum(each.out_features for each in layers)))


def chunk_sizes(count: int, most: int) -> list[int]:
    """Sizes of the chunks that hold so many rows: the last a power of two, the others `most`.

    Example:
        >>> chunk_sizes(19, 8), chunk_sizes(8, 8), chunk_sizes(0, 8)
        ([8, 8, 4], [8], [])
    """
    whole, left = divmod(count, most)
    last = min(most, max(1 << (left - 1).bit_length(), most // _SMALLEST))
    return [most] * whole + [last] * (left > 0)


class _Chunk(NamedTuple):
    """Memory of chunks of one size, and what adds the gradient of what lies in it."""

    padding: Tensor
    rows: list[Tensor]
    add: Callable[[], None]


class Gradient:
    """The gradient of a sum over rows, and the sums, of one module.

    The host waits for nothing. The memory of chunks, gradients and sums is this object's own, and
    the same at every call.

    Args:
        module: may not get other parameters while this is used.
        terms: as `Terms`. Tensors apart, it depends on nothing that changes.
        num_terms: how many it returns.
        num_settings: how many it takes.
        most: rows of a chunk, at most.
        what: this gradient in words, for a log line.
        replayed: capture what is done with a chunk, once for every size, and replay it; else it is
            done operation by operation.

    Example:
        >>> line = nn.Linear(1, 1)
        >>> def errors(padding, settings, x):
        ...     return [(line(x)[:, 0].masked_fill(padding, 0.0) * settings[0]).sum()]
        >>> gradient = Gradient(line, errors, 1, 1, most=2, what="an example")
        >>> rows = torch.tensor([[1.0], [torch.nan], [2.0], [4.0]])
        >>> gradient.load(torch.tensor([0, 2, 3]), [rows], [3])
        >>> _ = gradient.add()
        >>> line.weight.grad, line.bias.grad
        (tensor([[21.]]), tensor([9.]))
    """

    def __init__(
        self,
        module: nn.Module,
        terms: Terms,
        num_terms: int,
        num_settings: int,
        *,
        most: int,
        what: str,
        replayed: bool = False,
    ) -> None:
        self.module, self.most = module, most
        self._terms, self._what, self._replayed = terms, what, replayed
        self._parameters = [each for each in module.parameters() if each.requires_grad]
        # Whoever makes it while they only infer may differentiate later.
        with torch.inference_mode(False):
            self._gradients = [torch.zeros_like(each) for each in self._parameters]
            device = self._parameters[0].device
            self._sums = torch.zeros(num_terms, dtype=torch.float64, device=device)
            self._settings = torch.zeros(num_settings, dtype=torch.float64, device=device)
        # Of each parameter, whether the first term depends on it.
        self._used = [True] * len(self._parameters)
        self._chunks: dict[int, _Chunk] = {}
        self._count = 0
        self._sources: Sequence[Source] = ()
        self._indices: list[Tensor] = []
        # Which of the indices lies in the memory of a size.
        self._holds: dict[int, int] = {}

    def load(
        self, places: Tensor, sources: Sequence[Source], settings: Sequence[Tensor | float]
    ) -> None:
        """Say which rows are summed over.

        Args:
            places: (C,) int64, of the rows.
            sources: of all rows; C of them are looked at, and no other.
            settings: without dimensions.
        """
        for own, given in zip(self._settings, settings, strict=True):
            if isinstance(given, Tensor):
                own.copy_(given)
            else:
                own.fill_(given)
        self._count, self._sources, self._holds = len(places), sources, {}
        sizes = chunk_sizes(len(places), self.most)
        # A row that is there already: of what is in no row a gradient might not be finite.
        again = places[-1:].expand(sum(sizes) - len(places))
        self._indices = list(torch.split(torch.cat([places, again]), sizes))
        for index in self._indices:
            if len(index) not in self._chunks:
                self._chunks[len(index)] = self._make(index)

    def _make(self, index: Tensor) -> _Chunk:
        """Capturing adds what lies in the memory to gradients and sums."""
        padding = torch.zeros(len(index), dtype=torch.bool, device=index.device)
        rows = [_rows(source, index) for source in self._sources]

        def add() -> None:
            self._add(padding, rows)

        if self._replayed:
            what = f"{self._what}, {len(index):,} rows at once"
            return _Chunk(padding, rows, graphs.capture(add, index.device, what))
        return _Chunk(padding, rows, add)

    def add(self) -> Tensor:
        """Leave the gradient of the first term in every `.grad`, and return all sums.

        A parameter on which it does not depend has none. The next call overwrites them.

        Returns:
            (num_terms,) float64.
        """
        torch._foreach_zero_(self._gradients)
        self._sums.zero_()
        for number, index in enumerate(self._indices):
            chunk = self._chunks[len(index)]
            if self._holds.get(len(index)) != number:
                self._fill(chunk, index, self._count - number * self.most)
                self._holds[len(index)] = number
            chunk.add()
        for parameter, gradient, used in zip(
            self._parameters, self._gradients, self._used, strict=True
        ):
            parameter.grad = gradient if used else None
        return self._sums.clone()

    def _fill(self, chunk: _Chunk, index: Tensor, count: int) -> None:
        """Gather rows, of which the first `count` are not padding."""
        chunk.padding[:count].fill_(False)
        chunk.padding[count:].fill_(True)
        for source, rows in zip(self._sources, chunk.rows, strict=True):
            if isinstance(source, Tensor):
                torch.index_select(source, 0, index, out=rows)
            else:
                rows.copy_(source(index))

    def _add(self, padding: Tensor, rows: list[Tensor]) -> None:
        """What is captured: add the gradient and the sums of a chunk to those of others."""
        with _the_same_bits():
            terms = self._terms(padding, self._settings.unbind(), *rows)
            # Not by `.grad`, which another stream may add to while this is captured.
            found = torch.autograd.grad(terms[0], self._parameters, allow_unused=True)
        self._used = [each is not None for each in found]
        own = [each for each, used in zip(self._gradients, self._used, strict=True) if used]
        torch._foreach_add_(own, [each for each in found if each is not None])
        self._sums += torch.stack([each.detach().to(torch.float64) for each in terms])


def _rows(source: Source, index: Tensor) -> Tensor:
    return source.index_select(0, index) if isinstance(source, Tensor) else source(index)


@contextmanager
def _the_same_bits() -> Iterator[None]:
    """Convolutions inside have the same gradient twice: without, cuDNN adds in any order."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
