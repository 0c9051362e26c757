"""Ranks: one run on several processes that torchrun started, on one machine or several."""

from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from vecpg.torchrun import Place


def agent_store(place: Place, seconds: float) -> Store:
    """The key-value store that torchrun keeps; what is set there outlives restarts.

    Keys of another run of torchrun, or another program, are not among these.

    Args:
        place: of this process.
        seconds: that connecting, and waiting for a key, may take.
    """
    given = place.address, place.port, None, False, timedelta(seconds=seconds)
    return PrefixStore(f"vecpg/{place.run_id}", TCPStore(*given))


class RanksLost(RuntimeError):
    """Another rank has ended, or did not answer: the message says all that there is to say."""
