import itertools
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
from drawn import RETURN, make_run, refused
from matplotlib import rc_context

from vecpg.cli import plot_main
from vecpg.config import Config
from vecpg.look.curves import group_curves, read_curves
from vecpg.look.plot import _WORDS, centre_and_band, draw, draw_profiles, plot


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
        _, _, (low, high) = centre_and_band(curves)
        held += bool(low[0] <= 5.0 <= high[0])
    assert abs(held / draws - 0.95) < 4 * math.sqrt(0.95 * 0.05 / draws)


def test_the_interquartile_mean_and_its_band(tmp_path):
    """Of four seeds it is the mean of two; the band's oracle are all 256 resamples."""
    values = [[0.0, 1.0], [10.0, 7.0], [3.0, 900.0], [4.5, 5.0]]
    for seed, (first, last) in enumerate(values):
        make_run(tmp_path, f"s{seed}", [(10, first), (20, last)], seed=seed)
    curves = read_curves([tmp_path], RETURN)
    (axes,) = draw(group_curves(curves), RETURN, "iqm").axes
    assert lines(axes)["4 seeds"].tolist() == [[10, 3.75], [20, 6.0]]
    edges = band(axes.collections[0])
    for steps, at in zip((10, 20), zip(*values, strict=True), strict=True):
        found = sorted(sum(sorted(each)[1:3]) / 2 for each in itertools.product(at, repeat=len(at)))
        assert edges[steps] == pytest.approx((found[6], found[249]))  # 2.5 % of 256 are 6.4
    title = axes.get_legend().get_title().get_text()
    assert title.startswith("interquartile mean over seeds, 95 % band (bootstrap, 2,000 resamples)")
    assert title.endswith("as far as every seed has data")


def test_a_band_over_many_steps_is_that_of_few_of_them(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for seed in range(5):
        points = [(steps**2, float(generator.normal())) for steps in range(1, 12)]
        make_run(tmp_path, f"s{seed}", points, seed=seed)
    curves = read_curves([tmp_path], RETURN)
    steps, centre, everywhere = centre_and_band(curves, "iqm")
    monkeypatch.setattr("vecpg.look.plot._PLACES", 3)
    fewer_steps, same, fewer = centre_and_band(curves, "iqm")
    assert (fewer_steps == steps).all()
    assert (same == centre).all()
    exact = [0, 5, 10]
    assert (fewer[:, exact] == everywhere[:, exact]).all()
    between = (81 - 36) / (121 - 36)
    expected = (1 - between) * fewer[:, 5] + between * fewer[:, 10]
    assert fewer[:, 8].tolist() == pytest.approx(expected.tolist())


def steps_of(line):
    """What a step line shows at a place between its corners."""
    xs, ys = line.get_xydata().T
    assert line.get_drawstyle() == "steps-post"
    return lambda x: float(ys[np.searchsorted(xs, x, side="right") - 1])


def test_a_profile_is_the_share_of_runs_above(tmp_path):
    scores = [9.0, 1.0, 3.0, 3.0, -2.0]
    for seed, score in enumerate(scores):
        # Its last value counts, not its highest.
        make_run(tmp_path, f"s{seed}", [(10, 50.0), (20, score)], seed=seed)
    make_run(tmp_path, "alone", [(20, 12.0)], gamma=0.5)
    (axes,) = draw_profiles(group_curves(read_curves([tmp_path], RETURN)), RETURN).axes
    many, alone = (
        next(line for line in axes.lines if line.get_label().endswith(f"({seeds})"))
        for seeds in ("5 seeds", "1 seed")
    )
    for tau in (-2.5, -2.0, 0.0, 1.0, 2.9, 3.0, 8.9, 9.0, 12.0, 12.5):
        assert steps_of(many)(tau) == sum(score > tau for score in scores) / 5
        assert steps_of(alone)(tau) == float(tau < 12)
    (filled,) = axes.collections
    corners = filled.get_paths()[0].vertices
    # A resample's number of runs above is binomial: 5 runs, share 4 of 5 after the first fall.
    for tau, share in ((-1.0, 0.8), (2.0, 0.6), (5.0, 0.2)):
        chances = [math.comb(5, k) * share**k * (1 - share) ** (5 - k) for k in range(6)]
        below = np.cumsum(chances)
        expected = (np.argmax(below > 0.025) / 5, np.argmax(below > 0.975) / 5)
        low, high = heights(corners, tau)
        assert (low, high) == pytest.approx(expected), tau
    assert heights(corners, -2.5) == (1, 1)
    assert heights(corners, 11.0) == (0, 0)
    assert axes.get_xlabel() == "tau, at a run's end: mean return of an episode (reward)"
    assert "95 % band (bootstrap, 2,000 resamples)" in axes.get_legend().get_title().get_text()


def heights(corners, x):
    """Where a vertical line crosses the outline of what was filled, from below."""
    crossed = []
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        if min(x0, x1) <= x < max(x0, x1):
            crossed.append(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
    return min(crossed), max(crossed)


def test_equal_scores_are_a_profile_too(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, f"s{seed}", [(10, 500.0)], seed=seed)
    (axes,) = draw_profiles(group_curves(read_curves([tmp_path], RETURN)), RETURN).axes
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[499, 1], [500, 0], [501, 0]]


def test_without_a_tag_the_profile_is_of_the_evaluation_at_the_end(tmp_path, capsys, caplog):
    for seed in (1, 2, 3):
        run = make_run(tmp_path, f"s{seed}", [(10, 1.0)], seed=seed)
        if seed < 3:
            ended = {"env_steps": 10, "eval_return_mean": 100.0 * seed}
            (run / "summary.json").write_text(json.dumps(ended))
    (axes,) = draw_profiles(group_curves(read_curves([tmp_path], None)), None).axes
    assert axes.lines[0].get_xydata()[1:-1].tolist() == [[100, 0.5], [200, 0]]
    assert axes.get_xlabel() == "tau, at a run's end: greedy return (reward)"
    out = ("--out", tmp_path / "x.png", "--kind", "profile")
    plot_main([str(each) for each in (tmp_path, *out)])
    assert json.loads(capsys.readouterr().out)["runs"] == 2
    assert f"left out: {tmp_path / 's3'} has no summary.json" in caplog.text
    assert "has not come to its end" in refused(capsys, tmp_path / "s3", *out)
    for content in ("[]", "{}", '{"env_steps": 1, "eval_return_mean": NaN}'):
        (tmp_path / "s1" / "summary.json").write_text(content)
        assert "summary.json: expected numbers by the names" in refused(capsys, tmp_path, *out)
    message = refused(capsys, tmp_path, *out, "--statistic", "iqm")
    assert "--statistic: expected none for a profile" in message


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
        no_result = {"threads": seed, "save_every": 3.0 * seed, "activation_memory": seed}
        make_run(tmp_path, f"a{seed}", [(1, 1.0), (9, 1.0)], seed=seed, num_envs=8)
        make_run(tmp_path, f"b{seed}", [(1, 3.0), (9, 3.0)], seed=seed, **no_result)
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
    source = (ROOT / "vecpg" / "run" / "outcomes.py").read_text()
    tags = set(re.findall(r'"((?:charts|eval|losses)/\w+)"', source))
    assert len(tags) >= 7
    assert tags <= set(_WORDS)
