"""Learning as CUDA does it: rows gathered by chunks, and what is done with them replayed."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from recorder import name_of, record, why_it_waits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vecpg import update as update_module
from vecpg import value as value_module
from vecpg.adam import Adam
from vecpg.config import Config
from vecpg.kernels import graphs
from vecpg.kernels.gathered import Gradient, chunk_sizes, rows_at_once
from vecpg.noise import Stream
from vecpg.policy import Policy
from vecpg.policy import network as network_module
from vecpg.rollout import Rollout
from vecpg.update import Learner, by_autograd, choose_learner, gradient_of, update
from vecpg.value import Critic, ValueFunction, fit, predict

N, CHUNK = 4, 16
BOX = spaces.Box(-1, 1, (3,))
DISCRETE = spaces.Discrete(3, start=1)
POLICIES = {
    "categorical": (BOX, DISCRETE, {}),
    "Gaussian": (BOX, spaces.Box(-1, 1, (2,)), {}),
    "its deviation from the network": (BOX, spaces.Box(-1, 1, (2,)), {"log_std": "network"}),
    "components": (BOX, spaces.MultiDiscrete([2, 3], start=[1, -1]), {}),
    "states": (spaces.Discrete(5, start=2), DISCRETE, {}),
    "dropout": (BOX, DISCRETE, {"dropout": 0.4}),
    "normalized": (BOX, DISCRETE, {"normalize_obs": True}),
    "masked": (BOX, DISCRETE, {"dropout": 0.4}),
    "images": (spaces.Box(0, 255, (8, 9, 3), np.uint8), DISCRETE, {}),
}


@pytest.fixture
def captured(monkeypatch):
    """What was captured, in words: what recorded its operations does them again."""
    said = []

    def capture(function, device, what):
        said.append(what)
        return record(function)

    monkeypatch.setattr(graphs, "capture", capture)
    return said


def make_policy(of="categorical", hidden_sizes=(6, 5), seed=1):
    observations, actions, settings = POLICIES[of]
    torch.manual_seed(seed)
    policy = Policy(observations, actions, hidden_sizes=hidden_sizes, **settings)
    for parameter in policy.network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return policy


def make_rollout(policy, counted, seed=0, masked=False):
    """So many rows that count, among more that hold what nobody may read."""
    g = torch.Generator().manual_seed(seed)
    t = max(2, math.ceil(2 * counted / N))
    mask = torch.zeros(t * N, dtype=bool)
    mask[torch.randperm(t * N, generator=g)[:counted]] = True
    mask = mask.reshape(t, N)
    shape = t, N, *policy.obs_shape
    if policy.obs_dtype == torch.float32:
        obs = torch.randn(shape, generator=g).masked_fill_(~mask[:, :, None], math.nan)
    else:
        obs = torch.randint(2, 7, shape, generator=g).to(policy.obs_dtype)
    space = policy.distribution.space
    if isinstance(space, spaces.Box):
        actions = torch.randn(t, N, 2, generator=g).masked_fill_(~mask[:, :, None], math.nan)
    else:
        low = torch.as_tensor(space.start)
        size = torch.as_tensor(space.nvec if hasattr(space, "nvec") else space.n)
        drawn = torch.rand(t, N, *policy.action_shape, generator=g)
        actions = low + (drawn * size).long()
        actions[~mask] = 2**40
    masks = None
    if masked:
        masks = torch.rand(t, N, 3, generator=g) < 0.5
        masks.scatter_(2, torch.where(mask, actions - 1, 0)[:, :, None], True)
    ends = torch.zeros(t, N, dtype=bool)
    return Rollout(
        obs=obs,
        actions=actions,
        rewards=torch.randn(t, N, generator=g).masked_fill_(~mask, math.nan),
        terminations=ends,
        truncations=ends,
        mask=mask,
        final_obs=obs[:0, 0],
        final_rows=torch.zeros(0, 2, dtype=torch.int64),
        stream=Stream(7, 2, 0, N),
        action_masks=masks,
        counted=mask.reshape(-1).nonzero()[:, 0],
    )


def make_weights(rollout, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rollout.mask.shape, generator=g).masked_fill_(~rollout.mask, math.nan)


def gathering(policy, rows=CHUNK):
    """A learner as one that is prepared on CUDA."""
    learner = Learner("reference", None, rows)
    learner.prepare(policy)
    return learner


def exactly(policy, rollout, weights, config):
    """Gradients by torch's autograd, of all rows at once in float64."""
    exact = copy.deepcopy(policy).double()
    exact.encoder.register_forward_hook(lambda module, given, features: features.double())
    mask, count = rollout.mask, int(rollout.mask.sum())
    obs, dropout, masks = rollout.obs[mask], None, []
    obs = obs if policy.obs_dtype == torch.int64 else obs.double()
    if policy.dropout_units:
        t, n = mask.nonzero().t()
        dropout = rollout.stream.uniforms_at(t, n, update_module.Purpose.DROPOUT, 11)
    if rollout.action_masks is not None:
        masks = [rollout.action_masks[mask]]
    log_probs, entropies = exact.log_probs_and_entropy(obs, rollout.actions[mask], dropout, *masks)
    divisor = {"episode": N, "step": count, "sum": 1}[config.reduction]
    surrogate = -(log_probs * weights[mask].double()).sum() / divisor
    entropy = entropies.sum() / count
    exact.zero_grad()
    (surrogate - config.ent_coef * entropy).backward()
    gradient = flat(p.grad for p in exact.parameters())
    norm = gradient.norm()
    if config.max_grad_norm is not None:
        gradient = gradient * min(1.0, config.max_grad_norm / (norm.item() + 1e-6))
    return gradient, torch.stack([surrogate.detach(), entropy.detach(), norm])


