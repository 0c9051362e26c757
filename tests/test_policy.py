import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from vecpg.policy import Policy

BOX = spaces.Box(-1, 1, (2,))


def make_policy(actions=3, start=0, **kwargs):
    torch.manual_seed(0)
    policy = Policy(spaces.Box(-1, 1, (2, 2)), spaces.Discrete(actions, start=start), **kwargs)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return policy


def probabilities(policy, obs):
    """Softmax of the network's output, without the policy's own arithmetic."""
    logits = policy.network(obs.reshape(len(obs), -1)).double()
    return torch.exp(logits) / torch.exp(logits).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("actions", [1, 2, 3, 18])
def test_log_probs_and_entropy_are_those_of_the_softmax(actions):
    policy = make_policy(actions, start=-2)
    obs = torch.randn(7, 2, 2)
    taken = torch.randint(0, actions, (7,)) - 2
    log_probs, entropy = policy.log_probs_and_entropy(obs, taken)
    expected = probabilities(policy, obs)
    picked = expected[torch.arange(7), taken + 2]
    torch.testing.assert_close(log_probs.double(), picked.log(), atol=1e-6, rtol=1e-5)
    by_hand = torch.stack([-sum(p * math.log(p) for p in row) for row in expected.detach()])
    torch.testing.assert_close(entropy.double(), by_hand, atol=1e-6, rtol=1e-5)


def test_sampling_inverts_the_distribution_function():
    policy = make_policy(4, start=10)
    obs = torch.randn(1, 2, 2)
    edges = probabilities(policy, obs)[0].cumsum(0).tolist()
    for action, (low, high) in enumerate(zip([0.0, *edges], edges, strict=False)):
        inside = torch.tensor([low + 1e-4, (low + high) / 2, high - 1e-4])
        drawn = policy.sample(obs.expand(3, 2, 2), inside[None])
        assert drawn.tolist() == [10 + action] * 3


def test_sampling_at_the_ends_stays_inside_the_action_space():
    policy = make_policy(3)
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert policy.sample(torch.zeros(2, 2, 2), ends[None]).tolist() == [0, 2]


def test_an_observation_that_is_not_a_number_still_gives_a_legal_action():
    drawn = make_policy(3).sample(torch.full((1, 2, 2), torch.nan), torch.tensor([[0.7]]))
    assert drawn.tolist() == [0]


def test_act_takes_one_observation_or_a_batch_and_gives_back_the_same_kind():
    policy = make_policy(3, start=5)
    batch = np.random.default_rng(0).normal(size=(6, 2, 2))
    actions = policy.act(batch)
    expected = probabilities(policy, torch.from_numpy(batch).float()).argmax(dim=1) + 5
    assert actions.tolist() == expected.tolist()
    single = policy.act(batch[3])
    assert isinstance(single, np.int64)
    assert spaces.Discrete(3, start=5).contains(single)
    assert single == expected[3]
    as_tensor = policy.act(torch.from_numpy(batch))
    assert isinstance(as_tensor, torch.Tensor)
    assert torch.equal(as_tensor, expected)


def test_act_draws_with_the_generator_it_is_given():
    policy = make_policy(2)
    obs = np.zeros((20000, 2, 2), np.float32)
    drawn = policy.act(obs, greedy=False, generator=torch.Generator().manual_seed(1))
    again = policy.act(obs, greedy=False, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(drawn, again)
    p = probabilities(policy, torch.zeros(1, 2, 2))[0, 1].item()
    assert abs(drawn.mean() - p) < 4 * math.sqrt(p * (1 - p) / 20000)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 3, 2), (1, 1, 2, 2)])
