import dataclasses
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
from conftest import ROOT, digest, last
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState
from PIL import Image

from vecpg.cli import parse_config
from vecpg.config import Config, ConfigError, to_dict
from vecpg.population import RunsFailed
from vecpg.run.directory import hold
from vecpg.run.interrupts import Interrupted
from vecpg.run.resume import find_named_run, name_of
from vecpg.train import TrainResult, train
from vecpg.tune import cli, report, rounds, study
from vecpg.tune.settings import TuneConfig
from vecpg.tune.space import Parameter, draw, read_space

# The best of it is where the learning rate is 0.01 and there are 16 copies.
SPACE = ["--param", "learning_rate=log:1e-4:1", "--param", "num_envs=choice:8,16,32"]


def planted(config):
    """Grows with the budget; a seed's luck is less than what most settings differ by."""
    off = abs(math.log10(config.learning_rate) + 2) + abs(math.log2(config.num_envs) - 4)
    return 100 - 10 * off + config.total_timesteps / 1000 + 0.01 * (config.seed % 3) ** 2


class Population:
    """Stands for `train_many`: leaves directories as runs do, and scores by a function."""

    def __init__(self, score=planted):
        self.score, self.calls = score, []

    def __call__(self, configs):
        self.calls.append(configs)
        results, failures = [], {}
        for place, config in enumerate(configs):
            run_dir = Path(config.out_dir) / f"{name_of(config)}__0"
            reached = run_dir / "env_steps"
            if config.resume is None:
                run_dir.mkdir()  # there is none yet
                (run_dir / "config.json").write_text(json.dumps(to_dict(config)))
            else:
                assert find_named_run(Path(config.resume)) == run_dir
                assert int(reached.read_text()) <= config.total_timesteps
            reached.write_text(str(config.total_timesteps))
            score = self.score(config)
            results.append(None if isinstance(score, Exception) else self.result(config, score))
            if isinstance(score, Exception):
                failures[place] = score
        if failures:
            raise RunsFailed([""] * len(configs), results, failures)
        return results

    @staticmethod
    def result(config, score):
        summary = {"eval_return_mean": score, "env_steps": config.total_timesteps + config.num_envs}
        return TrainResult(None, Path(config.out_dir), summary)


