"""Whatever a file holds: it is loaded as it was saved, or one error names it."""

import copy
import io
import math
import os
import pickle
import traceback
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run_state import SPACE, advance, digest, make_state

from vecpg import named
from vecpg.adam import Adam
from vecpg.evaluate import EvalResult
from vecpg.policy import Policy
from vecpg.run.checkpoint import policy_state
from vecpg.run.content import check_tensors, policy_of, unpickle
from vecpg.run.state import TrainState
from vecpg.run.stopping import Stopping
from vecpg.value import Critic, ValueFunction


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped(records, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def of(instructions, **records):
    """A file with this pickle in it."""
    return zipped({"data.pkl": instructions, "version": b"3\n", "byteorder": b"little", **records})


def check_refused(data, match="x.pt"):
    with pytest.raises(ValueError, match=match) as caught:
        unpickle(data, "x.pt")
    assert str(caught.value).startswith(f"x.pt ({len(data)} bytes) is not a vecpg checkpoint, or")
    # What a user may see, and what a logger may look for.
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


HONEST = {
    "plain": [1, -5, 2**63 - 1, 2**64 - 1, 0.5, math.inf, None, True, "text", "", (0.9, 0.999)],
    7: {"nested": [[], {}, (), [[1.5, 3], [2.5, 4]]]},
    "many": list(range(3000)),
    "zero": torch.zeros(()),
    "none": torch.zeros(0, 3),
    "none of two": torch.zeros(2, 3)[:, :0],
    "matrix": torch.arange(6.0, dtype=torch.float64).reshape(2, 3),
    "turned": torch.arange(6).reshape(2, 3).mT,
    "part": torch.arange(10.0)[2:8].reshape(3, 2),
    "half": torch.ones(3, dtype=torch.bfloat16),
}


def test_what_was_saved_is_what_is_read():
    read = unpickle(saved(HONEST), "x.pt")
    assert same(read, HONEST)
    assert same(read["turned"].contiguous(), HONEST["turned"].contiguous())
    # The same text, tuple and tensor in two places, as pickle writes them once.
    pair, tensor = (0.9, 0.999), torch.zeros(2)
    twice = {"a": pair, "b": pair, "text": ["text", "text"], "c": tensor, "d": [tensor]}
    assert same(unpickle(saved(twice), "x.pt"), twice)


def test_a_state_is_read_as_it_was():
    state = make_state()
    advance(state, 1)
    content = state.state_dict()
    assert same(unpickle(saved(content), "x.pt"), content)


class Evil:
    def __init__(self, function=os.mkdir, *arguments):
        self.made = function, arguments or ("evil",)

    def __reduce__(self):
        return self.made


class Storage:
    """Numbers of a file that claims to have so many of them."""

    def __init__(self, kind, count, key="0"):
        self.identity = ("storage", kind, key, "cpu", count)


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.identity if isinstance(value, Storage) else None


def with_tensors(*arguments, numbers=b"\0" * 24):
    """A file with tensors made of these arguments, all of the same 24 bytes."""
    tensors = [Evil(torch._utils._rebuild_tensor_v2, *given, OrderedDict()) for given in arguments]
    file = io.BytesIO()
    Pickler(file, protocol=2).dump({"tensors": tensors})
    return of(file.getvalue(), **{"data/0": numbers})


FLOAT, DOUBLE = torch.FloatStorage, torch.DoubleStorage


def test_a_tensor_written_by_hand_is_read():
    """Else the next test would show nothing."""
    numbers = np.arange(6, dtype=np.float32)
    whole = (Storage(FLOAT, 6), 0, (2, 3), (3, 1), False)
    read = unpickle(with_tensors(whole, numbers=numbers.tobytes()), "x.pt")
    assert read["tensors"][0].tolist() == numbers.reshape(2, 3).tolist()


BYTES, DENSE, PARTS = (
    "numbers of . bytes, got 24",
    "expected a dense tensor",
    "expected the parts of",
)
SHAPE = "expected whole numbers for the shape"


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        (BYTES, (Storage(FLOAT, 7), 0, (7,), (1,), False)),
        (BYTES, (Storage(FLOAT, 5), 0, (5,), (1,), False)),
        (BYTES, (Storage(FLOAT, 2**40), 0, (2**40,), (1,), False)),
        (BYTES, (Storage(FLOAT, -6), 0, (6,), (1,), False)),
        (BYTES, (Storage(DOUBLE, 6), 0, (6,), (1,), False)),
        ("is damaged", (Storage(FLOAT, 6, "1"), 0, (6,), (1,), False)),
        ("is damaged", (Storage(FLOAT, 6, "../0"), 0, (6,), (1,), False)),
        ("it names", (Storage(torch.ComplexFloatStorage, 3), 0, (3,), (1,), False)),
        ("it names", (Storage(torch.BoolStorage, 24), 0, (24,), (1,), False)),
        ("expected a storage", (Storage(OrderedDict, 6), 0, (6,), (1,), False)),
        (PARTS, (Storage("text", 6), 0, (6,), (1,), False)),
        (PARTS, (Storage(FLOAT, True), 0, (6,), (1,), False)),
        (PARTS, (Storage(FLOAT, 6.0), 0, (6,), (1,), False)),
        (PARTS, (Storage(FLOAT, 6, 0), 0, (6,), (1,), False)),
        (DENSE, (Storage(FLOAT, 6), 1, (6,), (1,), False)),
        (SHAPE, (Storage(FLOAT, 6), -1, (6,), (1,), False)),
        (DENSE, (Storage(FLOAT, 6), 0, (7,), (1,), False)),
        (SHAPE, (Storage(FLOAT, 6), 0, (-6,), (1,), False)),
        (DENSE, (Storage(FLOAT, 6), 0, (6,), (2,), False)),
        (DENSE, (Storage(FLOAT, 6), 0, (3,), (2,), False)),
        (SHAPE, (Storage(FLOAT, 6), 0, (6,), (-1,), False)),
        (DENSE, (Storage(FLOAT, 6), 0, (6,), (0,), False)),
        (DENSE, (Storage(FLOAT, 6), 0, (2**40, 2**40), (0, 0), False)),
        (DENSE, (Storage(FLOAT, 6), 0, (2, 3), (1, 1), False)),
        (DENSE, (Storage(FLOAT, 6), 0, (2, 3), (3,), False)),
        (DENSE, (Storage(FLOAT, 6), 0, (6,), (1,), True)),
        (SHAPE, (Storage(FLOAT, 6), 0, (True,), (1,), False)),
        (SHAPE, (Storage(FLOAT, 6), 0, (6.0,), (1,), False)),
        (SHAPE, (Storage(FLOAT, 6), 0, ("6",), (1,), False)),
        (PARTS, (Storage(FLOAT, 6), 0.0, (6,), (1,), False)),
        (PARTS, (Storage(FLOAT, 6), 0, [6], [1], False)),
        (PARTS, (Storage(FLOAT, 6), 0, 6, 1, False)),
        (PARTS, (Storage(FLOAT, 6), 0, (6,), (1,), 0)),
        (PARTS, (Storage(FLOAT, 6), 0, (6,), (1,), False, None)),
        (PARTS, (None, 0, (6,), (1,), False)),
        (PARTS, ("0", 0, (6,), (1,), False)),
    ],
    ids=lambda given: str([getattr(each, "identity", each) for each in given])[:60],
)
def test_a_tensor_is_inside_the_bytes_that_the_file_has(match, arguments):
    check_refused(with_tensors(arguments), match)


