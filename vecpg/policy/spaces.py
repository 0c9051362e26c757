"""Spaces as plain types, as a checkpoint keeps them, and back."""

import hashlib
import json
import math
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

# What a description has beside kind and dtype.
_KEYS = {
    "Box": ("shape", "low", "high"),
    "Discrete": ("n", "start"),
    "MultiBinary": ("n",),
    "MultiDiscrete": ("nvec", "start"),
}
_WHOLE = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_DTYPES = {
    "Box": (*_WHOLE, "float16", "float32", "float64", "bool"),
    "Discrete": _WHOLE,
    "MultiBinary": ("int8",),
    "MultiDiscrete": _WHOLE,
}


def describe(space: spaces.Space[Any]) -> dict[str, Any]:
    """A `Box`, `Discrete`, `MultiBinary` or `MultiDiscrete` as numbers, text and lists.

    Example:
        >>> describe(spaces.Discrete(3))
        {'kind': 'Discrete', 'n': 3, 'start': 0, 'dtype': 'int64'}
    """
    kind = type(space).__name__
    if kind in _DTYPES and str(space.dtype) not in _DTYPES[kind]:
        raise ValueError(f"space {space} is not supported; supported: {', '.join(_DTYPES[kind])}")
    if isinstance(space, spaces.Box):
        bounds = {"low": _bound(space.low), "high": _bound(space.high)}
        return {"kind": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
    if isinstance(space, spaces.Discrete):
        return {
            "kind": "Discrete",
            "n": int(space.n),
            "start": int(space.start),
            "dtype": str(space.dtype),
        }
    if isinstance(space, spaces.MultiBinary):
        return {"kind": "MultiBinary", "n": np.asarray(space.n).tolist(), "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiDiscrete):
        values = {"nvec": space.nvec.tolist(), "start": space.start.tolist()}
        return {"kind": "MultiDiscrete", **values, "dtype": str(space.dtype)}
    raise ValueError(f"space {space} is not supported; supported: {', '.join(_KEYS)}")


def fingerprint(*of: spaces.Space[Any]) -> str:
    """The same text for the same spaces: whoever goes on with a run finds out if they changed.

    Example:
        >>> fingerprint(spaces.Discrete(3)) == fingerprint(spaces.Discrete(3, start=1))
        False
    """
    described = json.dumps([describe(space) for space in of], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def _bound(bound: NDArray[Any]) -> Any:
    """One number where all are equal: an image has a hundred thousand."""
    if bound.size and (bound == bound.flat[0]).all():
        return bound.flat[0].item()
    return bound.tolist()


def from_description(
    description: Any, *, largest: int | None = None, where: str = "space"
) -> spaces.Space[Any]:
    """The space that `describe` was given.

    Args:
        description: may come from anywhere: all of it is checked before anything is made.
        largest: how many numbers an observation or action may have, or values to choose from;
            None: any number.
        where: what the description is called in messages.

    Raises:
        ValueError: it describes no space, with the first part that is wrong.

    Example:
        >>> from_description(describe(spaces.Discrete(3)))
        Discrete(3)
        >>> from_description({"kind": "Discrete", "n": 0, "start": 0, "dtype": "int64"})
        Traceback (most recent call last):
            ...
        ValueError: space["n"]: expected a whole number of at least 1, got 0
    """
    _check(isinstance(description, dict), where, "a dictionary", description)
    kind: Any = description.get("kind")
    known = isinstance(kind, str) and kind in _KEYS
    _check(known, f'{where}["kind"]', " or ".join(_KEYS), kind)
    right = description.keys() == {"kind", "dtype", *_KEYS[kind]}
    keys = ", ".join(map(str, description))
    _check(right, where, f"kind, dtype, {', '.join(_KEYS[kind])}", keys)
    name = description["dtype"]
    right = isinstance(name, str) and name in _DTYPES[kind]
    _check(right, f'{where}["dtype"]', f"one of {', '.join(_DTYPES[kind])}", name)
    most = 2**63 - 1 if largest is None else largest
    dtype: Any = np.dtype(name)
    values = most if kind == "Box" else min(most, int(np.iinfo(dtype).max))
    if kind == "Box":
        return _box(description, dtype, most, where)
    if kind == "Discrete":
        n, start = description["n"], description["start"]
        _check_whole(n, f'{where}["n"]', 1, values)
        # Older Gymnasium knows int64 only, and no argument for it.
        other = {} if dtype == np.int64 else {"dtype": dtype.type}
        _check_first(start, n, dtype, f'{where}["start"]')
        return spaces.Discrete(n, start=start, **other)
    if kind == "MultiBinary":
        return _multi_binary(description["n"], most, f'{where}["n"]')
    nvec, starts = description["nvec"], description["start"]
    shape = _shape_of(nvec)
    _check(math.prod(shape) > 0, f'{where}["nvec"]', "numbers of values", nvec)
    sizes = _numbers(nvec, shape, f'{where}["nvec"]')
    firsts = _numbers(starts, shape, f'{where}["start"]')
    for size, first in zip(sizes, firsts, strict=True):
        _check_whole(size, f'{where}["nvec"]', 1, values)
        _check_first(first, size, dtype, f'{where}["start"]')
    _check(sum(sizes) <= most, f'{where}["nvec"]', f"at most {most} in all", sum(sizes))
    return spaces.MultiDiscrete(np.array(nvec, dtype), dtype.type, start=np.array(starts, dtype))


def _box(description: dict[str, Any], dtype: Any, most: int, where: str) -> spaces.Box:
    shape = description["shape"]
    _check(isinstance(shape, list) and len(shape) <= 32, f'{where}["shape"]', "a list", shape)
    for length in shape:
        _check_whole(length, f'{where}["shape"]', 0, most)
    _check(math.prod(shape) <= most, f'{where}["shape"]', f"at most {most} numbers", shape)
    bounds = []
    for end in ("low", "high"):
        at, given = f'{where}["{end}"]', description[end]
        same = not isinstance(given, list)
        for value in [given] if same else _numbers(given, tuple(shape), at):
            _check(_is_bound(value, dtype), at, f"numbers of {dtype}", value)
        bounds.append(np.full(shape, given, dtype) if same else np.array(given, dtype))
    low, high = (bound.reshape(shape) for bound in bounds)
    _check(bool((low <= high).all()), f'{where}["low"]', "at most high", "more")
    return spaces.Box(low, high, dtype=dtype.type)


def _multi_binary(n: Any, most: int, where: str) -> spaces.MultiBinary:
    lengths = n if isinstance(n, list) else [n]
    _check(len(lengths) <= 32, where, "at most 32 dimensions", len(lengths))
    for length in lengths:
        _check_whole(length, where, 1, most)
    _check(math.prod(lengths) <= most, where, f"at most {most} numbers", n)
    return spaces.MultiBinary(n)


def _is_bound(value: Any, dtype: Any) -> bool:
    """A number that the dtype has, infinity too."""
    if dtype.kind == "b":
        return isinstance(value, bool)
    if dtype.kind == "f":
        largest = float(np.finfo(dtype).max)
        inside = type(value) in (int, float) and -largest <= value <= largest
        return inside or value in (-math.inf, math.inf)
    return type(value) is int and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max


def _shape_of(nested: Any) -> tuple[int, ...]:
    """Of lists of equal lengths inside each other, if they are of equal lengths."""
    shape: list[int] = []
    while isinstance(nested, list) and len(shape) < 32:
        shape.append(len(nested))
        nested = nested[0] if nested else None
    return tuple(shape)


def _numbers(nested: Any, shape: tuple[int, ...], where: str) -> list[Any]:
    """What is in the lists, row by row."""
    rows = [nested]
    for length in shape:
        for row in rows:
            right = isinstance(row, list) and len(row) == length
            _check(right, where, f"lists of shape {shape}", row)
        rows = [value for row in rows for value in row]
    return rows


def _check_first(given: Any, count: int, dtype: Any, where: str) -> None:
    """The first of so many values, all of which the dtype has."""
    limits = np.iinfo(dtype)
    # Older Gymnasium adds them up in int64.
    _check_whole(given, where, int(limits.min), min(int(limits.max), 2**63 - 1) - count + 1)


def _check_whole(given: Any, where: str, least: int, most: int) -> None:
    expected = f"a whole number of at least {least}"
    _check(type(given) is int and given >= least, where, expected, given)
    _check(given <= most, where, f"at most {most}", given)


def _check(holds: bool, where: str, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{where}: expected {expected}, got {ascii(got)[:80]}")