@pytest.fixture
def tune(monkeypatch, capsys, caplog, tmp_path):
    """Run `vecpg tune ARGS` on planted scores, without pictures: status, what was found, words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(report, "save_pictures", lambda search: [])
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no power fails

    def run(*args, population=None):
        monkeypatch.setattr(rounds, "train_many", population or Population())
        caplog.clear()
        code = 0
        try:
            cli.tune_main([str(arg) for arg in args])
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        log = "".join(f"{message}\n" for message in caplog.messages)
        return code, json.loads(out) if out else None, log + err

    return run


def refused(tune, *args):
    code, found, err = tune(*args)
    assert (code, found) == (2, None)
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert not list(Path().iterdir()), "nothing is begun"
    return err


def trials_of(found):
    with study.held(Path(found["study_dir"])) as known:
        return known.get_trials()


def without_clock(found):
    return {
        name: value for name, value in found.items() if name not in ("wall_seconds", "study_dir")
    }


def test_the_best_of_a_planted_objective_survives_and_half_go_after_each_round(tune):
    population = Population()
    code, found, err = tune(*SPACE, "--total-timesteps", "4000", population=population)
    assert code == 0
    first, second, third = population.calls
    # All settings were there from the first round on, over the same seeds each.
    tried = {(one.learning_rate, one.num_envs) for one in first}
    assert len(tried) == 16
    assert [one.seed for one in first] == [1, 2, 3] * 16
    for calls, left, budget in ((first, 16, 1000), (second, 8, 2000), (third, 4, 4000)):
        assert len(calls) == 3 * left
        assert {one.total_timesteps for one in calls} == {budget}
        best_first = sorted(
            tried, key=lambda at: -planted(Config(learning_rate=at[0], num_envs=at[1]))
        )
        assert {(one.learning_rate, one.num_envs) for one in calls} == set(best_first[:left])
        # Begun once, and gone on with.
        assert {one.resume is None for one in calls} == {budget == 1000}
    best = max(first, key=planted)
    wanted = {"learning_rate": best.learning_rate, "num_envs": best.num_envs}
    assert found["best"]["settings"] == wanted
    scores = [
        planted(dataclasses.replace(best, seed=seed, total_timesteps=4000)) for seed in (1, 2, 3)
    ]
    assert found["best"]["scores"] == scores
    assert found["best"]["score"] == statistics.median(scores)
    assert found["gap"]["score"] == found["best"]["score"] - found["second"]["score"] > 0
    assert (found["trials"], found["pruned"], found["failed"]) == (16, 12, 0)
    assert "round 1 of 3, 1,000 steps: 16 settings, " in err
    assert "8 pruned; best" in err


def test_optuna_knows_of_every_trial_what_happened(tune):
    _, found, _ = tune(*SPACE, "--total-timesteps", "4000")
    trials = trials_of(found)
    states = [trial.state for trial in trials]
    assert [states.count(state) for state in (TrialState.PRUNED, TrialState.COMPLETE)] == [12, 4]
    for trial in trials:
        settings = {"learning_rate": trial.params["learning_rate"]}
        config = Config(**settings, num_envs=int(trial.params["num_envs"]), seed=1)
        for budget, value in trial.intermediate_values.items():
            # The luck of the seeds 1, 2 and 3 is 1, 4 and 0 hundredths.
            assert value == planted(dataclasses.replace(config, total_timesteps=budget))
        assert trial.value == trial.intermediate_values[max(trial.intermediate_values)]
        assert trial.distributions["learning_rate"].log
    best = optuna.load_study(
        study_name="search", storage=study._storage(Path(found["study_dir"]))
    ).best_trial
    assert best.number == found["best"]["trial"]


def test_one_lucky_seed_does_not_carry_a_setting_and_equal_ones_go_on(tune):
    def score(config):
        lucky = config.seed == 2 and config.exp_name == "trial5"
        return 1e9 if lucky else 5.0 if config.exp_name in ("trial1", "trial3", "trial4") else 1.0

    population = Population(score)
    _, found, _ = tune(*SPACE, "--trials", "6", "--rounds", "2", population=population)
    assert {one.exp_name for one in population.calls[1]} == {"trial1", "trial3", "trial4"}
    # Of equals, what took fewer steps: here what has fewer copies.
    left = {one.exp_name: one.num_envs for one in population.calls[1]}
    assert left[f"trial{found['best']['trial']}"] == min(left.values())
    assert found["gap"]["score"] == 0
    # With all the same, nobody is below the median.
    population = Population(lambda config: 3.0)
    _, found, _ = tune(*SPACE, "--trials", "4", population=population)
    assert [len(call) for call in population.calls] == [12, 12, 12]
    assert found["pruned"] == 0


def test_wherever_a_search_is_cut_it_goes_on_to_the_same_end(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    left = math.inf  # steps to the cut

    def cut_before(function):
        def counted(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Interrupted(2)
            return function(*args, **kwargs)

        return counted

    def train_many(configs):
        """Cut also between its runs."""
        return [cut_before(Population())([config])[0] for config in configs]

    monkeypatch.setattr(rounds, "train_many", train_many)
    for kind, name in (
        *((optuna.Study, name) for name in ("enqueue_trial", "set_user_attr", "tell")),
        *((optuna.Trial, name) for name in ("set_user_attr", "report")),
    ):
        monkeypatch.setattr(kind, name, cut_before(getattr(kind, name)))

    def search(study_dir):
        with study.held(study_dir) as known:
            one = rounds.Search(study_dir, known, study.read(study_dir))
            one.run()
            best, *_ = one.finalists()
            told = [(t.state, t.params, t.intermediate_values, t.value) for t in known.trials]
            return best.number, one.confirm(best), told

    config = TuneConfig(
        param=tuple(SPACE[1::2]), trials=4, rounds=2, seeds_per_trial=2, confirm_seeds=2
    )
    space = read_space(config.param, config.fixed)
    drawn = draw(space, config.trials, seed=1)

    def begin(name):
        out_dir = dataclasses.replace(config, out_dir=str(tmp_path / name))
        return study.begin(out_dir, space, drawn)

    uncut = search(begin("uncut"))
    assert [state for state, *_ in uncut[2]].count(TrialState.PRUNED) == 2
    for cut in range(1000):
        study_dir, left = begin(str(cut)), cut
        try:
            search(study_dir)
            break
        except Interrupted:
            left = math.inf
        assert search(study_dir) == uncut, cut
    assert cut == 2 * 4 + 3 * 4 + 2 + 2 * 2 + 3 * 2 + 2 + 4
    # Before it is begun there is nothing to go on with, and nothing is left behind.
    for cut in range(6):
        left = cut
        with pytest.raises(Interrupted):
            begin("none")
        assert not list((tmp_path / "none").iterdir())


def test_ctrl_c_says_how_to_go_on(tune):
    def score(config):
        if config.total_timesteps > 1000 and not again:
            raise Interrupted(2)
        return planted(config)

    again = False
    args = [*SPACE, "--trials", "4", "--rounds", "2", "--total-timesteps", "2000"]
    code, found, log = tune(*args, population=Population(score))
    assert (code, found) == (130, None)
    again = True
    words = shlex.split(re.search(r"^to go on: (.*)$", log, re.M)[1])
    code, found, _ = tune(*words[words.index("tune") + 1 :], population=Population(score))
    assert code == 0
    assert found["pruned"] == 2


def test_a_setting_whose_run_fails_goes_and_the_others_go_on(tune):
    def score(config):
        fails = config.exp_name in ("trial0", "trial2") and config.seed == 2
        return FloatingPointError("loss is not finite") if fails else planted(config)

    population = Population(score)
    code, found, err = tune(*SPACE, "--trials", "8", population=population)
    assert code == 0
    assert (found["failed"], found["pruned"]) == (2, 4)
    assert [len(call) // 3 for call in population.calls] == [8, 3, 2]
    assert "trial0 failed: learning_rate " in err
    states = [trial.state for trial in trials_of(found)]
    assert states[0] == states[2] == TrialState.FAIL

    code, found, err = tune(*SPACE, population=Population(lambda config: MemoryError("no room")))
    assert (code, found) == (1, None)
    assert err.splitlines()[-1] == "error: all 16 settings failed"


def test_what_is_no_fault_of_the_settings_stops_the_search_and_it_can_go_on(tune):
    full = [True]

    def score(config):
        return OSError("no space left") if full and config.exp_name == "trial1" else planted(config)

    code, found, err = tune(*SPACE, population=Population(score))
    assert (code, found) == (1, None)
    assert err.splitlines()[-1] == "error: no space left"
    full.clear()
    (study_dir,) = Path("runs").iterdir()
    code, found, _ = tune("--resume", study_dir, population=Population(score))
    assert code == 0
    assert (found["pruned"], found["failed"]) == (12, 0)


def test_what_a_killed_process_leaves_is_mended(tune):
    _, uncut, _ = tune(*SPACE)
    study_dir = Path(uncut["study_dir"])
    journal = study_dir / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    # The last round's end is lost, and half a line is there.
    journal.write_bytes(b"".join(lines[:-3]) + lines[-3][:20])
    code, found, _ = tune("--resume", study_dir)
    assert code == 0
    assert without_clock(found) == without_clock(uncut)
    assert trials_of(found)[0].state.is_finished()


def test_two_processes_do_not_search_in_one_directory(tune):
    _, found, _ = tune(*SPACE)
    with hold(Path(found["study_dir"])):
        code, _, err = tune("--resume", found["study_dir"])
    assert code == 2
    assert f"one that process {os.getpid()} trains" in err


def test_a_search_goes_on_with_its_own_settings(tune):
    args = [*SPACE, "--trials", "4", "--rounds", "2", "--gamma", "0.9", "--seed", "7"]
    _, found, _ = tune(*args)
    again = ("--resume", found["study_dir"])
    population = Population()
    code, more, _ = tune(*again, "--confirm-seeds", "3", population=population)
    assert code == 0
    ((*runs,),) = population.calls  # all rounds are done
    assert [one.seed for one in runs] == [10, 11, 12] * 2
    assert {one.gamma for one in runs} == {0.9}
    assert more["best"] == found["best"]
    for other, message in (
        (("--gamma", "0.8"), "--gamma: expected 0.9, with which the search was begun, got 0.8"),
        (("--trials", "5"), "--trials: expected 4, with which"),
        (("--param", "gamma=choice:0.5,0.6"), "--param: expected"),
        (("--total-timesteps", "7"), "--total-timesteps: expected 500000, with which"),
    ):
        code, _, err = tune(*again, *other)
        assert code == 2
        assert message in err


def test_what_cannot_be_begun_leaves_nothing_behind(tune):
    class Refusing(Population):
        def __call__(self, configs):
            raise ConfigError("--env-kwargs: expected others")

    code, _, err = tune(*SPACE, population=Refusing())
    assert code == 2
    assert err.splitlines()[-1] == "error: --env-kwargs: expected others"
    assert "to go on" not in err
    assert not list(Path("runs").iterdir())
    # Runs that are there stay.
    _, found, _ = tune(*SPACE, "--trials", "2", "--rounds", "1")
    again = ("--resume", found["study_dir"], "--confirm-seeds", "2")
    assert tune(*again, population=Refusing())[0] == 2
    assert tune(*again)[0] == 0


def test_names_of_modules_are_not_taken_from_a_journal(tune):
    Path("tuned_wrapper.py").write_text("def wrap(env):\n    return env\n")
    args = [*SPACE, "--trials", "2", "--rounds", "1", "--wrappers", "tuned_wrapper:wrap"]
    _, found, _ = tune(*args)
    code, _, err = tune("--resume", found["study_dir"])
    assert code == 2
    assert "if you trust tuned_wrapper:wrap, type: " in err
    code, more, _ = tune("--resume", found["study_dir"], "--wrappers", "tuned_wrapper:wrap")
    assert code == 0
    assert more["best"] == found["best"]


def test_the_best_is_confirmed_over_seeds_that_chose_nothing(tune):
    population = Population()
    args = [
        *SPACE,
        "--trials",
        "4",
        "--confirm-seeds",
        "5",
        "--total-timesteps",
        "4000",
        "--seed",
        "5",
    ]
    _, found, err = tune(*args, population=population)
    confirming = population.calls[-1]
    assert [one.seed for one in confirming] == [8, 9, 10, 11, 12] * 2
    assert {one.seed for call in population.calls[:-1] for one in call} == {5, 6, 7}
    assert {one.total_timesteps for one in confirming} == {4000}
    best, default = confirming[0], confirming[-1]
    assert found["best"]["settings"] == {
        "learning_rate": best.learning_rate,
        "num_envs": best.num_envs,
    }
    assert (default.learning_rate, default.num_envs) == (Config().learning_rate, Config().num_envs)
    confirmed = found["confirmed"]
    assert confirmed["seeds"] == [8, 12]
    for name, runs in (("best", confirming[:5]), ("default", confirming[5:])):
        scores = sorted(map(planted, runs))
        assert sorted(confirmed[name]["scores"]) == scores
        assert confirmed[name]["score"] == pytest.approx(sum(scores[1:4]) / 3)
        low, high = confirmed[name]["interval"]
        assert scores[0] <= low < confirmed[name]["score"] < high <= scores[-1]
    gap = confirmed["best"]["score"] - confirmed["default"]["score"]
    assert confirmed["gap"]["score"] == pytest.approx(gap)
    low, high = confirmed["gap"]["interval"]
    assert 0 < low < gap < high
    assert "default, fresh seeds: interquartile mean" in err


def test_the_command_trains_with_the_best_settings(tune):
    args = [
        *("--recipe", "vpg", "--env-id", "Acrobot-v1", "--env-kwargs", '{"render_mode": null}'),
        *(
            "--no-confirm",
            "--seed",
            "5",
            "--trials",
            "4",
            "--rounds",
            "1",
            "--param",
            "normalize=choice:true,false",
        ),
        *("--param", "hidden_sizes=choice:32 16,8", "--param", "max_grad_norm=choice:none,0.5"),
    ]
    population = Population(lambda config: sum(config.hidden_sizes))
    _, found, _ = tune(*args, population=population)
    words = shlex.split(found["command"])
    typed = parse_config(words[words.index("train") + 1 :])
    (best, *_) = [one for one in population.calls[0] if one.hidden_sizes == (32, 16)]
    of_the_search = {name: getattr(typed, name) for name in ("exp_name", "out_dir", "seed")}
    settings = found["best"]["settings"]
    assert settings["hidden_sizes"] == [32, 16]
    normalize, norm = settings["normalize"], settings["max_grad_norm"]
    assert typed == dataclasses.replace(
        best, **of_the_search, normalize=normalize, max_grad_norm=norm
    )
    assert not {"--gamma", "--seed", "--baseline", "--exp-name"} & set(words)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--param: expected at least one, such as learning_rate=log:1e-4:1e-1"),
        (["--param", "learning_rat=log:1e-4:1"], "searched; did you mean learning_rate?"),
        (
            ["--param", "env_id=choice:A,B"],
            "--param env_id: expected a setting that can be searched",
        ),
        (
            ["--param", "seed=int:1:9"],
            "--param seed: expected a setting that can be searched; there",
        ),
        (["--param", "activation_memory=int:0:9"], "expected a setting that can be searched"),
        (["--param", "gamma"], "expected gamma=log:LOW:HIGH, linear:LOW:HIGH, int:LOW:HIGH or"),
        (["--param", "gamma=uniform:0:1"], "choice:A,B,..., got uniform:0:1"),
        (["--param", "gamma=linear:0.9"], "expected linear:LOW:HIGH, two numbers, got linear:0.9"),
        (["--param", "gamma=linear:0.9:1:1"], "two numbers, got linear:0.9:1:1"),
        (["--param", "gamma=linear:1:0.9"], "expected LOW less than HIGH, both finite, got 1:0.9"),
        (["--param", "gamma=linear:nan:1"], "expected LOW less than HIGH"),
        (["--param", "ent_coef=linear:0:inf"], "expected LOW less than HIGH, both finite"),
        (["--param", "ent_coef=log:0:1"], "expected LOW greater than 0 for log, got 0:1"),
        (["--param", "num_envs=int:1.5:8"], "expected whole numbers for int, got 1.5:8"),
        (["--param", "num_envs=linear:1:8"], "--num-envs: expected a whole number, got 1.0"),
        (["--param", "gamma=linear:0.9:1.1"], "--gamma: expected a number in [0, 1], got 1.1"),
        (["--param", "num_envs=choice:8,x"], "--num-envs: expected a whole number, got 'x'"),
        (["--param", "num_envs=choice:8,0"], "--num-envs: expected at least 1, got 0"),
        (
            ["--param", "num_envs=choice:8"],
            "expected at least two values, got 8; fix it by --num-envs",
        ),
        (["--param", "gamma=choice:0.9,0.90"], "expected different values, got 0.9 twice"),
        (["--param", "gamma=choice:0.9,,1"], "expected values with commas between"),
        (["--param", "weights=choice:gae,full_return"], "--weights gae: expected --baseline value"),
        ([*SPACE, *SPACE[:2]], "--param learning_rate: expected it once, got it 2 times"),
        ([*SPACE, "--learning_rate=0.1"], "expected it here or as --param learning_rate, got both"),
        (
            ["--param", "normalize=choice:true,false", "--no-normalize"],
            "--normalize: expected it here or as --param normalize, got both",
        ),
        (
            ["--param", "num_envs=choice:30,8", "--shards", "8"],
            "--param num_envs=choice:30,8: --shards: expected a number that divides --num-envs 30",
        ),
        (
            [*SPACE[:2], "--param", "baseline=choice:none,value", "--bootstrap-truncations"],
            "--bootstrap-truncations: expected --baseline value",
        ),
        ([*SPACE, "--trials", "1"], "--trials: expected at least 2, got 1"),
        ([*SPACE, "--seeds-per-trial", "0"], "--seeds-per-trial: expected at least 1, got 0"),
        ([*SPACE, "--rounds", "6"], "--rounds: expected at most 5, which leave one of 16 trials"),
        ([*SPACE, "--rounds", "0"], "--rounds: expected at least 1, got 0"),
        ([*SPACE, "--confirm-seeds", "-1"], "--confirm-seeds: expected at least 0, got -1"),
        (
            [*SPACE, "--total-iterations", "9"],
            "--total-iterations: expected none, since rounds share",
        ),
        ([*SPACE, "--total-timesteps", "none"], "a run needs an end"),
        ([*SPACE, "--total-timesteps", "3"], "--total-timesteps: expected at least 4, since each"),
        ([*SPACE, "--trails", "3"], "did you mean --trials?"),
        ([*SPACE, "--env-id", "Pendulm-v1"], "Did you mean: `Pendulum`?"),
        ([*SPACE, "--recipe", "vgp"], "did you mean vpg?"),
        (["--resume", "nothing"], "--resume nothing: expected the directory of a search, got none"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_begun(tune, args, message):
    assert message in refused(tune, *args)


def test_settings_that_do_not_go_together_are_refused_with_their_values(tune):
    inside = ["--param", "num_envs=int:8:16", "--shards", "8"]
    err = refused(tune, *inside)
    assert "--param: num_envs " in err
    assert " do not go together: --shards: expected a number that divides --num-envs" in err


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"[1]\n", b"\xff\n{}\n"])
def test_a_damaged_journal_is_one_line(tune, damage):
    Path("search").mkdir()
    Path("search/journal.log").write_bytes(damage)
    code, _, err = tune("--resume", "search")
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err


def test_without_optuna_it_says_what_to_install(tune, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert refused(tune, *SPACE) == "error: vecpg tune needs optuna: pip install 'vecpg[tune]'\n"


def test_help_needs_neither_torch_nor_optuna():
    program = (
        "import atexit, sys\n"
        "from vecpg.cli import main\n"
        "atexit.register(lambda: print({'torch', 'optuna', 'numpy'} & set(sys.modules)))\n"
        "main(['tune', '--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stderr
    assert "--seeds-per-trial" in done.stdout


def test_settings_are_spread_over_every_part_of_their_ranges():
    space = [
        Parameter("num_envs", "int", (1, 12)),
        Parameter("num_steps", "choice", tuple(range(6))),
        Parameter("gamma", "linear", (0.0, 1.2)),
        Parameter("learning_rate", "log", (1e-6, 1e6)),
    ]
    drawn = draw(space, 12, seed=3)
    # One in each twelfth.
    assert sorted(one["num_envs"] for one in drawn) == list(range(1, 13))
    assert sorted(one["num_steps"] for one in drawn) == sorted([*range(6)] * 2)
    for part, value in enumerate(sorted(one["gamma"] for one in drawn)):
        assert part / 10 - 0.005 <= value <= (part + 1) / 10 + 0.005  # it has three digits
    assert sorted(math.floor(math.log10(one["learning_rate"])) for one in drawn) == list(
        range(-6, 6)
    )
    # In no order, and none like another parameter's.
    ranks = np.argsort(np.argsort([[one[p.name] for one in drawn] for p in space[::2]], axis=1))
    assert abs(np.corrcoef(ranks)[0, 1]) < 0.9
    assert drawn == draw(space, 12, seed=3)
    assert drawn != draw(space, 12, seed=4)


@given(
    st.sampled_from(["log", "linear", "int"]),
    st.floats(1e-6, 1e6),
    st.floats(1.0001, 1e6),
    st.floats(0, 1, exclude_max=True),
)
def test_no_value_is_outside_its_range(kind, low, factor, place):
    high = low * factor
    if kind == "int":
        low, high = math.ceil(low), math.ceil(high) + 1
    value = Parameter("ent_coef", kind, (low, high)).at(place)
    assert low <= value <= high
    assert isinstance(value, int if kind == "int" else float)


def test_pictures_are_kept(tmp_path, monkeypatch):
    def score(config):
        return FloatingPointError("nan") if config.exp_name == "trial3" else planted(config)

    monkeypatch.setattr(rounds, "train_many", Population(score))
    config = TuneConfig(param=tuple(SPACE[1::2]), out_dir=str(tmp_path), trials=8)
    space = read_space(config.param, config.fixed)
    study_dir = study.begin(config, space, draw(space, 8, seed=1))
    with study.held(study_dir) as known:
        search = rounds.Search(study_dir, known, config)
        search.run()
        paths = report.save_pictures(search)
    assert [path.name for path in paths] == ["history.png", "importances.png", "slices.png"]
    for path in paths:
        assert len(np.unique(np.asarray(Image.open(path).convert("L")))) > 20


@pytest.mark.slow
def test_scores_are_those_of_runs_that_were_never_stopped(tmp_path):
    few = {"env_id": "CartPole-v1", "total_timesteps": 3000, "eval_episodes": 5, "progress": False}
    param = ("learning_rate=log:1e-3:1e-1", "num_envs=choice:2,4")
    sizes = {"trials": 4, "rounds": 3, "seeds_per_trial": 2}
    config = TuneConfig(**few, **sizes, param=param, out_dir=str(tmp_path / "searched"))
    space = read_space(config.param, config.fixed)
    study_dir = study.begin(config, space, draw(space, 4, seed=1))
    with study.held(study_dir) as known:
        search = rounds.Search(study_dir, known, config)
        search.run()
        (best,) = search.finalists()
    alone = [
        train(Config(**few, **search.settings(best), seed=seed, out_dir=str(tmp_path / "alone")))
        for seed in (1, 2)
    ]
    scores = [one.summary["eval_return_mean"] for one in alone]
    assert best.user_attrs["scores"] == scores
    assert len(set(scores)) == 2
    for one in alone:
        (gone_on,) = study_dir.glob(f"*__trial{best.number}__{one.summary['seed']}__*")
        theirs, ours = (
            {name: value for name, value in last(run_dir).items() if name != "seconds"}
            for run_dir in (one.run_dir, gone_on)
        )
        assert digest(ours) == digest(theirs)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ([1.0, 9.0], "for the best"),
        ([-9.0, -1.0], "for the default: keep it"),
        ([-1.0, 9.0], "no proof for either"),
        (None, "no proof for either"),
    ],
)
def test_a_gap_is_proof_for_one_of_them_or_for_none(interval, verdict):
    assert report._verdict({"score": 0.0, "interval": interval}) == verdict
