"""One gradient step over a whole rollout, a few rows at a time, so that memory stays flat."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vecpg.adam import Adam
from vecpg.kernels import threads
from vecpg.kernels.finite import all_finite, check_parameters, finite
from vecpg.kernels.gathered import Gradient, Source, rows_at_once
from vecpg.kernels.sums import Whole, gradient_in_order, here, in_order
from vecpg.noise import Purpose
from vecpg.policy import Policy
from vecpg.policy import cpu as policy_cpu
from vecpg.rollout.data import Rollout, when, which

if TYPE_CHECKING:
    from vecpg.config import Config

BACKENDS = ("auto", "reference", "cpu")

# Rows of one forward and backward pass. Measured on two cores: 2048 to 8192 are equally fast, and
# at 4096 the activations of a 64-wide network stay in the cache. Of images it is fewer.
CHUNK_ROWS = 4096
# Rows that one thread differentiates before it takes others; and into how many such slabs a rollout
# is divided at most, and what their gradients, of which each has one, hold together.
_SLAB_ROWS = 4096
_MOST_SLABS = 64
_MOST_NUMBERS = 2**22
# Random numbers that choose what one pass drops: drawing each takes some 100 bytes. On a GPU a pass
# of few rows takes as long as one of many.
_MOST_DROPOUT = 2**19
_MOST_DROPOUT_ON_CUDA = 2**22


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What an update did, as tensors without dimensions on the policy's device.

    policy_loss: the surrogate whose gradient was followed; its value means nothing by itself.
    entropy:     mean over counted rows, in nats, before the step.
    grad_norm:   length of the gradient before any clipping.
    finite:      bool, whether these and all parameters after the step are finite; None where that
                 was looked at, and they are.
    observed:    each shard's moments of observations, those of other ranks too, as they were taken
                 into the running ones; none where the policy does not normalize.
    """

    policy_loss: Tensor
    entropy: Tensor
    grad_norm: Tensor
    finite: Tensor | None = None
    observed: Sequence[Tensor] = ()

    def total(self) -> Tensor:
        """Their sum, in which NaN and infinity stay."""
        return self.policy_loss + self.entropy + self.grad_norm

    def not_finite(self) -> str | None:
        """Which of these is NaN or infinite, in words; None where none is.

        The host waits for the device once where none is.
        """
        if math.isfinite(self.total().item()):
            return None
        named = {
            "loss": self.policy_loss.item(),
            "entropy": self.entropy.item(),
            "gradient's norm": self.grad_norm.item(),
        }
        return ", ".join(
            f"the {name} is {number}" for name, number in named.items() if not math.isfinite(number)
        )


