import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from vecpg import train as train_module
from vecpg.config import Config
from vecpg.envs import make_envs
from vecpg.policy import Policy
from vecpg.policy.distributions import (
    Categorical,
    DiagonalGaussian,
    MultiCategorical,
    distribution_for,
)
from vecpg.rollout import collect
from vecpg.train import train

# The largest number that the generator gives.
LAST = 1 - 2**-24
LOW, HIGH = -5.0, 2.0
DIALS = spaces.MultiDiscrete([2, 3, 1, 5], start=[0, -1, 9, 4])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape, seed=0):
    """Multiples of 2**-24, as the generator gives them."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**24, shape, generator=g) / 2**24


def close(single, double, rtol=1e-5):
    torch.testing.assert_close(single.double(), double, rtol=rtol, atol=2e-6)


def gaussian(actions, log_std="parameter", seed=5):
    distribution = DiagonalGaussian(spaces.Box(-1, 1, (actions,)), log_std)
    if distribution.raw_log_std is not None:
        with torch.no_grad():
            distribution.raw_log_std.copy_(2 * randn(actions, seed=seed))
    return distribution


def log_std_of(raw):
    """A logistic curve from -5 to 2 that is 0 at 0, in plain Python."""
    return LOW + (HIGH - LOW) / (1 + math.exp(-raw) * -HIGH / LOW)


# -- Log-probabilities and entropy ---------------------------------------------------------------


@pytest.mark.parametrize("start", [0, -3, 7])
@pytest.mark.parametrize("actions", [1, 2, 9])
def test_categorical_is_torchs_own(actions, start):
    distribution = Categorical(spaces.Discrete(actions, start=start))
    logits = 3 * randn(actions, 40)
    taken = torch.arange(40) % actions + start
    log_probs, entropy = distribution.log_probs_and_entropy(logits, taken)
    oracle = torch.distributions.Categorical(logits=logits.double().t())
    close(log_probs, oracle.log_prob(taken - start))
    close(entropy, oracle.entropy())
    assert torch.equal(distribution.mode(logits), oracle.probs.argmax(dim=1) + start)


def test_multi_categorical_is_a_product_of_torchs_own():
    distribution = MultiCategorical(DIALS)
    assert (distribution.num_parameters, distribution.num_uniforms) == (11, 4)
    logits = 3 * randn(11, 40)
    starts = torch.from_numpy(DIALS.start)
    taken = torch.arange(40)[:, None] * torch.tensor([1, 2, 3, 4]) % torch.from_numpy(DIALS.nvec)
    log_probs, entropy = distribution.log_probs_and_entropy(logits, taken + starts)
    oracles = [
        torch.distributions.Categorical(logits=own.double().t())
        for own in torch.split(logits, [2, 3, 1, 5])
    ]
    expected = sum(oracle.log_prob(taken[:, i]) for i, oracle in enumerate(oracles))
    close(log_probs, expected)
    close(entropy, sum(oracle.entropy() for oracle in oracles))
    best = torch.stack([oracle.probs.argmax(dim=1) for oracle in oracles], dim=1) + starts
    assert torch.equal(distribution.mode(logits), best)


@pytest.mark.parametrize("log_std", ["parameter", "network"])
@pytest.mark.parametrize("actions", [1, 2, 5])
def test_gaussian_is_torchs_own(actions, log_std):
    distribution = gaussian(actions, log_std)
    parameters = 2 * randn(distribution.num_parameters, 40)
    raw = distribution.raw_log_std
    raw = parameters[actions:] if raw is None else raw[:, None].expand(actions, 40)
    deviation = torch.tensor([[math.exp(log_std_of(x)) for x in row] for row in raw.tolist()])
    oracle = torch.distributions.Independent(
        torch.distributions.Normal(parameters[:actions].double().t(), deviation.double().t()), 1
    )
    taken = 4 * randn(40, actions, seed=1)
    log_probs, entropy = distribution.log_probs_and_entropy(parameters, taken)
    close(log_probs, oracle.log_prob(taken), rtol=1e-4)
    close(entropy, oracle.entropy())
    assert torch.equal(distribution.mode(parameters), parameters[:actions].t())
    assert distribution.mode(parameters).is_contiguous()


def test_a_fresh_gaussian_has_a_standard_deviation_of_one():
    for log_std in ("parameter", "network"):
        distribution = DiagonalGaussian(spaces.Box(-1, 1, (3,)), log_std)
        inside = distribution.mean_and_log_std(torch.zeros(distribution.num_parameters, 1))[1]
        assert inside.abs().max().item() < 1e-6


# -- Drawing -------------------------------------------------------------------------------------


def test_a_categorical_draw_changes_at_the_edges_of_the_distribution_function():
    distribution = Categorical(spaces.Discrete(4, start=10))
    logits = torch.tensor([0.25, 0.125, 0.5, 0.125]).log()[:, None]
    edges = [0.25, 0.375, 0.875]
    for number, edge in enumerate(edges):
        for offset, expected in ((-1e-6, number), (1e-6, number + 1)):
            drawn = distribution.sample(logits, torch.tensor([[edge + offset]]))
            assert drawn.tolist() == [10 + expected]
    ends = distribution.sample(logits.expand(4, 2), torch.tensor([[0.0, LAST]]))
    assert ends.tolist() == [10, 13]


def test_an_action_without_probability_is_never_drawn():
    distribution = Categorical(spaces.Discrete(4))
    logits = torch.tensor([-200.0, 0.0, -200.0, 0.0])[:, None].expand(4, 10_002)
    uniforms = torch.cat([torch.tensor([[0.0, LAST]]), rand(1, 10_000)], dim=1)
    assert set(distribution.sample(logits, uniforms).tolist()) == {1, 3}


def test_multi_categorical_draws_every_component_from_its_own_number():
    distribution = MultiCategorical(DIALS)
    rows = 40_000
    logits = randn(11, 1).expand(11, rows)
    drawn = distribution.sample(logits, rand(4, rows))
    assert drawn.dtype == torch.int64
    assert all(DIALS.contains(row) for row in drawn[:500].numpy())
    parts = [torch.softmax(own[:, 0], dim=0) for own in torch.split(logits, [2, 3, 1, 5])]
    for i, probabilities in enumerate(parts):
        for value, p in enumerate(probabilities.tolist()):
            share = (drawn[:, i] == value + DIALS.start[i]).double().mean().item()
            assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / rows)
    # Independent: the most probable pair is as frequent as the product says.
    p = (parts[1].max() * parts[3].max()).item()
    pair = [int(parts[i].argmax()) + DIALS.start[i] for i in (1, 3)]
    share = ((drawn[:, 1] == pair[0]) & (drawn[:, 3] == pair[1])).double().mean().item()
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / rows)


def distance_to_normal(values):
    """Kolmogorov and Smirnov's: the largest difference of the two distribution functions."""
    values = np.sort(values)
    below = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in values])
    steps = np.arange(len(values) + 1) / len(values)
    return max(np.abs(below - steps[:-1]).max(), np.abs(below - steps[1:]).max())


