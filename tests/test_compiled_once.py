"""Triton compiles nothing after the first iteration, however many rows the next ones have.

The loop's own calls are made on a device that is not there, and of each launch only that is kept
for which Triton would compile.
"""

import pytest
import torch
from pretend import pretended

triton = pytest.importorskip("triton", reason="needs triton, which is for Linux")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from vecpg.advantage import advantages, prepare_advantages  # noqa: E402
from vecpg.config import Config  # noqa: E402
from vecpg.envs import make_envs  # noqa: E402
from vecpg.kernels import graphs  # noqa: E402
from vecpg.policy import Policy  # noqa: E402
from vecpg.rollout import choose_collector  # noqa: E402
from vecpg.rollout.statistics import episode_statistics  # noqa: E402
from vecpg.rollout.tensor import Tallies, TensorCollector  # noqa: E402
from vecpg.value import Critic, ValueFunction, fit, predict  # noqa: E402

ITERATIONS = 200
LIMIT = 500


@pytest.fixture
def launched(monkeypatch):
    """What Triton would compile for: it does so where a launch adds to this."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binders, keys = {}, set()

    def run(kernel, *args, grid, warmup, **kwargs):
        if kernel not in binders:
            made = create_function_from_signature(kernel.signature, kernel.params, backend)
            binders[kernel] = made
        _, specialization, options = binders[kernel](*args, **kwargs)
        keys.add((kernel.fn.__name__, repr(specialization), repr(options)))

    monkeypatch.setattr(JITFunction, "run", run)
    return keys


def once(function, *of):
    """What `graphs.capture` does before it records."""
    function()
    return function


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env_id", "num_envs", "settings"),
    [
        ("CartPole-v1", 8, {}),
        ("CartPole-v1", 33, {"baseline": "value", "bootstrap_truncations": True}),
        ("Pendulum-v1", 1, {"baseline": "value", "weights": "gae", "dropout": 0.1}),
        ("Pendulum-v1", 48, {"baseline": "timestep_mean", "log_std": "network"}),
    ],
)
def test_all_is_compiled_before_the_first_iteration(
    monkeypatch, launched, env_id, num_envs, settings
):
    monkeypatch.setattr(graphs, "capture", once)
    config = Config(num_envs=num_envs, num_steps=20, value_steps=1, **settings)
    blocks = 1

    def read(collector, number):
        """As if all were over after so many blocks, of which nothing counts: nothing is played."""
        return Tallies(int(number + 1 < blocks), 0, 0, 0)

    monkeypatch.setattr(TensorCollector, "_read", read)
    with pretended() as on:
        envs = make_envs(
            env_id, num_envs, vectorization="tensor", device="cuda", max_episode_steps=LIMIT
        )
        spaces = envs.single_observation_space, envs.single_action_space
        policy = Policy(*spaces, dropout=config.dropout, log_std=config.log_std).to("cuda")
        critic = None
        if config.baseline == "value":
            critic = Critic(ValueFunction(spaces[0]).to("cuda"), 1e-3)
        collector = choose_collector(envs, policy).prepare(envs, policy)
        kernels = len(launched)
        collector = collector.prepare(envs, policy, config.num_steps)
        assert len(launched) == kernels  # what is recorded in graphs is compiled already
        kept, does = collector.kept, collector.kept._does
        # The first block alone: others launch the same.
        kept._does = does._replace(block=lambda: kept._t or does.block())
        most = 2 * config.num_steps + LIMIT - 2
        prepare_advantages(policy.device, config, most)
        ready = len(launched)
        capacity = -(-most // kept.between)
        found, lengths = [], set()
        for iteration in range(ITERATIONS):
            blocks = 1 + iteration * 5 % capacity
            kept._copies.t.zero_()
            rollout = collector.collect(
                envs, policy, num_steps=config.num_steps, seed=1, iteration=iteration, wait=False
            )
            episode_statistics(rollout)
            values, final_values = predict(critic, rollout)
            advantages(rollout, config, values, final_values)
            fit(critic, rollout, final_values, config, wait=False)
            lengths.add(len(rollout.mask))
            found.append(len(launched))
        assert not on.waits.of("", "item")
    assert lengths == {kept.between * (1 + k) for k in range(capacity)}
    assert found == [ready] * ITERATIONS
    assert ready >= 3


def test_a_launch_of_another_kind_is_noticed(launched):
    from vecpg.advantage import cuda

    for dtype in (torch.float32, torch.float64):
        with pretended():
            flags = torch.zeros(3, 2, dtype=torch.bool, device="cuda")
            cuda.sums_by_age(torch.zeros(3, 2, dtype=dtype, device="cuda"), flags, flags)
    assert sorted(name for name, *_ in launched) == ["_add", "_add", "_add_parts", "_find"]
