"""The settings that a file holds: checked, and what they name is trusted only if it is typed too.

Torch is not imported here: a mistake costs no time.
"""

import difflib
import json
import re
import shlex
from pathlib import Path
from typing import Any

from vecpg.config import Config, ConfigError, flag, to_dict

# Why a name that stands in a file is asked for.
NAME_IT_TOO = "what a file names is imported or opened only if you name it too"
# Of these settings; see `names_to_type`.
NAMES = ("env_id", "env_kwargs", "wrappers", "network")
# Objects and lists inside each other.
_DEEPEST = 100
# In a text, what a path or the name of a module may have, and a plain word has not.
_NO_PLAIN_WORD = re.compile(r"[:/\\.~]")


def config_of(stored: Any, path: Path | str) -> Config:
    """The settings that `to_dict` gave, checked as those that are typed.

    Args:
        stored: may come from anywhere.
        path: for messages.

    Raises:
        ConfigError: a setting that is unknown, missing, of another type or out of its range, with
            the file's name.

    Example:
        >>> config_of({"num_env": 3}, "config.json")
        Traceback (most recent call last):
            ...
        vecpg.config.ConfigError: config.json: 'num_env' is no setting; did you mean 'num_envs'?
    """
    if not isinstance(stored, dict):
        raise ConfigError(f"{path}: expected the settings of a run, got {_shown(stored)}")
    known = to_dict(Config())
    for name in stored:
        if name not in known:
            near = difflib.get_close_matches(str(name)[:80], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "another vecpg may have written it"
            raise ConfigError(f"{path}: {_shown(name)} is no setting; {hint}")
    for name in known:
        if name not in stored:
            raise ConfigError(f"{path}: expected the setting {name}, got none")
    try:
        return Config(**stored)
    # Whole numbers beyond the range of real ones, and dictionaries inside each other, ...
    except (ConfigError, OverflowError, RecursionError) as error:
        reason = str(error)[:500]
    raise ConfigError(f"{path}: {reason}")


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """The content of a file, if it is a file: a pipe would keep whoever reads it waiting.

    Args:
        path: of the file.
        most: bytes that it may have; None: any number.

    Raises:
        ConfigError: it cannot be read, is something else, or is longer.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: expected a file, got something else")
        if most is not None and (size := path.stat().st_size) > most:
            raise ConfigError(f"{path}: damaged (expected {most} bytes at most, found {size})")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def read_object(data: bytes, path: Path | str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: there is none, with the file's name.

    Example:
        >>> read_object(b'{"seed": 1}', "config.json")
        {'seed': 1}
    """
    try:
        content = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200]
    else:
        if not isinstance(content, dict):
            reason = f"got {_shown(content)}"
        elif _is_deep(content):
            reason = f"more than {_DEEPEST} objects and lists are inside each other"
        else:
            return content
    raise ConfigError(f"{path}: expected a JSON object ({len(data)} bytes): {reason}")


def trusted_names(stored: dict[str, Any], typed: dict[str, Any], command: str) -> None:
    """Refuse what a file names unless the user has typed it too: see `names_to_type`.

    Args:
        stored: the settings in the file.
        typed: of `NAMES`, what the user has typed, and None for the others.
        command: what the user has called, as a shell reads it.

    Raises:
        ConfigError: one is missing, with the command that has it; or what was typed is not what
            is stored, with both.

    Example:
        >>> stored = {"env_id": "mine:Ball-v0", "env_kwargs": {}, "wrappers": [], "network": "mlp"}
        >>> typed = {"env_id": "mine:Ball-v0", "env_kwargs": None}
        >>> trusted_names(stored, typed, "vecpg evaluate runs/x")
        >>> trusted_names(stored, {}, "vecpg evaluate runs/x")
        Traceback (most recent call last):
            ...
        vecpg.config.ConfigError: what a file names ...: vecpg evaluate runs/x --env-id mine:Ball-v0
    """
    for name in NAMES:
        given = typed.get(name)
        if given is not None and _text(given) != _text(stored[name]):
            raise ConfigError(
                f"{flag(name)}: expected {_text(stored[name])}, with which it was trained, got"
                f" {_text(given)}"
            )
    missing = {name: stored[name] for name in names_to_type(stored) if typed.get(name) is None}
    if missing:
        raise ConfigError(
            f"{NAME_IT_TOO}; if you trust"
            f" {' and '.join(map(_text, missing.values()))}, type: {command} {_flags(missing)}"
        )


def names_to_type(stored: dict[str, Any]) -> list[str]:
    """Which settings a user has to type for a file with these: those that may run or open things.

    `module:Id` imports a module, which runs it, and so do wrappers, a network of the user's own
    and, perhaps, a text in `env_kwargs`, which may also name a file. From a file that somebody else
    may have written nothing of this is taken: neither an `env_id` or `network` with a colon, nor
    `wrappers`, nor `env_kwargs` that hold anywhere a text with a colon, slash, backslash, dot or
    tilde.

    Example:
        >>> stored = {"env_id": "Ant-v5", "wrappers": [], "network": "mlp"}
        >>> names_to_type(stored | {"env_kwargs": {"xml_file": "/home/me/ant.xml"}})
        ['env_kwargs']
        >>> names_to_type(stored | {"env_kwargs": {"terminate_when_unhealthy": False}})
        []
    """
    suspect = {
        "env_id": ":" in stored["env_id"],
        "env_kwargs": _names(stored["env_kwargs"]),
        "wrappers": bool(stored["wrappers"]),
        "network": ":" in stored["network"],
    }
    return [name for name in NAMES if suspect[name]]


def flags_to_type(stored: dict[str, Any]) -> str:
    """What `names_to_type` says, as a shell reads it.

    Example:
        >>> stored = {"env_id": "mine:Ball-v0", "env_kwargs": {}, "network": "mlp"}
        >>> flags_to_type(stored | {"wrappers": ["mine:Wrap", "mine:Other"]})
        '--env-id mine:Ball-v0 --wrappers mine:Wrap mine:Other'
    """
    return _flags({name: stored[name] for name in names_to_type(stored)})


def _flags(settings: dict[str, Any]) -> str:
    words: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        words += [flag(name), *map(_text, values)]
    return shlex.join(words)


def _names(value: Any) -> bool:
    """Whether there is a text in it that is no plain word."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list | tuple):
            waiting += one
        elif isinstance(one, str) and _NO_PLAIN_WORD.search(one):
            return True
    return False


def _text(value: Any) -> str:
    """As a user would type it, in plain characters; the same for equal values of equal types."""
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value)) if value else "none"
    if not isinstance(value, str):
        return json.dumps(value, sort_keys=True)
    return value if value.isprintable() else ascii(value)


def _is_deep(value: Any) -> bool:
    """Whether so much is inside each other that going through it may fail."""
    level = [value]
    for _ in range(_DEEPEST):
        inside = [each.values() if isinstance(each, dict) else each for each in level]
        level = [one for each in inside for one in each if isinstance(one, dict | list)]
        if not level:
            return False
    return True


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _shown(value: Any) -> str:
    return ascii(value)[:80] if isinstance(value, str | int | float) else type(value).__name__
