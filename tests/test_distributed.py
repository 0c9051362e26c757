"""Ranks: what they tell each other."""

import torch

from vecpg.distributed import agent_store
from vecpg.torchrun import Place


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
