"""Gymnasium's vector wrappers around what `make_envs` makes: they work, or say why not."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import vector

from vecpg.envs import make_envs
from vecpg.policy import Policy
from vecpg.rollout import choose_collector, collect

ON_NUMPY = {
    "FilterObservation": None,  # of dictionaries, of which there are none here
    "GrayscaleObservation": None,  # of images
    "ResizeObservation": None,
    "VectorizeTransformObservation": lambda envs: vector.VectorizeTransformObservation(
        envs, gymnasium.wrappers.FlattenObservation
    ),
    "VectorizeTransformAction": lambda envs: vector.VectorizeTransformAction(
        envs, gymnasium.wrappers.TransformAction, func=lambda action: action, action_space=None
    ),
    "VectorizeTransformReward": lambda envs: vector.VectorizeTransformReward(
        envs, gymnasium.wrappers.ClipReward, min_reward=-1
    ),
    "FlattenObservation": vector.FlattenObservation,
    "ReshapeObservation": lambda envs: vector.ReshapeObservation(envs, (2, 2)),
    "RescaleObservation": None,  # wants bounds; Pendulum has them
    "DtypeObservation": lambda envs: vector.DtypeObservation(envs, np.float64),
    "NormalizeObservation": vector.NormalizeObservation,
    "ClipAction": None,  # of Box actions
    "RescaleAction": None,
    "ClipReward": lambda envs: vector.ClipReward(envs, -1, 1),
    "NormalizeReward": vector.NormalizeReward,
    "RecordEpisodeStatistics": vector.RecordEpisodeStatistics,
}
ON_ANYTHING = {
    "DictInfoToList": vector.DictInfoToList,
    "TransformObservation": lambda envs: vector.TransformObservation(envs, lambda obs: obs),
    "TransformAction": lambda envs: vector.TransformAction(envs, lambda actions: actions),
    "TransformReward": lambda envs: vector.TransformReward(envs, lambda rewards: 3 * rewards),
}
OTHERS = {
    "RecordVideo": "needs a render mode, and says so",
    "HumanRendering": "likewise",
    **dict.fromkeys(("ArrayConversion", "JaxToNumpy", "JaxToTorch", "NumpyToTorch"), "conversions"),
}
BOUNDED = {
    "RescaleObservation": lambda envs: vector.RescaleObservation(
        envs, np.float32(-1), np.float32(1)
    ),
    "ClipAction": vector.ClipAction,
    "RescaleAction": lambda envs: vector.RescaleAction(envs, np.float32(-1), np.float32(1)),
}
SINGLE = ("sync", "async", "vector_entry_point")


def policy_for(envs):
    torch.manual_seed(0)
    return Policy(envs.single_observation_space, envs.single_action_space, hidden_sizes=(8,))


def rollouts(envs, policy, number=2):
    return [collect(envs, policy, num_steps=8, seed=5, iteration=i) for i in range(number)]


def test_no_wrapper_is_forgotten():
    assert {*ON_NUMPY, *ON_ANYTHING, *OTHERS} == set(vector.__all__)


@pytest.mark.parametrize("vectorization", SINGLE)
@pytest.mark.parametrize("name", [name for name, wrap in ON_NUMPY.items() if wrap] + [*ON_ANYTHING])
def test_they_see_whole_episodes(vectorization, name):
    wrap = ON_NUMPY.get(name) or ON_ANYTHING[name]
    envs = wrap(make_envs("CartPole-v1", 3, vectorization=vectorization))
    policy = policy_for(envs)
    for rollout in rollouts(envs, policy):
        assert rollout.obs.shape[2:] == policy.obs_shape
        assert rollout.rewards[rollout.mask].ne(0).all()
        dones = rollout.dones.sum(dim=0)
        assert (dones >= 1).all()
    envs.close()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("name", BOUNDED)
def test_those_of_bounded_numbers_too(vectorization, name):
    envs = make_envs("Pendulum-v1", 2, vectorization=vectorization, max_episode_steps=9)
    envs = BOUNDED[name](envs)
    (rollout,) = rollouts(envs, policy_for(envs), 1)
    envs.close()
    assert rollout.mask.sum() == 18
    if name == "RescaleObservation":
        assert rollout.obs.abs().max() <= 1


@pytest.mark.parametrize("vectorization", SINGLE)
def test_episode_statistics_are_ours(vectorization):
    envs = vector.RecordEpisodeStatistics(
        make_envs("CartPole-v1", 3, vectorization=vectorization), buffer_length=1000
    )
    policy = policy_for(envs)
    found = rollouts(envs, policy, 1)[0]
    envs.close()
    # In order of ending, and at one step in order of the environments; others play on, unmasked.
    ours, length = [], np.zeros(3, np.int64)
    for mask, dones in zip(found.mask.numpy(), found.dones.numpy(), strict=True):
        length += mask
        ours += [*zip(np.flatnonzero(dones).tolist(), length[dones].tolist(), strict=True)]
        length[dones] = 0
    theirs = list(envs.length_queue)
    assert len(ours) >= 3
    remaining = iter(theirs)
    assert all(length in remaining for _, length in ours)  # a subsequence of all that ended
    assert list(envs.return_queue) == theirs


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_normalized_observations_and_rewards_are_gymnasiums(vectorization):
    """Stepped by hand, with the actions that were drawn."""

    def made():
        envs = make_envs("CartPole-v1", 3, vectorization=vectorization)
        return vector.NormalizeReward(vector.NormalizeObservation(envs))

    envs = made()
    rollout = rollouts(envs, policy_for(envs), 1)[0]
    envs.close()
    envs = made()
    obs, _ = envs.reset(seed=rollout.stream.reset_seeds(purpose()))
    for t in range(len(rollout.mask)):
        assert torch.equal(rollout.obs[t], torch.from_numpy(obs).float())
        obs, rewards, *_ = envs.step(rollout.actions[t].numpy())
        counted = rollout.mask[t]
        assert torch.equal(rollout.rewards[t][counted], torch.from_numpy(rewards).float()[counted])
    envs.close()


def purpose():
    from vecpg.noise import Purpose

    return Purpose.TRAINING_RESET


@pytest.mark.parametrize("name", [name for name, wrap in ON_NUMPY.items() if wrap])
def test_around_tensors_those_of_numpy_are_refused(name):
    envs = make_envs("CartPole-v1", 3, vectorization="tensor")
    wrapped = ON_NUMPY[name](vector.TransformReward(envs, lambda rewards: rewards))
    named = type(wrapped).__name__
    with pytest.raises(ValueError, match=f"{named} computes with NumPy, and these environments"):
        collect(wrapped, policy_for(envs), num_steps=1, seed=1, iteration=0)


@pytest.mark.parametrize("name", ON_ANYTHING)
def test_around_tensors_the_others_work(name):
    envs = make_envs("CartPole-v1", 3, vectorization="tensor")
    policy = policy_for(envs)
    plain = collect(envs, policy, num_steps=8, seed=5, iteration=0, backend="reference")
    found = rollouts(ON_ANYTHING[name](envs), policy, 1)[0]
    assert torch.equal(found.mask, plain.mask)
    assert torch.equal(found.obs[found.mask], plain.obs[plain.mask])
    factor = 3 if name == "TransformReward" else 1
    assert torch.equal(found.rewards, factor * plain.rewards)


def test_a_conversion_between_makes_them_work():
    """As ArrayConversion does, which wants a package that is not here."""

    class Converted(vector.TransformObservation):
        pass

    Converted.__module__ = "gymnasium.wrappers.vector.array_conversion"
    envs = Converted(make_envs("CartPole-v1", 3, vectorization="tensor"), np.asarray)
    wrapped = vector.NormalizeObservation(envs)
    assert choose_collector(wrapped, policy_for(envs)).backend == "reference"
    with pytest.raises(ValueError, match="NormalizeObservation computes with NumPy"):
        choose_collector(
            Converted(vector.NormalizeObservation(envs.env), np.asarray), policy_for(envs)
        )


@pytest.mark.parametrize("vectorization", SINGLE)
def test_films_need_a_render_mode(vectorization, tmp_path):
    envs = make_envs("CartPole-v1", 2, vectorization=vectorization)
    with pytest.raises(ValueError, match="Render mode is None, which is incompatible"):
        vector.RecordVideo(envs, str(tmp_path))
    envs.close()


@pytest.mark.parametrize("vectorization", SINGLE)
def test_with_a_render_mode_films_are_made(vectorization, tmp_path):
    envs = make_envs(
        "CartPole-v1",
        2,
        vectorization=vectorization,
        env_kwargs={"render_mode": "rgb_array"},
        max_episode_steps=5,
    )
    filmed = vector.RecordVideo(
        envs,
        str(tmp_path / "films"),
        step_trigger=lambda step: step == 0,
        video_length=3,
        disable_logger=True,
    )
    rollouts(filmed, policy_for(envs), 1)
    filmed.close()
    assert [*(tmp_path / "films").glob("*.mp4")]
