import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from vecpg import update
from vecpg.envs import make_envs
from vecpg.kernels.matrix import log
from vecpg.noise import Purpose, Stream
from vecpg.policy import Policy
from vecpg.policy import cpu as policy_cpu
from vecpg.policy.sampling import sampler
from vecpg.rollout import Rollout, collect
from vecpg.update import by_autograd, by_machine_code

# Rows, features, hidden sizes, actions: whole blocks of four and of 64, and what is left over.
SHAPES = [
    (1, 1, (), 1),
    (3, 4, (64, 64), 2),
    (63, 5, (33,), 3),
    (65, 6, (7, 9, 11), 2),
    (1000, 3, (256, 5), 18),
]


def make_policy(features, hidden_sizes, actions, activation="tanh", start=0):
    torch.manual_seed(features)
    policy = Policy(
        spaces.Box(-1, 1, (features,)),
        spaces.Discrete(actions, start=start),
        hidden_sizes=hidden_sizes,
        activation=activation,
    )
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=1 / math.sqrt(max(parameter.shape)))
    return policy


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize(("rows", "features", "hidden_sizes", "num_actions"), SHAPES)
def test_actions_are_those_of_the_policy(rows, features, hidden_sizes, num_actions, activation):
    policy = make_policy(features, hidden_sizes, num_actions, activation, start=-4)
    obs = torch.randn(rows, features, generator=torch.Generator().manual_seed(0))
    actions = np.full(rows, 99)
    seed, t = 2**40 + 7, 12
    sampler(policy, Stream(seed, 3, 0, rows), in_machine_code=True)(
        t, obs, torch.from_numpy(actions)
    )
    noise = Stream(seed, 3, 0, rows).uniforms(range(t, t + 1), Purpose.ACTION)[0]
    with torch.no_grad():
        below = torch.softmax(policy(obs).double(), dim=0).cumsum(dim=0)
    # Where the number lies within rounding of a boundary, either side is right.
    clear = (below - noise).abs().min(dim=0).values > 1e-6
    assert clear.float().mean() > 0.99
    expected = policy.sample(obs, noise)
    assert torch.equal(torch.from_numpy(actions)[clear], expected[clear])


def make_rollout(policy, rows, masked=0.3):
    g = torch.Generator().manual_seed(rows)
    mask = torch.rand(rows, 2, generator=g) >= masked
    none = torch.zeros(rows, 2, dtype=torch.bool)
    rollout = Rollout(
        obs=torch.randn(rows, 2, *policy.obs_shape, generator=g),
        actions=torch.randint(0, policy.distribution.num_actions, (rows, 2), generator=g)
        + policy.distribution.first_action,
        rewards=torch.zeros(rows, 2),
        terminations=none,
        truncations=none,
        mask=mask,
        final_obs=torch.zeros(0, *policy.obs_shape),
        final_rows=torch.zeros(0, 2, dtype=torch.int64),
    )
    rollout.obs[~mask] = math.nan
    rollout.actions[~mask] = 10**9
    return rollout, torch.randn(rows, 2, generator=g).masked_fill(~mask, math.nan)


