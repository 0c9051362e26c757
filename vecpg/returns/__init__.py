"""Discounted returns over ragged episodes.

The contract lives here: checks, the choice of a backend, and the call. Importing this needs torch
alone; nothing else of vecpg is imported.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from vecpg.returns import reference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MASK_MODES = ("cut", "skip", "decay")
_BACKENDS = ("auto", "reference", "cpu", "cuda")
_log = logging.getLogger(__name__)
_announced: set[str] = set()


def reward_to_go(
    rewards: Tensor,
    dones: Tensor,
    gamma: float | Tensor,
    *,
    final_values: Tensor | None = None,
    last_values: Tensor | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "cut",
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Discounted reward-to-go, restarting at the end of every episode.

        G[t] = r[t] + gamma[t] * (final_values[t] if dones[t] else G[t + 1]),   G[T] = last_values

    Values that are not given are 0. A masked row gets 0, and its reward, `dones` and `final_values`
    are ignored: they may hold NaN. What a masked row does to the rows before it is `mask_mode`:
    "cut" lets nothing through; "skip" is transparent, as if the row were not there; "decay" counts
    it as a row with reward 0, so the discount goes on.

    Args:
        rewards: (T, *batch) float32, float64, bfloat16 or float16, any strides. A (B, T) batch is
            passed as `rewards.mT`.
        dones: the shape of `rewards`, bool. True where the row's action ended its episode
            (terminated or truncated).
        gamma: discount per step in [0, 1]: a float, or a float tensor that broadcasts to
            `rewards`.
        final_values: the shape and dtype of `rewards`. The value of the state after the row, read
            where `dones`.
        last_values: (*batch), dtype of `rewards`. The value of the state after the last row, read
            where the last episode is still open.
        mask: the shape of `rewards`, bool. True = a real row.
        mask_mode: "cut", "skip" or "decay".
        out: a tensor like `rewards` to write to. It may not overlap an input, nor take part in
            gradients.
        backend: "auto" follows the device of `rewards`; "reference", "cpu" and "cuda" insist.

    Returns:
        (T, *batch), dtype and device of `rewards`; differentiable in `rewards`, `final_values`,
        `last_values` and a tensor `gamma`.

    Raises:
        TypeError: a dtype that is not as above, or an argument that is not a tensor.
        ValueError: shapes or devices that differ, gamma outside [0, 1], an unknown `mask_mode` or
            `backend`, an `out` that overlaps an input.
        RuntimeError: a backend that was asked for and is not there.

    Numerics: gamma is held and sums are formed in float64 and rounded once.
    Source: Williams (1992), section 3; Sutton & Barto (2018), section 13.3.

    Example:
        >>> rewards = torch.tensor([1.0, 1.0, 1.0])
        >>> dones = torch.tensor([False, True, False])
        >>> reward_to_go(rewards, dones, 0.5)
        tensor([1.5000, 1.0000, 1.0000])
        >>> reward_to_go(rewards, dones, 0.5, last_values=torch.tensor(4.0))
        tensor([1.5000, 1.0000, 3.0000])
    """
    _check_rewards(rewards)
    _check_like("dones", dones, rewards, torch.bool)
    if final_values is not None:
        _check_like("final_values", final_values, rewards, rewards.dtype)
    if last_values is not None:
        _check_like("last_values", last_values, rewards, rewards.dtype, rewards.shape[1:])
    if mask is not None:
        _check_like("mask", mask, rewards, torch.bool)
    if mask_mode not in _MASK_MODES:
        raise ValueError(f"mask_mode: expected one of {', '.join(_MASK_MODES)}, got {mask_mode!r}")
    discounts = _check_gamma(gamma, rewards)
    if out is not None:
        given = {"rewards": rewards, "dones": dones, "gamma": gamma, "mask": mask}
        given |= {"final_values": final_values, "last_values": last_values}
        _check_out(out, rewards, given)
    _check_backend(backend, rewards.device)

    result = reference.reward_to_go(
        rewards, dones, discounts, final_values, last_values, mask, mask_mode
    )
    return result if out is None else out.copy_(result)


