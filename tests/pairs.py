"""Fewer cases than a product of parameters has."""

import itertools

import pytest


def pairwise(**values):
    """Parametrize a test so that every pair of values of two parameters occurs in some case.

    Most faults show where two parameters meet; a product's cases grow with all of them.
    """
    cases = pairs(*map(list, values.values()))
    return pytest.mark.parametrize(tuple(values), cases, ids=short)


def short(value):
    """What a value is called in a test's name; None leaves it to pytest."""
    text = str(value)
    return text if len(text) < 40 else None


def pairs(*values):
    """Cases, a value of each list in every one, that hold every pair of values of two lists.

    The first pair that is missing begins a case; each further value is the one that brings the most
    missing pairs with it.
    """
    columns = [range(len(each)) for each in values]
    missing = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(columns)), 2)
        for a in columns[i]
        for b in columns[j]
    }
    cases = []
    while missing:
        i, a, j, b = min(missing)
        case = {i: a, j: b}
        for column in range(len(columns)):
            if column not in case:
                case[column] = max(
                    columns[column], key=lambda value: len(met(case | {column: value}) & missing)
                )
        missing -= met(case)
        cases.append(tuple(values[column][case[column]] for column in range(len(columns))))
    return cases


def met(case):
    """The pairs of a case's values."""
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(sorted(case.items()), 2)}
