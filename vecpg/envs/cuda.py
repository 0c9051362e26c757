"""A definition as parts of Triton kernels.

Its functions are called once, with numbers that take notes: each knows by which expression a kernel
computes it, and every operation on it is another line of the kernel. So loops unroll and functions
of the user's own dissolve, and what asks for the value of a number, as `if` does, is refused.
"""

import functools
import hashlib
import linecache
import operator
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from gymnasium import spaces

from vecpg.envs.definition import (
    FUNCTIONS,
    Definition,
    bound,
    name_of,
    num_components,
    num_observations,
)
from vecpg.envs.ops import cpu
from vecpg.envs.ops import cuda as ops

_REMEDY = (
    "choose with ops.where instead of if, and use what else is in vecpg.envs.ops, Python's"
    " operators, functions of the module and its constants"
)


@functools.cache
def device_functions(definition: type[Definition], num_variables: int) -> dict[str, Any]:
    """The functions of a definition by name, to be called in Triton kernels.

        start(u0, u1, ...) -> state          transition(s0, ..., a0, ...) -> state
        observation(s0, ...) -> numbers      terminated(s0, ...) -> flag
        reward(s0, ..., a0, ..., f0, ...) -> number

    Arguments are blocks of float32, and so are results; a flag is a block of booleans, and a single
    number is no tuple. In a kernel that is compiled with `enable_fp_fusion=False` they have the
    bits of `vecpg.envs.cpu`, but for `exp`, `log` and `tanh`, which differ by about 1e-7.

    Args:
        definition: whose functions.
        num_variables: how many numbers a state is.

    Raises:
        ValueError: a function of the definition asks for the value of a number, or calls what is no
            operation, or returns what it should not.
    """
    names = {"tl": tl, **{name: getattr(ops, name) for name in ops.__all__}}
    made = from_source(source(definition, num_variables), name_of(definition), names)
    return {name: made[name] for name in FUNCTIONS}


def source(definition: type[Definition], num_variables: int) -> str:
    """The text of `device_functions`.

    Example:
        >>> from vecpg.envs.pendulum import Pendulum
        >>> print(source(Pendulum, 2).split("def ")[3].strip())
        observation(s0, s1):
            v0 = cos(s0)
            v1 = sin(s0)
            return v0, v1, s1
    """
    functions = bound(definition, _OPERATIONS, _Number)
    state = names("s", num_variables)
    action = names("a", num_components(definition))
    texts = []
    for name, given, count in (
        ("start", [names("u", definition.num_uniforms)], num_variables),
        ("transition", [state, action], num_variables),
        ("observation", [state], num_observations(definition)),
        ("terminated", [state], None),
        ("reward", [state, action, names("f", num_variables)], None),
    ):
        lines = _Lines()
        numbers: list[Any] = [tuple(_Number(each, lines) for each in part) for part in given]
        if len(given) > 1 and isinstance(definition.action_space, spaces.Discrete):
            (numbers[1],) = numbers[1]
        try:
            with np.errstate(all="ignore"):
                results = _results(functions[name](*numbers), count, flag=name == "terminated")
        # A function of the user's own, which may raise anything.
        except Exception as error:
            words = " ".join(str(error).split())
            told = words if isinstance(error, _Refused) else f"{type(error).__name__}: {words}"
            raise ValueError(
                f"`{name_of(definition, name)}`: expected a function that a GPU kernel can be made"
                f" of, got {told}; {_REMEDY}"
            ) from error
        texts.append(_text(name, [each for part in given for each in part], lines, results))
    return "\n\n".join(texts)


def names(letter: str, count: int) -> list[str]:
    """What the numbers of a kernel are called.

    Example:
        >>> names("s", 3)
        ['s0', 's1', 's2']
    """
    return [f"{letter}{i}" for i in range(count)]


