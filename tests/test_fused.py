import math

import numpy as np
import pytest
import torch
from fused_twins import entry_of
from pretend import pretended

from vecpg import fused
from vecpg.adam import Adam
from vecpg.advantage import advantages
from vecpg.config import Config, flag
from vecpg.envs import make_envs
from vecpg.fused import Fused, why_not, why_not_together
from vecpg.kernels.iteration import Entry, Memory, Stamp
from vecpg.policy import Policy
from vecpg.policy.network import drawn_from
from vecpg.rollout import collect
from vecpg.rollout.statistics import episode_statistics
from vecpg.update import update

# -- Whole iterations, from the host -------------------------------------------------------------

CARTPOLE = dict(max_grad_norm=0.5, shards=2)
PENDULUM = dict(
    env_id="Pendulum-v1",
    weights="full_return",
    baseline="none",
    reduction="step",
    ent_coef=0.02,
    activation="relu",
)
TRACK = dict(env_id="on_tensors:Track-v0", baseline="timestep_mean", reduction="sum", num_envs=5)
ALL = {"CartPole": CARTPOLE, "Pendulum": PENDULUM, "Track": TRACK}


def config_of(**changes):
    settings = dict(
        num_envs=6,
        num_steps=10,
        max_episode_steps=12,
        hidden_sizes=(8, 16),
        device="cuda",
        vectorization="tensor",
        seed=3,
    )
    return Config(**settings | changes)


def envs_of(config, device="cuda"):
    return make_envs(
        config.env_id,
        config.num_envs,
        vectorization="tensor",
        device=device,
        max_episode_steps=config.max_episode_steps,
    )


def begun(config, device="cuda"):
    """Environments, and policy and optimizer that have made no step."""
    envs = envs_of(config, device)
    with drawn_from(config.seed):
        policy = Policy(
            envs.single_observation_space,
            envs.single_action_space,
            hidden_sizes=config.hidden_sizes,
            activation=config.activation,
        ).to(device)
    return envs, policy, Adam(policy.parameters(), config.learning_rate)


@pytest.fixture
def on():
    """A device that is not there, and twins of the kernels."""
    pytest.importorskip("triton", reason="needs triton, which is for Linux")
    from fused_twins import fused_twins

    with pretended() as device, fused_twins():
        yield device


def launched(*configs, count=0):
    """Runs side by side that have made so many iterations; and policy and optimizer of each."""
    all_begun = [begun(config) for config in configs]
    together = Fused(configs, *all_begun[0][:2])
    for run, (_, policy, optimizer) in enumerate(all_begun):
        together.load(run, policy, optimizer, 0)
    for _ in range(count):
        together.iterate()
    return together, *(own[1:] for own in all_begun)


def bits(policy, optimizer):
    """Everything that an update changes, on the host."""
    state = optimizer.state_dict()["state"]
    averages = [state[place][name] for place in state for name in sorted(state[place])]
    return [each.detach().cpu().clone() for each in (*policy.parameters(), *averages)]


def assert_same(one, other):
    assert len(one) == len(other)
    assert all(map(torch.equal, one, other))


def on_the_cpu(config, count):
    """What the same iterations come to where each is looked at: entries, and what they leave."""
    envs, policy, optimizer = begun(config, "cpu")
    entries = np.zeros((count, len(Entry)))
    for iteration, entry in enumerate(entries):
        shards = config.resolved_shards
        rollout = collect(
            envs,
            policy,
            num_steps=config.num_steps,
            seed=config.seed,
            iteration=iteration,
            shards=shards,
            backend="reference",
        )
        episodes = episode_statistics(rollout, shards)
        stats = update(
            policy, optimizer, rollout, advantages(rollout, config), config, backend="reference"
        )
        entry[:] = entry_of(rollout, episodes, stats)
    return entries, policy, optimizer