def test_the_same_bytes_are_of_one_kind_only():
    """Torch keeps the first kind, and would make room for what is missing."""
    as_doubles = (Storage(DOUBLE, 3), 0, (3,), (1,), False)
    as_floats = (Storage(FLOAT, 6), 0, (6,), (1,), False)
    check_refused(with_tensors(as_doubles, as_floats), "two kinds of numbers")


def quantized():
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)


@pytest.mark.parametrize(
    "value",
    [
        Evil(),
        Evil(eval, "1"),
        Evil(getattr, "a", "upper"),
        {1, 2},
        frozenset((1,)),
        b"bytes",
        bytearray(b"bytes"),
        1j,
        2**64,
        2**70,
        2**5000,
        -(2**63) - 1,
        np.float64(1),
        np.zeros(2),
        torch.float32,
        torch.device("cpu"),
        torch.Size([1]),
        OrderedDict(a=1),
        torch.nn.Parameter(torch.zeros(2)),
        torch.zeros(2, requires_grad=True),
        torch.zeros(2, device="meta"),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(2).to_sparse(),
        torch.zeros(1).expand(10**9),
        torch.zeros(2).view(2, 1).expand(2, 3),
        {(1, 2): 3},
        {None: 1},
        {True: 1},
        {0.5: 1},
        range(3),
        print,
    ],
    ids=lambda value: f"{type(value).__name__} {str(value)[:30]}",
)
@pytest.mark.filterwarnings("ignore")
def test_what_no_vecpg_has_written_is_refused_and_nothing_is_executed(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    check_refused(saved({"state": value}))
    check_refused(saved({"state": [[value]]}))
    check_refused(saved([value]))
    assert os.listdir(tmp_path) == []


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_tensor_is_refused():
    check_refused(saved({"state": quantized()}))


def itself(container, put):
    put(container)
    return container


def laughs(kind):
    value = kind([1, 2])
    for _ in range(40):
        value = kind([value, value])
    return value


def cycle():
    outer = []
    outer.append((outer,))
    return outer


@pytest.mark.parametrize(
    "value",
    [
        itself([], lambda it: it.append(it)),
        itself({}, lambda it: it.update(a=it)),
        cycle(),
        laughs(list),
        laughs(tuple),
        laughs(lambda values: dict(enumerate(values))),
        *([[shared, shared]] for shared in ([], {}, [1])),
    ],
    ids=["list", "dictionary", "tuple", "lists", "tuples", "dictionaries", "[]", "{}", "[1]"],
)
def test_a_container_stands_in_one_place_and_does_not_hold_itself(value):
    check_refused(saved({"state": value}), "stands in two places")


DEEP = 100_000
START, KEY = b"\x80\x02}", b"X\x01\0\0\0a"


@pytest.mark.parametrize(
    ("instructions", "match"),
    [
        (START + KEY + b"]" * DEEP + b"a" * (DEEP - 1) + b"s.", "wait to be put somewhere"),
        (START + KEY + b"K\x01" + b"\x85" * DEEP + b"s.", "inside each other"),
        # Such a key would be hashed by a function of C that calls itself.
        (START + b"K\x01" + b"\x85" * DEEP + b"K\x01s.", "inside each other"),
        (START + KEY + b"(" * DEEP + b"t" * DEEP + b"s.", "wait to be put somewhere"),
        (START + KEY + b"K\x01" * DEEP + b"s.", "wait to be put somewhere"),
        (START + KEY + b"](" + b"K\x01" * DEEP + b"es.", "wait to be put somewhere"),
        (START + b"(" + KEY + b"u.", "a value is missing"),
        (START + KEY + b"K\x01a.", "expected a list"),
        (START + b"(" + KEY + b"K\x01s.", "a value is missing"),
        (START + b"}q\0q\x01}h\0K\x01s.", "stands in two places"),
        (START + KEY + b"ccollections\nOrderedDict\ns.", "stands alone"),
        (START + KEY + b"ccollections\nOrderedDict\n)Rs.", "stands alone"),
        (START + KEY + b"ccollections\nOrderedDict\n)R}b" + b"s.", "the instruction BUILD"),
        (START + KEY + b"cos\nsystem\nX\x01\0\0\0a\x85Rs.", "it names 'os system'"),
        (START + KEY + b"c__builtin__\neval\nX\x01\0\0\0a\x85Rs.", "it names '__builtin__ eval'"),
        (START + KEY + b"c_codecs\nencode\nX\x01\0\0\0a\x85Rs.", "it names '_codecs encode'"),
        (START + KEY + b"cos\x1b[2J\nsystem\n.", r"it names 'os\\x1b\[2J system'"),
        (START + KEY + b"(ios\nsystem\n.", "the instruction INST"),
        (START + KEY + b"X\x02\0\0\0osX\x06\0\0\0system\x93.", "the instruction STACK_GLOBAL"),
        (START + KEY + b"K\x01K\x01\x85Rs.", "got a call"),
        (START + KEY + b"ccollections\nOrderedDict\nK\x01\x85Rs.", "a call of collections Ordere"),
        (START + KEY + b"ctorch._utils\n_rebuild_tensor_v2\n)Rs.", "parts of a plain tensor"),
        (START + KEY + b"ctorch\nFloatStorage\n)Rs.", "got a call of torch FloatStorage"),
        (START + KEY + b"P0\ns.", "the instruction PERSID"),
        (START + KEY + b"\x8b\x04\0\0\0\x01\x01\x01\x01s.", "the instruction LONG4"),
        (START + KEY + b"I" + b"9" * 10_000 + b"\ns.", "is damaged"),
        (START + KEY + b"20.", "the instruction DUP"),
        (START + KEY + b"K\x01s}.", "expected a dictionary"),
        (START + b"(.", "expected a dictionary"),
        (b"\x80\x02].", "expected a dictionary"),
        (b"\x80\x04}.", "the instruction PROTO"),
        (b"\x80\x02.", "expected a dictionary"),
        (START, "is damaged"),
        (START + b"h\x05.", "is damaged"),
        (START + b"q\0u.", "is damaged"),
        (START + b"X\xff\xff\xff\x7fa.", "is damaged"),
        (b"", "is damaged"),
        (b"hello", "is damaged"),
    ],
    ids=lambda given: repr(given)[:40],
)
def test_instructions_that_no_vecpg_has_written(instructions, match):
    check_refused(of(instructions), match)


def test_a_file_without_instructions():
    check_refused(zipped({"version": b"3\n"}))
    check_refused(zipped({}))
    check_refused(zipped({"data.pkl": b"\x80\x02}.", "a/data.pkl": b""}) + b"rest")


def test_nothing_is_unpacked_that_is_larger_than_the_file():
    records = {"data.pkl": b"\x80\x02}.", "version": b"3\n", "data/0": b"\0" * 10_000_000}
    bomb = zipped(records, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 20_000
    tracemalloc.start()
    check_refused(bomb, "got a compressed one")
    # The size is in the list of entries twice, and before the entry itself.
    whole = zipped({**records, "data/0": b"\0" * 1000})
    claims = whole.replace((1000).to_bytes(4, "little"), (10**9).to_bytes(4, "little"))
    assert claims != whole
    check_refused(claims, "its entries claim 10000000")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_entries_of_one_name_none_is_read():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for content in (b"\x80\x02}.", b"\x80\x02}X\x01\0\0\0aK\x01s."):
            archive.writestr("archive/data.pkl", content)
    check_refused(file.getvalue(), "have the same name")


def test_files_of_other_kinds(tmp_path):
    check_refused(saved({"state": 1}, _use_new_zipfile_serialization=False))
    check_refused(pickle.dumps({"state": 1}))
    check_refused(zipped({"data.pkl": b"\x80\x02}."})[:-1])
    # What torch takes for a program.
    script = of(b"\x80\x02}.", **{"constants.pkl": b"\x80\x02}.", "code/__torch__.py": b""})
    assert unpickle(script, "x.pt") == {}


@st.composite
def damaged(draw, whole):
    """A file with up to three bytes changed, and perhaps without its end."""
    changed = bytearray(whole)
    for _ in range(draw(st.integers(0, 3))):
        changed[draw(st.integers(0, len(whole) - 1))] = draw(st.integers(0, 255))
    return bytes(changed[: draw(st.just(len(whole)) | st.integers(0, len(whole)))])


WHOLE = saved({"a": [1, 2.5, None], "b": torch.arange(4.0), "c": {"d": "text"}})


@settings(max_examples=300, deadline=None)
@given(damaged(WHOLE))
def test_a_file_that_is_cut_or_changed_anywhere(data):
    """Whatever is still read has the types of plain data; that it is the same, the digest says."""
    try:
        read = unpickle(data, "x.pt")
    except ValueError as error:
        assert str(error).startswith("x.pt (")  # noqa: PT017
    else:
        check_plain(read)


def check_plain(value):
    if isinstance(value, dict):
        assert all(type(key) in (str, int) for key in value)
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            check_plain(each)
    else:
        assert type(value) in (str, int, float, bool, type(None), torch.Tensor)


# What a state may hold.


def solved_state(**policy):
    torch.manual_seed(0)
    shape = {"hidden_sizes": (4,), "normalize_obs": True}
    own = Policy(SPACE, spaces.Discrete(2), **shape | policy)
    critic = Critic(ValueFunction(SPACE, **shape), 1e-3)
    state = TrainState(own, Adam(own.parameters(), 1e-2), critic, Stopping(None, 3))
    advance(state, 1)
    state.stopping.solved = True
    state.stopping.confirmed_parameters = dict(state.stopping.best_parameters)
    state.stopping.evaluation = EvalResult((1.0, 2.0), (3, 4))
    return state


def put(*path):
    """Change what is at the end of a path; the last is the new value."""
    *names, last, value = path

    def change(content):
        for name in names:
            content = content[name]
        content[last] = value

    return change


def drop(*path):
    *names, last = path

    def change(content):
        for name in names:
            content = content[name]
        del content[last]

    return change


WEIGHT = "network.0.weight"
PARAMETERS = ("policy", "parameters")
MOMENT = ("optimizer", "state", 1)
GROUP = ("optimizer", "param_groups", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("policy"), 'state["policy"]: expected a value, got none'),
        (put("more", 1), "state: expected policy, optimizer, critic, stopping, counters, seconds"),
        (put("policy", None), "policy: expected a dictionary, got None"),
        (drop(*PARAMETERS), 'policy["parameters"]: expected a value, got none'),
        (put(*PARAMETERS, [1]), "policy.parameters: expected a dictionary"),
        (drop(*PARAMETERS, WEIGHT), f'policy.parameters["{WEIGHT}"]: expected a value, got none'),
        (put(*PARAMETERS, "x", torch.zeros(1)), "policy.parameters: expected"),
        (
            put(*PARAMETERS, WEIGHT, torch.zeros(4, 2)),
            f'policy.parameters["{WEIGHT}"]: expected (4, 3) float32, got (4, 2) float32',
        ),
        (
            put(*PARAMETERS, WEIGHT, torch.zeros(4, 3, dtype=torch.float64)),
            f'policy.parameters["{WEIGHT}"]: expected (4, 3) float32, got (4, 3) float64',
        ),
        (
            put(*PARAMETERS, WEIGHT, torch.zeros(4, 3).to_sparse()),
            f'policy.parameters["{WEIGHT}"]: expected (4, 3) float32, got (4, 3) float32 torch.spa',
        ),
        (
            put(*PARAMETERS, WEIGHT, torch.full((4, 3), torch.nan)),
            f'policy.parameters["{WEIGHT}"]: expected finite numbers, got others',
        ),
        (
            put(*PARAMETERS, WEIGHT, torch.zeros(4, 3, device="meta")),
            f'policy.parameters["{WEIGHT}"]: expected finite numbers, got others',
        ),
        (
            put(*PARAMETERS, "encoder.normalizer.count", torch.tensor(math.inf).double()),
            'policy.parameters["encoder.normalizer.count"]: expected finite numbers',
        ),
        (put(*PARAMETERS, WEIGHT, "text"), "expected a tensor, got 'text'"),
        (
            put("policy", "description", "activation", "relu"),
            "it was saved with --activation relu, and this run has --activation tanh",
        ),
        (put("policy", "description", "hidden_sizes", [8]), "it was saved with --hidden-sizes 8"),
        (put("policy", "description", "normalize_obs", False), "with --no-normalize-obs, and this"),
        (put("policy", "description", "dropout", "\x1b[2J"), r"--dropout '\x1b[2J'"),
        (drop("policy", "description", "dropout"), 'description["dropout"]: expected a value'),
        (drop("optimizer", "state"), 'optimizer["state"]: expected a value'),
        (put("optimizer", "state", []), "optimizer.state: expected a dictionary"),
        (put("optimizer", "state", 4, {}), "optimizer.state: expected keys below 4, got 4"),
        (put("optimizer", "state", "0", {}), "optimizer.state: expected keys below 4, got '0'"),
        (put("optimizer", "state", True, {}), 'optimizer.state[1]["step"]: expected a value'),
        (drop(*MOMENT, "exp_avg"), 'optimizer.state[1]["exp_avg"]: expected a value'),
        (put(*MOMENT, "more", 1), "optimizer.state[1]: expected step, exp_avg, exp_avg_sq, got"),
        (
            put(*MOMENT, "exp_avg", torch.zeros(5)),
            'optimizer.state[1]["exp_avg"]: expected (4,) float32, got (5,) float32',
        ),
        (
            put(*MOMENT, "exp_avg", torch.zeros(4).double()),
            'optimizer.state[1]["exp_avg"]: expected (4,) float32, got (4,) float64',
        ),
        (put(*MOMENT, "exp_avg", torch.full((4,), math.inf)), '["exp_avg"]: expected finite'),
        (put(*MOMENT, "exp_avg_sq", -torch.ones(4)), '["exp_avg_sq"]: expected squares, got'),
        (put(*MOMENT, "step", torch.tensor(1.5)), "expected a whole number of at least 1, got 1.5"),
        (put(*MOMENT, "step", torch.tensor(0.0)), "expected a whole number of at least 1, got 0.0"),
        (put(*MOMENT, "step", torch.tensor(math.nan)), '["step"]: expected finite numbers'),
        (put(*MOMENT, "step", torch.zeros(1)), '["step"]: expected () float32, got (1,) float32'),
        (put(*MOMENT, "step", torch.tensor(1)), '["step"]: expected () float32, got () int64'),
        (put(*MOMENT, "step", 1), '["step"]: expected () float32, got 1'),
        (
            put(*GROUP, "lr", 2e-2),
            'optimizer.param_groups[0]["lr"]: expected 0.01, got 0.02; go on with the --learning-',
        ),
        (put(*GROUP, "lr", torch.tensor(1e-2)), '[0]["lr"]: expected 0.01, got () float32'),
        (put(*GROUP, "betas", (0.9, 0.9)), '[0]["betas"][1]: expected 0.999, got 0.9'),
        (put(*GROUP, "params", [0, 1, 2]), '[0]["params"]: expected 4 values, got 3'),
        (put(*GROUP, "params", [0, 1, 2, 2]), '[0]["params"][3]: expected 3, got 2'),
        (put(*GROUP, "amsgrad", True), '[0]["amsgrad"]: expected False, got True'),
        (put("optimizer", "param_groups", []), "param_groups: expected 1 values, got 0"),
        (
            put("critic", "parameters", WEIGHT, torch.zeros(3, 3)),
            f'critic.parameters["{WEIGHT}"]: expected (4, 3) float32, got (3, 3) float32',
        ),
        (
            put("critic", "optimizer", "state", 3, "exp_avg", torch.zeros(2)),
            'critic.optimizer.state[3]["exp_avg"]: expected (1,) float32, got (2,) float32',
        ),
        (put("critic", "optimizer", "param_groups", 0, "lr", 1.0), "the --value-learning-rate"),
        (put("critic", 1), "critic: expected a dictionary, got 1"),
        (put("stopping", "window", ()), "stopping.window: expected a list, got ()"),
        (put("stopping", "window", [[1.0]]), "stopping.window[0]: expected a list of two numbers"),
        (put("stopping", "window", [(1.0, 1)]), "stopping.window[0]: expected a list of two"),
        (
            put("stopping", "window", [[1.0, 0]]),
            "window[0][1]: expected a whole number of at least",
        ),
        (put("stopping", "window", [[1.0, 2.0]]), "window[0][1]: expected a whole number of at"),
        (put("stopping", "window", [[math.nan, 1]]), "window[0][0]: expected a finite number"),
        (
            put("stopping", "window", [[True, 1]]),
            "window[0][0]: expected a finite number, got True",
        ),
        (put("stopping", "equal", [0.0, -1]), "stopping.equal[1]: expected a whole number of at"),
        (put("stopping", "solved", 1), "stopping.solved: expected true or false, got 1"),
        (
            put("stopping", "best_return", math.inf),
            "stopping.best_return: expected a finite number",
        ),
        (put("stopping", "best_return", None), "stopping.best_parameters: expected them with best"),
        (put("stopping", "best_parameters", None), "stopping.best_parameters: expected them with"),
        (
            put("stopping", "best_parameters", WEIGHT, torch.zeros(4, 2)),
            f'stopping.best_parameters["{WEIGHT}"]: expected (4, 3) float32, got (4, 2) float32',
        ),
        (
            put("stopping", "solved", False),
            "stopping.confirmed_parameters: expected them if it is solved",
        ),
        (drop("stopping", "evaluation", "lengths"), 'evaluation["lengths"]: expected a value'),
        (
            put("stopping", "evaluation", "returns", []),
            "evaluation.returns: expected a list of num",
        ),
        (put("stopping", "evaluation", "returns", [1.0]), "evaluation.lengths: expected one for"),
        (put("stopping", "evaluation", "returns", [1.0, ""]), "evaluation.returns[1]: expected a"),
        (put("stopping", "evaluation", "lengths", [1, 0]), "evaluation.lengths[1]: expected a"),
        (
            put("counters", "iteration", -1),
            "counters.iteration: expected a whole number of at leas",
        ),
        (put("counters", "iteration", 1.0), "counters.iteration: expected a whole number"),
        (put("counters", "iteration", True), "counters.iteration: expected a whole number"),
        (put("counters", "iteration", 2**63), "counters.iteration: expected a whole number"),
        (drop("counters", "episodes"), 'counters["episodes"]: expected a value'),
        (put("counters", "more", 1), "counters: expected iteration, env_steps, vector_steps, epi"),
        (put("seconds", []), "seconds: expected a dictionary"),
        (put("seconds", "run", math.nan), "seconds['run']: expected a finite number, got nan"),
        (put("seconds", "run", "1"), "seconds['run']: expected a finite number, got '1'"),
        (put("seconds", 1, 1.0), "seconds: expected text for a key, got 1"),
    ],
    ids=lambda given: given[:60] if isinstance(given, str) else "",
)
def test_the_first_thing_that_is_wrong_is_named_and_nothing_changes(change, message):
    state = solved_state()
    before = digest(state.state_dict())
    content = copy.deepcopy(state.state_dict())
    content["seconds"] = {"run": 99.0}
    change(content)
    with pytest.raises(ValueError) as caught:
        state.load_state_dict(content)
    assert message in str(caught.value)
    assert digest(state.state_dict()) == before