def flat(tensors):
    return torch.cat([each.detach().reshape(-1).double() for each in tensors])


# -- Chunks ----------------------------------------------------------------------------------


def test_chunks_hold_all_rows_and_are_of_few_sizes():
    for most in (1, 5, 16, 2**18):
        found = set()
        for count in [*range(70), 2**18 - 1, 2**18, 2**20 + 3]:
            sizes = chunk_sizes(count, most)
            assert all(size == most for size in sizes[:-1])
            assert 0 <= sum(sizes) - count < max(1, sizes[-1] if sizes else 1)
            if count > 2 * most:
                assert sum(sizes) - count <= most
            found |= set(sizes)
        assert len(found) <= 8


def test_wide_layers_go_through_in_smaller_chunks():
    widths = {1: 2**18, 64: 2**18, 4096: 2**26 // 4099, 2**27: 1}
    for width, rows in widths.items():
        layers = nn.Linear(3, width, device="meta"), nn.Tanh(), nn.Linear(width, 3, device="meta")
        assert rows_at_once(nn.Sequential(*layers)) == rows


# -- The update ------------------------------------------------------------------------------


@pytest.mark.parametrize("of", POLICIES)
def test_a_replayed_gradient_is_that_of_autograd_however_many_rows_count(of, captured):
    """Below, at and above a chunk, while parameters and running statistics change."""
    policy = make_policy(of)
    learner, optimizer = gathering(policy), Adam(policy.parameters(), 0.02)
    settings = {"reduction": "step"} if of == "Gaussian" else {}
    config = Config(num_envs=N, ent_coef=0.3, max_grad_norm=0.7, **settings)
    seen = 0
    for number, counted in enumerate((5, CHUNK, 3 * CHUNK + 1, 7, 2 * CHUNK, 5, 1)):
        rollout = make_rollout(policy, counted, number, masked=of == "masked")
        weights = make_weights(rollout, number)
        gradient, numbers = exactly(policy, rollout, weights, config)
        stats = learner.update(policy, optimizer, rollout, weights, config, wait=False)
        error = flat(p.grad for p in policy.parameters()) - gradient
        rounding = 1e-5 if of == "images" else 1e-6
        assert error.norm() <= rounding * max(gradient.norm(), 1e-2)
        found = torch.stack([stats.policy_loss, stats.entropy, stats.grad_norm.double()])
        torch.testing.assert_close(found, numbers, rtol=2e-6, atol=2e-6)
        assert bool(stats.finite)
        seen += counted
        if policy.encoder.normalizer is not None:
            assert policy.encoder.normalizer.count == seen
    assert captured == [f"the update, {size} rows at once" for size in (8, 16, 1)]


def test_what_no_row_that_counts_holds_is_looked_at_nowhere(captured):
    """Padding too: whatever lies in the memory of a chunk, from before."""
    gradients = []
    for left in (0.0, math.nan):
        policy = make_policy()
        gradient = gradient_of(policy, CHUNK, replayed=True)
        for counted in (CHUNK + 3, CHUNK + 2):
            rollout = make_rollout(policy, counted)
            by_autograd(policy, rollout, make_weights(rollout), 1, 0.1, gradient=gradient)
            for chunk in gradient._chunks.values():
                for rows in chunk.rows:
                    rows.fill_(left if rows.is_floating_point() else 2)
        gradients.append(flat(p.grad for p in policy.parameters()))
        assert gradients[-1].isfinite().all()
    assert torch.equal(*gradients)


def test_where_nothing_is_captured_each_operation_is_done_again(monkeypatch):
    """As on a device whose graph cannot be captured, which was warmed up before that was known."""
    made = []

    def not_captured(function, device, what):
        function()
        made.append(function)
        return function

    monkeypatch.setattr(graphs, "capture", not_captured)
    policy, results = make_policy("dropout"), []
    gradient = gradient_of(policy, CHUNK, replayed=True)
    for kept in (gradient, gradient, gradient_of(policy, CHUNK)):
        rollout = make_rollout(policy, 2 * CHUNK + 3)
        given = policy, rollout, make_weights(rollout), 3, torch.tensor(0.2)
        sums = by_autograd(*given, gradient=kept)
        results.append(torch.cat([torch.stack(sums), flat(p.grad for p in policy.parameters())]))
    assert len(made) == 2
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_graphs_are_kept_of_the_policy_that_is_learning(captured):
    policy, other = make_policy(), make_policy(seed=2)
    rollout, config = make_rollout(policy, 9), Config(num_envs=N)
    weights = make_weights(rollout)
    learner = gathering(policy)
    for _ in range(3):
        learner.update(policy, Adam(policy.parameters()), rollout, weights, config)
    assert len(captured) == 1
    learner.update(other, Adam(other.parameters()), rollout, weights, config)
    assert len(captured) == 2
    expected, _ = exactly(make_policy(seed=2), rollout, weights, config)
    torch.testing.assert_close(
        flat(p.grad for p in other.parameters()), expected, rtol=1e-4, atol=1e-6
    )


def test_the_same_again_has_the_same_bits(captured):
    results = []
    for _ in range(2):
        policy = make_policy("dropout")
        learner, optimizer = gathering(policy), Adam(policy.parameters(), 0.02)
        for number, counted in enumerate((40, 9, 25)):
            rollout = make_rollout(policy, counted, number)
            given = rollout, make_weights(rollout), Config(num_envs=N, ent_coef=0.1)
            learner.update(policy, optimizer, *given, wait=False)
        results.append(flat(policy.parameters()))
    assert torch.equal(*results)


def test_convolutions_add_in_one_order_forwards_and_backwards():
    line, seen = nn.Linear(1, 1), []

    def terms(padding, settings, x):
        look()
        return [line(x).sum()]

    def look(*gradient):
        seen.append(torch.backends.cudnn.deterministic)

    line.weight.register_hook(look)
    gradient = Gradient(line, terms, 1, 0, most=2, what="an example")
    gradient.load(torch.tensor([0]), [torch.ones(1, 1)], [])
    gradient.add()
    look()
    assert seen == [True, True, False]


def test_a_parameter_on_which_nothing_depends_has_no_gradient(captured):
    """Adam then leaves it, and does not count the step, as elsewhere."""
    policy = make_policy()
    policy.network.unused = nn.Parameter(torch.ones(2))
    policy.network.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    learner, optimizer = gathering(policy), Adam(policy.parameters(), 0.02)
    for counted in (9, 20):
        rollout = make_rollout(policy, counted)
        learner.update(policy, optimizer, rollout, make_weights(rollout), Config(num_envs=N))
    assert [name for name, p in policy.named_parameters() if p.grad is None] == [
        "network.unused",
        "network.frozen",
    ]
    assert len(optimizer.averages()) == 2 * 6


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_are_gathered_by_themselves(captured, shards):
    config = Config(num_envs=N, shards=shards, ent_coef=0.2)
    policy = make_policy("dropout")
    rollout = make_rollout(policy, 60)
    weights, learner = make_weights(rollout), gathering(policy)
    expected, numbers = exactly(policy, rollout, weights, config)
    stats = learner.update(policy, Adam(policy.parameters(), 0.0), rollout, weights, config)
    found = flat(p.grad for p in policy.parameters())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stats.policy_loss, numbers[0], rtol=1e-5, atol=1e-6)
    critics = [make_critic(), make_critic()]
    plain = fit(critics[0], rollout, None, dataclasses.replace(config, value_steps=3))
    replay_fits(critics[1])
    replayed = fit(critics[1], rollout, None, dataclasses.replace(config, value_steps=3))
    torch.testing.assert_close(replayed.value_loss, plain.value_loss, rtol=1e-6, atol=1e-6)
    ours, theirs = (flat(each.value_function.parameters()) for each in critics)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


