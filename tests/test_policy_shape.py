import re

import pytest
from gymnasium import spaces

from vecpg.policy import Policy
from vecpg.policy.shape import in_a_row, shape_of, why_not

BOX = spaces.Box(-1, 1, (3,))


@pytest.mark.parametrize("actions", [spaces.Discrete(5, start=2), spaces.Box(-2, 2, (2,))])
def test_parameters_stand_in_a_row(actions):
    policy = Policy(BOX, actions, hidden_sizes=(7, 5), activation="relu")
    shape = shape_of(policy)
    row = in_a_row(policy)
    assert [each.numel() for each in row] == shape.sizes
    assert sorted(map(id, row)) == sorted(map(id, policy.parameters()))
    first, _, second, _, third, *_ = row
    assert [first.shape, second.shape] == [(7, 3), (5, 7)]
    assert third.shape == (shape.outputs, 5)
    assert shape.first_action == (2 if isinstance(actions, spaces.Discrete) else 0)
    assert shape.size == sum(each.numel() for each in policy.parameters()) <= shape.stride - 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hidden_sizes": (64, 65)}, r"\(64, 65\), not two of up to 64"),
        ({"hidden_sizes": (64,)}, "not two"),
        ({"hidden_sizes": (8, 8, 8)}, "not two"),
        ({"dropout": 0.5}, "drops units"),
        ({"normalize_obs": True}, "not taken as they are"),
        ({"log_std": "network"}, "standard deviation"),
        ({"observation_space": spaces.Discrete(3)}, "not taken as they are"),
        ({"observation_space": spaces.Box(-1, 1, (64,))}, "64 numbers, more than 63"),
        ({"action_space": spaces.Box(-1, 1, (17,))}, "17 numbers, more than 16"),
        ({"action_space": spaces.MultiDiscrete([2, 2])}, "neither Discrete nor a Box"),
    ],
)
def test_why_a_policy_has_no_shape(settings, reason):
    given = {"observation_space": BOX, "action_space": BOX, **settings}
    found = why_not(Policy(given.pop("observation_space"), given.pop("action_space"), **given))
    assert found is not None
    assert re.search(reason, found)


def test_a_policy_of_the_users_own_has_none():
    class Own(Policy):
        pass

    assert "Own has functions" in why_not(Own(BOX, BOX))
    policy = Policy(BOX, BOX)
    assert why_not(policy) is None
    policy.forward = policy.forward
    assert "functions of its own" in why_not(policy)
