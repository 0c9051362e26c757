import logging
import re
import subprocess
import sys

import environments
import gymnasium
import numpy as np
import on_tensors  # noqa: F401 - registers its environments before a test's registry is put up
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleEnv, CartPoleVectorEnv
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from pairs import pairwise

from vecpg.envs import (
    SubEnvironmentError,
    check_autoreset,
    check_time_limit,
    find_spec,
    has_one_generator,
    judge_of,
    make_envs,
    own_vectorization,
    register,
    resolve_vectorization,
)
from vecpg.envs import registered as registered_module
from vecpg.envs.in_process import InProcessEnvs
from vecpg.evaluate import evaluate
from vecpg.kernels.announce import anew
from vecpg.policy import Policy
from vecpg.rollout import collect


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
    assert resolve_vectorization(find_spec("Acrobot-v1"), "auto") == "tensor"
    assert resolve_vectorization(find_spec("MountainCarContinuous-v0"), "auto") == "tensor"
    assert resolve_vectorization(find_spec("MountainCar-v0"), "auto") == "sync"
    assert own_vectorization(cartpole) == "vector_entry_point"
    assert own_vectorization(find_spec("Acrobot-v1")) == "sync"


# -- Environments on tensors, and what they stand for ---------------------------------------------


class Harsh(CartPoleEnv):
    """Another environment than Gymnasium's."""

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, -100.0, terminated, truncated, info


class Halved(gymnasium.Wrapper):
    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward / 2, terminated, truncated, info


@pytest.fixture
def registered(monkeypatch):
    """Register something under an id, for one test; Gymnasium would warn of what it replaces."""
    monkeypatch.setattr(gymnasium.envs.registration, "registry", {**gymnasium.registry})
    monkeypatch.setattr(gymnasium, "registry", gymnasium.envs.registration.registry)
    monkeypatch.setattr(registered_module, "_stand_ins", {**registered_module._stand_ins})

    def put(env_id, *arguments, how=gymnasium.register, **settings):
        gymnasium.registry.pop(env_id, None)
        how(env_id, *arguments, **settings)

    return put


OWN = "gymnasium.envs.classic_control.cartpole:CartPoleEnv"
HALVED = (WrapperSpec("Halved", "test_envs:Halved", None),)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"entry_point": Harsh}, "entry_point is <class 'test_envs.Harsh'>"),
        ({"entry_point": "test_envs:Harsh"}, "entry_point is 'test_envs:Harsh'"),
        ({"entry_point": OWN, "vector_entry_point": "a:B"}, "vector_entry_point is 'a:B'"),
        ({"entry_point": OWN, "additional_wrappers": HALVED}, "additional_wrappers are Halved"),
        ({"entry_point": OWN, "kwargs": {"sutton_barto_reward": True}}, "kwargs are {'sutton"),
    ],
)
def test_what_was_registered_anew_is_stepped_and_the_log_says_so(
    registered, settings, what, caplog
):
    registered("CartPole-v1", max_episode_steps=500, **settings)
    spec = find_spec("CartPole-v1")
    with anew(), caplog.at_level(logging.INFO, "vecpg"):
        assert resolve_vectorization(spec, "auto") == own_vectorization(spec)
    said = f"CartPole-v1 is stepped as it is registered, not on tensors: its {what}"
    assert caplog.records[0].message.startswith(said)
    with pytest.raises(ValueError, match=r"^--vectorization tensor: vecpg/CartPole-v1 stands for"):
        make_envs("CartPole-v1", 1, vectorization="tensor")
    # It is no judge of what was trained on tensors either.
    assert judge_of("vecpg/CartPole-v1")[0] == "vecpg/CartPole-v1"
    assert judge_of("CartPole-v1")[1]["vectorization"] == own_vectorization(spec)


def test_another_environment_of_gymnasiums_is_not_the_one_of_that_id(registered):
    acrobot = "gymnasium.envs.classic_control.acrobot:AcrobotEnv"
    registered("CartPole-v1", acrobot, max_episode_steps=9)
    assert resolve_vectorization(find_spec("CartPole-v1"), "auto") == "sync"
    assert judge_of("vecpg/CartPole-v1")[0] == "vecpg/CartPole-v1"
    with pytest.raises(ValueError, match="the entry_point is 'gymnasium.envs.classic_control.acro"):
        make_envs("CartPole-v1", 1, vectorization="tensor")
    # Where Gymnasium shows it, too.
    registered("CartPole-v1", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=9)
    assert resolve_vectorization(find_spec("CartPole-v1"), "auto") == "tensor"