@pytest.mark.parametrize("changes", ALL.values(), ids=ALL)
def test_they_are_those_that_go_step_by_step(on, changes):
    config, count = config_of(**changes), 4
    wanted, policy, optimizer = on_the_cpu(config, count)
    together, (own, adam) = launched(config, count=count)
    assert str(together) == "whole iterations in one CUDA graph"
    entries, stamps = together.read(0, count)
    exact = [Entry.COUNTED, Entry.ROWS, Entry.EPISODES, Entry.ROLLOUT_FINITE, Entry.UPDATE_FINITE]
    assert np.array_equal(entries[:, 0, exact], wanted[:, exact])
    assert entries[:, 0] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    times = [each for each in Stamp if each != Stamp.RETURNS or config.baseline != "none"]
    assert (np.diff(stamps[:, 0, times].ravel()) > 0).all()
    together.restore(0, count - 1, own, adam)
    for one, other in zip(bits(own, adam), bits(policy, optimizer), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_was_launched_beyond_is_as_if_it_had_not_been(on):
    config = config_of()
    straight, (policy, optimizer) = launched(config, count=6)
    straight.restore(0, 5, policy, optimizer)
    wanted, entries = bits(policy, optimizer), straight.read(0, 6)[0]

    together, (policy, optimizer) = launched(config, count=4)
    together.restore(0, 1, policy, optimizer)
    acts = together.acted(0, 2)
    together.release(3)
    together.load(0, policy, optimizer, 2)
    for _ in range(4):
        together.iterate()
    assert_same([*acts.values()], [each.detach() for each in policy.parameters()])
    assert np.array_equal(together.read(4, 4)[0], entries[2:])
    together.restore(0, 7, policy, optimizer)
    assert_same(bits(policy, optimizer), wanted)


def test_runs_side_by_side_are_what_each_is_alone(on):
    configs = [
        config_of(),
        config_of(seed=9, learning_rate=0.05, gamma=0.5, reduction="step"),
        config_of(seed=2**40, ent_coef=0.1, max_grad_norm=0.1, reduction="sum"),
    ]
    together, *states = launched(*configs, count=3)
    assert str(together) == "whole iterations in one CUDA graph, 3 runs at once"
    entries, _ = together.read(0, 3)
    for run, (config, state) in enumerate(zip(configs, states, strict=True)):
        alone, own = launched(config, count=3)
        assert np.array_equal(entries[:, run], alone.read(0, 3)[0][:, 0])
        together.restore(run, 2, *state)
        alone.restore(0, 2, *own)
        assert_same(bits(*state), bits(*own))


def test_an_iteration_is_one_launch_and_nothing_waits(on):
    together, _ = launched(config_of())
    on.clear()
    for _ in range(20):
        together.iterate()
    # Keys and scalars of 8 iterations go there together.
    assert on.operations.of(kind="graph") == 20
    assert on.operations.of(kind="copy_") == on.operations.of() - 20 == 6
    assert not on.waits
    assert on.looks.of() == 3
    on.clear()
    together.acted(0, 20)
    assert on.operations.of(kind="clone") == on.operations.of() == 1
    together.read(3, 17)
    assert on.looks.of() == 1
    assert not on.waits


def test_reading_waits_for_the_last_it_reads_and_for_no_later_one(on, monkeypatch):
    """On a stream of its own, where nothing else makes it wait."""
    done, waits, copies = {}, [], []
    record, copy_ = torch.cuda.Event.record, torch.Tensor.copy_

    def recording(event, stream=None):
        done[event] = on.operations.of(kind="graph")
        record(event, stream)

    def copying(to, *given, **named):
        if named.get("non_blocking"):
            copies.append(torch.cuda.current_stream())
        return copy_(to, *given, **named)

    together, _ = launched(config_of())
    on.clear()
    monkeypatch.setattr(torch.cuda.Event, "record", recording)
    for _ in range(7):
        together.iterate()
    waiting = lambda stream, event: waits.append((stream, done[event]))  # noqa: E731
    monkeypatch.setattr(torch.cuda.Stream, "wait_event", waiting)
    monkeypatch.setattr(torch.Tensor, "copy_", copying)
    together.read(2, 3)
    ((stream, number),) = waits
    assert number == 5
    assert stream is not torch.cuda.current_stream()
    assert copies == [stream, stream]


def test_the_host_is_a_few_iterations_ahead(on, monkeypatch):
    """What is long is waited for not long, and what is short keeps the device at work."""
    together, _ = launched(config_of())
    given, ahead, waited = [], [], [0]
    synchronize = torch.cuda.Event.synchronize

    def noting(event):
        if event.at is not None:
            waited[0] = max(waited[0], event.reached)
        synchronize(event)

    monkeypatch.setattr(torch.cuda.Event, "synchronize", noting)
    for _ in range(33):
        together.iterate()
        on.given += 1  # as if this were a transfer of its own
        given.append(on.given)
        ahead.append(sum(each > waited[0] for each in given))
    assert max(ahead) == 16
    assert min(ahead[16:]) == 9


def test_places_are_taken_again_once_they_were_released(on, monkeypatch):
    config = config_of()
    wide, (policy, optimizer) = launched(config, count=13)
    entries = wide.read(0, 13)[0]
    wide.restore(0, 12, policy, optimizer)
    wanted = bits(policy, optimizer)
    monkeypatch.setattr(fused, "_MOST_BYTES", 0)
    narrow, state = launched(config)
    assert narrow.room == 3
    found, acted = [], []
    for number in range(13):
        narrow.iterate()
        if number >= 2:
            found.append(narrow.read(number - 2, 1)[0])
            acted.append(narrow.acted(0, number - 2))
            narrow.release(number - 2)
            assert narrow.room == 1
    found.append(narrow.read(11, 2)[0])
    assert np.array_equal(np.concatenate(found), entries)
    for number, parameters in enumerate(acted):
        assert_same([*parameters.values()], [*wide.acted(0, number).values()])
    narrow.restore(0, 12, *state)
    assert_same(bits(*state), wanted)


def test_there_are_as_many_places_as_fit(on, monkeypatch):
    together, _ = launched(config_of())
    memory, places = together._memory, together.room + 1
    rings = memory.keys, memory.scalars, memory.states, memory.entries, memory.stamps
    assert places == 256
    monkeypatch.setattr(fused, "_MOST_BYTES", 20 * sum(each.nbytes for each in rings) // places)
    assert launched(config_of())[0].room + 1 == 16


def test_a_state_comes_back_as_it_was(on):
    config = config_of(**PENDULUM)
    _, policy, optimizer = begun(config, "cpu")
    together, (own, adam) = launched(config)
    together.restore(0, -1, own, adam)
    assert_same(bits(own, adam), bits(policy, optimizer))

    _, policy, optimizer = on_the_cpu(config, 3)
    own.load_state_dict(policy.state_dict())
    adam.load_state_dict(optimizer.state_dict())
    together.load(0, own, adam, 7)
    acts = together.acted(0, 0)
    assert list(acts) == list(policy.state_dict())
    assert_same([each.cpu() for each in acts.values()], [*policy.state_dict().values()])
    with torch.no_grad():
        for each in (*own.parameters(), *adam.averages()):
            each.fill_(math.nan)
    together.restore(0, -1, own, adam)
    assert_same(bits(own, adam), bits(policy, optimizer))
    assert all(each.is_cuda for each in own.parameters())


def test_what_cannot_be_is_refused(on, monkeypatch):
    monkeypatch.setattr(fused, "_MOST_BYTES", 0)
    envs, policy, optimizer = begun(config_of())
    together = Fused([config_of()], envs, policy)
    with pytest.raises(ValueError, match="run: expected one that was loaded, got 0"):
        together.iterate()
    with pytest.raises(ValueError, match=r"betas \(0.9, 0.999\) and eps 1e-08, got \(0.5, 0.9\)"):
        together.load(0, policy, Adam(policy.parameters(), betas=(0.5, 0.9)), 0)
    together.load(0, policy, optimizer, 0)
    together.iterate()
    together.iterate()
    together.release(0)
    together.release(-1)  # what was released stays so
    for wrong in (
        lambda: together.read(0, 2),
        lambda: together.read(1, 2),
        lambda: together.acted(0, 0),
        lambda: together.acted(0, 3),
        lambda: together.restore(0, 2, policy, optimizer),
    ):
        with pytest.raises(ValueError, match="number: expected that of an iteration from 1"):
            wrong()
    together.restore(0, 0, policy, optimizer)
    while together.room:
        together.iterate()
    with pytest.raises(RuntimeError, match="release some of 3 iterations"):
        together.iterate()


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("the baseline is mean", dict(baseline="mean")),
        ("the weights are normalized", dict(normalize=True)),
        ("its hidden layers are (8, 65), not two of up to 64", dict(hidden_sizes=(8, 65))),
        ("more than half of the 75.2 GB that are free", dict(max_episode_steps=2**62)),
        ("more than half of the 75.2 GB that are free", dict(num_steps=2**62)),
        (None, dict(max_episode_steps=2**20)),
    ],
)
def test_why_not(on, reason, changes):
    config = config_of(**changes)
    found = why_not(config, *begun(config)[:2])
    assert found == reason or reason in found


