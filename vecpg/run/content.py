"""What a file holds is what it should be, whoever wrote it: read without running, then compared."""

import io
import math
import pickletools
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vecpg.adam import Adam
from vecpg.config import flag
from vecpg.policy import Policy
from vecpg.policy.network import drawn_from
from vecpg.policy.own import is_dense
from vecpg.policy.spaces import from_description

if TYPE_CHECKING:
    from vecpg.run.state import TrainState

# What `torch.save` names in the pickle of plain tensors, and nothing else may be named. Of the
# kinds of storage the bytes of one number.
_BYTES = {
    "torch FloatStorage": 4,
    "torch DoubleStorage": 8,
    "torch HalfStorage": 2,
    "torch BFloat16Storage": 2,
    "torch LongStorage": 8,
    "torch IntStorage": 4,
    "torch ShortStorage": 2,
    "torch CharStorage": 1,
    "torch ByteStorage": 1,
}
_REBUILD = "torch._utils _rebuild_tensor_v2"
_ORDERED = "collections OrderedDict"

# Numbers of an observation that was another when a state was saved, to be shown.
_MOST_SHOWN = 2**17
# Dictionaries, lists and tuples inside each other.
_DEEPEST = 100
# Values that wait to be put somewhere: pickle puts a thousand at a time into a list or dictionary.
_MOST_WAITING = 10_000


def unpickle(data: bytes, path: Path | str) -> dict[str, Any]:
    """What `torch.save` wrote: a dictionary of dictionaries, lists, tuples, plain types, tensors.

    Nothing in it is executed or imported: what is not one of these is found before anything is
    made of it. No container is shared or holds itself; keys are text or whole numbers; tensors
    are of real numbers, dense, and inside the bytes that the file has for them. Time and memory
    grow as the file does.

    Args:
        data: the whole file.
        path: for messages.

    Raises:
        ValueError: it is no such file, it is damaged, or it holds something else.

    Example:
        >>> file = io.BytesIO()
        >>> torch.save({"counts": [1, 2], "weights": torch.zeros(2)}, file)
        >>> unpickle(file.getvalue(), "state.pt")
        {'counts': [1, 2], 'weights': tensor([0., 0.])}
    """
    try:
        records = _records(data)
        used = _Reader(records).read()
        with _archive(records, used) as archive:
            content: dict[str, Any] = torch.load(archive, map_location="cpu", weights_only=True)
            return content
    except _Unexpected as error:
        reason = f": {error}"
    except MemoryError:
        raise
    # Zip and pickle raise a dozen different types for files that are cut, empty or something else.
    except Exception:
        reason = ""
    # Here, where torch's advice is no longer part of the error.
    raise ValueError(
        f"{path} ({len(data)} bytes) is not a vecpg checkpoint, or it is damaged{reason}"
    )


class _Unexpected(ValueError):
    """What no vecpg has written."""


def _records(data: bytes) -> dict[str, bytes]:
    """The entries of the zip file that `torch.save` writes, without the folder that all are in."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise _Unexpected("expected entries that are not compressed, got a compressed one")
        claimed = sum(max(entry.file_size, entry.compress_size) for entry in entries)
        if claimed > len(data):
            raise _Unexpected(f"its entries claim {claimed} bytes")
        records = {entry.filename.partition("/")[2]: archive.read(entry) for entry in entries}
    if len(records) != len(entries):
        raise _Unexpected("two of its entries have the same name")
    return records


def _archive(records: Mapping[str, bytes], used: Iterable[str]) -> io.BytesIO:
    """A zip file of the entries that were looked at: there is one way only to read it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("data.pkl", "byteorder", "version", *used):
            if name in records:
                archive.writestr(f"archive/{name}", records[name])
    file.seek(0)
    return file


