"""The environments on tensors against Gymnasium's own."""

import math
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from vecpg.envs.acrobot import inside_turn
from vecpg.envs.cartpole import CartPole
from vecpg.envs.mountain_car_continuous import MountainCarContinuous
from vecpg.envs.tensor import TensorVectorEnv

DTYPES = {"float32": torch.float32, "float64": torch.float64}
X_LIMIT, THETA_LIMIT = 2.4, 12 * 2 * np.pi / 360


NAMES = ["CartPole", "Pendulum", "Acrobot", "MountainCarContinuous"]


def version(name):
    return f"{name}-v{0 if name == 'MountainCarContinuous' else 1}"


def make(name, num_envs, **kwargs):
    return gymnasium.make_vec(f"vecpg/{version(name)}", num_envs=num_envs, **kwargs)


def cartpole_states(count, seed=0):
    """States around and beyond the limits, (4, count) float64."""
    g = np.random.default_rng(seed)
    scale = np.array([3.0, 3.0, 0.3, 3.0])[:, None]
    return scale * g.uniform(-1, 1, (4, count))


def gymnasiums_cartpole(states, actions):
    """States and terminations one step later, each in Gymnasium's scalar environment."""
    env = gymnasium.make("CartPole-v1").unwrapped
    following, over = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for state, action in zip(states.T, actions, strict=True):
            env.reset()
            env.state = state.copy()
            env.steps_beyond_terminated = None
            _, reward, terminated, _, _ = env.step(int(action))
            assert reward == 1.0
            following.append(env.state)
            over.append(terminated)
    return np.array(following).T, np.array(over)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_one_step_of_cartpole_is_gymnasiums(dtype, tolerance):
    count = 20_000
    states = cartpole_states(count)
    actions = np.arange(count) % 2
    expected, over = gymnasiums_cartpole(states, actions)
    other, other_over = gymnasiums_cartpole(states[:, :2000], 1 - actions[:2000])
    for wanted, ends, taken, n in (
        (expected, over, actions, count),
        (other, other_over, 1 - actions[:2000], 2000),
    ):
        envs = make("CartPole", n, dtype=dtype)
        envs.reset(seed=1)
        envs.unwrapped.state = torch.tensor(states[:, :n], dtype=DTYPES[dtype])
        obs, rewards, terminations, truncations, _ = envs.step(torch.from_numpy(taken))
        assert envs.unwrapped.state.dtype == obs.dtype == DTYPES[dtype]
        assert np.abs(envs.unwrapped.state.double().numpy() - wanted).max() <= tolerance
        assert torch.equal(obs.mT, envs.unwrapped.state)
        margin = np.minimum(
            np.abs(np.abs(wanted[0]) - X_LIMIT), np.abs(np.abs(wanted[2]) - THETA_LIMIT)
        )
        differ = terminations.numpy() != ends
        assert not (differ & (margin > 1e-6)).any()
        assert dtype == "float32" or not differ.any()
        assert 0.2 < ends.mean() < 0.9
        assert torch.equal(rewards, torch.ones_like(rewards))
        assert not truncations.any()


def test_cartpole_keeps_step_with_gymnasiums_vector_environment():
    """With states injected again every 100 steps: one unit in the last place grows to 1e-3."""
    num_envs = 64
    theirs = gymnasium.make_vec("CartPole-v1", num_envs, vectorization_mode="vector_entry_point")
    ours = make("CartPole", num_envs, dtype="float64")
    theirs.reset(seed=3)
    ours.reset(seed=3)
    g = np.random.default_rng(0)
    over = np.zeros(num_envs, bool)
    ends = 0
    for t in range(400):
        if t % 100 == 0:
            ours.unwrapped.state = torch.from_numpy(np.array(theirs.unwrapped.state))
        actions = g.integers(0, 2, num_envs)
        _, rewards, terminations, truncations, _ = theirs.step(actions)
        _, r, term, trunc, _ = ours.step(torch.from_numpy(actions))
        state, wanted = ours.unwrapped.state.numpy().copy(), np.array(theirs.unwrapped.state)
        assert np.abs(state - wanted)[:, ~over].max() <= 1e-9
        # Each starts anew where it likes.
        assert np.abs(state[:, over]).max(initial=0) <= 0.05
        state[:, over] = wanted[:, over]
        ours.unwrapped.state = torch.from_numpy(state)
        assert np.array_equal(r.numpy(), rewards)
        assert np.array_equal(term.numpy(), terminations)
        assert np.array_equal(trunc.numpy(), truncations)
        over = terminations | truncations
        ends += over.sum()
    assert ends > 200


