"""The operations on tensors (N,), for N copies at once, on any device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vecpg.envs import ops

# A number or a tensor of them. Two plain numbers give a plain number, in Python's precision.
Number = Any


class TensorOps:
    """`vecpg.envs.ops` on tensors of one dtype, whatever torch's default is.

    Example:
        >>> flags = torch.tensor([True, False])
        >>> TensorOps(torch.float64).where(flags, 0.1, 2)
        tensor([0.1000, 2.0000], dtype=torch.float64)
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._constants: dict[tuple[str, torch.device], Tensor] = {}

    def where(self, flag: Tensor, one: Number, other: Number) -> Tensor:
        """As `ops.where`."""
        if not isinstance(one, Tensor):
            one = self.constant(one, flag.device)
        return torch.where(flag, one, other)

    def constant(self, number: float | bool, device: torch.device) -> Tensor:
        """A tensor, made once: two plain numbers would be chosen from in torch's default dtype."""
        key = repr(number), device  # -0.0 is another one
        if key not in self._constants:
            dtype = torch.bool if isinstance(number, bool) else self.dtype
            self._constants[key] = torch.full((), number, dtype=dtype, device=device)
        return self._constants[key]

    def minimum(self, x: Number, y: Number) -> Number:
        """As `ops.minimum`."""
        if isinstance(x, Tensor):
            return torch.minimum(x, y) if isinstance(y, Tensor) else x.clamp(max=y)
        return self.minimum(y, x) if isinstance(y, Tensor) else ops.minimum(x, y)

    def maximum(self, x: Number, y: Number) -> Number:
        """As `ops.maximum`."""
        if isinstance(x, Tensor):
            return torch.maximum(x, y) if isinstance(y, Tensor) else x.clamp(min=y)
        return self.maximum(y, x) if isinstance(y, Tensor) else ops.maximum(x, y)

    def clip(self, x: Number, low: Number, high: Number) -> Number:
        """As `ops.clip`."""
        if isinstance(x, Tensor) and not isinstance(low, Tensor) and not isinstance(high, Tensor):
            return x.clamp(low, high)
        return self.minimum(self.maximum(x, low), high)


def _of_one_number(name: str) -> Callable[[TensorOps, Number], Number]:
    on_tensors, on_numbers = getattr(torch, name), getattr(ops, name)

    def function(self: TensorOps, x: Number) -> Number:
        return on_tensors(x) if isinstance(x, Tensor) else on_numbers(x)

    return function


for _name in ("sin", "cos", "exp", "log", "sqrt", "tanh", "floor"):
    setattr(TensorOps, _name, _of_one_number(_name))