@dataclass(slots=True)
class _Value:
    """What an opcode leaves on the stack.

    kind:  "atom", "tuple", "list", "dict", "global", "storage", "tensor" or "hooks".
    value: of an atom itself; of a tuple its items; of a global its name; of a storage how many
           numbers it has.
    depth: how many containers are inside each other here.
    """

    kind: str
    value: Any = None
    depth: int = 0


class _Reader:
    """Follows a pickle as the machine that runs it would, and makes nothing of it.

    Args:
        records: the entries of the zip file, by name.

    Raises:
        _Unexpected: there is something in it besides what `unpickle` gives.
        Exception: of some other type, where it is no pickle.
    """

    def __init__(self, records: Mapping[str, bytes]) -> None:
        self._records = records
        self._stack: list[_Value] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Value] = {}
        # By the name of the entry the kind of numbers in it.
        self._storages: dict[str, str] = {}

    def read(self) -> list[str]:
        """The names of the entries that hold the tensors' numbers."""
        for opcode, argument, _ in pickletools.genops(self._records["data.pkl"]):
            self._follow(opcode.name, argument)
            if len(self._stack) + len(self._marks) > _MOST_WAITING:
                raise _Unexpected(f"more than {_MOST_WAITING} values wait to be put somewhere")
        if [value.kind for value in self._stack] != ["dict"] or self._marks:
            raise _Unexpected("expected a dictionary, got something else")
        return list(self._storages)

    def _follow(self, name: str, argument: Any) -> None:
        match name:
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                if isinstance(argument, int) and not -(2**63) <= argument < 2**64:
                    raise _Unexpected("a whole number has more than 64 bits")
                self._stack.append(_Value("atom", argument))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                value = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name]
                self._stack.append(_Value("atom", value))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._top()
            case "BINGET" | "LONG_BINGET":
                self._stack.append(self._again(self._memo[argument]))
            case "MARK":
                self._marks.append(len(self._stack))
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = self._take(0 if name == "EMPTY_TUPLE" else int(name[-1]))
                self._push_tuple(items)
            case "TUPLE":
                self._push_tuple(self._take_marked())
            case "EMPTY_LIST":
                self._stack.append(_Value("list", depth=1))
            case "EMPTY_DICT":
                self._stack.append(_Value("dict", depth=1))
            case "APPEND":
                self._extend("list", self._take(1))
            case "APPENDS":
                self._extend("list", self._take_marked())
            case "SETITEM":
                self._update(self._take(2))
            case "SETITEMS":
                self._update(self._take_marked())
            case "GLOBAL":
                if argument not in (*_BYTES, _REBUILD, _ORDERED):
                    raise _Unexpected(f"it names {_shown(argument)}, which is no plain tensor")
                self._stack.append(_Value("global", argument))
            case "BINPERSID":
                self._push_storage(*self._take(1))
            case "REDUCE":
                self._call(*self._take(2))
            case "PROTO" if argument == 2:
                pass
            case "STOP":
                pass
            case _:
                raise _Unexpected(f"expected plain data, got the instruction {name}")

    def _top(self) -> _Value:
        (value,) = self._take(1)
        self._stack.append(value)
        return value

    def _take(self, count: int) -> list[_Value]:
        """The last values, which must have come after the last mark."""
        first = len(self._stack) - count
        if first < (self._marks[-1] if self._marks else 0):
            raise _Unexpected("a value is missing")
        taken = self._stack[first:]
        del self._stack[first:]
        return taken

    def _take_marked(self) -> list[_Value]:
        """All values after the last mark."""
        taken = self._take(len(self._stack) - self._marks[-1])
        self._marks.pop()
        return taken

    def _again(self, value: _Value) -> _Value:
        """A value that stands in a second place, as text and the numbers of Adam do.

        A container may not: it could hold itself, or grow with every place.
        """
        if value.kind in ("list", "dict") or value.depth > 1:
            raise _Unexpected("a container stands in two places")
        return value

    def _push_tuple(self, items: list[_Value]) -> None:
        self._stack.append(_Value("tuple", items, self._depth_of(items)))

    def _extend(self, kind: str, items: list[_Value]) -> None:
        container = self._top()
        if container.kind != kind:
            raise _Unexpected(f"expected a {kind}, got a {container.kind}")
        if any(item.kind in ("global", "storage", "hooks") for item in items):
            raise _Unexpected("a part of a tensor stands alone")
        container.depth = max(container.depth, self._depth_of(items))

    def _update(self, items: list[_Value]) -> None:
        for key in items[::2]:
            if key.kind != "atom" or type(key.value) not in (str, int):
                raise _Unexpected("expected text or a whole number for a key, got something else")
        if len(items) % 2:
            raise _Unexpected("a value is missing")
        self._extend("dict", items)

    @staticmethod
    def _depth_of(items: list[_Value]) -> int:
        depth = 1 + max((item.depth for item in items), default=0)
        if depth > _DEEPEST:
            raise _Unexpected(f"more than {_DEEPEST} containers are inside each other")
        return depth

    def _push_storage(self, identity: _Value) -> None:
        """A storage: its kind, the entry with its numbers and how many there are."""
        _, kind, key, _, count = self._items(
            identity, ("atom", str), ("global", str), ("atom", str), ("atom", str), ("atom", int)
        )
        if kind not in _BYTES:
            raise _Unexpected(f"expected a storage, got {kind}")
        name = f"data/{key}"
        if self._storages.setdefault(name, kind) != kind:
            raise _Unexpected(f"{_shown(name)} has two kinds of numbers")
        has = len(self._records[name])
        if count < 0 or count * _BYTES[kind] != has:
            raise _Unexpected(
                f"{_shown(name)}: expected {count} numbers of {_BYTES[kind]} bytes, got {has} bytes"
            )
        self._stack.append(_Value("storage", count))

    def _call(self, function: _Value, arguments: _Value) -> None:
        if function.kind != "global" or arguments.kind != "tuple":
            raise _Unexpected("expected plain data, got a call")
        if function.value == _ORDERED and not arguments.value:
            self._stack.append(_Value("hooks"))
            return
        if function.value != _REBUILD:
            raise _Unexpected(f"expected plain data, got a call of {function.value}")
        has, offset, sizes, strides, grad, _ = self._items(
            arguments,
            ("storage", int),
            ("atom", int),
            ("tuple", list),
            ("tuple", list),
            ("atom", bool),
            ("hooks", type(None)),
        )
        size, stride = ([item.value for item in each] for each in (sizes, strides))
        if any(type(each) is not int or each < 0 for each in (offset, *size, *stride)):
            raise _Unexpected("expected whole numbers for the shape of a tensor, got others")
        count = math.prod(size)
        if len(size) != len(stride) or offset + count > has or not is_dense(size, stride) or grad:
            raise _Unexpected(
                f"expected a dense tensor of the {has} numbers in the file, got one of shape"
                f" {_shown(tuple(size))}, strides {_shown(tuple(stride))}, offset {offset}"
            )
        self._stack.append(_Value("tensor"))

    @staticmethod
    def _items(value: _Value, *expected: tuple[str, type]) -> list[Any]:
        """The values in a tuple, of these kinds and types."""
        if value.kind != "tuple" or len(value.value) != len(expected):
            raise _Unexpected("expected the parts of a plain tensor, got something else")
        for item, (kind, type_) in zip(value.value, expected, strict=True):
            if item.kind != kind or type(item.value) is not type_:
                raise _Unexpected("expected the parts of a plain tensor, got something else")
        return [item.value for item in value.value]


