"""Whether numbers are finite, for the price of adding them up.

It lies in this package because this package imports nothing else of vecpg.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether no tensor holds NaN or infinity, on their device. The host does not wait for it.

    Args:
        tensors: of real numbers, of any shapes, on one device; at least one.

    Returns:
        bool without dimensions.

    Example:
        >>> finite([torch.full((3, 3), 3e38), torch.tensor([0.0, torch.nan])])
        tensor(False)
    """
    return torch.cat([each.reshape(-1) for each in tensors]).isfinite().all()


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity.

    A sum that is finite proves it; only where it is not are numbers looked at one by one. The host
    waits for the device once.

    Args:
        tensors: of real numbers, of any shapes, on one device; at least one.

    Example:
        >>> all_finite([torch.ones(2), torch.full((3, 3), 3e38)])
        True
        >>> all_finite([torch.ones(2), torch.tensor([0.0, torch.nan])])
        False
    """
    flat = torch.cat([each.reshape(-1) for each in tensors])
    return math.isfinite(flat.sum().item()) or bool(finite([flat]))


def check_parameters(module: nn.Module, averages: Iterable[Tensor] = ()) -> None:
    """Refuse a module after a step that made one of its parameters NaN or infinite.

    Args:
        module: with parameters.
        averages: what its optimizer keeps of the gradients.

    Raises:
        FloatingPointError: with the parameter's name.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> check_parameters(layer)
        >>> layer.bias.data.fill_(torch.nan)
        tensor([nan])
        >>> check_parameters(layer)
        Traceback (most recent call last):
            ...
        FloatingPointError: bias is nan after the step
    """
    named = dict(module.named_parameters())
    if all_finite([*named.values(), *averages]):
        return
    for name, parameter in named.items():
        wrong = parameter[~parameter.isfinite()]
        if len(wrong):
            raise FloatingPointError(f"{name} is {wrong[0].item()} after the step")
    raise FloatingPointError("what Adam keeps of the gradients is not finite after the step")
