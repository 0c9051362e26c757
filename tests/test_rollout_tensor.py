"""Collecting on the device against collecting step by step."""

import copy
import importlib.util
import math
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import apart, by_stepping
from gymnasium import spaces
from gymnasium.vector import VectorWrapper
from on_tensors import Dock, Fading, Panel
from pairs import pairwise
from pretend import pretended

from vecpg.envs import EnvironmentFailure, make_envs, ops
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.kernels.announce import anew
from vecpg.policy import Policy
from vecpg.rollout import choose_collector, collect
from vecpg.rollout import tensor as module


class Plain(Policy):
    """Not a Policy itself, so that its actions are drawn in torch everywhere."""


def make_policy(envs, **settings):
    torch.manual_seed(0)
    policy = Plain(envs.single_observation_space, envs.single_action_space, **settings)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return policy


def same(one, other):
    for name in ("mask", "rewards", "terminations", "truncations", "final_obs", "final_rows"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("obs", "actions"):
        assert torch.equal(getattr(one, name)[one.mask], getattr(other, name)[other.mask]), name
    assert one.stream == other.stream


@pairwise(
    num_steps=[1, 2, 7, 40],
    which=["CartPole-v1", "Pendulum-v1", "fading", "several"],
    between=[1, 5, 16],
)
def test_a_rollout_is_that_of_stepping(monkeypatch, which, num_steps, between):
    def make():
        if which == "fading":
            return TensorVectorEnv(Fading, 9, max_episode_steps=5)
        if which == "several":
            return TensorVectorEnv(Panel, 9, max_episode_steps=5)
        return make_envs(which, 9, vectorization="tensor", max_episode_steps=30)

    monkeypatch.setattr(module, "_ROWS_BETWEEN_LOOKS", {"cpu": between})
    envs = make()
    policy = make_policy(envs, dropout=0.3 if which == "CartPole-v1" else 0.0)
    for iteration in range(2):
        arguments = {"num_steps": num_steps, "seed": 3, "iteration": iteration}
        on_device = collect(envs, policy, **arguments)
        stepped = by_stepping(make(), policy, **arguments)
        same(on_device, stepped)
        assert on_device.mask[-1].any()
        # Fewer episodes than rows: something was cut, something reset, something masked.
        assert on_device.dones.sum() >= 9


def test_an_environment_elsewhere_than_the_policy_is_refused():
    envs = make_envs("CartPole-v1", 2, vectorization="tensor", device="cpu")
    policy = make_policy(envs).to("meta")
    with pytest.raises(ValueError, match="envs: expected them on meta like the policy, got cpu"):
        collect(envs, policy, num_steps=1, seed=1, iteration=0)


@pytest.mark.parametrize(
    ("what", "backend"),
    [
        ("reward", "reference"),
        ("observation", "reference"),
        pytest.param("reward", "cpu", marks=pytest.mark.slow),
        ("observation", "cpu"),
    ],
)
def test_numbers_that_are_not_finite_are_named(what, backend):
    """The second environment to start is the only one of the three that starts above 0.5."""
    nan = math.nan
    in_reward, in_observation = float(what == "reward"), float(what == "observation")

    class Broken(Fading):
        @staticmethod
        def start(uniforms):
            return 0.0, uniforms[0] + 4.0

        @staticmethod
        def observation(state):
            now = in_observation * state[0] * ops.where(state[1] > limit, 1.0, 0.0) > 0.0
            return state[0], ops.where(now, nan, state[1])

        @staticmethod
        def reward(state, action, following):
            now = in_reward * following[0] * ops.where(state[1] > limit, 1.0, 0.0) > 0.0
            return ops.where(now, nan, action)

    limit = 99.0
    envs = TensorVectorEnv(Broken, 3, max_episode_steps=5)
    firsts = collect(envs, make_policy(envs), num_steps=1, seed=1, iteration=0).obs[0, :, 1]
    order = firsts.argsort().tolist()
    limit = (firsts[order[1]] + firsts[order[2]]).item() / 2
    step = 0 if what == "reward" else 1
    envs = TensorVectorEnv(Broken, 3, max_episode_steps=5)
    policy = make_policy(envs)
    if backend == "cpu":
        policy = Policy(envs.single_observation_space, envs.single_action_space)
    with pytest.raises(
        EnvironmentFailure, match=f"environment {order[2]} returned the {what} .* at step {step} of"
    ):
        collect(envs, policy, num_steps=1, seed=1, iteration=0, backend=backend)


def lengths_of(vectorization, policy, iterations):
    envs = make_envs("CartPole-v1", 64, vectorization=vectorization)
    found = []
    for iteration in range(iterations):
        rollout = collect(envs, policy, num_steps=1, seed=5, iteration=iteration)
        found.append(rollout.mask.sum(dim=0))
    envs.close()
    return torch.cat(found)


@pytest.mark.slow
def test_episodes_of_a_policy_are_as_long_as_in_gymnasiums_own():
    """The test of Kolmogorov and Smirnov, two samples, at one in a thousand."""
    envs = make_envs("CartPole-v1", 1)
    policy = make_policy(envs)
    ours, theirs = lengths_of("tensor", policy, 80), lengths_of("sync", policy, 80)
    assert len(ours) == len(theirs) == 5120
    limit = 1.95 * (2 / 5120) ** 0.5
    assert apart(ours, theirs) < limit
    # Lengths of which each is 5 % longer would be seen.
    assert apart((ours * 1.05).round(), theirs) > limit


def pushing(env_id, strength):
    """Pushes along with the movement, more or less often: it reaches the goal in some episodes."""
    envs = make_envs(env_id, 1)
    spaces = envs.single_observation_space, envs.single_action_space
    policy = Policy(*spaces, hidden_sizes=())
    with torch.no_grad():
        layer = policy.network[0]
        layer.bias.zero_()
        layer.weight.zero_()
        layer.weight[:, -1] = (
            strength * torch.linspace(-1, 1, 3) if len(layer.bias) > 1 else strength
        )
    return policy


def ends_of(env_id, policy, limit, vectorization, backend):
    """Lengths of 1280 episodes, and the share of those that reached the goal."""
    envs = make_envs(env_id, 64, vectorization=vectorization, max_episode_steps=limit)
    lengths, reached = [], 0
    for iteration in range(20):
        given = {"num_steps": 1, "seed": 5, "iteration": iteration}
        rollout = collect(envs, policy, **given, backend=backend)
        lengths.append(rollout.mask.sum(dim=0))
        reached += rollout.terminations.sum().item()
    envs.close()
    return torch.cat(lengths), reached / 1280


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env_id", "strength", "limit"),
    [("Acrobot-v1", 0.5, 130), ("MountainCarContinuous-v0", 30.0, 200)],
)
def test_goals_are_reached_as_often_and_as_soon_as_in_gymnasiums_own(env_id, strength, limit):
    policy = pushing(env_id, strength)
    theirs, share = ends_of(env_id, policy, limit, "sync", "auto")
    assert 0.3 < share < 0.8
    most = 1.95 * (2 / 1280) ** 0.5
    for backend in ("cpu", "reference"):
        ours, reached = ends_of(env_id, policy, limit, "tensor", backend)
        assert abs(reached - share) < 3.3 * (share * (1 - share) * 2 / 1280) ** 0.5
        assert apart(ours, theirs) < most
        assert apart((ours * 1.05).round(), theirs) > most