def policy_of(
    content: Any,
    path: Path | str,
    device: torch.device | str = "cpu",
    network: str | None = None,
) -> Policy:
    """The policy that `policy_state` wrote, in evaluation mode, with parameters of its own.

    The network is built only after its description was found to fit the parameters that there are.

    Args:
        content: holds "policy".
        path: for messages.
        device: where the policy should be.
        network: as `Policy.from_description` takes it: a network of the user's own is imported only
            if it is named here too.

    Raises:
        ValueError: it holds no such thing, with the file and the first part that is wrong.
    """
    try:
        saved = _entry(content, "policy")
        _check_keys(saved, ("description", "parameters"), "policy")
        parameters = _tensors(saved["parameters"], "policy.parameters")
        _check_plain(saved["description"], "policy.description")
        with drawn_from(0):  # whose fresh parameters are thrown away
            policy = Policy.from_description(
                saved["description"], largest=_numbers(parameters), network=network
            )
        check_tensors(parameters, policy.state_dict(), "policy.parameters")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    policy.load_state_dict(parameters)
    return policy.to(device).eval()


def check_state(content: Any, state: "TrainState") -> None:
    """Check that `content` is what `TrainState.state_dict` gives of a state of these shapes.

    All of it: keys, types, shapes, dtypes, settings of the optimizers; every number is finite. The
    state is not changed.

    Raises:
        ValueError: it is not, with the path of the first part that is wrong.
    """
    expected = state.state_dict()
    _check_keys(content, expected, "state")
    _check_policy(content["policy"], expected["policy"])
    _check_adam(content["optimizer"], state.optimizer, "optimizer", "--learning-rate")
    critic = content["critic"]
    if (critic is None) != (state.critic is None):
        wanted, given = ("none" if each is None else "one" for each in (state.critic, critic))
        raise ValueError(
            f"critic: expected {wanted}, got {given}; train with the --baseline that the state was"
            " saved with"
        )
    if state.critic is not None:
        _check_keys(critic, expected["critic"], "critic")
        wanted = expected["critic"]["parameters"]
        check_tensors(critic["parameters"], wanted, "critic.parameters")
        optimizer = state.critic.optimizer
        _check_adam(critic["optimizer"], optimizer, "critic.optimizer", "--value-learning-rate")
    _check_stopping(content["stopping"], expected)
    _check_keys(content["counters"], expected["counters"], "counters")
    for name, count in content["counters"].items():
        _check_whole(count, f"counters.{name}", at_least=0)
    seconds = content["seconds"]
    _check(isinstance(seconds, dict), "seconds", "a dictionary", seconds)
    for name, spent in seconds.items():
        _check(isinstance(name, str), "seconds", "text for a key", name)
        _check_finite(spent, f"seconds[{_shown(name)}]")


