import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from vecpg import begin as begin_module
from vecpg import train as train_module
from vecpg import value as value_module
from vecpg.config import Config
from vecpg.envs import make_envs
from vecpg.policy import Policy
from vecpg.policy import network as network_module
from vecpg.rollout import Rollout, collect
from vecpg.train import train
from vecpg.update import update
from vecpg.value import Critic, ValueFunction, fit, predict

BOX = spaces.Box(-1, 1, (3,))


def make_critic(space=BOX, learning_rate=0.01, **settings):
    torch.manual_seed(0)
    return Critic(ValueFunction(space, hidden_sizes=(5,), **settings), learning_rate)


def make_rollout(seed=0):
    """Four environments, an episode each, NaN in every row that does not count.

    They end by the rule, by a limit, by both, and by a limit in the last row.
    """
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(7)[:, None] < torch.tensor([4, 2, 5, 7])
    terminations, truncations = torch.zeros(7, 4, dtype=bool), torch.zeros(7, 4, dtype=bool)
    terminations[3, 0] = truncations[1, 1] = truncations[6, 3] = True
    terminations[4, 2] = truncations[4, 2] = True
    rows = truncations.nonzero()
    obs, rewards = torch.randn(7, 4, 3, generator=g), torch.randn(7, 4, generator=g)
    obs[~mask], rewards[~mask] = math.nan, math.nan
    return Rollout(
        obs=obs,
        actions=torch.zeros(7, 4, dtype=torch.int64),
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
        mask=mask,
        final_obs=torch.randn(len(rows), 3, generator=g),
        final_rows=rows,
    )


def targets(rollout, gamma, final):
    """By the definition: from each row to the end of its episode, and on where `final` says."""
    out = {}
    for n in range(4):
        length = int(rollout.mask[:, n].sum())
        for t in range(length):
            out[t, n] = sum(
                gamma ** (k - t) * rollout.rewards[k, n].item() for k in range(t, length)
            )
            out[t, n] += gamma ** (length - t) * final.get((length - 1, n), 0.0)
    return out


def test_predictions_are_v_where_counted_and_0_elsewhere():
    critic, rollout = make_critic(), make_rollout()
    values, final_values = predict(critic, rollout)
    first, _, last = critic.value_function.network
    for t in range(7):
        for n in range(4):
            if not rollout.mask[t, n]:
                assert values[t, n] == 0
                continue
            hidden = torch.tanh(first.weight @ rollout.obs[t, n] + first.bias)
            expected = (last.weight @ hidden + last.bias).item()
            assert values[t, n].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert torch.equal(final_values, critic.value_function(rollout.final_obs))
    assert not values.requires_grad
    assert not final_values.requires_grad
    assert len(final_values) == 3


@pytest.mark.parametrize(
    "space", [BOX, spaces.Discrete(4), spaces.MultiDiscrete([[2, 3]])], ids=str
)
def test_where_no_episode_was_truncated_there_is_no_final_value(space):
    g = torch.Generator().manual_seed(0)
    obs = torch.randint(0, 2, (7, 4, *space.shape), generator=g)
    rollout = make_rollout()
    rollout = Rollout(
        obs=obs + 0.5 if space is BOX else obs,
        actions=rollout.actions,
        rewards=rollout.rewards,
        terminations=rollout.dones,
        truncations=torch.zeros(7, 4, dtype=bool),
        mask=rollout.mask,
        final_obs=obs[:0, 0].float() if space is BOX else obs[:0, 0],
        final_rows=torch.zeros(0, 2, dtype=torch.int64),
    )
    values, final_values = predict(make_critic(space), rollout)
    assert final_values.shape == (0,)
    assert values[rollout.mask].all()


def test_without_a_critic_there_is_nothing():
    assert predict(None, make_rollout()) == (None, None)
    assert fit(None, make_rollout(), None, Config()) is None


