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

from vecpg.config import ConfigError
from vecpg.distributed import RanksLost
from vecpg.rendezvous import agent_store, coming_together, meet
from vecpg.run.interrupts import Interrupted
from vecpg.run.members import Population, is_population
from vecpg.torchrun import Place

_Each = TypeVar("_Each")

# The part of the timeout after which a rank says that it is alive.
_BEATS = 4
# Seconds between looks at what others have said.
_LOOK = 0.05


class Outcome(NamedTuple):
    """What the runs of all ranks came to.

    summaries: of those that came to their end, in order of seeds.
    failed:    seeds of those that failed, in order.
    missing:   seeds of the others, in order: their rank was stopped, or lost.
    signum:    the signal that stopped a rank; None where none was stopped.
    """

    summaries: list[dict[str, Any]]
    failed: list[int]
    missing: list[int]
    signum: int | None

    @property
    def unfinished(self) -> str:
        """What is to be said of runs that have not come to their end; nothing where all have.

        Example:
            >>> Outcome([], [2], [4, 6], None).unfinished
            '1 of 3 runs failed: seed 2; 2 of 3 runs did not come to their end: seed 4, seed 6'
        """
        total = len(self.summaries) + len(self.failed) + len(self.missing)
        return "; ".join(
            f"{len(seeds)} of {total} runs {what}: {', '.join(f'seed {seed}' for seed in seeds)}"
            for what, seeds in {
                "failed": self.failed,
                "did not come to their end": self.missing,
            }.items()
            if seeds
        )


class Deal:
    """Which runs of a population are this rank's, and what ranks tell each other of theirs.

    Run i is that of rank i % W, and no rank waits for another before all its runs have ended. What
    they tell lies in torchrun's store. A process that torchrun did not start is the only rank.

    As a context it tells the others that this rank is alive, and at its end how it leaves.

    Args:
        population: to be the same on every rank.
        place: of this rank; None: it is the only one.

    Raises:
        ConfigError: not all ranks have come within `dist_timeout`, or one has other settings.
    """

    def __init__(self, population: Population, place: Place | None) -> None:
        self._population, self._seconds = population, population.config.dist_timeout
        self._rank, self._size = (0, 1) if place is None else (place.rank, place.world_size)
        self._kept: Store = HashStore()
        self._store: Store = self._kept
        if place is not None:
            with coming_together():
                self._kept = agent_store(place, self._seconds)
                self._store = meet(self._kept, place, population.config, population.num_seeds)
        self._folder: Path | None = None
        self._said: set[str] = set()
        self._ending = threading.Event()
        self._alive = threading.Thread(target=self._beat, name="vecpg-alive", daemon=True)

    @property
    def over_ranks(self) -> str:
        """How the runs are dealt, in words; nothing where there is one rank."""
        if self._size == 1:
            return ""
        total, own = self._population.num_seeds, len(self.own(self._population.seeds))
        return (
            f", {total} runs on {self._size} ranks; progress is of the {own} of rank {self._rank}"
        )

    @property
    def first(self) -> bool:
        """Whether this is the rank that makes the directory, and tells of all runs."""
        return self._rank == 0

    def own(self, runs: Sequence[_Each]) -> Sequence[_Each]:
        """Of something of every run that of this rank's."""
        return runs[self._rank :: self._size]

    def remembered(self) -> Path | None:
        """The directory in which the ranks were before a restart; None where there is none."""
        if not self._kept.check(["population"]):
            return None
        folder = Path(self._kept.get("population").decode())
        return folder if is_population(folder) else None

    def remember(self, folder: Path) -> None:
        """For rank 0: have the ranks go on in this directory, should they be restarted."""
        self._folder = folder.absolute()
        self._kept.set("population", str(self._folder))

    def tell(self) -> None:
        """For rank 0: have the others begin in that directory. What all refuse, it has refused."""
        self._say("told", {"folder": str(self._folder)})

    def told(self) -> Path:
        """For the others: the directory, once rank 0 tells.

        Raises:
            ConfigError: what rank 0 has refused, or there is no such directory here.
            Interrupted: rank 0 was stopped.
            RanksLost: it has failed, or is not alive.
        """
        told = self._of_first("told")
        folder = Path(told["folder"])
        if not is_population(folder):
            raise ConfigError(
                f"{folder}: expected the directory of rank 0, got nothing of that name on the"
                f" machine of rank {self._rank}; give an --out-dir that all machines share"
            )
        return folder

    def ended(self, summary: dict[str, Any]) -> None:
        """Tell that a run of this rank has come to its end."""
        self._say(f"ended/{summary['seed']}", summary)

    def outcome(self, failed: Sequence[int]) -> Outcome:
        """What all runs came to, once every rank that is alive has ended its own.

        No rank may leave before: where one has failed, torchrun ends the others.

        Args:
            failed: seeds of this rank's runs that failed.

        Raises:
            Interrupted: rank 0 was stopped.
            RanksLost: it has failed, or is not alive.
        """
        if not self.first:
            self._say(f"left/{self._rank}", {"failed": list(failed), "signum": None})
            return Outcome(**self._of_first("outcome"))
        if "told" not in self._said:
            self.tell()
        outcome = self._gathered(failed)
        self._say("outcome", outcome._asdict())
        return outcome

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
        signum = error.signum if isinstance(error, Interrupted) else None
        refusal = str(error) if isinstance(error, ConfigError) else None
        keys = ("told", "outcome") if self.first else (f"left/{self._rank}",)
        with suppress(RanksLost):  # torchrun itself has ended
            for key in keys:
                if key not in self._said:
                    self._say(key, {"signum": signum, "refusal": refusal, "failed": []})

    def _gathered(self, failed: Sequence[int]) -> Outcome:
        keys = {rank: f"left/{rank}" for rank in range(1, self._size)}
        silent = self._wait_for(keys)
        with self._reaching():
            words = [self._read(key) for rank, key in keys.items() if rank not in silent]
            seeds = self._population.seeds
            keys = {seed: f"ended/{seed}" for seed in seeds}
            ended = {
                seed: self._read(key) for seed, key in keys.items() if self._store.check([key])
            }
        failed = sorted([*failed, *(seed for word in words for seed in word["failed"])])
        signums = [word["signum"] for word in words if word["signum"] is not None]
        return Outcome(
            summaries=[*ended.values()],
            failed=failed,
            missing=[seed for seed in seeds if seed not in {*ended, *failed}],
            signum=next(iter(signums), None),
        )

    def _of_first(self, key: str) -> dict[str, Any]:
        """What rank 0 says, or a raise of why it has left."""
        if self._wait_for({0: key}):
            raise RanksLost(f"rank 0 has not been heard of for --dist-timeout {self._seconds:g} s")
        with self._reaching():
            word = self._read(key)
        if "refusal" not in word:
            return word
        if word["signum"] is not None:
            raise Interrupted(word["signum"])
        if word["refusal"] is not None:
            raise ConfigError(word["refusal"])
        raise RanksLost("rank 0 failed")

    def _say(self, key: str, word: dict[str, Any]) -> None:
        with self._reaching():
            self._store.set(key, json.dumps(word))
        self._said.add(key)

    def _read(self, key: str) -> dict[str, Any]:
        return json.loads(self._store.get(key))  # type: ignore[no-any-return]

    def _beat(self) -> None:
        with suppress(RuntimeError):  # torchrun itself has ended
            while not self._ending.wait(self._seconds / _BEATS):
                self._store.add(f"alive/{self._rank}", 1)

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
            raise RanksLost(
                "torchrun's store is gone: torchrun has ended where rank 0 is"
            ) from error
