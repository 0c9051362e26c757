"""What the documents say can be typed, run and found."""

import json
import re
import shlex

import pytest
import torch
from conftest import ROOT
from torch.distributed.run import get_args_parser

from vecpg import Config
from vecpg.cli import COMMANDS, EvaluateConfig, PlotConfig, parse, parse_config
from vecpg.measure.cli import BenchmarkConfig
from vecpg.train import train
from vecpg.tune.settings import TuneConfig

DOCUMENTS = sorted(
    path
    for folder in (".", "docs", "benchmarks", "benchmarks/peers")
    for path in (ROOT / folder).glob("*.md")
)
PARSERS = {
    "train": parse_config,
    "evaluate": lambda args: parse(EvaluateConfig, args, command="evaluate"),
    "plot": lambda args: parse(PlotConfig, args, command="plot"),
    "tune": lambda args: parse(TuneConfig, args, command="tune"),
    "benchmark": lambda args: parse(BenchmarkConfig, args, command="benchmark"),
}

every_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def blocks(path, language):
    """Of one language; an opening fence says which, and the next one closes it."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [text for of, text in found if of == language]


def commands(path):
    """Every `vecpg COMMAND ...` and `scripts/COMMAND.py ...`, in blocks and in the text."""
    text = re.sub(r"^```python\n.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    lines = re.findall(
        r"^.*?\b((?:vecpg|\S*scripts/\w+\.py) .*)$", "\n".join(blocks(path, "")), re.M
    )
    inline = re.findall(r"`(vecpg [^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    for line in [*lines, *(" ".join(one.split()) for one in inline)]:
        program, *args = shlex.split(line, comments=True)
        if program != "vecpg":
            args = [re.search(r"(\w+)\.py$", program)[1], *args]
        if args and args[0] in COMMANDS and "ARGS" not in args:
            yield args


def test_there_are_commands_in_the_readme():
    found = [args[0] for args in commands(ROOT / "README.md")]
    assert set(found) == set(COMMANDS)
    assert ["train", "--num-envs", "64"] in commands(ROOT / "README.md")


@every_document
def test_every_command_can_be_typed(path, capsys):
    for args in commands(path):
        args = ["1" if arg == "S" else arg for arg in args]  # a seed, in the text
        if "--resume" in args:  # a run that is nowhere
            args[args.index("--resume") + 1] = "auto"
        try:
            PARSERS[args[0]](args[1:])
        except SystemExit as exit_:
            if exit_.code != 0:
                pytest.fail(f"{' '.join(args)}: {capsys.readouterr().err}")


def test_every_torchrun_command_can_be_typed():
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    lines = re.findall(r"^.*?\b(torchrun .*)$", text.replace("\\\n", " "), re.M)
    in_yaml = " ".join(re.findall(r"^ +(?:command|args): \[(.*)\]$", text, re.M))
    typed = [line for line in [*lines, in_yaml.replace(",", " ")] if "scripts/train.py" in line]
    assert len(typed) > 6
    for line in typed:
        given = get_args_parser().parse_args(shlex.split(line.strip("`"))[1:])
        assert given.training_script == "scripts/train.py"
        args = given.training_script_args
        if "--resume" in args:
            args[args.index("--resume") + 1] = "auto"
        PARSERS["train"](args)


@every_document
def test_every_link_leads_to_a_file(path):
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith("https://"):
            assert (path.parent / link).exists(), link


def test_the_readmes_examples_run_and_its_summary_has_every_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training, playing, returns = blocks(ROOT / "README.md", "python")
    exec(training, names := {})
    result = names["result"]
    assert result.summary["solved"]
    (line,) = (one for one in blocks(ROOT / "README.md", "") if one.startswith("{"))
    assert list(json.loads(line)) == list(result.summary)

    assert '"runs/RUN"' in playing
    # On the screen an episode lasts as long as people need to follow it.
    playing = playing.replace("runs/RUN", str(result.run_dir)).replace("human", "rgb_array")
    exec(playing, names := {})
    assert names["truncated"], "a solved pole stands to the end"

    exec(returns, names := {})
    mask, dones, returns = names["mask"], names["dones"], names["returns"]
    following = torch.zeros(64, dtype=torch.float64)
    for t in reversed(range(128)):
        following = torch.where(dones[t], 0.0, following)
        following = torch.where(mask[t], names["rewards"][t] + 0.99 * following, 0.0)
        torch.testing.assert_close(returns[t].double(), following, rtol=1e-5, atol=1e-6)


def test_the_examples_of_training_from_python_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    first, stopping, logging, steps = blocks(ROOT / "docs" / "python.md", "python")
    exec(first, names)
    assert names["result"].summary["iterations"] == 10
    exec(stopping, names)
    summary = names["result"].summary
    assert summary["iterations"] < 60
    assert summary["solved"] is None
    assert names["since"] == 5
    exec(logging, names)
    header, *rows = (tmp_path / "run.csv").read_text().splitlines()
    assert header.startswith("iteration,env_steps,")
    assert [row.partition(",")[0] for row in rows] == ["1", "2", "3"]
    exec(steps, names)
    assert names["stats"].grad_norm > 0


def test_the_wrapper_and_the_network_of_the_environments_page_train(tmp_path, monkeypatch):
    wrapper, network, *_ = blocks(ROOT / "docs" / "environments.md", "python")
    (tmp_path / "mine.py").write_text(wrapper + network)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = {"wrappers": ("mine:scaled",), "network": "mine:features"}
    config = Config(env_id="Pendulum-v1", num_envs=2, total_iterations=1, eval_episodes=2, **names)
    result = train(config)
    assert result.policy.encoder.features == 32
    assert -200 < result.summary["eval_return_mean"] < 0
