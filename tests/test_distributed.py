"""Ranks: what they tell each other."""

import signal

import pytest
import torch
from torch.distributed import HashStore

from vecpg.distributed import Ranks, agent_store
from vecpg.run.interrupts import Interrupted
from vecpg.torchrun import Place


def of_one_store(store, seconds=0.5):
    """Two ranks."""
    for rank in (0, 1):
        place = Place(rank, 2, rank, 2, 0, 0, "of a test", "localhost", 0)
        yield Ranks(place, seconds, store, None)


def test_keys_of_another_run_are_not_among_these():
    server = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    mine, other = (
        agent_store(Place(0, 1, 0, 1, 0, 0, run_id, "localhost", server.port), 10.0)
        for run_id in ("a", "b")
    )
    mine.set("key", "mine")
    assert mine.check(["key"])
    assert not other.check(["key"])
    assert server.check(["vecpg/a/key"])


def test_who_waits_for_rank_0_hears_that_it_has_left():
    first, second = of_one_store(HashStore())
    first.leave(Interrupted(signal.SIGINT))
    with pytest.raises(Interrupted, match="SIGINT"):
        second.told(lambda: None)


@pytest.mark.parametrize("told", [False, True])
def test_a_signal_to_rank_0_as_it_answers_leaves_nobody_without_an_answer(told):
    """And not with two."""

    class Stopped(HashStore):
        def set(self, key, value):
            if told or not key.startswith("told"):
                super().set(key, value)
            if key.startswith("told"):
                raise Interrupted(signal.SIGTERM)

    store = Stopped()
    first, second = of_one_store(store)
    with pytest.raises(Interrupted) as stopped:
        first.told(lambda: "made")
    if told:
        assert second.told(lambda: None) == "made"
    else:
        with pytest.raises(Interrupted, match="SIGTERM"):
            second.told(lambda: None)
    # Who was told what was made has still to hear that rank 0 leaves.
    first.leave(stopped.value)
    assert store.check(["left/0"]) == told
