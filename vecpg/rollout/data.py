"""What one collection gives, how it grows, and which rows count."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vecpg.envs import EnvironmentFailure
from vecpg.memory import in_words, ran_out
from vecpg.noise import Stream

# What an environment does at a row.
FINISHED, PLAYING, RESETTING = 0, 1, 2

# The start window's rule, for every collector: NEXT[now, ends, more] is what an environment does
# at the next row. `ends`: its action ended the episode. `more`: it has made fewer than `num_steps`
# real steps, this one among them (and, in evaluation, finished fewer episodes than its quota).
#
#     now          ends  more  next          the row counts
#     PLAYING      no    any   PLAYING       yes
#     PLAYING      yes   yes   RESETTING     yes
#     PLAYING      yes   no    FINISHED      yes
#     RESETTING    any   any   PLAYING       no: Gymnasium's NEXT_STEP mode resets at this row
#     FINISHED     any   any   FINISHED      no
NEXT: NDArray[np.int8] = np.array(
    [
        [[FINISHED, FINISHED], [FINISHED, FINISHED]],
        [[PLAYING, PLAYING], [FINISHED, RESETTING]],
        [[PLAYING, PLAYING], [PLAYING, PLAYING]],
    ],
    np.int8,
)

_FIELDS = ("obs", "actions", "rewards", "terminations", "truncations", "mask")
_ON_HOST = {
    torch.float32: np.float32,
    torch.int64: np.int64,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}


class Activations(NamedTuple):
    """Hidden layers' activations that were computed while a rollout was collected.

    kept:    (R, N, units) float32, of the first R steps; where masked, anything.
    network: whose they are, a `vecpg.policy.cpu.Network`.
    of:      the rollout's obs and mask, and how often torch had changed each in place. Whoever
             writes to them through NumPy goes on from activations of what stood there before.
    """

    kept: NDArray[np.float32]
    network: tuple[Any, ...]
    of: tuple[tuple[Tensor, int], tuple[Tensor, int]]


@dataclass(frozen=True, slots=True)
class Rollout:
    """T steps of N environments; row t holds what happened at step t.

    The rows that count make whole episodes: of each environment those it started inside the start
    window, from their first action to their last. Everything else is masked: the step that only
    resets an environment, and whatever an environment does after its last counted episode.

    obs:          (T, N, *obs_shape) float32   what the policy saw before acting; uint8 where they
                                               are a Box of uint8, int64 where they are Discrete or
                                               MultiDiscrete
    actions:      (T, N) int64                 taken on `obs`; (T, N, A) int64 for MultiDiscrete
                                               and MultiBinary, and float32 for Box, as drawn,
                                               before any clipping
    rewards:      (T, N) float32               paid for `actions`, environment units; 0 where masked
    terminations: (T, N) bool                  the action ended the episode by the task's rule
    truncations:  (T, N) bool                  the action ended the episode by a limit
    mask:         (T, N) bool                  True = a real transition that counts
    final_obs:    (K, *obs_shape) as obs       the observation after each truncated action
    final_rows:   (K, 2) int64                 the (t, n) of each, t rising
    stream:       Stream                       what fixed every random number; None where nothing
                                               was drawn by one, and then nothing can be drawn again
    action_masks: (T, N, A) bool               True = the environment allows the action; True where
                                               masked. None where actions are not masked. Of
                                               MultiDiscrete the components stand one behind the
                                               other
    activations:  Activations                  of the policy that collected, so that an update need
                                               not compute them again; None where none were kept
    counted:      (C,) int64                   the places t * N + n of the rows that count, rising;
                                               None where nobody has gathered them yet
    num_episodes: int                          how many ended; None where it is to be counted
    finite:       bool, no dimensions          whether all numbers that count are finite; None where
                                               that was looked at, and they are

    The last three are there where asking would make the host wait for the device. Such a rollout
    may have rows at its end in which nothing counts.
    """

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    terminations: Tensor
    truncations: Tensor
    mask: Tensor
    final_obs: Tensor
    final_rows: Tensor
    stream: Stream | None = None
    action_masks: Tensor | None = None
    activations: Activations | None = None
    counted: Tensor | None = None
    num_episodes: int | None = None
    finite: Tensor | None = None

    def places(self) -> Tensor:
        """(C,) int64: the places t * N + n of the rows that count, rising."""
        if self.counted is not None:
            return self.counted
        return self.mask.reshape(-1).nonzero()[:, 0]

    @property
    def dones(self) -> Tensor:
        """(T, N) bool, True at the row whose action ended its episode. False where masked."""
        return self.terminations | self.truncations

    def values_at_truncations(self, final_values: Tensor) -> Tensor:
        """(T, N): what continues a truncated episode, 0 wherever none was cut by a limit alone.

        Args:
            final_values: (K,), the value of each of `final_obs`.
        """
        values = torch.zeros_like(self.rewards)
        t, n = self.final_rows.unbind(dim=1)
        cut = self.truncations[t, n] & ~self.terminations[t, n]
        values[t, n] = torch.where(cut, final_values, 0.0)
        return values

    def kept(self, network: tuple[Any, ...]) -> NDArray[np.float32]:
        """(K, units): what is kept of the first K rows, of all environments one by one.

        Of none where it is another network's, or of other observations or another mask.

        Args:
            network: as `Activations` has it.
        """
        found = self.activations
        if found is None or not all(map(np.array_equal, found.network, network)):
            return np.empty((0, 0), np.float32)
        for own, (theirs, changes) in zip((self.obs, self.mask), found.of, strict=True):
            if own is not theirs or own._version != changes:
                return np.empty((0, 0), np.float32)
        return found.kept[: len(self.mask)].reshape(-1, found.kept.shape[2])

    def shards(self, count: int) -> list["Rollout"]:
        """`count` equal groups of environments, each as if it had been collected alone.

        Sums are formed for each of them and added in this order; see `docs/semantics.md`. Each has
        rows up to its own last one that counts. One shard is the rollout itself, and costs nothing;
        of several, `obs`, `actions` and `action_masks` lie in the rollout's memory.

        Raises:
            ValueError: a count that does not divide the number of environments.
        """
        if count == 1:
            return [self]
        num_envs = self.mask.shape[1]
        check_shards(count, num_envs)
        size = num_envs // count
        return [self._part(first, size) for first in range(0, num_envs, size)]

    def _part(self, first: int, size: int) -> "Rollout":
        envs = slice(first, first + size)
        counted = self.mask[:, envs].any(dim=1).nonzero()
        length = int(counted.max()) + 1 if len(counted) else 0
        n = self.final_rows[:, 1]
        own = (n >= first) & (n < first + size)
        own_rows = {
            name: getattr(self, name)[:length, envs].contiguous()
            for name in ("rewards", "terminations", "truncations", "mask")
        }
        masks = self.action_masks
        shift = torch.tensor([0, first], device=n.device)
        return Rollout(
            # Only what counts of them is looked at, and it is gathered first.
            obs=self.obs[:length, envs],
            actions=self.actions[:length, envs],
            **own_rows,
            final_obs=self.final_obs[own],
            final_rows=self.final_rows[own] - shift,
            stream=None if self.stream is None else self.stream.part(first, size),
            action_masks=None if masks is None else masks[:length, envs],
        )

    def split(self, values: Tensor, shards: list["Rollout"]) -> list[Tensor]:
        """What belongs to these rows, (T, N), as the parts that belong to its `shards`."""
        if len(shards) == 1:
            return [values]
        widths = [shard.mask.shape[1] for shard in shards]
        columns = torch.split(values, widths, dim=1)
        return [
            own[: len(shard.mask)].contiguous() for own, shard in zip(columns, shards, strict=True)
        ]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `split`, (T, N), 0 after a shard's last row that counts."""
        if len(parts) == 1:
            return parts[0]
        length = len(self.mask)
        padded = [nn.functional.pad(part, (0, 0, 0, length - len(part))) for part in parts]
        return torch.cat(padded, dim=1)

    def join_final(self, parts: list[Tensor]) -> Tensor:
        """What belongs to the shards' `final_rows` as what belongs to these, (K,)."""
        if len(parts) == 1:
            return parts[0]
        shard = self.final_rows[:, 1] // (self.mask.shape[1] // len(parts))
        values = torch.cat(parts)
        joined = torch.empty_like(values)
        joined[shard.argsort(stable=True)] = values
        return joined


