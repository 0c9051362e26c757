"""Numbers that are not finite: found cheaply, named, and never saved."""

import json
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from vecpg.config import Config
from vecpg.envs import EnvironmentFailure
from vecpg.kernels.finite import all_finite, check_parameters, finite
from vecpg.run.checkpoint import Saver
from vecpg.run.state import TrainState
from vecpg.train import train

LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("place", [0, 7, 8, 12])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_number_in_any_place_is_found(place, wrong):
    numbers = torch.randn(13, generator=torch.Generator().manual_seed(0))
    parts = [numbers[:8].reshape(2, 4).mT, numbers[8:]]
    assert all_finite(parts)
    assert finite(parts)
    numbers[place] = wrong
    assert not all_finite(parts)
    assert not finite(parts)


def test_a_sum_beyond_the_largest_number_proves_nothing():
    assert all_finite([torch.full((5,), LARGEST)])
    assert finite([torch.full((5,), LARGEST), torch.full((5,), LARGEST, dtype=torch.float64)])
    # Infinities of both signs, whose sum is NaN.
    assert not all_finite([torch.tensor([math.inf, -math.inf])])


def test_the_host_may_ask_later():
    """A device answers with a tensor, and nothing asks for its number."""
    tensors = [torch.ones(2, 3, device="meta"), torch.ones(1, requires_grad=True).to("meta")]
    answer = finite(tensors)
    assert (answer.shape, answer.dtype, answer.is_meta) == ((), torch.bool, True)
    assert not answer.requires_grad


def test_a_parameter_is_named_and_so_is_what_adam_keeps():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    average = torch.zeros(3)
    check_parameters(module, [average])
    average[1] = math.inf
    with pytest.raises(FloatingPointError, match="what Adam keeps of the gradients"):
        check_parameters(module, [average])
    module[1].weight.data[0, 2] = -math.inf
    with pytest.raises(FloatingPointError, match=r"^1.weight is -inf after the step"):
        check_parameters(module, [average])


# -- Whole runs ----------------------------------------------------------------------------------


class Extreme(gymnasium.Env):
    """Episodes of `length` steps; the action 1, or what a Box action sums up to, pays `scale`."""

    def __init__(self, scale=1.0, length=5, box=False, seen=0.0):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32) if box else spaces.Discrete(2)
        self.scale, self.length, self.seen = scale, length, seen

    def _obs(self):
        return np.array([self.seen, self.np_random.normal()], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._obs(), {}

    def step(self, action):
        self.steps += 1
        paid = self.scale * (float(np.sum(action)) + 0.5)
        return self._obs(), paid, self.steps == self.length, False, {}


gymnasium.register("Extreme-v0", Extreme, max_episode_steps=1000)


def settings(tmp_path, **given):
    usual = {"num_envs": 4, "total_iterations": 3, "eval_episodes": 2, "return_window": 4}
    more = {"out_dir": str(tmp_path), "progress": False, "target_return": None}
    return Config(**usual | more | given)


def numbers_in(content):
    """Every number of a state: of its tensors, and beside them."""
    if isinstance(content, torch.Tensor):
        yield from content.double().reshape(-1).tolist()
    elif isinstance(content, dict):
        for key, value in content.items():
            if key != "description":  # bounds of a space may be infinite
                yield from numbers_in(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from numbers_in(value)
    elif isinstance(content, int | float):
        yield content


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def saved(monkeypatch):
    """Every state that was saved, as it was then."""
    states = []
    real = Saver.save

    def save(self, state):
        content = state.state_dict()
        states.append(
            (content["counters"]["iteration"], all(map(math.isfinite, numbers_in(content))))
        )
        real(self, state)

    monkeypatch.setattr(Saver, "save", save)
    return states


CART = {"env_id": "CartPole-v1"}
MACHINE = CART | {"vectorization": "tensor"}
AUTOGRAD = MACHINE | {"dropout": 0.1}
SYNC = CART | {"vectorization": "sync"}
VECTOR = CART | {"vectorization": "vector_entry_point"}
LEARNING = (
    r"^Adam's step size overflows to 3e\+39 in iteration 1; lower --learning-rate .now 3e\+38"
)
CRITIC = r"value function in iteration 1: .* lower --value-learning-rate \(now 3e\+38\)"
SUM = {"scale": 1e38, "length": 40}
SUMS = "advantage at step 0 of environment 0 is .*beyond float32; scale the rewards"


def extreme(**kwargs):
    return {"env_id": "Extreme-v0", "env_kwargs": kwargs}


STOPPED = {
    "step, machine code": (MACHINE | {"learning_rate": 3e38}, LEARNING),
    "step, autograd": (AUTOGRAD | {"learning_rate": 3e38}, LEARNING),
    "step, sync": (SYNC | {"learning_rate": 3e38}, LEARNING),
    "step, vector entry point": (VECTOR | {"learning_rate": 3e38}, LEARNING),
    "step of infinity": (MACHINE | {"learning_rate": 1e308}, "step size overflows to inf"),
    "parameter": (MACHINE | {"learning_rate": 3e37, "max_grad_norm": 1e-3}, None),
    "value": (MACHINE | {"baseline": "value", "value_learning_rate": 3e38}, CRITIC),
    "value, one step": (
        SYNC | {"baseline": "value", "value_learning_rate": 3e38, "value_steps": 1},
        CRITIC,
    ),
    "value, later": (MACHINE | {"baseline": "value", "value_learning_rate": 1e30}, None),
    "entropy, machine code": (MACHINE | {"ent_coef": 1e308}, "lower --ent-coef"),
    "entropy, autograd": (AUTOGRAD | {"ent_coef": 1e308}, "lower --ent-coef"),
    "entropy, sync": (SYNC | {"ent_coef": 1e38}, "lower --ent-coef"),
    "rewards": (
        extreme(scale=1e30),
        r"gradient's norm is inf in iteration 1, .* largest advantage is .*e\+30; scale the"
        " rewards, or give --normalize$",
    ),
    "rewards, clipped": (extreme(scale=1e30) | {"max_grad_norm": 1.0}, "scale the rewards"),
    "rewards, autograd": (extreme(scale=1e30) | {"dropout": 0.1}, "scale the rewards"),
    "rewards, critic": (
        extreme(scale=1e30) | {"baseline": "value", "normalize": True},
        "fitting the value function in iteration 1: the loss is inf; scale the rewards",
    ),
    "sums of rewards": (extreme(**SUM) | {"gamma": 1.0}, SUMS),
    "sums of rewards, none": (extreme(**SUM) | {"gamma": 1.0, "baseline": "none"}, SUMS),
    "sums of rewards, normalized": (
        extreme(**SUM) | {"gamma": 1.0, "baseline": "mean", "normalize": True},
        SUMS,
    ),
    "sums of rewards, whole": (
        extreme(**SUM) | {"weights": "full_return", "normalize": True, "gamma": 1.0},
        SUMS,
    ),
    "policy, ReLU": (
        MACHINE | {"activation": "relu", "learning_rate": 1e20},
        r"the entropy is nan.* in iteration 2, .*parameter is 1e\+20; lower --learning-rate",
    ),
    # One row by itself is another product than five of them, whose last digit is 1e24 or so.
    "loss": (
        extreme(box=True) | {"learning_rate": 1e30, "num_envs": 1},
        "the loss is .* in iteration 2, .*lower --learning-rate",
    ),
    "action, sync": (
        extreme(box=True) | {"activation": "relu", "learning_rate": 1e20},
        r"the policy's action in environment 0 is \[.*lower --learning-rate",
    ),
    "action, machine code": (
        {
            "env_id": "Pendulum-v1",
            "vectorization": "tensor",
            "max_episode_steps": 5,
            "activation": "relu",
            "learning_rate": 1e20,
        },
        r"the policy's action in environment \d at step \d is \[\w+\] in iteration 2; lower",
    ),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow) if case == "action, machine code" else case
        for case in STOPPED
    ],
)
def test_a_run_ends_before_the_commit_with_one_line(tmp_path, saved, case):
    """What is saved then is finite, and so is every row."""
    given, message = STOPPED[case]
    with pytest.raises(FloatingPointError, match=message) as error:
        train(settings(tmp_path, total_iterations=30, **given))
    assert "\n" not in str(error.value)
    assert "lower --" in str(error.value) or "scale the" in str(error.value)
    assert len(saved) == 2
    assert all(finite for _, finite in saved)
    (run_dir,) = tmp_path.iterdir()
    rows = rows_of(run_dir)
    assert len(rows) == saved[-1][0]
    assert all(math.isfinite(value) for row in rows for value in row.values() if value is not None)


