"""A population over ranks: each trains a part of the runs, and rank 0 tells of all of them."""

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from vecpg.config import ConfigError, flag, to_dict
from vecpg.distributed import RanksLost, agent_store, meet
from vecpg.run.interrupts import Interrupted
from vecpg.run.members import Population, is_population
from vecpg.torchrun import Place

_Each = TypeVar("_Each")

# Settings in which ranks may differ: how one of them shows what it does, and where it finds a run.
_OWN = ("progress", "log_every", "resume")
# The part of the timeout after which a rank says that it is alive.
_BEATS = 4
# Seconds between looks at what others have said.
_LOOK = 0.05


class Outcome(NamedTuple):
    """What the runs of all ranks came to.

    summaries: of those that came to their end, in order of seeds.
    failed:    seeds of those that failed, in order.
    missing:   seeds of the others: their rank was stopped, or lost.
    signum:    the signal that stopped a rank; None where none was stopped.
    """

    summaries: list[dict[str, Any]]
    failed: list[int]
    missing: list[int]
    signum: int | None


class Deal:
    """Which runs of a population are this rank's, and what ranks tell each other of theirs.

    Run i is that of rank i % W, and no rank waits for another before all its runs have ended. What
    they tell lies in torchrun's store. A process that torchrun did not start is the only rank.

    As a context it tells the others how this rank leaves, and until then that it is alive.

    Args:
        population: the same on every rank.
        place: of this rank; None: it is the only one.

    Raises:
        ConfigError: not all ranks have come within `dist_timeout`.
    """

    def __init__(self, population: Population, place: Place | None) -> None:
        self._population, self._seconds = population, population.config.dist_timeout
        self._rank, self._size = (0, 1) if place is None else (place.rank, place.world_size)
        self._kept: Store = HashStore() if place is None else agent_store(place, self._seconds)
        self._store = self._kept if place is None else meet(self._kept, place, self._seconds)
        self._has_told = self._has_left = False
        self._ending = threading.Event()
        self._alive = threading.Thread(target=self._beat, name="vecpg-alive", daemon=True)

    @property
    def first(self) -> bool:
        """Whether this is the rank that makes the directory, and tells of all runs."""
        return self._rank == 0

    def own(self, runs: Sequence[_Each]) -> Sequence[_Each]:
        """Of something of every run that of this rank's."""
        return runs[self._rank :: self._size]

    def remembered(self) -> Path | None:
        """The directory in which the ranks were before torchrun restarted them; None if in none."""
        if not self._kept.check(["population"]):
            return None
        folder = Path(self._kept.get("population").decode())
        return folder if is_population(folder) else None

    def remember(self, folder: Path) -> None:
        """Have the ranks go on in this directory, should torchrun restart them."""
        self._kept.set("population", str(folder.absolute()))

    def tell(self, folder: Path) -> None:
        """Let the other ranks begin in this directory: a run has begun there."""
        told = {"folder": str(folder.absolute()), "settings": self._settings()}
        with self._reaching():
            self._store.set("told", json.dumps(told))
        self._has_told = True

    def told(self) -> Path | None:
        """The directory that rank 0 tells, once it does; None: it has left without.

        Raises:
            ConfigError: it has other settings, or there is no such directory here.
            RanksLost: it is not alive.
        """
        self._wait_for_first("told")
        told = json.loads(self._store.get("told"))
        if told is None:
            return None
        for name, own in self._settings().items():
            if (theirs := told["settings"][name]) != own:
                raise ConfigError(
                    f"{flag(name)}: expected the same on every rank, got {theirs!r} on rank 0 and"
                    f" {own!r} on rank {self._rank}"
                )
        folder = Path(told["folder"])
        if not is_population(folder):
            raise ConfigError(
                f"{folder}: expected the directory that rank 0 has made, got nothing of that name"
                " on this machine; give an --out-dir that all machines share"
            )
        return folder

    def ended(self, summary: dict[str, Any]) -> None:
        """Tell that a run of this rank has come to its end."""
        with self._reaching():
            self._store.set(f"ended/{summary['seed']}", json.dumps(summary))

    def outcome(self, failed: Sequence[int]) -> Outcome:
        """For rank 0: what all runs came to, once each rank that is alive has ended its own.

        Args:
            failed: seeds of this rank's runs that failed.
        """
        others = {rank: f"left/{rank}" for rank in range(1, self._size)}
        silent = self._wait_for(others)
        words = [
            json.loads(self._store.get(key)) for rank, key in others.items() if rank not in silent
        ]
        ended = {
            seed: json.loads(self._store.get(key))
            for seed in self._population.seeds
            if self._store.check([key := f"ended/{seed}"])
        }
        every = sorted([*failed, *(seed for word in words for seed in word["failed"])])
        signums = [word["signum"] for word in words if word["signum"] is not None]
        return Outcome(
            summaries=list(ended.values()),
            failed=every,
            missing=[seed for seed in self._population.seeds if seed not in {*ended, *every}],
            signum=signums[0] if signums and not silent else None,
        )

    def exit_status(self, failed: Sequence[int]) -> int:
        """For the other ranks: how all leave, once rank 0 says so.

        Until then none may: torchrun ends the others as soon as one has failed.

        Args:
            failed: seeds of this rank's runs that failed.

        Raises:
            Interrupted: a rank was stopped.
            RanksLost: rank 0 is not alive.
        """
        self._leave(0, None, failed)
        self._wait_for_first("left/0")
        word = json.loads(self._store.get("left/0"))
        if word["signum"] is not None:
            raise Interrupted(word["signum"])
        return int(word["status"])

    def __enter__(self) -> Self:
        if self._size > 1:
            self._alive.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ending.set()
        with suppress(RuntimeError):  # torchrun itself has ended
            if self.first and not self._has_told:
                self._store.set("told", "null")
            if not self._has_left:
                status = 0 if error is None else 1
                if isinstance(error, SystemExit) and isinstance(error.code, int):
                    status = error.code
                elif isinstance(error, ConfigError):
                    status = 2
                self._leave(status, error.signum if isinstance(error, Interrupted) else None)

    def _leave(self, status: int, signum: int | None, failed: Sequence[int] = ()) -> None:
        word = {"status": status, "signum": signum, "failed": list(failed)}
        with self._reaching():
            self._store.set(f"left/{self._rank}", json.dumps(word))
        self._has_left = True

    def _settings(self) -> dict[str, Any]:
        """What is to be the same on every rank, as JSON has it."""
        settings = {"num_seeds": self._population.num_seeds, **to_dict(self._population.config)}
        same = {name: value for name, value in settings.items() if name not in _OWN}
        return json.loads(json.dumps(same))  # type: ignore[no-any-return]

    def _beat(self) -> None:
        with suppress(RuntimeError):  # torchrun itself has ended
            while not self._ending.wait(self._seconds / _BEATS):
                self._store.add(f"alive/{self._rank}", 1)

    def _wait_for_first(self, key: str) -> None:
        if self._wait_for({0: key}):
            raise RanksLost(f"rank 0 has not been heard of for --dist-timeout {self._seconds:g} s")

    def _wait_for(self, keys: Mapping[int, str]) -> set[int]:
        """Until each of some ranks has set its key, however long that takes, while it is alive.

        Returns:
            those that are not.
        """
        awaited, silent = dict(keys), set()
        heard = dict.fromkeys(keys, (0, time.monotonic()))
        while awaited:
            with self._reaching():
                for rank, key in [*awaited.items()]:
                    beats, since = heard[rank]
                    now = self._store.add(f"alive/{rank}", 0)
                    if self._store.check([key]):
                        del awaited[rank]
                    elif now != beats:
                        heard[rank] = now, time.monotonic()
                    elif time.monotonic() - since > self._seconds:
                        del awaited[rank]
                        silent.add(rank)
            if awaited:
                time.sleep(_LOOK)
        return silent

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Say of what torch raises inside that torchrun's store is gone."""
        try:
            yield
        except RuntimeError as error:
            raise RanksLost("torchrun's store is gone: torchrun has ended where rank 0 is") from error
