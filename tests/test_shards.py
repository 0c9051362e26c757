"""Sums by shard: what the shards of a run give together is what each gives alone, added in order.

Alone means: its own environments, its own collection with its own `first_env`. Added means: by a
plain loop of this file. Nothing is compared to within rounding but with a single shard.
"""

import copy
import functools
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pairs import pairwise

from vecpg import advantage, update, value
from vecpg import begin as begin_module
from vecpg.advantage import (
    advantages,
    subtract_mean_by_age,
    sum_and_count,
    sums_by_age,
)
from vecpg.config import Config
from vecpg.envs import make_envs
from vecpg.kernels import sums, threads
from vecpg.policy import Policy
from vecpg.policy import cpu as policy_cpu
from vecpg.returns import reward_to_go
from vecpg.rollout import Collector, Rollout, collect
from vecpg.rollout.statistics import episode_statistics
from vecpg.run.stopping import ReturnWindow
from vecpg.train import train
from vecpg.update import by_autograd, by_machine_code, choose_learner, sums_by_machine_code
from vecpg.value import Critic, ValueFunction, fit, predict

SHARDS = 8
NUM_STEPS = 20
SEED = 2**40 + 3
FIELDS = ("obs", "actions", "rewards", "terminations", "truncations", "mask")

# Environments, their number, the form they are stepped in, and the policy's settings. Episodes of
# one collection end by the rule and by limits, and there are several for each environment.
WAYS = {
    "sync": ("CartPole-v1", 16, "sync", {}),
    "async": ("environments:Counting-v0", SHARDS, "async", {}),
    "tensor": ("CartPole-v1", 64, "tensor", {}),
    "tensor, one each": ("CartPole-v1", SHARDS, "tensor", {"hidden_sizes": (5,)}),
    "tensor in torch, dropout": ("CartPole-v1", 64, "tensor", {"dropout": 0.2}),
    "Gaussian": ("Pendulum-v1", 24, "tensor", {"activation": "relu"}),
    "Gaussian in torch": ("Pendulum-v1", 24, "tensor", {"normalize_obs": True}),
    "Gaussian of six, dropout": (
        "environments:Pay-v0",
        16,
        "sync",
        {"dropout": 0.1, "normalize_obs": True, "log_std": "network"},
    ),
    "MultiDiscrete, dropout": ("environments:Dials-v0", 24, "sync", {"dropout": 0.3}),
    "Discrete observations": ("vecpg/LineWorld-v0", 16, "sync", {}),
    "pictures": ("environments:Catch-v0", 16, "sync", {}),
    "masked": ("environments:Masked-v0", 24, "sync", {"dropout": 0.2}),
}
# Those whose environments say which actions are allowed.
MASKED = ("masked",)
# Those whose gradient machine code serves; it goes by autograd too.
SERVED = ("sync", "async", "tensor", "tensor, one each", "Gaussian")
every_way = pytest.mark.parametrize("way", WAYS)


def environments(way, num_envs):
    env_id, _, vectorization, _ = WAYS[way]
    return make_envs(
        env_id,
        num_envs,
        vectorization=vectorization,
        max_episode_steps=12,
        action_masks=way in MASKED,
    )