def test_the_last_part_that_is_wrong_changes_nothing_of_the_first():
    """What is wrong with the counters is found before the policy is written to."""
    state, other = solved_state(), solved_state()
    advance(other, 2)
    content = copy.deepcopy(other.state_dict())
    before = digest(state.state_dict())
    assert digest(other.state_dict()) != before
    content["seconds"]["run"] = math.nan
    with pytest.raises(ValueError, match="seconds"):
        state.load_state_dict(content)
    assert digest(state.state_dict()) == before
    content["seconds"]["run"] = 2.0
    state.load_state_dict(content)
    assert digest(state.state_dict()) == digest(other.state_dict())


def test_a_parameter_that_has_made_no_step_is_legal():
    state = solved_state()
    content = copy.deepcopy(state.state_dict())
    del content["optimizer"]["state"][0], content["critic"]["optimizer"]["state"][2]
    state.load_state_dict(content)
    assert list(state.optimizer.state_dict()["state"]) == [1, 2, 3]
    fresh = make_state()
    fresh.load_state_dict(copy.deepcopy(make_state(seed=1).state_dict()))


def test_another_size_is_named_with_its_tensor_and_its_flag():
    content = solved_state(hidden_sizes=(7, 8)).state_dict()
    with pytest.raises(ValueError) as caught:
        solved_state(hidden_sizes=(4, 8)).load_state_dict(content)
    assert str(caught.value) == (
        'policy.parameters["network.0.weight"]: expected (4, 3) float32, got (7, 3) float32; it was'
        " saved with --hidden-sizes 7 8, and this run has --hidden-sizes 4 8"
    )


