"""Sums by age in plain torch, on any device: the same bits at every repeat, without a wait."""

import torch
from torch import Tensor


def sums_by_age(weights: Tensor, mask: Tensor, dones: Tensor) -> Tensor:
    """See `vecpg.advantage.ages.sums_by_age`."""
    return torch.stack([own.sum(dim=1) for own in _of_each(weights, mask, dones)[:2]])


def subtract_mean_by_age(
    weights: Tensor, mask: Tensor, dones: Tensor, sums: Tensor, others: bool
) -> None:
    """See `vecpg.advantage.ages.subtract_mean_by_age`."""
    total, count = sums[:, : len(mask), None]
    own_total, own_count, age = _of_each(weights, mask, dones)
    if others:
        means = (total - own_total) / (count - own_count)
        means = torch.where(count > own_count, means, 0.0)
    else:
        means = (total / count).expand(own_total.shape)
    weights.copy_(torch.where(mask, weights - means.gather(0, age), 0.0))


def first_rows(mask: Tensor, dones: Tensor) -> Tensor:
    """(T, N) int64: the row in which each counted row's episode began."""
    begins = mask.clone()
    begins[1:] &= dones[:-1] | ~mask[:-1]
    steps = torch.arange(mask.shape[0], device=mask.device)[:, None]
    return torch.where(begins, steps, 0).cummax(dim=0).values


def _of_each(weights: Tensor, mask: Tensor, dones: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum and number of the weights of each (age, environment), and every row's age."""
    length, num_envs = mask.shape
    steps = torch.arange(length, device=mask.device)[:, None]
    age = steps - first_rows(mask, dones)
    place = age * num_envs + torch.arange(num_envs, device=mask.device)
    rows = torch.stack([torch.where(mask, weights, 0.0).to(torch.float64), mask], dim=-1)
    sums = torch.zeros(length * num_envs, 2, dtype=torch.float64, device=mask.device)
    # On CUDA `index_put_` sorts the places and adds in their order; `scatter_add_` adds atomically.
    sums.index_put_((place.reshape(-1),), rows.reshape(-1, 2), accumulate=True)
    total, count = sums.reshape(length, num_envs, 2).unbind(dim=-1)
    return total, count, age