@dataclass(slots=True)
class Learner:
    """The way that the gradient goes, chosen once for a policy.

    backend: "reference", torch's autograd, or "cpu", machine code.
    reason:  why it is not "cpu"; None if it is.
    rows:    of the largest CUDA graph; None off CUDA.
    """

    backend: str
    reason: str | None
    rows: int | None = None
    # What was captured, once it is prepared: of the policy that was updated last.
    _gradient: Gradient | None = field(default=None, init=False, repr=False, compare=False)

    def __str__(self) -> str:
        if self.rows is not None:
            return f"by autograd, in CUDA graphs of {self.rows:,} rows"
        return "in machine code" if self.reason is None else f"by autograd: {self.reason}"

    @torch.inference_mode(False)
    @torch.enable_grad()
    def update(
        self,
        policy: Policy,
        optimizer: Adam | torch.optim.Optimizer,
        rollout: Rollout,
        advantages: Tensor,
        config: "Config",
        *,
        wait: bool = True,
        whole: Whole | None = None,
    ) -> UpdateStats:
        """As the function `update`."""
        if whole is None:
            whole = Whole(rollout.mask.shape[1], rollout.mask.sum())
        count = whole.counted
        if not isinstance(count, Tensor):
            count = torch.full((), count, device=policy.device)
        count = count.clamp(min=1)
        divisors: dict[str, Tensor | int] = {
            "episode": whole.num_envs,
            "step": count,
            "sum": 1,
        }
        divisor = divisors[config.reduction]
        if self.backend == "cpu" and rollout.action_masks is not None:
            raise ValueError(
                "rollout.action_masks: expected None for a learner in machine code, which knows of"
                " no masks; choose one with action_masks=True"
            )
        given = policy, rollout, advantages, divisor, config.ent_coef / count.to(torch.float32)
        shards = config.resolved_shards
        encoder, observed = policy.encoder, list[Tensor]()
        if encoder.normalizer is not None:
            parts = rollout.shards(shards)
            observed = [encoder.moments(each.obs, each.mask, each.counted) for each in parts]

        def add(vectors: Iterable[Tensor]) -> Tensor:
            total, observed[:] = combine(vectors, observed)
            return total

        combine = whole.combine
        options: dict[str, Any] = {"shards": shards, "add": in_order if combine is here else add}
        if self.backend == "cpu":
            surrogate, entropy = by_machine_code(*given, **options)
        else:
            surrogate, entropy = by_autograd(*given, **options, gradient=self._kept(policy))

        parameters = list(policy.parameters())  # that walk through all modules takes a while
        gradients = [p.grad for p in parameters if p.grad is not None]
        # What `nn.utils.get_total_norm` computes, without asking of each where it is.
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        stats = UpdateStats(surrogate, entropy / count, norm, observed=observed)
        if wait and (wrong := stats.not_finite()) is not None:
            suspect = _suspect(policy, rollout, advantages, config)
            raise FloatingPointError(
                f"{wrong}{when(rollout)}, and the policy was left as it was: {suspect}"
            )
        if config.max_grad_norm is not None:
            # What `nn.utils.clip_grads_with_norm_` computes, likewise.
            scale = (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, scale)
        try:
            optimizer.step()
            # Squares of the gradient make its norm, so what Adam keeps of them is finite.
            if wait and not all_finite(parameters):
                check_parameters(policy)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error}{when(rollout)}; lower --learning-rate (now {config.learning_rate:g})"
            ) from None
        encoder.merge(observed)
        if wait:
            return stats
        return replace(stats, finite=stats.total().isfinite() & finite(parameters))

    def prepare(self, policy: Policy) -> None:
        """Compile, or load, the kernels that learning this way will need.

        On CUDA: capture from now on what is done with rows, and replay it.
        """
        if self.backend == "cpu":
            policy_cpu.prepare(policy)
        elif self.rows is not None:
            self._gradient = gradient_of(policy, self.rows, replayed=True)

    def _kept(self, policy: Policy) -> Gradient | None:
        """The gradient whose graphs are kept, of this policy; None where none are."""
        kept = self._gradient
        if kept is not None and kept.module is not policy:
            kept = self._gradient = gradient_of(policy, kept.most, replayed=True)
        return kept


