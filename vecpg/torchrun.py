"""Which of torchrun's processes this one is. Only the standard library is imported."""

import os
from collections.abc import Mapping
from typing import NamedTuple


class Place(NamedTuple):
    """Where a process stands among those that one torchrun command, or several, started together.

    rank:             0 to world_size - 1; another one after a restart, perhaps.
    world_size:       how many there are, on all machines.
    local_rank:       0 to local_world_size - 1, on this machine.
    local_world_size: how many there are on this machine.
    restarts:         how often they were restarted after one of them failed.
    max_restarts:     how often they may be.
    run_id:           of the torchrun command.
    address, port:    of the key-value store that outlives restarts.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    restarts: int
    max_restarts: int
    run_id: str
    address: str
    port: int


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """What torchrun's environment variables say; None in a process that it did not start.

    Example:
        >>> place({"RANK": "0", "WORLD_SIZE": "2"}) is None  # of another launcher
        True
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    numbers = {
        name: int(environment[variable])
        for name, variable in {
            "rank": "RANK",
            "world_size": "WORLD_SIZE",
            "local_rank": "LOCAL_RANK",
            "local_world_size": "LOCAL_WORLD_SIZE",
            "restarts": "TORCHELASTIC_RESTART_COUNT",
            "max_restarts": "TORCHELASTIC_MAX_RESTARTS",
            "port": "MASTER_PORT",
        }.items()
    }
    return Place(
        run_id=environment["TORCHELASTIC_RUN_ID"], address=environment["MASTER_ADDR"], **numbers
    )
