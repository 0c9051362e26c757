"""What a user names as "module:callable": imported, and found there.

Whoever calls this has been told the name by the user: what stands in a file is not loaded.
"""

import importlib
from collections.abc import Callable
from typing import Any


def load(name: str, flag: str) -> Callable[..., Any]:
    """The callable that "module:callable" names; the module is imported, which runs it.

    Args:
        name: such as "gymnasium.wrappers:FlattenObservation"; behind the colon a path of names.
        flag: the setting that it was given for, for messages.

    Raises:
        ValueError: it is no such name, the module cannot be imported, or has no such callable; in
            one line, which begins with flag and name.

    Example:
        >>> load("math:sqrt", "--network")(4)
        2.0
        >>> load("math:square", "--network")
        Traceback (most recent call last):
            ...
        ValueError: --network math:square: expected square in the module math, found none
    """
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise ValueError(f"{flag} {name}: expected module:callable, got {name!r}")
    try:
        found: Any = importlib.import_module(module)
    # The module is the user's own, and may raise anything while it is imported.
    except (Exception, SystemExit) as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{flag} {name}: expected a module that can be imported, from here or from PYTHONPATH,"
            f" got {words}"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{flag} {name}: expected {path} in the module {module}, found none")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(
            f"{flag} {name}: expected something that can be called, got {type(found).__name__}"
        )
    called: Callable[..., Any] = found
    return called
