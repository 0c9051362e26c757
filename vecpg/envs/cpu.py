"""A definition in machine code, on float32: functions of one copy, which enter kernels."""

from typing import Any

import numba
import numpy as np
from gymnasium import spaces
from numba import types
from numba.core.errors import NumbaError, UnsupportedBytecodeError

from vecpg.envs.definition import Definition, bound, name_of, num_components, num_observations
from vecpg.envs.ops import cpu as ops
from vecpg.kernels.jit import jit

# What Numba raises for a function that it does not compile.
NOT_COMPILED = (NumbaError, UnsupportedBytecodeError)


def compiled(definition: type[Definition]) -> dict[str, Any]:
    """The functions of a definition by name, compiled when they are first called.

    Every number that is written in them, or that stands under a name of their module, is float32
    there, so that every operation rounds as torch's do.
    """
    return bound(definition, ops, np.float32, jit(as_written=True, inlined=True))


def check_compiled(definition: type[Definition], num_variables: int) -> None:
    """Compile every function by itself, and see what it returns and what numbers it makes.

    Raises:
        ValueError: in one line, which function does not compile, returns what, or makes float64.
    """
    made: list[Any] = []

    def plainly(function: Any) -> Any:
        # Not kept: what is loaded does not tell what it is made of.
        made.append(numba.njit(error_model="numpy")(function))
        return made[-1]

    functions = bound(definition, ops, np.float32, plainly)
    number: Any = types.float32
    state = types.UniTuple(number, num_variables)
    discrete = isinstance(definition.action_space, spaces.Discrete)
    action = number if discrete else types.UniTuple(number, num_components(definition))
    seen = types.UniTuple(number, num_observations(definition))
    remedy = (
        "write whole numbers as floats (2.0, not 2) and constants as names of the module"
        " (PI = math.pi)"
    )
    for name, given, wanted in (
        ("start", (types.UniTuple(number, definition.num_uniforms),), state),
        ("transition", (state, action), state),
        ("observation", (state,), seen),
        ("terminated", (state,), types.boolean),
        ("reward", (state, action, state), number),
    ):
        plain = functions[name].py_func
        omitted = plain.__code__.co_argcount - len(given)
        defaults = plain.__defaults__ or ()
        given = (*given, *map(types.Omitted, defaults[len(defaults) - omitted :]))
        try:
            functions[name].compile(given)
        except NOT_COMPILED as error:
            raise ValueError(
                f"`{name_of(definition, name)}`: expected a function that Numba compiles, got"
                f" {_words(error)}; use Python's operators, vecpg.envs.ops, functions of the module"
                " and its constants"
            ) from None
        found = types.unliteral(functions[name].overloads[given].signature.return_type)
        if found != wanted:
            raise ValueError(
                f"`{name_of(definition, name)}`: expected {_described(wanted)}, got"
                f" {_described(found)}; {remedy}"
            )
    for function in made:
        for overload in function.overloads.values():
            if types.float64 in overload.type_annotation.typemap.values():
                inside = function.py_func.__qualname__.removeprefix(f"{definition.__qualname__}.")
                raise ValueError(
                    f"`{name_of(definition, inside)}`: expected float32 numbers throughout, got"
                    f" one of float64; {remedy}"
                )


def _described(found: Any) -> str:
    """A type, in words."""
    if isinstance(found, types.UniTuple):
        numbers = "number" if found.count == 1 else "numbers"
        return f"{found.count} {numbers} of {found.dtype}"
    if isinstance(found, types.BaseTuple):
        return str(found).removeprefix("Tuple")
    return "a flag" if found == types.boolean else f"one number of {found}"


def _words(error: Exception) -> str:
    """What Numba says, without its headings, listings and places."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith("Failed in nopython")]
    places = [number for number, line in enumerate(told) if line.startswith(("File", "During"))]
    return " ".join(told[: min([2, *places])])
