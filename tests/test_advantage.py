import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import pairwise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vecpg import advantage
from vecpg.advantage import (
    add_by_age,
    advantages,
    ages,
    cpu,
    normalized,
    sums_by_age,
)
from vecpg.config import Config
from vecpg.rollout import Rollout


def make_rollout(episodes, reset_rows=True, poison=True, seed=0):
    """A rollout with episodes of these lengths, for each environment; NaN where nothing counts."""
    g = torch.Generator().manual_seed(seed)
    gap = int(reset_rows)
    length = max(sum(lengths) + gap * (len(lengths) - 1) for lengths in episodes)
    shape = (length, len(episodes))
    mask, dones = torch.zeros(shape, dtype=bool), torch.zeros(shape, dtype=bool)
    for n, lengths in enumerate(episodes):
        t = 0
        for steps in lengths:
            mask[t : t + steps, n] = True
            dones[t + steps - 1, n] = True
            t += steps + gap
    rewards = torch.randn(shape, generator=g)
    if poison:
        rewards[~mask] = math.nan
    return Rollout(
        obs=torch.zeros(*shape, 1),
        actions=torch.zeros(shape, dtype=torch.int64),
        rewards=rewards,
        terminations=dones,
        truncations=torch.zeros(shape, dtype=bool),
        mask=mask,
        final_obs=torch.zeros(0, 1),
        final_rows=torch.zeros(0, 2, dtype=torch.int64),
    )


def by_hand(rollout, config):
    """The definitions, episode by episode, in float64."""
    rows = {}  # (n, episode, age) -> (t, weight)
    for n in range(rollout.mask.shape[1]):
        number, rewards, times = 0, [], []
        for t in range(rollout.mask.shape[0]):
            if not rollout.mask[t, n]:
                continue
            rewards.append(rollout.rewards[t, n].item())
            times.append(t)
            if rollout.dones[t, n]:
                for age, time in enumerate(times):
                    first = 0 if config.weights == "full_return" else age
                    weight = sum(
                        config.gamma ** (k - first) * r for k, r in enumerate(rewards) if k >= first
                    )
                    rows[n, number, age] = (time, weight)
                number, rewards, times = number + 1, [], []
    out = torch.zeros(rollout.mask.shape, dtype=torch.float64)
    for (n, _, age), (t, weight) in rows.items():
        others = {
            "none": [],
            "mean": [w for _, w in rows.values()],
            "timestep_mean": [w for (_, _, a), (_, w) in rows.items() if a == age],
            "leave_one_out": [w for (m, _, a), (_, w) in rows.items() if a == age and m != n],
        }[config.baseline]
        out[t, n] = weight - (sum(others) / len(others) if others else 0.0)
    if config.normalize:
        values = [out[t, n].item() for (n, _, _), (t, _) in rows.items()]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        for (n, _, _), (t, _) in rows.items():
            out[t, n] = (out[t, n] - mean) / deviation
    return out


def on_meta(length, num_envs, cut=10):
    """A rollout on a device that has shapes and no numbers: whoever asks for one is refused."""
    numbers = torch.empty(length, num_envs, device="meta")
    flags, whole = numbers > 0, torch.empty(cut, 2, dtype=torch.int64, device="meta")
    return Rollout(numbers[:, :, None], flags, numbers, flags, flags, flags, whole, whole)


RAGGED = [[3, 1, 4], [6], [1, 1, 1, 1], [2, 5]]


@pairwise(
    baseline=["none", "mean", "timestep_mean", "leave_one_out"],
    block_rows=[1, 20, 2**18],
    weights=["reward_to_go", "full_return"],
    normalize=[False, True],
    reset_rows=[True, False],
)
def test_advantages_are_the_definition(
    monkeypatch, reset_rows, normalize, weights, baseline, block_rows
):
    monkeypatch.setattr(advantage, "_BLOCK_ROWS", block_rows)
    config = Config(weights=weights, baseline=baseline, normalize=normalize, gamma=0.9)
    rollout = make_rollout(RAGGED, reset_rows)
    result = advantages(rollout, config)
    assert (result[~rollout.mask] == 0).all()
    torch.testing.assert_close(result.double(), by_hand(rollout, config), atol=2e-6, rtol=1e-5)