def test_act_refuses_another_shape(shape):
    with pytest.raises(ValueError, match=r"expected shape \(2, 2\)"):
        make_policy().act(np.zeros(shape))


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (spaces.Text(4), spaces.Discrete(2), r"observation space Text.*: Box, Discrete, MultiB"),
        (
            spaces.Dict(a=BOX),
            spaces.Discrete(2),
            r"observation space Dict.*: .*; .* --wrappers gymnasium.wrappers:FlattenObservation$",
        ),
        (BOX, spaces.Tuple([BOX]), r"action space Tuple.*: Discrete, MultiBinary, MultiDiscrete"),
        (BOX, spaces.Dict(a=BOX), r"action space Dict.*: Discrete, MultiBinary, MultiDiscrete"),
        (spaces.Box(-1, 1, (0,)), BOX, r"observation space Box.* holds no numbers.* \(0,\)$"),
        (spaces.Box(-1, 1, (3, 0)), BOX, r"observation space Box.* holds no numbers.* \(3, 0\)$"),
        (spaces.MultiDiscrete([]), BOX, r"observation space MultiDiscrete.* holds no numbers"),
        (BOX, spaces.Box(-1, 1, (0,)), r"action space Box.* holds no numbers.* \(0,\)$"),
        (BOX, spaces.MultiDiscrete([]), r"action space MultiDiscrete.* holds no numbers"),
        (BOX, spaces.MultiDiscrete([[2, 3]]), r"action space MultiDiscrete.*: .* of one dimension"),
        (BOX, spaces.Box(0, 9, (2,), np.int64), r"action space Box.*: Box of floating-point"),
    ],
)
def test_an_unsupported_space_is_named_with_what_is_supported(observation, action, message):
    with pytest.raises(ValueError, match=message):
        Policy(observation, action)


def test_a_fresh_policy_has_no_preference():
    policy = Policy(spaces.Box(-1, 1, (2,)), spaces.Discrete(4))
    assert probabilities(policy, torch.randn(50, 2)).max() < 0.26


def test_a_description_builds_the_same_network_again():
    policy = make_policy(3, start=5, hidden_sizes=(7, 5), activation="relu")
    twin = Policy.from_description(policy.description())
    twin.load_state_dict(policy.state_dict())
    obs = np.random.default_rng(0).normal(size=(50, 2, 2))
    assert np.array_equal(policy.act(obs), twin.act(obs))
    assert any(isinstance(layer, torch.nn.ReLU) for layer in twin.network)


# -- Action masks --------------------------------------------------------------------------------


def masks_of(rows, actions, seed=1):
    """(rows, actions) bool that allow something each; the last rows a single action."""
    rng = np.random.default_rng(seed)
    masks = rng.random((rows, actions)) < 0.5
    masks[rows // 2 :] = False
    masks[np.arange(rows), rng.integers(actions, size=rows)] = True
    return masks


def test_act_takes_the_most_probable_action_that_is_allowed():
    policy = make_policy(5, start=-2)
    obs, masks = np.random.default_rng(0).normal(size=(40, 2, 2)), masks_of(40, 5)
    odds = probabilities(policy, torch.tensor(obs, dtype=torch.float32)).detach().numpy()
    best = np.where(masks, odds, -1.0).argmax(axis=1) - 2
    assert not np.array_equal(best, odds.argmax(axis=1) - 2)
    for given in (masks, masks.astype(np.int8), masks.astype(float), masks.tolist()):
        assert np.array_equal(policy.act(obs, action_mask=given), best)
    reversed_rows = masks[:, ::-1].copy()[:, ::-1]
    assert np.array_equal(policy.act(obs, action_mask=reversed_rows), best)
    of_tensors = policy.act(torch.tensor(obs), action_mask=torch.tensor(masks))
    assert np.array_equal(of_tensors.numpy(), best)
    for one, mask, expected in zip(obs, masks, best, strict=True):
        chosen = policy.act(one, action_mask=mask)
        assert isinstance(chosen, np.integer)
        assert chosen == expected
    assert policy.act(obs[:0], action_mask=masks[:0]).shape == (0,)


def test_act_draws_only_what_is_allowed_and_all_of_it():
    policy = make_policy(5, start=-2)
    masks = np.repeat(masks_of(6, 5, seed=2), 500, axis=0)
    obs = np.repeat(np.random.default_rng(0).normal(size=(6, 2, 2)), 500, axis=0)
    drawn = policy.act(
        obs, greedy=False, generator=torch.Generator().manual_seed(0), action_mask=masks
    )
    for number in range(6):
        of_these = slice(500 * number, 500 * (number + 1))
        allowed = np.flatnonzero(masks[of_these][0]) - 2
        assert set(drawn[of_these]) == set(allowed)
    alone = policy.act(obs, False, torch.Generator().manual_seed(0), np.ones_like(masks))
    assert np.array_equal(alone, policy.act(obs, False, torch.Generator().manual_seed(0)))


def test_masks_of_components_stand_one_behind_the_other():
    policy = Policy(spaces.Box(-1, 1, (2,)), spaces.MultiDiscrete([2, 3], start=[5, -1]))
    mask = np.array([0, 1, 1, 0, 0])
    assert policy.act(np.zeros(2), action_mask=mask).tolist() == [6, -1]
    assert policy.act(np.zeros((3, 2)), action_mask=mask[None].repeat(3, 0)).shape == (3, 2)


def test_the_parameters_of_a_masked_policy_are_minus_infinity_elsewhere():
    policy = make_policy(3)
    obs, mask = torch.randn(7, 2, 2), torch.from_numpy(masks_of(7, 3))
    logits, masked = policy(obs), policy(obs, action_mask=mask)
    assert torch.equal(masked, torch.where(mask.t(), logits, -math.inf))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(2), r"of shape \(3,\), got .* of shape \(2,\)"),
        (np.ones((1, 3)), r"of shape \(3,\), got .* of shape \(1, 3\)"),
        (np.array([1, 0, 2]), r"numbers 0 and 1, or bools, .* got \[1, 0, 2\]"),
        (np.array([1, 0, np.nan]), "numbers 0 and 1"),
        (np.array([1, 0, 0.5]), "numbers 0 and 1"),
        (["1", "0", "0"], "numbers 0 and 1"),
        (np.zeros(3), r"expected one that allows an action, got \[False, False, False\]"),
    ],
)
def test_act_refuses_what_is_no_mask_for_it(mask, message):
    with pytest.raises(ValueError, match=f"action_mask: expected .*{message}|{message}"):
        make_policy(3).act(np.zeros((2, 2)), action_mask=mask)