@pytest.mark.parametrize("actions", [1, 2, 3])
def test_gaussian_draws_are_normal_and_independent(actions):
    rows = 20_000
    distribution = gaussian(actions)
    mean = randn(actions, 1)
    assert distribution.num_uniforms == {1: 2, 2: 2, 3: 4}[actions]
    uniforms = rand(distribution.num_uniforms, rows)
    drawn = distribution.sample(mean.expand(actions, rows), uniforms).detach()
    assert (drawn.shape, drawn.dtype) == ((rows, actions), torch.float32)
    deviations = [math.exp(log_std_of(x)) for x in distribution.raw_log_std.tolist()]
    normals = (drawn.numpy() - mean[:, 0].numpy()) / np.array(deviations)
    for column in normals.T:
        # What a normal variable exceeds in one of ten thousand draws.
        assert abs(column.mean()) < 3.9 / math.sqrt(rows)
        assert abs((column**2).mean() - 1) < 3.9 * math.sqrt(2 / rows)
        assert abs((column**3).mean()) < 3.9 * math.sqrt(15 / rows)
        assert abs((column**4).mean() - 3) < 3.9 * math.sqrt(96 / rows)
        assert distance_to_normal(column) < 2.2 / math.sqrt(rows)
    for i in range(actions):
        for j in range(i):
            for one, other in ((normals[:, i], normals[:, j]), (normals[:, i], normals[:, j] ** 2)):
                product = (one - one.mean()) * (other - other.mean())
                assert abs(product.mean()) < 3.9 * product.std() / math.sqrt(rows)