def balance(obs):
    """Keeps the pole upright for 500 steps."""
    return (obs @ torch.tensor([0.1, 0.5, 3.0, 1.0], dtype=obs.dtype) > 0).long()


def test_a_balancing_controller_reaches_the_limit_and_then_the_row_only_resets():
    envs = make("CartPole", 8)
    obs, _ = envs.reset(seed=2)
    for t in range(500):
        obs, rewards, terminations, truncations, _ = envs.step(balance(obs))
        assert not terminations.any()
        assert truncations.all() == (t == 499)
        assert truncations.any() == (t == 499)
        assert (rewards == 1).all()
    final = obs
    obs, rewards, terminations, truncations, _ = envs.step(balance(obs))
    assert (rewards == 0).all()
    assert not terminations.any()
    assert not truncations.any()
    assert (obs.abs() <= 0.05).all()
    assert not torch.equal(obs, final)
    _, rewards, _, truncations, _ = envs.step(balance(obs))
    assert (rewards == 1).all()
    assert not truncations.any()


def test_both_ends_may_come_at_once():
    up = make("Acrobot", 2, max_episode_steps=1)
    up.reset(seed=1)
    up.unwrapped.state = torch.tensor([[np.pi, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    _, rewards, terminations, truncations, _ = up.step(torch.tensor([1, 1]))
    assert rewards.tolist() == [0.0, -1.0]
    assert terminations.tolist() == [True, False]
    assert truncations.tolist() == [True, True]
    envs = make("CartPole", 3, max_episode_steps=4)
    envs.reset(seed=1)
    right = torch.ones(3, dtype=torch.int64)
    for _ in range(3):
        envs.step(right)
    state = envs.unwrapped.state.clone()
    state[0, 1] = 5.0
    envs.unwrapped.state = state
    _, _, terminations, truncations, _ = envs.step(right)
    assert terminations.tolist() == [False, True, False]
    assert truncations.tolist() == [True, True, True]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-6)])
def test_one_step_of_pendulum_is_gymnasiums(dtype, tolerance):
    count = 5000
    g = np.random.default_rng(0)
    states = np.stack([g.uniform(-3 * np.pi, 3 * np.pi, count), g.uniform(-8, 8, count)])
    torques = g.uniform(-2, 2, (count, 1)).astype(np.float32)
    env = gymnasium.make("Pendulum-v1").unwrapped
    env.reset(seed=0)
    following, paid, seen = [], [], []
    for state, torque in zip(states.T, torques, strict=True):
        env.state = state.copy()
        # As float64: Gymnasium would round its product with a float32 torque.
        obs, reward, _, _, _ = env.step(torque.astype(np.float64))
        following.append(env.state)
        paid.append(reward)
        seen.append(obs)
    envs = make("Pendulum", count, dtype=dtype)
    envs.reset(seed=1)
    envs.unwrapped.state = torch.tensor(states, dtype=DTYPES[dtype])
    obs, rewards, terminations, _, _ = envs.step(torch.from_numpy(torques))
    state = envs.unwrapped.state.double().numpy()
    assert np.abs(state - np.array(following).T).max() <= tolerance
    # A float32 angle near pi may be taken for one near -pi, whose square is the same.
    assert np.abs(rewards.double().numpy() - np.array(paid)).max() <= 10 * tolerance
    assert np.abs(obs.double().numpy() - np.array(seen)).max() <= max(tolerance, 1e-6)
    assert not terminations.any()


def test_pendulum_starts_and_ends_as_gymnasiums():
    envs = make("Pendulum", 4000)
    envs.reset(seed=1)
    theta, speed = envs.unwrapped.state
    for values, limit in ((theta, np.pi), (speed, 1.0)):
        assert values.abs().max() <= limit
        assert abs(values.mean()) < 4 * limit / np.sqrt(3 * 4000)
        assert abs(values.square().mean() - limit**2 / 3) < 0.06 * limit**2
    short = make("Pendulum", 2)
    short.reset(seed=1)
    for t in range(200):
        _, _, terminations, truncations, _ = short.step(torch.zeros(2, 1))
        assert not terminations.any()
        assert truncations.all() == (t == 199)