def gradients(differentiate, policy, rollout, advantages):
    policy.zero_grad()
    sums = differentiate(policy, rollout, advantages, 7, 0.3)
    return sums, [parameter.grad.clone() for parameter in policy.parameters()]


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize(("rows", "features", "hidden_sizes", "num_actions"), SHAPES)
def test_the_gradient_is_that_of_autograd(rows, features, hidden_sizes, num_actions, activation):
    policy = make_policy(features, hidden_sizes, num_actions, activation, start=5)
    rollout, advantages = make_rollout(policy, rows)
    sums, ours = gradients(by_machine_code, policy, rollout, advantages)
    expected_sums, expected = gradients(by_autograd, policy, rollout, advantages)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-5)
    scale = max(one.abs().max() for one in expected) + 1e-30
    for one, other in zip(ours, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() / scale < 1e-5


def test_the_gradient_of_many_rows_keeps_its_digits():
    policy = make_policy(4, (64, 64), 2)
    rollout, advantages = make_rollout(policy, 60_000)
    ours = gradients(by_machine_code, policy, rollout, advantages)[1]
    policy.double()
    rollout = Rollout(
        **{
            name: getattr(rollout, name).double()
            if name in ("obs", "rewards", "final_obs")
            else getattr(rollout, name)
            for name in Rollout.__slots__
        }
    )
    exact = gradients(by_autograd, policy, rollout, advantages.double())[1]
    scale = max(one.abs().max() for one in exact)
    for one, other in zip(ours, exact, strict=True):
        assert (one - other).abs().max() / scale < 1e-5


def make_gaussian(features, hidden_sizes, components, activation="tanh"):
    torch.manual_seed(components)
    policy = Policy(
        spaces.Box(-1, 1, (features,)),
        spaces.Box(-1, 1, (components,)),
        hidden_sizes=hidden_sizes,
        activation=activation,
    )
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=1 / math.sqrt(max(parameter.shape)))
    return policy


def make_gaussian_rollout(policy, rows):
    """As `make_rollout`, with actions inside the bounds and far outside."""
    rollout, advantages = make_rollout(make_policy(*policy.obs_shape, (), 2), rows)
    actions = 3 * torch.randn(rows, 2, *policy.action_shape)
    actions[~rollout.mask] = math.nan
    return dataclasses.replace(rollout, actions=actions), advantages


def in_float64(policy, rollout, advantages):
    exact = dataclasses.replace(rollout, obs=rollout.obs.double(), actions=rollout.actions.double())
    return copy.deepcopy(policy).double(), exact, advantages.double()


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize(
    ("rows", "features", "hidden_sizes", "components"), [*SHAPES, (3000, 3, (64, 64), 1)]
)
def test_the_gradient_of_gaussian_actions_is_that_of_float64(
    rows, features, hidden_sizes, components, activation
):
    policy = make_gaussian(features, hidden_sizes, components, activation)
    rollout, advantages = make_gaussian_rollout(policy, rows)
    sums, ours = gradients(by_machine_code, policy, rollout, advantages)
    exact_sums, exact = gradients(by_autograd, *in_float64(policy, rollout, advantages))
    torch.testing.assert_close(sums, exact_sums, rtol=1e-5, atol=1e-5)
    norm = torch.nn.utils.get_total_norm(exact)
    for one, other in zip(ours, exact, strict=True):
        assert (one.dtype, one.shape) == (torch.float32, other.shape)
        assert (one - other).norm() < 1e-6 * norm


def test_a_standard_deviation_near_its_ends_has_its_slope():
    policy = make_gaussian(2, (3,), 4)
    with torch.no_grad():
        policy.distribution.raw_log_std[:] = torch.tensor([-8.0, 8.0, 0.0, -3.0])
        policy.network[-1].weight.zero_()
    rollout, advantages = make_gaussian_rollout(policy, 50)
    # At a distance of a standard deviation or two, whatever it is.
    std = policy.distribution.mean_and_log_std(torch.zeros(4, 1))[1].exp().detach()
    rollout.actions.mul_(std[:, 0] / 3)
    gradients(by_machine_code, policy, rollout, advantages)
    exact = in_float64(policy, rollout, advantages)
    gradients(by_autograd, *exact)
    ours, others = policy.distribution.raw_log_std.grad, exact[0].distribution.raw_log_std.grad
    assert others.abs().min() > 0
    torch.testing.assert_close(ours.double(), others, rtol=1e-4, atol=0)


