"""The process that workers are forked from, and which processes can have one."""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import forkserver

from vecpg.envs import in_worker
from vecpg.envs.errors import EnvironmentNotMade

# The exit status of a process that cannot become a worker, since the script that it imports starts
# some. It is what the fork server makes of any.
UNGUARDED = 1
# A worker is there to use one core. What a library's own threads would add, others wait for.
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def check_process() -> None:
    """Refuse to start workers from a process that cannot have any.

    Raises:
        EnvironmentNotMade: it is daemonic.
        SystemExit: it is itself about to become a worker, and imports a script that starts some.
            The process that waits for it raises `EnvironmentNotMade`.
    """
    process = multiprocessing.current_process()
    if process.daemon:
        raise EnvironmentNotMade(
            "--vectorization async: this process is daemonic, and daemonic processes may have no"
            " children; use --vectorization sync here, or start this process by"
            " concurrent.futures.ProcessPoolExecutor in place of multiprocessing.Pool"
        )
    if getattr(process, "_inheriting", False):
        raise SystemExit(UNGUARDED)
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    if main.__spec__ is None and script is not None and not os.path.exists(script):
        raise EnvironmentNotMade(
            f"--vectorization async: each worker imports the script that was run, and {script} is"
            " no file; put it in one, or use --vectorization sync"
        )


def start() -> None:
    """Start it while it would ignore the signals that its children leave to this process.

    What ends it would make all its children look dead.
    """
    multiprocessing.set_forkserver_preload(["__main__", in_worker.__name__])
    # What the user has set stays.
    one = () if any(name in os.environ for name in _ONE_THREAD) else _ONE_THREAD
    main = threading.current_thread() is threading.main_thread()
    before = {}
    if main:
        before = {
            signum: signal.signal(signum, signal.SIG_IGN) for signum in in_worker.ANSWERED_ABOVE
        }
    os.environ.update(dict.fromkeys(one, "1"))
    try:
        forkserver.ensure_running()
    finally:
        for name in one:
            os.environ.pop(name, None)
        for signum, handler in before.items():
            signal.signal(signum, handler)
