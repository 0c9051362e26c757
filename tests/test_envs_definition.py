"""One definition of an environment, and what is made of it."""

import math
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from gymnasium import spaces
from on_tensors import Dock, Panel, Track

from vecpg.config import Config
from vecpg.envs import make_envs, ops
from vecpg.envs.acrobot import Acrobot
from vecpg.envs.cartpole import CartPole
from vecpg.envs.definition import bound, find
from vecpg.envs.mountain_car_continuous import MountainCarContinuous
from vecpg.envs.pendulum import Pendulum
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.policy import Policy
from vecpg.rollout import choose_collector, collect
from vecpg.rollout.cpu import _kernel
from vecpg.train import train

OURS = [CartPole, Pendulum, Acrobot, MountainCarContinuous]
PI = math.pi
WHOLE = 3


@pytest.mark.parametrize("definition", [*OURS, Track, Dock, Panel])
def test_a_definition_is_plain_python_too(definition):
    """The oracle of the form on tensors: one copy after the other, in Python's own numbers."""
    envs = TensorVectorEnv(definition, 40, max_episode_steps=9, dtype="float64")
    g = torch.Generator().manual_seed(1)
    uniforms = torch.rand(definition.num_uniforms, 40, generator=g, dtype=torch.float64)
    definition.action_space.seed(1)
    actions = torch.from_numpy(np.stack([definition.action_space.sample() for _ in range(40)]))
    state = envs.dynamics.start(uniforms)
    for _ in range(5):
        following, rewards, ended = envs.dynamics.step(state, actions)
        seen = envs.dynamics.observation(following).reshape(40, -1)
        for n in range(40):
            one = tuple(state[:, n].tolist())
            action = actions[n].double().reshape(-1).tolist()
            action = action[0] if actions.ndim == 1 else tuple(action)
            after = definition.transition(one, action)
            close = {"rtol": 0, "atol": 1e-11}
            np.testing.assert_allclose(after, following[:, n], **close)
            np.testing.assert_allclose(definition.observation(after), seen[n], **close)
            assert definition.reward(one, action, after) == pytest.approx(rewards[n].item())
            assert definition.terminated(after) == ended[n]
        state = following
    fresh = definition.start(tuple(uniforms[:, 3].tolist()))
    np.testing.assert_allclose(fresh, envs.dynamics.start(uniforms)[:, 3], rtol=0, atol=1e-12)


def scaled(x, by=0.5):
    return ops.sin(x) * by * PI


def given(by=0.25):
    return by


def even(n):
    return odd(n - 1) if n else 1.0


def odd(n):
    return even(n - 1) if n else 0.0


def test_functions_get_other_operations_and_numbers_and_stay_as_they_were():
    much = 7.0

    class Made(CartPole):
        def reward(state, action, following):
            pair = (2.0, (4.0, "words", 5))
            others = [scaled(x) for x in state], even(4), given()
            return scaled(state[0]), much, pair, WHOLE, *others

    class Number(float):
        pass

    namespace = SimpleNamespace(sin=lambda x: x)
    finished = []

    def finish(function):
        finished.append(function.__name__)
        return function

    reward = bound(Made, namespace, Number, finish)["reward"]
    first, seven, pair, whole, each, one, default = reward((2.0,), 0, None)
    assert first == 2.0 * 0.5 * PI
    assert (seven, pair, whole) == (7.0, (2.0, (4.0, "words", 5)), 3)
    assert (one, default) == (1.0, 0.25)
    assert each == [first]
    for number in (seven, pair[0], pair[1][0], one, default):
        assert type(number) is Number
    assert type(whole) is type(pair[1][2]) is int
    # Every one once, helpers before those that call them are there for them.
    assert sorted(finished[-5:]) == ["even", "given", "odd", "reward", "scaled"]
    # Those that were written are as they were.
    assert Made.reward((2.0,), 0, None)[0] == math.sin(2.0) * 0.5 * PI
    assert type(Made.reward((2.0,), 0, None)[1]) is float