@pytest.mark.parametrize("vectorization", ["tensor", "vector_entry_point"])
def test_an_environment_on_tensors_is_trained_and_evaluated(tmp_path, vectorization):
    from vecpg.config import Config
    from vecpg.train import train

    env_id = "CartPole-v1" if vectorization == "tensor" else "vecpg/CartPole-v1"
    config = Config(
        env_id=env_id,
        vectorization=vectorization,
        num_envs=8,
        total_iterations=3,
        eval_episodes=3,
        out_dir=str(tmp_path),
        progress=False,
    )
    summary = train(config).summary
    assert (summary["iterations"], summary["episodes"]) == (3, 24)
    assert summary["vectorization"] == vectorization
    assert summary["eval_return_mean"] > 5


# -- On a device ----------------------------------------------------------------------------------


class Body(torch.nn.Module):
    """A user's own network."""

    def __init__(self, space):
        super().__init__()
        self.layer = torch.nn.Linear(math.prod(space.shape), 6)

    def forward(self, obs):
        return torch.sin(self.layer(obs.flatten(1)))


class Once:
    """Every episode is one step."""

    observation_space = spaces.Box(0, 1, (1,))
    action_space = spaces.Discrete(2)
    num_uniforms = 1

    @staticmethod
    def start(uniforms):
        return (uniforms[0],)

    @staticmethod
    def transition(state, action):
        return (state[0] * action,)

    @staticmethod
    def observation(state):
        return state

    @staticmethod
    def terminated(state):
        return True

    @staticmethod
    def reward(state, action, following):
        return 1.0