def test_what_is_registered_anew_on_tensors_stands_for_what_it_says(registered):
    settings = {"how": register, "max_episode_steps": 9}
    registered("mine/Track-v3", "on_tensors:Track", stands_for="CartPole-v1", **settings)
    assert judge_of("mine/Track-v3")[0] == "CartPole-v1"
    registered("mine/Track-v3", "on_tensors:Track", **settings)
    assert judge_of("mine/Track-v3")[0] == "mine/Track-v3"
    assert make_envs("CartPole-v1", 1).single_action_space.start == 0


def test_training_is_in_the_environment_that_was_named(registered):
    registered("CartPole-v1", Harsh, max_episode_steps=7)
    envs = make_envs("CartPole-v1", 2)
    policy = Policy(envs.single_observation_space, envs.single_action_space)
    rollout = collect(envs, policy, num_steps=1, seed=1, iteration=0)
    assert torch.equal(rollout.rewards, -100.0 * rollout.mask)
    result = evaluate(policy, "CartPole-v1", 3)
    assert result.returns == tuple(-100.0 * length for length in result.lengths)


def test_a_limit_that_was_registered_anew_is_kept_on_tensors(registered):
    registered("CartPole-v1", OWN, max_episode_steps=7)
    envs = make_envs("CartPole-v1", 2)
    assert type(envs).__name__ == "TensorVectorEnv"
    assert envs.max_episode_steps == 7
    assert make_envs("CartPole-v1", 2, max_episode_steps=9).max_episode_steps == 9
    registered("CartPole-v1", OWN)
    with pytest.raises(ValueError, match="CartPole-v1 has no time limit"):
        make_envs("CartPole-v1", 2)


def test_what_took_the_place_of_a_stand_in_stands_for_nothing(registered):
    registered("vecpg/CartPole-v1", Harsh, max_episode_steps=7)
    assert resolve_vectorization(find_spec("CartPole-v1"), "auto") == "vector_entry_point"
    assert judge_of("vecpg/CartPole-v1")[0] == "vecpg/CartPole-v1"
    assert judge_of("vecpg/CartPole-v1")[1]["vectorization"] == "sync"


def test_an_environment_on_tensors_is_judged_by_what_it_stands_for_else_by_itself():
    policy = Policy(gymnasium.spaces.Box(-9, 9, (4,)), gymnasium.spaces.Discrete(2))
    ours, theirs = (evaluate(policy, env_id, 4) for env_id in ("vecpg/CartPole-v1", "CartPole-v1"))
    assert ours == theirs
    assert evaluate(policy, "vecpg/CartPole-v1", 4, max_episode_steps=3).lengths == (3,) * 4
    assert judge_of("CartPole-v1", env_kwargs={"sutton_barto_reward": True})[1]["env_kwargs"]
    env_id, settings = judge_of("on_tensors:Track-v0")
    envs = make_envs(env_id, 2, **settings)
    assert env_id == "Track-v0"
    assert envs.dtype == torch.float64
    assert envs.max_episode_steps == 20


def test_keyword_arguments_may_make_it_another_which_is_judged_by_itself():
    given = {"definition": "on_tensors:Track"}
    env_id, settings = judge_of("vecpg/CartPole-v1", env_kwargs=given)
    assert env_id == "vecpg/CartPole-v1"
    envs = make_envs(env_id, 2, **settings)
    assert envs.single_action_space.start == -1
    assert envs.dtype == torch.float64


@pytest.mark.parametrize("vectorization", ["sync", "async", "vector_entry_point"])
def test_what_is_not_on_tensors_is_judged_as_it_is_trained(vectorization):
    env_id, settings = judge_of(
        "CartPole-v1",
        vectorization=vectorization,
        env_kwargs={"sutton_barto_reward": True},
        max_episode_steps=7,
    )
    assert (env_id, settings["vectorization"]) == ("CartPole-v1", vectorization)
    assert settings["env_kwargs"] == {"sutton_barto_reward": True}
    assert settings["max_episode_steps"] == 7
    with pytest.raises(ValueError, match="Acrobot-v1 has no vector_entry_point form"):
        judge_of("Acrobot-v1", vectorization="vector_entry_point")