def test_shards_of_all_runs_are_as_many_as_a_launch_may_have(on):
    config = config_of(shards=3)
    given = config, *begun(config)[:2]
    assert why_not(*given, runs=21845) is None
    assert why_not(*given, runs=21846) == "65,538 shards of all runs are more than 65,535"


def test_memory_that_torch_keeps_from_an_earlier_run_is_free(on, monkeypatch):
    begun_one = begun(config := config_of())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10**9))
    assert "of the 1.0 KB that are free" in why_not(config, *begun_one[:2])
    need = sum(each.nbytes for each in Fused([config], *begun_one[:2])._memory)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**9)
    for kept, refused in ((2 * need - 1000, False), (2 * need - 1001, True)):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, kept=kept: 10**9 + kept)
        assert (why_not(config, *begun_one[:2]) is not None) == refused


def test_why_not_off_a_gpu(on):
    config = config_of()
    assert why_not(config, *begun(config, "cpu")[:2]) == "the environments are on cpu"
    _, policy, _ = begun(config)
    envs = make_envs(config.env_id, 2, vectorization="sync")
    assert why_not(config, envs, policy) == "these are no environments on tensors"


def test_why_not_together():
    config = config_of()
    may_differ = dict(seed=4, learning_rate=1.0, gamma=0.1, ent_coef=1.0, max_grad_norm=1.0)
    assert why_not_together([config, config_of(**may_differ), config_of(reduction="sum")]) is None
    assert why_not_together([config, config_of(shards=1)]) is None
    other = config_of(shards=2)
    assert why_not_together([config, config, other]) == "they differ in --shards: 1 and 2"
    for name, value in {
        "env_id": "Pendulum-v1",
        "env_kwargs": {"g": 9.0},
        "max_episode_steps": 13,
        "num_envs": 7,
        "num_steps": 11,
        "device": "cuda:1",
        "network": "mlp",
        "hidden_sizes": (8, 8),
        "activation": "relu",
        "weights": "full_return",
        "baseline": "none",
    }.items():
        assert f"differ in {flag(name)}:" in why_not_together([config, config_of(**{name: value})])