def test_other_spaces_are_shown_saved_and_current():
    state = solved_state()
    content = state.state_dict()
    for space, shown in (
        (spaces.Box(-1, 1, (5,)), "Box(-1.0, 1.0, (5,), float32)"),
        (spaces.Box(-2, 1, (3,)), "Box(-2.0, 1.0, (3,), float32)"),
    ):
        policy = Policy(space, spaces.Discrete(2), hidden_sizes=(4,), normalize_obs=True)
        other = TrainState(policy, Adam(policy.parameters(), 1e-2), None, Stopping(None, 3))
        with pytest.raises(ValueError) as caught:
            other.load_state_dict(content)
        assert str(caught.value).endswith(
            "the environment has changed: observation_space was Box(-1.0, 1.0, (3,), float32), and"
            f" is {shown}"
        )


# What the policy of a file may be.


def described(**changes):
    policy = Policy(SPACE, spaces.Discrete(2), hidden_sizes=(4,))
    content = {"policy": copy.deepcopy(policy_state(policy))}
    for name, value in changes.items():
        at = content["policy"]["description"]
        if name in at:
            at[name] = value
        else:
            space, _, key = name.rpartition("__")
            at[space][key] = value
    return content


def picture(**changes):
    """A small network's parameters, with the description of one of convolutions."""
    return described(
        network="cnn",
        observation_space={"kind": "Box", "dtype": "uint8", "low": 0, "high": 255} | changes,
    )