def check_tensors(given: Any, expected: Mapping[str, Tensor], where: str, hint: str = "") -> None:
    """Check that there are the same names, and of each the shape, dtype and finite numbers.

    Args:
        given: is checked.
        expected: tensors of the right shapes and dtypes; their numbers and device do not matter.
        where: the path, for messages.
        hint: ends a message about a shape.

    Raises:
        ValueError: with the path of the first that differs, what was expected and what was found.

    Example:
        >>> check_tensors({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, "parameters")
        Traceback (most recent call last):
            ...
        ValueError: parameters["a"]: expected (3,) float32, got (2,) float32
    """
    _check_keys(given, expected, where, hint)
    for name, like in expected.items():
        _check_tensor(given[name], like, f'{where}["{name}"]', hint)


def _check_tensor(given: Any, like: Tensor, where: str, hint: str = "") -> None:
    right = isinstance(given, Tensor) and given.layout == torch.strided and not given.is_quantized
    if not right or (given.shape, given.dtype) != (like.shape, like.dtype):
        raise ValueError(f"{where}: expected {_shown(like)}, got {_shown(given)}{hint}")
    if given.device.type == "meta" or not bool(given.isfinite().all()):
        raise ValueError(f"{where}: expected finite numbers, got others")


def _check_policy(given: Any, expected: dict[str, Any]) -> None:
    _check_keys(given, expected, "policy")
    hint = _differences(given, expected["description"])
    check_tensors(given["parameters"], expected["parameters"], "policy.parameters", hint)
    if given["description"] != expected["description"]:
        raise ValueError(f"policy.description: expected that of this run{hint}")


