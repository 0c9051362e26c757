import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from on_tensors import Dock, Fading, Panel, Track, Whole

pytest.importorskip("triton", reason="needs triton, which is for Linux")

from vecpg.envs import ops
from vecpg.envs.acrobot import Acrobot
from vecpg.envs.cartpole import CartPole
from vecpg.envs.cuda import device_functions, from_source, source
from vecpg.envs.mountain_car_continuous import MountainCarContinuous
from vecpg.envs.pendulum import Pendulum
from vecpg.envs.tensor import Dynamics

OURS = [CartPole, Pendulum, Acrobot, MountainCarContinuous, Track, Dock, Panel, Fading, Whole]
WEIGHTS = (0.5, 0.25, 2.0)
TWO = 2

# What a text may name, on NumPy's float32.
WITH_NUMPY = {
    "tl": SimpleNamespace(
        full=lambda shape, value, dtype: np.full(shape, value, dtype),
        abs=np.abs,
        float32=np.float32,
        int1=np.bool_,
    ),
    "divide": np.divide,
    "modulo": np.mod,
    "clip": np.clip,
    **{name: getattr(np, name) for name in ("sin", "cos", "exp", "log", "sqrt", "tanh", "floor")},
    **{name: getattr(np, name) for name in ("where", "minimum", "maximum")},
}


def called(text, name, *given):
    """What a function of a text gives for vectors of float32, as a list."""
    names = dict(WITH_NUMPY)
    exec(text, names)
    found = names[name](*given)
    return [*found] if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("definition", OURS)
def test_the_text_computes_what_torch_does(definition):
    dynamics = Dynamics(definition, torch.float32)
    text = source(definition, dynamics.num_variables)
    g = torch.Generator().manual_seed(1)
    uniforms = torch.rand(definition.num_uniforms, 50, generator=g)
    definition.action_space.seed(1)
    actions = torch.from_numpy(np.stack([definition.action_space.sample() for _ in range(50)]))
    action = [*actions.reshape(50, -1).T.numpy().astype(np.float32)]
    state = called(text, "start", *uniforms.numpy())
    for _ in range(4):
        before = torch.from_numpy(np.stack(state))
        following, rewards, ended = dynamics.step(before, actions)
        after = called(text, "transition", *state, *action)
        close = {"rtol": 1e-5, "atol": 1e-5}
        np.testing.assert_allclose(np.stack(after), following, **close)
        (paid,) = called(text, "reward", *state, *action, *following.numpy())
        np.testing.assert_allclose(paid, rewards, **close)
        assert np.array_equal(called(text, "terminated", *following.numpy())[0], ended)
        seen = np.stack(called(text, "observation", *following.numpy()), axis=1)
        np.testing.assert_allclose(seen, dynamics.observation(following).reshape(50, -1), **close)
        state = [*following.numpy()]


def test_a_function_has_a_line_for_every_operation():
    assert source(CartPole, 4).split("\n\n\n")[3].strip() == (
        "def terminated(s0, s1, s2, s3):\n"
        "    v0 = tl.abs(s0)\n"
        "    v1 = v0 > 2.4000000953674316\n"  # as float32
        "    v2 = tl.abs(s2)\n"
        "    v3 = v2 > 0.20943951606750488\n"
        "    v4 = v1 | v3\n"
        "    return v4"
    )


def with_functions(**functions):
    return type("Other", (Track,), {name: staticmethod(each) for name, each in functions.items()})


def test_loops_helpers_and_constants_dissolve():
    def transition(state, action):
        total = 0.0
        for i, weight in enumerate(WEIGHTS):
            total = total + shifted(state[0], -weight) * i
        return (total + TWO**2 * WEIGHTS[0] / WEIGHTS[1],)

    text = source(with_functions(transition=transition), 1).split("\n\n\n")[1].strip()
    assert text == (
        "def transition(s0, a0):\n"
        "    v0 = s0 + -0.5\n"
        "    v1 = v0 * 0.0\n"
        "    v2 = 0.0 + v1\n"
        "    v3 = s0 + -0.25\n"
        "    v4 = v3 * 1.0\n"
        "    v5 = v2 + v4\n"
        "    v6 = s0 + -2.0\n"
        "    v7 = v6 * 2.0\n"
        "    v8 = v5 + v7\n"
        "    v9 = v8 + 8.0\n"
        "    return v9"
    )


def shifted(x, by):
    return x + by


