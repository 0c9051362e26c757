import json
import math
import statistics

import pytest

from vecpg.look.intervals import bootstrap_interval, interquartile_mean
from vecpg.look.table import closing_table


def summary(seed, **settings):
    found = {
        "env_id": "CartPole-v1",
        "seed": seed,
        "solved": True,
        "eval_return_mean": 500.0,
        "solved_env_steps": 100_000,
        "run_dir": f"runs/population/CartPole-v1__reinforce__{seed}__1795613314",
    } | settings
    return found if found["solved"] else found | {"solved_env_steps": None}


def cells(table, name):
    """The four numbers and the name of a row, in every place where it stands."""
    lines = [line for line in table.splitlines() if line.startswith(name)]
    return [line.replace(",", "").split()[1:] for line in lines]


def test_a_table_by_hand():
    runs = [
        summary(1, solved_env_steps=120_000, eval_return_mean=500.0),
        summary(2, solved_env_steps=150_000, eval_return_mean=496.0),
        summary(3, solved=False, eval_return_mean=12.0),
        summary(4, solved_env_steps=280_000, eval_return_mean=490.0),
        summary(5, solved_env_steps=100_000, eval_return_mean=480.0),
    ]
    table = closing_table(runs)
    assert table.splitlines()[0] == "solved 4 of 5"
    ((median, iqm, low, _, high, worst, *name),) = cells(table, "eval_return_mean")
    assert (median, iqm, worst, name) == ("490.0", "488.7", "12.0", ["(seed", "3)"])
    expected = bootstrap_interval([500.0, 496.0, 12.0, 490.0, 480.0])
    assert (low, high) == (f"({expected[0]:.1f}", f"{expected[1]:.1f})")
    # Of those four that solved it, the two in the middle.
    ((median, iqm, low, _, high, worst, *name),) = cells(table, "solved_env_steps")
    assert (median, iqm, worst, name) == ("135000", "135000", "280000", ["(seed", "4)"])
    expected = bootstrap_interval([120e3, 150e3, 280e3, 100e3])
    assert (low, high) == (f"({expected[0]:.0f}", f"{expected[1]:.0f})")
    assert closing_table(runs[::-1]) == table


def test_columns_stand_below_each_other_in_a_hundred_characters():
    runs = [summary(i, solved_env_steps=10**8 + i) for i in range(20)]
    runs += [summary(i, env_id="Pendulum-v1", eval_return_mean=-1e4 - i) for i in range(2)]
    lines = closing_table(runs).splitlines()
    assert max(map(len, lines)) <= 100
    starts = {line.rindex("   ") for line in lines if "(seed" in line}
    assert starts == {lines[1].index("   worst")}


def test_what_would_be_too_long_goes_on_below():
    runs = [summary(2**64 - 1 - i, solved_env_steps=10**9 + i) for i in range(20)]
    lines = closing_table(runs).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-3].endswith("   1,000,000,019")
    assert lines[-2] == f"  worst: seed {2**64 - 20}"


def test_without_a_target_nothing_is_said_to_be_solved():
    table = closing_table([summary(i, solved=None, eval_return_mean=-1.0 * i) for i in range(3)])
    assert table.splitlines()[0] == "3 runs without a target"
    assert "solved_env_steps" not in table
    assert cells(table, "eval_return_mean")[0][-3:] == ["-2.000", "(seed", "2)"]


def test_none_solved_has_no_steps():
    table = closing_table([summary(i, solved=False) for i in range(3)])
    assert table.splitlines()[0] == "solved 0 of 3"
    assert "solved_env_steps" not in table


def test_one_run_has_no_interval_and_no_line_about_it():
    table = closing_table([summary(7)])
    assert table.splitlines()[0] == "solved 1 of 1"
    assert table.count("(one run, no interval)") == 2
    assert table.count("(seed 7)") == 2
    assert "95 %:" not in table
    assert closing_table([summary(7, solved=None)]).splitlines()[0] == "1 run without a target"


def test_scores_below_ten_have_three_places():
    table = closing_table([summary(i, eval_return_mean=0.25 * i) for i in range(4)])
    assert cells(table, "eval_return_mean")[0][:2] == ["0.375", "0.375"]


def test_environments_are_not_mixed():
    runs = [
        summary(1, eval_return_mean=500.0),
        summary(1, env_id="Acrobot-v1", eval_return_mean=-80.0, solved=False),
        summary(2, eval_return_mean=400.0),
        summary(2, env_id="Acrobot-v1", eval_return_mean=-90.0),
        summary(1, env_id="Pendulum-v1", eval_return_mean=-900.0, solved=None),
    ]
    lines = closing_table(runs).splitlines()
    assert lines[0] == "solved 3 of 4 (1 without a target)"
    assert lines[2] == "CartPole-v1: solved 2 of 2"
    assert lines[5] == "Acrobot-v1: solved 1 of 2"
    assert lines[8] == "Pendulum-v1: 1 run without a target"
    medians = [row[0] for row in cells("\n".join(lines), "eval_return_mean")]
    assert medians == ["450.0", "-85.0", "-900.0"]


def test_a_seed_that_several_have_names_no_run():
    runs = [summary(1, eval_return_mean=float(i), run_dir=f"runs/p/{i}") for i in (30, 20, 40)]
    lines = closing_table(runs).splitlines()
    assert lines[2].endswith("   20.0 (20)")


def test_nobody_at_the_end():
    assert closing_table([]) == "no run came to its end"


def test_a_summary_is_enough_as_it_was_written():
    """Other keys are no matter, and numbers may be whole."""
    line = json.dumps(summary(1, eval_return_mean=500, wall_seconds=0.1))
    assert "500.0" in closing_table([json.loads(line), json.loads(line) | {"seed": 2}])


@pytest.mark.parametrize("n", [2, 3, 4, 20])
def test_numbers_are_those_of_the_runs(n):
    returns = [480 + 20 * math.sin(i) for i in range(n)]
    table = closing_table([summary(i, eval_return_mean=x) for i, x in enumerate(returns)])
    found = cells(table, "eval_return_mean")[0]
    assert found[0] == f"{statistics.median(returns):.1f}"
    assert found[1] == f"{interquartile_mean(returns):.1f}"
    assert found[5] == f"{min(returns):.1f}"