def test_few_slabs_serve_where_gradients_are_large(monkeypatch):
    policy = make_policy(4, (64, 64), 2)
    rollout, advantages = make_rollout(policy, 30_000)
    expected = gradients(by_machine_code, policy, rollout, advantages)[1]
    slabs, total = [], policy_cpu.sum_gradient

    def counted(obs, *given):
        slabs.append(len(obs))
        return total(obs, *given)

    monkeypatch.setattr(policy_cpu, "sum_gradient", counted)
    for numbers, count in ((1, 1), (3 * 4610 + 300, 3)):
        slabs.clear()
        monkeypatch.setattr(update, "_MOST_NUMBERS", numbers)
        ours = gradients(by_machine_code, policy, rollout, advantages)[1]
        assert len(slabs) == count
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_tanh_keeps_its_digits():
    x = np.concatenate([np.linspace(-12, 12, 200_001), [0.0, 1e-30, 1e30, -1e30]])
    x = x.astype(np.float32)
    ours = np.array([policy_cpu.tanh(value) for value in x])
    exact = np.tanh(x.astype(np.float64))
    assert np.abs(ours - exact).max() < 1e-7
    assert np.abs(ours - torch.tanh(torch.from_numpy(x)).numpy()).max() < 2e-7
    assert (np.abs(ours - exact) <= 2e-7 * np.abs(exact)).all()
    assert policy_cpu.tanh(np.float32(math.inf)) == 1
    assert math.isnan(policy_cpu.tanh(np.float32(math.nan)))


def test_log_keeps_its_digits():
    x = np.concatenate([np.linspace(1, 3, 100_001), np.geomspace(1, 1e30, 100_001)])
    x = x.astype(np.float32)
    ours = np.array([log(value) for value in x], np.float64)
    exact = np.log(x.astype(np.float64))
    assert (np.abs(ours - exact) <= 2e-7 * exact).all()
    assert math.isnan(log(np.float32(math.nan)))


def test_exp_keeps_its_digits():
    x = np.concatenate([np.linspace(-85, 0, 100_001), [-1e-30]]).astype(np.float32)
    ours = np.array([policy_cpu.exp(value) for value in x], np.float64)
    assert np.abs(ours / np.exp(x.astype(np.float64)) - 1).max() < 1e-6
    assert 0 <= policy_cpu.exp(np.float32(-math.inf)) < 1e-37
    assert math.isnan(policy_cpu.exp(np.float32(math.nan)))


def test_what_is_not_served_is_told():
    policy = make_policy(2, (3,), 2)
    assert policy_cpu.why_not(policy) is None
    assert policy_cpu.why_not(make_policy(2, (3,), 2).double()) == "the parameters are not float32"
    assert "more than" in policy_cpu.why_not(make_policy(2, (5000,), 2))
    assert policy_cpu.why_not(policy.to("meta")) == "the policy is on meta"
    for shape, of, reason in (
        ((3,), np.uint8, "its observations are uint8"),
        ((9, 9), np.uint8, "its network is cnn"),
        ((9, 9), np.float32, None),
    ):
        box = spaces.Box(0, 1, shape, of)
        assert policy_cpu.why_not(Policy(box, spaces.Discrete(2))) == reason
    for log_std, reason in (
        ("parameter", None),
        ("network", "its standard deviation comes from the network"),
    ):
        assert policy_cpu.why_not(Policy(box, box, log_std=log_std)) == reason
    several = Policy(box, spaces.MultiDiscrete([2, 3]))
    assert policy_cpu.why_not(several) == "its actions are neither Discrete nor a Box"
    policy = Policy(box, spaces.Discrete(2), network="networks:small")
    assert policy_cpu.why_not(policy) == "its network is networks:small"


def test_policies_that_compute_something_else_are_not_served():
    class Other(Policy):
        pass

    spaces_ = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)
    assert policy_cpu.why_not(Other(*spaces_)) == "Other may compute something else"
    policy = Policy(*spaces_)
    policy.network.insert(1, torch.nn.LayerNorm(64))
    assert policy_cpu.why_not(policy) == "the network was changed"
    policy = Policy(*spaces_)
    policy.network[0].register_forward_hook(lambda *_: None)
    assert policy_cpu.why_not(policy) == "a module has hooks"
    policy = Policy(*spaces_)
    policy.network[2].weight.register_hook(lambda gradient: 2 * gradient)
    assert policy_cpu.why_not(policy) == "a module has hooks"
    policy = Policy(*spaces_)
    policy.network[4] = torch.nn.Linear(64, 2, bias=False)
    assert policy_cpu.why_not(policy) == "the network was changed"
    policy = Policy(*spaces_, hidden_sizes=(64, 64, 64))
    policy.network[4] = policy.network[2]
    assert policy_cpu.why_not(policy) == "the network was changed"
    policy = Policy(*spaces_, normalize_obs=True)
    assert policy_cpu.why_not(policy) == "it normalizes observations"
    policy = Policy(*spaces_)
    policy.network[0].weight.requires_grad_(False)
    assert policy_cpu.why_not(policy) == "a parameter is frozen"


