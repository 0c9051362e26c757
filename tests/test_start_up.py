"""What a run may not wait for."""

import json
import os
import subprocess
import sys

from conftest import ROOT

# Each takes from a fifth of a second to a whole one to load, and training needs none of them.
HEAVY = {
    "matplotlib",
    "moviepy",
    "optuna",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "triton",
}


def run(program, cwd):
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_a_run_loads_no_compiler_and_draws_nothing(tmp_path):
    """In machine code, and in torch with all there is to fit."""
    loaded = run(
        "import json, sys\n"
        "from vecpg.config import Config\n"
        "from vecpg.train import train\n"
        "few = {'total_iterations': 2, 'eval_episodes': 2, 'progress': False, 'device': 'cpu'}\n"
        "train(Config(num_envs=4, **few))\n"
        "train(Config(num_envs=2, vectorization='sync', baseline='value', dropout=0.1,\n"
        "             normalize_obs=True, max_grad_norm=1.0, ent_coef=0.1, **few))\n"
        "train(Config(num_envs=2, env_id='FrozenLake-v1', **few))\n"
        "print(json.dumps(list(sys.modules)))\n",
        tmp_path,
    )
    assert {"torch", "numba", "tensorboard", "vecpg.adam"} <= set(loaded)
    assert HEAVY & set(loaded) == set()


def test_the_garbage_collector_leaves_alone_what_was_imported(tmp_path):
    """It is on again when training begins: environments may leave garbage."""
    enabled, kept = run(
        "import gc, json, os, runpy, sys\n"
        "import vecpg.train as module\n"
        "def train(config):\n"
        "    print(json.dumps([gc.isenabled(), gc.get_freeze_count()]), file=stdout, flush=True)\n"
        "    raise SystemExit\n"
        "module.train = train\n"
        "stdout = open(os.dup(1), 'w')\n"
        "sys.argv = ['train.py', '--num-envs', '2']\n"
        f"runpy.run_path({str(ROOT / 'scripts' / 'train.py')!r}, run_name='__main__')\n",
        tmp_path,
    )
    assert enabled
    assert kept > 10_000