def test_the_check_of_normality_sees_another_distribution():
    """A test of the test."""
    rows = 20_000
    sums = 2 * np.sum(rand(3, rows).numpy(), axis=0) - 3  # of mean 0 and deviation 1, nearly normal
    rounded = np.round(randn(rows).numpy(), 1)
    assert distance_to_normal(rounded) > 2.2 / math.sqrt(rows)
    assert abs((sums**4).mean() - 3) > 3.9 * math.sqrt(96 / rows)


def test_gaussian_draws_at_the_ends_are_finite():
    ends = torch.tensor([0.0, LAST])
    uniforms = torch.cartesian_prod(ends, ends, ends, ends).t()
    drawn = gaussian(3).sample(torch.zeros(3, 16), uniforms)
    assert drawn.isfinite().all()
    # The farthest there is: sqrt(-2 log 2**-24) standard deviations.
    standard = DiagonalGaussian(spaces.Box(-1, 1, (1,))).sample(torch.zeros(1, 4), uniforms[2:, :4])
    assert standard.abs().max().item() == pytest.approx(math.sqrt(48 * math.log(2)), rel=1e-5)


# -- The standard deviation stays inside its range -----------------------------------------------


@pytest.mark.parametrize("log_std", ["parameter", "network"])
@pytest.mark.parametrize("raw", [-1e9, -1e30, -20.0, 20.0, 1e9, 1e30])
def test_log_std_stays_inside_its_range_whatever_the_parameter(raw, log_std):
    distribution = gaussian(3, log_std)
    parameters = torch.zeros(distribution.num_parameters, 4)
    if log_std == "parameter":
        with torch.no_grad():
            distribution.raw_log_std.fill_(raw)
    else:
        parameters[3:] = raw
    inside = distribution.mean_and_log_std(parameters)[1]
    assert ((inside >= LOW) & (inside <= HIGH)).all()
    assert inside.flatten()[0].item() == pytest.approx(LOW if raw < 0 else HIGH, abs=1e-4)
    drawn = distribution.sample(parameters, rand(4, 4))
    log_probs, entropy = distribution.log_probs_and_entropy(parameters, drawn)
    assert drawn.isfinite().all()
    assert log_probs.isfinite().all()
    assert entropy.isfinite().all()


@pytest.mark.parametrize("log_std", ["parameter", "network"])
def test_a_gradient_leads_back_from_beyond_the_range(log_std):
    for raw in (-8.0, 8.0):
        distribution = gaussian(1, log_std)
        parameters = torch.zeros(distribution.num_parameters, 1)
        place = distribution.raw_log_std if log_std == "parameter" else parameters
        with torch.no_grad():
            place[-1] = raw
        place.requires_grad_()
        entropy = distribution.log_probs_and_entropy(parameters, torch.zeros(1, 1))[1]
        (slope,) = torch.autograd.grad(entropy.sum(), place)
        assert slope[-1].item() > 1e-4


@pytest.mark.parametrize("log_std", ["parameter", "network"])
def test_log_std_stays_inside_its_range_at_a_large_reward_scale(tmp_path, monkeypatch, log_std):
    inside = []
    real = train_module.update

    def update(policy, optimizer, rollout, *rest, **settings):
        stats = real(policy, optimizer, rollout, *rest, **settings)
        with torch.no_grad():
            parameters = policy(rollout.obs[rollout.mask])
            inside.append(policy.distribution.mean_and_log_std(parameters)[1])
        return stats

    monkeypatch.setattr(train_module, "update", update)
    result = train(
        Config(
            env_id="environments:Pay-v0",
            env_kwargs={"scale": 1e6},
            log_std=log_std,
            num_envs=8,
            learning_rate=1.0,
            total_iterations=8,
            eval_episodes=2,
            out_dir=str(tmp_path),
            progress=False,
        )
    )
    assert len(inside) == 8
    for values in inside:
        assert ((values >= LOW) & (values <= HIGH)).all()
    assert (inside[-1] - inside[0]).abs().max() > 0.1, "it should have been pushed"
    assert all(parameter.isfinite().all() for parameter in result.policy.parameters())


