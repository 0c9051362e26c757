"""Spaces as plain types, as a checkpoint keeps them, and back."""

import hashlib
import json
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray


def describe(space: spaces.Space[Any]) -> dict[str, Any]:
    """A `Box`, `Discrete` or `MultiDiscrete` as numbers, text and lists.

    Example:
        >>> describe(spaces.Discrete(3))
        {'kind': 'Discrete', 'n': 3, 'start': 0, 'dtype': 'int64'}
    """
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
    if isinstance(space, spaces.MultiDiscrete):
        values = {"nvec": space.nvec.tolist(), "start": space.start.tolist()}
        return {"kind": "MultiDiscrete", **values, "dtype": str(space.dtype)}
    raise ValueError(f"space {space} is not supported; supported: Box, Discrete, MultiDiscrete")


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


def from_description(description: dict[str, Any]) -> spaces.Space[Any]:
    """The space that `describe` was given."""
    dtype = np.dtype(description["dtype"])
    if description["kind"] == "Box":
        shape = tuple(description["shape"])
        low, high = (np.full(shape, description[end], dtype) for end in ("low", "high"))
        return spaces.Box(low, high, dtype=dtype.type)
    if description["kind"] == "Discrete":
        # Older Gymnasium knows int64 only, and no argument for it.
        other = {} if dtype == np.int64 else {"dtype": dtype.type}
        return spaces.Discrete(description["n"], start=description["start"], **other)
    return spaces.MultiDiscrete(description["nvec"], dtype.type, start=description["start"])
