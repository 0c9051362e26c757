import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, save_policy
from gymnasium import spaces

import vecpg
import vecpg.begin
import vecpg.evaluate
import vecpg.rollout.stepping
import vecpg.train
from vecpg import cli, signals
from vecpg.cli import COMMANDS, EvaluateConfig, main, parse, parse_config
from vecpg.config import Config
from vecpg.policy import Policy
from vecpg.recipes import RECIPES
from vecpg.run import checkpoint
from vecpg.run.interrupts import Interrupted

# This checkout, wherever vecpg may be installed; a command finds modules beside the user.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def start(*args, cwd):
    """`vecpg ARGS`, in a process of its own."""
    command = [sys.executable, "-m", "vecpg", *map(str, args)]
    return subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture
def here(capfd, monkeypatch, tmp_path):
    """Run `vecpg ARGS` in this process: its status, stdout and stderr. Paths are relative.

    A process of its own takes seconds to import torch.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*args):
        code = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as exit_:
            code = exit_.code
        return code, *capfd.readouterr()

    return run


def refused(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        parse_config([str(arg) for arg in args])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_no_flags_are_the_default_config():
    assert parse_config([]) == Config()


def test_dashes_and_underscores_numbers_and_none():
    config = parse_config(
        shlex.split(
            "--num-envs 1_000 --num_steps 1e2 --total-timesteps none --total_episodes 2E3"
            " --hidden-sizes 3 4 5 --target-return none --max-grad-norm 0.5 --normalize"
            " --no-confirm --seed 18446744073709551615"
        )
    )
    assert (config.num_envs, config.num_steps, config.total_episodes) == (1000, 100, 2000)
    assert (config.total_timesteps, config.target_return, config.max_grad_norm) == (None, None, 0.5)
    assert config.hidden_sizes == (3, 4, 5)
    assert config.normalize
    assert not config.confirm
    assert config.seed == 2**64 - 1


def test_keyword_arguments_are_json():
    config = parse_config(["--env-kwargs", '{"is_slippery": false, "size": [1, 2]}'])
    assert config.env_kwargs == {"is_slippery": False, "size": [1, 2]}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num-envs", 0], "--num-envs: expected at least 1, got 0"),
        (["--num-envs", -1], "--num-envs: expected at least 1, got -1"),
        (["--num-envs", "abc"], "--num-envs: expected a whole number, got abc"),
        (["--num-envs", 1.5], "--num-envs: expected a whole number, got 1.5"),
        (["--num-envs", "inf"], "--num-envs: expected a whole number, got inf"),
        (["--num-envs"], "Missing value for argument"),
        (["--total-timesteps", 0], "--total-timesteps: expected at least 1, or none, got 0"),
        (["--total-timesteps", "none"], "error: a run needs an end"),
        (["--gamma", 1.01], "--gamma: expected a number in [0, 1], got 1.01"),
        (["--gamma", -0.01], "--gamma: expected a number in [0, 1], got -0.01"),
        (["--learning-rate", 0], "--learning-rate: expected a finite number greater than 0, got 0"),
        (["--dist-timeout", 0], "--dist-timeout: expected 0.1 to 1e9, got 0"),
        (["--dist-timeout", "1e10"], "--dist-timeout: expected 0.1 to 1e9, got 10000000000"),
        (["--dist-timeout", "nan"], "--dist-timeout: expected 0.1 to 1e9, got nan"),
        (["--learning-rate", "nan"], "--learning-rate: expected a finite number greater than 0"),
        (["--num-env", 3], "--num-env, 3; did you mean --num-envs?"),
        (["--gama", 0.9], "did you mean --gamma?"),
        (["--target-return", "x"], "--target-return: expected none or float or auto, got x"),
        (["--total-episodes", "x"], "--total-episodes: expected none or int, got x"),
        (["--dropout", 1], "--dropout: expected a number in [0, 1), got 1"),
        (
            ["--shards", 7],
            "--shards: expected a number that divides --num-envs 64, got 7; nearest: 4 and 8",
        ),
        (["--num-envs", 1, "--shards", 8], "--num-envs 1, got 8; nearest: 1"),
        (["--embedding-size", 0], "--embedding-size: expected at least 1, got 0"),
        (["--gae-lambda", 2], "--gae-lambda: expected a number in [0, 1], got 2"),
        (
            ["--weights", "gae"],
            "--weights gae: expected --baseline value, which learns V(s), got --baseline leave_one",
        ),
        (
            ["--bootstrap-truncations", "--baseline", "mean"],
            "--bootstrap-truncations: expected --baseline value, which learns V(s), got --baseline"
            " mean",
        ),
        (["--value-steps", 0], "--value-steps: expected at least 1, got 0"),
        (
            ["--value-learning-rate", 0],
            "--value-learning-rate: expected a finite number greater than 0, got 0",
        ),
        (["--log-std", "free"], "invalid choice 'free' for argument '--log-std'"),
        (["--baseline", "foo"], "invalid choice 'foo' for argument '--baseline'"),
        (["--env-kwargs", "[1]"], "--env-kwargs: expected a JSON object, got [1]"),
        (["--env-kwargs", "{"], "--env-kwargs: expected a JSON object, got {"),
        (["--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:i, got tpu"),
        (["--recipe", "defalt"], "got defalt; did you mean default?"),
        (["stray"], "Unrecognized options: stray"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, args, message):
    assert message in refused(capsys, *args)


def test_a_mistake_is_one_line_where_only_ascii_can_be_shown():
    ascii_only = ENVIRONMENT | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    result = subprocess.run(
        [sys.executable, "-m", "vecpg", "train", "--gama", "1"],
        capture_output=True,
        text=True,
        env=ascii_only,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == "error: Unrecognized options: --gama, 1; did you mean --gamma?\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--env-id", "FrozenLake-v1", "--normalize-obs"],
            "normalize_obs: expected a Box or MultiBinary observation space, got Discrete(16)",
        ),
        (
            [
                "--env-id",
                "environments:Dials-v0",
                "--env-kwargs",
                '{"observed": true}',
                "--normalize-obs",
            ],
            "normalize_obs: expected a Box or MultiBinary observation space, got"
            " MultiDiscrete([[2 3] [4 5]]",
        ),
        (
            ["--env-id", "Blackjack-v1", "--max-episode-steps", "9"],
            "observation space Tuple(Discrete(32), Discrete(11), Discrete(2)) is not supported;"
            " supported: Box, Discrete, MultiBinary, MultiDiscrete; many others become a Box by"
            " --wrappers gymnasium.wrappers:FlattenObservation",
        ),
        (
            ["--env-id", "environments:Bandit-v0", "--env-kwargs", '{"space": "tuple action"}'],
            "action space Tuple(Discrete(2)) is not supported; supported: Discrete, MultiBinary,"
            " MultiDiscrete, Box",
        ),
        (
            ["--env-id", "environments:Bandit-v0", "--env-kwargs", '{"space": "no numbers"}'],
            "observation space Box([], [], (0,), float32) holds no numbers: expected at least one,"
            " got shape (0,)",
        ),
    ],
)
def test_a_space_that_cannot_be_used_is_one_line_and_status_2(here, tmp_path, args, message):
    code, out, err = here("train", *args)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert err.startswith(f"error: {message}")
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_list_of_recipes_goes_to_stdout(capsys):
    for args in (["--recipe", "list"], ["--num-envs", "3", "--recipe=list"]):
        with pytest.raises(SystemExit) as caught:
            parse_config(args)
        assert caught.value.code == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        printed = captured.out.split("\n")
        for name, (config, _) in RECIPES.items():
            first = printed.index(f"{name}:") + 1
            lines = [
                line.strip()
                for line in itertools.takewhile(lambda line: line[:1] == " ", printed[first:])
            ]
            flags = [line for line in lines if line.startswith("--")]
            assert lines[len(lines) - len(flags) - 1].endswith(")"), "the source comes last"
            # What is printed is how to get these settings without the name.
            again = parse_config(shlex.split(" ".join(flags)))
            assert dataclasses.replace(again, recipe=name) == config


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for name in Config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in out


def test_evaluate_flags(capsys):
    args = ["runs/x", "--episodes", "1e1", "--stochastic"]
    config = parse(EvaluateConfig, args, command="evaluate")
    assert (config.path, config.episodes, config.stochastic, config.seed) == ("runs/x", 10, True, 1)
    with pytest.raises(SystemExit) as caught:
        parse(EvaluateConfig, ["runs/x", "--episodes", "0"], command="evaluate")
    assert caught.value.code == 2
    assert "--episodes: expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--help"],
        ["--version"],
        ["trian"],
        *([name, "--help"] for name in COMMANDS),
        ["train", "--num-envs", "0"],
        ["train", "--env-id", "CartPol-v1"],
        ["train", "--env-id", "CliffWalking-v1"],
        ["train", "--out-dir", "file/runs"],
        ["train", "--wrappers", "gymnasium.wrappers:Flat"],
        ["train", "--vectorization", "tensor", "--action-masks"],
        ["evaluate", "runs", "--episodes", "0"],
        ["benchmark", "--num-envs", "0"],
    ],
    ids=" ".join,
)
def test_torch_is_not_loaded_for_help_or_a_mistake(tmp_path, args):
    (tmp_path / "file").touch()
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "from vecpg.cli import main\n"
        f"main({args!r})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
        check=False,
    )
    mistaken = args and "--help" not in args and args != ["--version"]
    assert result.returncode == (2 if mistaken else 0)
    assert result.stdout.endswith("False\n")
    if mistaken:
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("error: ")
    else:
        assert result.stderr == ""


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed_one_a_line(capsys, args):
    main(args)
    out = capsys.readouterr().out
    for name, what in COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(what)}$", out, re.MULTILINE)


def test_the_version_is_that_of_the_package(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"vecpg {vecpg.__version__}\n"


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("trian", "did you mean vecpg train?"),
        ("vecpg-train", "did you mean vecpg train?"),
        ("eval", "did you mean vecpg evaluate?"),
        ("help", "did you mean vecpg --help?"),
        ("--verison", "did you mean vecpg --version?"),
        ("--num-envs", "did you mean vecpg train --num-envs?"),
        ("zzz", "see vecpg --help"),
    ],
)
def test_an_unknown_command_is_one_line_and_status_2(capsys, command, hint):
    with pytest.raises(SystemExit) as caught:
        main([command, "64"])
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    expected = "expected one of train, evaluate, plot, tune, benchmark first"
    assert captured.err == f"error: {expected}, got {command}; {hint}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_script_is_its_command(tmp_path, name):
    def said(*command):
        return subprocess.run(
            [sys.executable, *command, "--help"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=ENVIRONMENT,
            check=True,
        ).stdout

    script = said(ROOT / "scripts" / f"{name}.py")
    assert script == said("-m", "vecpg", name)
    assert script.startswith(f"usage: vecpg {name} ")


def test_a_run_through_a_pipe_and_its_evaluation(tmp_path):
    code, out, err = finish(
        start("train", "--num-envs", 8, "--total-iterations", 2, "--seed", 3, cwd=tmp_path)
    )
    assert code == 0
    assert out.count("\n") == 1
    summary = json.loads(out)
    assert summary["run_dir"].startswith("runs/CartPole-v1__reinforce__3__")
    assert json.loads((tmp_path / summary["run_dir"] / "summary.json").read_text()) == summary
    assert "Traceback" not in err
    assert "\r" not in err
    curves, evaluate = err.splitlines()[-2:]
    assert curves.startswith("curves:   ")
    assert curves.endswith(" --logdir runs")

    # The hint, as a shell reads it.
    command = [*shlex.split(evaluate.removeprefix("evaluate: ")), "--episodes", "7"]
    assert command[-3] == summary["run_dir"]
    evaluation = subprocess.Popen(
        [*command, "--stochastic"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    code, out, err = finish(evaluation)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert list(result) == ["return_mean", "return_std", "length_mean", "episodes"]
    assert result["episodes"] == 7


def test_evaluation_flags_are_used(here, tmp_path):
    """A policy that takes action 1 with probability 3/4, in an environment that pays 100 for it."""
    policy = Policy(spaces.Box(-1, 1, (2, 3)), spaces.Discrete(2, start=99), hidden_sizes=())
    with torch.no_grad():
        policy.network[0].weight.zero_()
        policy.network[0].bias.copy_(torch.tensor([0.0, math.log(3)]))
    settings = {"env_id": "environments:Bandit-v0", "env_kwargs": {"start": 99}}
    save_policy(tmp_path / "checkpoints" / "x", policy, **settings)

    def means(*args):
        code, out, err = here("evaluate", "checkpoints/x", "--env-id", settings["env_id"], *args)
        assert code == 0, err
        return json.loads(out)["return_mean"]

    assert means("--episodes", 40) == 100.0
    one = means("--episodes", 40, "--stochastic")
    other = means("--episodes", 40, "--stochastic", "--seed", 2)
    assert 99.4 < one < 100
    assert 99.4 < other < 100
    assert one != other


def save_some(folder, env_id="CartPole-v1", observations=4, **settings):
    policy = Policy(spaces.Box(-1, 1, (observations,)), spaces.Discrete(2), hidden_sizes=(3,))
    save_policy(folder, policy, env_id=env_id, **settings)


@pytest.mark.parametrize(
    ("env_id", "settings"),
    [
        ("evil:CartPole-v1", {}),
        ("evil:Cart:Pole-v1", {}),
        ("vecpg/CartPole-v1", {"env_kwargs": {"definition": "evil:CartPole"}}),
        ("CartPole-v1", {"env_kwargs": {"a": [{"b": "evil:CartPole"}]}}),
        ("CartPole-v1", {"wrappers": ["evil:wrap"]}),
        ("CartPole-v1", {"network": "evil:network"}),
    ],
)
def test_no_file_has_a_module_imported(here, tmp_path, env_id, settings):
    (tmp_path / "evil.py").write_text("open('executed', 'w').close()")
    save_some(tmp_path / "checkpoints" / "x", env_id, **settings)
    code, out, err = here("evaluate", "checkpoints/x", "--episodes", 2, "--seed", 3)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: what a file names is imported or opened only if you name it too")
    assert re.search("evaluate checkpoints/x --episodes 2 --seed 3 --(env|wrap|net)", err)
    assert not (tmp_path / "executed").exists()
    assert "evil" not in sys.modules
    # Another name is not taken for it, and not imported either.
    code, out, err = here("evaluate", "checkpoints/x", "--env-id", "evil:Other-v1")
    assert (code, out) == (2, "")
    assert err == (
        f"error: --env-id: expected {env_id}, with which it was trained, got evil:Other-v1\n"
    )
    assert not (tmp_path / "executed").exists()


def test_a_network_of_the_users_own_is_evaluated_if_it_is_typed(here, tmp_path):
    policy = Policy(spaces.Box(-1, 1, (4,)), spaces.Discrete(2), network="networks:small")
    folder = tmp_path / "checkpoints" / "x"
    save_policy(folder, policy, env_id="CartPole-v1", network="networks:small")
    code, out, err = here("evaluate", "checkpoints/x", "--episodes", 2)
    assert (code, out) == (2, "")
    assert "evaluate checkpoints/x --episodes 2 --network networks:small" in err
    typed = ["--network", "networks:small"]
    code, out, err = here("evaluate", "checkpoints/x", "--episodes", 2, *typed)
    assert code == 0, err
    assert json.loads(out)["episodes"] == 2
    code, out, err = here("evaluate", "checkpoints/x", "--network", "networks:other")
    assert (code, out) == (2, "")
    assert err == (
        "error: --network: expected networks:small, with which it was trained, got networks:other\n"
    )


@pytest.mark.parametrize(
    ("args", "vectorization", "step_timeout"),
    [
        ([], "sync", 7.5),
        (["--vectorization", "vector_entry_point"], "vector_entry_point", 7.5),
        (["--vectorization", "auto", "--step-timeout", 3], "auto", 3.0),
    ],
)
def test_evaluation_steps_as_training_did_unless_it_is_told_otherwise(
    here, tmp_path, monkeypatch, args, vectorization, step_timeout
):
    save_some(
        tmp_path / "checkpoints" / "x",
        num_envs=3,
        step_timeout=7.5,
        envs_per_worker=2,
        max_episode_steps=9,
    )
    asked, real = [], vecpg.evaluate.evaluate

    def noticed(*args, **kwargs):
        asked.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(vecpg.evaluate, "evaluate", noticed)
    code, out, err = here("evaluate", "checkpoints/x", "--episodes", 4, *args)
    assert code == 0, err
    assert json.loads(out)["length_mean"] <= 9
    names = ("vectorization", "step_timeout", "num_envs", "envs_per_worker")
    found = [asked[0][name] for name in names]
    assert found == [vectorization, step_timeout, 3, 2]


def test_a_way_of_stepping_that_evaluation_cannot_go_is_refused(here, tmp_path):
    save_some(tmp_path / "checkpoints" / "x", "Acrobot-v1", 6)
    code, out, err = here("evaluate", "checkpoints/x", "--vectorization", "vector_entry_point")
    assert (code, out) == (2, "")
    assert err.startswith("error: --vectorization: Acrobot-v1 has no vector_entry_point form; use")
    for given in ("0", "-1", "inf", "nan"):
        code, out, err = here("evaluate", "checkpoints/x", "--step-timeout", given)
        assert (code, out) == (2, "")
        assert err.startswith("error: --step-timeout: expected a finite number greater than 0, got")


def test_why_auto_took_sync_is_said_once(here, tmp_path, caplog):
    (tmp_path / "both_here.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('Both-v0', 'environments:Constant', max_episode_steps=5,\n"
        "    vector_entry_point='gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv')\n"
    )
    args = ["--num-envs", 2, "--total-iterations", 1, "--eval-episodes", 2]
    code, _, err = here("train", "--env-id", "both_here:Both-v0", *args)
    assert code == 0, err
    said = "Both-v0 is stepped one by one (sync): its vectorized form has observations of Box("
    assert caplog.text.count(said) == caplog.text.count("one by one") == 1


def test_a_module_is_imported_for_whoever_types_it(here, tmp_path):
    (tmp_path / "mine_here.py").write_text(
        "import gymnasium\n"
        "from vecpg.envs.cartpole import CartPole\n"
        "open('executed', 'w').close()\n"
        "gymnasium.register('Mine-v0', 'environments:Constant', max_episode_steps=5)\n"
    )
    save_some(tmp_path / "checkpoints" / "x", "mine_here:Mine-v0", observations=1)
    code, _, err = here("evaluate", "checkpoints/x", "--episodes", 2)
    command = shlex.split(err.partition(", type: ")[2])
    assert not (tmp_path / "executed").exists()
    code, out, err = here(*command[command.index("evaluate") :])
    assert code == 0, err
    assert json.loads(out)["episodes"] == 2
    assert (tmp_path / "executed").exists()
    definition = {"definition": "mine_here:CartPole"}
    save_some(tmp_path / "checkpoints" / "y", "vecpg/CartPole-v1", env_kwargs=definition)
    code, _, err = here("evaluate", "checkpoints/y", "--episodes", 2, "--vectorization", "auto")
    assert code == 2
    command = shlex.split(err.partition(", type: ")[2])
    code, out, err = here(*command[command.index("evaluate") :])
    assert code == 0, err
    assert json.loads(out)["episodes"] == 2


def test_a_policy_of_other_spaces_is_refused_with_both(here, tmp_path):
    save_some(tmp_path / "checkpoints" / "x", observations=5)
    code, out, err = here("evaluate", "checkpoints/x", "--episodes", 2)
    assert (code, out) == (2, "")
    assert err.startswith(
        "error: CartPole-v1: expected observations of Box(-1.0, 1.0, (5,), float32), with which the"
        " policy was trained, got Box("
    )
    assert err.count("\n") == 1


@pytest.mark.slow
def test_what_an_environment_prints_stays_out_of_stdout(tmp_path):
    (tmp_path / "environments.py").write_text((ROOT / "tests" / "environments.py").read_text())
    args = ["--env-id", "environments:Talkative-v0", "--num-envs", 2, "--total-iterations", 1]
    code, out, err = finish(start("train", *args, "--eval-episodes", 1, cwd=tmp_path))
    assert code == 0
    assert json.loads(out)["episodes"] == 2
    assert "hello from Python" in err
    assert "hello from C" in err


def test_an_environment_that_leaves_python_is_status_1(here):
    code, out, err = here("train", "--env-id", "environments:Leaving-v0", "--num-envs", 4)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: environment ")


def test_an_id_with_a_module_beside_the_user(here, tmp_path):
    (tmp_path / "beside.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('Beside-v0', 'environments:Counting', max_episode_steps=9)\n"
    )
    args = ["--env-id", "beside:Beside-v0", "--num-envs", 4, "--total-iterations", 1]
    code, out, err = here("train", *args, "--eval-episodes", 3)
    assert code == 0
    assert json.loads(out)["episodes"] == 4
    # No file has the module imported: who types what is printed last does.
    words = shlex.split(err.splitlines()[-1])
    code, out, err = here(*words[words.index("evaluate") :], "--episodes", 2)
    assert code == 0, err
    assert json.loads(out)["episodes"] == 2


def test_wrappers_of_a_run_are_typed_again(here, tmp_path):
    (tmp_path / "around.py").write_text(
        "import gymnasium\n"
        "from gymnasium.wrappers import TransformReward\n"
        "def paid(env): return TransformReward(env, lambda reward: 7.0)\n"
    )
    args = ["--max-episode-steps", 1, "--num-envs", 4, "--total-iterations", 1]
    code, out, err = here("train", "--wrappers", "around:paid", "around:paid", *args)
    assert code == 0, err
    summary = json.loads(out)
    assert (summary["eval_return_mean"], summary["vectorization"]) == (7.0, "sync")
    run_dir = summary["run_dir"]
    words = shlex.split(err.splitlines()[-1])
    code, out, err = here(*words[words.index("evaluate") :], "--episodes", 2)
    assert (code, json.loads(out)["return_mean"]) == (0, 7.0)
    again = ["train", "--resume", run_dir, "--total-iterations", 2]
    code, _, err = here(*again)
    assert code == 2
    assert err.endswith(
        f"train --resume {run_dir} --total-iterations 2 --wrappers around:paid around:paid\n"
    )
    code, out, err = here(*again, "--wrappers", "around:paid")
    assert (code, out) == (2, "")
    assert err.startswith("error: --wrappers: expected around:paid around:paid, with which")
    code, out, err = here(*again, "--wrappers", "around:paid", "around:paid")
    assert code == 0, err
    assert json.loads(out)["iterations"] == 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--wrappers", "around"], "--wrappers: expected module:callable, got around"),
        (["--wrappers", "no_such:wrap"], "--wrappers no_such:wrap: expected a module that can be"),
        (["--wrappers", "math:square"], "--wrappers math:square: expected square in the module"),
        (["--wrappers", "math:pi"], "--wrappers math:pi: expected something that can be called"),
        (["--network", "big"], "--network: expected auto, mlp, cnn or module:function, got big"),
        (["--envs-per-worker", "0"], "--envs-per-worker: expected at least 1, or auto, got 0"),
        (
            ["--wrappers", "math:sqrt", "--vectorization", "tensor"],
            "--wrappers: they go around single copies of CartPole-v1; expected --vectorization sync"
            " or async, got tensor",
        ),
    ],
)
def test_a_wrong_name_is_one_line(here, args, said):
    code, out, err = here("train", *args)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1


def test_a_faulty_environment_is_status_1_with_one_traceback(here):
    code, out, err = here("train", "--env-id", "environments:Faulty-v0", "--num-envs", 4)
    assert (code, out) == (1, "")
    assert err.count("Traceback") == 1
    assert err.splitlines()[-1].startswith("error: environment ")
    assert "failed at step 3 (reset with seed " in err


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_constructor_that_raises_is_status_2_with_its_own_traceback(here, vectorization):
    args = ["--env-id", "environments:Stillborn-v0", "--vectorization", vectorization]
    code, out, err = here("train", *args)
    assert (code, out) == (2, "")
    assert err.count("Traceback") == 1
    assert "in __init__" in err
    assert "processes" not in err
    last = "error: environments:Stillborn-v0 could not be made: ValueError: 100% wrong"
    assert err.splitlines()[-1] == last
    kwargs = ["--env-kwargs", '{"no_such": 1}']
    code, out, err = here("train", *args, *kwargs)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "Stillborn.__init__() got an unexpected keyword argument 'no_such'" in err


def test_sigterm_ends_the_run_quietly_with_its_status(tmp_path):
    args = ["--target-return", "none", "--total-timesteps", "1e9", "--log-every", 0.01]
    process = start("train", "--num-envs", 8, *args, cwd=tmp_path)
    for line in process.stderr:
        if line.startswith("iteration"):
            break
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    code, out, err = finish(process)
    assert (code, out) == (143, "")
    assert time.monotonic() - begun < 10
    assert "Traceback" not in err
    assert "stopped by SIGTERM" in err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "runs/x"), "[Errno 28] No space left on device: "),
        (BrokenPipeError(32, "Broken pipe"), "[Errno 32] Broken pipe"),
        (MemoryError("4 GB\nfor rows"), "4 GB for rows"),
        (MemoryError(), "MemoryError"),
        (FloatingPointError("the gradient is not finite"), "the gradient is not finite"),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_status_1(capsys, error, words):
    with pytest.raises(SystemExit) as caught, cli.exit_codes():
        raise error
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (1, "")
    assert captured.err.startswith(f"error: {words}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("error", [RecursionError(), ZeroDivisionError(), AttributeError("x")])
def test_a_fault_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)) as caught, cli.exit_codes():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("signum", signals.STOPPING)
def test_a_signal_is_one_line_and_its_status_and_is_said_once(capsys, monkeypatch, signum):
    monkeypatch.setattr(signals, "said", False)
    monkeypatch.setattr(signals, "remark", "; nothing to resume")
    with pytest.raises(SystemExit) as caught, cli.exit_codes():
        raise Interrupted(signum)
    assert caught.value.code == (130 if signum == signal.SIGINT else 143)
    assert capsys.readouterr().err == f"stopped by {signum.name}; nothing to resume\n"
    assert signals.said


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_signal_while_episodes_are_played_is_one_line(here, tmp_path, monkeypatch, command):
    code, out, _ = here("train", "--num-envs", 2, "--total-iterations", 1, "--eval-episodes", 1)
    assert code == 0
    args = ["evaluate", json.loads(out)["run_dir"]] if command == "evaluate" else ["train"]
    if command == "train":
        args += ["--num-envs", "2", "--vectorization", "sync"]
    real = vecpg.rollout.stepping.play

    def play(*args, **kwargs):
        for row in real(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            yield row

    for module in (vecpg.rollout.stepping, vecpg.evaluate):
        monkeypatch.setattr(module, "play", play)
    code, out, err = here(*args)
    assert (code, out) == (143, "")
    assert err.splitlines()[-1] == "stopped by SIGTERM"
    assert "Traceback" not in err


def test_a_signal_while_a_run_is_made_ready_is_one_line(here, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "remark", "; nothing to resume")
    monkeypatch.setattr(
        vecpg.begin, "make_envs", lambda *args, **kw: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert here("train", "--num-envs", 2) == (143, "", "stopped by SIGTERM; nothing to resume\n")
    assert list(tmp_path.glob("runs/*")) == []


def test_what_an_environment_prints_in_python_goes_the_way_of_the_log(capfd):
    """Where stderr has no reader, printing there is no fault of the environment."""
    with cli.stdout_kept_clean():
        assert sys.stdout is sys.stderr
    assert sys.stdout is not sys.stderr


@pytest.mark.parametrize("path", ["nothing", "file"])
def test_evaluating_what_is_no_checkpoint_is_status_2(here, tmp_path, path):
    (tmp_path / "file").touch()
    code, out, err = here("evaluate", path)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_signal_to_a_whole_job_ends_async_workers_too(tmp_path, signum, status):
    """To the whole process group, as a terminal sends Ctrl-C, and a scheduler SIGTERM."""
    args = ["--vectorization", "async", "--target-return", "none", "--total-timesteps", "1e9"]
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--num-envs", "4", *args]
    process = subprocess.Popen(
        [*command, "--log-every", "0.01"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stderr:
        if line.startswith("iteration"):
            break
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 4
    if signum == signal.SIGTERM:
        for one in below:  # a scheduler knows them all
            one.send_signal(signum)
    os.killpg(process.pid, signum)
    begun = time.monotonic()
    code, out, err = finish(process)
    assert (code, out) == (status, "")
    assert "Traceback" not in err
    assert "leaked" not in err
    assert (f"stopped by {signum.name}" in err) == (signum != signal.SIGKILL)
    _, left = psutil.wait_procs(below, timeout=5)
    assert left == []
    assert time.monotonic() - begun < 10


def test_a_killed_async_worker_is_status_1_without_a_traceback(here):
    args = ["--env-id", "environments:Suicidal-v0", "--vectorization", "async", "--num-envs", 3]
    code, out, err = here("train", *args)
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert re.match(
        r"error: environment \d died at step 3 \(reset with seed \d+\): its process was killed by"
        r" SIGKILL",
        last,
    )


# -- Going on with a run -------------------------------------------------------------------------

SHORT = ["--num-envs", 4, "--hidden-sizes", 8, "--eval-episodes", 2, "--seed", 3]


def the_run(tmp_path):
    (run_dir,) = (tmp_path / "runs").iterdir()
    return run_dir.relative_to(tmp_path)


def test_resume_takes_every_setting_from_the_run(here, tmp_path, caplog):
    code, whole, _ = here("train", *SHORT, "--total-iterations", 5, "--out-dir", "whole")
    assert code == 0
    code, _, err = here("train", *SHORT, "--total-iterations", 2)
    assert code == 0
    run_dir = the_run(tmp_path)
    code, out, err = here("train", "--resume", run_dir)
    assert code == 0
    assert "already at its end, after 2 iterations" in caplog.text
    assert json.loads(out) == json.loads((tmp_path / run_dir / "summary.json").read_text())
    code, out, err = here("train", "--resume", f"{run_dir}/", "--total-iterations", 5)
    assert code == 0, err
    summary, expected = json.loads(out), json.loads(whole)
    for name in ("env_steps", "episodes", "eval_return_mean", "iterations", "seed"):
        assert summary[name] == expected[name]
    assert summary["run_dir"] == str(run_dir)
    assert "--logdir runs\n" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--resume", "runs"], "--resume runs: expected auto, a run directory or a checkpoint in"),
        (["--resume", "{run}x"], "got nothing of that name; there are CartPole-v1__"),
        (["--resume", "{run}", "--seed", 4], "--seed: expected 3, with which the run was begun, "),
        (["--resume", "{run}", "--recipe", "vpg"], "--recipe: expected default, "),
        (["--resume", "{run}", "--no-confirm"], "--confirm: expected True, "),
        (["--resume", "{run}/checkpoints/7"], "checkpoints/7/manifest.json cannot be read: No su"),
        (["--resume", "auto", *SHORT, "--num-envs", 9], "--num-envs: expected 4, "),
        (["--resume"], "Missing value for argument"),
    ],
)
def test_what_cannot_go_on_is_status_2(here, tmp_path, args, message):
    assert here("train", *SHORT, "--total-iterations", 2)[0] == 0
    run_dir = the_run(tmp_path)
    (tmp_path / run_dir / "summary.json").unlink()
    code, out, err = here("train", *[str(arg).format(run=run_dir) for arg in args])
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert message in err
    code, _, err = here("train", "--resume", run_dir, "--seed", 3, "--out-dir", "elsewhere")
    assert code == 0, err
    assert not (tmp_path / "elsewhere").exists()


def test_resume_auto_goes_on_or_begins(here, tmp_path, caplog):
    args = ["--resume", "auto", *SHORT, "--total-iterations", 2]
    code, _, _ = here("train", *args)
    assert code == 0
    assert (
        "--resume auto: no unfinished run of CartPole-v1, reinforce, seed 3 in runs; a"
        in caplog.text
    )
    run_dir = the_run(tmp_path)
    (tmp_path / run_dir / "summary.json").unlink()
    code, out, _ = here("train", *args)
    assert code == 0
    assert "going on after iteration 2" in caplog.text
    assert json.loads(out)["run_dir"] == str(run_dir) == str(the_run(tmp_path))


def test_a_directory_that_cannot_be_written_is_status_2(here, tmp_path):
    (tmp_path / "file").touch()
    code, out, err = here("train", "--out-dir", "file/runs")
    assert (code, out) == (2, "")
    assert err == "error: --out-dir file/runs cannot be written: Not a directory; give another" + (
        " directory\n"
    )


def test_no_run_that_goes_on_has_a_module_imported(here, tmp_path):
    (tmp_path / "evil_run.py").write_text("open('executed', 'w').close()")
    assert here("train", *SHORT, "--total-iterations", 2)[0] == 0
    run_dir = the_run(tmp_path)
    for name, value in (
        ("env_id", "evil_run:CartPole-v1"),
        ("env_kwargs", {"definition": "evil_run:CartPole"}),
        ("wrappers", ["evil_run:wrap"]),
        ("network", "evil_run:network"),
    ):
        path = tmp_path / run_dir / "config.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | {name: value}))
        code, out, err = here("train", "--resume", run_dir, "--total-iterations", 3)
        path.write_text(before)
        assert (code, out) == (2, "")
        assert err.startswith("error: what a file names is imported or opened only if you name it")
        assert f"train --resume {run_dir} --total-iterations 3 --{name.replace('_', '-')} " in err
        assert not (tmp_path / "executed").exists()


def test_no_checkpoint_has_a_network_imported(here, tmp_path):
    """Whoever can write one can make its digests right."""
    (tmp_path / "evil_net.py").write_text("open('executed', 'w').close()")
    assert here("train", *SHORT, "--total-iterations", 2)[0] == 0
    run_dir = tmp_path / the_run(tmp_path)
    (folder, *_) = checkpoint.folders(run_dir)
    found, _ = checkpoint.load(folder)
    contents = {name: found.read(name) for name in ("state.pt", "best.pt")}
    for content in contents.values():
        content["policy"]["description"]["network"] = "evil_net:network"
    made = ("kind", "format", "files", "sha256")
    about = {name: value for name, value in found.manifest.items() if name not in made}
    shutil.rmtree(folder)
    checkpoint.save(folder, about, contents)
    for args in (
        ["train", "--resume", run_dir],
        ["train", "--resume", run_dir, "--total-iterations", 3],
        ["evaluate", run_dir],
        ["evaluate", run_dir, "--network", "auto"],
    ):
        code, out, err = here(*args)
        assert (code, out) == (2, ""), args
        assert "network" in err
        assert err.count("\n") == 1
        assert not (tmp_path / "executed").exists(), args


def test_a_run_that_was_moved_goes_on_where_it_is(here, tmp_path):
    assert here("train", *SHORT, "--total-iterations", 2)[0] == 0
    run_dir = the_run(tmp_path)
    (tmp_path / run_dir / "summary.json").unlink()
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    resumes = (["auto", "--seed", 3, "--out-dir", "elsewhere"], [f"elsewhere/{run_dir.name}"])
    for number, args in enumerate(resumes):
        code, out, err = here("train", "--resume", *args, "--total-iterations", 3 + number)
        assert code == 0, err
        assert json.loads(out)["run_dir"] == f"elsewhere/{run_dir.name}"
        (tmp_path / "elsewhere" / run_dir.name / "summary.json").unlink()
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path):
    """Before the first step, and after it; and the run goes on once there is room."""
    args = [*SHORT, "--total-iterations", 200, "--target-return", "none", "--save-every", 0.01]
    for size, status in ((3000, 2), (20_000, 1)):
        command = shlex.join([sys.executable, "-m", "vecpg", "train", *map(str, args)])
        done = subprocess.run(
            ["bash", "-c", f"ulimit -f {size // 1000}; exec {command}"],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (status, "")
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert re.search(
            r"^error: .*runs/.* cannot be written: File too large \(.* MB free on /", last
        )
        assert ("resume: " in done.stderr) == (status == 1)
        assert len(list((tmp_path / "runs").iterdir())) == (status == 1)
    code, out, _ = finish(start("train", "--resume", "auto", "--seed", 3, cwd=tmp_path))
    assert code == 0
    assert json.loads(out)["iterations"] == 200