def which(rollout: Rollout, n: int) -> str:
    """One of its environments, by the index in the whole run, for an error's message."""
    first_env = 0 if rollout.stream is None else rollout.stream.first_env
    return f"environment {first_env + n}"


def when(rollout: Rollout) -> str:
    """In words, when a rollout was collected, to be put behind what went wrong with it.

    Iterations are counted as in metrics.jsonl, from 1.
    """
    return "" if rollout.stream is None else f" in iteration {rollout.stream.iteration + 1}"


def check_shards(count: int, num_envs: int) -> None:
    """Refuse a number of groups that environments cannot be divided into."""
    if count < 1 or num_envs % count:
        raise ValueError(
            f"shards: expected a number that divides {num_envs} environments, got {count}"
        )


class Rows:
    """The arrays of a `Rollout` while it is collected, on one device; they double when full.

    obs has one row more than the others: the observations after the last action. Rows that were
    not written are masked. On the CPU `host` has the same memory as NumPy's arrays, under the same
    names, which are quicker to write rows to; elsewhere it is None.
    """

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    terminations: Tensor
    truncations: Tensor
    mask: Tensor
    action_masks: Tensor

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        obs: tuple[tuple[int, ...], torch.dtype],
        actions: tuple[tuple[int, ...], torch.dtype],
        device: torch.device | str = "cpu",
        action_masks: int | None = None,
    ) -> None:
        """Room for `capacity` rows; `obs` and `actions` are shape and dtype of one.

        `action_masks` is how many actions there are to be masked; None: there are no masks.

        Raises:
            MemoryError: with what they take; from `make_room` too.
        """
        flag = ((), torch.bool)
        each = (obs, actions, ((), torch.float32), flag, flag, flag)
        self._rows = {
            name: ((num_envs, *shape), dtype)
            for name, (shape, dtype) in zip(_FIELDS, each, strict=True)
        }
        if action_masks is not None:
            self._rows["action_masks"] = (num_envs, action_masks), torch.bool
        self._device = torch.device(device)
        self.capacity = capacity
        self.host: Any = SimpleNamespace() if self._device.type == "cpu" else None
        # Rows made while somebody only infers are differentiated later.
        with torch.inference_mode(False):
            for name in self._rows:
                self._make(name)

    def _make(self, name: str) -> None:
        try:
            self._allocate(name)
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            row_bytes = sum(math.prod(row) * dtype.itemsize for row, dtype in self._rows.values())
            num_envs, *shape = self._rows["obs"][0]
            raise MemoryError(
                f"{num_envs:,} environments x {self.capacity:,} rows x {math.prod(shape):,} numbers"
                f" per observation take {in_words(self.capacity * row_bytes)}"
            ) from None

    def _allocate(self, name: str) -> None:
        row, dtype = self._rows[name]
        shape = (self.capacity + (name == "obs"), *row)
        if self.host is None:
            setattr(self, name, torch.zeros(shape, dtype=dtype, device=self._device))
            return
        # The system hands this memory out as it is written to; torch would write to all of it.
        array: NDArray[Any] = np.zeros(shape, _ON_HOST[dtype])
        setattr(self.host, name, array)
        setattr(self, name, torch.from_numpy(array))

    def make_room(self, length: int) -> bool:
        """Hold at least `length` rows. Returns whether the arrays are others than before."""
        if length <= self.capacity:
            return False
        self.capacity = max(length, 2 * self.capacity)
        with torch.inference_mode(False):
            for name in self._rows:
                old = getattr(self, name)
                self._make(name)
                getattr(self, name)[: len(old)] = old
        return True

    def rollout(self, length: int, device: torch.device, stream: Stream) -> Rollout:
        """The first `length` rows, on a device."""
        rows: dict[str, Any]
        num_episodes = None
        if self.host is not None:
            arrays = {name: getattr(self.host, name)[:length] for name in self._rows}
            # In one dimension it takes a third of the time.
            t, n = divmod(np.flatnonzero(arrays["truncations"]), arrays["mask"].shape[1])
            arrays |= {"final_obs": self.host.obs[t + 1, n], "final_rows": np.stack([t, n], axis=1)}
            if device != self._device:
                # There it would have to be waited for.
                arrays["counted"] = np.flatnonzero(arrays["mask"])
                ends = arrays["terminations"] | arrays["truncations"]
                num_episodes = int(np.count_nonzero(ends))
            with torch.inference_mode(False):
                rows = {name: torch.from_numpy(each) for name, each in arrays.items()}
        else:
            rows = {name: getattr(self, name)[:length] for name in self._rows}
            final_rows = self.truncations[:length].nonzero()
            final_obs = self.obs[final_rows[:, 0] + 1, final_rows[:, 1]]
            rows |= {"final_obs": final_obs, "final_rows": final_rows}
        if device != self._device:
            rows = {name: each.to(device, non_blocking=True) for name, each in rows.items()}
        return Rollout(**rows, stream=stream, num_episodes=num_episodes)