def test_a_rollout_without_counted_rows_has_no_gradient(captured):
    policy = make_policy()
    rollout = make_rollout(policy, 0)
    config, optimizer = (
        Config(num_envs=N, reduction="step", ent_coef=1.0),
        Adam(policy.parameters()),
    )
    learner, weights = gathering(policy), make_weights(rollout)
    stats = learner.update(policy, optimizer, rollout, weights, config, wait=False)
    assert (stats.grad_norm.item(), stats.policy_loss.item(), stats.entropy.item()) == (0, 0, 0)


@pytest.mark.parametrize("gathered", [False, True])
def test_without_a_wait_numbers_that_are_not_finite_are_said_and_not_raised(captured, gathered):
    def outcome(wait, advantage=1.0, learning_rate=0.1, **settings):
        policy = make_policy()
        learner = gathering(policy) if gathered else choose_learner(policy, "reference")
        rollout = make_rollout(policy, 21)
        weights = make_weights(rollout)
        weights[tuple(rollout.mask.nonzero()[0])] = advantage
        config = Config(num_envs=N, **settings)
        optimizer = torch.optim.SGD(policy.parameters(), learning_rate)
        return learner.update(policy, optimizer, rollout, weights, config, wait=wait).finite

    assert outcome(wait=True) is None
    fine = outcome(wait=False)
    assert (fine.shape, fine.dtype, bool(fine)) == ((), torch.bool, True)
    for wrong in (math.nan, math.inf, 1e38):
        for clipped in (None, 0.5):
            assert not outcome(wait=False, advantage=wrong, reduction="sum", max_grad_norm=clipped)
    with pytest.raises(FloatingPointError, match=r"in iteration 3, .* the advantage at step"):
        outcome(wait=True, advantage=math.inf)
    steep = {"learning_rate": 3e38, "reduction": "sum"}
    assert not outcome(wait=False, **steep)
    with pytest.raises(FloatingPointError, match=r"is -?inf after the step in iteration 3; lower"):
        outcome(wait=True, **steep)


