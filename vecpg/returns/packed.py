"""Packed sequences as one column of rows, for what has no kernel of its own."""

import torch
from torch import Tensor

from vecpg.kernels import kept
from vecpg.returns import operator
from vecpg.returns.checks import is_eager, is_plain


def ends_of(
    offsets: Tensor, rewards: Tensor, final_values: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`dones` at the last row of each sequence, and the values that follow there, or 0."""
    total, stops = rewards.shape[0], offsets[1:]
    has_rows = stops > offsets[:-1]
    # A sequence without rows writes behind the last element, which is then cut off.
    lasts = torch.where(has_rows, stops - 1, total)
    if rewards.device.type == "cpu" and is_eager():
        dones = kept.vector(total, torch.bool).zero_()
        dones[stops[has_rows] - 1] = True
    else:
        dones = torch.zeros(total + 1, dtype=torch.bool, device=rewards.device)
        dones = dones.index_fill(0, lasts, True)[:-1]
    if final_values is None:
        return dones, None
    return dones, rewards.new_zeros(total + 1).index_copy(0, lasts, final_values)[:-1]


def packed_advantages(
    rewards: Tensor,
    values: Tensor | None,
    offsets: Tensor,
    gamma: float,
    gammas: Tensor | None,
    gae_lambda: float,
    lambdas: Tensor | None,
    final_values: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
) -> Tensor:
    """Advantages of packed sequences on the CPU; see `operator.differentiable_advantage`."""
    dones, ending = ends_of(offsets, rewards, final_values)
    arguments = rewards, values, dones, gamma, gammas, gae_lambda, lambdas, ending, None, mask
    if is_plain((rewards, values, gammas, lambdas, ending, mask)):
        out = kept.empty_like(rewards)
        operator.write_advantage(*arguments, mask_mode, False, True, out)
        return out
    return operator.differentiable_advantage(*arguments, mask_mode, False, True)


class Lengthened:
    """The column with a row more behind each sequence, which is real and ends it.

    A masked row's `dones` and `final_values` are ignored, so where a sequence's last row is masked
    what follows the sequence has no other place.
    """

    def __init__(self, offsets: Tensor, total: int) -> None:
        sequences, device = offsets.shape[0] - 1, offsets.device
        after = offsets[1:].clamp(0, total)  # whatever offsets hold, no place lies outside
        over = torch.zeros(total + 1, dtype=torch.int64, device=device)
        over = over.index_add(0, after, torch.ones_like(after)).cumsum(0)[:-1]
        self.rows = torch.arange(total, device=device) + over
        self._added = after + torch.arange(sequences, device=device)
        order = torch.arange(total + sequences, device=device)
        places = torch.cat([self.rows, self._added])
        self._order = torch.zeros_like(order).scatter(0, places, order)
        self.dones = torch.zeros_like(order, dtype=torch.bool).index_fill(0, self._added, True)

    def put(self, rows: Tensor, added: float | Tensor) -> Tensor:
        """What rows have, and those that are added."""
        if not isinstance(added, Tensor):
            added = torch.full_like(self._added, added, dtype=rows.dtype)
        return torch.cat([rows, added])[self._order]