# -- What the environment gets -------------------------------------------------------------------


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 2, (2, 3), np.float64),
        spaces.Box(np.float32([-1, -np.inf, 0]), np.float32([np.inf, 1, 0.1])),
        spaces.Box(-0.25, 0.25, (1,), np.float16),
    ],
    ids=str,
)
def test_box_actions_are_shaped_and_clipped(space):
    size = math.prod(space.shape)
    drawn = 3 * randn(50, size)
    kept = drawn.clone()
    given = distribution_for(space, "parameter").for_env(drawn.numpy())
    assert torch.equal(drawn, kept)
    assert (given.dtype, given.shape) == (space.dtype, (50, *space.shape))
    assert all(space.contains(one) for one in given)
    low, high = space.low.reshape(-1), space.high.reshape(-1)
    for row in range(50):
        for i in range(size):
            expected = min(max(drawn[row, i].item(), low[i]), high[i])
            assert given[row].reshape(-1)[i] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_discrete_actions_are_of_the_spaces_type(dtype):
    space = spaces.MultiDiscrete([3, 4], dtype)
    given = distribution_for(space, "parameter").for_env(np.array([[2, 3], [0, 1]]))
    assert given.tolist() == [[2, 3], [0, 1]]
    assert all(space.contains(one) for one in given)
    space = spaces.Discrete(5, dtype=dtype)
    given = distribution_for(space, "parameter").for_env(np.array([2, 4]))
    assert given.tolist() == [2, 4]
    assert all(space.contains(one) for one in given)


@pytest.mark.parametrize("n", [1, 4, (4,), (2, 3)])
def test_zeros_and_ones_are_drawn_as_components_of_two_values(n):
    space = spaces.MultiBinary(n)
    size = math.prod(space.shape)
    ours = distribution_for(space, "parameter")
    twos = distribution_for(spaces.MultiDiscrete([2] * size), "parameter")
    assert (ours.shape, ours.dtype) == ((size,), torch.int64)
    assert (ours.num_parameters, ours.num_uniforms) == (2 * size, size)
    logits = randn(2 * size, 40)
    drawn = ours.sample(logits, torch.rand(size, 40, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(
        drawn,
        twos.sample(logits, torch.rand(size, 40, generator=torch.Generator().manual_seed(1))),
    )
    assert torch.equal(ours.mode(logits), twos.mode(logits))
    for one, other in zip(
        ours.log_probs_and_entropy(logits, drawn),
        twos.log_probs_and_entropy(logits, drawn),
        strict=True,
    ):
        assert torch.equal(one, other)
    # Each component by itself: the logistic function of the difference of its two numbers.
    up = torch.sigmoid((logits[1::2] - logits[::2]).double()).mT
    each = torch.where(drawn == 1, up, 1 - up).log().sum(dim=1)
    torch.testing.assert_close(ours.log_probs_and_entropy(logits, drawn)[0].double(), each)

    given = ours.for_env(drawn.numpy())
    assert (given.dtype, given.shape) == (space.dtype, (40, *space.shape))
    assert all(space.contains(one) for one in given)
    assert given.reshape(40, size).tolist() == drawn.tolist()
    given[:] = 7
    assert set(drawn.flatten().tolist()) == {0, 1}


def test_stored_actions_are_those_that_were_drawn_not_the_clipped():
    """`Pay` itself refuses actions outside its bounds, and pays for those it got."""
    envs = make_envs("environments:Pay-v0", 20)
    torch.manual_seed(0)
    policy = Policy(envs.single_observation_space, envs.single_action_space)
    rollout = collect(envs, policy, num_steps=1, seed=1, iteration=0)
    assert (rollout.actions.shape, rollout.actions.dtype) == ((5, 20, 6), torch.float32)
    assert rollout.actions.abs().max() > 2, "a standard deviation is 1, and the bounds are 0.5"
    clipped = rollout.actions.double().clamp(-0.5, 0.5).sum(dim=2)
    torch.testing.assert_close(rollout.rewards.double(), clipped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_gaussian_action_that_is_not_finite_is_named_and_passed_to_no_environment(wrong):
    gaussian = distribution_for(spaces.Box(-1, 1, (2, 3)), "parameter")
    actions = np.full((4, 6), 1e38, np.float32)  # the sum of their squares proves nothing
    assert gaussian.for_env(actions).tolist() == np.ones((4, 2, 3)).tolist()
    actions[2, 4] = wrong
    with pytest.raises(FloatingPointError, match=rf"environment 2 is .*{wrong}.*--learning-rate"):
        gaussian.for_env(actions)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Text(2), "supported: Discrete, MultiBinary, MultiDiscrete, Box"),
        (spaces.MultiDiscrete([[2, 3]]), "supported: MultiDiscrete of one dimension"),
        (spaces.Box(0, 9, (2,), np.int64), "supported: Box of floating-point numbers"),
    ],
)
def test_another_space_is_refused_with_what_is_supported(space, message):
    with pytest.raises(ValueError, match=f"action space .* is not supported; {message}"):
        distribution_for(space, "parameter")