def test_an_operation_may_be_named_alone():
    from vecpg.envs.ops import cos as alone

    class Made(CartPole):
        def terminated(state):
            return alone(state[0])

    assert bound(Made, SimpleNamespace(cos=lambda x: x))["terminated"]((5.0,)) == 5.0


def without(name):
    names = {"observation_space", "action_space", "num_uniforms", "start", "transition"}
    names |= {"observation", "terminated", "reward"}
    return type("Less", (), {each: getattr(Track, each) for each in names - {name}})


@pytest.mark.parametrize("name", ["observation_space", "num_uniforms", "start", "reward"])
def test_what_a_definition_lacks_is_named(name):
    with pytest.raises(
        ValueError, match=f"^`test_envs_definition:Less`: expected a definition with `{name}`"
    ):
        find(without(name))


class Ball:
    """Two variables, falling."""

    observation_space = spaces.Box(-9, 9, (2,))
    action_space = spaces.Discrete(2)
    num_uniforms = 1

    @staticmethod
    def start(uniforms):
        return uniforms[0], 0.0

    @staticmethod
    def transition(state, action):
        return state[0] + 0.1 * state[1], state[1] + 0.2 * action - 0.1

    @staticmethod
    def observation(state):
        return state

    @staticmethod
    def terminated(state):
        return state[0] < -1.0

    @staticmethod
    def reward(state, action, following):
        return 1.0


def changed(**functions):
    kinds = {name: staticmethod(f) if callable(f) else f for name, f in functions.items()}
    return type("Bad", (Ball,), kinds)


class Thing:
    number = 2.0


def far(x):
    return x * 3 > 1e3


def importing(state, action):
    import math

    return state[0] * math.cos(0.0), state[1]


def choosing(state, action):
    return state if state[0] > 0.0 else (0.0, 0.0)