def _differences(given: dict[str, Any], expected: dict[str, Any]) -> str:
    """In words, which settings of the policy were others when it was saved."""
    saved = given["description"]
    _check_keys(saved, expected, "policy.description")
    _check_plain(saved, "policy.description")
    known = _numbers(_tensors(given["parameters"], "policy.parameters"))
    largest = max(_MOST_SHOWN, known)
    said = []
    for name, now in expected.items():
        was = saved[name]
        if was == now:
            continue
        if name.endswith("_space"):
            where = f"policy.description.{name}"
            before = from_description(was, largest=largest, where=where)
            words = f"the environment has changed: {name} was {before}, and is"
            said.append(f"{words} {from_description(now)}")
        else:
            said.append(
                f"it was saved with {_typed(name, was)}, and this run has {_typed(name, now)}"
            )
    return "".join(f"; {words}" for words in said)


def _typed(name: str, value: Any) -> str:
    """A setting as a user would type it."""
    if isinstance(value, bool):
        return flag(name) if value else flag(name).replace("--", "--no-", 1)
    if isinstance(value, list) and all(type(each) is int for each in value):
        return _cut(" ".join([flag(name), *map(str, value)]))
    plain = isinstance(value, str) and value.isalnum()
    return f"{flag(name)} {value if plain else _shown(value)}"


def _check_adam(given: Any, adam: Adam, where: str, setting: str) -> None:
    expected = adam.state_dict()
    _check_keys(given, expected, where)
    _check_equal(
        given["param_groups"],
        expected["param_groups"],
        f"{where}.param_groups",
        f"; go on with the {setting} and the settings that it was saved with",
    )
    states, parameters = given["state"], adam.parameters
    _check(isinstance(states, dict), f"{where}.state", "a dictionary", states)
    for place, one in states.items():
        at = f"{where}.state[{_shown(place)}]"
        known = type(place) is int and 0 <= place < len(parameters)
        _check(known, f"{where}.state", f"keys below {len(parameters)}", place)
        _check_keys(one, ("step", "exp_avg", "exp_avg_sq"), at)
        for name in ("exp_avg", "exp_avg_sq"):
            _check_tensor(one[name], parameters[place], f'{at}["{name}"]')
        positive = bool((one["exp_avg_sq"] >= 0).all())
        _check(positive, f'{at}["exp_avg_sq"]', "squares", "a negative number")
        step = one["step"]
        real = isinstance(step, Tensor) and step.is_floating_point()
        like = torch.zeros((), dtype=step.dtype if real else torch.float32)
        _check_tensor(step, like, f'{at}["step"]')
        whole = step.item() >= 1 and step.item().is_integer()
        _check(whole, f'{at}["step"]', "a whole number of at least 1", step.item())


def _check_stopping(given: Any, expected: dict[str, Any]) -> None:
    _check_keys(given, expected["stopping"], "stopping")
    window = given["window"]
    _check(isinstance(window, list), "stopping.window", "a list", window)
    for index, pair in enumerate(window):
        _check_pair(pair, f"stopping.window[{index}]", at_least=1)
    _check_pair(given["equal"], "stopping.equal", at_least=0)
    solved, mean, best = (given[name] for name in ("solved", "best_return", "best_parameters"))
    confirmed = given["confirmed_parameters"]
    _check(isinstance(solved, bool), "stopping.solved", "true or false", solved)
    if mean is not None:
        _check_finite(mean, "stopping.best_return")
    both = (mean is None) == (best is None) and not (solved and best is None)
    _check(both, "stopping.best_parameters", "them with best_return", best)
    right = (confirmed is not None) == solved
    _check(right, "stopping.confirmed_parameters", "them if it is solved", confirmed)
    for name in ("best_parameters", "confirmed_parameters"):
        if given[name] is not None:
            check_tensors(given[name], expected["policy"]["parameters"], f"stopping.{name}")
    found = given["evaluation"]
    if found is None:
        return
    _check(solved, "stopping.evaluation", "none before it is solved", found)
    _check_keys(found, ("returns", "lengths"), "stopping.evaluation")
    for name, values in found.items():
        at = f"stopping.evaluation.{name}"
        _check(isinstance(values, list) and values != [], at, "a list of numbers", values)
        for index, value in enumerate(values):
            if name == "returns":
                _check_finite(value, f"{at}[{index}]")
            else:
                _check_whole(value, f"{at}[{index}]", at_least=1)
    of_each = len(found["returns"]) == len(found["lengths"])
    _check(of_each, "stopping.evaluation.lengths", "one for each return", found["lengths"])