# -- Fitting V -------------------------------------------------------------------------------


def make_critic(space=BOX, learning_rate=0.02, **settings):
    torch.manual_seed(3)
    return Critic(ValueFunction(space, hidden_sizes=(5,), **settings), learning_rate)


def replay_fits(critic):
    critic._gradient = value_module.gradient_of(critic.value_function, CHUNK)


@pytest.mark.parametrize("of", ["categorical", "states", "normalized", "images"])
def test_a_replayed_fit_is_that_of_a_plain_loop(of, captured):
    policy = make_policy(of)
    space, _, settings = POLICIES[of]
    critic = make_critic(space, **settings)
    replay_fits(critic)
    config = Config(num_envs=N, baseline="value", value_steps=4, gamma=0.9)
    twin, other = copy.deepcopy((critic.value_function, critic.optimizer))
    twin.encoder.register_forward_hook(lambda module, given, features: features.double())
    for number, counted in enumerate((5, 3 * CHUNK + 1, 7, 5)):
        rollout = make_rollout(policy, counted, number)
        values, _ = predict(critic, rollout)
        assert (values[~rollout.mask] == 0).all()
        twin.load_state_dict(critic.value_function.state_dict())
        twin.double()
        obs = rollout.obs[rollout.mask]
        targets = value_module.reward_to_go(rollout.rewards, rollout.dones, 0.9, mask=rollout.mask)[
            rollout.mask
        ]
        obs = obs if policy.obs_dtype == torch.int64 else obs.double()
        losses = []
        for _ in range(4):
            twin.zero_grad()
            loss = (twin(obs) - targets).square().mean()
            loss.backward()
            other.step()
            losses.append(loss.item())
        torch.testing.assert_close(
            values[rollout.mask].double().sub(targets).square().mean().item(), losses[0]
        )
        fitted = fit(critic, rollout, None, config, wait=False)
        assert fitted.value_loss.item() == pytest.approx(losses[0], rel=1e-5)
        assert bool(fitted.finite)
        ours, theirs = flat(critic.value_function.parameters()), flat(twin.parameters())
        # Where a gradient is rounding alone, Adam makes a step of it.
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()
        if critic.value_function.encoder.normalizer is not None:
            twin.encoder.observe(rollout.obs, rollout.mask)
    assert captured == [f"fitting V, {size} rows at once" for size in (8, 16, 1)]