def test_leave_one_out_by_hand():
    # Returns-to-go at gamma 1: environment 0 has 2, 1; environment 1 has 3, 2, 1, then 1.
    rollout = make_rollout([[2], [3, 1]])
    rollout.rewards[rollout.mask] = 1.0
    result = advantages(rollout, Config(gamma=1.0))
    # Age 0: others of environment 0 are 3 and 1, mean 2; of environment 1 there is 2.
    # Age 1: 1 against 2. Age 2: nobody else is alive, so nothing is subtracted.
    assert result.tolist() == [[2 - 2, 3 - 2], [1 - 2, 2 - 1], [0, 1], [0, 0], [0, 1 - 2]]


def test_a_sole_survivor_keeps_its_return():
    rollout = make_rollout([[5], [1]])
    alone = advantages(rollout, Config(gamma=0.9))[1:, 0]
    plain = advantages(rollout, Config(gamma=0.9, baseline="none"))[1:, 0]
    assert torch.equal(alone, plain)
    assert (alone != 0).all()


def test_with_one_environment_leave_one_out_is_none():
    rollout = make_rollout([[5, 2, 7]])
    assert torch.equal(advantages(rollout, Config()), advantages(rollout, Config(baseline="none")))


def test_the_order_of_environments_does_not_matter():
    order = [2, 0, 3, 1]
    plain, shuffled = make_rollout(RAGGED), make_rollout([RAGGED[n] for n in order])
    for to, origin in enumerate(order):
        shuffled.rewards[:, to] = plain.rewards[:, origin]
    for baseline, weights in itertools.product(
        ("mean", "timestep_mean", "leave_one_out"), ("reward_to_go", "full_return")
    ):
        config = Config(baseline=baseline, weights=weights)
        torch.testing.assert_close(
            advantages(shuffled, config), advantages(plain, config)[:, order]
        )


@pytest.mark.parametrize("value", [0.0, 1.0, -1e6, 0.1, 1e30])
def test_equal_weights_normalize_to_zero(value):
    mask = torch.rand(70, 9) < 0.8
    (result,) = normalized([torch.full((70, 9), value)], [mask])
    assert torch.equal(result, torch.zeros(70, 9))


@pytest.mark.parametrize("value", [0.0, 1.0, -1e6, 0.1, 1e30])
@pytest.mark.parametrize("sizes", [(7, 1, 300), (0, 5), (3, 0, 0, 11), (0, 0, 1), (0, 0)])
def test_equal_weights_of_many_shards_normalize_to_zero(value, sizes):
    """And those of a shard in which nothing counts, or that has no rows, change nothing."""
    values = [torch.full((size + 1, 3), value) for size in sizes]
    masks = [torch.arange(size + 1)[:, None].expand(-1, 3) < size for size in sizes]
    values.append(torch.empty(0, 3))
    masks.append(torch.empty(0, 3, dtype=bool))
    values = [own.masked_fill(~mask, math.nan) for own, mask in zip(values, masks, strict=True)]
    for own in normalized(values, masks):
        assert torch.equal(own, torch.zeros(own.shape))


