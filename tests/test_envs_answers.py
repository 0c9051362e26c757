import decimal
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from vecpg.envs import EnvironmentFailure, SubEnvironmentError, make_envs
from vecpg.envs.answers import mask_sizes, read_action_mask, read_action_masks, read_answer
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


# -- Action masks --------------------------------------------------------------------------------

FIVE = spaces.Discrete(5, start=-1)
DIALS = spaces.MultiDiscrete([2, 3], start=[4, -1])
MASKS = {
    "int8": np.array([1, 0, 0, 1, 1], np.int8),
    "uint8": np.array([1, 0, 0, 1, 1], np.uint8),
    "bool": np.array([True, False, False, True, True]),
    "float64": np.array([1.0, -0.0, 0.0, 1.0, 1.0]),
    "reversed": np.array([1, 1, 0, 0, 1], np.int8)[::-1],
    "big-endian": np.array([1, 0, 0, 1, 1], ">i4"),
    "list": [1, 0, 0, 1, 1],
    "tuple of bools": (True, False, False, True, True),
    "tensor": torch.tensor([1, 0, 0, 1, 1]),
}
COMPONENTS = {
    "tuple": (np.array([1, 0], np.int8), np.array([0, 1, 1], np.int8)),
    "list of lists": [[1, 0], [0, 1, 1]],
    "mixed": (np.array([True, False]), [0, 1, 1]),
    "tensors": (torch.tensor([1, 0]), torch.tensor([0, 1, 1])),
}


def objects(*each):
    """An array of objects, as Gymnasium puts infos of unknown types together."""
    array = np.full(len(each), None, object)
    for i, one in enumerate(each):
        array[i] = one
    return array


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("space", [FIVE, DIALS], ids=["Discrete", "MultiDiscrete"])
def test_a_mask_of_any_kind_of_numbers_is_read(space, mask):
    read = read_action_mask({"action_mask": mask, "other": 3}, space)
    assert read.dtype == np.bool_
    assert read.tolist() == [True, False, False, True, True]


@pytest.mark.parametrize("mask", COMPONENTS.values(), ids=COMPONENTS)
def test_the_masks_of_components_are_put_together(mask):
    for given in (mask, objects(*mask)):
        read = read_action_mask({"action_mask": given}, DIALS)
        assert read.tolist() == [True, False, False, True, True]


def test_one_component_is_one_too():
    space = spaces.MultiDiscrete([3])
    for mask in ([1, 0, 1], [[1, 0, 1]], (np.array([1, 0, 1]),)):
        assert read_action_mask({"action_mask": mask}, space).tolist() == [True, False, True]
    same = spaces.MultiDiscrete([2, 2])
    for mask in ([1, 0, 1, 1], [[1, 0], [1, 1]]):
        assert read_action_mask({"action_mask": mask}, same).tolist() == [True, False, True, True]


class Unreadable:
    def __array__(self, *args, **kwargs):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "info",
    [
        None,
        {},
        {"action_masks": [1] * 5},
        {"action_mask": None},
        {"action_mask": np.ones(4)},
        {"action_mask": np.ones(6)},
        {"action_mask": np.ones((1, 5))},
        {"action_mask": np.ones((5, 1))},
        {"action_mask": 1},
        {"action_mask": [1, 0, 0, 1, np.nan]},
        {"action_mask": [1, 0, 0, 1, 0.5]},
        {"action_mask": [1, 0, 0, 1, 2]},
        {"action_mask": [1, 0, 0, 1, -1]},
        {"action_mask": [1, 0, 0, 1, np.inf]},
        {"action_mask": [1, 0, 0, 1, None]},
        {"action_mask": ["1", "0", "0", "1", "1"]},
        {"action_mask": "11011"},
        {"action_mask": np.ones(5) * 1j},
        {"action_mask": ([1, 0, 0], [1, 1])},
        {"action_mask": ([1, 0], [1, 1, 1], [1])},
        {"action_mask": ([[1, 0]], [[1, 1, 1]])},
        {"action_mask": ()},
        {"action_mask": Unreadable()},
        {"action_mask": [Unreadable()] * 5},
    ],
    ids=repr,
)
@pytest.mark.parametrize("space", [FIVE, DIALS], ids=["Discrete", "MultiDiscrete"])
def test_what_is_no_mask_is_named(space, info):
    with pytest.raises(TypeError, match=r'^expected info\["action_mask"\] of 5 booleans.*, got '):
        read_action_mask(info, space)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (5,)),
        spaces.MultiBinary(5),
        spaces.MultiDiscrete([[2, 3]]),
        spaces.Tuple([FIVE]),
    ],
    ids=str,
)
def test_actions_that_are_not_masked_are_refused(space):
    with pytest.raises(ValueError, match="--action-masks: expected actions that are Discrete, or"):
        mask_sizes(space)


