"""stdout and stderr that may be closed, or lose their reader, without an error where they are used.

A run is worth more than what it prints.
"""

import io
import os
import sys
from typing import Any


def keep() -> None:
    """Replace stdout and stderr by streams that a write never fails on.

    What cannot be written goes nowhere, and so does all that follows. A stream that was closed from
    the start is as if it were /dev/null; its number goes to no file that is opened later.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this
    sys.stdout, sys.stderr = _kept(1, sys.stdout), _kept(2, sys.stderr)


def loss(stream: Any) -> OSError | None:
    """Why a stream of `keep` could not be written to, once it could not."""
    stream.flush()
    raw = stream.buffer.raw
    return raw.loss if isinstance(raw, _Kept) else None


def beside(stream: Any, number: int) -> io.TextIOWrapper:
    """Another stream, whose loss is that of a stream of `keep` too."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    if not isinstance(raw, _Kept):
        return open(number, "w", encoding="utf-8", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(_Kept(number, raw)), encoding="utf-8")


def _kept(number: int, stream: Any) -> io.TextIOWrapper:
    if stream is None:  # closed from the start
        return io.TextIOWrapper(io.BufferedWriter(_Kept(number)), encoding="utf-8")
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Kept(number)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Kept(io.FileIO):
    def __init__(self, number: int, beside: "_Kept | None" = None) -> None:
        super().__init__(number, "w", closefd=False)
        self.loss: OSError | None = None
        self._beside = beside

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.loss = error
            if self._beside is not None:
                self._beside.loss = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)