@pytest.mark.parametrize("space", [BOX, spaces.MultiBinary(2)], ids=["Box", "MultiBinary"])
def test_actions_that_are_not_masked_are_refused(space):
    policy, obs, mask = Policy(BOX, space), torch.zeros(1, 2), torch.ones(1, 4, dtype=torch.bool)
    uniforms = torch.zeros(policy.num_uniforms, 1)
    for masked in (
        lambda: policy(obs, action_mask=mask),
        lambda: policy.mode(obs, mask),
        lambda: policy.sample(obs, uniforms, None, mask),
        lambda: policy.log_probs_and_entropy(obs, policy.mode(obs), None, mask),
        lambda: policy.act(obs[0], action_mask=mask[0]),
    ):
        with pytest.raises(ValueError, match="action_mask: expected none for actions that are nei"):
            masked()


def test_one_component_that_allows_nothing_is_refused():
    policy = Policy(BOX, spaces.MultiDiscrete([2, 3]))
    with pytest.raises(ValueError, match="expected one that allows an action"):
        policy.act(np.zeros((2, 2)), action_mask=np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]))


@pytest.mark.parametrize("shape", [(6,), (8, 8, 3), (3, 8, 9), (8, 8)])
def test_uint8_observations_of_any_real_type_act_alike(shape):
    torch.manual_seed(0)
    space = spaces.Box(0, 255, shape, np.uint8)
    policy = Policy(space, spaces.Discrete(50))
    assert policy.obs_dtype == torch.uint8
    assert policy.description()["network"] == ("mlp" if len(shape) == 1 else "cnn")
    for parameter in policy.network.parameters():
        torch.nn.init.normal_(parameter)
    rng = np.random.default_rng(0)
    obs = rng.integers(0, 256, (40, *shape)).astype(np.uint8)
    expected = policy.act(obs)
    assert len(set(expected.tolist())) > 5
    for of in (np.int64, np.float32, np.float64, ">f4", np.uint16):
        assert np.array_equal(policy.act(obs.astype(of)), expected)
    assert torch.equal(policy.act(torch.from_numpy(obs)), torch.from_numpy(expected))
    assert policy.act(obs[0]) == expected[0]
    # What lies between two whole numbers is no whole number.
    seen = []
    policy.encoder.register_forward_hook(lambda module, given, output: seen.append(output))
    for between in (obs - 0.4, obs.astype(np.float64) - 0.4, torch.from_numpy(obs) - 0.4):
        policy.act(between)
    policy.act(obs)
    assert all(torch.equal(each, seen[0]) for each in seen[1:3])
    assert not torch.equal(seen[3], seen[0])
    torch.testing.assert_close(seen[3], seen[0], atol=0.2, rtol=0.2)
