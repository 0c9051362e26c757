import itertools
import math
import statistics
import subprocess
import sys

import numpy as np
import pytest

from vecpg.look.intervals import bootstrap_interval, interquartile_mean, student_t

SAMPLES = {
    "three": [5.0, -1.0, 2.5],
    "three, two of them equal": [5.0, 5.0, 2.5],
    "four": [0.0, 10.0, 3.0, 4.5],
    "five": [1.0, 2.0, 40.0, 8.0, 16.0],
}


def trimmed(values):
    """The lowest and the highest taken away, one after the other, a quarter of them each."""
    left = list(values)
    for _ in range(math.floor(len(left) * 0.25)):
        left.remove(min(left))
        left.remove(max(left))
    return statistics.fmean(left)


def enumerated(strata, statistic, share):
    """The smallest value that this share of all resamples does not exceed, and how near that is.

    Near is the distance from the share to the next jump of the distribution.
    """
    draws = [itertools.product(stratum, repeat=len(stratum)) for stratum in strata]
    values = sorted(statistic([*itertools.chain(*one)]) for one in itertools.product(*draws))
    cumulated = {value: (i + 1) / len(values) for i, value in enumerate(values)}
    index = math.ceil(share * len(values)) - 1
    return values[index], min(abs(share - each) for each in cumulated.values())


@pytest.mark.parametrize("n", range(1, 22))
def test_the_interquartile_mean_is_that_of_values_taken_away_one_by_one(n):
    values = np.random.default_rng(n).normal(size=(2, n, 3)) ** 3
    kept = values.copy()
    found = interquartile_mean(values, axis=1)
    assert found.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        assert found[i, j] == pytest.approx(trimmed(values[i, :, j]), rel=1e-12)
    assert (values == kept).all()


def test_outliers_below_a_quarter_change_no_interquartile_mean():
    assert interquartile_mean([1, 2, 3, 4, 5, 6, 7, 1e300]) == 4.5
    assert interquartile_mean([-1e300, 2, 3, 4, 5, 6, 7, 8]) == 4.5


@pytest.mark.parametrize("values", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize(
    ("statistic", "plain"),
    [(interquartile_mean, trimmed), (np.mean, statistics.fmean), (np.median, statistics.median)],
    ids=["interquartile mean", "mean", "median"],
)
def test_the_interval_is_that_of_all_resamples_there_are(values, statistic, plain):
    found = bootstrap_interval(values, statistic)
    for end, share in zip(found, (0.025, 0.975), strict=True):
        exact, near = enumerated([values], plain, share)
        # A fiftieth of a percent is the error of 50,000 draws, three times over.
        assert near > 0.002, "the exact quantile is at a jump: another sample is needed"
        assert end == pytest.approx(exact, abs=1e-12)


def test_runs_are_drawn_from_their_own_stratum():
    strata = [[100.0, 101.0, 103.0], [0.0, 1.0]]
    values = [0.0, 103.0, 100.0, 1.0, 101.0]
    found = bootstrap_interval(values, np.mean, strata=["b", "a", "a", "b", "a"])
    expected = []
    for share in (0.025, 0.975):
        exact, near = enumerated(strata, statistics.fmean, share)
        assert near > 0.002
        expected.append(exact)
    assert found == pytest.approx(expected)
    # Without strata there are resamples with more runs of one than of the other.
    assert np.ptp(bootstrap_interval(values, np.mean)) > 10 * np.ptp(found)


def test_every_place_has_the_interval_of_its_own_numbers():
    values = np.random.default_rng(0).normal(size=(5, 2, 3))
    found = bootstrap_interval(values, resamples=999)
    assert found.shape == (2, 2, 3)
    for i, j in np.ndindex(2, 3):
        alone = bootstrap_interval(values[:, i, j], resamples=999)
        assert found[:, i, j].tolist() == alone.tolist()


def test_the_same_numbers_have_the_same_interval_in_any_order():
    generator = np.random.default_rng(0)
    values = generator.normal(size=9)
    strata = np.array(["x", "y", "z"] * 3)
    order = generator.permutation(9)
    first = bootstrap_interval(values, strata=strata)
    assert first.tolist() == bootstrap_interval(values[order], strata=strata[order]).tolist()


def test_what_is_drawn_in_pieces_is_drawn_as_often(monkeypatch):
    monkeypatch.setattr("vecpg.look.intervals._AT_ONCE", 1000)
    found = bootstrap_interval([0.0, 10.0, 3.0, 4.5], np.mean)
    for end, share in zip(found, (0.025, 0.975), strict=True):
        exact, _ = enumerated([[0.0, 10.0, 3.0, 4.5]], statistics.fmean, share)
        assert end == pytest.approx(exact)


def test_one_run_has_no_interval():
    assert bootstrap_interval([3.0]) is None
    assert bootstrap_interval([3.0, 4.0, 5.0], strata=[1, 1, 2]) is None
    assert bootstrap_interval([3.0, 3.0]).tolist() == [3.0, 3.0]


def test_intervals_hold_the_truth_as_often_as_is_said():
    """The docstring's numbers, for runs that are normally distributed."""
    generator = np.random.default_rng(0)
    trials = 1000
    for n, said in ((3, 0.75), (5, 0.90), (10, 0.94), (20, 0.94)):
        low, high = bootstrap_interval(generator.normal(size=(n, trials)), resamples=1000)
        held = np.mean((low <= 0) & (high >= 0))
        assert abs(held - said) < 0.01 + 3 * math.sqrt(said * (1 - said) / trials), n


def test_what_is_no_sample_is_refused():
    with pytest.raises(ValueError, match="expected at least one, got none"):
        interquartile_mean([])
    with pytest.raises(ValueError, match=r"a row for each run, got shape \(0,\)"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match=r"a row for each run, got shape \(\)"):
        bootstrap_interval(3.0)
    with pytest.raises(ValueError, match="expected finite numbers"):
        bootstrap_interval([1.0, math.nan])
    with pytest.raises(ValueError, match=r"one for each of 2 runs, got \(3,\)"):
        bootstrap_interval([1.0, 2.0], strata=[1, 1, 1])


# Published in every table of Student's distribution (two-sided, 95 %).
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize(("degrees", "published"), TABLE.items())
def test_students_t_is_the_published_one(degrees, published):
    assert round(student_t(degrees), 3) == published


def test_importing_it_is_cheap():
    code = (
        "import sys, vecpg.look.table\n"
        "heavy = {'torch', 'matplotlib', 'scipy', 'numba', 'gymnasium'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
