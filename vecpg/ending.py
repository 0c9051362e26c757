"""What a process says as it ends: once, where ranks that torchrun started end alike."""

import hashlib
import signal
import sys
import textwrap
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from vecpg.torchrun import place

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

# How long a rank waits for others to come to the same end. Before a run they may have to import
# torch first, on few cores; in one they are told of a failure by the exchange in which it ended.
_REFUSAL_SECONDS = 10.0
_FAILURE_SECONDS = 2.0
# How long it may take to be connected to torchrun's store.
_STORE_SECONDS = 10.0


def say(lines: str, *, refusal: bool, of_another: bool = False) -> None:
    """Write to stderr why this process ends, unless another rank did so for all of them.

    Rank 0 writes. Another rank writes only what rank 0 did not within some seconds, since it has no
    such fault, and "[rank k] " before each line. From here on SIGTERM is ignored: that is what
    torchrun ends the others by once one rank has ended.

    Args:
        lines: without the last newline.
        refusal: the run never began, and cannot: it is not said again when torchrun restarts the
            ranks, and they wait for each other, so that all of them can end by themselves.
        of_another: it is what became of another rank; where rank 0 has spoken, that is enough.
    """
    where = place()
    if where is None or (where.world_size == 1 and not (refusal and where.max_restarts)):
        print(lines, file=sys.stderr)
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from vecpg.rendezvous import agent_store

    seconds = _REFUSAL_SECONDS if refusal else _FAILURE_SECONDS
    ended = f"ended/{where.restarts}"
    # A trace above it is not what another rank would have.
    key = hashlib.sha256(lines.splitlines()[-1].encode()).hexdigest()
    key = f"said/{key}" if refusal else f"{ended}/{key}"
    store, together, first = None, False, True
    with suppress(RuntimeError):  # torchrun may have ended; then this is said by each
        store = agent_store(where, _STORE_SECONDS)
        together = where.rank == 0 or _comes(store, f"{ended}/rank 0", seconds)
        first = store.add(key, 1) == 1 and not (of_another and where.rank and together)
    if first:
        prefix = f"[rank {where.rank}] " if where.rank else ""
        print(textwrap.indent(lines, prefix), file=sys.stderr, flush=True)
    if store is not None:
        with suppress(RuntimeError):
            if where.rank == 0:
                store.set(f"{ended}/rank 0", "")
            if refusal and together:
                if store.add(f"{ended}/number", 1) == where.world_size:
                    store.set(f"{ended}/all", "")
                _comes(store, f"{ended}/all", seconds)


def _comes(store: "Store", key: str, seconds: float) -> bool:
    """Whether a key is set within so many seconds. The store's own wait logs where it is not."""
    end = time.monotonic() + seconds
    while not (there := store.check([key])) and time.monotonic() < end:
        time.sleep(0.05)
    return there