def stepped(name, states, actions):
    """One step from every state in Gymnasium's scalar environment: what it has then, and says."""
    env = gymnasium.make(version(name)).unwrapped
    env.reset(seed=0)
    following, seen, paid, ended = [], [], [], []
    for state, action in zip(states.T, actions, strict=True):
        env.state = state.copy()
        obs, reward, terminated, _, _ = env.step(action)
        following.append(np.array(env.state, np.float64))
        seen.append(obs)
        paid.append(reward)
        ended.append(terminated)
    return np.array(following).T, np.array(seen), np.array(paid), np.array(ended)


def ours(name, states, actions, dtype="float64"):
    """The same in ours."""
    envs = make(name, states.shape[1], dtype=dtype)
    envs.reset(seed=1)
    envs.unwrapped.state = torch.tensor(states, dtype=DTYPES[dtype])
    obs, rewards, terminations, truncations, _ = envs.step(torch.from_numpy(actions))
    assert envs.unwrapped.state.dtype == obs.dtype == rewards.dtype == DTYPES[dtype]
    assert not truncations.any()
    parts = envs.unwrapped.state, obs, rewards, terminations
    return [part.double().numpy() if part.is_floating_point() else part.numpy() for part in parts]


def acrobot_states(count, share):
    """Any angles, and speeds up to a share of the fastest."""
    g = np.random.default_rng(0)
    high = np.array([np.pi, np.pi, share * 4 * np.pi, share * 9 * np.pi])[:, None]
    return high * g.uniform(-1, 1, (4, count))


@pytest.mark.parametrize(("share", "tolerance"), [(0.75, 1e-12), (1.0, 1e-11)])
def test_one_step_of_acrobot_is_gymnasiums(share, tolerance):
    """The fastest turn once around and more in a step, and enlarge what rounding does."""
    states, actions = acrobot_states(10_000, share), np.arange(10_000) % 3
    expected, seen, paid, ended = stepped("Acrobot", states, actions)
    state, obs, rewards, terminations = ours("Acrobot", states, actions)
    assert np.abs(state - expected).max() <= tolerance
    assert np.array_equal(terminations, ended)
    assert np.array_equal(rewards, paid)
    assert 0.1 < ended.mean() < 0.4
    # Gymnasium gives its observations as float32.
    assert np.abs(obs - seen).max() <= 2e-6
    # Both limits of both speeds are met, and angles are taken back from beyond both ends.
    for speed, limit in ((state[2], 4 * np.pi), (state[3], 9 * np.pi)):
        assert (speed == limit).sum() > 20
        assert (speed == -limit).sum() > 20
    for angle, speed in ((states[0], states[2]), (states[1], states[3])):
        assert (angle + 0.2 * speed > np.pi).sum() > 500
        assert (angle + 0.2 * speed < -np.pi).sum() > 500
    assert np.abs(state[:2]).max() <= np.pi
    slow = np.abs(states[2:]).max(axis=0) < 5
    single, _, _, _ = ours("Acrobot", states, actions, "float32")
    inside = np.abs(np.abs(expected[:2]) - np.pi).min(axis=0) > 1e-3
    assert np.abs(single - expected)[:, slow & inside].max() <= 2e-5


def test_an_angle_stays_that_is_at_an_end_of_its_turn():
    """Gymnasium takes away whole turns while an angle is beyond pi or -pi, and only then."""
    turn = 2 * math.pi
    for angle, inside in (
        (math.pi, math.pi),
        (-math.pi, -math.pi),
        (math.nextafter(math.pi, 4), math.nextafter(math.pi, 4) - turn),
        (math.nextafter(-math.pi, -4), math.nextafter(-math.pi, -4) + turn),
        (7.0, 7.0 - turn),
        (-7.0, -7.0 + turn),
        (16.0, 16.0 - turn - turn - turn),
        (0.0, 0.0),
    ):
        assert inside_turn(angle) == pytest.approx(inside, abs=1e-14)
    assert inside_turn(-0.0) == 0.0


def mountain_car(state, action):
    """The formulas of MountainCarContinuous-v0, written out."""
    position, velocity = state
    velocity += 0.0015 * min(max(action, -1.0), 1.0) - 0.0025 * math.cos(3 * position)
    velocity = min(max(velocity, -0.07), 0.07)
    position = min(max(position + velocity, -1.2), 0.6)
    if position == -1.2 and velocity < 0:
        velocity = 0.0
    reached = position >= 0.45 and velocity >= 0
    return position, velocity, (100.0 if reached else 0.0) - 0.1 * action**2, reached


