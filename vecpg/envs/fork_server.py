"""The process that workers are forked from, and which processes can have one."""

import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver, resource_tracker

from vecpg.envs import in_worker
from vecpg.envs.errors import EnvironmentNotMade

# The exit status of a process that cannot become a worker, since the script that it imports starts
# some. Nothing else has it: what fails in the fork server's child has 1.
UNGUARDED = 97
# A worker is there to use one core. What a library's own threads would add, others wait for.
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def check_process() -> None:
    """Refuse to start workers from a process that cannot have any.

    Raises:
        EnvironmentNotMade: it is daemonic.

    A process that is itself about to become a worker, and imports a script that starts some, ends
    with status `UNGUARDED`; the one that waits for it raises `EnvironmentNotMade`.
    """
    process = multiprocessing.current_process()
    if process.daemon:
        raise EnvironmentNotMade(
            "--vectorization async: this process is daemonic, and daemonic processes may have no"
            " children; use --vectorization sync here, or start this process by"
            " concurrent.futures.ProcessPoolExecutor in place of multiprocessing.Pool"
        )
    if getattr(process, "_inheriting", False):
        # The fork server would give an exception's status its own.
        os._exit(UNGUARDED)
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    if (
        getattr(main, "__spec__", None) is None
        and script is not None
        and not os.path.exists(script)
    ):
        raise EnvironmentNotMade(
            f"--vectorization async: each worker imports the script that was run, and {script} is"
            " no file; put it in one, or use --vectorization sync"
        )


def start() -> None:
    """Start it so that the signals which its children leave to this process are blocked in it.

    What ends it would make all its children look dead. They are blocked, not ignored: this process
    may have handlers that are not Python's, which Python could not put back.
    """
    multiprocessing.set_forkserver_preload(["__main__", in_worker.__name__])
    # What the user has set stays.
    one = () if any(name in os.environ for name in _ONE_THREAD) else _ONE_THREAD
    before = signal.pthread_sigmask(signal.SIG_BLOCK, in_worker.ANSWERED_ABOVE)
    os.environ.update(dict.fromkeys(one, "1"))
    try:
        # Starting this unblocks some of them.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, in_worker.ANSWERED_ABOVE)
        forkserver.ensure_running()
    finally:
        for name in one:
            os.environ.pop(name, None)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