def choose_learner(policy: Policy, backend: str = "auto", *, action_masks: bool = False) -> Learner:
    """The way that `update` goes; it holds as long as the policy keeps its kind.

    Args:
        policy: on any device.
        backend: "reference" differentiates by torch's autograd, any policy on any device; "cpu" in
            machine code, a plain network on the CPU; "auto" takes "cpu" where it serves.
        action_masks: whether rollouts have them; autograd alone serves those.

    Raises:
        ValueError: an unknown backend; "cpu" where it does not serve.

    Example:
        >>> from gymnasium import spaces
        >>> box = spaces.Box(-1, 1, (4,))
        >>> str(choose_learner(Policy(box, spaces.Discrete(2))))
        'in machine code'
        >>> str(choose_learner(Policy(box, box)))
        'in machine code'
        >>> str(choose_learner(Policy(box, box, log_std="network")))
        'by autograd: its standard deviation comes from the network'
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    masked = "its actions are masked" if action_masks else None
    reason = "as asked" if backend == "reference" else masked or policy_cpu.why_not(policy)
    if backend == "cpu" and reason is not None:
        raise ValueError(
            f'backend="cpu": {reason}; use backend="reference" or "auto", which differentiate any'
            " policy"
        )
    rows = None if policy.device.type == "cpu" else chunk_rows_on_cuda(policy)
    return Learner("cpu" if reason is None else "reference", reason, rows)


def update(
    policy: Policy,
    optimizer: Adam | torch.optim.Optimizer,
    rollout: Rollout,
    advantages: Tensor,
    config: "Config",
    *,
    backend: "str | Learner" = "auto",
    wait: bool = True,
    whole: Whole | None = None,
) -> UpdateStats:
    """One step along the policy gradient estimate of a rollout.

        loss = -(sum of log pi(a_t|s_t) * advantages[t, n] over counted rows) / D
               - ent_coef * (mean entropy over counted rows)

    D is num_envs, the number of counted rows, or 1, by `config.reduction` "episode", "step" or
    "sum". Masked rows are never looked at. Running statistics of observations, where the policy
    normalizes, take the counted rows in after the step: until then they are those that acted.
    Sums over rows are formed for every shard and added in shard order. Whether gradients are on
    where this is called makes no difference.

    Args:
        policy: its gradients are overwritten and left in place.
        optimizer: over the policy's parameters.
        rollout: T steps of N environments, collected by this policy. Where it has `action_masks`,
            pi is the distribution over what they allow.
        advantages: (T, N) float32.
        config: `reduction`, `ent_coef`, `max_grad_norm` and `resolved_shards` are read.
        backend: as `choose_learner` takes it; a `Learner` was chosen before, and nothing is asked
            again.
        wait: for the device, to see whether all is well. If not, nothing is raised for numbers that
            are not finite: `UpdateStats.finite` says it.
        whole: of which the rollout is a part, with `config.resolved_shards` of its shards. Its
            num_envs and counted rows are D, and its `combine` is called once. Every rank makes the
            same step. None: the rollout is the whole.

    Returns:
        `UpdateStats`.

    Raises:
        FloatingPointError: with `wait`, loss, entropy or gradient are not finite, and nothing was
            changed; or a parameter is not finite after the step.
        ValueError: as `choose_learner`.
    """
    chosen = backend
    if not isinstance(chosen, Learner):
        chosen = choose_learner(policy, chosen, action_masks=rollout.action_masks is not None)
    return chosen.update(policy, optimizer, rollout, advantages, config, wait=wait, whole=whole)


def _suspect(policy: Policy, rollout: Rollout, advantages: Tensor, config: "Config") -> str:
    """What made an update's numbers not finite, as far as can be seen, and the setting to change.

    Looked for only where they are not: this reads every row.
    """
    wrong = (rollout.mask & ~advantages.isfinite()).nonzero()
    if len(wrong):
        t, n = wrong[0].tolist()
        values = ", or lower --value-learning-rate" if config.baseline == "value" else ""
        return (
            f"the advantage at step {t} of {which(rollout, n)} is {advantages[t, n].item()}, since"
            f" sums of rewards are beyond float32; scale the rewards{values}"
        )
    largest = {
        "advantage": advantages[rollout.mask].abs().max().item(),
        "parameter": max(each.detach().abs().max().item() for each in policy.parameters()),
        "entropy coefficient": config.ent_coef,
    }
    if rollout.obs.is_floating_point():
        largest["observation"] = rollout.obs[rollout.mask].abs().max().item()
    remedies = {
        "advantage": "scale the rewards" + ("" if config.normalize else ", or give --normalize"),
        "parameter": f"lower --learning-rate (now {config.learning_rate:g})",
        "entropy coefficient": "lower --ent-coef",
        "observation": "scale the observations"
        + ("" if config.normalize_obs else ", or give --normalize-obs"),
    }
    name = max(largest, key=lambda each: largest[each])
    return f"the largest {name} is {largest[name]:.3g}; {remedies[name]}"


def by_autograd(
    policy: Policy,
    rollout: Rollout,
    advantages: Tensor,
    divisor: Tensor | int,
    ent_coef: Tensor | float,
    *,
    shards: int = 1,
    add: Callable[[Iterable[Tensor]], Tensor] = in_order,
    gradient: Gradient | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of the sum over counted rows of -log pi * advantage / divisor - ent_coef * H.

    H is the entropy. Any policy, any device. The host waits for nothing, if the rollout says which
    rows count.

    Args:
        policy: gets the gradient; one that it had is overwritten.
        rollout: T steps of N environments.
        advantages: (T, N) float32.
        divisor: of the sum.
        ent_coef: what one row's entropy is worth.
        shards: groups of environments, each of which has sums of its own.
        add: gives the sum of vectors over all shards, others too; it is given those at hand.
        gradient: what `gradient_of` made for this policy, to be used again. None: one is made where
            the policy is on CUDA, and none is needed on the CPU.

    Returns:
        the first part of the sum, and the summed entropy, float64 without dimensions.
    """
    parts = rollout.shards(shards)
    weights = rollout.split(advantages, parts)
    gathered = gradient
    if gathered is None and policy.device.type != "cpu":
        gathered = gradient_of(policy, chunk_rows_on_cuda(policy))

    def differentiate(shard: int) -> Tensor:
        part, own = parts[shard], weights[shard]
        if gathered is None:
            return _add_gradient(policy, part, own, divisor, ent_coef)
        gathered.load(part.places(), _sources(policy, part, own), [divisor, ent_coef])
        return gathered.add()[1:]

    surrogate, entropy = gradient_in_order(policy, differentiate, len(parts), add)
    return surrogate, entropy


