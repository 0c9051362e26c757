"""What an environment on tensors is written as: a class of functions of one copy, once.

`docs/environments.md` shows one in full. No torch and no Numba is imported here.
"""

import builtins
import importlib
import math
from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any, Protocol

from gymnasium import spaces

from vecpg.envs import ops

FUNCTIONS = ("start", "transition", "observation", "terminated", "reward")

# Real numbers; in a form that is bound to other operations, what stands for them there.
Numbers = tuple[Any, ...]


class Definition(Protocol):
    """An environment as functions of the numbers of one copy. It is used as it is, not called.

    observation_space: a `Box`.
    action_space:      a `Discrete`, `MultiDiscrete` or `Box`.
    num_uniforms:      how many uniform numbers in [0, 1) make a start state.

    A state, the uniform numbers and an observation are tuples of numbers. An action is a number of
    the same kind where the space is `Discrete`, else the tuple of its components.
    """

    observation_space: spaces.Box
    action_space: spaces.Space[Any]
    num_uniforms: int

    @staticmethod
    def start(uniforms: Numbers) -> Numbers:
        """The state that an episode begins with."""

    @staticmethod
    def transition(state: Numbers, action: Any) -> Numbers:
        """The state after an action."""

    @staticmethod
    def observation(state: Numbers) -> Numbers:
        """What the policy sees, as many numbers as the space has, row by row."""

    @staticmethod
    def terminated(state: Numbers) -> Any:
        """Whether a state, reached by an action, ends the episode."""

    @staticmethod
    def reward(state: Numbers, action: Any, following: Numbers) -> Any:
        """What is paid for the action that led from one state to the following."""


def find(definition: "type[Definition] | str") -> type[Definition]:
    """The class of a definition, which may be given as "module:Class".

    Raises:
        ValueError: there is none, or it lacks what a definition has.

    Example:
        >>> find("vecpg.envs.cartpole:CartPole").num_uniforms
        4
    """
    found: Any = definition
    if isinstance(definition, str):
        module, _, path = definition.partition(":")
        if not module or not path:
            raise ValueError(f'definition: expected "module:Class", got {definition!r}')
        found = importlib.import_module(module)
        for name in path.split("."):
            if not hasattr(found, name):
                raise ValueError(f"definition: expected {path} in module {module}, found none")
            found = getattr(found, name)
    _check(found)
    checked: type[Definition] = found
    return checked


def _check(definition: Any) -> None:
    if not isinstance(definition, type):
        raise ValueError(
            f'definition: expected a class or "module:Class", got {type(definition).__name__}'
        )
    name = name_of(definition)
    for wanted in ("observation_space", "action_space", "num_uniforms", *FUNCTIONS):
        if not hasattr(definition, wanted):
            raise ValueError(f"`{name}`: expected a definition with `{wanted}`, got one without")
    for function in FUNCTIONS:
        if not isinstance(getattr(definition, function), FunctionType):
            raise ValueError(
                f"`{name}.{function}`: expected a static function, got"
                f" {type(getattr(definition, function)).__name__}"
            )
    observations, actions, count = (
        getattr(definition, each) for each in ("observation_space", "action_space", "num_uniforms")
    )
    if not isinstance(observations, spaces.Box):
        raise ValueError(f"`{name}.observation_space`: expected a Box, got {observations}")
    if not isinstance(actions, spaces.Discrete | spaces.MultiDiscrete | spaces.Box):
        raise ValueError(
            f"`{name}.action_space`: expected a Discrete, MultiDiscrete or Box, got {actions}"
        )
    if not isinstance(count, int) or count < 1:
        raise ValueError(
            f"`{name}.num_uniforms`: expected a whole number of at least 1, got {count!r}"
        )


def name_of(definition: type[Definition], function: str | None = None) -> str:
    """`module:Class`, or `module:Class.function`, for messages."""
    name = f"{definition.__module__}:{definition.__qualname__}"
    return name if function is None else f"{name}.{function}"


def num_observations(definition: type[Definition]) -> int:
    """How many numbers an observation is."""
    return math.prod(definition.observation_space.shape)


def num_components(definition: type[Definition]) -> int:
    """How many numbers an action is, 1 where the space is `Discrete`."""
    return math.prod(definition.action_space.shape or ())


def bound(
    definition: type[Definition],
    namespace: Any,
    number: Callable[[float], Any] = float,
    finished: Callable[[FunctionType], Any] = lambda function: function,
) -> dict[str, Any]:
    """The functions of a definition, by name, with other operations and numbers in them.

    The functions themselves are left as they are: these have the same code with other names and
    constants. So have the functions that they call by their names, in modules of any kind.

    Args:
        definition: whose functions.
        namespace: what stands where `vecpg.envs.ops` stood.
        number: what stands where a float was written, in the code or under a name of the module.
        finished: what is made of every function, for itself and for those that call it.

    Example:
        >>> from types import SimpleNamespace
        >>> words = SimpleNamespace(cos=lambda x: f"cos {x}", sin=lambda x: f"sin {x}")
        >>> bound(find("vecpg.envs.pendulum:Pendulum"), words)["observation"](("angle", "speed"))
        ('cos angle', 'sin angle', 'speed')
    """
    made: dict[FunctionType, Any] = {}

    def replaced(value: Any) -> Any:
        if value is ops:
            return namespace
        if isinstance(value, FunctionType):
            if value.__module__ == ops.__name__:
                return getattr(namespace, value.__name__)
            return made[value] if value in made else rebuilt(value)
        if isinstance(value, float):
            return number(value)
        if isinstance(value, tuple):
            return tuple(map(replaced, value))
        if isinstance(value, CodeType):
            return value.replace(co_consts=replaced(value.co_consts))
        return value

    def rebuilt(function: FunctionType) -> Any:
        names: dict[str, Any] = {"__name__": function.__module__, "__builtins__": builtins}
        cells = tuple(CellType(replaced(cell.cell_contents)) for cell in function.__closure__ or ())
        other = FunctionType(
            replaced(function.__code__),
            names,
            function.__name__,
            replaced(function.__defaults__),
            cells,
        )
        other.__qualname__ = function.__qualname__
        kept = function.__kwdefaults__ or {}
        other.__kwdefaults__ = {name: replaced(value) for name, value in kept.items()} or None
        made[function] = finished(other)
        # Only now, so that functions may call each other.
        for name in _names(function.__code__):
            if name in function.__globals__:
                names[name] = replaced(function.__globals__[name])
        return made[function]

    return {name: rebuilt(getattr(definition, name)) for name in FUNCTIONS}


def _names(code: CodeType) -> set[str]:
    """The global names that code, and what is defined inside it, may look up."""
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*map(_names, inner))