@pytest.mark.parametrize("sizes", [(7, 1, 300), (0, 5), (3, 0, 0, 11), (1, 1)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_shards_are_normalized_as_all_of_their_rows(sizes, scale):
    g = torch.Generator().manual_seed(1)
    values = [(torch.randn(size, generator=g) + 30) * scale for size in sizes]
    found = normalized(values, [torch.ones(size, dtype=bool) for size in sizes])
    whole = torch.cat(values).double()
    expected = (whole - whole.mean()) / whole.std()
    torch.testing.assert_close(torch.cat(found).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [math.inf, math.nan, 3.4e38])
def test_what_one_shard_has_that_is_not_finite_or_too_large_is_seen_by_all(wrong):
    values = [torch.tensor([1.0]), torch.tensor([wrong, -wrong, 2.0]), torch.tensor([0.0])]
    for own in normalized(values, [torch.ones(len(each), dtype=bool) for each in values]):
        assert own.isnan().all() or wrong == 3.4e38
    alone = normalized([torch.tensor([wrong]), -torch.tensor([wrong])], [torch.tensor([True])] * 2)
    assert all(own.isnan().all() for own in alone)


def test_one_row_normalizes_to_zero():
    rollout = make_rollout([[1]])
    assert advantages(rollout, Config(normalize=True, baseline="none")).tolist() == [[0.0]]


def test_normalized_has_mean_zero_and_deviation_one():
    values = torch.randn(200, 30) * 40 + 1000
    mask = torch.rand(200, 30) < 0.5
    (result,) = normalized([values.masked_fill(~mask, math.nan)], [mask])
    counted = result[mask].double()
    assert abs(counted.mean().item()) < 1e-5
    assert counted.std().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scale", [1e-35, 1e-30, 1e30, 1e38])
def test_numbers_whose_squares_float32_cannot_hold_are_normalized_all_the_same(scale):
    values = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    (result,) = normalized([values * scale], [torch.ones(2, 2, dtype=bool)])
    own = (values * scale).double()
    expected = (own - own.mean()) / own.std()
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_what_is_not_finite_is_not_normalized_away(wrong):
    (result,) = normalized([torch.tensor([1.0, 2.0, wrong])], [torch.ones(3, dtype=bool)])
    assert result.isnan().all()


def test_a_deviation_beyond_the_largest_number_does_not_make_everything_zero():
    values = torch.tensor([3.4e38, -3.4e38])
    (result,) = normalized([values], [torch.ones(2, dtype=bool)])
    assert result.isnan().all()


@pytest.mark.parametrize("baseline", ["none", "mean", "timestep_mean", "leave_one_out"])
def test_where_nothing_counts_everything_is_zero(baseline):
    rollout = make_rollout([[2], [1]])
    rollout.mask[:] = False
    result = advantages(rollout, Config(baseline=baseline, normalize=True))
    assert torch.equal(result, torch.zeros(2, 2))


# -- The expectation is exact --------------------------------------------------------------------

# A decision at every age: 1 goes on (to at most three actions), 0 ends the episode.
THETA = torch.tensor([0.3, -0.6, 0.9], dtype=torch.float64)
GO_ON = torch.sigmoid(THETA)


def all_episodes():
    """Every episode there can be: its actions, its probability and its rewards."""
    for actions in ([0], [1, 0], [1, 1, 0], [1, 1, 1]):
        probability, rewards = 1.0, []
        for age, action in enumerate(actions):
            p = GO_ON[age].item()
            probability *= p if action else 1 - p
            rewards.append(0.5 * (1 + age) if action else 2.0 - age)
        yield actions, probability, rewards


def all_windows(num_steps, steps=0):
    """Every sequence of episodes of one environment under the start window."""
    if steps >= num_steps:
        yield [], 1.0
        return
    for episode in all_episodes():
        for rest, probability in all_windows(num_steps, steps + len(episode[0])):
            yield [episode, *rest], probability * episode[1]


def scores(actions, ages):
    """d log pi / d theta[age] of each action."""
    return torch.where(actions == 1, 1 - GO_ON[ages], -GO_ON[ages])


def estimate(columns, config):
    """The summed gradient / num_envs that these outcomes give, through `advantages`."""
    rollout = make_rollout([[len(actions) for actions, _, _ in column] for column in columns])
    ages = torch.zeros_like(rollout.actions)
    for n, column in enumerate(columns):
        rows = rollout.mask[:, n].nonzero()[:, 0]
        rollout.actions[rows, n] = torch.tensor([a for actions, _, _ in column for a in actions])
        rollout.rewards[rows, n] = torch.tensor([r for _, _, rewards in column for r in rewards])
        ages[rows, n] = torch.tensor([k for actions, _, _ in column for k in range(len(actions))])
    counted = rollout.mask
    terms = scores(rollout.actions, ages) * advantages(rollout, config).double()
    gradient = torch.zeros(3, dtype=torch.float64)
    return gradient.scatter_add_(0, ages[counted], terms[counted]) / len(columns)


def expected_gradient(weights, gamma, num_steps):
    """E[episodes per environment] x the expectation of one episode's estimator."""
    total = torch.zeros(3, dtype=torch.float64)
    for actions, probability, rewards in all_episodes():
        for age, action in enumerate(actions):
            first = 0 if weights == "full_return" else age
            weight = sum(gamma ** (k - first) * r for k, r in enumerate(rewards) if k >= first)
            total[age] += probability * scores(torch.tensor(action), age) * weight
    return total * sum(len(window) * p for window, p in all_windows(num_steps))


@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("weights", ["reward_to_go", "full_return"])
@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "mean", "timestep_mean"])
def test_the_expectation_over_every_outcome_is_the_policy_gradient(
    baseline, weights, num_steps, num_envs
):
    config = Config(baseline=baseline, weights=weights, gamma=0.9)
    total = torch.zeros(3, dtype=torch.float64)
    for outcome in itertools.product(list(all_windows(num_steps)), repeat=num_envs):
        probability = math.prod(p for _, p in outcome)
        total += probability * estimate([window for window, _ in outcome], config)
    error = (total - expected_gradient(weights, 0.9, num_steps)).abs().max().item()
    if baseline in ("none", "leave_one_out"):
        assert error < 1e-6
    else:
        assert error > 1e-2, "these contain the own return, and docs/semantics.md says so"


