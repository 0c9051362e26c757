import pytest
from drawn import RETURN, make_run, refused

from vecpg.look.curves import read_curves


def test_nulls_unfinished_lines_and_repeated_iterations_are_no_points(tmp_path):
    run = make_run(tmp_path, "a", [(1, None), (2, 2.0), (4, None), (6, 6.0), (4, 5.0), (8, 7.0)])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 7, "env_st')
    (curve,) = read_curves([run], RETURN)
    # The run went on from before its step 6.
    assert curve.env_steps.tolist() == [2, 4, 8]
    assert curve.values.tolist() == [2, 5, 7]


def test_a_population_is_a_directory_of_runs_and_so_is_one_of_populations(tmp_path):
    for name in ("p", "q"):
        for seed in (1, 2):
            make_run(tmp_path / name, f"s{seed}", [(10, 1.0)], seed=seed, gamma=len(name) / 2)
        (tmp_path / name / "population.json").write_text("{}")
    make_run(tmp_path, "single", [(10, 1.0)], seed=3)
    make_run(tmp_path / "no_population", "s9", [(10, 1.0)], seed=9)

    def found(*given):
        return sorted(str(curve.run_dir) for curve in read_curves(given, RETURN))

    assert found(tmp_path / "p") == [f"{tmp_path}/p/s1", f"{tmp_path}/p/s2"]
    assert found(tmp_path) == [
        *(f"{tmp_path}/{name}/s{seed}" for name in "pq" for seed in (1, 2)),
        f"{tmp_path}/single",
    ]


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"env_id": ["CartPole-v1"], "seed": 1}',
        '{"env_id": "CartPole-v1", "seed": [1]}',
        '{"env_id": "CartPole-v1", "seed": 1, "recipe": []}',
        '{"env_id": "CartPole-v1"}',
    ],
    ids=lambda content: content[:40],
)
def test_settings_of_another_kind_are_refused(tmp_path, capsys, content):
    run = make_run(tmp_path, "a", [(1, 1.0), (5, 1.0)])
    (run / "config.json").write_text(content)
    assert "config.json" in refused(capsys, run, "--out", tmp_path / "x.png")


@pytest.mark.parametrize(
    "row",
    [
        "[" * 100_000,
        "[1]",
        "1",
        '{"env_steps": "5"}',
        '{"env_steps": true}',
        '{"env_steps": null}',
        '{"env_steps": NaN}',
        '{"env_steps": 1' + "0" * 400 + "}",
        '{"env_steps": 5, "charts/episodic_return": "1"}',
        '{"env_steps": 5, "charts/episodic_return": [1]}',
        '{"env_steps": 5, "charts/episodic_return": 1' + "0" * 400 + "}",
        '{"env_steps": 5, "\x1b[2J": ""}',
    ],
    ids=lambda row: repr(row)[:60],
)
def test_a_row_of_another_kind_is_refused(tmp_path, capsys, row):
    run = make_run(tmp_path, "a", [(1, 1.0)])
    with open(run / "metrics.jsonl", "a") as file:
        file.write(row + "\n")
    message = refused(capsys, run, "--out", tmp_path / "x.png")
    assert "metrics.jsonl: expected an iteration in line 2, got " in message
    assert "\x1b" not in message