def wide(state, action):
    return state[0].double(), state[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"start": lambda uniforms: uniforms[0]},
            ".start`: expected a tuple of at least one number of float32, got float32",
        ),
        (
            {"transition": lambda state, action: (state[0],)},
            r".transition`: expected a tuple of 2 numbers of float32, got \(float32\)",
        ),
        (
            {"transition": lambda state, action: list(state)},
            ".transition`: expected a tuple of 2 numbers of float32, got list",
        ),
        ({"transition": wide}, r".transition`: expected .* got \(float64, float32\)"),
        (
            {"transition": choosing},
            ".transition`: expected a function that works on tensors of many copies, got"
            " RuntimeError: Boolean value .*; choose with ops.where instead of if",
        ),
        (
            {"transition": lambda state, action: (math.sin(state[0]), 0.0)},
            ".transition`: expected a function that works on tensors of many copies, got",
        ),
        (
            {"observation": lambda state: (*state, 1.0)},
            r".observation`: expected a tuple of 2 numbers of float32, got \(float32, float32, f",
        ),
        ({"terminated": lambda state: state[0]}, ".terminated`: expected one flag, got float32"),
        (
            {"reward": lambda state, action, following: 1},
            ".reward`: expected one number of float32, got int",
        ),
        (
            {"reward": lambda state, action: 1.0},
            ".reward`: expected a function .* takes 2 positional arguments but 3 were given",
        ),
        ({"reward": 1.0}, ".reward`: expected a static function, got float"),
        ({"num_uniforms": 0}, ".num_uniforms`: expected a whole number of at least 1, got 0"),
        ({"observation_space": spaces.Discrete(2)}, ".observation_space`: expected a Box, got Dis"),
        (
            {"action_space": spaces.MultiBinary(2)},
            ".action_space`: expected a Discrete, MultiDiscrete or Box, got MultiBinary",
        ),
    ],
)
def test_what_a_function_does_wrong_is_said_in_one_line_when_it_is_made(changes, message):
    with pytest.raises(ValueError, match=f"^`test_envs_definition:Bad{message}") as caught:
        TensorVectorEnv(changed(**changes), 3, max_episode_steps=5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"transition": lambda state, action: (2 * state[0], state[1])},
            r".transition`: expected 2 numbers of float32, got \(float64, float32\); write whole"
            " numbers as floats",
        ),
        (
            {"transition": lambda state, action: (state[0] * WHOLE, state[1] / WHOLE)},
            ".transition`: expected 2 numbers of float32, got 2 numbers of float64",
        ),
        (
            {"observation": lambda state: (state[0] * math.pi, state[1])},
            r".observation`: expected 2 numbers of float32, got .*\(PI = math.pi\)",
        ),
        (
            {"reward": lambda state, action, following: ops.where(state[0] > 0.0, 1, 0)},
            ".reward`: expected one number of float32, got one number of int64",
        ),
        (
            {"reward": lambda state, action, following: state[0] * Thing.number},
            ".reward`: expected a function that Numba compiles, got Untyped global name 'Thing'",
        ),
        (
            # Inside, where nothing that is returned shows it: float32(pi) is more than pi.
            {"terminated": lambda state: state[0] > math.pi},
            ".<lambda>`: expected float32 numbers throughout, got one of float64; write whole",
        ),
        pytest.param(
            {"reward": lambda state, action, following: ops.where(far(state[0]), 1.0, 0.0)},
            ".far`: expected float32 numbers throughout, got one of float64",
            marks=pytest.mark.slow,
        ),
        (
            {"transition": importing},
            ".transition`: expected a function that Numba compiles, got Use of unsupported opcode",
        ),
    ],
)
def test_what_machine_code_cannot_be_made_of_is_said_in_one_line(changes, message):
    """Each is right on tensors."""
    envs = TensorVectorEnv(changed(**changes), 3, max_episode_steps=5)
    policy = Policy(envs.single_observation_space, envs.single_action_space)
    arguments = {"num_steps": 1, "seed": 1, "iteration": 0}
    collect(envs, policy, **arguments, backend="reference")
    for _ in range(2):  # what was refused is not kept
        with pytest.raises(ValueError, match=f"^`test_envs_definition:Bad{message}") as caught:
            choose_collector(envs, policy).prepare(envs, policy)
        assert "\n" not in str(caught.value)
        _kernel.cache_clear()


def paying(amount):
    """Definitions that differ in a default value, or in one of a function they call."""

    def paid(x, *more, by=amount):
        return x * by

    def reward(state, action, following, pay=amount):
        return pay + 0.0 * state[0]

    return changed(reward=reward), paid


@pytest.mark.slow
def test_machine_code_of_one_definition_is_not_used_for_another():
    found = []
    for amount in (1.0, 2.0):
        definition, _ = paying(amount)
        envs = TensorVectorEnv(definition, 2, max_episode_steps=2)
        policy = Policy(envs.single_observation_space, envs.single_action_space)
        rollout = collect(envs, policy, num_steps=1, seed=1, iteration=0, backend="cpu")
        found.append(rollout.rewards[0, 0].item())
    assert found == [1.0, 2.0]


def test_defaults_of_keywords_are_bound_too():
    _, paid = paying(3.0)
    definition = changed(reward=lambda state, action, following: paid(state[0]))
    assert bound(definition, ops)["reward"]((2.0, 0.0), 0.0, (0.0, 0.0)) == 6.0


def short(tmp_path, **settings):
    given = {"num_envs": 16, "progress": False, "out_dir": str(tmp_path), "eval_episodes": 20}
    return Config(**given | settings)


