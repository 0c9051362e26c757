"""The environments on tensors against Gymnasium's own."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

import vecpg.envs  # noqa: F401 - registers them

DTYPES = {"float32": torch.float32, "float64": torch.float64}
X_LIMIT, THETA_LIMIT = 2.4, 12 * 2 * np.pi / 360


def make(name, num_envs, **kwargs):
    return gymnasium.make_vec(f"vecpg/{name}-v1", num_envs=num_envs, **kwargs)


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


@pytest.mark.parametrize("name", ["CartPole", "Pendulum"])
def test_it_is_a_vector_environment_as_gymnasium_has_them(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = make(name, 5)
        scalar = gymnasium.make(f"{name}-v1")
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


@pytest.mark.parametrize("name", ["CartPole", "Pendulum"])
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
    from vecpg.envs.cartpole import CartPole

    with pytest.raises(ValueError, match=message):
        CartPole(2, **kwargs)


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