class Wandering(Once):
    """What torch takes, and kernels do not."""

    @staticmethod
    def transition(state, action):
        return ((state[0] * action).square(),)


ON_TENSORS = {"fading": Fading, "several": Panel, "dock": Dock, "once": Once}


def make(which, num_envs, device="cpu", limit=30, dtype="float32"):
    if which in ON_TENSORS:
        return TensorVectorEnv(
            ON_TENSORS[which], num_envs, max_episode_steps=limit, device=device, dtype=dtype
        )
    return make_envs(
        which, num_envs, vectorization="tensor", device=device, max_episode_steps=limit
    )


@contextmanager
def a_device(way="torch", graphs=True):
    """A pretended one, with twins of the kernels or, all in torch, without."""
    with ExitStack() as undone:
        device = undone.enter_context(pretended())
        if way == "kernels":
            pytest.importorskip("triton", reason="needs triton, which is for Linux")
            from twins import twins

            undone.enter_context(twins())
        if not graphs:
            alone = mock.patch.object(module.graphs, "capture", lambda function, *_: function)
            undone.enter_context(alone)
        yield device


def prepared(way, policy, envs, num_steps, shards=1):
    backend = "cuda" if way == "kernels" else "reference"
    return choose_collector(envs, policy, backend).prepare(envs, policy, num_steps, shards)


def poison(collector):
    rows = collector.kept._rows
    for each in (rows.obs, rows.actions, rows.rewards):
        each.fill_(math.nan if each.is_floating_point() else 2**40)
    for each in (rows.terminations, rows.truncations, rows.mask):
        each.fill_(True)


def agree(on_device, host):
    """A rollout of a device with that of the host, which ends with the last row that counts."""
    length = len(host.mask)
    assert not on_device.mask[length:].cpu().any()
    for name in ("mask", "rewards", "terminations", "truncations"):
        found = getattr(on_device, name).cpu()
        assert torch.equal(found[:length], getattr(host, name)), name
        assert not found[length:].any(), name
    for name in ("obs", "actions"):
        found = getattr(on_device, name).cpu()[:length]
        assert torch.equal(found[host.mask], getattr(host, name)[host.mask]), name
    for name in ("final_obs", "final_rows"):
        assert torch.equal(getattr(on_device, name).cpu(), getattr(host, name)), name
    assert torch.equal(on_device.places().cpu(), host.places())
    assert on_device.stream == host.stream


SETTINGS = {
    "plain": {},
    "dropout": {"dropout": 0.3, "hidden_sizes": [8]},
    "normalized": {"normalize_obs": True},
    "spread": {"log_std": "network"},
    "own": {"network": f"{__name__}:Body"},
}


