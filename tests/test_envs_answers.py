import decimal

import numpy as np
import pytest
import torch

from vecpg.envs.answers import read_answer


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
