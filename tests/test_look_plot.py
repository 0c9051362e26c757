import json
import math
import os
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from matplotlib import rc_context

from vecpg.cli import plot_main
from vecpg.config import Config, to_dict
from vecpg.look.plot import _WORDS, draw, group_curves, mean_and_band, plot, read_curves, student_t

RETURN = "charts/episodic_return"


def make_run(root, name, points, tag=RETURN, **settings):
    """A run directory with these (env_steps, value) pairs."""
    run = root / name
    run.mkdir(parents=True)
    config = to_dict(Config(**settings)) | {"exp_name": name, "out_dir": str(root)}
    (run / "config.json").write_text(json.dumps(config))
    rows = [
        {"iteration": i, "env_steps": steps, "episodes": i, tag: value, "charts/SPS": 1.0 + i}
        for i, (steps, value) in enumerate(points, start=1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def figure(*runs, tag=RETURN):
    return draw(group_curves(read_curves(runs, tag)), tag)


def lines(axes):
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def band(collection):
    """(lower, upper) by number of steps, from the corners of what was filled."""
    corners = {}
    for steps, height in collection.get_paths()[0].vertices:
        corners.setdefault(float(steps), []).append(float(height))
    return {steps: (min(heights), max(heights)) for steps, heights in corners.items()}


def refused(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        plot_main([str(arg) for arg in args])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    return captured.err


# Published in every table of Student's distribution (two-sided, 95 %).
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize(("degrees", "published"), TABLE.items())
def test_students_t_is_the_published_one(degrees, published):
    assert round(student_t(degrees), 3) == published


def test_the_line_and_the_band_that_are_drawn(tmp_path):
    make_run(tmp_path, "a", [(10, 1.0), (30, 5.0), (50, 7.0)], seed=1)
    make_run(tmp_path, "b", [(20, 2.0), (40, 2.0), (60, 9.0)], seed=2)
    make_run(tmp_path, "c", [(10, 0.0), (70, 6.0)], seed=3)
    (axes,) = figure(tmp_path).axes
    # By hand, between 20, where the last begins, and 50, where the first ends.
    at = {
        20: (3.0, 2.0, 1.0),
        30: (5.0, 2.0, 2.0),
        40: (6.0, 2.0, 3.0),
        50: (7.0, 5.5, 4.0),
    }
    assert list(lines(axes)) == ["3 seeds"]
    drawn = lines(axes)["3 seeds"]
    np.testing.assert_allclose(
        drawn, [(steps, sum(each) / 3) for steps, each in at.items()], rtol=1e-12
    )
    (filled,) = axes.collections
    edges = band(filled)
    assert list(edges) == list(at)
    for steps, each in at.items():
        half = 4.302653 * statistics.stdev(each) / math.sqrt(3)
        assert edges[steps] == pytest.approx(
            (statistics.mean(each) - half, statistics.mean(each) + half), rel=1e-6
        )


def test_bands_hold_the_true_mean_as_often_as_they_say(tmp_path):
    generator = np.random.default_rng(0)
    held, draws = 0, 600
    runs = [make_run(tmp_path, str(seed), [(1, 0.0)], seed=seed) for seed in range(3)]
    curves = read_curves(runs, RETURN)
    for _ in range(draws):
        for curve in curves:
            curve.values[:] = generator.normal(5.0, 2.0)
        _, mean, half = mean_and_band(curves)
        held += bool(abs(mean[0] - 5.0) <= half[0])
    assert abs(held / draws - 0.95) < 4 * math.sqrt(0.95 * 0.05 / draws)


def test_one_seed_is_a_line_without_a_band(tmp_path):
    run = make_run(tmp_path, "a", [(10, 1.0), (30, 5.0)])
    (axes,) = figure(run).axes
    assert lines(axes)["1 seed"].tolist() == [[10, 1], [30, 5]]
    assert len(axes.collections) == 0
    assert axes.get_legend().get_title().get_text() == ""


def test_a_single_point_can_be_seen(tmp_path):
    (axes,) = figure(make_run(tmp_path, "a", [(10, 1.0)])).axes
    assert axes.lines[0].get_marker() == "o"


def test_groups_differ_in_settings_and_their_labels_say_in_which(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, f"a{seed}", [(1, 1.0), (9, 1.0)], seed=seed, num_envs=8)
        make_run(tmp_path, f"b{seed}", [(1, 3.0), (9, 3.0)], seed=seed, threads=2, save_every=3.0)
    make_run(tmp_path, "c", [(1, 5.0), (9, 5.0)], gamma=0.5, max_grad_norm=0.1)
    (axes,) = figure(tmp_path).axes
    assert {label: rows[0, 1] for label, rows in lines(axes).items()} == {
        "num_envs 8, gamma 0.99, max_grad_norm none (2 seeds)": 1.0,
        "num_envs 64, gamma 0.99, max_grad_norm none (2 seeds)": 3.0,
        "num_envs 64, gamma 0.5, max_grad_norm 0.1 (1 seed)": 5.0,
    }
    colours = [line.get_color() for line in axes.lines]
    assert len(set(colours)) == 3
    assert [each.get_facecolor()[0, :3].tolist() for each in axes.collections] == [
        [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in colours[:2]
    ]


def test_what_follows_from_the_recipe_is_not_said_again(tmp_path, monkeypatch):
    from vecpg.look import plot as module

    recipes = {"one": (Config(), ""), "other": (Config(recipe="other", gamma=0.5), "")}
    monkeypatch.setattr(module, "RECIPES", recipes)
    make_run(tmp_path, "a", [(1, 1.0)], recipe="one", num_envs=3)
    make_run(tmp_path, "b", [(1, 1.0)], recipe="other", gamma=0.5)
    (axes,) = figure(tmp_path).axes
    assert list(lines(axes)) == [
        "recipe one, num_envs 3 (1 seed)",
        "recipe other, num_envs 64 (1 seed)",
    ]


def test_every_environment_has_its_panel(tmp_path):
    for env_id, value in (("A-v0", 1.0), ("B-v0", 2.0), ("C$x$-v0", 3.0)):
        make_run(tmp_path, env_id, [(1, value), (2, value)], env_id=env_id)
    panels = figure(tmp_path).axes
    assert [axes.get_title() for axes in panels] == ["A-v0", "B-v0", "C\\$x\\$-v0"]
    assert [lines(axes)["1 seed"][0, 1] for axes in panels] == [1, 2, 3]
    for axes in panels:
        assert axes.get_xlabel() == "environment steps"
        assert axes.get_ylabel() == "mean return of an episode (reward)"


def test_nulls_unfinished_lines_and_repeated_iterations_are_no_points(tmp_path):
    run = make_run(tmp_path, "a", [(1, None), (2, 2.0), (4, None), (6, 6.0), (4, 5.0), (8, 7.0)])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 7, "env_st')
    (axes,) = figure(run).axes
    # The run went on from before its step 6.
    assert lines(axes)["1 seed"].tolist() == [[2, 2], [4, 5], [8, 7]]


def test_a_repeated_seed_is_no_further_sample(tmp_path, caplog):
    make_run(tmp_path, "a", [(1, 1.0), (5, 1.0)])
    make_run(tmp_path, "b", [(1, 1.0), (9, 1.0)])
    make_run(tmp_path, "c", [(1, 1.0), (7, 1.0)])
    result = plot([tmp_path, tmp_path / "a"], tmp_path / "x.png")
    assert result == {"out": str(tmp_path / "x.png"), "runs": 1, "groups": 1}
    left_out = [record.getMessage() for record in caplog.records]
    assert [message.split(" repeats ")[0][-1] for message in left_out] == ["a", "c"]
    assert all(message.endswith("b") for message in left_out)


def test_a_found_run_without_values_is_left_out_and_named(tmp_path, capsys, caplog):
    make_run(tmp_path, "a", [(1, 1.0), (5, 1.0)])
    make_run(tmp_path, "b", [])
    plot_main([str(tmp_path), "--out", str(tmp_path / "x.svg")])
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"out": str(tmp_path / "x.svg"), "runs": 1, "groups": 1}
    assert captured.out.count("\n") == 1
    assert f"left out: {tmp_path / 'b'} has no iteration" in caplog.text
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_mistakes_are_one_line_and_status_2(tmp_path, capsys):
    run = make_run(tmp_path / "runs", "a", [(1, 1.0), (5, 1.0)])
    empty = make_run(tmp_path / "others", "b", [])
    out = ("--out", tmp_path / "x.png")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "runs.png").mkdir()
    message = refused(capsys, run, *out, "--tag", "losses/entrpy")
    assert f"(charts/SPS, {RETURN}), got losses/entrpy" in message
    assert "got episodes" in refused(capsys, run, *out, "--tag", "episodes")
    assert "has no iteration in its metrics.jsonl yet" in refused(capsys, empty, *out)
    assert "has no iteration" in refused(capsys, run, empty, *out)
    assert "has no iteration" in refused(capsys, tmp_path / "others", *out)
    assert "got neither" in refused(capsys, tmp_path / "nothing", *out)
    assert "got no directory" in refused(capsys, tmp_path / "missing", *out)
    assert "got a file" in refused(capsys, run / "config.json", *out)
    assert "expected at least one run directory, got none" in refused(capsys, *out)
    assert "cannot be written: No such" in refused(capsys, run, "--out", tmp_path / "no" / "x.png")
    assert "cannot be written: Is a dir" in refused(capsys, run, "--out", tmp_path / "runs.png")
    assert "supported formats: " in refused(capsys, run, "--out", tmp_path / "x.mp3")
    assert "supported formats: " in refused(capsys, run, "--out", tmp_path / "x")
    (run / "metrics.jsonl").write_text("{}\n")
    assert "expected an iteration in line 1, got '{}'" in refused(capsys, run, *out)
    (run / "config.json").write_text("[]")
    assert "expected the settings of a run" in refused(capsys, run, *out)
    (run / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(capsys, run, *out)
    assert not (tmp_path / "x.png").exists()


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


def test_text_of_a_file_is_never_set_by_tex(tmp_path):
    """TeX reads and writes files for whoever writes it a program; it may be missing, too."""
    run = make_run(tmp_path, "a", [(1, 1.0), (5, 1.0)], env_id=r"\input{/etc/passwd}$\frac{$")
    with rc_context({"text.usetex": True}):
        plot([run], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_without_a_common_range_are_named(tmp_path, capsys):
    make_run(tmp_path, "a", [(1, 1.0), (5, 1.0)], seed=1)
    make_run(tmp_path, "b", [(6, 1.0), (9, 1.0)], seed=2)
    message = refused(capsys, tmp_path, "--out", tmp_path / "x.png")
    assert f"got none for {tmp_path / 'a'}, {tmp_path / 'b'}; plot fewer" in message


def test_the_script_needs_neither_a_display_nor_torch(tmp_path):
    run = make_run(tmp_path, "a", [(1, 1.0), (5, 1.0)])
    code = (
        "import sys\n"
        "from vecpg.cli import plot_main\n"
        f"plot_main([{str(run)!r}, '--out', 'x.png'])\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "DISPLAY"}
        | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"out": "x.png", "runs": 1, "groups": 1}
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_every_curve_of_a_run_is_known_in_words():
    source = (ROOT / "vecpg" / "train.py").read_text()
    tags = set(re.findall(r'"((?:charts|eval|losses)/\w+)"', source))
    assert len(tags) >= 7
    assert tags <= set(_WORDS)