@pytest.mark.parametrize(
    ("way", "which", "num_steps", "settings"),
    [
        ("torch", "CartPole-v1", 7, "dropout"),
        ("torch", "several", 7, "normalized"),
        ("kernels", "Pendulum-v1", 1, "plain"),
        ("kernels", "fading", 7, "own"),
    ],
)
def test_what_graphs_replay_is_what_stepping_gives(way, which, num_steps, settings):
    check_replays(way, which, num_steps, settings)


@pytest.mark.slow
@pairwise(
    way=["torch", "kernels"],
    which=["CartPole-v1", "Pendulum-v1", "fading", "several", "dock"],
    num_steps=[1, 7, 128],
    settings=list(SETTINGS),
)
def test_what_graphs_replay_is_what_stepping_gives_everywhere(way, which, num_steps, settings):
    check_replays(way, which, num_steps, settings)


def check_replays(way, which, num_steps, settings):
    host = make(which, 9)
    policy = make_policy(host, **SETTINGS[settings])
    with a_device(way) as device:
        envs, moved = make(which, 9, "cuda"), copy.deepcopy(policy).to("cuda")
        collector = prepared(way, moved, envs, num_steps)
        assert "in CUDA graphs of 16 rows" in str(collector)
        places = None
        for iteration in range(3):
            poison(collector)
            device.clear()
            arguments = {"num_steps": num_steps, "seed": 3, "iteration": iteration}
            found = collector.collect(envs, moved, **arguments, wait=False)
            assert device.waits.of() == 0
            assert 1 <= device.looks.of() <= len(found.mask) // 16
            agree(found, stepped := by_stepping(host, policy, **arguments))
            assert found.num_episodes == stepped.dones.sum()
            assert bool(found.finite)
            # A block more was begun, but nobody plays in it.
            assert len(found.mask) == -(-len(stepped.mask) // 16) * 16
            # It lies where the one before lay.
            assert places in (None, found.obs.data_ptr())
            places = found.obs.data_ptr()
            with torch.no_grad():
                for one, other in zip(policy.parameters(), moved.parameters(), strict=True):
                    one.mul_(0.9)
                    other.mul_(0.9)
            policy.observe(stepped.obs, stepped.mask)
            moved.observe(stepped.obs.to("cuda"), stepped.mask.to("cuda"))


@pytest.mark.parametrize(("way", "num_steps", "most"), [("torch", 128, 60), ("kernels", 32, 12)])
def test_a_row_takes_few_operations(way, num_steps, most):
    """82 before, however many environments there are; half of them, or more, for random numbers."""
    with a_device(way, graphs=False) as device:
        envs = make("CartPole-v1", 64, "cuda", limit=500)
        spaces = envs.single_observation_space, envs.single_action_space
        policy = Policy(*spaces).to("cuda")
        collector = prepared(way, policy, envs, num_steps)
        device.clear()
        arguments = {"num_steps": num_steps, "seed": 1, "iteration": 0}
        rollout = collector.collect(envs, policy, **arguments, wait=False)
        # With what begins and ends it, and a block that was begun before the end was seen.
        played = len(rollout.mask) + 16
        assert num_steps < len(rollout.mask) < 400
        assert device.operations.of() <= most * played
        assert device.waits.of() == 0
        assert device.looks.of() == len(rollout.mask) // 16


@pytest.mark.parametrize("way", ["torch", "kernels"])
@pytest.mark.parametrize(
    ("where", "finite"), [("reward", False), ("obs", False), ("nowhere", True), ("masked", True)]
)
def test_without_a_wait_a_flag_says_what_is_not_finite(way, where, finite):
    nan = math.nan
    at_reward, at_obs = float(where == "reward"), float(where == "obs")
    at_end = float(where == "masked")

    class Broken(Once):
        @staticmethod
        def start(uniforms):
            return (0.0,)

        @staticmethod
        def transition(state, action):
            return (state[0] + 1.0,)

        @staticmethod
        def observation(state):
            (length,) = state
            wrong = (at_obs * length == 2.0) | (at_end * length == 3.0)
            return (ops.where(wrong, nan, length),)

        @staticmethod
        def terminated(state):
            return state[0] >= 3.0  # it is seen in a row that only resets, or not at all

        @staticmethod
        def reward(state, action, following):
            return ops.where(at_reward * state[0] == 2.0, nan, 1.0)

    with a_device(way):
        envs = TensorVectorEnv(Broken, 3, max_episode_steps=9, device="cuda")
        policy = make_policy(envs).to("cuda")
        arguments = {"num_steps": 5, "seed": 1, "iteration": 0}
        collector = prepared(way, policy, envs, 5)
        assert collector.collect(envs, policy, **arguments, wait=False).finite.item() == finite
        if not finite:
            with pytest.raises(EnvironmentFailure, match="environment 0 returned the"):
                collector.collect(envs, policy, **arguments)


def test_what_is_seen_at_a_truncation_has_to_be_finite():
    class Falling(Once):
        @staticmethod
        def transition(state, action):
            return (-1.0 - state[0],)

        @staticmethod
        def observation(state):
            return (ops.sqrt(state[0]),)

        @staticmethod
        def terminated(state):
            return False

    for way in ("torch", "kernels"):
        with a_device(way):
            envs = TensorVectorEnv(Falling, 2, max_episode_steps=1, device="cuda")
            policy = make_policy(envs).to("cuda")
            collector = prepared(way, policy, envs, 1)
            found = collector.collect(envs, policy, num_steps=1, seed=1, iteration=0, wait=False)
            assert found.final_obs.cpu().isnan().all()
            assert not found.finite.item()


@pytest.mark.parametrize("way", ["torch", "kernels"])
def test_with_a_wait_a_rollout_of_a_device_is_that_of_the_host(way):
    host = make("fading", 7, limit=5)
    policy = make_policy(host, dropout=0.3)
    with a_device(way):
        envs, moved = make("fading", 7, "cuda", limit=5), copy.deepcopy(policy).to("cuda")
        arguments = {"num_steps": 11, "seed": 3, "iteration": 2}
        stepped = by_stepping(host, policy, **arguments)
        collector = prepared(way, moved, envs, 11)
        for each in (collector, replace(collector, kept=None)):
            found = each.collect(envs, moved, **arguments)
            assert found.finite is None
            assert len(found.mask) == len(stepped.mask)
            agree(found, stepped)


@pytest.mark.parametrize("way", ["torch", "kernels"])
def test_a_group_of_environments_plays_what_it_plays_alone(way):
    with a_device(way):
        envs, third = make("Pendulum-v1", 9, "cuda"), make("Pendulum-v1", 3, "cuda")
        policy = make_policy(envs, hidden_sizes=[24], dropout=0.2).to("cuda")
        collector, alone = prepared(way, policy, envs, 4, shards=3), prepared(way, policy, third, 4)
        arguments = {"num_steps": 4, "seed": 2**40 + 1, "iteration": 1, "wait": False}
        found = collector.collect(envs, policy, **arguments, first_env=5, shards=3)
        for first in range(0, 9, 3):
            part = alone.collect(third, policy, **arguments, first_env=5 + first)
            for name in ("obs", "actions", "rewards", "mask"):
                whole = getattr(found, name)[:, first : first + 3]
                assert torch.equal(whole, getattr(part, name)), name


@pytest.mark.parametrize("way", ["torch", "kernels"])
def test_parameters_that_have_moved_are_found(way):
    with a_device(way):
        envs = make("CartPole-v1", 5, "cuda")
        policy = make_policy(envs).to("cuda")
        collector = prepared(way, policy, envs, 9)
        arguments = {"num_steps": 9, "seed": 1, "iteration": 0}
        before = collector.collect(envs, policy, **arguments, wait=False).actions.clone()
        for layer in (policy.network[0], policy.network[-1]):
            layer.weight = torch.nn.Parameter(-layer.weight.detach())
        found = collector.collect(envs, policy, **arguments, wait=False)
        afresh = replace(collector, kept=None).collect(envs, policy, **arguments, wait=False)
        assert torch.equal(found.actions, afresh.actions)
        assert not torch.equal(found.actions[:9], before[:9])


def test_another_policy_or_window_is_collected_without_what_was_prepared():
    with a_device():
        envs = make("CartPole-v1", 5, "cuda")
        policy = make_policy(envs).to("cuda")
        collector = prepared("torch", policy, envs, 9)
        kept = collector.collect(envs, policy, num_steps=9, seed=1, iteration=0, wait=False)
        before = kept.obs.clone()
        other = copy.deepcopy(policy)
        for given, num_steps in ((other, 9), (policy, 3)):
            found = collector.collect(
                envs, given, num_steps=num_steps, seed=1, iteration=1, wait=False
            )
            assert found.obs.data_ptr() != kept.obs.data_ptr()
        assert torch.equal(kept.obs, before)


@pytest.mark.parametrize("num_steps", [1, 6])
def test_there_are_as_many_rows_as_the_longest_rollout_has(num_steps):
    """Of episodes of one step, all but the last of which a row follows that resets."""
    envs = make("once", 3, limit=1)
    rollout = collect(envs, make_policy(envs), num_steps=num_steps, seed=1, iteration=0)
    assert len(rollout.mask) == 2 * num_steps - 1
    with a_device():
        envs = make("once", 3, "cuda", limit=1)
        policy = make_policy(envs).to("cuda")
        collector = prepared("torch", policy, envs, num_steps)
        # And to record a block, two are played.
        assert collector.kept._rows.capacity == 2 * (2 * num_steps - 1)
        found = collector.collect(envs, policy, num_steps=num_steps, seed=1, iteration=0)
        assert len(found.mask) == 2 * num_steps - 1


def test_where_there_is_no_room_memory_grows_and_the_log_says_so_once(monkeypatch, caplog):
    caplog.set_level("INFO", "vecpg")
    host = make("fading", 5, limit=5)
    policy = make_policy(host)
    with anew(), a_device():
        envs, moved = make("fading", 5, "cuda", limit=5), copy.deepcopy(policy).to("cuda")
        # What 2 * 40 + 5 - 2 = 83 rows, in blocks of 16, of 2 float32, an int64 and the rest take.
        need = 96 * 5 * (8 + 8 + 4 + 3)
        for free, static in ((2 * need, True), (2 * need - 1, False)):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
            collector = prepared("torch", moved, envs, 40)
            assert collector.kept.graphs == static
            for iteration in range(2):
                arguments = {"num_steps": 40, "seed": 3, "iteration": iteration}
                found = collector.collect(envs, moved, **arguments, wait=False)
                agree(found, by_stepping(host, policy, **arguments))
                assert (collector.kept._rows.capacity == 96) == static
    (said,) = [each for each in caplog.messages if "op by op" in each]
    assert said == (
        "collecting: op by op, as the longest rollout takes 11.0 KB, more than half of the 22.1 KB"
        " that are free; lower --num-envs (or --num-steps)"
    )


def test_which_way_it_goes_on_a_device_is_said(monkeypatch):
    class Other(TensorVectorEnv):
        pass

    with a_device("kernels"):
        envs, swinging = make("CartPole-v1", 2, "cuda"), make("Pendulum-v1", 2, "cuda")
        policy, gaussian = (make_policy(each).to("cuda") for each in (envs, swinging))
        spread = make_policy(swinging, log_std="network").to("cuda")
        double = make("once", 2, "cuda", dtype="float64")
        of_double = make_policy(double).to("cuda")
        for made, given, way in (
            (envs, policy, "in Triton kernels"),
            (swinging, gaussian, "in Triton kernels"),
            (
                swinging,
                spread,
                "in Triton kernels, actions drawn in torch: its standard deviation comes from the"
                " network",
            ),
            (
                double,
                of_double,
                "by stepping, actions drawn in torch: the environments are not in float32",
            ),
        ):
            assert str(choose_collector(made, given)) == way
        with pytest.raises(ValueError, match='backend="cuda": the environments are not in float32'):
            choose_collector(double, of_double, "cuda")
        with pytest.raises(
            ValueError, match='backend="cpu": the environments are on cuda:0; it se'
        ):
            choose_collector(envs, policy, "cpu")
        other = Other(Fading, 2, max_episode_steps=5, device="cuda")
        with pytest.raises(ValueError, match="on cuda:0, .*: Other may do something else than"):
            choose_collector(other, make_policy(other).to("cuda"))
        with pytest.raises(ValueError, match="on cuda:0, .*: these are no environments on tens"):
            choose_collector(VectorWrapper(envs), policy)
        with pytest.raises(ValueError, match="on cuda:0, .*: its actions are not those of the"):
            choose_collector(envs, gaussian_of(envs).to("cuda"))
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name: None)
            told = str(choose_collector(envs, policy))
        assert told == "by stepping, actions drawn in torch: Triton is not installed"
    with pytest.raises(ValueError, match='backend="cuda": the environments are on cpu; it serves'):
        choose_collector(make("fading", 2), make_policy(make("fading", 2)), "cuda")