# -- A learned baseline --------------------------------------------------------------------------


def with_ends(rollout, seed=0):
    """The same rows, each episode ended by the rule, by a limit, or by both, in turn.

    Returns the rollout, V of its observations and of the final ones; NaN where nothing counts.
    """
    rows = rollout.dones.nonzero()
    ends = torch.arange(len(rows)) % 3
    truncations = torch.zeros_like(rollout.mask)
    terminations = torch.zeros_like(rollout.mask)
    truncations[tuple(rows[ends >= 1].t())] = True
    terminations[tuple(rows[ends != 1].t())] = True
    g = torch.Generator().manual_seed(seed)
    final_rows = truncations.nonzero()
    changed = Rollout(
        obs=rollout.obs,
        actions=rollout.actions,
        rewards=rollout.rewards,
        terminations=terminations,
        truncations=truncations,
        mask=rollout.mask,
        final_obs=torch.zeros(len(final_rows), 1),
        final_rows=final_rows,
    )
    values = torch.randn(rollout.mask.shape, generator=g)
    values[~rollout.mask] = math.nan
    final_values = torch.randn(len(final_rows), generator=g)
    both = terminations[tuple(final_rows.t())]
    assert both.any()
    assert (~both).any()
    final_values[both] = math.nan  # which nobody may read
    return changed, values, final_values


def episodes_of(rollout, values, final_values, bootstrap):
    """For each: its rows, rewards, values, and the value after its end, in Python's floats."""
    after = {
        (t, n): value
        for (t, n), value in zip(rollout.final_rows.tolist(), final_values.tolist(), strict=True)
        if bootstrap and not rollout.terminations[t, n]
    }
    for n in range(rollout.mask.shape[1]):
        rows = []
        for t in range(rollout.mask.shape[0]):
            if rollout.mask[t, n]:
                rows.append((t, n))
                if rollout.dones[t, n]:
                    rewards = [rollout.rewards[row].item() for row in rows]
                    yield (
                        rows,
                        rewards,
                        [values[row].item() for row in rows],
                        after.get((t, n), 0.0),
                    )
                    rows = []