def test_rollouts_of_another_policy_are_refused():
    policy = make_policy(4, (8,), 2)
    rollout, advantages = make_rollout(make_policy(3, (8,), 2), 10)
    with pytest.raises(ValueError, match=r"rollout.obs: expected \(T, N, \*\(4,\)\), got"):
        by_machine_code(policy, rollout, advantages, 1, 0.0)
    other = make_policy(4, (8,), 2, start=5)
    rollout, advantages = make_rollout(other, 10)
    rollout.actions[0] = torch.where(rollout.mask[0], 4, rollout.actions[0])
    rollout.mask[0] = True
    rollout.obs[0], rollout.actions[0] = 0.0, 4
    with pytest.raises(ValueError, match="rollout.actions: expected 5 to 6 where counted, got 4"):
        by_machine_code(other, rollout, advantages.nan_to_num(), 1, 0.0)
    rollout, advantages = make_rollout(make_policy(4, (8,), 9), 9000)
    rollout.actions[5000:] = 0
    with pytest.raises(ValueError, match="rollout.actions: expected 0 to 1 where counted, got 0"):
        by_machine_code(policy, rollout, advantages, 1, 0.0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_gaussian_actions_that_are_not_finite_are_refused(wrong):
    policy = make_gaussian(4, (8,), 2)
    rollout, advantages = make_gaussian_rollout(policy, 9000)
    t, n = rollout.mask.nonzero()[-1].tolist()
    rollout.actions[t, n, 1] = wrong
    message = f"rollout.actions: expected finite numbers where counted, got {wrong}; collect it"
    with pytest.raises(ValueError, match=message):
        by_machine_code(policy, rollout, advantages, 1, 0.0)


def test_actions_of_another_kind_are_refused():
    policy, discrete = make_gaussian(4, (8,), 2), make_policy(4, (8,), 2)
    gaussian_rollout, weights = make_gaussian_rollout(policy, 10)
    wide, _ = make_gaussian_rollout(make_gaussian(4, (8,), 3), 10)
    numbers, _ = make_rollout(discrete, 10)
    for served, rollout, message in (
        (policy, wide, r"\(T, N, \*\(2,\)\) of torch.float32, got \(10, 2, 3\) of torch.float32"),
        (policy, numbers, r"\(T, N, \*\(2,\)\) of torch.float32, got \(10, 2\) of torch.int64"),
        (
            discrete,
            gaussian_rollout,
            r"\(T, N, \*\(\)\) of torch.int64, got \(10, 2, 2\) of torch.f",
        ),
    ):
        with pytest.raises(ValueError, match=f"rollout.actions: expected {message}"):
            by_machine_code(served, rollout, weights, 1, 0.0)


@pytest.mark.parametrize("n", [5, (2, 3)])
def test_observations_of_zeros_and_ones_are_served(n):
    space = spaces.MultiBinary(n)
    features, g = math.prod(space.shape), torch.Generator().manual_seed(0)
    policy = make_policy(features, (7,), 3)
    binary = Policy(space, policy.distribution.space, hidden_sizes=(7,))
    binary.load_state_dict(policy.state_dict())
    assert policy_cpu.why_not(binary) is None
    rollout, advantages = make_rollout(policy, 70)
    bits = torch.randint(0, 2, rollout.obs.shape, generator=g).float()
    rollout.obs[rollout.mask] = bits[rollout.mask]
    shape = *rollout.mask.shape, *space.shape
    shaped = dataclasses.replace(rollout, obs=rollout.obs.reshape(shape))
    sums, found = gradients(by_machine_code, binary, shaped, advantages)
    others, expected = gradients(by_autograd, policy, rollout, advantages)
    torch.testing.assert_close([each.item() for each in sums], [each.item() for each in others])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def collected_with(memory, policy, shards=1):
    """A rollout of nine copies that may keep so many bytes of activations."""
    envs = make_envs("CartPole-v1", 9, vectorization="tensor")
    return collect(
        envs, policy, num_steps=40, seed=3, iteration=0, shards=shards, activation_memory=memory
    )


def gradient_of(policy, rollout):
    weights = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0))
    return gradients(by_machine_code, policy, rollout, weights)[1]


