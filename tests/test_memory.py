"""Memory that cannot be enough, and memory that ran out."""

import errno
import gc
import json
import os
import re
import subprocess
import sys
import tracemalloc
import weakref

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from vecpg import begin as begin_module
from vecpg import memory
from vecpg import train as train_module
from vecpg.adam import Adam
from vecpg.config import Config, ConfigError
from vecpg.envs import make_envs
from vecpg.memory import check_room, explained, named, ran_out, there_is
from vecpg.policy import Policy
from vecpg.rollout import collect
from vecpg.rollout import data as data_module
from vecpg.rollout.data import Rows
from vecpg.run.checkpoint import Saver, load_policy
from vecpg.run.state import TrainState
from vecpg.run.stopping import Stopping
from vecpg.torchrun import Place
from vecpg.train import train

GB = 10**9
BOX, TWO = spaces.Box(-1, 1, (100,)), spaces.Discrete(2)

# -- What can never fit --------------------------------------------------------------------------

BEYOND = {
    "sync": ({"num_envs": 10**9}, "sync", (), "--num-envs: expected at most {}, got 1,000,000,000"),
    "async": ({"num_envs": 10**9}, "async", (), "--num-envs: expected at most {}, got 1,000,000"),
    "tensors": (
        {"num_envs": 2**40},
        "tensor",
        (),
        "--num-envs: expected at most {}, got 1,099,511",
    ),
    "observations": (
        {"num_envs": 10**6},
        "tensor",
        (BOX, TWO),
        "--num-envs: expected at most {}, got 1,000,000, which take at least 1.4 GB; there is 1.0",
    ),
    "steps": ({"num_steps": 10**12}, "tensor", (), "--num-steps: expected at most {}, got 1,000,0"),
    "episodes": (
        {"eval_episodes": 10**12},
        "sync",
        (),
        "--eval-episodes: expected at most {}, got 1,000,000,000,000, which take at least 40.0 TB",
    ),
    # 84 x 84 x 4 bytes, and four for what the space keeps of each.
    "pictures": (
        {"num_envs": 10**5},
        "tensor",
        (spaces.Box(0, 255, (84, 84, 4), np.uint8), TWO),
        "--num-envs: expected at most {}, got 100,000, which take at least 14.1 GB; there is 1.0",
    ),
    "table": (
        {"embedding_size": 10**9},
        "sync",
        (spaces.MultiDiscrete([5, 7], start=[3, -1]), TWO),
        "--embedding-size: expected at most {}, got 1,000,000,000, which take at least 336 GB",
    ),
}


@pytest.mark.parametrize("case", BEYOND)
def test_what_cannot_fit_is_answered_with_what_would(case):
    given, vectorization, known, message = BEYOND[case]
    pattern = re.escape(message).replace(r"\{\}", r"([\d,]+)")
    with pytest.raises(ConfigError, match=pattern) as error:
        check_room(Config(**given), vectorization, *known, have=GB)
    (name,) = given
    most = int(re.search(pattern, str(error.value))[1].replace(",", ""))
    assert 1 <= most < given[name]
    check_room(Config(**{name: most}), vectorization, have=GB)
    with pytest.raises(ConfigError, match="expected at most"):
        check_room(Config(**{name: most + 1}), vectorization, *known, have=GB)


def test_copies_in_processes_of_few_need_more():
    for each, most in ((1, 498), (10, 4_945), (10_000, 450_000), ("auto", 492_000)):
        config = {"envs_per_worker": each}
        with pytest.raises(ConfigError, match="--num-envs: expected at most") as error:
            check_room(Config(num_envs=10**6, **config), "async", have=GB)
        found = int(re.search(r"at most ([\d,]+)", str(error.value))[1].replace(",", ""))
        assert found == pytest.approx(most, rel=0.01)
        check_room(Config(num_envs=found, **config), "async", have=GB)


def test_layers_between_zeros_and_ones_are_counted():
    known = spaces.MultiBinary(4), spaces.MultiBinary(5)
    message = "--hidden-sizes: expected smaller ones than 10000000: 150,000,010 parameters"
    with pytest.raises(ConfigError, match=message):
        check_room(Config(hidden_sizes=(10**7,)), "sync", *known, have=GB)