def mountain_car_states(count):
    """Anywhere, and many at the left end, at rest there and on the goal's two sides."""
    g = np.random.default_rng(0)
    states = np.stack([g.uniform(-1.2, 0.6, count), g.uniform(-0.07, 0.07, count)])
    states[0, ::5] = g.uniform(-1.2, -1.15, len(states[0, ::5]))
    states[0, 1::5] = g.uniform(0.4, 0.5, len(states[0, 1::5]))
    states[:, :40] = np.array([-1.2, 0.0])[:, None]
    states[1, 40:60] = -0.0
    actions = g.uniform(-1, 1, (count, 1)).astype(np.float32)
    actions[:20] = -1.0
    return states, actions


def test_one_step_of_mountain_car_is_its_formulas_and_gymnasiums():
    states, actions = mountain_car_states(10_000)
    written = np.array(
        [
            mountain_car(state, float(action))
            for state, (action,) in zip(states.T, actions, strict=True)
        ]
    ).T
    state, obs, rewards, terminations = ours("MountainCarContinuous", states, actions)
    assert np.abs(state - written[:2]).max() <= 1e-12
    assert np.abs(rewards - written[2]).max() <= 1e-12
    assert np.array_equal(terminations, written[3] == 1)
    assert np.array_equal(obs.T, state)
    # As float64 in, and rounded to float32 by Gymnasium.
    expected, _, paid, ended = stepped("MountainCarContinuous", states, actions.astype(np.float64))
    ulp = np.spacing(np.abs(expected).astype(np.float32))
    assert (np.abs(state - expected) <= ulp).all()
    assert np.abs(rewards - paid).max() <= 1e-12
    assert np.array_equal(terminations, ended)
    stopped = (written[0] == -1.2) & (written[1] == 0)
    assert stopped.sum() > 500
    assert 200 < ended.sum() < 2000
    assert ((state[0] >= 0.45) & ~terminations).sum() > 50
    for end in (-0.07, 0.07):
        assert (written[1] == end).any()
    single, _, _, over = ours("MountainCarContinuous", states, actions, "float32")
    hit = (np.abs(written[0] + 1.2) < 1e-6) & (written[1] != single[1])
    assert np.abs(single - written[:2])[:, ~hit].max() <= 2e-7
    assert hit.sum() < 10
    assert (over != terminations).sum() < 3


def test_a_car_that_stands_on_the_goal_has_reached_it():
    goal, below = 0.45, math.nextafter(0.45, 0)
    for position, velocity in ((goal, 0.0), (goal, -0.0), (0.6, 0.07)):
        assert MountainCarContinuous.terminated((position, velocity))
    for position, velocity in ((goal, -5e-324), (below, 0.0), (-1.2, 0.07)):
        assert not MountainCarContinuous.terminated((position, velocity))


@pytest.mark.parametrize(
    ("name", "limit"), [("Acrobot", 100), ("MountainCarContinuous", 100), ("Pendulum", 130)]
)
def test_500_steps_keep_step_with_gymnasium_ends_included(name, limit):
    """Pushed along with its movement, it reaches its goal; our state is set to theirs each time."""
    theirs = gymnasium.make(version(name), max_episode_steps=limit)
    envs = make(name, 1, dtype="float64", max_episode_steps=limit)
    theirs.reset(seed=3)
    envs.reset(seed=3)
    g = np.random.default_rng(1)
    tolerance = 1e-7 if name == "MountainCarContinuous" else 1e-12
    terminated = truncated = 0
    for _ in range(500):
        state = np.array(theirs.unwrapped.state, np.float64)
        envs.unwrapped.state = torch.from_numpy(state)[:, None]
        push = float(np.float32(g.uniform(-1, 1) if g.random() < 0.2 else np.sign(state[-1])))
        action = round(1 + push) if name == "Acrobot" else np.array([push])
        actions = torch.tensor([action] if name == "Acrobot" else [[push]])
        _, reward, ends, cut, _ = theirs.step(action)
        _, rewards, terminations, truncations, _ = envs.step(actions)
        difference = envs.unwrapped.state[:, 0].numpy() - theirs.unwrapped.state
        assert np.abs(difference).max() <= tolerance
        assert rewards.item() == pytest.approx(reward, abs=1e-6)
        assert (terminations.item(), truncations.item()) == (ends, cut)
        terminated, truncated = terminated + ends, truncated + cut
        if ends or cut:
            theirs.reset()
            _, rewards, terminations, truncations, _ = envs.step(actions)
            assert (rewards.item(), terminations.item(), truncations.item()) == (0, False, False)
    assert truncated > 0
    assert (terminated > 0) == (name != "Pendulum")


