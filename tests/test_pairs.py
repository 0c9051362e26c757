import itertools

import pytest
from pairs import pairs


@pytest.mark.parametrize("sizes", [(2, 2), (4, 4, 3, 2), (1, 5, 2), (2,) * 10])
def test_every_pair_of_values_is_in_some_case(sizes):
    values = [[f"{number}: {i}" for i in range(size)] for number, size in enumerate(sizes)]
    cases = pairs(*values)
    for one, other in itertools.combinations(range(len(sizes)), 2):
        found = {(case[one], case[other]) for case in cases}
        assert found == set(itertools.product(values[one], values[other]))
    for case in cases:
        assert all(value in column for value, column in zip(case, values, strict=True))


def test_there_are_not_many_more_than_two_lists_make():
    assert len(pairs(range(4), range(4))) == 16
    assert len(pairs(range(4), range(4), range(3), range(2))) <= 20
    assert len(pairs(*[range(2)] * 10)) <= 12
