"""Ranks: one run on several processes that torchrun started, on one machine or several.

Each rank has a part of the environments, and all of the state. What is summed over environments is
summed over all ranks, in shard order where shards are asked for, so that every rank makes the same
step. Rank 0 alone writes and evaluates.
"""

import base64
import contextlib
import io
import itertools
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from vecpg import signals
from vecpg.advantage import add_by_age
from vecpg.config import Config, ConfigError, check_ranks
from vecpg.kernels.sums import Whole, here, in_order
from vecpg.rendezvous import LOOK, agent_store, coming_together, meet
from vecpg.rollout import Rollout
from vecpg.rollout.statistics import Episodes, Tally, episode_statistics, tally
from vecpg.run.interrupts import Interrupted, Interrupts
from vecpg.run.state import TrainState
from vecpg.torchrun import Place, place

_Told = TypeVar("_Told")

# In so many parts of the timeout who is waited for says that it is alive, and who waits looks; in
# the rest of them another is found dead.
_BEATS, _SILENT = 20, 18
# Seconds between looks at what rank 0 takes long to answer.
_MOST_PAUSE = 0.1
# Seconds that rank 0 may take to save, before the others end: torchrun then stops it too.
_SAVING = 10.0
# Seconds that another rank's last words are waited for: its connections may close first.
_LAST_WORDS = 1.0
# Ages that statistics have at first; more where episodes turn out to be longer.
_MOST_COLUMNS = 1024
# What a rank says of itself beside its statistics.
_GOES_ON, _IS_OVER, _LEAVES = range(3)
# Runs in this process so far: after a restart the first goes on with the first, and so on.
_runs = itertools.count()


class RanksLost(RuntimeError):
    """Another rank failed, ended, or did not answer in time. The message is complete."""


class _Over(Exception):
    """The run has come to its end on another rank."""