@pytest.mark.parametrize("bootstrap", [False, True])
def test_fitting_is_that_of_a_plain_loop(bootstrap):
    settings = {"value_steps": 5, "gamma": 0.9, "bootstrap_truncations": bootstrap}
    config = Config(baseline="value", **settings)
    rollout, critic = make_rollout(), make_critic(learning_rate=0.02)
    twin = copy.deepcopy(critic.value_function).double()
    _, final_values = predict(critic, rollout)
    # The third final observation is of an episode that terminated in the same step.
    assert rollout.final_rows.tolist() == [[1, 1], [4, 2], [6, 3]]
    final = {(1, 1): final_values[0].item(), (6, 3): final_values[2].item()} if bootstrap else {}
    wanted = targets(rollout, 0.9, final)
    loss = fit(critic, rollout, final_values, config).value_loss

    optimizer = torch.optim.Adam(twin.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        errors = [twin(rollout.obs[t, n].double()[None])[0] - g for (t, n), g in wanted.items()]
        mean = torch.stack(errors).square().mean()
        mean.backward()
        optimizer.step()
        losses.append(mean.item())
    assert loss.item() == pytest.approx(losses[0], rel=1e-5)
    assert losses[-1] < losses[0]
    for ours, theirs in zip(critic.value_function.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whether_gradients_are_on_makes_no_difference(mode):
    config, rollout, fitted = Config(baseline="value", value_steps=3), make_rollout(), []
    for off in (False, True):
        with mode() if off else contextlib.nullcontext():
            critic = make_critic()
            loss = fit(critic, rollout, predict(critic, rollout)[1], config).value_loss
        again = fit(critic, rollout, None, config).value_loss
        fitted.append([loss, again, *critic.value_function.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*fitted, strict=True))


@pytest.mark.parametrize("rows", [1, 5, 17])
def test_chunks_change_nothing_but_rounding(monkeypatch, rows):
    results = []
    config = Config(baseline="value", value_steps=4, bootstrap_truncations=True)
    for chunk in (4096, rows):
        monkeypatch.setattr(value_module, "_CHUNK_ROWS", chunk)
        critic, rollout = make_critic(), make_rollout()
        values, final_values = predict(critic, rollout)
        loss = fit(critic, rollout, final_values, config).value_loss
        parameters = [p.detach() for p in critic.value_function.parameters()]
        results.append((values, final_values, loss, *parameters))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


def test_pictures_change_nothing_but_their_chunks(monkeypatch):
    """Of uint8 in a convolutional network, against real numbers of the same in one chunk."""
    rollout = make_rollout()
    g = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (7, 4, 8, 9, 3), generator=g).to(torch.uint8)
    final = torch.randint(0, 256, (3, 8, 9, 3), generator=g).to(torch.uint8)
    parts = {name: getattr(rollout, name) for name in Rollout.__slots__}
    config = Config(baseline="value", value_steps=3, bootstrap_truncations=True)
    results, asked, real = [], [], ValueFunction.forward

    def forward(self, obs):
        asked.append(len(obs))
        return real(self, obs)

    monkeypatch.setattr(ValueFunction, "forward", forward)
    for of, most in ((np.float32, 2**24), (np.uint8, 30_000)):
        monkeypatch.setattr(network_module, "_MOST_KEPT", most)
        space = spaces.Box(0, 255 if of == np.uint8 else 1, (8, 9, 3), of)
        critic = make_critic(space, network="cnn")
        obs = [each if of == np.uint8 else each / 255 for each in (pictures, final)]
        given = Rollout(**parts | {"obs": obs[0], "final_obs": obs[1]})
        asked.clear()
        values, final_values = predict(critic, given)
        loss = fit(critic, given, final_values, config).value_loss
        parameters = [p.detach() for p in critic.value_function.parameters()]
        results.append((values, final_values, loss, *parameters))
    assert set(asked) == {3}  # of 18 rows that count, and of 3 final ones
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-3, atol=1e-4)
    assert (results[0][0][rollout.mask] != 0).all()