def test_one_registration_makes_it_gymnasiums_and_ours(registered):
    registered(
        "mine/Track-v3",
        "on_tensors:Track",
        how=register,
        max_episode_steps=9,
        reward_threshold=2.5,
        stands_for="CartPole-v1",
    )
    assert find_spec("mine/Track-v3").reward_threshold == 2.5
    envs = gymnasium.make_vec("mine/Track-v3", num_envs=5, device="cpu", dtype="float64")
    assert (envs.num_envs, envs.max_episode_steps, envs.dtype) == (5, 9, torch.float64)
    assert gymnasium.make_vec(envs.spec).dtype == torch.float64
    assert envs.spec.to_json()
    assert make_envs("mine/Track-v3", 2).single_action_space.start == -1
    # The last registration stands for it.
    assert make_envs("CartPole-v1", 2).single_action_space.start == -1
    assert make_envs("CartPole-v1", 2).max_episode_steps == 500


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"definition": "on_tensors"}, "definition: expected \"module:Class\", got 'on_tensors'"),
        ({"definition": ":Track"}, "definition: expected \"module:Class\", got ':Track'"),
        ({"max_episode_steps": 0}, "max_episode_steps: expected .* at least 1, got 0"),
        ({"max_episode_steps": None}, "max_episode_steps: expected .* at least 1, got None"),
    ],
)
def test_a_registration_that_says_too_little_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        register(
            "mine/X-v0", **{"definition": "on_tensors:Track", "max_episode_steps": 5} | settings
        )
    assert "mine/X-v0" not in gymnasium.registry


def test_a_definition_that_is_not_there_is_named_with_its_environment(registered):
    for definition, words in (
        ("on_tensors:Nothing", "expected Nothing in module on_tensors, found none"),
        ("no_such_module:Track", "No module named 'no_such_module'"),
        ("on_tensors:STEP", 'expected a class or "module:Class", got float'),
    ):
        registered("mine/X-v0", definition, how=register, max_episode_steps=5)
        with pytest.raises(ValueError, match=f"mine/X-v0 could not be made: .*{words}"):
            make_envs("mine/X-v0", 1)


# -- Vectorized forms that do not serve -----------------------------------------------------------


class Vectorized(CartPoleVectorEnv):
    """Like the single one, but for what `how` says."""

    def __init__(self, num_envs, max_episode_steps=500, how=None, sutton_barto_reward=False):
        super().__init__(num_envs, max_episode_steps)
        if how == "observations":
            self.single_observation_space = gymnasium.spaces.Box(0, 255, (4,), np.uint8)
        if how == "actions":
            self.single_action_space = gymnasium.spaces.Discrete(3)
        if how == "no space":
            del self.single_observation_space
        if how == "mode":
            self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        if how == "no mode":
            self.metadata = {}
        if how == "raises":
            raise RuntimeError("100% wrong")
        if how == "exits":
            raise SystemExit("no licence")
        self.how = how

    def close(self, **kwargs):
        how, self.how = self.how, None
        if how == "unclosable":
            raise RuntimeError("close broke")


class Single(CartPoleEnv):
    def __init__(self, how=None, sutton_barto_reward=False):
        super().__init__(sutton_barto_reward)
        if how == "not alone":
            raise ValueError("only together")


ALSO = WrapperSpec("Halved", "test_envs:Halved", {})


def without_limit(num_envs):
    return Vectorized(num_envs)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium's, of what has no mode