def _check_rewards(rewards: Tensor) -> None:
    if not isinstance(rewards, Tensor):
        raise TypeError(f"rewards: expected a tensor, got {type(rewards).__name__}")
    if rewards.dtype not in _DTYPES:
        raise TypeError(
            f"rewards: expected float32, float64, bfloat16 or float16, got {_name(rewards.dtype)};"
            " pass rewards.float()"
        )
    if rewards.ndim == 0:
        raise ValueError("rewards: expected (T, *batch), got a tensor without dimensions")


def _check_like(
    name: str,
    value: Tensor,
    rewards: Tensor,
    dtype: torch.dtype,
    shape: torch.Size | None = None,
) -> None:
    shape = rewards.shape if shape is None else shape
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype != dtype:
        remedy = f"{name}.to(rewards.dtype)"
        if dtype == torch.bool:
            remedy = "terminations | truncations" if name == "dones" else f"{name}.bool()"
        raise TypeError(f"{name}: expected {_name(dtype)}, got {_name(value.dtype)}; pass {remedy}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != rewards.device:
        raise ValueError(
            f"{name}: expected a tensor on {rewards.device} like rewards, got {value.device};"
            f" pass {name}.to(rewards.device)"
        )


def _check_gamma(gamma: float | Tensor, rewards: Tensor) -> Tensor:
    """Check `gamma`, and return it in float64."""
    if not isinstance(gamma, Tensor):
        if isinstance(gamma, bool) or not isinstance(gamma, int | float):
            raise TypeError(f"gamma: expected a float or a tensor, got {type(gamma).__name__}")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma: expected a number in [0, 1], got {gamma}")
        return torch.tensor(gamma, dtype=torch.float64, device=rewards.device)
    if not gamma.dtype.is_floating_point:
        raise TypeError(f"gamma: expected a float tensor, got {_name(gamma.dtype)}")
    if gamma.device != rewards.device and not (gamma.ndim == 0 and gamma.device.type == "cpu"):
        raise ValueError(
            f"gamma: expected a tensor on {rewards.device} like rewards, got {gamma.device};"
            " pass gamma.to(rewards.device)"
        )
    try:
        gamma.expand(rewards.shape)
    except RuntimeError:
        raise ValueError(
            f"gamma: expected a shape that broadcasts to {tuple(rewards.shape)},"
            f" got {tuple(gamma.shape)}"
        ) from None
    readable = gamma.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and gamma.numel() and not bool(((gamma >= 0) & (gamma <= 1)).all()):
        raise ValueError(
            f"gamma: expected numbers in [0, 1], got {gamma.min().item()} to {gamma.max().item()}"
        )
    return gamma.to(device=rewards.device, dtype=torch.float64)


def _check_out(out: Tensor, rewards: Tensor, inputs: Mapping[str, object]) -> None:
    _check_like("out", out, rewards, rewards.dtype)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"out: expected no gradients, got {name} that requires them")
        if _share_memory(out, value):
            raise ValueError(
                f"out: expected memory of its own, got a tensor that overlaps {name};"
                " pass torch.empty_like(rewards)"
            )
    if any(size > 1 and step == 0 for size, step in zip(out.shape, out.stride(), strict=True)):
        raise ValueError("out: expected one place for each element, got an expanded tensor")


def _share_memory(one: Tensor, other: Tensor) -> bool:
    if one.numel() == 0 or other.numel() == 0:
        return False
    (start, end), (other_start, other_end) = _extent(one), _extent(other)
    return one.device == other.device and start < other_end and other_start < end


def _extent(tensor: Tensor) -> tuple[int, int]:
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _check_backend(backend: str, device: torch.device) -> None:
    if backend not in _BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(_BACKENDS)}, got {backend!r}")
    if backend in ("cpu", "cuda"):
        raise RuntimeError(
            f"backend: expected one that is in this version, got {backend!r}, which is not;"
            ' pass backend="reference" or "auto"'
        )
    if backend == "auto" and device.type not in _announced:
        _announced.add(device.type)
        _log.info("returns on %s: the reference backend, the only one so far", device.type)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = ["reward_to_go"]