def large(content):
    """With as many parameters more as make a file of two megabytes."""
    parameters = content["policy"]["parameters"] | {"more": torch.zeros(500_000)}
    return {"policy": content["policy"] | {"parameters": parameters}}


BOX = {"kind": "Box", "dtype": "float32", "low": -1.0, "high": 1.0, "shape": [3]}
MANY = {"kind": "MultiDiscrete", "dtype": "int64", "nvec": [2, 3], "start": [0, 0]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            described(hidden_sizes=[10**9]),
            "policy.description: expected sizes that make at most 26 parameters",
        ),
        (
            described(hidden_sizes=[1] * 10**5),
            "policy.description: expected sizes that make at most 26 parameters",
        ),
        (described(hidden_sizes=[2**63]), "hidden_sizes: expected a list of whole numbers"),
        (described(hidden_sizes=[0]), "hidden_sizes: expected a list of whole numbers"),
        (described(hidden_sizes=[4.0]), "hidden_sizes: expected a list of whole numbers"),
        (described(hidden_sizes=[True]), "hidden_sizes: expected a list of whole numbers"),
        (described(hidden_sizes="4"), "hidden_sizes: expected a list of whole numbers"),
        (described(hidden_sizes=[3]), 'parameters["network.0.weight"]: expected (3, 3) float32'),
        (described(hidden_sizes=[2, 2]), 'parameters["network.4.weight"]: expected a value'),
        (
            described(hidden_sizes=[]),
            "parameters: expected network.0.weight, network.0.bias, got 'n",
        ),
        (described(activation="gelu"), "activation: expected tanh or relu, got 'gelu'"),
        (described(activation=["tanh"]), "activation: expected tanh or relu"),
        (described(dropout=1.0), "dropout: expected a number in [0, 1), got 1.0"),
        (described(dropout=math.nan), "dropout: expected a number in [0, 1), got nan"),
        (described(dropout=False), "dropout: expected a number in [0, 1), got False"),
        (
            described(embedding_size=10**9, observation_space=MANY),
            "policy.description: expected sizes that make at most 26 parameters, got 13000000014",
        ),
        (described(embedding_size=0), "embedding_size: expected a whole number of at least 1"),
        (described(normalize_obs=1), "normalize_obs: expected true or false, got 1"),
        (described(normalize_obs=True), 'parameters["encoder.normalizer.count"]: expected a value'),
        (described(network="auto"), "network: expected mlp, cnn or module:function, got 'auto'"),
        (described(network=["cnn"]), "network: expected mlp, cnn or module:function, got ['cnn']"),
        (described(network="os:abort"), "network: expected mlp or cnn, got 'os:abort', which is"),
        (described(network=":" * 9999), "network: expected mlp or cnn, got '::::"),
        (described(network="cnn"), "--network cnn: expected images, a Box of shape (H, W), (H"),
        (picture(shape=[10**9, 10]), "make at most 26 parameters, got 24576000056256"),
        (picture(shape=[400, 400]), "make at most 26 parameters, got 69409440"),
        (large(picture(shape=[2800, 2800], dtype="float64", low=0.0, high=1.0)), "make at most 50"),
        (picture(shape=[-8, 8]), '["shape"]: expected a whole number of at least 0, got -8'),
        (picture(shape=[0, 8, 3]), "policy.description: expected sizes that make at most 26 param"),
        (picture(shape=[20, 20]), "expected sizes that make at most 26 parameters, got 875456"),
        (picture(shape=[1, 1, 400]), "expected sizes that make at most 26 parameters, got 3333056"),
        (described(log_std="x"), "log_std: expected parameter or network, got 'x'"),
        (described(observation_space=None), "observation_space: expected a dictionary, got None"),
        (described(observation_space={}), 'observation_space["kind"]: expected Box or Discrete'),
        (described(observation_space__kind="Dict"), '["kind"]: expected Box or Discrete or Multi'),
        (described(observation_space__kind=["Box"]), '["kind"]: expected Box or Discrete or'),
        (described(observation_space__more=1), "observation_space: expected kind, dtype, shape,"),
        (described(observation_space__dtype="O"), '["dtype"]: expected one of int8'),
        (described(observation_space__dtype="(9,9)f8"), '["dtype"]: expected one of int8'),
        (described(observation_space__shape=[10**9]), '["shape"]: expected at most 26, got 1000'),
        (described(observation_space__shape=[20, 20]), '["shape"]: expected at most 26 numbers'),
        (described(observation_space__shape=[0, 10**18]), '["shape"]: expected at most 26, got'),
        (described(observation_space__shape=[-3]), '["shape"]: expected a whole number of at'),
        (described(observation_space__shape=[3.0]), '["shape"]: expected a whole number of at'),
        (described(observation_space__shape=[1] * 33), '["shape"]: expected a list'),
        (described(observation_space__shape=3), '["shape"]: expected a list, got 3'),
        (described(observation_space__shape=[2]), 'weight"]: expected (4, 2) float32, got (4, 3)'),
        (described(observation_space__low=math.nan), '["low"]: expected numbers of float32, got n'),
        (described(observation_space__low=2.0), '["low"]: expected at most high, got'),
        (described(observation_space__low=math.inf), '["low"]: expected at most high, got'),
        (described(observation_space__high=1e39), '["high"]: expected numbers of float32, got 1e'),
        (described(observation_space__low=[-1.0] * 4), '["low"]: expected lists of shape (3,)'),
        (described(observation_space__low=[-1.0, "", 0.0]), '["low"]: expected numbers of float32'),
        (described(observation_space__low=[[-1.0]] * 3), '["low"]: expected numbers of float32'),
        (described(observation_space__low=None), '["low"]: expected numbers of float32, got None'),
        (described(action_space__n=10**12), 'action_space["n"]: expected at most 26, got 10000000'),
        (described(action_space__n=0), 'action_space["n"]: expected a whole number of at least 1'),
        (described(action_space__n=True), 'action_space["n"]: expected a whole number of at least'),
        (described(action_space__n=1), 'parameters["network.2.weight"]: expected (1, 4) float32'),
        (described(action_space__start=2**63 - 1), 'action_space["start"]: expected at most 92233'),
        (described(action_space__start=0.5), 'action_space["start"]: expected a whole number of'),
        (described(action_space__dtype="float32"), 'action_space["dtype"]: expected one of int8'),
        (described(action_space=BOX | {"shape": [10**9]}), 'action_space["shape"]: expected at mo'),
        (
            described(action_space=BOX | {"dtype": "int8", "low": 0, "high": 9, "shape": [1]}),
            "is not supported",
        ),
        (described(action_space=MANY | {"nvec": [20, 20]}), '["nvec"]: expected at most 26 in all'),
        (described(action_space=MANY | {"nvec": [2, 10**12]}), '["nvec"]: expected at most 26'),
        (described(action_space=MANY | {"nvec": [2, 0]}), '["nvec"]: expected a whole number of'),
        (described(action_space=MANY | {"nvec": []}), '["nvec"]: expected numbers of values'),
        (described(action_space=MANY | {"nvec": 2}), '["start"]: expected a whole number of'),
        (
            described(action_space=MANY | {"nvec": [[2, 3], [2]]}),
            '["nvec"]: expected lists of shape',
        ),
        (described(action_space=MANY | {"start": [0]}), '["start"]: expected lists of shape (2,)'),
        (described(action_space=MANY | {"nvec": [[2]], "start": [[0]]}), "of one dimension"),
        (
            described(action_space=MANY | {"dtype": "int8", "nvec": [2, 200]}),
            '["nvec"]: expected at',
        ),
        ({}, "policy: expected a value, got None"),
        ({"policy": []}, "policy: expected a dictionary"),
        ([], "content: expected a dictionary"),
        ({"policy": {"description": {}}}, 'policy["parameters"]: expected a value'),
        ({"policy": {"description": {}, "parameters": {}}}, "policy.description: expected ["),
        (
            {"policy": {"description": {}, "parameters": {"a": 1}}},
            "policy.parameters['a']: expecte",
        ),
        (
            {"policy": {"description": 1, "parameters": {}}},
            "policy.description: expected a diction",
        ),
    ],
    ids=lambda given: given[:60] if isinstance(given, str) else "",
)
def test_a_policy_is_built_only_of_what_its_parameters_fit(content, message):
    tracemalloc.start()
    with pytest.raises(ValueError) as caught:
        policy_of(content, "best.pt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(caught.value).startswith("best.pt: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500
    assert peak < 20_000_000


@pytest.mark.parametrize("name", ["high", "shape"])
def test_a_tensor_is_no_part_of_a_description(name):
    state = solved_state()
    content = copy.deepcopy(state.state_dict())
    content["policy"]["description"]["observation_space"][name] = torch.zeros(2)
    message = r"policy.description: expected numbers and text, got \(2,\) float32"
    with pytest.raises(ValueError, match=message):
        policy_of(content, "best.pt")
    with pytest.raises(ValueError, match=message):
        state.load_state_dict(content)


def test_parameters_that_are_not_finite_are_no_policy():
    content = described()
    content["policy"]["parameters"]["network.0.bias"][1] = math.nan
    with pytest.raises(
        ValueError, match=r'best.pt: policy.parameters\["network.0.bias"\]: expecte'
    ):
        policy_of(content, "best.pt")


@pytest.mark.parametrize(
    ("observations", "actions", "shape"),
    [
        (SPACE, spaces.Discrete(2), {"normalize_obs": True, "dropout": 0.5}),
        (SPACE, spaces.Box(-2, np.inf, (2, 2)), {"activation": "relu"}),
        (SPACE, spaces.Box(-2, 3, (2,)), {"log_std": "network", "hidden_sizes": ()}),
        (spaces.Discrete(5, start=-3), spaces.MultiDiscrete([2, 3], start=[1, 2]), {}),
        (spaces.MultiDiscrete([[2, 3], [4, 5]]), spaces.Discrete(2), {"embedding_size": 3}),
        (spaces.Box(0, 255, (4, 4, 3), np.uint8), spaces.Discrete(255, dtype=np.uint8), {}),
        (spaces.Box(0, 255, (9, 8, 3), np.uint8), spaces.Box(-1, 1, (2,)), {"normalize_obs": True}),
        (spaces.Box(0, 255, (4, 40, 37), np.uint8), spaces.Discrete(2), {"hidden_sizes": ()}),
        (spaces.Box(0, 255, (9, 9), np.uint8), spaces.Discrete(2), {"network": "mlp"}),
        (spaces.Box(-1, 1, (2, 3)), spaces.Discrete(2), {"network": "cnn"}),
        (spaces.MultiBinary((9, 8)), spaces.Discrete(2), {"network": "cnn"}),
        (spaces.Box(0, 1, (3,), bool), spaces.Discrete(2), {}),
        (spaces.MultiBinary(5), spaces.MultiBinary((2, 3)), {"normalize_obs": True}),
        (spaces.MultiBinary((3, 2)), spaces.Discrete(2), {"embedding_size": 3}),
    ],
    ids=str,
)
def test_every_policy_that_was_saved_is_built_again(observations, actions, shape):
    torch.manual_seed(0)
    policy = Policy(observations, actions, **shape)
    content = unpickle(saved({"policy": policy_state(policy)}), "best.pt")
    before = torch.random.get_rng_state()
    loaded = policy_of(content, "best.pt")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not loaded.training
    assert same(dict(loaded.state_dict()), dict(policy.state_dict()))
    assert loaded.description() == policy.description()
    obs = np.stack([observations.sample() for _ in range(9)])
    np.testing.assert_array_equal(loaded.act(obs), policy.act(obs))
    assert all(one.requires_grad for one in loaded.parameters())
    # The parameters are its own.
    with torch.no_grad():
        next(loaded.parameters()).fill_(0)
    assert same(content["policy"]["parameters"], dict(policy.state_dict()))


@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize("shape", [(6, 6, 2), (2, 36, 37), (9, 8)])
@pytest.mark.parametrize("hidden_sizes", [(), (5, 3)])
def test_the_parameters_of_a_description_are_counted_exactly(network, shape, hidden_sizes):
    space = spaces.Box(0, 255, shape, np.uint8)
    policy = Policy(space, spaces.Discrete(3), hidden_sizes=hidden_sizes, network=network)
    has = sum(parameter.numel() for parameter in policy.parameters())
    Policy.from_description(policy.description(), largest=has)
    with pytest.raises(ValueError, match=f"at most {has - 1} parameters, got {has}$"):
        Policy.from_description(policy.description(), largest=has - 1)


# A network of the user's own.


SEEN = spaces.Box(0, 255, (30, 40, 3), np.uint8)


def of_users(network="networks:small", space=SEEN, **changes):
    torch.manual_seed(0)
    policy = Policy(space, spaces.Discrete(2), hidden_sizes=(4,), network=network)
    content = copy.deepcopy({"policy": policy_state(policy)})
    content["policy"]["description"] |= changes
    return policy, unpickle(saved(content), "best.pt")


def test_a_network_of_the_users_own_is_wanted_by_name_and_never_imported_before(monkeypatch):
    policy, content = of_users()
    loaded = policy_of(content, "best.pt", network="networks:small")
    assert same(dict(loaded.state_dict()), dict(policy.state_dict()))
    assert "encoder.body.shift" in loaded.state_dict()
    obs = np.stack([SEEN.sample() for _ in range(9)])
    assert np.array_equal(loaded.act(obs), policy.act(obs))

    def load(name, flag):
        raise AssertionError(name)

    monkeypatch.setattr(named, "load", load)
    message = r"best.pt: policy.description.network: .*'networks:small', which is imported only if"
    for typed in (None, "auto"):  # what a run is trained with that names none
        with pytest.raises(ValueError, match=f"{message} you name it .* network='networks:small'"):
            policy_of(content, "best.pt", network=typed)
    for other in ("networks:other", "cnn", "mlp"):
        with pytest.raises(ValueError, match=f"network: expected 'networks:small', .* '{other}'"):
            policy_of(content, "best.pt", network=other)
    _, plain = of_users("cnn")
    for other in ("networks:small", "mlp"):
        with pytest.raises(ValueError, match=f"network: expected 'cnn', .*, got '{other}'"):
            policy_of(plain, "best.pt", network=other)
    for same_one in (None, "auto", "cnn"):
        assert policy_of(plain, "best.pt", network=same_one).encoder.network == "cnn"


def test_a_network_of_the_users_own_may_have_few_parameters_for_what_it_sees():
    """The mean of a picture's colours: six thousand numbers, and 21 parameters."""
    policy, content = of_users("networks:colours")
    assert sum(each.numel() for each in policy.encoder.parameters()) == 0
    loaded = policy_of(content, "best.pt", network="networks:colours")
    assert same(dict(loaded.state_dict()), dict(policy.state_dict()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_sizes": [10**9]}, "expected sizes that make at most 18044 parameters, got 8000"),
        ({"hidden_sizes": [3]}, 'parameters["network.0.weight"]: expected (3, 5) float32'),
        ({"network": "networks:other"}, "network: expected 'networks:other', with which"),
    ],
)
def test_what_is_above_a_network_of_the_users_own_is_counted(changes, message):
    _, content = of_users(**changes)
    with pytest.raises(ValueError) as caught:
        policy_of(content, "best.pt", network="networks:small")
    assert message in str(caught.value)


def test_what_the_users_network_makes_now_is_named():
    """Under the same name there are other parameters than in the file."""
    _, content = of_users("networks:other")
    content["policy"]["description"]["network"] = "networks:small"
    match = r'best.pt: policy.parameters\["encoder.body.shift"\]: expected \(5,\) int64, got \(6,\)'
    with pytest.raises(ValueError, match=match):
        policy_of(content, "best.pt", network="networks:small")


def test_tensors_are_compared_wherever_they_are():
    here = {"a": torch.zeros(2, 3)}
    check_tensors(here, {"a": torch.zeros(2, 3, device="meta")}, "x")
    check_tensors({"a": torch.zeros(2, dtype=torch.int64)}, {"a": torch.ones(2).long()}, "x")
