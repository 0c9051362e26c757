"""Run directories as far as a plot reads them."""

import json

import pytest

from vecpg.cli import plot_main
from vecpg.config import Config, to_dict

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


def refused(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        plot_main([str(arg) for arg in args])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    return captured.err
