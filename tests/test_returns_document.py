"""What docs/returns.md shows: its examples run, and its numbers are right."""

import ast
import itertools
import math
import re

import pytest
import torch
from conftest import ROOT

from vecpg import returns

TEXT = (ROOT / "docs" / "returns.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
DRAWN = re.findall(r"^```\n(t  .*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
MODES = ("cut", "skip", "decay", "zero")


def run(code):
    """Run an example; a line that is an expression is followed by a comment with its value."""
    names, lines = {}, code.splitlines()
    for statement in ast.parse(code).body:
        source = ast.unparse(statement)
        if not isinstance(statement, ast.Expr):
            exec(source, names)
            continue
        value = eval(source, names)
        following = itertools.takewhile(
            lambda line: line.startswith("# "), lines[statement.end_lineno :]
        )
        shown = "\n".join(line[2:] for line in following)
        if shown or value is not None:
            assert repr(value) == shown, source
    return names


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_example_runs_and_shows_its_values(code):
    run(code)


def example(*words):
    """The names that the one example with all of these words leaves."""
    (code,) = [code for code in EXAMPLES if all(word in code for word in words)]
    return run(code)


def test_the_example_of_a_rollout_is_the_definition():
    rollout = example("terminations |")
    ends = rollout["terminations"] | rollout["truncations"]
    for n in (0, 63):
        for t in (0, 60, 127):
            total, factor, k = 0.0, 1.0, t
            while True:
                total += factor * rollout["rewards"][k, n].item()
                factor *= 0.99
                if ends[k, n] or k == 127:
                    cut = k == 127 and not ends[k, n]
                    cut = cut or (
                        rollout["truncations"][k, n] and not rollout["terminations"][k, n]
                    )
                    total += factor * rollout["values_after"][k, n].item() if cut else 0.0
                    break
                k += 1
            assert rollout["returns"][t, n].item() == pytest.approx(total, rel=1e-6)


def test_the_example_of_tokens_sums_what_counts():
    tokens = example("as tokenizers give it")
    sums = (tokens["rewards"] * tokens["mask"]).flip(1).cumsum(1).flip(1) * tokens["mask"]
    torch.testing.assert_close(tokens["returns"], sums, atol=1e-4, rtol=1e-4)


def test_the_example_of_packed_sequences_is_each_alone():
    packed = example("packed_reward_to_go(")
    for i, (start, stop) in enumerate(itertools.pairwise(packed["offsets"].tolist())):
        following, advantage = packed["after"][i].item(), 0.0
        value = following
        for t in range(stop - 1, start - 1, -1):
            following = packed["rewards"][t].item() + 0.99 * following
            assert packed["returns"][t].item() == pytest.approx(following, abs=1e-5)
            own = packed["values"][t].item()
            advantage = packed["rewards"][t].item() + 0.99 * value - own + 0.99 * 0.95 * advantage
            assert packed["advantages"][t].item() == pytest.approx(advantage, abs=1e-5)
            value = own


def rows_of(table):
    """By name, the numbers of a line; a dash is a number that is not read."""
    lines = [line.split() for line in table.splitlines() if line]
    return {
        name: [math.nan if one == "-" else float(one) for one in cells] for name, *cells in lines
    }


def walked(rows, mode, last):
    """Each real row's sum, walked forwards from it with gamma and lambda 0.5."""
    rewards, mask = rows["reward"], rows["mask"]
    values = rows.get("value")
    if mode == "zero":  # a row like any other, of zeros
        rewards = [one if real else 0.0 for one, real in zip(rewards, mask, strict=True)]
        values = values and [one if real else 0.0 for one, real in zip(values, mask, strict=True)]
        counts = [1.0] * len(mask)
    else:
        counts = mask
    passed = {"cut": 0.0, "skip": 1.0, "decay": 0.5, "zero": 0.5}[mode]

    def error(t):
        factor, k = 0.5, t + 1
        while k < len(mask) and not counts[k]:
            factor, k = factor * passed, k + 1
        following = values[k] if k < len(mask) else last
        return rewards[t] + factor * following - values[t]

    sums = []
    for t, real in enumerate(mask):
        total, factor = 0.0, 1.0
        for k in range(t, len(mask)):
            if counts[k] and factor:
                total += factor * (rewards[k] if values is None else error(k))
            step = 0.5 if counts[k] else passed
            if values is not None and step == 0.5:
                step *= 0.5
            factor *= step
        if values is None:
            total += factor * last
        sums.append(total if real else 0.0)
    return sums


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("table", DRAWN, ids=["hole", "advantages", "left", "right"])
def test_the_mask_modes_are_drawn_right(table, mode):
    rows = rows_of(table)
    last = 16.0 if table == DRAWN[3] else 0.0
    drawn = torch.tensor(rows[mode])
    torch.testing.assert_close(drawn, torch.tensor(walked(rows, mode, last)), rtol=0, atol=1e-5)
    rewards, mask = torch.tensor(rows["reward"]), torch.tensor(rows["mask"])
    options = {"gamma": 0.5, "mask": mask, "mask_mode": mode, "last_values": torch.tensor(last)}
    if "value" in rows:
        values = torch.tensor(rows["value"])
        result = returns.generalized_advantage(rewards, values, gae_lambda=0.5, **options)
    else:
        result = returns.reward_to_go(rewards, **options)
    torch.testing.assert_close(result, drawn, rtol=0, atol=1e-5)


def test_every_call_that_is_offered_is_in_the_table():
    offered = re.findall(r"^\| `(\w+)\(", TEXT, re.MULTILINE)
    assert sorted(set(offered) & set(returns.__all__)) == sorted(returns.__all__)