def check_finite(rollout: Rollout) -> None:
    """Refuse what is not finite in a row that counts; other rows may hold anything.

    Raises:
        FloatingPointError: an action, with the environment and the row.
        EnvironmentFailure: an observation or a reward, with the environment, the row and the seed.
    """
    # First: what an environment makes of such an action is not its fault.
    if (at := _first_not_finite(rollout.actions, rollout.mask)) is not None:
        t, n = at
        raise FloatingPointError(
            f"the policy's action in {which(rollout, n)} at step {t} is"
            f" {rollout.actions[t, n].tolist()}{when(rollout)}; lower --learning-rate"
        )
    stream = rollout.stream
    where = "" if stream is None else f" of iteration {stream.iteration + 1}, seed {stream.seed}"
    for what, rows in (("observation", rollout.obs), ("reward", rollout.rewards)):
        if (at := _first_not_finite(rows, rollout.mask)) is not None:
            t, n = at
            raise _not_finite(what, rows[t, n], which(rollout, n), t, where)
    ends = torch.ones(len(rollout.final_obs), 1, dtype=torch.bool, device=rollout.mask.device)
    if (at := _first_not_finite(rollout.final_obs[:, None], ends)) is not None:
        t, n = rollout.final_rows[at[0]].tolist()
        value, whose = rollout.final_obs[at[0]], which(rollout, n)
        raise _not_finite("final observation", value, whose, t, where)


def _first_not_finite(rows: Tensor, mask: Tensor) -> tuple[int, int] | None:
    """The first place of (T, N, ...) where `mask` is True and a number is NaN or infinite."""
    if not rows.is_floating_point():
        return None
    flat = rows.reshape(-1)
    # What passes this, in a single fast sum, is finite; what does not is looked at one by one.
    if math.isfinite(torch.dot(flat, flat).item()):
        return None
    finite = rows.isfinite().reshape(*mask.shape, -1).all(dim=2)
    bad = (mask & ~finite).nonzero()
    return None if len(bad) == 0 else (int(bad[0, 0]), int(bad[0, 1]))


def _not_finite(what: str, value: Tensor, whose: str, t: int, where: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"{whose} returned the {what} {value.tolist()} at step {t}{where};"
        " expected finite float32 numbers"
    )