@pytest.mark.parametrize(
    ("settings", "known", "why"),
    [
        ({"additional_wrappers": (ALSO,)}, True, "has none of its additional_wrappers (Halved)"),
        (
            {"vector_entry_point": without_limit},
            True,
            "does not take what it would be made with: got an unexpected keyword argument"
            " 'max_episode_steps'",
        ),
        (
            {"vector_entry_point": "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv"}
            | {"kwargs": {"how": "x"}},
            True,
            "does not take what it would be made with: got an unexpected keyword argument 'how'",
        ),
        (
            {"vector_entry_point": "no_such_module:Envs"},
            True,
            "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ({"vector_entry_point": "test_envs:Nothing"}, True, "cannot be loaded: AttributeError"),
        (
            {"kwargs": {"how": "observations"}},
            False,
            "has observations of Box(0, 255, (4,), uint8)",
        ),
        ({"kwargs": {"how": "actions"}}, False, "has actions of Discrete(3), and a single copy of"),
        ({"kwargs": {"how": "no space"}}, False, "has observations of None, and a single copy of"),
        ({"kwargs": {"how": "mode"}}, False, "is in autoreset mode AutoresetMode.SAME_STEP"),
        ({"kwargs": {"how": "no mode"}}, False, "is in autoreset mode None"),
        ({"kwargs": {"how": "raises"}}, False, "could not be made: RuntimeError: 100% wrong"),
        ({"kwargs": {"how": "exits"}}, False, "could not be made: SystemExit: no licence"),
    ],
)
def test_auto_takes_sync_and_says_why_the_vectorized_form_does_not_serve(
    registered, caplog, settings, known, why
):
    points = {"entry_point": Single, "vector_entry_point": Vectorized}
    registered("Both-v0", **points | settings, max_episode_steps=9)
    with anew(), caplog.at_level(logging.INFO, "vecpg"):
        envs = make_envs("Both-v0", 2)
        assert judge_of("Both-v0")[1]["vectorization"] == "sync"
    assert type(envs).__name__ == "InProcessEnvs"
    said = f"Both-v0 is stepped one by one (sync): its vectorized form {why}"
    assert [record.message[: len(said)] for record in caplog.records] == [said]
    if known:
        message = f"--vectorization vector_entry_point: the vectorized form of Both-v0 {why}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}.*; use sync, async or auto$"):
            resolve_vectorization(find_spec("Both-v0"), "vector_entry_point")


@pytest.mark.parametrize("how", [None, "not alone", "unclosable"])
def test_a_vectorized_form_that_serves_is_taken_without_a_word(registered, caplog, how):
    registered(
        "Both-v0",
        Single,
        vector_entry_point=Vectorized,
        kwargs={"how": how},
        max_episode_steps=9,
    )
    with anew(), caplog.at_level(logging.INFO, "vecpg"):
        envs = make_envs("Both-v0", 2, env_kwargs={"sutton_barto_reward": True})
    assert type(envs).__name__ == "Vectorized"
    expected = ["closing Vectorized failed: RuntimeError: close broke"] * (how == "unclosable")
    assert [record.message for record in caplog.records] == expected


def test_several_ranks_cannot_share_a_vectorized_form(registered, caplog):
    points = {"entry_point": Single, "vector_entry_point": Vectorized}
    registered("Both-v0", **points, max_episode_steps=9)
    both = find_spec("Both-v0")
    reason = "its copies draw from one generator, which cannot be split over 2 ranks; "
    with pytest.raises(ValueError, match=f"vector_entry_point: {reason}use sync or async$"):
        resolve_vectorization(both, "vector_entry_point", ranks=2)
    with anew(), caplog.at_level(logging.INFO, "vecpg"):
        assert resolve_vectorization(both, "auto", ranks=2) == "sync"
        assert resolve_vectorization(both, "auto", ranks=1) == "vector_entry_point"
        assert resolve_vectorization(both, "async", ranks=2) == "async"
        assert resolve_vectorization(find_spec("CartPole-v1"), "auto", ranks=2) == "tensor"
    (line,) = [record.message for record in caplog.records]
    assert line.startswith(
        "Both-v0 is stepped one by one (sync): the copies of its vectorized form"
    )
    registered("Alone-v0", vector_entry_point=Vectorized, max_episode_steps=9)
    alone = find_spec("Alone-v0")
    for vectorization in ("auto", "vector_entry_point"):
        with pytest.raises(ValueError, match=f"vector_entry_point: {reason}start one rank$"):
            resolve_vectorization(alone, vectorization, ranks=2)


def test_what_was_not_asked_for_is_not_even_looked_at(registered):
    registered("Both-v0", Single, vector_entry_point="no_such_module:Envs", max_episode_steps=9)
    for vectorization in ("sync", "async"):
        assert resolve_vectorization(find_spec("Both-v0"), vectorization) == vectorization
        assert judge_of("Both-v0", vectorization=vectorization)[1]["vectorization"] == vectorization
    registered("Alone-v0", vector_entry_point=Vectorized, max_episode_steps=9)
    assert resolve_vectorization(find_spec("Alone-v0"), "auto") == "vector_entry_point"