@pytest.mark.parametrize("name", ["Acrobot", "MountainCarContinuous"])
def test_start_states_are_gymnasiums(name):
    envs = make(name, 4000)
    envs.reset(seed=1)
    scalar = gymnasium.make(version(name)).unwrapped
    found = []
    for seed in range(500):
        scalar.reset(seed=seed)
        found.append(np.array(scalar.state, np.float64))
    theirs, state = np.array(found).T, envs.unwrapped.state.double().numpy()
    low, high = (-0.1, 0.1) if name == "Acrobot" else (-0.6, -0.4)
    uniform = state if name == "Acrobot" else state[:1]
    for values, limit in ((uniform, 4000), (theirs[: len(uniform)], 500)):
        assert values.min() >= low - 1e-7
        assert values.max() <= high
        assert np.abs(values.mean(axis=1) - (low + high) / 2).max() < 4 * 0.2 / np.sqrt(12 * limit)
        assert np.abs(values.std(axis=1) - 0.2 / np.sqrt(12)).max() < 0.01
    if name != "Acrobot":
        assert (state[1] == 0).all()
        assert (theirs[1] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_vector_environment_as_gymnasium_has_them(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = make(name, 5)
        scalar = gymnasium.make(version(name))
    assert isinstance(envs, VectorEnv)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert envs.single_observation_space == scalar.observation_space
    assert envs.single_action_space == scalar.action_space
    assert envs.num_envs == 5
    obs, info = envs.reset(seed=0)
    assert isinstance(obs, torch.Tensor)
    assert envs.observation_space.contains(obs.numpy())
    assert info == {}
    assert gymnasium.make_vec(envs.spec).num_envs == 5
    assert envs.spec.to_json()


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_out_is_never_written_to_again(name):
    envs = make(name, 3)
    actions = torch.zeros(envs.action_space.shape, dtype=torch.float32)
    actions = actions.long() if isinstance(envs.single_action_space, spaces.Discrete) else actions
    kept = [envs.reset(seed=0)[0]]
    copies = [kept[0].clone()]
    for _ in range(5):
        out = envs.step(actions)[:4]
        kept += out
        copies += [each.clone() for each in out]
        envs.unwrapped.state += 1.0
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_start_states_are_a_function_of_seed_copy_and_step():
    one, two = make("CartPole", 6), make("CartPole", 9)
    assert torch.equal(one.reset(seed=4)[0], two.reset(seed=4)[0][:6])
    again, other = one.reset(seed=4)[0], two.reset(seed=5)[0][:6]
    assert torch.equal(again, make("CartPole", 6).reset(seed=4)[0])
    assert not torch.equal(again, other)
    further = one.reset()[0]
    assert not torch.equal(further, again)
    assert len(further.unique()) == further.numel()


def test_a_mask_resets_some_copies_and_leaves_the_others():
    envs = make("CartPole", 4, max_episode_steps=6)
    envs.reset(seed=0)
    actions = torch.tensor([0, 1, 0, 1])
    for _ in range(4):
        before = envs.step(actions)[0]
    mask = np.array([True, False, True, False])
    obs, _ = envs.reset(options={"reset_mask": mask})
    assert torch.equal(obs[[1, 3]], before[[1, 3]])
    assert (obs[[0, 2]].abs() <= 0.05).all()
    envs.step(actions)
    assert envs.step(actions)[3].tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": "float16"}, "dtype: expected float32 or float64, got 'float16'"),
        ({"device": "abacus"}, "device: expected one that is here, got 'abacus'"),
        ({"max_episode_steps": 0}, "max_episode_steps: expected .* at least 1, got 0"),
        ({"render_mode": "human"}, "render_mode: expected None, got 'human'"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TensorVectorEnv(CartPole, 2, **{"max_episode_steps": 5} | kwargs)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"shape \(2,\), got \(3,\)"),
        (torch.zeros(2), "expected integers, got torch.float32"),
        (torch.zeros(2, dtype=torch.bool), "expected integers, got torch.bool"),
        (torch.zeros(2, dtype=torch.complex128), "expected integers, got torch.complex128"),
        (torch.tensor([0, 2]), "from 0 to 1, got 0 to 2"),
    ],
)
def test_illegal_actions_are_named(actions, message):
    envs = make("CartPole", 2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        envs.step(actions)


def test_torques_beyond_the_bounds_are_illegal():
    envs = make("Pendulum", 2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="actions: expected numbers from"):
        envs.step(torch.tensor([[0.0], [2.5]]))
