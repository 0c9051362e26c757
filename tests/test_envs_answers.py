import decimal

import numpy as np
import pytest
import torch
from gymnasium import spaces

from vecpg.envs import EnvironmentFailure, make_envs
from vecpg.envs.answers import read_action_mask, read_answer
from vecpg.policy import Policy
from vecpg.rollout import collect


def seen(vectorization, **kwargs):
    envs = make_envs("environments:Plain-v0", 2, vectorization=vectorization, env_kwargs=kwargs)
    try:
        policy = Policy(envs.single_observation_space, envs.single_action_space)
        rollout = collect(envs, policy, num_steps=1, seed=1, iteration=0)
        return rollout.obs[: rollout.mask.sum(dim=0)[0], 1].tolist()
    finally:
        envs.close()


@pytest.mark.parametrize("of", ["int", "int64", "int16", "uint8", "array"])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium's checker wants int64
def test_any_integer_that_belongs_to_the_space_is_taken(vectorization, of):
    assert seen(vectorization, of=of) == [253, 254, 255]


@pytest.mark.parametrize(
    ("of", "last", "message"),
    [
        ("int", 256, "OverflowError: .*256 out of bounds for uint8"),
        ("int64", 253 + 256, "OverflowError: .*509 out of bounds for uint8"),
        ("int", -1, "OverflowError: .*-1 out of bounds for uint8"),
        ("float", 255, "float64.* to .*uint8|dtype uint8, got float64"),
        ("int", 7, "returned the observation 7 at"),
    ],
)
@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_other_number_is_named_with_step_and_seed(vectorization, of, last, message):
    message = rf"environment 0 .*{message}"
    with pytest.raises(EnvironmentFailure, match=message) as caught:
        seen(vectorization, of=of, last=last)
    assert "reset with seed" in str(caught.value)


@pytest.mark.parametrize(
    "reward",
    [
        2,
        2.0,
        np.float16(2),
        np.uint8(2),
        np.array(2),
        np.array([2.0]),
        np.full((1, 1), 2, np.int8),
        np.array([2], object),
        [2],
        torch.tensor(2),
        torch.tensor([2.0], requires_grad=True),
        decimal.Decimal(2),
    ],
    ids=repr,
)
def test_a_reward_is_one_number_however_it_is_packed(reward):
    answer = read_answer(reward, False, np.array([True]))
    assert answer == (2.0, False, True)
    assert list(map(type, answer)) == [float, bool, bool]


@pytest.mark.parametrize("yes", [True, np.True_, 1, 1.0, np.array(True), [True], torch.tensor([1])])
def test_a_flag_is_one_truth_however_it_is_packed(yes):
    answer = read_answer(0.1, yes, yes)
    assert answer == (0.1, True, True)
    assert list(map(type, answer)) == [float, bool, bool]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (None, "None"),
        ("1", "'1'"),
        (b"1", "b'1'"),
        (np.array(["1"]), r"array\(\['1'\], dtype='<U1'\)"),
        (1j, "1j"),
        ([1.0, 2.0], r"\[1.0, 2.0\]"),
        ([[1.0], [2.0, 3.0]], r"\[\[1.0\], \[2.0, 3.0\]\]"),
        ([], r"\[\]"),
        ({}, "{}"),
        (10**400, r"10{76}\.\.\."),
        (torch.ones(2), r"tensor\(\[1., 1.\]\)"),
    ],
    ids=lambda it: repr(it)[:20],
)
def test_what_is_none_is_named(given, shown):
    for place, name in enumerate(("reward that is a number", "terminated that is", "truncated")):
        answer = [1.0, False, False]
        answer[place] = given
        with pytest.raises(TypeError, match=rf"^expected a {name}.*, got {shown}$"):
            read_answer(*answer)


def test_a_number_that_is_none_is_left_to_those_who_know_the_step():
    assert np.isnan(read_answer(np.float32("nan"), False, False)[0])
    assert read_answer(np.array([-np.inf]), False, False)[0] == -np.inf


FIVE, TWO_AND_THREE = spaces.Discrete(5, start=3), spaces.MultiDiscrete([2, 3], start=[1, -1])
MASK = [True, False, True, True, False]


@pytest.mark.parametrize(
    ("given", "space"),
    [
        (np.array(MASK), FIVE),
        (np.array(MASK, np.int8), FIVE),
        (MASK, FIVE),
        (torch.tensor(MASK), FIVE),
        (np.array(MASK, np.int64), TWO_AND_THREE),
        ((np.array(MASK[:2], np.int8), np.array(MASK[2:])), TWO_AND_THREE),
        ((MASK[:2], MASK[2:]), TWO_AND_THREE),
    ],
    ids=repr,
)
def test_a_mask_is_read_in_every_form_that_gymnasium_samples_with(given, space):
    found = read_action_mask({"other": 1, "action_mask": given}, space)
    assert found.dtype == np.bool_
    assert found.tolist() == MASK


@pytest.mark.parametrize(
    ("given", "space"),
    [
        (None, FIVE),
        (MASK[1:], FIVE),
        (np.array([MASK]), FIVE),
        (np.array(MASK, float), FIVE),
        (np.array([1, 0, 1, 2, 0]), FIVE),
        (np.array([-1, 0, 1, 1, 0]), FIVE),
        (True, FIVE),
        ([[1], [1, 0]], FIVE),
        ({"a": 1}, FIVE),
        ((MASK[:3], MASK[3:]), TWO_AND_THREE),
        ((MASK[:2],), TWO_AND_THREE),
        ((MASK[:2], None), TWO_AND_THREE),
        (MASK[1:], TWO_AND_THREE),
    ],
    ids=repr,
)
def test_a_mask_of_another_form_is_refused_by_name(given, space):
    message = r'expected info\["action_mask"\] of 5 booleans.*, got '
    with pytest.raises(TypeError, match=message):
        read_action_mask({"action_mask": given}, space)
    with pytest.raises(TypeError, match=f"{message}none$"):
        read_action_mask({"mask": given}, space)


def test_there_are_masks_of_choices_only():
    for space in (spaces.Box(-1, 1, (5,)), spaces.MultiBinary(5)):
        with pytest.raises(TypeError, match="action_mask: expected actions of Discrete or Multi"):
            read_action_mask({"action_mask": MASK}, space)
