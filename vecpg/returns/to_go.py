"""Discounted reward-to-go, of rollouts and of packed episodes."""

import torch
from torch import Tensor

from vecpg.kernels import kept
from vecpg.returns import operator, reference
from vecpg.returns.backend import is_served, say_cpu, writable
from vecpg.returns.checks import (
    check_gamma,
    check_out,
    check_packed,
    check_rewards,
    check_row_inputs,
    has_derivatives,
    is_common,
    is_commonly_packed,
    is_plain,
)
from vecpg.returns.packed import Lengthened, ends_of, packed_advantages


def reward_to_go(
    rewards: Tensor,
    dones: Tensor | None = None,
    gamma: float | Tensor = None,  # type: ignore[assignment]  # needed, though dones are not
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
    "cut" lets nothing through; "skip" is transparent, as if the row were not there; "decay" and
    "zero" count it as a row with reward 0, so the discount goes on (they differ for advantages).

    Args:
        rewards: (T, *batch) float32, float64, bfloat16 or float16, any strides. A (B, T) batch is
            passed as `rewards.mT`.
        dones: the shape of `rewards`, bool. True where the row's action ended its episode
            (terminated or truncated). None: no row does.
        gamma: discount per step in [0, 1]: a float, or a float tensor that broadcasts to
            `rewards`, such as (B,) for a (B, T) batch passed as `.mT`. There is no default.
        final_values: the shape and dtype of `rewards`. The value of the state after the row, read
            where `dones`.
        last_values: (*batch), dtype of `rewards`. The value of the state after the last row, read
            where the last episode is still open.
        mask: the shape of `rewards`. True or 1 = a real row, False or 0 = none: bool (fastest),
            integers or floats.
        mask_mode: "cut", "skip", "decay" or "zero".
        out: a tensor like `rewards` to write to. It may not overlap an input, nor take part in
            gradients.
        backend: "auto" follows the device of `rewards`; "reference", "cpu" and "cuda" insist.

    Returns:
        (T, *batch), dtype and device of `rewards`; differentiable in `rewards`, `final_values`,
        `last_values` and a tensor `gamma`.

    Raises:
        TypeError: a dtype that is not as above, or an argument that is not a tensor.
        ValueError: shapes or devices that differ, gamma outside [0, 1], a mask that holds something
            else than 0 and 1, an unknown `mask_mode` or `backend`, an `out` that overlaps an input.
            (On CUDA, and while a compiler traces, what the tensors hold is not looked at.)
        RuntimeError: a backend that was asked for and is not there.

    Numerics: gamma is held and sums are formed in float64 and rounded once; to 16 bits by way of
    float32. No bit depends on the number of threads.
    Memory: on the CPU a result of a mebibyte or more lies in memory that is kept for the next when
    nobody refers to it any more, up to 256 MiB of it. It cannot grow: `resize_` to more elements
    raises RuntimeError.
    Source: Williams (1992), section 3; Sutton & Barto (2018), section 13.3.

    Example:
        >>> rewards = torch.tensor([1.0, 1.0, 1.0])
        >>> dones = torch.tensor([False, True, False])
        >>> reward_to_go(rewards, dones, 0.5)
        tensor([1.5000, 1.0000, 1.0000])
        >>> reward_to_go(rewards, dones, 0.5, last_values=torch.tensor(4.0))
        tensor([1.5000, 1.0000, 3.0000])
        >>> reward_to_go(rewards, gamma=0.5, mask=torch.tensor([1, 1, 0]))
        tensor([1.5000, 1.0000, 0.0000])
    """
    if (
        final_values is last_values is None
        and dones is not None
        and backend == "auto"
        and is_common(rewards, dones, gamma, mask, mask_mode, out)
    ):
        say_cpu()
        out = writable(rewards, out)
        operator.write_common(rewards, dones, float(gamma), mask, mask_mode, out)
        return out
    check_rewards(rewards)
    dones, mask = check_row_inputs(rewards, dones, final_values, last_values, mask, mask_mode)
    scalar, gammas = check_gamma("gamma", gamma, rewards)
    given: dict[str, object] = {"rewards": rewards, "dones": dones, "gamma": gamma, "mask": mask}
    given = {**given, "final_values": final_values, "last_values": last_values}
    if out is not None:
        check_out(out, rewards, given)
    if not is_served(backend, rewards):
        discounts = torch.full((), scalar, dtype=torch.float64, device=rewards.device)
        discounts = discounts if gammas is None else gammas
        result = reference.reward_to_go(
            rewards, dones, discounts, final_values, last_values, mask, mask_mode
        )
        return result if out is None else out.copy_(result)
    arguments = (rewards, dones, scalar, gammas, final_values, last_values, mask, mask_mode)
    if is_plain((*given.values(), out)):
        out = writable(rewards, out)
        operator.write(*arguments, out)
        return out
    result = operator.differentiable(*arguments)
    return result if out is None else out.copy_(result)


def packed_reward_to_go(
    rewards: Tensor,
    offsets: Tensor,
    gamma: float | Tensor,
    *,
    final_values: Tensor | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "cut",
    backend: str = "auto",
) -> Tensor:
    """Discounted reward-to-go of episodes that lie one after the other.

        G[t] = r[t] + gamma[t] * G[t + 1],   offsets[i] <= t < offsets[i + 1],
                                             G[offsets[i + 1]] = final_values[i]

    Each episode gets what `reward_to_go` gives it alone, with its final value as `last_values`.

    Args:
        rewards: (total,) float32, float64, bfloat16 or float16, any stride.
        offsets: (B + 1,) int64 or int32 from 0 to total, never decreasing: the layout of a jagged
            NestedTensor, and the `cu_seqlens` of attention kernels. Equal neighbours are an
            episode without steps.
        gamma: discount per step in [0, 1]: a float, or a float tensor (total,). One for each
            episode is passed as `gammas.repeat_interleave(offsets.diff())`.
        final_values: (B,), dtype of `rewards`. The value after each episode's last step; 0 if not
            given.
        mask: (total,), as in `reward_to_go`.
        mask_mode: as in `reward_to_go`.
        backend: as in `reward_to_go`.

    Returns:
        (total,), dtype and device of `rewards`; differentiable in `rewards`, `final_values` and a
        tensor `gamma`.

    Raises:
        TypeError: a dtype that is not as above, or an argument that is not a tensor.
        ValueError: shapes or devices that differ, offsets, a gamma or a mask that are not as above.
            (On CUDA, and while a compiler traces, what the tensors hold is not looked at.)
        RuntimeError: a backend that was asked for and is not there.

    Numerics, memory and source: as `reward_to_go`.

    Example:
        >>> rewards = torch.tensor([1.0, 1.0, 1.0])
        >>> packed_reward_to_go(rewards, torch.tensor([0, 2, 3]), 0.5)
        tensor([1.5000, 1.0000, 1.0000])
    """
    if (
        final_values is mask is None
        and mask_mode == "cut"
        and backend == "auto"
        and is_commonly_packed(rewards, offsets, gamma)
        and operator.is_partition(offsets, rewards.shape[0])
    ):
        say_cpu()
        out = kept.empty_like(rewards)
        operator.write_packed(rewards, offsets, gamma, None, out)
        return out
    check_rewards(rewards)
    offsets, mask = check_packed(rewards, offsets, final_values, mask, mask_mode, "reward_to_go")
    scalar, gammas = check_gamma("gamma", gamma, rewards, offsets.shape[0] - 1)
    discount = scalar if gammas is None else gammas
    served = is_served(backend, rewards)
    on_cpu = served and rewards.device.type == "cpu"
    is_simple = gammas is None if on_cpu else mask is None
    if served and is_simple and is_plain((rewards, offsets, gamma, final_values, mask)):
        out = kept.empty_like(rewards)
        if mask is None:
            operator.write_packed(rewards, offsets, discount, final_values, out)
        else:
            operator.write_masked_packed(
                rewards, offsets, scalar, final_values, mask, mask_mode, out
            )
        return out
    if on_cpu and not has_derivatives(gamma):
        return packed_advantages(
            *(rewards, None, offsets, scalar, gammas, 1.0, None, final_values, mask, mask_mode)
        )
    if mask is None:
        dones, values = ends_of(offsets, rewards, final_values)
        return reward_to_go(rewards, dones, discount, final_values=values, backend=backend)
    longer = Lengthened(offsets, rewards.shape[0])
    result = reward_to_go(
        longer.put(rewards, 0.0 if final_values is None else final_values),
        longer.dones,
        scalar if gammas is None else longer.put(gammas, 0.0),
        mask=longer.put(mask, True),
        mask_mode=mask_mode,
        backend=backend,
    )
    return result[longer.rows]
