import os

import numpy as np
import pytest
from gymnasium import spaces

from vecpg.envs import shared

NAMES = ("actions", "obs", "rewards", "terminations", "truncations", "action_masks")
IMAGE = spaces.Box(0, 255, (5, 3, 1), np.uint8)
CHOICES = spaces.MultiDiscrete([2, 3, 4], np.int32)


@pytest.fixture
def memory():
    made = shared.create(3)
    yield made
    os.close(made)


@pytest.mark.parametrize("num_envs", [1, 3, 63])
@pytest.mark.parametrize("flags", [0, 9])
@pytest.mark.parametrize("observation", [IMAGE, spaces.Discrete(3), spaces.MultiBinary((2, 3))])
def test_both_sides_see_every_array_whole_and_nothing_overlaps(
    memory, num_envs, flags, observation
):
    shared.positions(memory, 3)[:] = 7, 8, 9
    ours, theirs = (
        shared.SharedRows(memory, 3, num_envs, observation, CHOICES, flags) for _ in range(2)
    )
    assert ours.obs.shape == (num_envs, *observation.shape)
    assert ours.obs.dtype == observation.dtype
    assert (ours.actions.shape, ours.actions.dtype) == ((num_envs, 3), np.int32)
    assert ours.rewards.dtype == np.float64
    assert ours.action_masks.shape == (num_envs, flags)
    # Every byte of each is a number of its own.
    for number, name in enumerate(NAMES, 1):
        getattr(ours, name).view(np.uint8)[...] = number
    for number, name in enumerate(NAMES, 1):
        assert (getattr(theirs, name).view(np.uint8) == number).all()
    assert shared.positions(memory, 3).tolist() == [7, 8, 9]


def test_workers_write_their_positions_to_lines_of_their_own(memory):
    (step,) = shared.positions(memory, 3).strides
    assert step % 64 == 0


def test_what_is_shared_has_no_name(memory):
    assert "(deleted)" in os.readlink(f"/proc/self/fd/{memory}")


def test_numbers_of_one_shape_can_be_shared():
    one = spaces.Discrete(2)
    for space in (IMAGE, CHOICES, one, spaces.MultiBinary(3)):
        assert shared.can_be_shared(space)
    others = spaces.Dict(), spaces.Tuple([one]), spaces.Text(3), spaces.Sequence(one)
    assert not any(map(shared.can_be_shared, others))