def test_convolutions_are_counted():
    known = spaces.Box(0, 255, (1000, 1000, 3), np.uint8), TWO
    message = (
        r"--network cnn: expected smaller images than \(1000, 1000, 3\): its 479,832,736 parameters"
        " take at least 13.4 GB; there is 8.0 GB"
    )
    with pytest.raises(ConfigError, match=message):
        check_room(Config(num_envs=1), "tensor", *known, have=8e9)
    check_room(Config(num_envs=1), "tensor", *known, have=14e9)
    # The layers above them are counted with them, and those of a user's network are not known.
    known = spaces.Box(0, 255, (84, 84, 4), np.uint8), TWO
    with pytest.raises(ConfigError, match="smaller ones than 100000: 53,184,130 parameters"):
        check_room(Config(hidden_sizes=(10**5,)), "tensor", *known, have=GB)
    check_room(Config(network="mine:f"), "tensor", *known, have=GB)
    with pytest.raises(ValueError, match="--network cnn: expected images"):
        check_room(Config(network="cnn"), "tensor", BOX, TWO, have=GB)


def test_layers_that_cannot_fit_are_answered_with_their_size():
    config = Config(hidden_sizes=(10**6, 10**6))
    with pytest.raises(
        ConfigError,
        match="--hidden-sizes: expected smaller ones than 1000000 1000000: 1,000,104,000,002"
        " parameters take at least 28.0 TB; there is 1.0 GB",
    ):
        check_room(config, "tensor", BOX, TWO, have=GB)
    check_room(config, "tensor", BOX, TWO, have=30e12)


def test_where_not_even_one_fits_there_is_no_number():
    with pytest.raises(ConfigError, match="--num-envs: expected what fits, got 64, which take"):
        check_room(Config(), "async", have=1000)


def test_usual_settings_fit_whatever_the_spaces():
    for known in ((), (BOX, TWO), (spaces.Discrete(3), BOX), (spaces.Dict(), spaces.Tuple([TWO]))):
        check_room(Config(), "async", *known, have=GB)