def test_environments_need_no_torch_until_they_are_on_tensors():
    code = (
        "import sys, vecpg.envs as envs\n"
        "envs.make_envs('CartPole-v1', 2, vectorization='sync').close()\n"
        "envs.resolve_vectorization(envs.find_spec('CartPole-v1'), 'auto')\n"
        "print({'torch', 'numba'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"set()"


# -- Making environments --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_id",
    [
        "CartPole-v1",
        "vecpg/CartPole-v1",
        "vecpg/Pendulum-v1",
        "vecpg/Acrobot-v1",
        "MountainCarContinuous-v0",
    ],
)
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
        ("", "Malformed environment ID"),
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
    with pytest.raises(ValueError, match="MountainCar-v0 has no tensor form; use sync, async or"):
        make_envs("MountainCar-v0", 1, vectorization="tensor")
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


@pairwise(
    what=["four", "shape", "dtype", "reward", "reward array"],
    index=[0, 1, 2],
    vectorization=["sync", "async"],
)
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


def test_a_limit_that_atari_games_keep_themselves_counts():
    spec = EnvSpec("Game-v0", "environments:CoinLength", kwargs={"max_num_frames_per_episode": 9})
    check_time_limit(spec, None)
    for kwargs in ({}, {"max_num_frames_per_episode": None}):
        spec = EnvSpec("Game-v0", "environments:CoinLength", kwargs=kwargs)
        with pytest.raises(ValueError, match="Game-v0 has no time limit"):
            check_time_limit(spec, None)
        check_time_limit(spec, 9)


# -- Action masks --------------------------------------------------------------------------------


class MaskedTogether(gymnasium.vector.VectorEnv):
    """A vectorized form of `environments:Masked-v0` that answers resets alone."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs, max_episode_steps=None, masks=True):
        single = environments.Masked()
        self.num_envs, self.masks = num_envs, masks
        self.single_observation_space = single.observation_space
        self.single_action_space = single.action_space

    def reset(self, *, seed=None, options=None):
        obs = np.ones((self.num_envs, 5), np.float32)
        return obs, {"action_mask": obs.astype(bool)} if self.masks else {}


def test_nothing_of_an_info_is_collected_but_masks():
    for action_masks in (False, True):
        envs = make_envs(
            "environments:Masked-v0", 3, vectorization="sync", action_masks=action_masks
        )
        _, infos = envs.reset(seed=[1, 2, 3])
        collected = [infos]
        for _ in range(25):
            allowed = np.stack([np.concatenate(env.unwrapped.allowed) for env in envs.envs])
            if action_masks:
                mask = infos["action_mask"]
                assert mask.dtype == np.bool_
                over = envs._autoreset_envs
                assert np.array_equal(mask, allowed | over[:, None])
            *_, infos = envs.step(allowed.argmax(axis=1) - 1)
            collected.append(infos)
        assert all(set(each) == ({"action_mask"} if action_masks else set()) for each in collected)
        if action_masks:
            assert not np.array_equal(collected[0]["action_mask"], collected[1]["action_mask"])
            assert any(each["action_mask"].all(axis=1).any() for each in collected)


class NoDict(environments.Constant):
    """Gives an info that is no dictionary, at the step `at`."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return obs, None if self.at == 0 else info

    def step(self, action):
        *answer, info = super().step(action)
        return *answer, ["no", "dict"] if self.steps == self.at else info


@pytest.mark.parametrize(("at", "shown"), [(0, "None"), (2, r"\['no', 'dict'\]")])
def test_an_info_that_is_no_dictionary_is_named(at, shown):
    envs = InProcessEnvs([environments.Constant, lambda: NoDict(at)])
    message = f"environment 1 failed: TypeError: expected an info that is a dict, got {shown}"
    with pytest.raises(SubEnvironmentError, match=message):
        envs.reset(seed=1)
        for _ in range(2):
            envs.step(np.zeros(2, np.int64))