# -- Action masks --------------------------------------------------------------------------------


def masks_of(sizes, rows, seed=3):
    """(A, rows) bool: each component allows something, and some rows a single value of each."""
    g = torch.Generator().manual_seed(seed)
    parts = []
    for size in sizes:
        allowed = torch.rand(size, rows, generator=g) < 0.4
        allowed[torch.randint(size, (rows,), generator=g), torch.arange(rows)] = True
        parts.append(allowed)
    return torch.cat(parts)


def over_the_allowed(logits, mask):
    """Of each row the log-probabilities of the allowed values alone, in float64, and which."""
    for n in range(logits.shape[1]):
        kept = mask[:, n].nonzero()[:, 0]
        yield kept, torch.log_softmax(logits[kept, n].double(), dim=0)


@pytest.mark.parametrize("scale", [3.0, 300.0, 1e30])
@pytest.mark.parametrize("start", [0, -3])
@pytest.mark.parametrize("actions", [1, 2, 9])
def test_a_masked_categorical_is_one_over_the_allowed_alone(actions, start, scale):
    distribution = Categorical(spaces.Discrete(actions, start=start))
    logits, mask = scale * randn(actions, 60), masks_of([actions], 60)
    each = [*over_the_allowed(logits, mask)]
    taken = torch.stack([kept[n % len(kept)] for n, (kept, _) in enumerate(each)])
    log_probs, entropy = distribution.log_probs_and_entropy(logits, taken + start, mask)
    close(log_probs, torch.stack([own[n % len(own)] for n, (_, own) in enumerate(each)]))
    close(entropy, torch.stack([-(own.exp() * own).sum() for _, own in each]))
    best = torch.stack([kept[own.argmax()] for kept, own in each])
    assert torch.equal(distribution.mode(logits, mask), best + start)


def test_masks_of_components_are_their_own():
    distribution = MultiCategorical(DIALS)
    sizes = distribution.mask_sizes
    assert sizes == [2, 3, 1, 5]
    logits, mask, uniforms = 3 * randn(11, 40), masks_of(sizes, 40), rand(4, 40)
    drawn = distribution.sample(logits, uniforms, mask)
    log_probs, entropy = distribution.log_probs_and_entropy(logits, drawn, mask)
    best = distribution.mode(logits, mask)
    expected = torch.zeros(2, 40)
    cut = zip(*(torch.split(each, sizes) for each in (logits, mask)), strict=True)
    for i, (own, own_mask) in enumerate(cut):
        part = Categorical(spaces.Discrete(sizes[i], start=int(DIALS.start[i])))
        assert torch.equal(drawn[:, i], part.sample(own, uniforms[i : i + 1], own_mask))
        assert torch.equal(best[:, i], part.mode(own, own_mask))
        expected += torch.stack(part.log_probs_and_entropy(own, drawn[:, i], own_mask))
    torch.testing.assert_close(torch.stack([log_probs, entropy]), expected)


@pytest.mark.parametrize("space", [spaces.Discrete(7, start=2), DIALS], ids=str)
def test_a_mask_that_allows_all_changes_no_bit(space):
    distribution = distribution_for(space, "parameter")
    logits = 3 * randn(distribution.num_parameters, 500)
    mask = torch.ones(logits.shape, dtype=torch.bool)
    uniforms = rand(distribution.num_uniforms, 500)
    drawn = distribution.sample(logits, uniforms)
    assert torch.equal(distribution.sample(logits, uniforms, mask), drawn)
    assert torch.equal(distribution.mode(logits, mask), distribution.mode(logits))
    for one, other in zip(
        distribution.log_probs_and_entropy(logits, drawn, mask),
        distribution.log_probs_and_entropy(logits, drawn),
        strict=True,
    ):
        assert torch.equal(one, other)


