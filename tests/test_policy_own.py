"""A network of the user's own: what serves is taken as it is, and all else refused in one line."""

import math
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from vecpg.policy import Policy, own
from vecpg.policy.network import Encoder, drawn_from

BOX = spaces.Box(-np.inf, np.inf, (3, 2))
PICTURE = spaces.Box(0, 255, (5, 5, 3), np.uint8)


@pytest.fixture
def named():
    """Put a function under a name for the time of a test."""
    module = ModuleType("own_networks")
    sys.modules["own_networks"] = module

    def put(function, name="f"):
        setattr(module, name, function)
        return f"own_networks:{name}"

    yield put
    del sys.modules["own_networks"]


class Flat(nn.Module):
    """What serves: features by one layer. Others below change one thing of it."""

    def __init__(self, space):
        super().__init__()
        self.layer = nn.Linear(math.prod(space.shape), 4)

    def forward(self, obs):
        return self.layer(obs.flatten(1))


def test_features_are_the_modules_own_on_scaled_observations(named):
    for space in (BOX, PICTURE):
        encoder = Encoder(space, network=named(Flat))
        assert type(encoder.body) is Flat
        assert (encoder.features, encoder.network) == (4, "own_networks:f")
        rng = np.random.default_rng(0)
        obs = rng.integers(0, 256, (6, *space.shape)).astype(space.dtype)
        numbers = obs / 255 if space is PICTURE else obs
        weight, bias = (each.detach().double().numpy() for each in encoder.body.parameters())
        expected = numbers.reshape(6, -1) @ weight.T + bias
        found = encoder(torch.from_numpy(obs)).detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        # A module may fail where there are no rows.
        assert encoder(torch.from_numpy(obs[:0])).shape == (0, 4)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(5, start=-2),
        spaces.MultiDiscrete([3, 4], start=[7, -1]),
        spaces.MultiDiscrete([200, 3], np.uint8, start=[56, 0]),
        spaces.MultiBinary(6),
        spaces.Box(-3, 3, (2,), np.int16),
        spaces.Box(0, 1, (2,), bool),
    ],
    ids=str,
)
def test_it_gets_numbers_of_the_space_int64_where_they_are_chosen_from(named, space):
    seen = []

    class Watching(nn.Module):
        def forward(self, obs):
            seen.append(obs.clone())
            return obs.reshape(len(obs), -1).float()

    encoder = Encoder(space, network=named(lambda given: Watching()))
    whole = isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
    assert {obs.dtype for obs in seen} == {torch.int64 if whole else torch.float32}
    for obs in seen:
        for one in obs.numpy():
            assert space.contains(one.astype(space.dtype))
            assert np.array_equal(one.astype(space.dtype), one)
    # Nothing was drawn from the space, which may be the environment's.
    before = space.np_random.bit_generator.state
    Encoder(space, network=named(lambda given: Watching()))
    assert space.np_random.bit_generator.state == before
    obs = torch.as_tensor(np.stack([space.sample() for _ in range(3)])).to(encoder.dtype)
    assert torch.equal(encoder(obs), obs.reshape(3, -1).float())
    assert encoder(obs[:0]).dtype == torch.float32


class Normed(Flat):
    def __init__(self, space, track=True):
        super().__init__(space)
        self.norm = nn.BatchNorm1d(4, track_running_stats=track)

    def forward(self, obs):
        return self.norm(super().forward(obs))


class Dropping(Flat):
    def forward(self, obs):
        return nn.functional.dropout(super().forward(obs), 0.5)


class Changing(Flat):
    def forward(self, obs):
        return super().forward(obs.div_(2))


class Remembering(Flat):
    def forward(self, obs):
        self.last = super().forward(obs)
        return self.last


class Hidden(Flat):
    def __init__(self, space):
        super().__init__(space)
        self.more = [nn.Linear(4, 4)]

    def forward(self, obs):
        return self.more[0](super().forward(obs))


class Buffered(Flat):
    def __init__(self, space, buffer):
        super().__init__(space)
        self.register_buffer("kept", buffer)


class Stateful(Flat):
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


class Doubled(Flat):
    def __init__(self, space):
        super().__init__(space)
        self.more = nn.Parameter(torch.zeros(2, dtype=torch.float64))


class Counting(Flat):
    def __init__(self, space):
        super().__init__(space)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, obs):
        self.calls += 1
        return super().forward(obs)


class Constant(Flat):
    """A constant that is no buffer."""

    def __init__(self, space):
        super().__init__(space)
        self.factor = torch.rand(4)

    def forward(self, obs):
        return self.factor * super().forward(obs)