GOES_ON = {
    "rewards of 1e30, normalized": extreme(scale=1e30) | {"normalize": True},
    "rewards of 1e-30": extreme(scale=1e-30),
    "rewards of 1e-30, normalized": extreme(scale=1e-30) | {"normalize": True},
    "equal returns": extreme(scale=0.0) | {"normalize": True},
    "one environment, one step": extreme(length=1) | {"num_envs": 1, "normalize": True},
    "one environment, one step, critic": extreme(length=1)
    | {"num_envs": 1, "normalize": True, "baseline": "value"},
    "one tensor, one step": MACHINE | {"num_envs": 1, "max_episode_steps": 1, "normalize": True},
    "a standard deviation that runs away": extreme(box=True) | {"learning_rate": 1e10},
    "one of each observation that runs away": extreme(box=True)
    | {"learning_rate": 1e10, "log_std": "network"},
    "entropy of a density": extreme(box=True) | {"ent_coef": 1e10, "learning_rate": 10.0},
    "observations of 3e38, normalized": extreme(seen=3e38)
    | {"normalize_obs": True, "baseline": "value"},
    "norm of 1e-320": MACHINE | {"max_grad_norm": 1e-320},
}


@pytest.mark.parametrize("case", GOES_ON)
def test_what_float32_can_hold_goes_on(tmp_path, saved, case):
    result = train(settings(tmp_path, **GOES_ON[case]))
    assert all(finite for _, finite in saved)
    rows = rows_of(result.run_dir)
    assert len(rows) == 3
    if "normalized" in case and "rewards" in case:
        assert all(row["losses/grad_norm"] > 1e-3 for row in rows)
    if "one step" in case or "equal" in case:
        assert all(row["losses/policy_loss"] == 0 for row in rows)


def test_a_state_that_is_not_finite_would_be_seen(tmp_path, monkeypatch, saved):
    """The fixture above, tried: without the check the same run saves NaN."""
    monkeypatch.setattr("vecpg.update.check_parameters", lambda *_: None)
    real = TrainState.commit

    def commit(self, draft):
        draft.policy.network[0].bias.data.fill_(math.nan)
        real(self, draft)

    monkeypatch.setattr(TrainState, "commit", commit)
    train(settings(tmp_path, total_iterations=1, **MACHINE))
    assert [finite for _, finite in saved] == [True, False]


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("what", ["observation", "reward"])
def test_an_environment_is_named_wherever_it_runs(tmp_path, saved, vectorization, what):
    given = {"env_id": "environments:Faulty-v0", "vectorization": vectorization}
    with pytest.raises(EnvironmentFailure, match=rf"environment \d returned the {what} .*nan"):
        train(settings(tmp_path, env_kwargs={"fault": f"nan {what}", "index": 0}, **given))
    assert saved == [(0, True), (0, True)]