@functools.cache
def networks(way):
    """A policy and a value function that have seen something."""
    env_id, _, _, settings = WAYS[way]
    envs = make_envs(env_id, 1, max_episode_steps=12)
    observations, actions = envs.single_observation_space, envs.single_action_space
    torch.manual_seed(3)
    policy = Policy(observations, actions, **{"hidden_sizes": (9, 7)} | settings)
    normalizes = settings.get("normalize_obs", False)
    value_function = ValueFunction(observations, hidden_sizes=(8,), normalize_obs=normalizes)
    for parameter in (*policy.network.parameters(), *value_function.network.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    if normalizes:
        for each in (policy.encoder, value_function.encoder):
            each.observe(torch.randn(5, 3, *each.shape) * 30, torch.ones(5, 3, dtype=bool))
    return policy, value_function


def collect_part(way, policy, iteration, first, count, shards):
    envs = environments(way, count)
    try:
        return collect(
            envs,
            policy,
            num_steps=NUM_STEPS,
            seed=SEED,
            iteration=iteration,
            first_env=first,
            shards=shards,
            action_masks=way in MASKED,
        )
    finally:
        envs.close()


def collect_together(way, policy, iteration):
    return collect_part(way, policy, iteration, 0, WAYS[way][1], SHARDS)


def collect_alone(way, policy, iteration):
    num_envs = WAYS[way][1]
    size = num_envs // SHARDS
    return [
        collect_part(way, policy, iteration, first, size, 1) for first in range(0, num_envs, size)
    ]


@functools.cache
def first_collection(way):
    policy = networks(way)[0]
    return collect_together(way, policy, 0), collect_alone(way, policy, 0)


def bits(tensor):
    """What two tensors share if and only if they are the same, NaN and all."""
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().numpy().tobytes()


def same(one, other):
    return [bits(each) for each in one] == [bits(each) for each in other]


def added(parts):
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


# -- Collecting ----------------------------------------------------------------------------------


@every_way
def test_a_shard_is_collected_as_if_it_were_alone(way):
    whole, parts = first_collection(way)
    assert whole.dones.sum() > 1.2 * whole.mask.shape[1] or "Pendulum" in WAYS[way][0]
    assert not whole.mask.all()
    for ours, alone in zip(whole.shards(SHARDS), parts, strict=True):
        for name in (*FIELDS, "final_obs", "final_rows"):
            assert bits(getattr(ours, name)) == bits(getattr(alone, name)), name
        assert (ours.action_masks is None) == (way not in MASKED)
        if ours.action_masks is not None:
            assert bits(ours.action_masks) == bits(alone.action_masks)
        assert ours.stream == alone.stream
    lengths = {len(part.mask) for part in parts}
    # The episodes of some are all of one length.
    assert len(lengths) > 1 or "Gaussian" in way or way == "pictures"
    assert len(whole.mask) == max(lengths)


@pytest.mark.parametrize("way", ["tensor in torch, dropout", "MultiDiscrete, dropout"])
def test_a_shard_goes_through_the_network_by_itself(way):
    """Actions alone would not tell: rounding hardly ever decides."""
    policy, shapes = copy.deepcopy(networks(way)[0]), []
    policy.network.register_forward_hook(lambda *_: None)  # in torch, whatever the policy
    policy.network[0].register_forward_hook(lambda _, given, __: shapes.append(len(given[0])))
    envs = environments(way, WAYS[way][1])
    collect(envs, policy, num_steps=1, seed=1, iteration=0, shards=SHARDS)
    assert set(shapes) == {WAYS[way][1] // SHARDS}


@every_way
def test_what_is_split_is_joined_again(way):
    whole, parts = first_collection(way)
    shards = whole.shards(SHARDS)
    number = torch.arange(1.0, whole.mask.numel() + 1).reshape(whole.mask.shape)
    split = whole.split(number, shards)
    assert [part.shape for part in split] == [part.mask.shape for part in parts]
    joined = whole.join(split)
    assert torch.equal(joined[whole.mask], number[whole.mask])
    beyond = torch.arange(len(joined))[:, None] >= torch.tensor(
        [len(part.mask) for part in parts]
    ).repeat_interleave(whole.mask.shape[1] // SHARDS)
    assert torch.equal(joined, number.masked_fill(beyond, 0.0))
    at = whole.final_rows[:, 0], whole.final_rows[:, 1]
    final = whole.join_final(
        [own[tuple(s.final_rows.t())] for own, s in zip(split, shards, strict=True)]
    )
    assert torch.equal(final, number[at])
    assert len(final) == whole.truncations.sum()
    (alone,) = whole.shards(1)
    assert alone is whole


def test_shards_of_other_sizes_are_refused():
    whole, _ = first_collection("sync")
    for count in (0, -1, 3, 32):
        with pytest.raises(ValueError, match=f"that divides 16 environments, got {count}"):
            whole.shards(count)


# -- Sums ----------------------------------------------------------------------------------------


def of_all_sizes(shape, g):
    """Numbers of which every sum loses digits, others in every order."""
    return torch.randn(shape, generator=g) * 10.0 ** (16 * torch.rand(shape, generator=g) - 8)


def sensitive(whole, parts, dtype=torch.float32, cancelling=True, seed=0):
    """The same rows with rewards whose sums show in which order they were formed.

    Where they are `cancelling`, large ones of two environments, of different shards and at the same
    age, make up for each other, so that it shows in float32 too. What does not count is NaN.
    """
    g = torch.Generator().manual_seed(seed)
    shape, counted = whole.mask.shape, whole.mask
    rewards = of_all_sizes(shape, g)
    if cancelling:
        first = counted & (whole.dones.cumsum(dim=0) - whole.dones.long() == 0)
        one, other = first.chunk(2, dim=1)
        both = one & other & (torch.rand(one.shape, generator=g) < 0.7)
        large = torch.where(both, of_all_sizes(one.shape, g) * 1e4, 0.0)
        rewards = torch.randn(shape, generator=g)
        rewards = torch.where(
            torch.cat([both, both], dim=1), torch.cat([large, -large], dim=1), rewards
        )
    rewards = rewards.masked_fill(~counted, math.nan).to(dtype)
    obs = whole.obs
    if obs.is_floating_point():
        rows = counted.reshape(*shape, *[1] * (obs.ndim - 2))
        obs = torch.where(rows, obs, math.nan)
    return replace(whole, obs=obs, rewards=rewards), [
        replace(part, obs=own_obs, rewards=own_rewards)
        for part, own_obs, own_rewards in zip(
            parts, cut(obs, parts), cut(rewards, parts), strict=True
        )
    ]


def cut(rows, parts):
    """What belongs to each part's rows, as the definition of a shard says."""
    size = rows.shape[1] // SHARDS
    return [
        rows[: len(part.mask), k * size : (k + 1) * size].clone() for k, part in enumerate(parts)
    ]


def values_for(whole, parts):
    """For every row, and every final one, together and alone; NaN where nobody may look."""
    g = torch.Generator().manual_seed(1)
    values, final = torch.randn(2, *whole.mask.shape, generator=g, dtype=whole.rewards.dtype)
    values[~whole.mask] = final[whole.terminations] = math.nan
    own_final = [
        own[tuple(part.final_rows.t())] for own, part in zip(cut(final, parts), parts, strict=True)
    ]
    return values, final[tuple(whole.final_rows.t())], cut(values, parts), own_final


def weights_for(whole, parts, seed=0):
    """For every row, together and alone."""
    weights = of_all_sizes(whole.mask.shape, torch.Generator().manual_seed(seed))
    weights[~whole.mask] = math.nan
    return weights, cut(weights, parts)


# Without discounting backwards large rewards stay where they are.
BASELINES = {
    "none": {"gamma": 0.9},
    "none, full return": {"gamma": 0.9, "weights": "full_return"},
    "mean": {"gamma": 0.0},
    "timestep_mean": {"gamma": 0.0},
    "leave_one_out": {"gamma": 0.0},
    "leave_one_out, full return": {"gamma": 0.0, "weights": "full_return"},
    "value": {"gamma": 0.0},
    "value, bootstrap": {"gamma": 0.9, "bootstrap_truncations": True},
    "value, gae": {"gamma": 0.9, "bootstrap_truncations": True, "weights": "gae"},
}


def advantages_alone(parts, config, values, final_values):
    """The small sums of every shard, added here, and given back to each."""
    plain = replace(config, shards=None, normalize=False)
    if config.baseline != "value":
        plain = replace(plain, baseline="none")
    weights = [
        advantages(*each)
        for each in zip(parts, [plain] * SHARDS, values, final_values, strict=True)
    ]
    masks = [part.mask for part in parts]

    if config.baseline == "mean":
        total, count = added([sum_and_count(*each) for each in zip(weights, masks, strict=True)])
        weights = [
            torch.where(m, w - (total / count).to(w.dtype), 0.0)
            for w, m in zip(weights, masks, strict=True)
        ]
    if config.baseline in ("timestep_mean", "leave_one_out"):
        own = [
            sums_by_age(w, part.mask, part.dones) for w, part in zip(weights, parts, strict=True)
        ]
        sums = torch.zeros(2, max(map(len, masks)), dtype=torch.float64)
        for each in own:
            sums[:, : each.shape[1]] += each
        for w, part in zip(weights, parts, strict=True):
            others = config.baseline == "leave_one_out"
            subtract_mean_by_age(w, part.mask, part.dones, sums, others=others)
    if config.normalize:
        mean, deviation = mean_and_deviation(weights, masks)
        weights = [
            torch.where(m, w - mean, 0.0) / deviation for w, m in zip(weights, masks, strict=True)
        ]
    return weights


def mean_and_deviation(weights, masks):
    """Of all shards, by the numbers, means and squares about them that each has alone."""
    count, mean, squares = 0.0, None, None
    for w, m in zip(weights, masks, strict=True):
        total, own = sum_and_count(w, m)
        own_mean = total / own
        own_squares = torch.where(m, w - own_mean, 0.0).double().square().sum()
        if mean is None:
            count, mean, squares = own, own_mean, own_squares
            continue
        apart, together = own_mean - mean, count + own
        between = apart * apart * count * own / together
        mean, squares = mean + apart * own / together, squares + (own_squares + between)
        count = together
    return mean, (squares / (count - 1)).sqrt()


def advantages_agree(whole, parts, name, normalize):
    config = Config(
        num_envs=whole.mask.shape[1],
        shards=SHARDS,
        baseline=name.split(",")[0],
        normalize=normalize,
        **BASELINES[name],
    )
    values, final_values, own, own_final = values_for(whole, parts)
    result = advantages(whole, config, values, final_values)
    alone = advantages_alone(parts, config, own, own_final)
    assert not result[~whole.mask].any()
    assert result[whole.mask].isfinite().all()
    return same(cut(result, parts), alone)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("way", ["sync", "async", "tensor", "tensor, one each"])
def test_advantages_are_those_of_the_shards_one_by_one(way, name, dtype, normalize):
    assert advantages_agree(*sensitive(*first_collection(way), dtype), name, normalize)


def statistics_agree(whole, parts):
    episodes = episode_statistics(whole, SHARDS)
    alone = [episode_statistics(part) for part in parts]
    window = ReturnWindow(10)
    windows = (
        window.with_iteration(episodes.return_sum.item(), len(episodes.returns)),
        window.with_iteration(
            added([own.returns.sum() for own in alone]).item(),
            sum(len(own.returns) for own in alone),
        ),
    )
    assert bits(episodes.returns) == bits(torch.cat([own.returns for own in alone]))
    assert bits(episodes.lengths) == bits(torch.cat([own.lengths for own in alone]))
    return windows[0].mean == windows[1].mean


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_and_window_are_those_of_the_shards_one_by_one(way, dtype):
    assert statistics_agree(*sensitive(*first_collection(way), dtype, cancelling=False))


def gradient_alone(policy, parts, weights, divisor, ent_coef, backend):
    """The policy gets the shards' gradients, added here; returns the two sums beside it."""
    pairs = list(zip(parts, weights, strict=True))
    if backend == "machine code":
        total = added(
            [next(sums_by_machine_code(policy, [p], [w], divisor, ent_coef)) for p, w in pairs]
        )
        policy_cpu.set_gradients(policy, total[:-2])
        return torch.from_numpy(total[-2:])
    sums, gradients = [], []
    for part, own in pairs:
        by_itself = copy.deepcopy(policy)
        sums.append(torch.stack(by_autograd(by_itself, part, own, divisor, ent_coef)))
        gradients.append([p.grad for p in by_itself.parameters()])
    for parameter, of_shards in zip(policy.parameters(), zip(*gradients, strict=True), strict=True):
        parameter.grad = added([each.double() for each in of_shards]).to(parameter.dtype)
    return added(sums)


def gradient_agrees(whole, parts, policy, backend, seed=0):
    """Whether the gradient does, and whether the sums beside it do."""
    numbers, own = weights_for(whole, parts, seed)
    given = whole.mask.sum(), 0.3 / whole.mask.sum()
    ours, alone = copy.deepcopy(policy), copy.deepcopy(policy)
    differentiate = by_machine_code if backend == "machine code" else by_autograd
    sums = differentiate(ours, whole, numbers, *given, shards=SHARDS)
    expected = gradient_alone(alone, parts, own, *given, backend)
    equal = same(*([p.grad for p in each.parameters()] for each in (ours, alone)))
    return equal, bits(torch.stack(sums)) == bits(expected)


@pytest.mark.parametrize("chunk_rows", [11, 4096])
@pytest.mark.parametrize(
    ("way", "backend"),
    [*((way, "autograd") for way in WAYS), *((way, "machine code") for way in SERVED)],
)
def test_the_gradient_is_that_of_the_shards_one_by_one(monkeypatch, way, backend, chunk_rows):
    policy = networks(way)[0]
    assert (policy_cpu.why_not(policy) is None) == (way in SERVED)
    monkeypatch.setattr(update, "CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(update, "_SLAB_ROWS", chunk_rows)
    pair = sensitive(*first_collection(way))
    assert gradient_agrees(*pair, policy, backend) == (True, True)


def values_agree(whole, parts, value_function, bootstrap):
    """Predictions, then every step of Adam."""
    config = Config(
        num_envs=whole.mask.shape[1],
        shards=SHARDS,
        baseline="value",
        bootstrap_truncations=bootstrap,
        value_steps=6,
        gamma=0.9,
    )
    ours, alone = (Critic(copy.deepcopy(value_function), 0.01) for _ in range(2))
    predicted = predict(ours, whole, SHARDS)
    own = [predict(alone, part) for part in parts]
    equal = same(cut(predicted[0], parts), [values for values, _ in own])
    of_rows = torch.zeros(whole.mask.shape)
    for k, (part, (_, final)) in enumerate(zip(parts, own, strict=True)):
        t, n = part.final_rows.t()
        of_rows[t, n + k * part.mask.shape[1]] = final
    equal &= bits(predicted[1]) == bits(of_rows[tuple(whole.final_rows.t())])
    loss = fit(ours, whole, predicted[1], config).value_loss

    expected = fit_alone(alone, parts, [final for _, final in own], config)
    return equal and states_agree(ours, alone) and bits(loss) == bits(expected)


def fit_alone(critic, parts, final_values, config):
    counted = sum(int(part.mask.sum()) for part in parts)
    examples = []
    for part, final in zip(parts, final_values, strict=True):
        after = part.values_at_truncations(final) if config.bootstrap_truncations else None
        togo = reward_to_go(
            part.rewards, part.dones, config.gamma, final_values=after, mask=part.mask
        )
        examples.append((part.obs[part.mask], togo[part.mask]))
    value_function, losses, chunk_rows = critic.value_function, [], value._CHUNK_ROWS
    for _ in range(config.value_steps):
        each, gradients = [], []
        for obs, targets in examples:
            value_function.zero_grad()
            each.append(torch.zeros((), dtype=torch.float64))
            for x, y in zip(obs.split(chunk_rows), targets.split(chunk_rows), strict=True):
                # The bits of a product may depend on where in memory its rows begin.
                loss = (value_function(x.clone()) - y).square().sum() / counted
                loss.backward()
                each[-1] += loss.detach()
            gradients.append([p.grad for p in value_function.parameters()])
        of_shards = zip(*gradients, strict=True)
        for parameter, own in zip(value_function.parameters(), of_shards, strict=True):
            parameter.grad = added([each.double() for each in own]).float()
        critic.optimizer.step()
        losses.append(added(each))
    for part in parts:
        value_function.encoder.observe(part.obs, part.mask)
    return losses[0]


def states_agree(ours, alone):
    """Parameters, running statistics, and all that the optimizer keeps."""

    def leaves(tree):
        if isinstance(tree, dict):
            return [leaf for key in sorted(tree, key=str) for leaf in leaves(tree[key])]
        return [tree] if isinstance(tree, torch.Tensor) else []

    return same(leaves(ours.state_dict()), leaves(alone.state_dict()))


@pairwise(way=WAYS, bootstrap=[False, True], chunk_rows=[13, 4096])
def test_the_value_function_is_that_of_the_shards_one_by_one(
    monkeypatch, way, bootstrap, chunk_rows
):
    monkeypatch.setattr(value, "_CHUNK_ROWS", chunk_rows)
    whole, parts = first_collection(way)
    assert values_agree(*without_masked(whole, parts), networks(way)[1], bootstrap)


def without_masked(whole, parts):
    """What does not count is NaN; rewards are those of the environment."""
    poisoned, own = sensitive(whole, parts)
    return replace(poisoned, rewards=whole.rewards), [
        replace(part, rewards=original.rewards) for part, original in zip(own, parts, strict=True)
    ]


# -- Whole iterations ----------------------------------------------------------------------------

SETTINGS = {
    "default, entropy": {"ent_coef": 0.01},
    "mean, normalized, by step": {"baseline": "mean", "normalize": True, "reduction": "step"},
    "timestep_mean, clipped": {"baseline": "timestep_mean", "max_grad_norm": 1e-3},
    "value": {"baseline": "value", "value_steps": 3, "bootstrap_truncations": True},
    "gae": {"baseline": "value", "value_steps": 3, "weights": "gae", "normalize": True},
}


class Run:
    """What changes from iteration to iteration."""

    def __init__(self, way, config, policy=None, critic=None):
        known_policy, value_function = copy.deepcopy(networks(way))
        self.policy = known_policy if policy is None else policy
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=config.learning_rate)
        self.critic = critic
        if critic is None and config.baseline == "value":
            self.critic = Critic(value_function, config.value_learning_rate)
        self.window = ReturnWindow(config.return_window)

    def state_dict(self):
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "critic": {} if self.critic is None else self.critic.state_dict(),
        }


def iterate_together(run, way, config, iteration):
    rollout = collect_together(way, run.policy, iteration)
    episodes = episode_statistics(rollout, SHARDS)
    run.window = run.window.with_iteration(episodes.return_sum.item(), len(episodes.returns))
    values, final_values = predict(run.critic, rollout, SHARDS)
    weights = advantages(rollout, config, values, final_values)
    learner = choose_learner(run.policy)
    stats = learner.update(run.policy, run.optimizer, rollout, weights, config)
    fitted = fit(run.critic, rollout, final_values, config)
    loss = None if fitted is None else fitted.value_loss
    return stats.policy_loss, stats.entropy, stats.grad_norm, loss


def iterate_alone(run, way, config, iteration, repaid=None):
    parts = collect_alone(way, run.policy, iteration)
    if repaid is not None:
        length = max(len(part.mask) for part in parts)
        rewards = repaid((length, config.num_envs), iteration)
        parts = [replace(p, rewards=r) for p, r in zip(parts, cut(rewards, parts), strict=True)]
    returns = [episode_statistics(part).returns for part in parts]
    total = added([own.sum() for own in returns]).item()
    run.window = run.window.with_iteration(total, sum(map(len, returns)))
    predicted = [predict(run.critic, part) for part in parts]
    values, final_values = ([own[k] for own in predicted] for k in range(2))
    weights = advantages_alone(parts, config, values, final_values)
    counted = added([part.mask.sum() for part in parts])
    divisor = {"episode": config.num_envs, "step": counted}[config.reduction]
    given = divisor, config.ent_coef / counted, "machine code" if way in SERVED else "autograd"
    surrogate, entropy = gradient_alone(run.policy, parts, weights, *given)
    parameters = list(run.policy.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if config.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
    run.optimizer.step()
    for part in parts:
        run.policy.observe(part.obs, part.mask)
    loss = None if run.critic is None else fit_alone(run.critic, parts, final_values, config)
    return surrogate, entropy / counted, norm, loss


# Each way with two settings, each setting with several ways. Starting processes takes its time.
PAIRS = [
    pytest.param(way, settings, marks=[pytest.mark.slow] if (k + j) % len(SETTINGS) == 2 else [])
    for k, way in enumerate(WAYS)
    for j, settings in enumerate(SETTINGS)
    if way != "async" and (k + j) % len(SETTINGS) in (0, 2)
]


@pytest.mark.parametrize(("way", "settings"), PAIRS)
def test_three_iterations_are_those_of_the_shards_one_by_one(way, settings):
    """Every bit of policy, value function, optimizers, running statistics and return window."""
    config = Config(
        num_envs=WAYS[way][1],
        num_steps=NUM_STEPS,
        shards=SHARDS,
        return_window=2 * WAYS[way][1],
        **SETTINGS[settings],
    )
    ours, alone = Run(way, config), Run(way, config)
    before = copy.deepcopy(ours)
    for iteration in range(3):
        measured = iterate_together(ours, way, config, iteration)
        expected = iterate_alone(alone, way, config, iteration)
        for one, other in zip(measured, expected, strict=True):
            assert (one is None and other is None) or bits(one) == bits(other)
        assert states_agree(ours, alone)
        assert ours.window.mean == alone.window.mean
    assert ours.window.mean is not None
    assert not states_agree(ours, before)


@pytest.mark.parametrize("way", ["sync", "Gaussian of six, dropout"])
def test_one_shard_and_many_agree_to_rounding(way):
    """In everything: the first iteration's rollout is the same."""
    config = Config(num_envs=WAYS[way][1], shards=SHARDS, baseline="value", value_steps=3)
    whole, _ = first_collection(way)
    for settings in ({}, {"normalize": True, "weights": "gae"}):
        results = []
        for shards in (SHARDS, 1):
            run = Run(way, replace(config, shards=shards, **settings))
            values, final_values = predict(run.critic, whole, shards)
            weights = advantages(whole, replace(config, shards=shards, **settings), values)
            episodes = episode_statistics(whole, shards)
            optimizer = torch.optim.SGD(run.policy.parameters(), 0.0)
            given = run.policy, optimizer, whole, weights, replace(config, shards=shards)
            stats = update.update(*given)
            loss = fit(run.critic, whole, final_values, replace(config, shards=shards)).value_loss
            gradient = [p.grad for p in run.policy.parameters()]
            observed = [b for _, b in run.policy.named_buffers()]
            fitted = list(run.critic.value_function.parameters())
            sums = episodes.return_sum, stats.policy_loss, stats.entropy, loss
            results.append([values, final_values, weights, *sums, *gradient, *observed, *fitted])
        for many, one in zip(*results, strict=True):
            torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-4)


# -- Ranks ---------------------------------------------------------------------------------------


class Meeting:
    """What several ranks, each a thread, add up together: by a plain loop, in shard order."""

    def __init__(self, ranks):
        self.ranks, self.calls = ranks, 0
        self._barrier = threading.Barrier(ranks, timeout=60)
        self._given = [None] * ranks

    def combine_of(self, rank):
        def combine(vectors, kept=()):
            self._given[rank] = [*vectors], [*kept]
            self._barrier.wait()
            every = [vector for own, _ in self._given for vector in own]
            assert {(each.dtype, each.shape) for each in every} == {(torch.float64, every[0].shape)}
            result = (
                added([torch.zeros_like(every[0]), *every]),
                [own for _, theirs in self._given for own in theirs],
            )
            self._barrier.wait()
            self.calls += rank == 0
            return result

        return combine

    def of_each(self, function):
        """What a function of every rank, and of what combines, returns, in their order."""
        with ThreadPoolExecutor(self.ranks) as pool:
            futures = [
                pool.submit(function, rank, self.combine_of(rank)) for rank in range(self.ranks)
            ]
            try:
                return [each.result() for each in futures]
            finally:
                self._barrier.abort()


def by_age(weighed, combine, columns):
    """What all ranks' shards come to, in more columns than the longest has."""
    padded = [
        torch.nn.functional.pad(own, (0, columns - own.shape[1])).reshape(-1)
        for own in weighed.sums
    ]
    return combine(padded)[0].reshape(2, columns)


def part_of_rank(parts, rank, ranks):
    """The rank's shards, as one rollout."""
    own = parts[rank * SHARDS // ranks : (rank + 1) * SHARDS // ranks]
    length = max(len(part.mask) for part in own)

    def joined(name):
        rows = [getattr(part, name) for part in own]
        # What was collected together has rows there too.
        after = [each.new_zeros(length - len(each), *each.shape[1:]) for each in rows]
        return torch.cat([torch.cat(pair) for pair in zip(rows, after, strict=True)], dim=1)

    size = own[0].mask.shape[1]
    final_rows = torch.cat(
        [part.final_rows + torch.tensor([0, k * size]) for k, part in enumerate(own)]
    )
    order = (final_rows[:, 0] * size * len(own) + final_rows[:, 1]).argsort()
    return Rollout(
        **{name: joined(name) for name in FIELDS},
        final_obs=torch.cat([part.final_obs for part in own])[order],
        final_rows=final_rows[order],
    )


@pairwise(
    name=BASELINES,
    normalize=[False, True],
    dtype=[torch.float32, torch.float64],
    ranks=[2, 4, 8],
    way=["sync", "tensor", "tensor, one each"],
)
def test_advantages_of_ranks_are_those_of_the_whole(name, normalize, dtype, ranks, way):
    whole, parts = sensitive(*first_collection(way), dtype)
    config = Config(
        num_envs=whole.mask.shape[1],
        shards=SHARDS,
        baseline=name.split(",")[0],
        normalize=normalize,
        **BASELINES[name],
    )
    own = replace(config, num_envs=config.num_envs // ranks, shards=SHARDS // ranks)
    values, final_values, _, _ = values_for(whole, parts)
    expected = advantages(whole, config, values, final_values)
    at = torch.full(whole.mask.shape, math.nan, dtype=dtype)
    at[tuple(whole.final_rows.t())] = final_values
    rollouts = [part_of_rank(parts, rank, ranks) for rank in range(ranks)]
    assert len({len(each.mask) for each in rollouts}) > 1 or ranks == 2
    envs = own.num_envs
    meeting = Meeting(ranks)

    def of_rank(rank, combine):
        rollout = rollouts[rank]
        own_columns = slice(rank * envs, (rank + 1) * envs)
        length = len(rollout.mask)
        weighed = advantage.weigh(
            rollout,
            own,
            values[:length, own_columns],
            at[:length, own_columns][tuple(rollout.final_rows.t())],
        )
        widths = {each.shape[1] for each in weighed.sums}
        if config.baseline in ("none", "value"):
            assert widths == {0}
        elif config.baseline == "mean":
            assert widths == {1}
        room = {"none": 0, "value": 0, "mean": 1}.get(config.baseline, len(whole.mask) + 3)
        total = by_age(weighed, combine, room)
        return advantage.advantages_of(weighed, own, rollout, total, combine)

    found = meeting.of_each(of_rank)
    assert meeting.calls == 1 + normalize
    for rank, result in enumerate(found):
        own_columns = slice(rank * envs, (rank + 1) * envs)
        assert bits(result) == bits(expected[: len(result), own_columns])


def iterate_as_ranks(runs, way, config, iteration):
    """An iteration of every rank; what each reports, and how often they exchanged."""
    ranks = len(runs)
    own = replace(config, num_envs=config.num_envs // ranks, shards=SHARDS // ranks)
    meeting = Meeting(ranks)

    def of_rank(rank, combine):
        run = runs[rank]
        first = rank * own.num_envs
        rollout = collect_part(way, run.policy, iteration, first, own.num_envs, own.shards)
        values, final_values = predict(run.critic, rollout, own.shards)
        weighed = advantage.weigh(rollout, own, values, final_values)
        counted = torch.tensor([float(rollout.mask.sum())], dtype=torch.float64)
        nothing = [torch.zeros_like(counted)] * (own.shards - 1)
        counted = int(combine([counted, *nothing])[0])
        total = by_age(weighed, combine, 1 if config.baseline == "mean" else 200)
        weights = advantage.advantages_of(weighed, own, rollout, total, combine)
        whole = sums.Whole(config.num_envs, counted, combine)
        learner = choose_learner(run.policy, action_masks=rollout.action_masks is not None)
        stats = learner.update(run.policy, run.optimizer, rollout, weights, own, whole=whole)
        fitted = fit(run.critic, rollout, final_values, own, whole=whole, observed=stats.observed)
        loss = None if fitted is None else fitted.value_loss
        return stats.policy_loss, stats.entropy, stats.grad_norm, loss

    return meeting.of_each(of_rank), meeting.calls - 2


RANKS = [
    ("sync", "mean, normalized, by step", 2),
    ("tensor", "default, entropy", 4),
    ("tensor, one each", "timestep_mean, clipped", 8),
    ("Gaussian", "value", 4),
    ("Gaussian in torch", "value", 2),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ("tensor in torch, dropout", "gae", 2),
            ("Gaussian of six, dropout", "gae", 8),
            ("MultiDiscrete, dropout", "mean, normalized, by step", 4),
            ("Discrete observations", "value", 8),
            ("pictures", "default, entropy", 2),
            ("masked", "timestep_mean, clipped", 4),
        ]
    ),
]


@pytest.mark.parametrize(("way", "settings", "ranks"), RANKS)
def test_iterations_of_ranks_are_those_of_one(way, settings, ranks):
    """Every bit of policy, value function, optimizers, running statistics and what is reported."""
    config = Config(num_envs=WAYS[way][1], num_steps=NUM_STEPS, shards=SHARDS, **SETTINGS[settings])
    alone, runs = Run(way, config), [Run(way, config) for _ in range(ranks)]
    for iteration in range(2):
        expected = iterate_together(alone, way, config, iteration)
        reported, calls = iterate_as_ranks(runs, way, config, iteration)
        fits = config.value_steps if config.baseline == "value" else 0
        assert calls == 1 + config.normalize + fits
        for own, run in zip(reported, runs, strict=True):
            for one, other in zip(own, expected, strict=True):
                assert (one is None and other is None) or bits(one) == bits(other)
            assert states_agree(run, alone)


# -- Machine code --------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "shards"), [("tensor, one each", SHARDS), ("Gaussian", 24)])
def test_machine_code_reads_rows_that_lie_close_together(monkeypatch, way, shards):
    """Of other rows it would be compiled once more."""
    whole, parts = first_collection(way)
    total, seen = policy_cpu.sum_gradient, []
    monkeypatch.setattr(
        policy_cpu, "sum_gradient", lambda *given: seen.extend(given[:5]) or total(*given)
    )
    weights, _ = weights_for(whole, parts)
    by_machine_code(networks(way)[0], whole, weights, 1, 0.0, shards=shards)
    assert len(seen) == 5 * shards
    assert all(rows.flags.c_contiguous for rows in seen)


@pytest.mark.parametrize("way", ["tensor", "Gaussian"])
@pytest.mark.parametrize("most_numbers", [1, 2**22])
def test_machine_code_keeps_its_bits_whatever_the_threads_and_in_little_memory(
    monkeypatch, most_numbers, way
):
    """Shards that together would take too much are taken one after the other."""
    policy = networks(way)[0]
    whole, parts = first_collection(way)
    weights, _ = weights_for(whole, parts)
    monkeypatch.setattr(update, "_SLAB_ROWS", 7)
    monkeypatch.setattr(update, "_MOST_NUMBERS", most_numbers)
    run, blocks = threads.run, []
    monkeypatch.setattr(
        update.threads, "run", lambda task, count: blocks.append(count) or run(task, count)
    )
    results = []
    for number in (1, 2, 5):
        with threads.using(number):
            results.append(list(by_machine_code(policy, whole, weights, 1, 0.1, shards=SHARDS)))
            results[-1] += [p.grad for p in policy.parameters()]
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    most = 1 if most_numbers == 1 else update._MOST_SLABS
    assert max(blocks) <= most
    assert len(blocks) >= 3 * (SHARDS if most_numbers == 1 else 2)


# -- Tests of the test ---------------------------------------------------------------------------


def all_at_once(monkeypatch):
    """Sums over all environments, as if there were one shard."""
    monkeypatch.setattr(Rollout, "shards", lambda self, count: [self])


def last_first(monkeypatch):
    """The right sums of shards, added in another order."""
    backwards = SimpleNamespace(
        reduce=lambda function, parts: functools.reduce(function, list(parts)[::-1])
    )
    for module in (advantage, sums):
        monkeypatch.setattr(module, "functools", backwards)


@pytest.mark.parametrize("fault", [all_at_once, last_first])
def test_sums_that_are_formed_otherwise_are_found(monkeypatch, fault):
    """Rounding may come out the same by chance, so there are several attempts."""
    way = "tensor"
    policy, value_function = networks(way)
    pair = first_collection(way)
    monkeypatch.setattr(update, "CHUNK_ROWS", 16)
    fault(monkeypatch)
    unnoticed = {}

    def look(name, agrees):
        unnoticed[name] = unnoticed.get(name, True) and agrees

    for seed in range(6):
        look("returns", statistics_agree(*sensitive(*pair, cancelling=False, seed=seed)))
        for dtype in (torch.float32, torch.float64):
            rows = sensitive(*pair, dtype, seed=seed)
            for name in ("mean", "timestep_mean", "leave_one_out"):
                look((name, dtype), advantages_agree(*rows, name, False))
            for name in ("none", "value"):
                look((name, dtype), advantages_agree(*rows, name, True))
        for backend in ("machine code", "autograd"):
            gradient, beside = gradient_agrees(*pair, policy, backend, seed)
            look((backend, "sums"), beside)
            # What is float32 in the end is added in float64.
            if fault is not last_first:
                look((backend, "gradient"), gradient)
    if fault is not last_first:
        look("values", values_agree(*pair, value_function, False))
    assert {name for name, agrees in unnoticed.items() if agrees} == set()


def test_observations_taken_in_all_at_once_are_found(monkeypatch):
    way = "Gaussian in torch"
    config = Config(num_envs=WAYS[way][1], shards=SHARDS, ent_coef=0.01)
    ours, alone = Run(way, config), Run(way, config)
    iterate_alone(alone, way, config, 0)
    whole, _ = first_collection(way)
    for shard in whole.shards(SHARDS):
        ours.policy.observe(shard.obs, shard.mask)
    assert same(ours.policy.encoder.buffers(), alone.policy.encoder.buffers())
    at_once = Run(way, config).policy
    at_once.observe(whole.obs, whole.mask)
    assert not same(at_once.encoder.buffers(), alone.policy.encoder.buffers())


# -- A run ---------------------------------------------------------------------------------------


CLOCK = {"charts/SPS", "perf/collect_s", "perf/returns_s", "perf/update_s"}


def rows_of(result):
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in CLOCK and v is not None}
        for line in lines
    ]


@pytest.mark.parametrize("way", ["tensor", "Gaussian in torch", "masked"])
def test_a_run_is_that_of_the_shards_one_by_one(tmp_path, monkeypatch, way):
    """Its metrics too, whatever is paid."""
    env_id, num_envs, vectorization, settings = WAYS[way]
    config = Config(
        env_id=env_id,
        max_episode_steps=12,
        num_envs=num_envs,
        num_steps=NUM_STEPS,
        shards=SHARDS,
        vectorization=vectorization,
        hidden_sizes=(9, 7),
        baseline="value",
        value_steps=3,
        bootstrap_truncations=True,
        seed=SEED,
        total_iterations=3,
        return_window=1,
        target_return=None,
        eval_episodes=1,
        progress=False,
        out_dir=str(tmp_path),
        action_masks=way in MASKED,
        **settings,
    )

    def repaid(shape, iteration):
        return of_all_sizes(shape, torch.Generator().manual_seed(iteration))

    real, begun = Collector.collect, []

    def collect_repaid(self, envs, policy, **given):
        begun.append(copy.deepcopy(policy))
        rollout = real(self, envs, policy, **given)
        rewards = repaid(rollout.mask.shape, given["iteration"])
        return replace(rollout, rewards=rewards.masked_fill(~rollout.mask, 0.0))

    monkeypatch.setattr(Collector, "collect", collect_repaid)
    monkeypatch.setattr(
        begin_module, "Critic", lambda *args: begun.append(Critic(*args)) or copy.deepcopy(begun[0])
    )
    rows = rows_of(train(config))
    monkeypatch.undo()
    critic, policy, *_ = begun
    alone = Run(way, config, policy, critic)
    for iteration, row in enumerate(rows):
        surrogate, entropy, norm, loss = iterate_alone(alone, way, config, iteration, repaid)
        assert row["losses/policy_loss"] == surrogate.item()
        assert row["losses/entropy"] == entropy.item()
        assert row["losses/grad_norm"] == norm.item()
        assert row["losses/value_loss"] == loss.item()
        assert row["charts/episodic_return"] == alone.window.mean
    assert rows[-1]["charts/best_return"] == max(row["charts/episodic_return"] for row in rows)


@pytest.mark.parametrize("vectorization", ["sync", "vector_entry_point"])
def test_a_run_with_shards_goes_on_as_one_without_but_for_rounding(tmp_path, vectorization):
    rows = {}
    for shards in (None, 1, 4):
        config = Config(
            num_envs=8,
            shards=shards,
            vectorization=vectorization,
            baseline="value",
            value_steps=2,
            total_iterations=3,
            eval_episodes=1,
            progress=False,
            out_dir=str(tmp_path / str(shards)),
        )
        result = train(config)
        assert result.summary["shards"] == (shards or 1)
        rows[shards] = rows_of(result)
    assert rows[None] == rows[1]
    assert rows[4] != rows[1]
    for many, one in zip(rows[4], rows[1], strict=True):
        assert many == pytest.approx(one, rel=1e-3)