class Ranks:
    """The processes of a run, seen from one of them.

    shards: of the whole run.

    Args:
        place: of this one; None: the run has no other.
        seconds: that a rank may take to answer.
        store: of this start alone; None where there is no other rank.
        kept: what outlives restarts; None where torchrun did not start this.
    """

    def __init__(
        self,
        place: Place | None = None,
        seconds: float = 0.0,
        store: Store | None = None,
        kept: Store | None = None,
    ) -> None:
        self.rank = 0 if place is None else place.rank
        self.size = 1 if place is None else place.world_size
        self._seconds, self._store, self._kept = seconds, store, kept
        self._number = next(_runs) if kept is not None else 0
        self._told = 0
        # Of the run at hand:
        self._num_envs, self.shards, self._in_order = 0, 1, True
        self._columns = 0
        self._device = torch.device("cpu")
        # Whether the others count on this rank's sums, or have left already.
        self._summing = self._parted = False

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    def resumed(self, config: Config) -> Config:
        """The settings with which rank 0 goes on where the ranks were before a restart."""
        key = f"run/{self._number}"
        if self._kept is None or not self.first or not self._kept.check([key]):
            return config
        return replace(config, resume=self._kept.get(key).decode())

    def remember(self, run_dir: str) -> None:
        """Have the ranks go on in this directory, should they be restarted."""
        if self._kept is not None and self.first:
            self._kept.set(f"run/{self._number}", run_dir)

    def connect(self, store: Store) -> None:
        """Make the process group.

        Args:
            store: of this start alone.

        Raises:
            ConfigError: it cannot be made.
            Interrupted: another rank was stopped meanwhile.
            RanksLost: another rank failed meanwhile.
        """
        backend = "gloo"
        if torch.cuda.is_available() and distributed.is_nccl_available():
            backend = "cpu:gloo,cuda:nccl"
        # A signal waits: it would leave half a group.
        with Interrupts() as interrupts, interrupts.held(), coming_together():
            try:
                distributed.init_process_group(
                    backend,
                    store=store,
                    rank=self.rank,
                    world_size=self.size,
                    timeout=timedelta(seconds=self._seconds),
                )
            except (RuntimeError, ValueError):
                if reason := self._reason():
                    raise reason from None
                raise

    def part_of(self, config: Config, before: dict[str, Any] | None) -> Config:
        """The settings of this rank's part of a run: its environments and its shards.

        Args:
            config: of the run.
            before: what was resolved when it began; None where it begins now.

        Raises:
            ConfigError: its environments or shards cannot be divided among so many ranks.
        """
        if before is None:
            check_ranks(config, self.size)
        shards = self.shards_of(config, before)
        if shards % self.size:
            valid = ", ".join(str(each) for each in range(1, shards + 1) if shards % each == 0)
            raise ConfigError(
                f"torchrun: expected a number of ranks that divides the run's {shards} shards"
                f" ({valid}), got {self.size}; start one of these"
            )
        self._num_envs, self.shards, self._in_order = config.num_envs, shards, bool(config.shards)
        return replace(config, num_envs=config.num_envs // self.size, shards=shards // self.size)

    def shards_of(self, config: Config, before: dict[str, Any] | None) -> int:
        """The shards of a run: those asked for, else one for each rank with which it began."""
        return config.shards or (self.size if before is None else int(before["shards"]))

    @property
    def first_env(self) -> int:
        """The index in the whole run of this rank's first environment."""
        return self.rank * self._num_envs // self.size

    def sums_on(self, device: torch.device, baseline: str, longest: int) -> None:
        """Say where what is summed will be, for which baseline, and how long an episode may be."""
        self._device = device
        columns = {"none": 0, "value": 0, "mean": 1}
        self._columns = columns.get(baseline, min(longest, _MOST_COLUMNS))

    def told(self, make: Callable[[], _Told]) -> _Told:
        """What rank 0 makes of it, on every rank; the others wait as long as rank 0 is alive.

        Raises:
            what `make` raised: `ConfigError` and `Interrupted` on every rank, and of others
                `RanksLost` where it is not rank 0. Likewise what has ended rank 0 before it came
                here.
        """
        if self._store is None:
            return make()
        key, self._told = f"told/{self._told}", self._told + 1
        if not self.first:
            return cast(_Told, self._wait_for(key))
        try:
            with self._beating(self._store):
                made = make()
            with _reachable():
                self._store.set(key, _packed((True, made)))
        except BaseException as error:
            answer = _packed((False, _as_told(error)))
            with contextlib.suppress(RuntimeError):  # torchrun itself has ended
                # Not where a signal came just after they were told what was made.
                self._parted = self._store.compare_set(key, "", answer) == answer.encode()
            raise
        return made

    @contextlib.contextmanager
    def alike(self, alike: dict[str, Any]) -> Iterator[None]:
        """Go on where no rank refuses inside, and what they have found is the same for all.

        Args:
            alike: what is to be the same, by name; filled inside.

        Raises:
            ConfigError: another rank's, or what differs.
        """
        error: ConfigError | Interrupted | None = None
        try:
            yield
        except (ConfigError, Interrupted) as raised:
            error = raised
        if self.size > 1:
            # A signal meanwhile is none of what the others are told here.
            with Interrupts() as interrupts, interrupts.held():
                self._agree(error, alike)
        if error is not None:
            raise error

    def _agree(self, error: ConfigError | Interrupted | None, alike: dict[str, Any]) -> None:
        """Exchange what every rank has found, and raise what keeps them from going on."""
        self._parted = True  # whatever comes of it, all of them know
        try:
            told = self._gathered((None if error is None else _as_told(error), alike))
        except RanksLost as lost:
            raise error or lost from None
        for rank, (failure, _) in enumerate(told):
            if failure is not None and not (error is not None and self.first):
                raise _raised(failure, rank) from error
        for rank, (_, theirs) in enumerate(told):
            for name, value in told[0][1].items():
                if error is None and theirs[name] != value:
                    raise ConfigError(
                        f"{name}: expected the same on every rank, got {value!r} on rank 0 and"
                        f" {theirs[name]!r} on rank {rank}"
                    )
        self._parted = error is not None

    def share(self, state: TrainState) -> None:
        """Give every rank the state that rank 0 has."""
        if self.size == 1:
            return
        box = io.BytesIO()
        if self.first:
            torch.save(state.state_dict(), box)
        size = self.told(lambda: len(box.getvalue()))
        content = torch.empty(size, dtype=torch.uint8)
        if self.first:
            content = torch.frombuffer(bytearray(box.getvalue()), dtype=torch.uint8)
        with self._answering():
            distributed.broadcast(content, 0)
        if not self.first:
            # On a GPU of rank 0 it may have been; this rank has another.
            received = io.BytesIO(content.numpy().tobytes())
            state.load_state_dict(torch.load(received, map_location="cpu", weights_only=True))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Leave this block when all ranks do, with the state of the same commit.

        Who fails, is stopped or has come to its end says so in place of the next statistics, which
        the others wait for.

        Raises:
            Interrupted: another rank was stopped.
            RanksLost: another rank failed.
        """
        self._parted = False
        try:
            yield
        except _Over:
            return
        except BaseException as error:
            if self.size > 1 and not self._summing and not self._parted:
                self.leave(error)
                with contextlib.suppress(Interrupted, RanksLost, _Over):
                    self._say(_LEAVES)
            raise
        if self.size > 1:
            with contextlib.suppress(_Over):
                self._say(_IS_OVER)
            self._parted = False  # what rank 0 does now, the others wait for

    @contextlib.contextmanager
    def summing(self) -> Iterator[None]:
        """Inside, from `tally` on, the others count on this rank's sums, and nothing else."""
        yield
        self._summing = False

    def tally(self, rollout: Rollout, sums: Sequence[Tensor]) -> tuple[Tally, Whole]:
        """What the environments of all ranks came to, and what adds up over them.

        Args:
            rollout: of this rank's environments.
            sums: of each of its shards, as `vecpg.advantage.weigh` has them.

        Raises:
            Interrupted: another rank was stopped.
            RanksLost: another rank failed.
        """
        shards = len(sums)
        if self.size == 1:
            found = tally(rollout, episode_statistics(rollout, shards), add_by_age(sums))
            return found, Whole(self._num_envs, found.counted)
        parts = rollout.shards(shards)
        own = [(shard, episode_statistics(shard)) for shard in parts]
        rows = max(each.shape[1] for each in sums)
        # A window of several episodes has more rows than any of them has ages.
        columns = max(int(each[1].count_nonzero()) for each in sums)
        while True:
            numbers = [self._numbers(*pair, each) for pair, each in zip(own, sums, strict=True)]
            found, needed = self._say(_GOES_ON, numbers, columns)
            if needed <= self._columns:
                break
            # Episodes are longer than any before; all ranks see that, and say it again.
            self._columns = max(needed, 2 * self._columns)
        self._summing = True
        room = max(0, rows - self._columns)
        found = replace(found, sums=nn.functional.pad(found.sums, (0, room)))
        return found, Whole(self._num_envs, found.counted, self.combine)

    def combine(
        self, added: Iterable[Tensor], kept: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """A `vecpg.kernels.sums.Combine`, of all ranks.

        Raises:
            RanksLost: another rank has ended, or does not answer.
        """
        if self.size == 1:
            return here(added, kept)
        return self._gather(added, kept) if self._in_order else self._reduce(added, kept)

    def _gather(
        self, added: Iterable[Tensor], kept: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Every shard's numbers on every rank, which adds them in shard order."""
        parts = torch.stack(list(added))
        numbers = parts.shape[1]
        own = torch.cat([parts, torch.stack(list(kept))], dim=1) if kept else parts
        every = own.new_empty(self.shards, own.shape[1])
        with self._answering():
            distributed.all_gather(list(every.chunk(self.size)), own)
        return in_order(every[:, :numbers]), [*every[:, numbers:]] if kept else []

    def _reduce(
        self, added: Iterable[Tensor], kept: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Each rank's sum, added in whatever order; what is kept stands where others add 0."""
        total = in_order(added)
        numbers = len(total)
        if kept:
            own = torch.stack(list(kept))
            every = own.new_zeros(self.shards, own.shape[1])
            every.chunk(self.size)[self.rank].copy_(own)
            total = torch.cat([total, every.reshape(-1)])
        with self._answering():
            distributed.all_reduce(total)
        return total[:numbers], [*total[numbers:].reshape(self.shards, -1)] if kept else []

    def _numbers(
        self, shard: Rollout, episodes: Episodes, sums: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Of a shard what is added, and what is kept apart."""
        counts = torch.stack(
            [
                shard.mask.sum().to(torch.float64),
                episodes.returns.new_tensor(len(episodes.returns)),
                episodes.return_sum,
                episodes.lengths.sum().to(torch.float64),
            ]
        )
        columns = nn.functional.pad(sums, (0, self._columns - sums.shape[1]))  # or cut
        kept = [
            episodes.returns.min(),
            episodes.returns.max(),
            episodes.returns.new_tensor(len(shard.mask)),
        ]
        return torch.cat([counts, columns.reshape(-1)]), kept

    def _say(
        self,
        kind: int,
        numbers: Sequence[tuple[Tensor, list[Tensor]]] = (),
        columns: int = 0,
    ) -> tuple[Tally, int]:
        """Tell the others how this rank is, and its statistics; learn theirs.

        Args:
            kind: whether it goes on, is at the end, or leaves.
            numbers: of each shard what is added, and what is kept; none where it does not go on.
            columns: that its statistics need.

        Returns:
            the statistics of all, and the columns that they need.

        Raises:
            Interrupted, RanksLost: another rank was stopped, or failed.
            _Over: this rank, or another, has come to the end.
        """
        shards = self.shards // self.size
        device = self._device
        if not numbers:
            nothing = torch.zeros(4 + 2 * self._columns, dtype=torch.float64, device=device)
            numbers = [(nothing, [*nothing[:3]])] * shards
        of_rank = torch.tensor([kind, columns], dtype=torch.float64, device=device)
        total, kept = self.combine(
            [added for added, _ in numbers],
            [torch.cat([torch.stack(own), of_rank]) for _, own in numbers],
        )
        every = torch.stack(kept)
        flags = every[::shards, 3:].tolist()
        kinds = [theirs for theirs, _ in flags]
        self._parted = _LEAVES in kinds
        for rank, theirs in enumerate(kinds):
            if theirs == _LEAVES and rank != self.rank:
                raise self._reason() or RanksLost(f"rank {rank} has left")
        if self._parted or _IS_OVER in kinds:
            raise _Over
        counts = torch.stack([total[0], total[1], every[:, 2].max()])
        counted, episodes, rows = map(int, counts.tolist())  # a GPU is waited for once
        found = Tally(
            counted=counted,
            rows=rows,
            episodes=episodes,
            return_sum=total[2],
            return_low=every[:, 0].min(),
            return_high=every[:, 1].max(),
            length=total[3] / episodes,
            sums=total[4:].reshape(2, -1),
        )
        return found, int(max(needed for _, needed in flags))

    def leave(self, error: BaseException) -> None:
        """Leave word why, for who waits for this rank."""
        if self._store is not None and not self._parted:
            with contextlib.suppress(RuntimeError):  # torchrun itself has ended
                self._store.set(f"left/{self.rank}", _packed(_as_told(error)))

    def await_saving(self, error: BaseException) -> None:
        """Let rank 0 have saved before any other rank ends, where all of them are stopped.

        Torchrun passes on a signal where one rank ends, and a second signal ends rank 0 at once.
        """
        if self._store is None or not isinstance(error, Interrupted):
            return
        with contextlib.suppress(RuntimeError):
            if self.first:
                self._store.set("saved", "")
            ends = time.monotonic() + _SAVING
            while not self._store.check(["saved"]) and time.monotonic() < ends:
                time.sleep(LOOK)

    def _reason(self) -> BaseException | None:
        """Why the first of the ranks that have left word did so; None where none has."""
        ends = time.monotonic() + _LAST_WORDS
        with _reachable():
            while self._store is not None and time.monotonic() < ends:
                for rank in range(self.size):
                    if rank != self.rank and (words := self._last_words(rank)) is not None:
                        return words
                time.sleep(LOOK)
        return None

    def _last_words(self, rank: int) -> BaseException | None:
        """Why a rank has left; None where it has not said."""
        store = cast(Store, self._store)
        if not store.check([key := f"left/{rank}"]):
            return None
        return _raised(_unpacked(store.get(key)), rank)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Say of what torch raises inside that it is another rank's fault."""
        try:
            yield
        except BaseException as error:
            # Torch's frames hold the process group, at whose connections others may wait.
            traceback.clear_frames(error.__traceback__)
            if not isinstance(error, RuntimeError):
                raise
            raise self._reason() or RanksLost(
                "another rank has ended, or did not answer within --dist-timeout"
                f" {self._seconds:g} s"
            ) from error

    def _gathered(self, own: Any) -> list[Any]:
        """What every rank gives, in their order."""
        every: list[Any] = [None] * self.size
        with self._answering():
            distributed.all_gather_object(every, own)
        return every

    @contextlib.contextmanager
    def _beating(self, store: Store) -> Iterator[None]:
        """Let the others know that this rank is alive, whatever takes so long inside."""
        ended = threading.Event()

        def beat() -> None:
            with contextlib.suppress(RuntimeError):  # torchrun itself has ended
                while not ended.wait(self._seconds / _BEATS):
                    store.add("alive", 1)

        thread = threading.Thread(target=beat, name="vecpg-alive", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _wait_for(self, key: str) -> Any:
        """What rank 0 has set, however long that takes, while it is alive."""
        # A signal waits: rank 0 does not look at this rank until it has answered.
        with Interrupts() as interrupts, interrupts.held():
            made, told = _unpacked(self._set_by_first(key))
        if not made:
            self._parted = True
            raise _raised(told, 0)
        return told

    def _set_by_first(self, key: str) -> bytes:
        store = cast(Store, self._store)
        beats, since, pause = 0, time.monotonic(), 0.001
        while True:
            with _reachable():
                if store.check([key]):  # its own waiting logs where there is nothing yet
                    return store.get(key)
                left = self._last_words(0)
                now = store.add("alive", 0)
            if left is not None:
                raise left
            time.sleep(pause)
            # All ranks but one ask one store, perhaps for minutes.
            pause = min(2 * pause, _MOST_PAUSE, self._seconds / _BEATS)
            if now != beats:
                beats, since = now, time.monotonic()
            elif time.monotonic() - since > self._seconds * _SILENT / _BEATS:
                raise RanksLost(
                    f"rank 0 has not been heard of for --dist-timeout {self._seconds:g} s"
                )


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    """Say of what torch raises inside that torchrun, which keeps the store, has ended."""
    try:
        yield
    except RuntimeError as error:
        raise RanksLost(f"torchrun's store is gone: {error}") from error


@contextlib.contextmanager
def joined(config: Config) -> Iterator[Ranks]:
    """The ranks of a run, where torchrun started this process; else it is alone.

    Raises:
        ConfigError: the others do not come, or have other settings.
    """
    where = place()
    if where is None:
        yield Ranks()
        return
    seconds = config.dist_timeout
    with coming_together():
        kept = agent_store(where, seconds)
    if where.world_size == 1:
        signals.together = True
        yield Ranks(where, seconds, None, kept)
        return
    if distributed.is_initialized():
        raise ConfigError(
            "torchrun: expected no process group in this process, since a run over ranks makes its"
            " own, got one; end it with torch.distributed.destroy_process_group() before, or train"
            " one run at a time"
        )
    with coming_together():
        store = meet(kept, where, config)
    ranks = Ranks(where, seconds, PrefixStore("run", store), kept)
    try:
        ranks.connect(store)
        yield ranks
    except BaseException as error:
        ranks.leave(error)
        _disconnect()  # who waits for this rank looks why it left
        ranks.await_saving(error)
        raise
    _disconnect()


def _disconnect() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _packed(value: Any) -> str:
    """As the store takes it."""
    return base64.b64encode(pickle.dumps(value)).decode()


def _unpacked(text: bytes) -> Any:
    """Only of what a rank of the same run has set."""
    return pickle.loads(base64.b64decode(text))


def _as_told(error: BaseException) -> tuple[str, Any]:
    """What the others are told of an error."""
    if isinstance(error, Interrupted):
        return "stopped", error.signum
    if isinstance(error, RanksLost):  # of whoever was lost, not of who tells it
        return "lost", str(error)
    if isinstance(error, ConfigError):
        return "refused", str(error)
    return "failed", _in_words(error)


def _raised(told: tuple[str, Any], rank: int) -> BaseException:
    """What comes of another rank's error on this one."""
    kind, what = told
    if kind == "stopped":
        return Interrupted(what)
    if kind == "lost":
        return RanksLost(what)
    if kind == "refused":
        return ConfigError(what if rank == 0 else f"rank {rank}: {what}")
    return RanksLost(f"rank {rank} failed: {what}")


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