@pairwise(
    kind=[("reward_to_go", 0.5), ("full_return", 0.5), ("gae", 0.0), ("gae", 0.8), ("gae", 1.0)],
    block_rows=[1, 20, 2**18],
    bootstrap=[False, True],
)
def test_with_values_advantages_are_the_definition(monkeypatch, kind, block_rows, bootstrap):
    weights, gae_lambda = kind
    monkeypatch.setattr(advantage, "_BLOCK_ROWS", block_rows)
    rollout, values, final_values = with_ends(make_rollout(RAGGED))
    config = Config(
        baseline="value",
        weights=weights,
        gae_lambda=gae_lambda,
        gamma=0.9,
        bootstrap_truncations=bootstrap,
    )
    result = advantages(rollout, config, values, final_values)
    assert (result[~rollout.mask] == 0).all()
    for rows, rewards, v, after in episodes_of(rollout, values, final_values, bootstrap):
        length = len(rows)
        # The sum of what was paid, and of what the last observation is worth.
        paid = [*rewards, after]
        togo = [sum(0.9 ** (k - t) * paid[k] for k in range(t, length + 1)) for t in range(length)]
        following = [*v[1:], after]
        deltas = [rewards[t] + 0.9 * following[t] - v[t] for t in range(length)]
        for t, row in enumerate(rows):
            expected = {
                "reward_to_go": togo[t] - v[t],
                "full_return": togo[0] - v[t],
                "gae": sum((0.9 * gae_lambda) ** (k - t) * deltas[k] for k in range(t, length)),
            }[weights]
            assert result[row].item() == pytest.approx(expected, rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_gae_with_lambda_one_is_the_reward_to_go_minus_v(bootstrap):
    rollout, values, final_values = with_ends(make_rollout(RAGGED))
    settings = {"baseline": "value", "gamma": 0.9, "bootstrap_truncations": bootstrap}
    gae = advantages(
        rollout, Config(weights="gae", gae_lambda=1.0, **settings), values, final_values
    )
    plain = advantages(rollout, Config(**settings), values, final_values)
    torch.testing.assert_close(gae, plain, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("weights", ["reward_to_go", "full_return", "gae"])
def test_bootstrapping_adds_what_follows_a_cut_episode_and_nothing_else(weights):
    rollout, values, final_values = with_ends(make_rollout(RAGGED))
    settings = {"baseline": "value", "weights": weights, "gamma": 0.5, "gae_lambda": 0.0}
    with_, without = (
        advantages(
            rollout, Config(bootstrap_truncations=bootstrap, **settings), values, final_values
        )
        for bootstrap in (True, False)
    )
    difference = with_ - without
    for row, value in zip(rollout.final_rows.tolist(), final_values.tolist(), strict=True):
        cut = not rollout.terminations[tuple(row)]
        if weights == "full_return" and cut:
            continue  # it depends on the length of the episode; the definition is tested above
        expected = 0.5 * value if cut else 0.0
        assert difference[tuple(row)].item() == pytest.approx(expected, abs=1e-6)
    ended_by_the_rule = rollout.dones & ~rollout.truncations
    assert (difference[ended_by_the_rule] == 0).all()
    if weights == "gae":  # at lambda 0 nothing goes further back
        assert (difference[~rollout.truncations] == 0).all()


def test_a_hand_computed_bootstrap():
    # One episode of two steps that pay 1 and 2, cut, with V of 10, 20 and then 40; gamma 1/2.
    rollout, _, _ = with_ends(make_rollout([[2], [1], [1]]))
    rollout.rewards[rollout.mask] = 1.0
    rollout.rewards[1, 0] = 2.0
    rollout.truncations[1, 0], rollout.terminations[1, 0] = True, False
    rollout = Rollout(
        **{name: getattr(rollout, name) for name in Rollout.__slots__}
        | {
            "final_rows": rollout.truncations.nonzero(),
            "final_obs": torch.zeros(int(rollout.truncations.sum()), 1),
        }
    )
    values = torch.zeros(2, 3)
    values[:, 0] = torch.tensor([10.0, 20.0])
    final_values = torch.where(rollout.final_rows[:, 1] == 0, 40.0, 0.0)
    settings = {"baseline": "value", "gamma": 0.5, "bootstrap_truncations": True}

    def column(**more):
        return advantages(rollout, Config(**settings, **more), values, final_values)[:, 0].tolist()

    assert column() == [1 + 1 + 10 - 10, 2 + 20 - 20]
    assert column(weights="full_return") == [12 - 10, 12 - 20]
    assert column(weights="gae", gae_lambda=0.0) == [1 + 10 - 10, 2 + 20 - 20]


def test_values_that_are_needed_and_missing_are_named():
    rollout, values, _ = with_ends(make_rollout(RAGGED))
    for weights in ("reward_to_go", "full_return", "gae"):
        with pytest.raises(ValueError, match=r"^values: expected \(T, N\), got None"):
            advantages(rollout, Config(baseline="value", weights=weights))
        config = Config(baseline="value", weights=weights, bootstrap_truncations=True)
        with pytest.raises(ValueError, match=r"^final_values: expected \(K,\), got None"):
            advantages(rollout, config, values)


def test_values_are_not_looked_at_without_their_baseline():
    rollout = make_rollout(RAGGED)
    values = torch.full(rollout.mask.shape, math.nan)
    assert torch.equal(advantages(rollout, Config(), values), advantages(rollout, Config()))


@pytest.mark.parametrize("baseline", ["none", "mean", "timestep_mean", "leave_one_out", "value"])
def test_equal_returns_give_zero_advantages_not_nan(baseline):
    """Episodes of one step that all pay the same."""
    rollout = make_rollout([[1, 1], [1], [1]])
    rollout.rewards[rollout.mask] = 0.1
    values = torch.full(rollout.mask.shape, 3.7)
    config = Config(baseline=baseline, normalize=True)
    result = advantages(rollout, config, values)
    assert torch.equal(result, torch.zeros(rollout.mask.shape))


@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize(("length", "num_envs"), [(1, 1), (40, 3), (63, 64), (30, 65), (200, 130)])
def test_means_by_age_are_the_same_in_torch_and_on_the_host(monkeypatch, length, num_envs, others):
    g = torch.Generator().manual_seed(num_envs)
    mask = torch.rand(length, num_envs, generator=g) < 0.9
    dones = (torch.rand(length, num_envs, generator=g) < 0.1) & mask
    weights = torch.randn(length, num_envs, generator=g).masked_fill(~mask, torch.nan)
    expected, sums = weights.double(), advantage.sums_by_age(weights.double(), mask, dones)
    advantage.subtract_mean_by_age(expected, mask, dones, sums, others=others)
    for block_envs in (1, 7, 64):
        monkeypatch.setattr(cpu, "_BLOCK_ENVS", block_envs)
        ours = weights.clone()
        own_sums = advantage.sums_by_age(ours, mask, dones)
        torch.testing.assert_close(own_sums, sums, rtol=1e-9, atol=1e-9)
        advantage.subtract_mean_by_age(ours, mask, dones, own_sums, others=others)
        torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_episodes_elsewhere_may_be_longer(monkeypatch, dtype, others):
    """A rank's sums by age are as long as the longest episode of all, and 0 may follow."""
    rollout = make_rollout(RAGGED)
    weights = rollout.rewards.to(dtype)
    rows = rollout.mask, rollout.dones
    sums = sums_by_age(weights, *rows)
    expected = weights.clone()
    advantage.subtract_mean_by_age(expected, *rows, sums, others=others)
    widths = []
    real = cpu._subtract
    monkeypatch.setattr(
        cpu, "_subtract", lambda *given: widths.append(len(given[3])) or real(*given)
    )
    for further in ([], [3.0] * 1000, [0.0] * 1000):
        more = torch.tensor([further, further], dtype=torch.float64)
        found = weights.clone()
        advantage.subtract_mean_by_age(found, *rows, torch.cat([sums, more], dim=1), others=others)
        assert torch.equal(found, expected)
    # Memory is for the own rows alone.
    assert widths == [len(weights)] * 3 * (dtype == torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    episodes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=9),
    reset_rows=st.booleans(),
    seed=st.integers(0, 2**31),
    block_envs=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_sums_by_age_are_their_definition(episodes, reset_rows, seed, block_envs, dtype):
    """Of shards too, which end at different rows; what is masked is NaN."""
    rollout = make_rollout(episodes, reset_rows, seed=seed)
    weights = (rollout.rewards * 10.0 ** (seed % 9)).to(dtype)
    by_age = {}
    for n, lengths in enumerate(episodes):
        own = weights[rollout.mask[:, n], n].tolist()
        for steps in lengths:
            for age in range(steps):
                by_age.setdefault(age, []).append(own.pop(0))
    expected = torch.zeros(2, len(weights), dtype=torch.float64)
    size = torch.zeros(len(weights), dtype=torch.float64)
    for age, own in by_age.items():
        expected[:, age] = torch.tensor([math.fsum(own), len(own)], dtype=torch.float64)
        size[age] = math.fsum(map(abs, own))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_BLOCK_ENVS", block_envs)
        patch.setattr(cpu, "_BLOCK_ROWS", block_envs * len(weights))
        together = sums_by_age(weights, rollout.mask, rollout.dones)
        apart = []
        for n in range(len(episodes)):
            rows = slice(int(rollout.mask[:, n].nonzero().max()) + 1), slice(n, n + 1)
            parts = weights[rows], rollout.mask[rows], rollout.dones[rows]
            apart.append(sums_by_age(*(part.contiguous() for part in parts)))
    for sums in (together, add_by_age(apart)):
        longest = sums.shape[1]
        assert torch.equal(sums[1], expected[1, :longest])
        assert not expected[:, longest:].any()
        assert ((sums[0] - expected[0, :longest]).abs() <= 1e-13 * size[:longest]).all()


def test_sums_by_age_take_no_more_memory_than_a_few_rows_need():
    """A long episode: 64 environments' sums by age would be most of a gigabyte."""
    length = 10**6
    shape = length, 1
    rollout = make_rollout([[3]], reset_rows=False)
    ones, none = torch.ones(shape), torch.zeros(shape, dtype=torch.bool)
    rollout = Rollout(
        obs=ones[:, :, None],
        actions=none.long(),
        rewards=ones,
        terminations=none,
        truncations=none,
        mask=~none,
        final_obs=rollout.final_obs[:0],
        final_rows=rollout.final_rows[:0],
    )
    peaks = []

    def width_of(*arguments):
        peaks.append(arguments[-1])

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_add", "_subtract"):
            patch.setattr(cpu, name, width_of)
        advantages(rollout, Config(baseline="timestep_mean"))
    assert peaks == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rewards_of_other_types_go_through_torch(dtype):
    rollout = make_rollout([[3, 2], [4]])
    plain = advantages(rollout, Config())
    rollout = replace(rollout, rewards=rollout.rewards.to(dtype))
    torch.testing.assert_close(advantages(rollout, Config()).float(), plain, rtol=0.05, atol=0.05)


# -- On a GPU ------------------------------------------------------------------------------------

KINDS = [
    *itertools.product(
        ["reward_to_go", "full_return"],
        ["none", "mean", "timestep_mean", "leave_one_out", "value"],
        [False],
    ),
    ("reward_to_go", "value", True),
    ("full_return", "value", True),
    ("gae", "value", False),
    ("gae", "value", True),
]


class Noted(TorchDispatchMode):
    """Keeps the names of operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def away_from_the_host(monkeypatch):
    """Tensors on the CPU go where those of any other device go, which has no kernels."""
    monkeypatch.setattr(ages, "_on_host", lambda weights: False)


@pairwise(kind=KINDS, normalize=[False, True])
def test_nothing_waits_and_nothing_is_added_in_any_order(monkeypatch, kind, normalize):
    weights, baseline, bootstrap = kind
    away_from_the_host(monkeypatch)
    config = Config(
        weights=weights, baseline=baseline, bootstrap_truncations=bootstrap, normalize=normalize
    )
    values, final_values = (torch.empty(each, device="meta") for each in ((7, 65), 10))
    result = advantages(on_meta(7, 65), config, values, final_values)
    assert (result.shape, result.device.type) == ((7, 65), "meta")
    rollout, values, final_values = with_ends(make_rollout(RAGGED))
    with Noted() as noted:
        advantages(rollout, config, values, final_values)
    # Of CUDA tensors each of these is a wait, or adds atomically.
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique"}
    assert not waits & set(noted.names)
    assert not {"scatter_add", "scatter_add_", "index_add_", "put_"} & set(noted.names)


def test_on_a_gpu_all_environments_are_one_call(monkeypatch):
    """65,536 environments: a block of 2^18 rows would have 524 of them."""
    shapes = []

    def reward_to_go(rewards, *arguments, **options):
        assert rewards.is_contiguous()
        shapes.append(tuple(rewards.shape))
        return torch.empty_like(rewards)

    monkeypatch.setattr(advantage, "reward_to_go", reward_to_go)
    advantages(on_meta(500, 65_536), Config())
    assert shapes == [(500, 65_536)]


def with_rows_at_the_end(rollout, values, count):
    """The same rows, and some in which nothing counts."""
    poison = torch.full((count, rollout.mask.shape[1]), math.nan)
    more = {
        name: nn.functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, count))
        for name in ("obs", "actions", "terminations", "truncations", "mask")
        for rows in [getattr(rollout, name)]
    }
    more["rewards"] = torch.cat([rollout.rewards, poison])
    return replace(rollout, **more), torch.cat([values, poison])


@pytest.mark.parametrize("machine_code", [True, False])
@pairwise(kind=KINDS, normalize=[False, True])
def test_rows_at_the_end_in_which_nothing_counts_change_nothing(
    monkeypatch, kind, normalize, machine_code
):
    weights, baseline, bootstrap = kind
    if not machine_code:
        away_from_the_host(monkeypatch)
    config = Config(
        weights=weights, baseline=baseline, bootstrap_truncations=bootstrap, normalize=normalize
    )
    rollout, values, final_values = with_ends(make_rollout(RAGGED))
    expected = advantages(rollout, config, values, final_values)
    more, more_values = with_rows_at_the_end(rollout, values, 5)
    result = advantages(more, config, more_values, final_values)
    assert not result[-5:].any()
    if baseline == "mean" or normalize:  # sums over all rows are rounded as their number has it
        torch.testing.assert_close(result[:-5], expected)
    else:
        assert torch.equal(result[:-5], expected)