class Settling(Flat):
    """A buffer that follows the parameters, and is what it was as long as they are."""

    def __init__(self, space):
        super().__init__(space)
        self.register_buffer("seen", next(self.parameters()).detach().clone())

    def forward(self, obs):
        self.seen.copy_(next(self.parameters()).detach())
        return super().forward(obs)


_first = []


def the_first(space):
    """Always the same one."""
    if not _first:
        _first.append(Flat(space))
    return _first[0]


class Copied(Flat):
    """Its copies double what it makes."""

    factor = 1

    def __deepcopy__(self, memo):
        copied = Copied(BOX)
        copied.load_state_dict(self.state_dict())
        copied.factor = 2
        return copied

    def forward(self, obs):
        return self.factor * super().forward(obs)


class Output(Flat):
    def __init__(self, space, change):
        super().__init__(space)
        self.change = change

    def forward(self, obs):
        return self.change(super().forward(obs))


def raising(space):
    raise KeyError("two\nlines")


WRONG = {
    "raises": (raising, r"expected it to work on the space of shape \(3, 2\), got KeyError: 'two"),
    "no arguments": (lambda: None, "got TypeError"),
    "no module": (
        lambda space: [1],
        r"expected function\(observation_space\) to return a torch.nn.Module, got list",
    ),
    "another input": (
        lambda space: nn.Linear(7, 3),
        r"expected it to work on observations \(2, 3, 2\) float32, got RuntimeError: mat1",
    ),
    "no tensor": (lambda s: Output(s, lambda x: [x]), r"expected \(2, F\) features .*, got list"),
    "three dimensions": (lambda s: Output(s, lambda x: x[None]), r"got shape \(1, 2, 4\)"),
    "one dimension": (lambda s: Output(s, lambda x: x[:, 0]), r"got shape \(2,\)"),
    "other rows": (lambda s: Output(s, lambda x: x[:1]), r"got shape \(1, 4\)"),
    "no features": (lambda s: Output(s, lambda x: x[:, :0]), r"got shape \(2, 0\)"),
    "turned": (lambda s: Output(s, lambda x: x.t()), r"got shape \(4, 2\)"),
    "float64": (lambda s: Output(s, lambda x: x.double()), "got float64 on cpu"),
    "NaN": (lambda s: Output(s, lambda x: x / 0), "expected finite features .*, got NaN"),
    "detached": (
        lambda s: Output(s, lambda x: x.detach()),
        "expected features that can be differentiated",
    ),
    "half": (lambda s: Flat(s).half(), "got RuntimeError"),
    "a parameter in float64": (
        lambda s: Doubled(s),
        "expected parameters in float32 on cpu, as they are made, more too, got float64 on cpu",
    ),
    "on another device": (lambda s: Flat(s).to("meta"), "--network own_networks:f: expected"),
    "BatchNorm": (Normed, "expected parameters and buffers that no call changes.*BatchNorm"),
    "BatchNorm without buffers": (
        lambda s: Normed(s, track=False),
        "BatchNorm's do|got ValueError: Expected more than 1 value per channel",
    ),
    "those beside": (
        lambda s: Output(s, lambda x: x - x.mean(dim=0)),
        "features of an observation that do not depend on the others beside it",
    ),
    "a constant": (Constant, "the same features with the same state_dict .* is a buffer"),
    "a buffer that follows": (Settling, "no call changes,.* once parameters have moved either"),
    "a module that is there once": (the_first, "another module at each call, got the same one"),
    "another copy": (Copied, "expected a copy to make the same features, got others"),
    "Dropout": (Dropping, "the same features of the same observations at each call.*Dropout"),
    "a changed input": (Changing, "leaves its input as it is"),
    "kept in an attribute": (Remembering, "to work in copy.deepcopy, after a call, got RuntimeErr"),
    "a list of modules": (Hidden, r"nn.ModuleList\), got one of shape \(4, 4\) that is not"),
    "counted calls": (Counting, "parameters and buffers that no call changes"),
    "complex": (
        lambda s: Buffered(s, torch.zeros(2, dtype=torch.complex64)),
        "dense tensors of real numbers, which a checkpoint holds, kept too, got complex64",
    ),
    "bool": (lambda s: Buffered(s, torch.zeros(2, dtype=bool)), "kept too, got bool"),
    "a state that is no tensor": (
        Stateful,
        "dense tensors of real numbers, which a checkpoint holds, _extra_state too, got dict",
    ),
    "not dense": (lambda s: Buffered(s, torch.zeros(1).expand(3)), "kept too, got float32"),
    "infinite": (
        lambda s: Buffered(s, torch.full((2, 2), -math.inf)),
        "finite numbers in its state_dict, kept too, got NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_serve_is_refused_in_one_line(named, case):
    function, message = WRONG[case]
    name = named(function)
    with pytest.raises(ValueError, match=message) as caught:
        Encoder(BOX, network=name)
    text = str(caught.value)
    assert text.startswith(f"--network {name}: expected ")
    assert "\n" not in text
    assert len(text) < 500


def test_names_that_are_none_are_refused_too(named):
    for name, words in (("own_networks:g", "found none"), ("own_nothing:f", "ModuleNotFoundError")):
        with pytest.raises(ValueError, match=f"--network {name}: expected .*{words}"):
            Encoder(BOX, network=name)


def test_two_networks_do_not_share_parameters(named):
    one = Flat(BOX)
    weight = one.layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"new parameters at each call, got 0\.layer\.weight of"):
        Encoder(BOX, network=named(lambda space: nn.Sequential(one, nn.ReLU())))
    assert torch.equal(one.layer.weight, weight)
    made = []

    def by_turns(space):
        made.append(Flat(space))
        return made[-1] if len(made) < 3 else made[0]  # of the first encoder

    Encoder(BOX, network=named(by_turns))
    with pytest.raises(ValueError, match="new parameters at each call, got layer.weight"):
        Encoder(BOX, network=named(by_turns))
    for _ in range(50):
        Encoder(BOX, network=named(Flat))


class Lazy(nn.Module):
    """Makes its parameters at its first call, in torch's way and in its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LazyLinear(4)

    def forward(self, obs):
        features = self.layer(obs.flatten(1))
        if not hasattr(self, "more"):
            self.more = nn.Linear(4, 5)
        return self.more(features)


@pytest.mark.parametrize(
    "function",
    [
        lambda space: Lazy(),
        lambda space: Normed(space).eval(),
        lambda space: nn.Sequential(nn.Flatten(), nn.LayerNorm(6), nn.ReLU()),
        lambda space: nn.Flatten(),  # without parameters
        lambda space: Flat(space).requires_grad_(False),
        lambda space: Buffered(space, torch.zeros(2, 3, dtype=torch.int32).t()),
    ],
    ids=["lazy", "BatchNorm in eval", "LayerNorm", "nothing", "frozen", "another dtype"],
)
def test_what_serves_is_taken(named, function):
    policy = Policy(BOX, spaces.Discrete(2), network=named(function))
    obs = np.random.default_rng(0).standard_normal((7, 3, 2))
    assert policy.act(obs).shape == (7,)
    assert policy.description()["network"] == "own_networks:f"
    again = Policy.from_description(policy.description(), network="own_networks:f")
    again.load_state_dict(policy.state_dict())
    rows = torch.from_numpy(obs).float()
    assert torch.equal(again(rows), policy(rows))


def test_what_is_drawn_while_its_module_is_imported_changes_nothing(tmp_path, monkeypatch):
    """A module is imported once in a process."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_drawing.py").write_text(
        "import torch\n"
        "one = torch.rand(3)\n"
        "def f(space): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 2))\n"
    )
    drawn = []
    for _ in range(2):
        with drawn_from(3):
            encoder = Encoder(BOX, network="own_drawing:f")
            drawn.append([*encoder.parameters(), torch.rand(2)])
    assert all(map(torch.equal, *drawn))
    del sys.modules["own_drawing"]


def test_torchs_default_dtype_is_not_that_of_its_parameters(named):
    torch.set_default_dtype(torch.float64)
    try:
        encoder = Encoder(BOX, network=named(lambda space: Lazy()))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert {each.dtype for each in encoder.parameters()} == {torch.float32}


def test_what_is_kept_of_an_observation_is_counted(named):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.above = nn.Linear(6, 10_000), nn.Linear(10_000, 3)

        def forward(self, obs):
            return self.above(torch.relu(self.below(obs.flatten(1))))

    kept = own.make(named(lambda space: Wide()), BOX, lambda obs: obs).kept
    assert 10_000 <= kept <= 10_100
    encoder = Encoder(BOX, network="own_networks:f")
    assert 1600 < encoder.rows_at_once(4096) < 1700
    assert encoder.rows_at_once(5) == 5
    assert Encoder(BOX).rows_at_once(4096) == 4096