def test_a_fit_without_a_wait_raises_nothing_and_with_one_it_waits_at_its_end(
    captured, monkeypatch
):
    """On a GPU the steps have been made by then: what is fitted is a draft."""
    rollout = make_rollout(make_policy(), 21)
    huge = dataclasses.replace(rollout, rewards=rollout.rewards * 1e30)
    config = Config(num_envs=N, baseline="value", value_steps=3)
    for gathered in (False, True):
        critics = [make_critic() for _ in range(4)]
        if gathered:
            for critic in critics:
                replay_fits(critic)
        assert fit(critics[0], rollout, None, config).finite is None
        fine = fit(critics[1], rollout, None, config, wait=False).finite
        assert (fine.shape, fine.dtype, bool(fine)) == ((), torch.bool, True)
        monkeypatch.setattr(critics[2].optimizer, "step", lambda: None)
        assert not fit(critics[2], huge, None, config, wait=False).finite
        message = (
            r"^fitting the value function in iteration 3: the loss is inf; scale the rewards, or"
        )
        with pytest.raises(FloatingPointError, match=message):
            fit(critics[3], huge, None, config)


@pytest.mark.parametrize("wrong", ["a parameter", "an average"])
def test_what_the_last_step_leaves_is_looked_at(captured, monkeypatch, wrong):
    """No further loss would tell."""
    rollout, critic = make_rollout(make_policy(), 21), make_critic()
    replay_fits(critic)
    config, steps, step = Config(num_envs=N, baseline="value", value_steps=3), [], Adam.step

    def last_leaves_nan(self):
        step(self)
        steps.append(1)
        if len(steps) == 3:
            at = self.averages() if wrong == "an average" else self.parameters
            at[0].data.fill_(math.nan)

    monkeypatch.setattr(Adam, "step", last_leaves_nan)
    assert not fit(critic, rollout, None, config, wait=False).finite


