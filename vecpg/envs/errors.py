"""How an environment fails, in words that reach the user from any process."""

import traceback


class EnvironmentFailure(RuntimeError):
    """An environment raised, died, hung, or returned something that is not a number.

    The message has its index, the step and the reset seed. `trace` is the environment's own
    traceback, empty where there is none.
    """

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class SubEnvironmentError(RuntimeError):
    """One copy of the environment failed.

    It travels from a worker process, where the exception itself might not: its argument is plain
    (index, verb, detail, trace), and one can be made from another, as Gymnasium does on arrival.

    index: which copy.
    verb: "failed", "died" or "hung".
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
        """What `error` says, without `error`."""
        detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return cls((index, "failed", detail, "".join(traceback.format_exception(error))))
