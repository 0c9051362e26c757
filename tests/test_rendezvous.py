"""Where ranks find each other."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from torch.distributed import HashStore, TCPStore

from vecpg import rendezvous, signals
from vecpg.config import Config, ConfigError
from vecpg.rendezvous import agent_store, meet
from vecpg.torchrun import Place

CONFIG = Config(dist_timeout=30.0)


def place_of(rank, size, port=0, run_id="of a test"):
    return Place(rank, size, rank, size, 0, 0, run_id, "localhost", port)


@pytest.fixture(autouse=True)
def apart(monkeypatch):
    monkeypatch.setattr(signals, "together", False)


def met(store, *settings):
    """What becomes of ranks that come at once, each with settings of its own."""
    with ThreadPoolExecutor() as pool:
        comes = [
            pool.submit(meet, store, place_of(rank, len(settings)), *own)
            for rank, own in enumerate(settings)
        ]
    return [each.exception() or each.result() for each in comes]


def test_keys_of_another_run_are_not_among_these():
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    mine, other = (agent_store(place_of(0, 1, server.port, run_id), 10.0) for run_id in ("a", "b"))
    mine.set("key", "mine")
    assert mine.check(["key"])
    assert not other.check(["key"])
    assert server.check(["vecpg/a/key"])


def test_ranks_of_another_start_are_not_among_these():
    """Also where one of them has left its name, and one that comes finds it first."""
    store = HashStore()
    before = met(store, (CONFIG,), (CONFIG,), (CONFIG,))
    before[0].set("key", "of before")
    assert [each.check(["key"]) for each in before] == [True] * 3
    assert signals.together
    now = met(store, (CONFIG,), (CONFIG,))
    assert [each.check(["key"]) for each in now] == [False] * 2
    now[1].set("key", "of now")
    assert now[0].get("key") == b"of now"
    assert before[0].get("key") == b"of before"


def test_who_comes_alone_is_not_taken_in_by_names_that_were_left(monkeypatch):
    store, short = HashStore(), replace(CONFIG, dist_timeout=0.2)
    met(store, (CONFIG,), (CONFIG,))
    monkeypatch.setattr(signals, "together", False)
    for rank, missed in ((0, "1"), (1, "0")):
        with pytest.raises(ConfigError, match=f"2 ranks to come together .* and missed {missed};"):
            meet(store, place_of(rank, 2), short)
    assert not signals.together


def test_settings_are_the_same_on_every_rank_and_so_is_whether_they_are_a_populations():
    words = "expected the same on every rank, got"
    for own, refusal in (
        ((replace(CONFIG, gamma=0.5),), f"--gamma: {words} 0.99 on rank 0 and 0.5 on rank 1"),
        ((CONFIG, 2), f"--num-seeds: {words} 1 on rank 0 and 2 on rank 1"),
    ):
        assert {str(each) for each in met(HashStore(), (CONFIG,), own)} == {refusal}
    shown = replace(CONFIG, progress=not CONFIG.progress, log_every=9.0, resume="auto")
    first, second = met(HashStore(), (CONFIG,), (shown,))
    first.set("key", "")
    assert second.check(["key"])


def test_a_rank_that_comes_late_is_waited_for(monkeypatch):
    store, waited = HashStore(), threading.Event()
    monkeypatch.setattr(rendezvous.time, "sleep", lambda seconds: waited.set())
    with ThreadPoolExecutor() as pool:
        first = pool.submit(meet, store, place_of(0, 2), CONFIG)
        assert waited.wait(10.0)
        second = meet(store, place_of(1, 2), CONFIG)
    first.result().set("key", "")
    assert second.check(["key"])