def test_a_copy_of_a_critic_captures_anew(captured):
    rollout, critic = make_rollout(make_policy(), 9), make_critic()
    replay_fits(critic)
    config = Config(num_envs=N, baseline="value", value_steps=1)
    fit(critic, rollout, None, config)
    copied = copy.deepcopy(critic)
    assert copied._gradient is None
    before = flat(critic.value_function.parameters())
    replay_fits(copied)
    fit(copied, rollout, None, config)
    assert torch.equal(flat(critic.value_function.parameters()), before)
    assert not torch.equal(flat(copied.value_function.parameters()), before)


# -- Waiting ---------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts operations by name, and what makes a host wait for a device."""

    def __init__(self):
        super().__init__()
        self.names, self.waits = [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(name_of(operation))
        if (reason := why_it_waits(operation, args, kwargs or {})) is not None:
            self.waits.append(reason)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("of", ["categorical", "dropout", "normalized", "masked"])
def test_the_host_waits_for_nothing(of, captured):
    policy = make_policy(of)
    critic = make_critic(normalize_obs=of == "normalized")
    settings = {"bootstrap_truncations": True, "max_grad_norm": 0.5, "ent_coef": 0.1}
    config = Config(num_envs=N, baseline="value", value_steps=5, **settings)
    learner, optimizer = gathering(policy), Adam(policy.parameters(), 0.02)
    replay_fits(critic)
    rollout = make_rollout(policy, 3 * CHUNK + 1, masked=of == "masked")
    operations = Operations()
    with operations:
        values, final_values = predict(critic, rollout)
        learner.update(policy, optimizer, rollout, values, config, wait=False)
        fit(critic, rollout, final_values, config, wait=False)
    assert not operations.waits
    assert len(captured) == 4
    operations.names.clear()
    with operations:
        fit(critic, rollout, final_values, config)
    assert operations.waits == ["item"]


def test_a_step_of_adam_is_seven_operations():
    weights = [torch.ones(n, requires_grad=True) for n in (2, 3)]
    adam = Adam(weights, 0.1)
    for each in weights:
        each.grad = torch.ones_like(each)
    adam.step()
    with Operations() as operations:
        adam.step()
    assert len(operations.names) == 7
    assert all(name.startswith("_foreach_") for name in operations.names)
    assert not operations.waits


def test_rows_are_observed_where_they_are_said_to_be(monkeypatch):
    monkeypatch.setattr(network_module, "_MOST_OBSERVED", 3 * 4)
    policies = [make_policy("normalized") for _ in range(2)]
    for number, counted in enumerate((13, 1, 0, 8)):
        rollout = make_rollout(policies[0], counted, number)
        policies[0].observe(rollout.obs, rollout.mask)
        with Operations() as operations:
            policies[1].observe(rollout.obs, rollout.mask, rollout.counted)
        assert not operations.waits
        assert operations.names.count("index_select") == max(1, math.ceil(counted / 4))
    for one, other in zip(*(each.buffers() for each in policies), strict=True):
        torch.testing.assert_close(one, other)


# -- What is chosen --------------------------------------------------------------------------


def test_the_words_for_cuda(monkeypatch, captured):
    policy = make_policy("dropout", hidden_sizes=(128,))
    monkeypatch.setattr(Policy, "device", torch.device("cuda:0"))
    learner = choose_learner(policy)
    assert (learner.backend, learner.rows) == ("reference", 2**15)
    assert str(learner) == "by autograd, in CUDA graphs of 32,768 rows"
    assert choose_learner(make_policy()).rows == 2**18
    # Unless it is prepared nothing is kept, and so nothing captured.
    rollout = make_rollout(policy, 9)
    given = Adam(policy.parameters()), rollout, make_weights(rollout), Config(num_envs=N)
    update(policy, *given)
    learner.update(policy, *given)
    assert not captured
    learner.prepare(policy)
    learner.update(policy, *given)
    assert captured == ["the update, 512 rows at once"]