def test_with_masks_auto_takes_what_gives_them(registered, caplog):
    spec = gymnasium.spec("Masked-v0")
    assert resolve_vectorization(spec, "auto", action_masks=True) == "sync"
    for masks, expected in ((True, "vector_entry_point"), (False, "sync")):
        gymnasium.register(
            f"Both{masks}-v0",
            "environments:Masked",
            vector_entry_point=lambda num_envs, masks=masks, **_: MaskedTogether(
                num_envs, masks=masks
            ),
            max_episode_steps=20,
        )
        with anew(), caplog.at_level(logging.INFO, "vecpg"):
            both = gymnasium.spec(f"Both{masks}-v0")
            assert resolve_vectorization(both, "auto", action_masks=True) == expected
            assert resolve_vectorization(both, "auto") == "vector_entry_point"
    assert "BothFalse-v0 is stepped one by one (sync): its vectorized form gives no" in caplog.text
    cartpole = gymnasium.spec("CartPole-v1")
    assert resolve_vectorization(cartpole, "auto") == "tensor"
    assert resolve_vectorization(cartpole, "auto", action_masks=True) == "sync"


@pytest.mark.parametrize(
    ("env_id", "vectorization", "message"),
    [
        ("CartPole-v1", "tensor", "on tensors give no infos.*; use --vectorization auto, sync or"),
        ("vecpg/CartPole-v1", "auto", "on tensors give no infos.*; use another environment"),
        ("vecpg/CartPole-v1", "tensor", "on tensors give no infos.*; use another environment"),
        ("Pendulum-v1", "auto", r"expected actions that are Discrete, .* got Box\(-2.0"),
        ("environments:Switches-v0", "sync", "expected actions that are Discrete, .* got MultiB"),
        ("environments:Switches-v0", "async", "expected actions that are Discrete, .* got MultiB"),
    ],
)
def test_environments_without_masks_are_refused_with_the_reason(env_id, vectorization, message):
    with pytest.raises(ValueError, match=f"^--action-masks: .*{message}"):
        make_envs(env_id, 2, vectorization=vectorization, action_masks=True)


def test_a_module_that_leaves_python_is_named_as_one_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "leaving_here.py").write_text("import sys\nsys.exit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="--env-id leaving_here:Ball-v0: SystemExit: 0"):
        find_spec("leaving_here:Ball-v0")


def test_arguments_that_tensors_do_not_take_are_why(caplog):
    caplog.set_level("INFO", logger="vecpg")
    spec, given = find_spec("CartPole-v1"), {"sutton_barto_reward": True}
    with anew():
        assert resolve_vectorization(spec, "auto", given) == "vector_entry_point"
    assert "stepped as it is registered, not on tensors: --env-kwargs are given" in caplog.text
    message = "vecpg/CartPole-v1 stands for CartPole-v1 without .* has no sutton_barto_reward"
    with pytest.raises(ValueError, match=f"--vectorization tensor: {message}"):
        resolve_vectorization(spec, "tensor", given)
    assert resolve_vectorization(spec, "tensor", {"dtype": "float64"}) == "tensor"


def test_a_wrong_argument_is_no_reason_for_sync(caplog):
    caplog.set_level("INFO", logger="vecpg")
    with anew(), pytest.raises(ValueError, match="got an unexpected keyword argument 'foo'"):
        make_envs("CartPole-v1", 2, env_kwargs={"foo": 1})
    assert "one by one" not in caplog.text


def test_a_namespace_that_is_not_there_says_what_to_name():
    with pytest.raises(ValueError, match="registers it: --env-id module:Nowhere/Ball-v0"):
        find_spec("Nowhere/Ball-v0")


class Batch(CartPoleVectorEnv):
    """A simulator of eight, whatever is asked for."""

    def __init__(self, num_envs, **kwargs):
        super().__init__(8, **kwargs)


class Spaceless(CartPoleVectorEnv):
    """Does not say what a single copy shows."""

    def __init__(self, num_envs, **kwargs):
        super().__init__(num_envs, **kwargs)
        del self.single_observation_space


@pytest.mark.parametrize(
    ("form", "said", "message"),
    [
        (Batch, "makes 8 copies where 1 is asked for", "expected 3 copies, got .* of 8"),
        (Spaceless, "has observations of None", "vectorized form with a single_observation_space"),
    ],
)
def test_a_vectorized_form_of_another_size_or_without_spaces(
    registered, caplog, form, said, message
):
    caplog.set_level("INFO", logger="vecpg")
    registered("Formed-v0", "environments:Constant", vector_entry_point=form, max_episode_steps=9)
    with anew():
        assert resolve_vectorization(find_spec("Formed-v0"), "auto") == "sync"
    assert said in caplog.text
    with pytest.raises(ValueError, match=message):
        make_envs("Formed-v0", 3, vectorization="vector_entry_point")