def _check_pair(given: Any, where: str, *, at_least: int) -> None:
    right = isinstance(given, list) and len(given) == 2
    _check(right, where, "a list of two numbers", given)
    _check_finite(given[0], f"{where}[0]")
    _check_whole(given[1], f"{where}[1]", at_least=at_least)


def _check_whole(given: Any, where: str, *, at_least: int) -> None:
    right = type(given) is int and at_least <= given < 2**63
    _check(right, where, f"a whole number of at least {at_least}", given)


def _check_finite(given: Any, where: str) -> None:
    right = type(given) in (int, float) and math.isfinite(given)
    _check(right, where, "a finite number", given)


def _check_keys(given: Any, expected: Iterable[str], where: str, hint: str = "") -> None:
    wanted = dict.fromkeys(expected)
    _check(isinstance(given, dict), where, "a dictionary", given)
    for name in wanted:
        if name not in given:
            raise ValueError(f'{where}["{name}"]: expected a value, got none{hint}')
    for name in given:
        if name not in wanted:
            raise ValueError(f"{where}: expected {', '.join(wanted)}, got {_shown(name)} too{hint}")


def _check_equal(given: Any, expected: Any, where: str, hint: str) -> None:
    """The same values of the same types."""
    if type(given) is type(expected) and isinstance(expected, dict):
        _check_keys(given, expected, where)
        for name, value in expected.items():
            _check_equal(given[name], value, f'{where}["{name}"]', hint)
    elif type(given) is type(expected) and isinstance(expected, list | tuple):
        if len(given) != len(expected):
            raise ValueError(f"{where}: expected {len(expected)} values, got {len(given)}{hint}")
        for index, (one, other) in enumerate(zip(given, expected, strict=True)):
            _check_equal(one, other, f"{where}[{index}]", hint)
    elif type(given) is not type(expected) or given != expected:
        raise ValueError(f"{where}: expected {_shown(expected)}, got {_shown(given)}{hint}")


def _check_plain(given: Any, where: str) -> None:
    """No tensors in it, which compare as nothing else does."""
    waiting = [given]
    while waiting:
        one = waiting.pop()
        _check(not isinstance(one, Tensor), where, "numbers and text", one)
        inside = one.values() if isinstance(one, dict) else one
        waiting += inside if isinstance(one, dict | list | tuple) else ()


def _entry(content: Any, name: str) -> Any:
    _check(isinstance(content, dict), "content", "a dictionary", content)
    _check(name in content, name, "a value", None)
    return content[name]


def _tensors(given: Any, where: str) -> dict[str, Tensor]:
    _check(isinstance(given, dict), where, "a dictionary of tensors", given)
    for name, value in given.items():
        _check(isinstance(value, Tensor), f"{where}[{_shown(name)}]", "a tensor", value)
    tensors: dict[str, Tensor] = given
    return tensors


def _numbers(parameters: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for value in parameters.values())


def _check(holds: bool, where: str, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{where}: expected {expected}, got {_shown(got)}")


def _shown(value: Any) -> str:
    """A value in a few plain characters, whatever it is."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f" {value.layout}"
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{layout}"
    if isinstance(value, dict | list | set) or (isinstance(value, tuple) and len(value) > 8):
        return f"a {type(value).__name__} of {len(value)}"
    return _cut(ascii(value))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
