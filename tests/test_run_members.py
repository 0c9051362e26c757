"""The directory of a population, and the command that trains one."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest
from test_run_files import left_behind

from vecpg import population as population_module
from vecpg.cli import main, parse_config
from vecpg.config import Config, ConfigError
from vecpg.run.members import (
    Population,
    configs_of,
    find_population,
    make_population_directory,
    read_population,
)
from vecpg.train import train

SHORT = "--num-envs 4 --hidden-sizes 8 --eval-episodes 2 --total-iterations 3 --return-window 10"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def vecpg(*args):
    """Exit status 0, and 1 or 2 where it exits so."""
    try:
        main(["train", *shlex.split(SHORT), "--no-progress", *map(str, args)])
    except SystemExit as exit_:
        return exit_.code
    return 0


def resumed(*args):
    try:
        main(["train", "--no-progress", *map(str, args)])
    except SystemExit as exit_:
        return exit_.code
    return 0


def folder_of(here):
    (folder,) = (here / "runs").iterdir()
    return folder


def lines(capfd):
    out, err = capfd.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def test_a_line_for_each_run_and_a_table(here, capfd, caplog):
    assert vecpg("--num-seeds", 3, "--seed", 5) == 0
    assert caplog.text.count("CartPole-v1 x 4") == 1
    found, err = lines(capfd)
    folder = folder_of(here)
    assert folder.name.startswith("CartPole-v1__reinforce__5-7__")
    assert sorted(line["seed"] for line in found) == [5, 6, 7]
    for line in found:
        run_dir = here / line["run_dir"]
        assert run_dir.parent == folder
        assert line == json.loads((run_dir / "summary.json").read_text()) | {
            "run_dir": line["run_dir"]
        }
        flags = [*shlex.split(SHORT), "--seed", str(line["seed"]), "--out-dir", "alone"]
        alone = train(dataclasses.replace(parse_config(flags), progress=False))
        assert left_behind(run_dir) == left_behind(alone.run_dir)
    assert "solved 0 of 3\n" in err
    assert "eval_return_mean" in err
    assert f"plot runs/{folder.name} --out curves.png" in err
    assert f"--logdir runs/{folder.name}" in err


def test_a_line_goes_out_as_its_run_ends(here, capfd, monkeypatch):
    real, seen = population_module.train_many, []

    def watched(configs, on_result, on_begun):
        def say(place, result):
            on_result(place, result)
            seen.append(json.loads(capfd.readouterr().out) == result.summary)

        return real(configs, say, on_begun)

    monkeypatch.setattr(population_module, "train_many", watched)
    assert vecpg("--num-seeds", 2) == 0
    assert seen == [True, True]


def test_one_seed_is_one_run(here, capfd):
    assert vecpg("--num-seeds", 1) == 0
    assert len(lines(capfd)[0]) == 1
    assert (folder_of(here) / "config.json").exists()


def test_a_run_that_fails_is_named_and_the_status_is_1(here, capfd, caplog, monkeypatch):
    real = population_module.advance

    def advance(config, *args):
        if config.seed == 2:
            raise FloatingPointError("the loss is nan")
        return real(config, *args)

    monkeypatch.setattr(population_module, "advance", advance)
    assert vecpg("--num-seeds", 3) == 1
    found, err = lines(capfd)
    assert sorted(line["seed"] for line in found) == [1, 3]
    assert "seed 2 failed: FloatingPointError: the loss is nan" in caplog.text
    assert "solved 0 of 2, 1 failed\n" in err
    last = err.splitlines()[-1]
    assert last.startswith("error: 1 of 3 runs failed: seed 2; resume: ")
    # What it says goes on with that one, and the others are told again.
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert resumed(*shlex.split(last.partition("train ")[2])) == 0
    found, err = lines(capfd)
    assert sorted(line["seed"] for line in found) == [1, 2, 3]
    assert "going on" not in caplog.text  # there may be hundreds


def stopped(here, capfd, monkeypatch, *args):
    """A population of which the first run alone has come to its end."""
    real = population_module.advance

    def advance(config, *rest):
        if config.seed != 1:
            raise FloatingPointError("stopped")
        return real(config, *rest)

    monkeypatch.setattr(population_module, "advance", advance)
    assert vecpg("--num-seeds", 3, *args) == 1
    monkeypatch.undo()
    monkeypatch.chdir(here)
    capfd.readouterr()
    return folder_of(here)


def test_auto_goes_on_with_the_newest_that_is_not_finished(here, capfd, monkeypatch):
    folder = stopped(here, capfd, monkeypatch)
    for seeds in (2, 4):  # of other seeds it is another
        assert find_population(Population(Config(resume="auto"), seeds)) is None
    assert find_population(Population(Config(resume="auto", seed=2), 3)) is None
    assert find_population(Population(Config(resume="auto", exp_name="other"), 3)) is None
    assert find_population(Population(Config(resume="auto", env_id="Acrobot-v1"), 3)) is None
    older, other = (
        folder.with_name(f"{name}__reinforce__1-3__{second}")
        for name, second in (("CartPole-v1", 1), ("Acrobot-v1", 99999999999))
    )
    shutil.copytree(folder, older)
    other.mkdir()
    (other / "population.json").write_text("{}")  # as of another version
    assert vecpg("--num-seeds", 3, "--resume", "auto") == 0
    assert len(lines(capfd)[0]) == 3
    for each in (older, other):
        assert len(list(each.glob("*/summary.json"))) == (each == older)
        shutil.rmtree(each)
    assert folder_of(here) == folder
    assert vecpg("--num-seeds", 3, "--resume", "auto") == 0  # that one is finished: a new one
    assert len(list((here / "runs").iterdir())) == 2


def test_limits_may_be_given_anew_and_nothing_else(here, capfd, monkeypatch):
    folder = stopped(here, capfd, monkeypatch)
    assert resumed("--resume", folder, "--total-iterations", 4) == 0
    assert [line["iterations"] for line in lines(capfd)[0]] == [4, 4, 4]
    for flags, message in {
        ("--num-seeds", 2): "--num-seeds: expected 3, with which",
        ("--seed", 2): "--seed: expected 1, with which",
        ("--gamma", 0.5): "--gamma: expected 0.99, with which",
    }.items():
        assert resumed("--resume", folder, *flags) == 2
        assert lines(capfd)[1].startswith(f"error: {message}")


def test_limits_given_anew_hold_when_it_is_stopped_again(here, capfd, monkeypatch):
    """As for one run: the command that is printed goes on to the same end."""
    folder = stopped(here, capfd, monkeypatch)
    real = population_module.advance

    def advance(config, *rest):
        if config.seed == 2:
            raise FloatingPointError("stopped")
        return real(config, *rest)

    monkeypatch.setattr(population_module, "advance", advance)
    assert resumed("--resume", folder, "--total-iterations", 5) == 1
    monkeypatch.undo()
    monkeypatch.chdir(here)
    last = lines(capfd)[1].splitlines()[-1]
    assert resumed(*shlex.split(last.partition("train ")[2])) == 0
    assert [line["iterations"] for line in lines(capfd)[0]] == [5, 5, 5]


def test_what_cannot_be_begun_leaves_the_limits_as_they_were(here, capfd, monkeypatch):
    folder = stopped(here, capfd, monkeypatch)
    before = read_population(folder)
    assert resumed("--resume", folder, "--total-iterations", 5, "--device", "cuda:9") == 2
    assert read_population(folder) == before


def test_what_cannot_go_on_is_one_line_and_nothing_is_lost(here, capfd, monkeypatch):
    folder = stopped(here, capfd, monkeypatch)
    before = sorted(folder.rglob("*"))
    assert resumed("--resume", folder, "--device", "cuda:99") == 2
    assert lines(capfd)[1].splitlines()[-1].startswith("error: --device cuda:99")
    assert sorted(folder.rglob("*")) == before


def test_what_a_file_names_is_typed_again(here, capfd):
    (here / "of_members.py").write_text("def same(env):\n    return env\n")
    assert vecpg("--num-seeds", 2, "--wrappers", "of_members:same", "--vectorization", "sync") == 0
    capfd.readouterr()
    folder = folder_of(here)
    assert resumed("--resume", folder) == 2
    err = lines(capfd)[1]
    assert "--wrappers of_members:same" in err
    assert resumed("--resume", folder, "--wrappers", "of_members:same") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-seeds", 0), "--num-seeds: expected 1 to 100,000, got 0"),
        (("--num-seeds", 100_001), "--num-seeds: expected 1 to 100,000, got 100001"),
        (("--num-seeds", 2, "--seed", 2**64 - 1), "--num-seeds: expected seeds below 2**64"),
        (("--num-seeds", 2, "--env-id", "Nothing-v0"), "Nothing"),
        (("--num-seeds", 2, "--network", "os:getcwd"), ""),  # found when the first is begun
    ],
)
def test_bad_settings_leave_nothing(here, capfd, flags, message):
    assert vecpg(*flags) == 2
    found, err = lines(capfd)
    assert found == []
    assert message in err
    assert not list(here.glob("runs/*"))


def test_what_needs_no_torch_is_found_before_it_is_imported(here, capfd, monkeypatch):
    monkeypatch.setattr(population_module, "train_many", None)
    assert vecpg("--num-seeds", 2, "--env-id", "Nothing-v0") == 2
    assert "Nothing" in lines(capfd)[1]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"num_seeds": 0}', '{"num_seeds": 2.0}', '{"num_seeds": 2, "config": {}}'],
)
def test_a_damaged_file_is_named(here, content):
    folder = make_population_directory(Population(Config(out_dir=str(here)), 2))
    (folder / "population.json").write_text(content)
    with pytest.raises(ConfigError, match="population.json"):
        read_population(folder)
    assert resumed("--resume", folder) == 2
    assert resumed("--resume", "auto", "--num-seeds", 2, "--out-dir", here) == 2


def test_what_was_begun_with_is_read_again(here):
    config = Config(out_dir=str(here), seed=7, hidden_sizes=(3,), resume="auto", progress=False)
    folder = make_population_directory(Population(config, 4))
    again = read_population(folder)
    assert again == Population(dataclasses.replace(config, resume=None), 4)
    begun = configs_of(again, folder)
    assert [each.seed for each in begun] == [7, 8, 9, 10]
    assert {each.resume for each in begun} == {None}
    assert {Path(each.out_dir) for each in begun} == {folder}