def chunk_rows_on_cuda(policy: Policy) -> int:
    """How many rows go through the policy together on CUDA, forwards and backwards."""
    rows = policy.encoder.rows_at_once(rows_at_once(policy.network))
    if policy.dropout_units:
        rows = max(1, min(rows, _MOST_DROPOUT_ON_CUDA // policy.dropout_units))
    return rows


def gradient_of(policy: Policy, rows: int, *, replayed: bool = False) -> Gradient:
    """What `by_autograd` adds up, of so many rows at a time; as `Gradient` replayed or not."""

    def terms(
        padding: Tensor,
        settings: tuple[Tensor, Tensor],
        obs: Tensor,
        actions: Tensor,
        weights: Tensor,
        *more: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        divisor, ent_coef = settings
        dropout, *masks = more if policy.dropout_units else (None, *more)
        log_probs, entropies = policy.log_probs_and_entropy(obs, actions, dropout, *masks)
        surrogate = -(log_probs * weights).masked_fill(padding, 0.0).sum() / divisor
        entropy = entropies.masked_fill(padding, 0.0).sum()
        return surrogate - ent_coef * entropy, surrogate, entropy

    return Gradient(policy, terms, 3, 2, most=rows, what="the update", replayed=replayed)


def _sources(policy: Policy, rollout: Rollout, advantages: Tensor) -> list[Source]:
    """What the terms of `gradient_of` take of a row, of all rows of a shard."""
    rows = rollout.mask.numel()
    sources: list[Source] = [
        rollout.obs.reshape(rows, *policy.obs_shape),
        rollout.actions.reshape(rows, *policy.action_shape),
        advantages.detach().reshape(rows),
    ]
    if policy.dropout_units:
        sources.append(lambda index: _dropout(policy, rollout, index))
    if rollout.action_masks is not None:
        sources.append(rollout.action_masks.reshape(rows, -1))
    return sources


def _add_gradient(
    policy: Policy,
    rollout: Rollout,
    advantages: Tensor,
    divisor: Tensor | int,
    ent_coef: Tensor | float,
) -> Tensor:
    """Add the gradient of a shard to every `.grad`, and return its two sums."""
    rows = rollout.mask.numel()
    mask = rollout.mask.reshape(rows)
    obs = rollout.obs.reshape(rows, *policy.obs_shape)
    actions = rollout.actions.reshape(rows, *policy.action_shape)
    masks = [] if rollout.action_masks is None else [rollout.action_masks.reshape(rows, -1)]
    weights = advantages.reshape(rows)
    sums = torch.zeros(2, dtype=torch.float64, device=obs.device)
    chunk_rows = policy.encoder.rows_at_once(CHUNK_ROWS)
    if policy.dropout_units:
        chunk_rows = max(1, min(chunk_rows, _MOST_DROPOUT // policy.dropout_units))
    for start in range(0, rows, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        counted = mask[chunk]
        dropout = None
        if policy.dropout_units:
            index = start + counted.nonzero()[:, 0]
            dropout = _dropout(policy, rollout, index)
        log_probs, entropies = policy.log_probs_and_entropy(
            obs[chunk][counted],
            actions[chunk][counted],
            dropout,
            *(each[chunk][counted] for each in masks),
        )
        surrogate = -(log_probs * weights[chunk][counted]).sum() / divisor
        entropy = entropies.sum()
        torch.autograd.backward(surrogate - ent_coef * entropy)
        sums[0] += surrogate.detach()
        sums[1] += entropy.detach()
    return sums


def _dropout(policy: Policy, rollout: Rollout, index: Tensor) -> Tensor:
    """The numbers that chose, when these rows were collected, what was dropped."""
    if rollout.stream is None:
        raise ValueError(
            "rollout.stream: expected the Stream that fixed what was dropped, got None; pass a"
            " rollout as `collect` made it"
        )
    num_envs = rollout.mask.shape[1]
    return rollout.stream.uniforms_at(
        index // num_envs, index % num_envs, Purpose.DROPOUT, policy.dropout_units
    )


def by_machine_code(
    policy: Policy,
    rollout: Rollout,
    advantages: Tensor,
    divisor: Tensor | int,
    ent_coef: Tensor | float,
    *,
    shards: int = 1,
    add: Callable[[Iterable[Tensor]], Tensor] = in_order,
) -> tuple[Tensor, Tensor]:
    """As `by_autograd`, in machine code: policies that `vecpg.policy.cpu` serves, on the CPU.

    Raises:
        ValueError: observations or actions that are not of the policy's spaces.
    """
    if rollout.obs.shape[2:] != policy.obs_shape:
        raise ValueError(
            f"rollout.obs: expected (T, N, *{policy.obs_shape}), got {tuple(rollout.obs.shape)};"
            " collect it with this policy"
        )
    found, expected = rollout.actions, (policy.action_shape, policy.action_dtype)
    if (found.shape[2:], found.dtype) != expected:
        raise ValueError(
            f"rollout.actions: expected (T, N, *{expected[0]}) of {expected[1]}, got"
            f" {tuple(found.shape)} of {found.dtype}; collect it with this policy"
        )
    parts = rollout.shards(shards)
    weights = rollout.split(advantages, parts)
    sums = sums_by_machine_code(policy, parts, weights, divisor, ent_coef)
    total = add(map(torch.from_numpy, sums))
    policy_cpu.set_gradients(policy, total[:-2].numpy())
    surrogate, entropy = total[-2:]
    return surrogate, entropy


def sums_by_machine_code(
    policy: Policy,
    shards: list[Rollout],
    advantages: list[Tensor],
    divisor: Tensor | int,
    ent_coef: Tensor | float,
) -> Iterator[NDArray[np.float64]]:
    """Of each shard the gradient, as `policy_cpu.sum_gradient` has it, and behind it two sums.

    They are those of `by_autograd`: the first part of the loss, and the entropy.
    """
    network, actions = policy_cpu.network_of(policy), policy_cpu.actions_of(policy)
    scale, bonus = 1.0 / float(divisor), float(ent_coef)
    # As many slabs for any number of threads: their sums are added in their order.
    numbers = len(network.forwards) + len(actions.log_std)
    most_slabs = max(1, min(_MOST_SLABS, _MOST_NUMBERS // numbers))
    slabs = [
        _slabs(shard, weights, network, most_slabs)
        for shard, weights in zip(shards, advantages, strict=True)
    ]
    # Shards that together have no more slabs than one may have: memory stays flat here too.
    at_once = max(1, most_slabs // max(map(len, slabs)))
    for first in range(0, len(slabs), at_once):
        flat = [slab for own in slabs[first : first + at_once] for slab in own]
        sums = np.zeros((len(flat), numbers + 2))

        def differentiate(number: int) -> bool:
            *sums[number, -2:], known = policy_cpu.sum_gradient(  # noqa: B023
                *flat[number],  # noqa: B023
                actions,
                scale,
                bonus,
                network,
                sums[number, :-2],  # noqa: B023
            )
            return bool(known)

        if not all(threads.run(differentiate, len(flat))):
            taken = torch.cat([shard.actions[shard.mask] for shard in shards])
            raise ValueError(
                f"rollout.actions: {_unknown(policy, taken)}; collect it with this policy"
            )
        for own in slabs[first : first + at_once]:
            yield sums[: len(own)].sum(axis=0)
            sums = sums[len(own) :]


def _unknown(policy: Policy, taken: Tensor) -> str:
    """What was expected of counted actions, and what they are."""
    if taken.is_floating_point():
        wrong = taken[~taken.isfinite()][0].item()
        return f"expected finite numbers where counted, got {wrong}"
    first = policy_cpu.first_action_of(policy)
    return (
        f"expected {first} to {first + policy.distribution.num_parameters - 1} where counted, got"
        f" {int(taken.min())} to {int(taken.max())}"
    )


def _slabs(
    rollout: Rollout, advantages: Tensor, network: policy_cpu.Network, most: int
) -> list[tuple[NDArray[Any], ...]]:
    """What `sum_gradient` takes first, of a shard's rows: at most so many slabs of them."""
    rows = rollout.mask.numel()
    numbers, components = np.empty(0, np.int64), np.empty((0, 0), np.float32)
    if rollout.actions.is_floating_point():
        components = rollout.actions.reshape(rows, -1).contiguous().numpy()
    else:
        numbers = rollout.actions.reshape(rows).contiguous().numpy()
    size = max(_SLAB_ROWS, -(-rows // most))
    every = (
        rollout.obs.reshape(rows, -1).contiguous().numpy(),
        numbers,
        components,
        advantages.detach().reshape(rows).numpy(),
        rollout.mask.reshape(rows).numpy(),
        rollout.kept(network),
    )
    return [tuple(each[at : at + size] for each in every) for at in range(0, rows, size)]