def wide_policy():
    """Kept are the second and the last of its hidden layers, of 144 and 16 numbers in tiles."""
    return make_policy(4, (64, 130, 5), 2)


@pytest.mark.parametrize("rows", [8, 30, 10**6])
def test_activations_that_were_kept_change_no_bit(rows):
    policy, row = wide_policy(), 4 * 9 * (144 + 16)
    expected = gradient_of(policy, collected_with(0, policy))
    rollout = collected_with(rows * row + row - 1, policy)
    kept = rollout.activations.kept
    assert kept.shape[1:] == (9, 160)
    assert len(kept) == min(rows, 2 * 40 + 500)
    few = kept[: len(rollout.mask)]
    few[~rollout.mask[: len(few)].numpy()] = math.nan
    assert all(map(torch.equal, gradient_of(policy, rollout), expected))
    few[few == few] = 0.5
    assert not any(map(torch.equal, gradient_of(policy, rollout)[:2], expected[:2]))


def test_activations_of_another_network_or_other_observations_are_not_taken():
    policy = wide_policy()
    rollout = collected_with(10**6, policy)
    rollout.activations.kept[:] = math.nan
    other = dataclasses.replace(rollout, mask=rollout.mask.clone())
    plain = dataclasses.replace(other, activations=None)
    assert all(map(torch.equal, gradient_of(policy, other), gradient_of(policy, plain)))
    rollout = collected_with(10**6, policy)
    changed = dataclasses.replace(rollout, obs=rollout.obs + 0.01)
    plain = dataclasses.replace(changed, activations=None)
    assert all(map(torch.equal, gradient_of(policy, changed), gradient_of(policy, plain)))
    rollout.obs.add_(0.01)
    assert all(map(torch.equal, gradient_of(policy, rollout), gradient_of(policy, plain)))
    rollout = collected_with(10**6, policy)
    with torch.no_grad():
        policy.network[0].bias[0] += 1.0
    plain = dataclasses.replace(rollout, activations=None)
    assert all(map(torch.equal, gradient_of(policy, rollout), gradient_of(policy, plain)))
    # Nor are they of one with equal parameters that computes something else, or of rows that did
    # not count when they were kept.
    policy = wide_policy()
    rollout = collected_with(10**6, policy)
    plain = dataclasses.replace(rollout, activations=None)
    spaces_ = policy.encoder.space, policy.distribution.space
    other = Policy(*spaces_, hidden_sizes=policy.hidden_sizes, activation="relu")
    other.load_state_dict(policy.state_dict())
    assert all(map(torch.equal, gradient_of(other, rollout), gradient_of(other, plain)))
    rollout.activations.kept[: len(rollout.mask)][~rollout.mask.numpy()] = math.nan
    rollout.mask.fill_(True)
    assert all(map(torch.equal, gradient_of(policy, rollout), gradient_of(policy, plain)))


def test_nothing_is_kept_that_is_as_fast_to_compute():
    narrow = make_policy(4, (63, 5), 2)
    assert collected_with(10**6, narrow).activations is None
    assert collected_with(10**6, wide_policy(), shards=3).activations is None
    assert collected_with(100, wide_policy()).activations is None


def test_memory_of_activations_serves_the_next_rollout():
    policy = wide_policy()
    rollout = collected_with(4 * 2**20, policy)
    place = rollout.activations.kept.ctypes.data
    del rollout
    assert collected_with(4 * 2**20, policy).activations.kept.ctypes.data == place