@pytest.mark.parametrize("vectorization", ["auto", "tensor"])
def test_a_users_environment_learns_in_machine_code(tmp_path, vectorization):
    settings = {"vectorization": vectorization, "total_timesteps": 30_000, "seed": 2}
    config = short(tmp_path, env_id="on_tensors:Track-v0", **settings)
    result = train(config)
    assert result.summary["vectorization"] == "tensor"
    # Its own threshold, judged by itself in float64; staying in place pays 15 at most.
    assert result.summary["target_return"] == 12.0
    assert result.summary["solved"]
    envs = make_envs("on_tensors:Track-v0", 2)
    assert str(choose_collector(envs, result.policy)) == "in machine code"


def test_the_environment_that_the_documentation_shows_in_full_learns(tmp_path, monkeypatch):
    """Its file, and what it says to type in Python."""
    text = (ROOT / "docs" / "environments.md").read_text()
    text = text.partition("## On tensors")[2]
    module, typed = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "slide.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(typed, names)
    assert names["obs"].dtype == torch.float64
    assert names["result"].summary["vectorization"] == "tensor"
    assert names["result"].summary["solved"]
    assert names["result"].summary["steps_per_second"] > 0
    envs = make_envs("slide:Slide-v0", 1)
    assert choose_collector(envs, names["result"].policy).backend == "cpu"


@pytest.mark.parametrize("name", [pytest.param("Dock", marks=pytest.mark.slow), "Panel"])
def test_several_components_are_trained_too(tmp_path, name):
    config = short(tmp_path, env_id=f"on_tensors:{name}-v0", total_iterations=3)
    summary = train(config).summary
    assert (summary["vectorization"], summary["episodes"]) == ("tensor", 48)
    assert math.isfinite(summary["eval_return_mean"])


@pytest.mark.slow
def test_a_definition_that_does_not_compile_ends_a_run_before_its_first_step(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "train.py"),
            *("--env-id", "on_tensors:Whole-v0", "--out-dir", str(tmp_path), "--no-progress"),
        ],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert "`on_tensors:Whole.transition`: expected 1 number of float32, got 1 number of" in last
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_machine_code_is_renewed_when_a_definition_changes_or_what_it_names(tmp_path):
    """Not when the same is run again."""
    (tmp_path / "run.py").write_text(
        "import torch\n"
        "from vecpg.envs.tensor import TensorVectorEnv\n"
        "from vecpg.kernels.jit import Compilation\n"
        "from vecpg.policy import Policy\n"
        "from vecpg.rollout import collect\n"
        "envs = TensorVectorEnv('steady:Steady', 2, max_episode_steps=3)\n"
        "policy = Policy(envs.single_observation_space, envs.single_action_space)\n"
        "with Compilation() as compilation:\n"
        "    given = {'num_steps': 1, 'seed': 1, 'iteration': 0, 'backend': 'cpu'}\n"
        "    rollout = collect(envs, policy, **given)\n"
        "print(rollout.rewards[0, 0].item(), compilation.seconds > 0)\n"
    )

    def run(paid, constant, helper):
        (tmp_path / "numbers_.py").write_text(f"CONSTANT = {constant}\n")
        (tmp_path / "helpers.py").write_text(f"def more(x):\n    return x + {helper}\n")
        (tmp_path / "steady.py").write_text(
            "from on_tensors import Fading\n"
            "from numbers_ import CONSTANT\n"
            "from helpers import more\n"
            "class Steady(Fading):\n"
            "    @staticmethod\n"
            "    def reward(state, action, following):\n"
            f"        return more({paid} + CONSTANT)\n"
        )
        done = subprocess.run(
            [sys.executable, "run.py"],
            cwd=tmp_path,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    assert run("1.0", "0.5", "8.0") == ["9.5", "True"]
    assert run("1.0", "0.5", "8.0") == ["9.5", "False"]
    assert run("2.0", "0.5", "8.0") == ["10.5", "True"]
    assert run("2.0", "0.25", "8.0") == ["10.25", "True"]
    assert run("2.0", "0.25", "9.0") == ["11.25", "True"]
    assert run("1.0", "0.5", "8.0") == ["9.5", "False"]