def gaussian_of(envs):
    torch.manual_seed(0)
    return Plain(envs.single_observation_space, spaces.Box(-1, 1, (2,)))


def test_what_makes_no_kernels_is_played_in_torch():
    with pretended():
        envs = TensorVectorEnv(Wandering, 2, max_episode_steps=5, device="cuda")
        policy = make_policy(envs).to("cuda")
        collector = choose_collector(envs, policy)
        assert collector.backend == "reference"
        assert "Wandering.transition" in collector.reason


def test_on_the_host_what_may_do_something_else_is_stepped():
    class Doubled(TensorVectorEnv):
        def step(self, actions):
            obs, rewards, *rest = super().step(actions)
            return obs, 2.0 * rewards, *rest

    plain, other = (each(Fading, 4, max_episode_steps=5) for each in (TensorVectorEnv, Doubled))
    policy = make_policy(plain)
    arguments = {"num_steps": 4, "seed": 1, "iteration": 0}
    once_, twice = (collect(each, policy, **arguments) for each in (plain, other))
    assert torch.equal(2.0 * once_.rewards, twice.rewards)
    assert once_.rewards.any()


def test_states_of_float64_are_those_of_stepping():
    host = make("dock", 5, dtype="float64")
    policy = make_policy(host)
    with a_device():
        envs, moved = make("dock", 5, "cuda", dtype="float64"), copy.deepcopy(policy).to("cuda")
        arguments = {"num_steps": 20, "seed": 3, "iteration": 1}
        found = prepared("torch", moved, envs, 20).collect(envs, moved, **arguments, wait=False)
        agree(found, by_stepping(host, policy, **arguments))


@pytest.mark.parametrize("between", [1, 16])
def test_a_policy_sees_observations_one_by_one_in_memory(monkeypatch, between):
    """The bits of a matrix product may depend on how its factors lie there."""

    class Watching(Plain):
        def sample(self, obs, uniforms, *others):
            contiguous.append(obs.is_contiguous() and uniforms.is_contiguous())
            return super().sample(obs, uniforms, *others)

    monkeypatch.setattr(module, "_ROWS_BETWEEN_LOOKS", {"cpu": between})
    for which in ("CartPole-v1", "fading", "Pendulum-v1"):
        contiguous = []
        envs = make(which, 9)
        policy = Watching(envs.single_observation_space, envs.single_action_space)
        collect(envs, policy, num_steps=5, seed=1, iteration=0)
        assert len(contiguous) >= 5
        assert all(contiguous)


def test_environments_are_left_as_they_were():
    envs = make("fading", 4)
    envs.reset(seed=5)
    before = envs.state.clone()
    collect(envs, make_policy(envs), num_steps=9, seed=1, iteration=0)
    assert torch.equal(envs.state, before)