# -- Kernels and their twins ---------------------------------------------------------------------


@pytest.mark.slow
def test_interpreted():
    pytest.importorskip("triton", reason="needs triton, which is for Linux")
    import gpu_kernels

    gpu_kernels.interpret("test_fused")


def interpret():
    """Iterations of the kernels come to what those of their twins do."""
    from fused_twins import fused_twins

    for changes in ALL.values():
        configs = config_of(**changes), config_of(**changes, seed=5, gamma=0.5)
        with pretended(), fused_twins():
            together, *_ = launched(*configs)
            together._write_ahead()
            before = Memory(*(each.cpu() for each in together._memory))
            for _ in range(2):
                together.iterate()
            wanted = Memory(*(each.cpu() for each in together._memory))
        for each in (before.obs, before.weights, before.rewards, before.parts, before.tallies):
            each.fill_(torch.nan)
        together._memory = before
        for _ in range(2):
            together._iteration()
        exact = [Entry.COUNTED, Entry.ROWS, Entry.EPISODES, Entry.ROLLOUT_FINITE]
        exact += [Entry.UPDATE_FINITE]
        assert torch.equal(before.entries[..., exact], wanted.entries[..., exact])
        torch.testing.assert_close(before.entries, wanted.entries, rtol=1e-5, atol=1e-5)
        for name in ("starts", "stops", "numbers", "longest", "last", "flags", "at"):
            assert torch.equal(getattr(before, name), getattr(wanted, name)), name
        torch.testing.assert_close(before.states, wanted.states, rtol=1e-5, atol=1e-6)
