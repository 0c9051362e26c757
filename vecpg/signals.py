"""How a command answers a signal while there is nothing to save: one line, and its exit status.

Imported before all that takes long to import, so it imports next to nothing itself.
"""

import os
import signal
from contextlib import suppress
from types import FrameType

# What ends a run. A terminal that is closed sends the last.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# What is said after the name of a signal, as long as there is nothing to save.
remark = ""
# Whether it was said already which signal ends this process.
said = False
# Whether the ranks of a run have met: then one that is stopped stops all of them.
together = False


def speaks() -> bool:
    """Whether this process says what its whole command does: under torchrun rank 0 alone."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


def exit_status(signum: int) -> int:
    """128 + the number of the signal, as shells have it; SIGHUP ends a run as SIGTERM does.

    It is 0 where all ranks of a run are stopped, and torchrun would take anything else for a
    failure, and start them again.

    Example:
        >>> [exit_status(signum) for signum in STOPPING]
        [130, 143, 143]
    """
    if together and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        return 0
    return 128 + (signal.SIGTERM if signum == signal.SIGHUP else signum)


def is_left_alone(signum: int) -> bool:
    """Whether a signal stays what it is: ignored (`nohup`, a shell's `&`), or another library's."""
    return signal.getsignal(signum) in (signal.SIG_IGN, None)


def answer_at_once() -> None:
    """From now on a signal ends this process at once, without a traceback.

    An exception would not do: raised while a module is imported, it may be swallowed, or come out
    as another one. SIGUSR1, which asks to save, changes nothing: there is nothing to save.
    """
    for signum in STOPPING:
        if not is_left_alone(signum):
            signal.signal(signum, _stop)
    if not is_left_alone(signal.SIGUSR1):
        signal.signal(signal.SIGUSR1, _go_on)


def end_process(signum: int) -> None:
    """Say which signal it was, and end this process; nothing is finished, flushed or closed."""
    if not said and speaks():
        with suppress(OSError):
            os.write(2, f"stopped by {signal.Signals(signum).name}{remark}\n".encode())
    os._exit(exit_status(signum))


def _stop(signum: int, frame: FrameType | None) -> None:
    end_process(signum)


def _go_on(signum: int, frame: FrameType | None) -> None:
    pass


# What `answer_at_once` sets.
HANDLERS = (_stop, _go_on)
