"""Distributions over actions, by the action space. Parameters come from the policy's network.

Parameters are (P, B): one contiguous row for each parameter, because reductions over two or three
adjacent numbers are slow on a CPU. Draws are functions of uniform numbers that the caller gives.

An action mask is bool in the shape of the logits, True = allowed, with at least one True for every
component of an action. The distribution is then the one over what is allowed: the logits of the
rest count as minus infinity.
"""

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from vecpg.policy.network import check_numbers

# What the logarithm of a Gaussian's standard deviation stays between.
LOG_STD_RANGE = (-5.0, 2.0)


def masked(logits: Tensor, action_mask: Tensor | None) -> Tensor:
    """The logits, minus infinity where the mask is False. None allows everything."""
    return logits if action_mask is None else torch.where(action_mask, logits, -math.inf)


class Categorical(nn.Module):
    """pi(a) = softmax(logits)[a], for `Discrete` actions.

    num_parameters: how many numbers the network gives for an observation.
    num_uniforms:   how many uniform numbers a draw takes.
    mask_sizes:     how many values a mask speaks of, for every component of an action; none where
                    actions are not masked.
    shape, dtype:   of one action.
    """

    def __init__(self, space: spaces.Discrete) -> None:
        super().__init__()
        self.space = space
        self.num_actions = self.num_parameters = int(space.n)
        self.first_action = int(space.start)
        self.num_uniforms = 1
        self.mask_sizes = [self.num_actions]
        self.shape: tuple[int, ...] = ()
        self.dtype = torch.int64

    def sample(self, logits: Tensor, uniforms: Tensor, action_mask: Tensor | None = None) -> Tensor:
        """Draw by inverting the distribution function: (actions, B) and (1, B) to (B,) int64."""
        if action_mask is not None:
            return self._sample_allowed(logits, uniforms, action_mask)
        below = torch.softmax(logits, dim=0)[:-1]
        if self.num_actions > 2:
            below = below.cumsum(dim=0)
        passed = (below <= uniforms).sum(dim=0)
        return passed + self.first_action if self.first_action else passed

    def _sample_allowed(self, logits: Tensor, uniforms: Tensor, action_mask: Tensor) -> Tensor:
        below = torch.softmax(masked(logits, action_mask), dim=0).cumsum(dim=0)
        # Counted among the allowed alone: whatever rounding has made of the sums, of which the last
        # may be less than the number, it is one of them.
        passed = (action_mask & (below <= uniforms)).sum(dim=0)
        number = action_mask.cumsum(dim=0)
        passed = torch.minimum(passed, number[-1] - 1)
        return (number <= passed).sum(dim=0) + self.first_action

    def mode(self, logits: Tensor, action_mask: Tensor | None = None) -> Tensor:
        """The most probable action."""
        return masked(logits, action_mask).argmax(dim=0) + self.first_action

    def log_probs_and_entropy(
        self, logits: Tensor, actions: Tensor, action_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The logarithm of pi(actions), and the entropy in nats, (B,) each."""
        log_probs = torch.log_softmax(masked(logits, action_mask), dim=0)
        taken = log_probs.gather(0, (actions - self.first_action)[None])[0]
        if action_mask is not None:
            # The limit of p log p is 0; 0 times infinity would be NaN, in the gradient too.
            log_probs = log_probs.masked_fill(~action_mask, 0.0)
            probs = log_probs.exp().masked_fill(~action_mask, 0.0)
            return taken, -(probs * log_probs).sum(dim=0)
        return taken, -(log_probs.exp() * log_probs).sum(dim=0)

    def for_env(self, actions: NDArray[Any]) -> NDArray[Any]:
        """A copy of actions (B, ...) as the environment takes them: it may write into them."""
        return actions.astype(self.space.dtype)

    def clipped(self, actions: Tensor) -> Tensor:
        """The same for an environment on tensors."""
        return actions


class MultiCategorical(nn.Module):
    """Independent categorical distributions, for `MultiDiscrete` actions of one dimension.

    And for `MultiBinary` actions of any shape: each component is 0 or 1.
    """

    def __init__(self, space: spaces.MultiDiscrete | spaces.MultiBinary) -> None:
        super().__init__()
        self.space = space
        if isinstance(space, spaces.MultiBinary):
            ranges = [(2, 0)] * math.prod(space.shape)
        elif space.nvec.ndim == 1:
            ranges = [*zip(space.nvec.tolist(), space.start.tolist(), strict=True)]
        else:
            raise ValueError(
                f"action space {space} is not supported; supported: MultiDiscrete of one dimension"
            )
        self.parts = [Categorical(spaces.Discrete(n, start=start)) for n, start in ranges]
        self.num_parameters = sum(part.num_actions for part in self.parts)
        self.num_uniforms = len(self.parts)
        masks = isinstance(space, spaces.MultiDiscrete)
        self.mask_sizes = [part.num_actions for part in self.parts] if masks else []
        self.shape: tuple[int, ...] = (len(self.parts),)
        self.dtype = torch.int64

    def sample(self, logits: Tensor, uniforms: Tensor, action_mask: Tensor | None = None) -> Tensor:
        """(sum of actions, B) and (components, B) to (B, components) int64."""
        drawn = [
            part.sample(own, uniforms[i : i + 1], mask)
            for i, (part, own, mask) in enumerate(self._split(logits, action_mask))
        ]
        return torch.stack(drawn, dim=1)

    def mode(self, logits: Tensor, action_mask: Tensor | None = None) -> Tensor:
        """The most probable action."""
        best = [part.mode(own, mask) for part, own, mask in self._split(logits, action_mask)]
        return torch.stack(best, dim=1)

    def log_probs_and_entropy(
        self, logits: Tensor, actions: Tensor, action_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The logarithm of pi(actions), and the entropy in nats, summed over the components."""
        pairs = [
            part.log_probs_and_entropy(own, actions[:, i], mask)
            for i, (part, own, mask) in enumerate(self._split(logits, action_mask))
        ]
        log_probs, entropies = zip(*pairs, strict=True)
        return torch.stack(log_probs).sum(dim=0), torch.stack(entropies).sum(dim=0)

    def for_env(self, actions: NDArray[Any]) -> NDArray[Any]:
        """A copy of actions (B, A) as the environment takes them: it may write into them."""
        return actions.astype(self.space.dtype).reshape(len(actions), *self.space.shape)

    def clipped(self, actions: Tensor) -> Tensor:
        """The same for an environment on tensors."""
        return actions

    def _split(self, logits: Tensor, action_mask: Tensor | None) -> Any:
        sizes = [part.num_actions for part in self.parts]
        masks = [None] * len(sizes) if action_mask is None else torch.split(action_mask, sizes)
        return zip(self.parts, torch.split(logits, sizes), masks, strict=True)


class DiagonalGaussian(nn.Module):
    """Independent normal distributions, for `Box` actions.

    The mean comes from the network. The logarithm of the standard deviation is a parameter of its
    own, or comes from the network too; a smooth function of it keeps it inside `LOG_STD_RANGE`, so
    that near an end a gradient still leads back. Actions are clipped to the space's
    bounds for the environment only: gradients are those of the action that was drawn.
    """

    def __init__(self, space: spaces.Box, log_std: str = "parameter") -> None:
        super().__init__()
        if not np.issubdtype(space.dtype, np.floating):
            raise ValueError(
                f"action space {space} is not supported; supported: Box of floating-point numbers"
            )
        self.space = space
        self.size = math.prod(space.shape)
        self.shape: tuple[int, ...] = (self.size,)
        self.dtype = torch.float32
        self.num_uniforms = 2 * math.ceil(self.size / 2)
        self.mask_sizes: list[int] = []
        self.num_parameters = self.size * (2 if log_std == "network" else 1)
        self.low: Tensor
        self.high: Tensor
        for name, bound in (("low", space.low), ("high", space.high)):
            self.register_buffer(name, torch.from_numpy(bound.astype(np.float32)), persistent=False)
        self.raw_log_std: nn.Parameter | None = None
        if log_std == "parameter":
            self.raw_log_std = nn.Parameter(torch.zeros(self.size, dtype=torch.float32))

    def mean_and_log_std(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) means, and (A, B) or (A, 1) logarithms of standard deviations."""
        own = self.raw_log_std
        raw = parameters[self.size :] if own is None else own[:, None]
        low, high = LOG_STD_RANGE
        return parameters[: self.size], low + (high - low) * _inside(raw)

    @torch.no_grad()
    def log_std_slope(self) -> Tensor:
        """(A,) float64, the derivative of the logarithm of the standard deviation in its parameter.

        Near an end of `LOG_STD_RANGE` float32 would leave it few digits.
        """
        assert self.raw_log_std is not None
        low, high = LOG_STD_RANGE
        inside = _inside(self.raw_log_std.double())
        return (high - low) * inside * (1 - inside)

    def sample(self, parameters: Tensor, uniforms: Tensor) -> Tensor:
        """(A or 2 A, B) and (A rounded up to even, B) to (B, A) float32.

        Source: Box & Muller (1958), "A note on the generation of random normal deviates".
        """
        mean, log_std = self.mean_and_log_std(parameters)
        radii, turns = uniforms.chunk(2)
        radii = torch.sqrt(-2 * torch.log1p(-radii))
        angles = 2 * math.pi * turns
        normals = radii * torch.cos(angles)
        if self.size > 1:
            normals = torch.cat([normals, radii * torch.sin(angles)])[: self.size]
        return (mean + log_std.exp() * normals).mT.contiguous()

    def mode(self, parameters: Tensor) -> Tensor:
        """The mean."""
        return self.mean_and_log_std(parameters)[0].mT.contiguous()

    def log_probs_and_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The log-density of (B, A) actions, and the differential entropy in nats, (B,) each."""
        mean, log_std = self.mean_and_log_std(parameters)
        scaled = (actions.mT - mean) * (-log_std).exp()
        each = -0.5 * scaled.square() - log_std - 0.5 * math.log(2 * math.pi)
        entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).expand(mean.shape)
        return each.sum(dim=0), entropy.sum(dim=0)

    def for_env(self, actions: NDArray[Any]) -> NDArray[Any]:
        """(B, A) as the environment takes them: (B, *shape), inside the bounds.

        Raises:
            FloatingPointError: one is NaN or infinite.
        """
        # What passes this, in a single fast sum, is finite.
        if not math.isfinite(np.vdot(actions, actions)) and not np.isfinite(actions).all():
            index = int((~np.isfinite(actions)).any(axis=1).argmax())
            raise FloatingPointError(
                f"the policy's action in environment {index} is {actions[index].tolist()}: its"
                " parameters have grown too large; lower --learning-rate"
            )
        shaped = actions.reshape(len(actions), *self.space.shape).astype(self.space.dtype)
        return np.clip(shaped, self.space.low, self.space.high)

    def clipped(self, actions: Tensor) -> Tensor:
        """The same for an environment on tensors."""
        shaped = actions.reshape(len(actions), *self.space.shape)
        return shaped.clamp(self.low, self.high)


def _inside(raw: Tensor) -> Tensor:
    """Where in `LOG_STD_RANGE` a parameter of any size leads, from 0 to 1."""
    low, high = LOG_STD_RANGE
    # 0 gives 0: a standard deviation of 1.
    return torch.sigmoid(raw + math.log(-low / high))


def distribution_for(
    space: spaces.Space[Any], log_std: str
) -> Categorical | MultiCategorical | DiagonalGaussian:
    """The distribution over a space's actions.

    Raises:
        ValueError: a space that is not supported.
    """
    check_numbers("action", space)
    if isinstance(space, spaces.Discrete):
        return Categorical(space)
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        return MultiCategorical(space)
    if isinstance(space, spaces.Box):
        return DiagonalGaussian(space, log_std)
    raise ValueError(
        f"action space {space} is not supported; supported: Discrete, MultiBinary, MultiDiscrete,"
        " Box"
    )
