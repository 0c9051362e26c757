"""How an environment fails, in words that reach the user from any process."""

import logging
import traceback
from typing import Any

import gymnasium

_log = logging.getLogger(__name__)

# Who takes part in making an environment without being its own code.
_MAKERS = {"gymnasium", "vecpg", "importlib", "functools"}
# Likewise in stepping one; what Gymnasium has under `envs` is some environment's own.
_STEPPERS = {"gymnasium", "vecpg", "functools", "numpy"}


class EnvironmentFailure(RuntimeError):
    """An environment raised, died, hung, or returned something that is not a number.

    The message has its index, the step and the reset seed. `trace` is the environment's own
    traceback, empty where there is none.
    """

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class EnvironmentNotMade(ValueError):
    """An environment could not be made.

    `trace` is the traceback of what its constructor raised; it is empty where none of its own code
    was running, as where a keyword argument is unknown or an extra is not installed.
    """

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class WrapperFailed(RuntimeError):
    """A wrapper raised, or gave something that is no environment; the message has its name."""


class SubEnvironmentError(RuntimeError):
    """One copy of the environment failed.

    It travels from a worker process, where the exception itself might not: its argument is plain
    (index, verb, detail, trace), and one can be made from another.

    index: which copy.
    verb: "failed", "died", "hung" or "allows no action".
    detail: the exception, the exit status, or the time it was given.
    trace: the environment's own traceback, or "".
    """

    def __init__(self, failure: "tuple[int, str, str, str] | SubEnvironmentError") -> None:
        plain: tuple[int, str, str, str] = (
            failure.args[0] if isinstance(failure, SubEnvironmentError) else failure
        )
        super().__init__(plain)
        self.index, self.verb, self.detail, self.trace = plain

    def __str__(self) -> str:
        return f"environment {self.index} {self.verb}: {self.detail}"

    @classmethod
    def raised(cls, index: int, error: BaseException) -> "SubEnvironmentError":
        """What `error` says, in one line, without `error`."""
        text = _one_line(error)
        detail = f"{type(error).__name__}: {text}" if text else type(error).__name__
        return cls((index, "failed", detail, _trace_of_stepping(error)))

    @classmethod
    def raised_in_making(cls, index: int, error: BaseException) -> "SubEnvironmentError":
        """What the constructor's `error` says, in one line, without `error`."""
        return cls((index, "failed", in_words(error), trace_of_making(error)))


def close_env(env: gymnasium.Env[Any, Any], index: int) -> None:
    """Close copy `index`; what it raises is a warning, and keeps no other from being closed."""
    try:
        env.close()
    except (Exception, SystemExit) as error:
        _log.warning("closing environment %d failed: %s", index, in_words(error))


def in_words(error: BaseException) -> str:
    """The error in one line, with its type where the message alone would not say."""
    text = _one_line(error)
    if isinstance(error, gymnasium.error.Error | WrapperFailed) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _one_line(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())
    # A user's own may raise where it is asked what it says.
    except Exception:
        return ""


def _trace_of_stepping(error: BaseException) -> str:
    """The traceback of what a step or reset raised, or "" where none of its own code was running.

    That is so where what it returned is not what was expected.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] not in _STEPPERS or name.startswith("gymnasium.envs."):
            return "".join(traceback.format_exception(error))
    return ""


def trace_of_making(error: BaseException) -> str:
    """The traceback of what a constructor raised, or "" where none of its own code was running."""
    if isinstance(error, gymnasium.error.Error):
        return ""
    # Gymnasium raises some anew, from what the constructor raised.
    each: BaseException | None = error
    while each is not None:
        for frame, _ in traceback.walk_tb(each.__traceback__):
            if frame.f_globals.get("__name__", "").partition(".")[0] not in _MAKERS:
                return "".join(traceback.format_exception(error))
        each = each.__cause__
    return ""