def test_memory_does_not_grow_with_the_rollout(monkeypatch):
    monkeypatch.setattr(value_module, "_CHUNK_ROWS", 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        fit(make_critic(), make_rollout(), None, Config(baseline="value", value_steps=1))
    assert 0 < max(kept) <= 4 * 5


def test_it_learns_what_a_state_is_worth():
    """Discrete states, so that the best fit is the mean of what followed each."""
    rollout = make_rollout()
    states = torch.arange(28).reshape(7, 4) % 3
    rollout = Rollout(
        **{name: getattr(rollout, name) for name in Rollout.__slots__}
        | {"obs": states, "final_obs": states[:3, 0]}
    )
    critic = make_critic(spaces.Discrete(3), learning_rate=0.02)
    fit(critic, rollout, None, Config(baseline="value", value_steps=400, gamma=1.0))
    wanted = targets(rollout, 1.0, {})
    values, _ = predict(critic, rollout)
    for state in range(3):
        own = [g for (t, n), g in wanted.items() if states[t, n] == state]
        some = next((t, n) for (t, n) in wanted if states[t, n] == state)
        assert values[some].item() == pytest.approx(np.mean(own), abs=0.02)


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line():
    critic, rollout = make_critic(), make_rollout()
    before = copy.deepcopy(critic.value_function.state_dict())
    rollout.rewards[rollout.mask] *= 1e30
    with pytest.raises(
        FloatingPointError, match="value function: the loss is inf; scale the rewards"
    ):
        fit(critic, rollout, None, Config(baseline="value"))
    for name, value in critic.value_function.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_last_step_that_leaves_the_numbers_ends_the_run_in_one_line(monkeypatch):
    """No further loss would tell."""
    critic, steps = make_critic(), []
    bias = critic.value_function.network[2].bias

    def step():
        steps.append(1)
        if len(steps) == 3:
            bias.data.fill_(math.nan)

    monkeypatch.setattr(critic.optimizer, "step", step)
    config = Config(baseline="value", value_steps=3, value_learning_rate=0.25)
    message = (
        r"^fitting the value function: network\.2\.bias is nan after the step; scale the"
        r" rewards, or lower --value-learning-rate \(now 0\.25\)$"
    )
    with pytest.raises(FloatingPointError, match=message):
        fit(critic, make_rollout(), None, config)


def test_statistics_of_observations_are_those_of_the_policy():
    """Both see an iteration with what was counted before it, and take it in at its end."""
    envs = make_envs("environments:Pay-v0", 3)
    torch.manual_seed(0)
    observations, actions = envs.single_observation_space, envs.single_action_space
    policy = Policy(observations, actions, normalize_obs=True)
    critic = make_critic(observations, normalize_obs=True)
    optimizer = torch.optim.Adam(policy.parameters())
    config = Config(baseline="value", value_steps=3)
    normalizer = critic.value_function.encoder.normalizer
    for iteration in range(3):
        rollout = collect(envs, policy, num_steps=1, seed=1, iteration=iteration)
        counts = []
        handle = normalizer.register_forward_hook(
            lambda module, *_, counts=counts: counts.append(module.count.item())
        )
        values, final_values = predict(critic, rollout)
        update(policy, optimizer, rollout, values, config)
        fit(critic, rollout, final_values, config)
        handle.remove()
        assert set(counts) == {15.0 * iteration}
        assert normalizer.count == 15 * (iteration + 1)
        for name, value in normalizer.state_dict().items():
            assert torch.equal(value, policy.encoder.normalizer.state_dict()[name])


def test_it_is_fitted_after_the_step_that_used_it(tmp_path, monkeypatch):
    """A baseline may not have seen the returns that it is subtracted from."""
    events, values = [], []
    real = {name: getattr(train_module, name) for name in ("predict", "weigh", "update", "fit")}
    for name in real:

        def noticed(*args, name=name, **kwargs):
            if name in ("predict", "fit"):
                values.append([p.detach().clone() for p in args[0].value_function.parameters()])
            if name == "weigh":
                expected = value_module.predict(critic[0], args[0])[0]
                assert torch.equal(args[2], expected)
            events.append(name)
            return real[name](*args, **kwargs)

        monkeypatch.setattr(train_module, name, noticed)
    critic = []
    real_critic = begin_module.Critic
    monkeypatch.setattr(
        begin_module, "Critic", lambda *args: critic.append(real_critic(*args)) or critic[0]
    )
    settings = {"num_envs": 4, "total_iterations": 3, "eval_episodes": 1, "progress": False}
    train(Config(baseline="value", value_steps=2, out_dir=str(tmp_path), **settings))
    assert events == ["predict", "weigh", "update", "fit"] * 3
    for before, after in zip(values[::2], values[1::2], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not torch.equal(values[0][0], values[2][0])
