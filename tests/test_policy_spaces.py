import json

import numpy as np
import pytest
from environments import OFFSET
from gymnasium import spaces

from vecpg.policy.spaces import describe, from_description

INF = np.inf
SPACES = [
    spaces.Box(-1, 1, (3,)),
    spaces.Box(-1.5, 1, (), np.float64),
    spaces.Box(0, 255, (2, 3, 1), np.uint8),
    spaces.Box(0, 5, (2,), np.int64),
    spaces.Box(np.array([-1, -INF, 0.1]), np.array([INF, 2, 1 / 3]), dtype=np.float64),
    spaces.Box(np.float32(-0.1), np.float32(0.1), (2, 2)),
    spaces.Discrete(4),
    spaces.Discrete(4, start=-7),
    spaces.Discrete(4, start=2, dtype=np.int32),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiDiscrete([2, 3], start=[5, -1]),
    spaces.MultiDiscrete([[2, 3], [4, 5]], np.int32, start=[[1, 2], [3, 4]]),
    *OFFSET.values(),
    spaces.MultiBinary(3),
    spaces.MultiBinary([3]),
    spaces.MultiBinary((2, 3)),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_space_comes_back_as_it_was(space):
    again = from_description(describe(space))
    assert again == space
    assert (again.dtype, again.shape) == (space.dtype, space.shape)
    if isinstance(space, spaces.Box):
        assert np.array_equal(again.low, space.low)
        assert np.array_equal(again.high, space.high)
    elif not isinstance(space, spaces.MultiBinary):
        assert np.array_equal(again.start, space.start)
    assert again.contains(space.sample())
    assert space.contains(again.sample())


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_description_is_of_plain_types(space):
    description = describe(space)
    assert json.loads(json.dumps(description)) == description
    assert from_description(json.loads(json.dumps(description))) == space


def test_another_space_is_refused_with_what_is_supported():
    message = "Text.*supported: Box, Discrete, MultiBinary, MultiDiscrete$"
    with pytest.raises(ValueError, match=message):
        describe(spaces.Text(3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n": 0}, r'space\["n"\]: expected a whole number of at least 1, got 0'),
        ({"n": [2, -1]}, "at least 1, got -1"),
        ({"n": [2, 2.0]}, "at least 1, got 2.0"),
        ({"n": True}, "at least 1, got True"),
        ({"n": None}, "at least 1, got None"),
        ({"n": 10**6 + 1}, "at most 1000000, got 1000001"),
        ({"n": [1001, 1001]}, "at most 1000000 numbers"),
        ({"n": [1] * 33}, "at most 32 dimensions, got 33"),
        ({"dtype": "int64"}, "one of int8, got 'int64'"),
        ({"start": 0}, "expected kind, dtype, n"),
    ],
)
def test_a_description_of_zeros_and_ones_is_checked(changed, message):
    description = describe(spaces.MultiBinary((2, 3))) | changed
    with pytest.raises(ValueError, match=message):
        from_description(description, largest=10**6)
