"""Which process of torchrun this is."""

import pytest

from vecpg.torchrun import place

VARIABLES = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def test_the_place_is_what_torchrun_says():
    found = place(VARIABLES)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (5, 8, 1, 4)
    assert (found.restarts, found.max_restarts) == (2, 3)
    assert (found.run_id, found.address, found.port) == ("x", "node0", 29500)


@pytest.mark.parametrize("variables", [{}, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}])
def test_another_launcher_is_not_torchrun(variables):
    assert place(variables) is None
