"""What comes out of workers is what sync gives, whichever copies share one."""

import functools

import gymnasium
import numpy as np
import pytest

from vecpg.envs import SubEnvironmentError, find_spec, has_one_generator, make_envs
from vecpg.envs.workers import WorkerEnvs
from vecpg.policy import Policy
from vecpg.rollout import collect

WORLDS = {
    "CartPole-v1": {},
    "FrozenLake-v1": {},
    "environments:Counting-v0": {},
    "environments:Dials-v0": {},
    "environments:Dials-v0 ": {"observed": True},
    "environments:Switches-v0": {},
    "environments:Paid-v0": {"paid": "(1,)", "flagged": "np.bool_"},
    "environments:Plain-v0": {"of": "array"},
    "pool_environments:Walk-v0": {},
    "pool_environments:Walk-v0 ": {"discrete": True},
}


def both(env_id, num_envs, each, **kwargs):
    made = [
        make_envs(env_id.strip(), num_envs, vectorization=how, envs_per_worker=each, **kwargs)
        for how in ("sync", "async")
    ]
    for name in ("observation_space", "action_space"):
        for which in (name, f"single_{name}"):
            assert getattr(made[0], which) == getattr(made[1], which)
    assert made[0].metadata == made[1].metadata
    return made


def assert_equal(ours, theirs):
    """Arrays to the last bit and of the same dtype, but for infos."""
    for one, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()
    assert ours[-1] == {}


@pytest.mark.parametrize("each", [1, 2, 5])
@pytest.mark.parametrize("env_id", WORLDS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium's, of what is taken all the same
def test_every_step_and_reset_is_that_of_sync_bit_for_bit(env_id, each):
    kwargs = {"env_kwargs": WORLDS[env_id]}
    if "Dials" in env_id or each == 5:
        # Of few processes, as many copies as there are.
        kwargs["max_episode_steps"] = 4
    sync, pool = both(env_id, 5, each, **kwargs)
    assert len(pool.processes) == -(-5 // each)
    rng = np.random.default_rng(1)
    sync.action_space.seed(1)
    chosen = np.array([True, False, False, True, False])
    for seed, options in (
        (7, None),
        ([3, 1, 4, 1, 5], {"more": 0.5}),
        ([6, 7, 8, 9, 10], {"reset_mask": chosen, "more": 1.0}),
        (None, {"reset_mask": ~chosen}),
    ):
        results = [
            envs.reset(seed=seed, options=options and dict(options)) for envs in (pool, sync)
        ]
        assert_equal(*results)
        for _ in range(int(rng.integers(5, 25))):
            actions = sync.action_space.sample()
            assert_equal(pool.step(actions), sync.step(actions))
    pool.close()
    sync.close()


def test_sync_and_async_collect_the_same_bit_for_bit():
    rollouts = []
    for settings in ({"vectorization": "sync"}, {"vectorization": "async", "envs_per_worker": 2}):
        envs = make_envs("environments:Counting-v0", 5, **settings)
        policy = Policy(envs.single_observation_space, envs.single_action_space)
        for parameter in policy.parameters():
            parameter.data.fill_(0.1)
        rollouts.append([collect(envs, policy, num_steps=9, seed=4, iteration=i) for i in range(3)])
        envs.close()
        assert not has_one_generator(envs)
    for one, other in zip(*rollouts, strict=True):
        for name in set(one.__slots__) - {"action_masks", "activations"}:
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


# -- Masks of actions ------------------------------------------------------------------------------


def masked(each=2, **kwargs):
    spec = find_spec("pool_environments:Blocked-v0")
    make = functools.partial(gymnasium.make, spec, disable_env_checker=True, **kwargs)
    return WorkerEnvs([make] * 3, 5.0, envs_per_worker=each, action_masks=True)


def all_but(step):
    mask = np.ones((3, 5), bool)
    mask[:, step] = False
    return mask


@pytest.mark.parametrize("each", [1, 2, 3])
@pytest.mark.parametrize("multi", [False, True])
def test_masks_come_with_the_observations_they_are_of(each, multi):
    envs = masked(each, multi=multi)
    actions = np.zeros((3, 2) if multi else 3, np.int64)
    _, infos = envs.reset(seed=1)
    for step in (1, 2, 3, 0, 1):
        before = infos["action_mask"]
        kept = before.copy()
        infos = envs.step(actions)[-1]
        assert infos["action_mask"].dtype == np.bool_
        # After an end no action is taken.
        assert np.array_equal(infos["action_mask"], all_but(step) | (step == 3))
        assert np.array_equal(before, kept)
    envs.close()


@pytest.mark.parametrize("how", ["right", "none at the end"])
def test_masks_are_those_of_sync(how):
    settings = {"env_kwargs": {"how": how}, "action_masks": True}
    sync, pool = both("pool_environments:Blocked-v0", 5, 2, **settings)
    pairs = [[envs.reset(seed=1) for envs in (sync, pool)]]
    pairs += [[envs.step(np.zeros(5, np.int64)) for envs in (sync, pool)] for _ in range(9)]
    some = np.array([True, False, True, False, False])
    pairs += [[envs.reset(seed=2, options={"reset_mask": some.copy()}) for envs in (sync, pool)]]
    for ours, theirs in pairs:
        assert ours[-1].keys() == theirs[-1].keys() == {"action_mask"}
        assert np.array_equal(ours[-1]["action_mask"], theirs[-1]["action_mask"])
    pool.close()


def test_actions_that_are_not_masked_are_refused_as_in_sync():
    said = []
    for how in ("sync", "async"):
        with pytest.raises(ValueError, match="--action-masks: expected actions that are") as caught:
            make_envs("environments:Pay-v0", 2, vectorization=how, action_masks=True)
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("how", "got"),
    [("none at reset", "none"), ("none", "none"), ("short", r"array\(\[1, 0, 1, 1\]")],
)
def test_a_mask_that_is_missing_or_another_is_named(how, got):
    envs = masked(how=how)
    message = rf'environment 0 failed: .*expected info\["action_mask"\] of 5 booleans, got {got}'
    with pytest.raises(SubEnvironmentError, match=message):
        envs.reset(seed=1)
        envs.step(np.zeros(3, np.int64))
        envs.step(np.zeros(3, np.int64))
    assert envs.closed


def test_without_masks_no_info_leaves_a_worker():
    envs = make_envs("pool_environments:Blocked-v0", 3, vectorization="async")
    assert envs.reset(seed=1)[1] == {}
    assert envs.step(np.zeros(3, np.int64))[-1] == {}
    envs.close()