def test_the_command_line_answers_before_torch_is_loaded(tmp_path):
    """What would have to be made first is not made."""
    code = (
        "import sys\n"
        "from vecpg import cli\n"
        "for args in (['--vectorization', 'async'], ['--vectorization', 'sync'],\n"
        "             ['--device', 'cpu', '--vectorization', 'vector_entry_point']):\n"
        "    try:\n"
        "        cli.main(['train', '--num-envs', str(2**40), *args])\n"
        "    except SystemExit as end:\n"
        "        print(end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 False\n" * 3
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: --num-envs: expected at most ") for line in lines)


@pytest.mark.parametrize("vectorization", ["tensor", "vector_entry_point", "sync"])
def test_a_run_refuses_before_anything_of_that_size_is_made(tmp_path, monkeypatch, vectorization):
    """A copy is made first; it is its spaces that do not fit."""
    made = []
    real = begin_module.make_envs

    def make(env_id, num_envs, **more):
        made.append(num_envs)
        assert num_envs == 1
        return real(env_id, num_envs, **more)

    monkeypatch.setattr(begin_module, "make_envs", make)
    monkeypatch.setattr(memory, "there_is", lambda: 60e6 if vectorization != "sync" else 3.3e9)
    config = Config(num_envs=10**6, vectorization=vectorization, out_dir=str(tmp_path / "runs"))
    expected = "--num-envs: expected at most" if vectorization != "sync" else "--num-steps"
    if vectorization == "sync":
        config = Config(num_envs=10**6, num_steps=60, vectorization="sync", out_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=expected):
        train(config)
    assert made == [1]
    assert list(tmp_path.iterdir()) == []


# -- The estimates are less than what is taken ---------------------------------------------------


def allocated(make):
    """Bytes that Python and NumPy hold at most while something is made, and what was made."""
    gc.collect()
    tracemalloc.start()
    made = make()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, made


def least(name, each, **known):
    """Bytes that `check_room` counts for so many: what it refuses where there is less."""
    low, high = 0.0, 1e15
    while high - low > 1:
        middle = (low + high) / 2
        try:
            check_room(Config(**{name: each}), have=middle, **known)
            high = middle
        except ConfigError:
            low = middle
    return high


@pytest.mark.parametrize("vectorization", ["sync", "vector_entry_point", "tensor"])
def test_copies_and_their_rows_take_more(vectorization):
    num_envs = 500

    def use():
        short = {"vectorization": vectorization, "max_episode_steps": 2}
        envs = make_envs("CartPole-v1", num_envs, **short)
        policy = Policy(envs.single_observation_space, envs.single_action_space)
        rollout = collect(envs, policy, num_steps=1, seed=1, iteration=0)
        return envs, rollout

    taken, (envs, rollout) = allocated(use)
    known = [envs.single_observation_space, envs.single_action_space]
    counted = least(
        "num_envs",
        num_envs,
        vectorization=vectorization,
        observation_space=known[0],
        action_space=known[1],
    )
    assert num_envs * 50 < counted < taken
    rows = sum(getattr(rollout, name)[:1].nbytes for name in data_module._FIELDS)
    assert rows >= num_envs * (4 * 4 + memory._BYTES_OF_A_ROW)


@pytest.mark.slow
def test_a_worker_takes_more():
    import psutil

    envs = make_envs("CartPole-v1", 200, vectorization="async", envs_per_worker=100)
    try:
        for process in envs.processes:
            own = psutil.Process(process.pid).memory_full_info().uss
            assert own > memory._BYTES_OF_A_WORKER + 100 * memory._BYTES_OF_A_COPY["async"]
    finally:
        envs.close()


@pytest.mark.parametrize(
    "space",
    [
        BOX,
        spaces.MultiDiscrete([5, 7]),
        spaces.MultiBinary(9),
        spaces.Box(0, 255, (40, 36, 3), np.uint8),
    ],
)
def test_the_tensors_of_a_state_and_its_draft_take_more(space):
    policy = Policy(space, TWO, hidden_sizes=(30, 20))
    state = TrainState(policy, Adam(policy.parameters()), None, Stopping(None, 10))
    draft = state.draft()
    for parameter in draft.policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    draft.optimizer.step()
    state.commit(draft)
    tensors = [each for one in (state, draft) for each in one.policy.parameters()]
    tensors += [each.grad for each in draft.policy.parameters()]
    tensors += [each for one in (state, draft) for each in one.optimizer.averages()]
    known = {"observation_space": space, "action_space": TWO, "vectorization": "tensor"}
    taken = sum(each.nbytes for each in tensors)
    # Small enough that no other setting is refused first.
    counted = least("hidden_sizes", (30, 20), **known)
    smallest = least("hidden_sizes", (1,), **known)
    assert smallest < counted <= taken + 1


def test_evaluated_episodes_take_more():
    taken, _ = allocated(lambda: ([float(k) for k in range(9999)], [k + 500 for k in range(9999)]))
    assert taken > 9999 * memory._BYTES_OF_AN_EPISODE


# -- What there is -------------------------------------------------------------------------------


def files(monkeypatch, **texts):
    """As if the system's files held these texts."""
    texts = {name.replace("__", "/").replace("_dot_", "."): text for name, text in texts.items()}

    def text(path):
        return texts.get(str(path).lstrip("/"), "")

    monkeypatch.setattr(memory, "_text", text)


def test_a_container_may_have_less_than_the_machine(monkeypatch):
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    files(monkeypatch)
    assert there_is() == machine
    files(monkeypatch, proc__meminfo="MemTotal: 9 kB\nSwapTotal:       1000 kB\n")
    assert there_is() == machine + 1_024_000
    for limits in (
        {"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__memory_dot_max": "123456\n"},
        {
            "proc__self__cgroup": "1:cpu:/x\n0::/a/b\n",
            "sys__fs__cgroup__a__memory_dot_max": "123456\n",
            "sys__fs__cgroup__a__b__memory_dot_max": "max\n",
        },
        {
            "proc__self__cgroup": "4:cpu,memory:/a\n0::/\n",
            "sys__fs__cgroup__memory__memory_dot_limit_in_bytes": "9223372036854771712\n",
            "sys__fs__cgroup__memory__a__memory_dot_limit_in_bytes": "123456\n",
        },
    ):
        files(monkeypatch, **limits)
        assert there_is() == 123456


def test_ranks_on_one_machine_share_what_there_is(monkeypatch):
    alone = there_is()
    place = Place(5, 8, 1, 4, 0, 0, "x", "localhost", 1)
    monkeypatch.setattr(memory, "place", lambda: place)
    assert there_is() == alone / 4
    with pytest.raises(ConfigError, match=r"expected at most [\d,]+ on each rank, got 1,000,000,"):
        check_room(Config(num_envs=10**6), "sync", have=GB)
    monkeypatch.setattr(memory, "place", lambda: place._replace(world_size=1, local_world_size=1))
    assert there_is() == alone
    with pytest.raises(ConfigError, match=r"expected at most [\d,]+, got 1,000,000,"):
        check_room(Config(num_envs=10**6), "sync", have=GB)


# -- When it ran out -----------------------------------------------------------------------------


def caused(error, cause):
    error.__cause__ = cause
    return error


def test_every_kind_of_running_out_is_known():
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(MemoryError) as numpys:
        np.empty(2**60, np.uint8)
    for error in (
        MemoryError(),
        numpys.value,
        torchs.value,
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        caused(ValueError("could not be made"), MemoryError()),
    ):
        assert ran_out(error)
    for error in (RuntimeError("out of patience"), OSError(errno.ENOSPC, "full"), ValueError()):
        assert not ran_out(error)


@pytest.mark.parametrize("phase", memory._ADVICE)
def test_the_line_says_when_how_much_and_what_to_lower(phase):
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(2**60, dtype=torch.uint8)
    line = explained(torchs.value, phase)
    assert re.fullmatch(
        r"out of memory while [a-z ]+: 1,152,922 TB were asked for; lower --[-a-z, ()]+", line
    )
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 2.00 GiB.")
    assert "\n" not in explained(cuda, phase)
    assert "Tried to allocate 2.00 GiB.; lower --" in explained(cuda, phase)


def test_rows_say_what_they_take(monkeypatch):
    def refuse(*args):
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr(data_module.np, "zeros", refuse)
    words = "4,096 environments x 501 rows x 33,600 numbers per observation take 276 GB"
    rows = ((160, 210), torch.float32), ((), torch.int64)
    with pytest.raises(MemoryError) as error:
        Rows(501, 4096, *rows)
    assert str(error.value) == words
    assert explained(error.value, "collect") == (
        f"out of memory while collecting: {words}; lower --num-envs (or --num-steps)"
    )
    monkeypatch.undo()
    held = Rows(1, 2, ((3,), torch.float32), ((), torch.int64))
    monkeypatch.setattr(data_module.np, "zeros", refuse)
    with pytest.raises(MemoryError, match="2 environments x 9 rows x 3 numbers per observation"):
        held.make_room(9)


def test_on_a_gpu_they_say_it_too(monkeypatch):
    def refuse(*args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(data_module.torch, "zeros", refuse)
    with pytest.raises(MemoryError, match="2 environments x 5 rows x 3 numbers per observation"):
        Rows(5, 2, ((3,), torch.float32), ((), torch.int64), "meta")


def test_another_error_passes_as_it_is():
    with pytest.raises(RuntimeError, match="^the simulator$"), named(lambda: "collect"):
        raise RuntimeError("the simulator")


def settings(tmp_path, **given):
    usual = {"num_envs": 4, "total_iterations": 4, "eval_episodes": 2, "return_window": 4}
    more = {"out_dir": str(tmp_path), "progress": False, "target_return": None}
    return Config(**usual | more | given)


# What raises in the third iteration, and how: the name in train.py, the phase, what is lowered.
PHASES = {
    "collect": ("collect", MemoryError(), "collecting; lower --num-envs"),
    "weights": ("weigh", MemoryError(), "computing returns; lower --num-envs"),
    "returns": ("advantages_of", MemoryError("too large"), "returns: too large; lower --num-envs"),
    "update": (
        "update",
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        "updating: CUDA out of memory. Tried to allocate 2.00 GiB.; lower --num-envs, --num-st",
    ),
    "fit": (
        "fit",
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator"),
        "updating;",
    ),
}


@pytest.mark.parametrize("case", PHASES)
@pytest.mark.parametrize("vectorization", ["tensor", "sync"])
def test_a_run_that_ran_out_is_saved_with_one_line(tmp_path, monkeypatch, case, vectorization):
    name, problem, message = PHASES[case]
    real, calls = getattr(train_module, name), []

    def fails(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise problem
        return real(*args, **more)

    monkeypatch.setattr(train_module, name, fails)
    config = settings(tmp_path, env_id="CartPole-v1", vectorization=vectorization)
    with pytest.raises(MemoryError, match=re.escape(message)) as error:
        train(config)
    assert str(error.value).startswith("out of memory while ")
    (run_dir,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2]
    load_policy(run_dir)


def test_the_evaluation_at_the_end_is_named_too(tmp_path, monkeypatch):
    def fails(*args, **more):
        raise MemoryError

    monkeypatch.setattr(train_module, "evaluate_in", fails)
    with pytest.raises(MemoryError, match="while evaluating; lower --eval-episodes"):
        train(settings(tmp_path))


def test_before_the_first_step_it_is_a_matter_of_settings(tmp_path, monkeypatch):
    def fails(*args, **more):
        raise MemoryError("Unable to allocate 3. GiB")

    monkeypatch.setattr(begin_module, "make_envs", fails)
    with pytest.raises(
        ConfigError, match="out of memory while preparing: Unable .*; lower --num-envs"
    ):
        train(settings(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("vectorization", ["tensor", "sync"])
def test_what_was_collected_is_given_back_before_saving(tmp_path, monkeypatch, vectorization):
    """An error holds the calls that it ended, and they what they had made."""
    collected, freed = [], []
    real, save = Rows.rollout, Saver.save

    def rollout(self, *args):
        collected.append(weakref.ref(self.host.obs))
        if len(collected) == 3:
            raise MemoryError
        return real(self, *args)

    def saves(*args):
        freed.append([each() is None for each in collected])
        return save(*args)

    monkeypatch.setattr(Rows, "rollout", rollout)
    monkeypatch.setattr(Saver, "save", saves)
    with pytest.raises(MemoryError):
        train(settings(tmp_path, env_id="CartPole-v1", vectorization=vectorization))
    assert len(freed) == 2
    assert freed[-1] == [True] * 3


class Large(gymnasium.Env):
    """Observations of a megabyte, and a hundred steps."""

    observation_space = spaces.Box(-1, 1, (250_000,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(250_000, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(250_000, np.float32), 1.0, self.steps == 100, False, {}


gymnasium.register("Large-v0", Large, max_episode_steps=100)


@pytest.mark.slow
def test_a_process_that_may_not_have_more_ends_in_one_line(tmp_path):
    """The real thing: a gigabyte beside what is loaded, and rollouts of nearly two."""
    code = (
        "import re, resource, sys\n"
        "import test_memory\n"
        "from vecpg.train import train\n"
        "train(test_memory.settings(sys.argv[1], total_iterations=1))\n"
        "used = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 10**9, used + 10**9))\n"
        "try:\n"
        "    train(test_memory.settings(sys.argv[2], env_id='Large-v0', num_envs=16,\n"
        "                               hidden_sizes=(4,), vectorization='sync'))\n"
        "except MemoryError as error:\n"
        "    print(error)\n"
    )
    directories = [str(tmp_path / name) for name in ("first", "second")]
    done = subprocess.run(
        [sys.executable, "-c", code, *directories],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.fullmatch(
        r"out of memory while collecting: 16 environments x \d+ rows x 250,000 numbers per"
        r" observation take [\d.]+ [MG]B; lower --num-envs \(or --num-steps\)\n",
        done.stdout,
    ), done.stderr
    (run_dir,) = (tmp_path / "second").iterdir()
    load_policy(run_dir)