X = np.array([-2.5, -1.0, -0.25, 0.0, 0.5, 1.0, 3.0], np.float32)
THIRD = np.float32(1 / 3)


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (lambda x: 1.0 / 3.0 - x, THIRD - X),
        (lambda x: 2 - x, 2 - X),
        (lambda x: 1.0 / (x + 9.0), 1 / (X + np.float32(9))),
        (lambda x: 5.0 % (x + 9.0), np.float32(5) % (X + np.float32(9))),
        (lambda x: x % 0.75, X % np.float32(0.75)),
        (lambda x: x**2 + x**3.0, X * X + X * (X * X)),
        (lambda x: (x + 9.0) ** -2, 1 / ((X + np.float32(9)) * (X + np.float32(9)))),
        (lambda x: x**0 + x**1, X + 1),
        (lambda x: -x, -X),
        (lambda x: np.float32(2.0) * x, 2 * X),
        (lambda x: +x + abs(x), X + abs(X)),
        (lambda x: ops.where(x < 1.0, 1.0, x), np.where(X < 1, np.float32(1), X)),
        (lambda x: ops.where((x == 1) | ~(x >= 0.0), 1.0, 0.0), ((X == 1) | (X < 0))),
        (lambda x: ops.where((x != 1.0) & (x <= 0.5), 1.0, 0.0), ((X != 1) & (X <= 0.5))),
        (lambda x: ops.where((x > 0.0) ^ (x < 1.0), 1.0, 0.0), ((X > 0) ^ (X < 1))),
        (lambda x: ops.where((x > 0.0) == (x < 1.0), 1.0, 0.0), ((X > 0) == (X < 1))),
        (lambda x: ops.where((x > 0.0) != True, 1.0, 0.0), (X <= 0)),  # noqa: E712
        (lambda x: ops.where(1.0 > 0.5, x, 0.0), X),
        (lambda x: x * ops.cos(0.0) + ops.maximum(-1.0, 2.0), X + 2),
        (lambda x: x if THIRD_AS_WRITTEN > 0.0 else -x, X),
        (lambda x: x * (2.0 if THIRD_AS_WRITTEN else 3.0), X * 2),
        (lambda x: x + math.sqrt(FOUR), X + 2),
        (lambda x: ops.minimum(x, math.inf), X),
        (lambda x: 7.0, np.full(7, 7)),
    ],
)
def test_what_may_be_written(written, wanted):
    definition = with_functions(transition=lambda state, action: (written(state[0]),))
    (found,) = called(source(definition, 1), "transition", X, X)
    np.testing.assert_array_equal(found, wanted.astype(np.float32))
    assert found.dtype == np.float32
    assert found.shape == X.shape


THIRD_AS_WRITTEN, FOUR = 1 / 3, 4.0


def test_minus_keeps_zeros_apart():
    text = source(with_functions(transition=lambda state, action: (-state[0],)), 1)
    (found,) = called(text, "transition", np.array([0.0, -0.0], np.float32), None)
    assert np.signbit(found).tolist() == [True, False]


@pytest.mark.parametrize(
    ("name", "function", "got"),
    [
        (
            "transition",
            lambda state, action: (state[0] if action > 0 else -state[0],),
            "one that asks a number for its value",
        ),
        ("transition", lambda state, action: (float(action),), "one that asks a number"),
        ("transition", lambda state, action: (max(state[0], 0.0),), "one that asks a number"),
        ("transition", lambda state, action: (math.sin(action),), "one that asks a number"),
        ("transition", lambda state, action: (np.sin(action),), "TypeError: "),
        ("transition", lambda state, action: (torch.sin(action),), "TypeError: "),
        ("transition", lambda state, action: (action**0.5,), "a power that is no whole number"),
        ("transition", lambda state, action: (action**action,), "a power that is no whole number"),
        ("transition", lambda state, action: (action + (action > 0.0),), "TypeError: "),
        (
            "transition",
            lambda state, action: (ops.where(action, 1.0, 2.0),),
            "ops.where of something else than a flag and two numbers",
        ),
        ("transition", lambda state, action: (action & True,), "TypeError: "),
        (
            "terminated",
            lambda state: (state[0] > 1.0) & 1,
            "a flag and 1 joined by &",
        ),
        ("transition", lambda state, action: action, "_Number in the place of a tuple of 1"),
        ("transition", lambda state, action: (action, action), "tuple in the place of a tuple"),
        ("transition", lambda state, action: (action > 1.0,), "tuple in the place of a tuple of 1"),
        ("reward", lambda state, action, following: None, "NoneType in the place of a number"),
        ("terminated", lambda state: state[0], "_Number in the place of a flag"),
    ],
)
def test_what_makes_no_kernel_is_refused_by_name(name, function, got):
    definition = with_functions(**{name: function})
    with pytest.raises(ValueError) as raised:
        device_functions(definition, 1)
    message = str(raised.value)
    assert message.startswith(
        f"`test_envs_cuda:Other.{name}`: expected a function that a GPU kernel"
    )
    assert f"got {got}" in message
    assert message.endswith("functions of the module and its constants")
    assert "\n" not in message


def test_functions_of_a_text_find_one_another():
    made = from_source(
        "def one(x):\n    return x\n\n\ndef two(x):\n    return one(x)\n", "this", {}
    )
    assert sorted(made) == ["one", "two"]
    two = made["two"]
    assert two.__globals__["one"] is made["one"]
    assert "return one(x)" in two.src
    assert device_functions(Track, 1) is device_functions(Track, 1)
