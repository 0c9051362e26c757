"""The command `vecpg`, which is also `python -m vecpg`: what holds from its first moment on."""

import signal
import sys
from collections.abc import Sequence

from vecpg import signals


def main(args: Sequence[str] | None = None) -> None:
    """`vecpg COMMAND ...`: a process of its own, from the first import to the exit status.

    A signal never gives a traceback, nor does a stream that is closed or has no reader.
    """
    given = sys.argv[1:] if args is None else list(args)
    # Where a run goes on that was there before, there is something to resume again.
    if given[:1] == ["train"] and not any(each.startswith("--resume") for each in given):
        signals.remark = "; nothing to resume"
    signals.answer_at_once()
    from vecpg import streams

    streams.keep()
    from vecpg import cli

    try:
        cli.main(given)
    except SystemExit as exit_:
        if exit_.code:
            raise
    finally:
        # Python takes its handlers away before it ends; a terminal may be closing all the while.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    lost = streams.loss(sys.stdout)
    if isinstance(lost, BrokenPipeError):  # whoever read it has gone (| head)
        sys.exit(128 + signal.SIGPIPE)
    if lost is not None:
        print(f"error: stdout cannot be written: {lost.strerror}", file=sys.stderr)
        sys.exit(cli.EXIT_FAILED)


if __name__ == "__main__":
    main()
