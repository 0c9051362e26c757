import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from pairs import pairwise

from vecpg.envs import (
    SubEnvironmentError,
    check_autoreset,
    find_spec,
    has_one_generator,
    make_envs,
    own_vectorization,
    resolve_vectorization,
)


@pytest.mark.parametrize("vectorization", ["sync", "vector_entry_point"])
def test_every_way_of_stepping_is_in_next_step_mode(vectorization):
    envs = make_envs("CartPole-v1", 3, vectorization=vectorization)
    assert envs.num_envs == 3
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert has_one_generator(envs) == (vectorization == "vector_entry_point")


def test_auto_takes_tensors_then_the_vector_entry_point_then_sync():
    cartpole = find_spec("CartPole-v1")
    assert resolve_vectorization(cartpole, "auto") == "tensor"
    assert resolve_vectorization(find_spec("Pendulum-v1"), "auto") == "tensor"
    # Its keyword arguments are those of Gymnasium's own environment.
    kwargs = {"sutton_barto_reward": True}
    assert resolve_vectorization(cartpole, "auto", kwargs) == "vector_entry_point"
    assert resolve_vectorization(find_spec("vecpg/CartPole-v1"), "auto") == "tensor"
    assert resolve_vectorization(find_spec("Acrobot-v1"), "auto") == "sync"
    assert own_vectorization(cartpole) == "vector_entry_point"
    assert own_vectorization(find_spec("Acrobot-v1")) == "sync"


@pytest.mark.parametrize("env_id", ["CartPole-v1", "vecpg/CartPole-v1", "vecpg/Pendulum-v1"])
def test_tensors_are_on_the_device_asked_for(env_id):
    assert make_envs(env_id, 2, device="meta").device.type == "meta"


@pytest.mark.parametrize("vectorization", ["sync", "vector_entry_point"])
def test_a_time_limit_ends_the_episode_as_a_truncation(vectorization):
    envs = make_envs("CartPole-v1", 2, vectorization=vectorization, max_episode_steps=3)
    envs.reset(seed=[1, 2] if vectorization == "sync" else 1)
    flags = [envs.step(np.array([0, 1]))[2:4] for _ in range(3)]
    assert [truncations.tolist() for _, truncations in flags] == [[False] * 2] * 2 + [[True] * 2]
    assert not any(terminations.any() for terminations, _ in flags)


def test_keyword_arguments_reach_the_environment():
    envs = make_envs("environments:Bandit-v0", 2, env_kwargs={"start": 8})
    assert envs.single_action_space.start == 8


def test_every_environment_has_its_own_reset_seed():
    envs = make_envs("CartPole-v1", 3, vectorization="sync")
    obs, _ = envs.reset(seed=[5, 6, 5])
    assert np.array_equal(obs[0], obs[2])
    assert not np.array_equal(obs[0], obs[1])


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("CartPol-v1", "Did you mean: `CartPole`"),
        ("CartPole-v9", r"versioned environments: \[ `v0`, `v1` \]"),
        ("no_such_module:Foo-v0", "No module named 'no_such_module'"),
        ("environments:Nothing-v0", "Nothing"),
        ("LineWorld-v0", "did you mean vecpg/LineWorld-v0"),
        ("environments:Endless-v0", "Endless-v0 has no time limit.*--max-episode-steps"),
    ],
)
def test_an_id_that_cannot_be_used_is_refused_with_a_hint(env_id, message):
    with pytest.raises(ValueError, match=message):
        make_envs(env_id, 1)


def test_a_time_limit_can_be_given_where_there_is_none():
    envs = make_envs("environments:Endless-v0", 1, max_episode_steps=7)
    assert envs.envs[0].spec.max_episode_steps == 7


def test_a_constructor_that_raises_is_named_with_its_reason():
    with pytest.raises(ValueError, match=r"Bandit-v0 could not be made: TypeError.*no_such"):
        make_envs("environments:Bandit-v0", 2, env_kwargs={"no_such": 1})


def test_a_form_that_the_environment_does_not_have_is_refused():
    with pytest.raises(ValueError, match="Acrobot-v1 has no vector_entry_point form; use sync"):
        make_envs("Acrobot-v1", 1, vectorization="vector_entry_point")
    with pytest.raises(
        ValueError, match="expected auto, sync, async, vector_entry_point, tensor, got 'fast'"
    ):
        make_envs("Acrobot-v1", 1, vectorization="fast")


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_another_autoreset_mode_is_refused_by_name(mode):
    envs = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")], autoreset_mode=mode)
    with pytest.raises(ValueError, match=f"NEXT_STEP, got {mode}"):
        check_autoreset(envs)


def test_a_copy_that_raises_says_which_it_is():
    envs = make_envs("environments:Faulty-v0", 4, env_kwargs={"at": 0})
    envs.reset(seed=[1, 2, 3, 4])
    guilty = [env.unwrapped.guilty for env in envs.envs].index(True)
    with pytest.raises(SubEnvironmentError, match="ZeroDivisionError: the pole") as caught:
        envs.step(np.zeros(4, int))
    assert caught.value.index == guilty
    assert "environments.py" in caught.value.trace


@pairwise(what=["four", "shape", "reward"], index=[0, 1, 2], vectorization=["sync", "async"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium warns of the same
def test_a_copy_that_returns_what_cannot_be_used_says_which_it_is(vectorization, what, index):
    envs = make_envs(
        "environments:Odd-v0", 3, vectorization=vectorization, env_kwargs={"what": what}
    )
    envs.reset(seed=[1, 2, 3])
    actions = np.zeros(3, int)
    actions[index] = 1
    try:
        with pytest.raises(SubEnvironmentError) as caught:
            envs.step(actions)
        assert caught.value.index == index
    finally:
        envs.close()
