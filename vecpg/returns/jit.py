"""Machine code from Python functions, with the settings that every kernel here shares.

It lies in this package because this package imports nothing else of vecpg.
"""

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numba
from numba.core import event

_log = logging.getLogger(__name__)
_announced: set[str] = set()


def jit(function: Callable[..., Any]) -> Any:
    """Compile `function` when it is first called, and keep the machine code on disk.

    The interpreter's lock is released while it runs. Sums may be taken in another order, so that
    they vectorize: the same order at every call of the same machine code. NaN and infinity are
    kept. Where no directory can be written to, it is compiled anew in every process.
    """
    settings: dict[str, Any] = {
        "nogil": True,
        "no_cfunc_wrapper": True,  # nobody calls these from C, and it takes time to compile
        "error_model": "numpy",  # no check for division by zero, which would not vectorize
        "fastmath": {"contract", "reassoc", "nsz", "arcp"},
    }
    try:
        return numba.njit(cache=True, **settings)(function)
    except RuntimeError:
        if "cache" not in _announced:
            _announced.add("cache")
            _log.info("no directory for compiled code can be written to; compiling at every start")
        return numba.njit(**settings)(function)


class Compilation(event.Listener):
    """Seconds spent compiling while it is entered; the first time it happens, the log says so.

    Example:
        >>> with Compilation() as compilation:
        ...     numba.njit(lambda x: x + 1)(1)
        2
        >>> compilation.seconds > 0
        True
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._started = 0.0

    def __enter__(self) -> "Compilation":
        event.register("numba:compile", self)  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        event.unregister("numba:compile", self)  # type: ignore[no-untyped-call]

    def on_start(self, event: Any) -> None:
        """A function that calls others compiles them within its own compilation."""
        if self._depth == 0:
            self._started = time.perf_counter()
            if self.seconds == 0:
                _log.info("compiling kernels, once; this takes about ten seconds")
        self._depth += 1

    def on_end(self, event: Any) -> None:
        """Count the outermost ones."""
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._started
