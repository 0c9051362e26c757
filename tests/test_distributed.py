"""Ranks: what they tell each other."""

import signal

import pytest
from torch.distributed import HashStore, TCPStore

from vecpg import signals
from vecpg.config import Config, ConfigError
from vecpg.distributed import Ranks, RanksLost, agent_store, joined
from vecpg.run.interrupts import Interrupted
from vecpg.torchrun import Place


def place_of(rank, size, port=0, run_id="of a test"):
    return Place(rank, size, rank, size, 0, 0, run_id, "localhost", port)


def two_ranks():
    """What they tell each other by the store alone."""
    store = HashStore()
    return [Ranks(place_of(rank, 2), 60.0, store) for rank in (0, 1)]


def a_server():
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def test_keys_of_another_run_are_not_among_these():
    server = a_server()
    mine, other = (agent_store(place_of(0, 1, server.port, run_id), 10.0) for run_id in ("a", "b"))
    mine.set("key", "mine")
    assert mine.check(["key"])
    assert not other.check(["key"])
    assert server.check(["vecpg/a/key"])


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (Interrupted(signal.SIGTERM), Interrupted, "SIGTERM"),
        (ConfigError("--so and so"), ConfigError, "--so and so"),
        (OSError("no room"), RanksLost, "rank 0 failed: OSError: no room"),
    ],
    ids=["stopped", "refused", "failed"],
)
def test_who_waits_for_rank_0_learns_why_it_has_ended(error, kind, words, inside):
    """Whether that was in what it makes for all, or before."""
    first, other = two_ranks()

    def fail():
        raise error

    if inside:
        with pytest.raises(type(error)):
            first.told(fail)
    else:
        first.leave(error)
    with pytest.raises((Interrupted, RuntimeError, ValueError)) as found:
        other.told(fail)
    assert type(found.value) is kind
    assert str(found.value) == words


def test_what_rank_0_made_before_it_ended_is_told():
    first, other = two_ranks()
    assert first.told(lambda: [1, 2]) == [1, 2]
    first.leave(OSError("no room"))
    assert other.told(lambda: None) == [1, 2]
    with pytest.raises(RanksLost, match="no room"):
        other.told(lambda: None)


@pytest.mark.parametrize(("max_restarts", "status"), [("0", 143), ("3", 0)])
def test_the_only_rank_is_not_started_again_after_a_signal(monkeypatch, max_restarts, status):
    """It has met all others that there are."""
    server = a_server()
    monkeypatch.setattr(signals, "together", False)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", max_restarts)
    monkeypatch.setattr("vecpg.distributed.place", lambda: place_of(0, 1, server.port))
    assert signals.exit_status(signal.SIGTERM) == 143
    with joined(Config()) as ranks:
        assert ranks.size == 1
        assert signals.exit_status(signal.SIGTERM) == status