def uniforms_at_the_edges(logits, mask):
    """Both ends, and around every sum of probabilities the neighbouring numbers of both kinds."""
    sums = torch.softmax(torch.where(mask, logits, -math.inf), dim=0).cumsum(dim=0)
    for shift in range(-3, 4):
        yield sums.clamp(0, LAST) + shift * 2.0**-24
        moved = sums.clone()
        for _ in range(abs(shift)):
            moved = torch.nextafter(moved, torch.full_like(moved, 2.0 * (shift > 0)))
        yield moved
    yield torch.zeros_like(sums)
    yield torch.full_like(sums, LAST)


@pytest.mark.parametrize("allowed", ["any", "first", "last", "middle", "ends", "one"])
@pytest.mark.parametrize("actions", [2, 3, 10, 300])
def test_no_number_draws_what_is_not_allowed(actions, allowed):
    """Also where sums end below 1 by rounding, and the number lies beyond the last of them."""
    rows = 100
    distribution = Categorical(spaces.Discrete(actions, start=-2))
    place = torch.arange(actions)[:, None].expand(actions, rows)
    some = max(1, actions // 3)
    mask = {
        "any": masks_of([actions], rows),
        "first": place < some,
        "last": place >= actions - some,
        "middle": (place > 0) & (place < actions - 1) if actions > 2 else place == 1,
        "ends": (place == 0) | (place == actions - 1),
        "one": place == torch.arange(rows) % actions,
    }[allowed].clone()
    beyond = 0
    for scale in (0.0, 1e-6, 1.0, 5.0, 60.0):
        logits = scale * randn(actions, rows)
        # What may not be taken may be what the network wants most.
        logits = torch.where(mask, logits, 100 * randn(actions, rows, seed=1).abs())
        sums = torch.softmax(torch.where(mask, logits, -math.inf), dim=0).cumsum(dim=0)
        for numbers in uniforms_at_the_edges(logits, mask):
            for row in numbers.clamp(0, LAST)[:: max(1, actions // 12)]:
                drawn = distribution.sample(logits, row[None], mask) + 2
                assert mask.gather(0, drawn[None]).all()
                beyond += (sums[-1] <= row).sum().item()
    if actions > 9 and allowed != "one":
        assert beyond > 0, "no number was beyond the last sum"


def test_draws_are_as_frequent_as_the_masked_distribution_says():
    rows = 40_000
    distribution = Categorical(spaces.Discrete(6, start=1))
    mask = torch.tensor([False, True, False, True, True, False])
    logits = randn(6)
    drawn = distribution.sample(
        logits[:, None].expand(6, rows), rand(1, rows), mask[:, None].expand(6, rows)
    )
    odds = torch.where(mask, logits.double().exp(), 0.0)
    for number, p in enumerate((odds / odds.sum()).tolist()):
        share = (drawn == number + 1).double().mean().item()
        assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / rows)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e30])
@pytest.mark.parametrize("what", [0, 1], ids=["log-probability", "entropy"])
def test_the_gradient_is_that_of_the_masked_distribution_and_never_nan(what, scale):
    """In float64, of the allowed logits alone; exactly 0 for the rest and where one is alone."""
    logits = (scale * randn(6, 80)).requires_grad_()
    mask = masks_of([6], 80)
    taken = torch.stack([kept[-1] for kept, _ in over_the_allowed(logits.detach(), mask)])
    found = Categorical(spaces.Discrete(6)).log_probs_and_entropy(logits, taken, mask)
    found[what].sum().backward()
    own = logits.detach().double().requires_grad_()
    total = sum(
        (each[-1] if what == 0 else -(each.exp() * each).sum())
        for _, each in over_the_allowed(own, mask)
    )
    total.backward()
    torch.testing.assert_close(logits.grad.double(), own.grad, rtol=1e-4, atol=1e-5)
    assert (logits.grad[~mask] == 0).all()
    alone = mask.sum(dim=0) == 1
    assert alone.sum() >= 5
    assert (logits.grad[:, alone] == 0).all()
    assert (found[what][alone] == 0).all()
