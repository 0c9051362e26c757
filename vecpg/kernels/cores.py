"""How many cores there are for this process. Apart from `threads`: processes ask without torch."""

import os


def cores() -> int:
    """How many cores this process may use; under torchrun its share, at least 1.

    The ranks on a machine are taken to share the cores that each of them may use. Whoever gave each
    rank cores of its own (`torchrun --numa-binding exclusive`) says how many: `--threads`.
    """
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return here
    return max(1, here // int(os.environ["LOCAL_WORLD_SIZE"]))