def from_source(text: str, what: str, known: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The functions that a text defines, by name, as Triton's.

    Args:
        text: function after function.
        what: they are made of, for whoever meets them in a traceback.
        known: what they may name beside one another.
        options: of `triton.jit`.
    """
    # Triton asks for the lines of a file; its cache goes by what they are.
    file = f"<{what} {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    scope: dict[str, Any] = {"__name__": __name__, **known}
    exec(compile(text, file, "exec"), scope)
    made = {
        name: triton.jit(value, **options)
        for name, value in scope.items()
        if isinstance(value, FunctionType)
    }
    scope.update(made)
    return made


def _text(name: str, parameters: list[str], lines: "_Lines", results: list[Any]) -> str:
    """A function. What depends on no argument has the shape of the first all the same."""
    shape = f"{parameters[0]}.shape"
    returned = []
    for each in results:
        if isinstance(each, bool):
            returned.append(f"tl.full({shape}, {int(each)}, tl.int1)")
        elif each.lines is None:
            returned.append(f"tl.full({shape}, {each.text}, tl.float32)")
        else:
            returned.append(each.text)
    body = [f"{value} = {text}" for text, value in lines.names.items()]
    body.append(f"return {', '.join(returned)}")
    return f"def {name}({', '.join(parameters)}):\n" + "".join(f"    {line}\n" for line in body)


def _results(returned: Any, count: int | None, flag: bool) -> list[Any]:
    """The numbers or the flag that a function returned; without a count it is no tuple."""
    if flag:
        if isinstance(returned, _Flag | bool):
            return [returned]
        raise _Refused(f"{type(returned).__name__} in the place of a flag")
    results = (returned,) if count is None else returned
    if isinstance(results, tuple) and len(results) == (count or 1):
        numbers = [_as_number(each) for each in results]
        if all(each is not None for each in numbers):
            return numbers
    wanted = "a number" if count is None else f"a tuple of {count} numbers"
    raise _Refused(f"{type(returned).__name__} in the place of {wanted}")


class _Refused(Exception):
    """What a function may not do, in words."""


class _Lines:
    """The lines of a function: expressions, and what their values are called."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def add(self, text: str) -> str:
        """The name of an expression's value."""
        return self.names.setdefault(text, f"v{len(self.names)}")


def _given(plainly: Callable[..., Any], given: tuple[Any, ...]) -> tuple[Any, "_Lines | None"]:
    """Numbers, and the lines they stand in; of constants alone what `plainly` gives, and None."""
    known: list[Any] = [_as_number(each) for each in given]
    if any(each is None for each in known):
        return NotImplemented, None
    for each in known:
        if each.lines is not None:
            return known, each.lines
    found = plainly(*(each.value for each in known))
    return bool(found) if isinstance(found, bool | np.bool_) else _Number(found), None


def _infix(sign: str, plainly: Callable[[Any, Any], Any]) -> Any:
    """The method of an operator; `plainly` is what it does with constants."""

    def made(one: Any, other: Any) -> Any:
        found, lines = _given(plainly, (one, other))
        if lines is None:
            return found
        kind = _Flag if sign[0] in "<>=!" else _Number
        return kind(lines.add(f"{found[0].text} {sign} {found[1].text}"), lines)

    return made


def _reflected(method: Any) -> Any:
    return lambda one, other: method(other, one)


def _call(name: str, plainly: Callable[..., Any]) -> Any:
    """A function of numbers, in a kernel and of constants."""

    def made(*given: Any) -> Any:
        found, lines = _given(plainly, given)
        if lines is None:
            return found
        return _Number(lines.add(f"{name}({', '.join(map(_operand, found))})"), lines)

    return made


def _operand(number: "_Number") -> str:
    """Not every function of Triton's takes a plain constant."""
    return f"tl.full((), {number.text}, tl.float32)" if number.lines is None else number.text


class _Value:
    """What a kernel computes, by its expression. Without lines it is a constant."""

    __array_ufunc__ = None  # else NumPy's numbers would take it for an array

    def __init__(self, text: str, lines: _Lines | None) -> None:
        self.text, self.lines = text, lines

    def __bool__(self) -> bool:
        raise _Refused("one that asks a number for its value")


class _Flag(_Value):
    def __and__(self, other: Any) -> Any:
        return self._joined("&", other)

    def __or__(self, other: Any) -> Any:
        return self._joined("|", other)

    def __xor__(self, other: Any) -> Any:
        return self._joined("^", other)

    __rand__, __ror__, __rxor__, __ne__ = __and__, __or__, __xor__, __xor__

    def __invert__(self) -> Any:
        return self ^ True

    def __eq__(self, other: Any) -> Any:
        return ~(self ^ other)

    def _joined(self, sign: str, other: Any) -> Any:
        if not isinstance(other, _Flag | bool) or self.lines is None:
            raise _Refused(f"a flag and {other!r} joined by {sign}")
        text = other.text if isinstance(other, _Flag) else str(other)
        return _Flag(self.lines.add(f"{self.text} {sign} {text}"), self.lines)


class _Number(_Value):
    """A float32: computed in a kernel, or a constant with a value."""

    def __init__(self, of: Any, lines: _Lines | None = None) -> None:
        self.value = np.float32(0.0 if lines else of)
        if lines is None:
            plain = repr(float(self.value))
            of = plain if np.isfinite(self.value) else f'float("{plain}")'
        super().__init__(of, lines)

    __add__, __sub__, __mul__ = (
        _infix("+", operator.add),
        _infix("-", operator.sub),
        _infix("*", operator.mul),
    )
    __truediv__, __mod__ = _call("divide", operator.truediv), _call("modulo", operator.mod)
    __radd__, __rsub__, __rmul__ = _reflected(__add__), _reflected(__sub__), _reflected(__mul__)
    __rtruediv__, __rmod__ = _reflected(__truediv__), _reflected(__mod__)
    __lt__, __le__ = _infix("<", operator.lt), _infix("<=", operator.le)
    __gt__, __ge__ = _infix(">", operator.gt), _infix(">=", operator.ge)
    __eq__, __ne__ = _infix("==", operator.eq), _infix("!=", operator.ne)
    __abs__ = _call("tl.abs", abs)

    def __pow__(self, power: Any) -> Any:
        """By squaring, as Numba does."""
        exponent = power.value if isinstance(power, _Number) and power.lines is None else power
        if not isinstance(exponent, int | np.float32) or exponent != int(exponent):
            raise _Refused("a power that is no whole number; ops.exp(y * ops.log(x)) is x**y")
        left, square, found = abs(int(exponent)), self, None
        while left:
            if left & 1:
                found = square if found is None else found * square
            left >>= 1
            square = square * square if left else square
        found = _Number(1.0) if found is None else found
        return 1.0 / found if exponent < 0 else found

    def __neg__(self) -> Any:
        # Triton's own is a difference from 0, and gives no -0.
        return self * -1.0

    def __pos__(self) -> Any:
        return self

    def __bool__(self) -> bool:
        return bool(self.value) if self.lines is None else super().__bool__()

    def __float__(self) -> float:
        if self.lines is not None:
            raise _Refused("one that asks a number for its value")
        return float(self.value)


def _as_number(value: Any) -> "_Number | None":
    """Of a number of any kind; None of anything else."""
    if isinstance(value, _Number):
        return value
    plain = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return _Number(value) if plain else None


def _where(flag: Any, one: Any, other: Any) -> Any:
    chosen = [each for each in (_as_number(one), _as_number(other)) if each is not None]
    if not isinstance(flag, _Flag | bool) or len(chosen) < 2:
        raise _Refused("ops.where of something else than a flag and two numbers")
    if isinstance(flag, bool) or flag.lines is None:
        return chosen[0 if flag else 1]
    text = f"where({flag.text}, {', '.join(map(_operand, chosen))})"
    return _Number(flag.lines.add(text), flag.lines)


# Of constants they are what they are on the CPU.
_OPERATIONS = SimpleNamespace(
    where=_where,
    **{name: _call(name, getattr(cpu, name)) for name in cpu.__all__ if name != "where"},
)
