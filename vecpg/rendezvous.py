"""Where ranks find each other: torchrun's store, and what of it belongs to one start of them."""

import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from vecpg import signals
from vecpg.config import Config, ConfigError, flag, to_dict
from vecpg.torchrun import Place

# Seconds between looks at what another rank will set.
LOOK = 0.01
# Settings in which ranks may differ: how one of them shows what it does, and where it finds a run.
_OWN = ("progress", "log_every", "resume")


@contextmanager
def coming_together() -> Iterator[None]:
    """Where ranks look for each other: what goes wrong inside is a refusal, `ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"torchrun: the ranks did not come together: {error}") from error


def agent_store(place: Place, seconds: float) -> Store:
    """The key-value store that torchrun keeps; what is set there outlives restarts.

    Keys of another run of torchrun, or another program, are not among these.

    Args:
        place: of this process.
        seconds: that connecting, and waiting for a key, may take.
    """
    given = place.address, place.port, None, False, timedelta(seconds=seconds)
    return PrefixStore(f"vecpg/{place.run_id}", TCPStore(*given))


def meet(store: Store, place: Place, config: Config, num_seeds: int = 1) -> Store:
    """The part of a store that belongs to the ranks of this start alone.

    Those of an earlier one have left their keys, which torch itself takes for those of now: after a
    restart it connects to processes that have ended. So each rank has a name that it never had
    before, and where it begins depends on the names of all.

    Args:
        store: that outlives restarts.
        place: of this rank.
        config: its settings, which are to be those of all.
        num_seeds: likewise.

    Raises:
        ConfigError: not all came within `dist_timeout`, or one has other settings.
    """
    seconds = config.dist_timeout
    settings = {"num_seeds": num_seeds, **to_dict(config)}
    same = json.dumps({name: value for name, value in settings.items() if name not in _OWN})
    ends, name = time.monotonic() + seconds, uuid.uuid4().hex
    store.set(f"here/{place.rank}", name)
    while time.monotonic() < ends:
        names = _names(store, place.world_size) if place.rank == 0 else _meeting(store)
        if len(names) == place.world_size and names[place.rank] == name and all(names):
            here = hashlib.sha256("".join(names).encode()).hexdigest()
            if place.rank == 0:
                store.set("meeting", json.dumps(names))
            store.set(f"{here}/{place.rank}", same)
            keys = [f"{here}/{rank}" for rank in range(place.world_size)]
            if store.check(keys):
                _check_same([json.loads(store.get(key)) for key in keys])
                signals.together = True
                return PrefixStore(here, store)
        time.sleep(LOOK)
    names = _names(store, place.world_size)
    here = hashlib.sha256("".join(names).encode()).hexdigest()
    others = {rank: f"{here}/{rank}" for rank in range(place.world_size) if rank != place.rank}
    # Where all have a name, some may be those of an earlier start.
    missing = [str(rank) for rank in others if not names[rank]]
    missing = missing or [str(rank) for rank, key in others.items() if not store.check([key])]
    raise ConfigError(
        f"torchrun: expected {place.world_size} ranks to come together within --dist-timeout"
        f" {seconds:g} s, and missed {', '.join(missing) or 'each other'}; see what those say, or"
        " give more time"
    )


def _check_same(settings: Sequence[dict[str, Any]]) -> None:
    """Refuse ranks with different settings, in the same words on all of them."""
    for rank, theirs in enumerate(settings):
        for name, value in settings[0].items():
            if theirs[name] != value:
                raise ConfigError(
                    f"{flag(name)}: expected the same on every rank, got {value!r} on rank 0"
                    f" and {theirs[name]!r} on rank {rank}"
                )


def _names(store: Store, size: int) -> list[str]:
    """Of every rank the name that it has set last; empty where it has set none."""
    keys = [f"here/{rank}" for rank in range(size)]
    return [store.get(key).decode() if store.check([key]) else "" for key in keys]


def _meeting(store: Store) -> list[str]:
    """The names that rank 0 has seen last."""
    names: list[str] = json.loads(store.get("meeting")) if store.check(["meeting"]) else []
    return names