NEEDED, ENDED = np.array([True, True, False, False]), np.array([False, False, False, True])
WANTED = [[1, 0, 0, 1, 1], [0, 1, 0, 1, 0], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    "infos",
    [
        {"action_mask": np.array(WANTED, bool)},
        {"action_mask": np.array(WANTED, np.float32)},
        {"action_mask": objects(*WANTED)},
        {"action_mask": objects(*(np.array(row) for row in WANTED[:3]), None)},
        {"action_mask": objects(*((row[:2], row[2:]) for row in WANTED))},
        # What has just ended may have anything.
        {"action_mask": np.array([*WANTED[:3], [np.nan] * 5])},
        {"action_mask": np.array([*WANTED[:3], [0] * 5]), "_action_mask": ~ENDED},
    ],
)
def test_masks_of_vector_infos_are_read(infos):
    read = read_action_masks(infos, DIALS, needed=NEEDED, ended=ENDED)
    assert read.dtype == np.bool_
    assert read.tolist() == [[bool(each) for each in row] for row in WANTED]


def test_what_nobody_needs_allows_all_where_it_allows_nothing():
    for third in ([0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [1, 2, 3, 4, 5]):
        given = np.array([*WANTED[:2], third, [0] * 5])
        read = read_action_masks({"action_mask": given}, DIALS, needed=NEEDED, ended=ENDED)
        assert read[2:].all()
        assert read[:2].tolist() == [[bool(each) for each in row] for row in WANTED[:2]]
    nobody = np.zeros(4, bool)
    assert read_action_masks({}, DIALS, needed=nobody, ended=ENDED).all()
    assert read_action_masks([{}] * 4, DIALS, needed=nobody, ended=ENDED).shape == (4, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks: {}, r"environment 0 failed: .* got none"),
        (lambda masks: [{}] * 4, r"environment 0 failed: .* got none"),
        (lambda masks: {"action_mask": masks[:3]}, "environment 0 failed: .* got none"),
        (lambda masks: {"action_mask": masks[:, :4]}, r"environment 0 failed: .* shape \(4,\)"),
        (lambda masks: {"action_mask": masks.astype(str)}, "environment 0 failed: .* dtype <U"),
        (
            lambda masks: {"action_mask": masks, "_action_mask": np.array([1, 0, 1, 1])},
            "environment 1 failed: .* got none",
        ),
        (
            lambda masks: {"action_mask": masks * np.array([[1], [2], [3], [4]])},
            r"environment 1 failed: .* got array\(\[0, 2, 0, 2, 0\]\)",
        ),
        (
            lambda masks: {"action_mask": masks * [[1], [0], [1], [1]]},
            "environment 1 allows no action: no value of component 0 is 1",
        ),
        (
            lambda masks: {"action_mask": masks * [1, 1, 0, 0, 0]},
            "environment 0 allows no action: no value of component 1 is 1",
        ),
    ],
)
def test_vector_infos_without_masks_are_named(change, message):
    infos = change(np.array(WANTED))
    with pytest.raises(SubEnvironmentError, match=message):
        read_action_masks(infos, DIALS, needed=NEEDED, ended=ENDED)


@pytest.mark.parametrize("flag", [0.5, 2, -1, np.array([0.5]), "False", None, math.nan])
def test_what_is_neither_true_nor_false_is_no_flag(flag):
    for answer, name in (((flag, False), "terminated"), ((True, flag), "truncated")):
        with pytest.raises(TypeError, match=f"expected a {name} that is True or False, got"):
            read_answer(1.0, *answer)
    for known in (True, np.True_, 1, 1.0, np.array([1]), torch.tensor([True])):
        assert read_answer(1.0, known, False) == (1.0, True, False)


@pytest.mark.parametrize("reward", [np.complex64(1 + 2j), 1j, np.array("1.5"), np.str_("1.5"), "1"])
def test_what_only_python_reads_as_a_number_is_no_reward(reward):
    with pytest.raises(TypeError, match="expected a reward that is a number, got"):
        read_answer(reward, False, False)


def test_masks_in_a_list_or_a_tensor_are_read():
    space, needed = spaces.Discrete(3), np.array([True, True])
    masks = [[1, 0, 1], [0, 1, 1]]
    for given in (masks, tuple(masks), [np.array(mask) for mask in masks], torch.tensor(masks)):
        found = read_action_masks({"action_mask": given}, space, needed=needed, ended=~needed)
        assert found.tolist() == np.array(masks, bool).tolist()
