import itertools
import math
import re
import warnings

import environments
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from pairs import pairwise

from vecpg.envs import EnvironmentFailure, make_envs
from vecpg.envs.in_process import InProcessEnvs
from vecpg.noise import Purpose, Stream
from vecpg.policy import Policy
from vecpg.rollout import choose_collector, collect, stepping
from vecpg.rollout.data import FINISHED, NEXT, PLAYING, RESETTING, check_finite
from vecpg.rollout.stepping import seeds_of

# The fields of a rollout that are tensors here.
ROWS = ("obs", "actions", "rewards", "terminations", "truncations", "mask", "action_masks")
ROWS += ("final_obs", "final_rows")


def policy_for(envs):
    torch.manual_seed(0)
    return Policy(envs.single_observation_space, envs.single_action_space)


def episodes_of(rollout, n):
    """Row numbers of each episode of environment n, cut at the ends."""
    episodes, rows = [], []
    for t in range(len(rollout.mask)):
        if rollout.mask[t, n]:
            rows.append(t)
            if rollout.dones[t, n]:
                episodes.append(rows)
                rows = []
    assert rows == [], "an episode was cut"
    return episodes


@pytest.mark.parametrize("num_steps", [1, 2, 7, 40])
def test_every_field_of_every_row_belongs_together(num_steps):
    envs = make_envs("environments:Counting-v0", 5)
    policy = policy_for(envs)
    for iteration in range(2):
        rollout = collect(envs, policy, num_steps=num_steps, seed=3, iteration=iteration)
        seeds = Stream(3, iteration, 0, 5).reset_seeds(Purpose.TRAINING_RESET)
        final = {
            tuple(row): obs
            for row, obs in zip(
                rollout.final_rows.tolist(), rollout.final_obs.tolist(), strict=True
            )
        }
        for n in range(5):
            # What this copy must have drawn, from a copy of its own.
            alone = gymnasium.make("environments:Counting-v0").unwrapped
            alone.reset(seed=seeds[n])
            started = 0
            for number, rows in enumerate(episodes_of(rollout, n)):
                assert started < num_steps, "an episode was started after the window"
                started += len(rows)
                assert rows == list(range(rows[0], rows[0] + alone.length))
                last = rows[-1]
                for age, t in enumerate(rows):
                    assert rollout.obs[t, n].tolist() == [number, age]
                    assert rollout.rewards[t, n] == rollout.actions[t, n]
                    assert rollout.terminations[t, n] == (t == last and alone.end != 1)
                    assert rollout.truncations[t, n] == (t == last and alone.end != 0)
                if alone.end != 0:
                    assert final.pop((last, n)) == [number, len(rows)]
                alone.reset()
            assert started >= num_steps
        assert final == {}
        masked = ~rollout.mask
        assert (rollout.rewards[masked] == 0).all()
        assert not rollout.dones[masked].any()
        assert rollout.mask[-1].any(), "the last row is of use"


def test_a_window_of_one_step_is_one_episode_each():
    envs = make_envs("environments:Counting-v0", 50)
    rollout = collect(envs, policy_for(envs), num_steps=1, seed=1, iteration=0)
    assert rollout.dones.sum(dim=0).tolist() == [1] * 50


def test_only_the_reset_row_stands_between_two_episodes():
    envs = make_envs("environments:Counting-v0", 8)
    rollout = collect(envs, policy_for(envs), num_steps=30, seed=1, iteration=0)
    for n in range(8):
        episodes = episodes_of(rollout, n)
        assert len(episodes) > 1
        for rows, following in itertools.pairwise(episodes):
            assert following[0] == rows[-1] + 2


@pytest.mark.parametrize("vectorization", ["sync", "vector_entry_point"])
def test_a_rollout_is_a_function_of_seed_and_iteration(vectorization):
    def rollout(seed, iteration, warm_up=0):
        envs = make_envs("CartPole-v1", 6, vectorization=vectorization)
        policy = policy_for(envs)
        for earlier in range(warm_up):
            collect(envs, policy, num_steps=20, seed=9, iteration=earlier)
        return collect(envs, policy, num_steps=20, seed=seed, iteration=iteration)

    one = rollout(1, 4)
    same = rollout(1, 4, warm_up=3)
    assert one.stream == same.stream == Stream(1, 4, 0, one.mask.shape[1])
    for name in set(ROWS) - {"action_masks"}:
        counted = (one.mask, same.mask) if name in ("obs", "actions") else (..., ...)
        assert torch.equal(getattr(one, name)[counted[0]], getattr(same, name)[counted[1]])
    for other in (rollout(1, 5), rollout(2, 4)):
        assert not torch.equal(one.obs[0], other.obs[0])


def test_action_noise_is_a_function_of_seed_iteration_and_step():
    """Every observation is the same here, so that actions differ by their noise alone."""
    envs = make_envs("environments:Constant-v0", 40)
    policy = policy_for(envs)
    given = [(1, 0), (1, 1), (2, 0)]
    drawn = [
        collect(envs, policy, num_steps=1, seed=seed, iteration=iteration).actions
        for seed, iteration in given
    ]
    again = collect(envs, policy, num_steps=1, seed=1, iteration=1).actions
    assert torch.equal(again, drawn[1])
    for one, other in itertools.combinations(drawn, 2):
        assert 0.3 < (one != other).float().mean() < 0.7
    assert 0.3 < (drawn[0][0] != drawn[0][1]).float().mean() < 0.7


def test_start_states_of_neighbouring_seeds_and_iterations_are_all_distinct():
    envs = make_envs("CartPole-v1", 64, vectorization="sync", max_episode_steps=1)
    policy = policy_for(envs)
    starts = [
        collect(envs, policy, num_steps=1, seed=seed, iteration=iteration).obs[0]
        for seed in (1, 2)
        for iteration in range(50)
    ]
    assert torch.cat(starts).unique(dim=0).shape[0] == 2 * 50 * 64


def test_the_buffers_grow():
    envs = make_envs("environments:CoinLength-v0", 4)
    rollout = collect(envs, policy_for(envs), num_steps=1, seed=1, iteration=0)
    assert rollout.mask.shape == (200, 4)
    assert sorted(set(rollout.mask.sum(dim=0).tolist())) == [2, 200]


class Poisoned(gymnasium.vector.VectorEnv):
    """Three copies, episodes of 2, 3 and 4 steps; NaN in every row that does not count."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self):
        self.num_envs = 3
        self.single_observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.lengths = np.array([2, 3, 4])

    def reset(self, *, seed=None, options=None):
        assert isinstance(seed, int)
        self.age = np.zeros(3, int)
        self.played = np.zeros(3, int)
        return np.zeros((3, 1)), {}

    def step(self, actions):
        assert set(actions.tolist()) <= {0, 1}
        resets = self.age == self.lengths
        self.age = np.where(resets, 0, self.age + 1)
        ends = self.age == self.lengths
        idle = self.played >= 1
        self.played += ends
        rewards = np.where(resets | idle, math.nan, 1.0)
        obs = np.where(idle & ~resets, math.nan, self.age)[:, None]
        return obs, rewards, ends, np.zeros(3, bool), {}


def test_rows_that_do_not_count_may_hold_nan():
    envs = Poisoned()
    rollout = collect(envs, policy_for(envs), num_steps=1, seed=1, iteration=0)
    assert rollout.mask.sum(dim=0).tolist() == [2, 3, 4]
    assert rollout.rewards.sum(dim=0).tolist() == [2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", "environment 2 failed at step 3 .reset with seed {seed}.: ZeroDivisionError"),
        ("raise at reset", "environment 2 failed at its reset .reset with seed {seed}.: OSError"),
        ("nan observation", r"environment 2 returned the observation \[nan\] at step 3 .*{seed}"),
        ("nan reward", "environment 2 returned the reward nan at step 3 .*{seed}"),
    ],
)
def test_a_faulty_environment_is_named_with_step_and_seed(fault, message):
    from environments import Faulty

    envs = make_envs("environments:Faulty-v0", 4, env_kwargs={"fault": fault})
    for index, env in enumerate(envs.envs):
        env.unwrapped.guilty = index == 2
    assert Faulty.made
    # Of a part of the environments as it is named among all.
    for first_env, index in ((0, 2), (5, 7)):
        seed = Stream(1, 0, first_env, 4).reset_seeds(Purpose.TRAINING_RESET)[2]
        expected = message.replace("environment 2", f"environment {index}").format(seed=seed)
        with pytest.raises(EnvironmentFailure, match=expected):
            collect(envs, policy_for(envs), num_steps=1, seed=1, iteration=0, first_env=first_env)


@pytest.mark.parametrize("what", ["actions", "obs", "rewards", "final_obs"])
def test_the_first_number_of_a_rollout_that_is_not_finite_is_named(what):
    """Of rows that count, and of final observations, which lie in rows that do not."""
    envs = make_envs("environments:Pay-v0", 3, max_episode_steps=4)
    rollout = collect(envs, policy_for(envs), num_steps=6, seed=1, iteration=4, first_env=20)
    assert len(rollout.final_rows) == 6
    check_finite(rollout)
    rows = rollout.final_obs if what == "final_obs" else getattr(rollout, what)
    rows[5 if what == "final_obs" else (2, 1)] = math.nan
    if what != "final_obs":
        rows[3, 0] = math.inf
    t, n = rollout.final_rows[5].tolist() if what == "final_obs" else (2, 1)
    named = {"obs": "observation", "rewards": "reward", "final_obs": "final observation"}
    n += 20  # as it is named among all
    if what == "actions":
        message = rf"^the policy's action in environment {n} at step {t} is \[nan, .* iteration 5;"
        with pytest.raises(FloatingPointError, match=message):
            check_finite(rollout)
        return
    message = rf"^environment {n} returned the {named[what]} .*nan.* at step {t} of iteration 5"
    with pytest.raises(EnvironmentFailure, match=message):
        check_finite(rollout)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("reward", "TypeError: expected a reward that is a number, got 'much'$"),
        ("reward text", "a reward that is a number, got '1.0'$"),
        ("reward None", "a reward that is a number, got None$"),
        ("reward array", r"a reward that is a number, got array\(\[1., 1.\]\)$"),
        ("reward array of none", "a reward that is a number, got array"),
        ("reward array of None", "a reward that is a number, got array"),
        ("reward complex", "a reward that is a number, got 1j$"),
        ("reward dict", "a reward that is a number, got {'agent': 1.0}$"),
        ("terminated None", "a terminated that is True or False, got None$"),
        ("terminated array", "a terminated that is True or False, got array"),
        ("truncated None", "a truncated that is True or False, got None$"),
        ("truncated text", "a truncated that is True or False, got 'no'$"),
        ("shape", r"wrong shape|expected an observation of shape \(1,\), got \(7,\)"),
        ("dtype", "complex64.* to dtype.'float32'|observation of dtype float32, got complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium warns of the same
def test_what_cannot_be_used_is_named_with_environment_step_and_seed(vectorization, what, message):
    settings = {"vectorization": vectorization, "env_kwargs": {"what": what}}
    envs = make_envs("environments:Odd-v0", 2, **settings)
    seeds = Stream(1, 0, 0, 2).reset_seeds(Purpose.TRAINING_RESET)
    try:
        with pytest.raises(EnvironmentFailure, match=message) as caught:
            collect(envs, policy_for(envs), num_steps=1, seed=1, iteration=0)
    finally:
        envs.close()
    index, seed = re.match(
        r"environment (\d) .* at step \d+ \(reset with seed (\d+)\)", str(caught.value)
    ).groups()
    assert int(seed) == seeds[int(index)]


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium's checker wants plain numbers
def test_numbers_of_any_kind_are_read_as_plain_ones(vectorization):
    def collected(paid, flagged):
        kwargs = {"paid": paid, "flagged": flagged}
        envs = make_envs("environments:Paid-v0", 3, vectorization=vectorization, env_kwargs=kwargs)
        try:
            return collect(envs, policy_for(envs), num_steps=9, seed=1, iteration=0)
        finally:
            envs.close()

    plain = collected(None, None)
    assert set(plain.rewards[plain.mask].tolist()) == {-1.0, 0.0, 1.0, 2.0}
    assert plain.truncations.any()
    assert (plain.terminations & ~plain.truncations).any()
    forms = list(environments.FORMS)
    # One of them for async, whose processes take their time.
    for paid, flagged in zip(forms, [*forms[5:], *forms[:5]], strict=True):
        if paid == "np.bool_" or (vectorization == "async" and paid != "(1,)"):
            continue
        other = collected(paid, flagged)
        for name in ("rewards", "terminations", "truncations", "mask"):
            assert torch.equal(getattr(other, name), getattr(plain, name)), (paid, flagged)


class Together(VectorEnv):
    """Copies without an index of their own, that answer what `change` makes of the right thing."""

    def __init__(self, num_envs, part, change):
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.num_envs, self.part, self.change = num_envs, part, change
        self.single_observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.single_action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros((self.num_envs, 1), np.float32), {}

    def step(self, actions):
        ends = np.ones(self.num_envs, bool)
        answer = [np.zeros((self.num_envs, 1), np.float32), 1.0 * actions, ends, ~ends]
        answer[self.part] = self.change(answer[self.part])
        return *answer, {}


@pytest.mark.parametrize("part", [1, 2, 3])
@pytest.mark.parametrize("change", [lambda it: it[:, None], torch.from_numpy, lambda it: it * 1])
def test_a_column_of_numbers_is_read_whatever_its_kind(part, change):
    envs = [Together(5, 1, lambda it: it), Together(5, part, change)]
    plain, other = (
        collect(each, policy_for(each), num_steps=1, seed=1, iteration=0) for each in envs
    )
    for name in ("rewards", "terminations", "truncations", "mask"):
        assert torch.equal(getattr(other, name), getattr(plain, name))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (1, lambda it: None, r"rewards of shape \(\) and dtype object"),
        (1, lambda it: it[:3], r"rewards of shape \(3,\) and dtype float64"),
        (1, lambda it: [1.0, None, 1.0, 1.0, 1.0], r"rewards of shape \(5,\) and dtype object"),
        (1, lambda it: it.astype(str), r"rewards of shape \(5,\) and dtype <U32"),
        (1, lambda it: it + 0j, r"rewards of shape \(5,\) and dtype complex128"),
        (2, lambda it: None, r"terminations of shape \(\) and dtype object"),
        (3, lambda it: it[None], r"truncations of shape \(1, 5\) and dtype bool"),
    ],
)
def test_a_column_that_is_none_is_named_with_step_and_seed(part, change, message):
    envs = Together(5, part, change)
    seed = seeds_of(envs, Stream(1, 0, 0, 5), Purpose.TRAINING_RESET)
    message = rf"returned {message} at step 0 \(all reset together with seed {seed}\); expected"
    with pytest.raises(EnvironmentFailure, match=message):
        collect(envs, policy_for(envs), num_steps=1, seed=1, iteration=0)


def test_another_autoreset_mode_is_refused():
    envs = SyncVectorEnv(
        [lambda: gymnasium.make("CartPole-v1")], autoreset_mode=AutoresetMode.SAME_STEP
    )
    with pytest.raises(ValueError, match="NEXT_STEP"):
        collect(envs, policy_for(envs), num_steps=1, seed=1, iteration=0)


# -- The start window is unbiased ----------------------------------------------------------------

# Pushes towards where the pole falls, not always: episodes of about 50 steps, up to several 100.
SKILL = torch.tensor([0.0, 0.1, 2.0, 1.0])


def medium_policy():
    policy = Policy(spaces.Box(-1, 1, (4,)), spaces.Discrete(2), hidden_sizes=())
    with torch.no_grad():
        policy.network[0].weight.copy_(torch.stack([-SKILL / 2, SKILL / 2]))
        policy.network[0].bias.zero_()
    return policy


@pytest.fixture(scope="module")
def true_length():
    """Mean episode length and its error, one environment at a time, sampled without vecpg."""
    env, rng, lengths = gymnasium.make("CartPole-v1").unwrapped, np.random.default_rng(5), []
    for _ in range(1500):
        obs, steps, over = env.reset(seed=int(rng.integers(2**31)))[0], 0, False
        while not over and steps < 500:
            p = 1 / (1 + math.exp(-float(SKILL.numpy() @ obs)))
            obs, _, over, _, _ = env.step(int(rng.random() < p))
            steps += 1
        lengths.append(steps)
    return np.mean(lengths), np.std(lengths, ddof=1) / math.sqrt(len(lengths))


def pooled_length(rollout):
    """All steps / all episodes, and its error: environments are independent, episodes are not."""
    steps = rollout.mask.sum(dim=0).double()
    episodes = rollout.dones.sum(dim=0).double()
    mean = steps.sum() / episodes.sum()
    residuals = steps - mean * episodes
    error = residuals.std() * math.sqrt(len(steps)) / episodes.sum()
    return mean.item(), error.item()


def without_tails(rollout, rows):
    """What a collector keeps that stops after `rows` steps and drops unfinished episodes."""
    mask, dones = rollout.mask[:rows].clone(), rollout.dones[:rows]
    finished = dones.flip(0).cummax(dim=0).values.flip(0)
    return type("Cut", (), {"mask": mask & finished, "dones": dones})


@pytest.mark.parametrize("num_steps", [1, 64, 200])
def test_the_start_window_favours_no_length(num_steps, true_length):
    envs = make_envs("CartPole-v1", 1500 if num_steps == 1 else 500)
    rollout = collect(envs, medium_policy(), num_steps=num_steps, seed=11, iteration=0)
    mean, error = pooled_length(rollout)
    true_mean, true_error = true_length
    assert 40 < true_mean < 80, "the policy should be of medium skill"
    assert abs(mean - true_mean) < 3.5 * math.hypot(error, true_error)
    if num_steps > 1:
        biased, biased_error = pooled_length(without_tails(rollout, num_steps))
        assert biased < true_mean - 5 * math.hypot(biased_error, true_error)


def test_an_environment_that_writes_into_its_action_does_not_change_what_is_stored():
    def actions(env_id):
        envs = make_envs(env_id, 3, vectorization="sync")
        return collect(envs, policy_for(envs), num_steps=20, seed=1, iteration=0).actions

    clean = actions("environments:Dials-v0")
    assert torch.equal(actions("environments:Scribbling-v0"), clean)
    assert len(clean.unique()) > 3


@pytest.mark.filterwarnings("ignore:.*should be an int or np.int64")
def test_unsigned_observations_are_looked_up_and_others_than_the_spaces_are_named():
    envs = make_envs("environments:Unsigned-v0", 3, vectorization="sync")
    rollout = collect(envs, policy_for(envs), num_steps=1, seed=1, iteration=0)
    assert rollout.obs.dtype == torch.int64
    assert rollout.obs[:, 0].tolist() == [0, 0, 1, 2, 3]
    wrong = make_envs("environments:Unsigned-v0", 3, env_kwargs={"wrong": True})
    message = r"environment 0 returned the observation 7 at step 2 .*expected one of Discrete\(5"
    with pytest.raises(EnvironmentFailure, match=message):
        collect(wrong, policy_for(wrong), num_steps=1, seed=1, iteration=0)


@pytest.mark.parametrize("of", environments.OFFSET)
@pytest.mark.filterwarnings("ignore:.*should be an int or np.int64")
def test_the_ends_of_a_space_are_looked_up_and_what_follows_them_is_named(of):
    settings = {"env_kwargs": {"of": of}, "vectorization": "sync"}
    envs = make_envs("environments:Offset-v0", 2, **settings)
    space, policy = envs.single_observation_space, policy_for(envs)
    rollout = collect(envs, policy, num_steps=1, seed=1, iteration=0)
    seen = rollout.obs[:5, 0].numpy().astype(space.dtype)
    assert all(one in space for one in seen)
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(rollout.actions[:, 0], rollout.actions[:, 1])
    assert all(one in envs.single_action_space for one in policy.for_env(rollout.actions[0]))
    # Each component's first and last values have the first and last vectors of its own.
    sizes = space.n if isinstance(space, spaces.Discrete) else space.nvec.astype(np.int64)
    last = np.cumsum(sizes) - 1
    first = np.concatenate([[0], last[:-1] + 1])
    table = policy.encoder.table.weight.detach()
    found = policy.encoder(rollout.obs[:2, 0]).detach()
    assert torch.equal(found[0], table[first].flatten())
    assert torch.equal(found[1], table[last].flatten())

    for beyond in (-1, 1):
        settings["env_kwargs"] = {"of": of, "beyond": beyond}
        wrong = make_envs("environments:Offset-v0", 2, **settings)
        message = "environment 0 returned the observation .* at step 3 .*expected one of"
        with pytest.raises(EnvironmentFailure, match=message):
            collect(wrong, policy_for(wrong), num_steps=1, seed=1, iteration=0)


def test_the_table_of_the_start_window_is_its_rule():
    for now, ends, more in itertools.product((FINISHED, PLAYING, RESETTING), (0, 1), (0, 1)):
        if now == FINISHED or (now == PLAYING and ends and not more):
            expected = FINISHED
        elif now == PLAYING and ends:
            expected = RESETTING
        else:
            expected = PLAYING
        assert NEXT[now, ends, more] == expected, (now, ends, more)


def test_a_common_seed_is_what_an_int_of_32_bits_holds():
    """Of 64 runs half would get one that is none."""
    envs = make_envs("CartPole-v1", 2, vectorization="vector_entry_point")
    seeds = [seeds_of(envs, Stream(s, 0, 0, 2), Purpose.TRAINING_RESET) for s in range(64)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) == 64
    assert max(seeds) > 2**30


# -- Action masks --------------------------------------------------------------------------------


def masked(num_envs=4, vectorization="sync", **kwargs):
    environments.Masked.made = 0
    return make_envs(
        "environments:Masked-v0",
        num_envs,
        vectorization=vectorization,
        env_kwargs=kwargs,
        action_masks=True,
    )


def collect_masked(num_steps=20, iteration=0, **settings):
    envs = masked(**settings)
    try:
        given = {"num_steps": num_steps, "seed": 3, "iteration": iteration, "action_masks": True}
        return collect(envs, policy_for(envs), **given)
    finally:
        envs.close()


@pairwise(
    num_steps=[1, 20, 3000], of=["Discrete", "MultiDiscrete"], after_end=["nothing", "all False"]
)
def test_a_rollout_has_what_was_allowed_and_nothing_else_was_taken(num_steps, of, after_end):
    """The environment shows what it allows, and raises for anything else, when nobody counts too.

    3000 steps are more than there is room for at first.
    """
    rollout = collect_masked(num_steps, of=of, after_end=after_end)
    masks, counted = rollout.action_masks, rollout.mask
    assert masks.dtype == torch.bool
    assert masks.shape == (*counted.shape, 5 if of == "Discrete" else 9)
    assert torch.equal(masks[counted], rollout.obs[counted] == 1)
    assert not masks[counted].all()
    assert masks[~counted].all()
    assert (~counted).any()
    space = environments.MASKED[of]
    numbers = (rollout.actions - torch.as_tensor(space.start)).reshape(*counted.shape, -1)
    sizes = [5] if of == "Discrete" else [2, 3, 4]
    for i, own in enumerate(torch.split(masks, sizes, dim=2)):
        taken = own.gather(2, numbers[..., i : i + 1])[..., 0]
        assert taken[counted].all()
        everything = {tuple(row) for row in own[counted].int().tolist()}
        assert len(everything) >= 2 * sizes[i] - 1, "there should be masks of many kinds"


@pytest.mark.parametrize(
    ("vectorization", "gives"),
    [
        *(("sync", gives) for gives in environments.GIVEN_MASKS),
        *(("async", gives) for gives in ("int8", "components")),
    ],
)
def test_masks_of_any_kind_give_the_same_rollout(vectorization, gives):
    plain = collect_masked(of="MultiDiscrete")
    other = collect_masked(of="MultiDiscrete", vectorization=vectorization, gives=gives)
    for name in ROWS:
        assert torch.equal(getattr(other, name), getattr(plain, name)), name


def test_masks_of_gymnasiums_own_vector_environments_are_read():
    """With a wrapper of Gymnasium's around them, whose infos have more in them."""
    envs = gymnasium.make_vec("environments:Masked-v0", 4, vectorization_mode="sync")
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(envs)
    given = {"num_steps": 20, "seed": 3, "iteration": 0, "action_masks": True}
    rollout, plain = collect(envs, policy_for(envs), **given), collect_masked()
    for name in ROWS:
        assert torch.equal(getattr(rollout, name), getattr(plain, name)), name


def test_without_masks_there_are_none_and_the_way_is_the_same():
    envs = make_envs("environments:Constant-v0", 2)
    policy = policy_for(envs)
    assert collect(envs, policy, num_steps=1, seed=3, iteration=0).action_masks is None
    assert str(choose_collector(envs, policy)).startswith("by stepping: ")


def test_actions_are_masked_in_torch_and_the_reason_is_said():
    envs = masked()
    policy = policy_for(envs)
    chosen = choose_collector(envs, policy, action_masks=True)
    assert str(chosen) == "by stepping, actions drawn in torch: its actions are masked"
    with pytest.raises(ValueError, match='backend="cpu": its actions are masked'):
        choose_collector(envs, policy, "cpu", action_masks=True)
    on_tensors = make_envs("CartPole-v1", 2)
    with pytest.raises(ValueError, match="action_masks: environments on tensors give no infos"):
        choose_collector(on_tensors, policy_for(on_tensors), action_masks=True)
    boxes = make_envs("Pendulum-v1", 2, vectorization="sync")
    with pytest.raises(ValueError, match="expected actions that are Discrete, or MultiDiscrete"):
        choose_collector(boxes, policy_for(boxes), action_masks=True)


@pytest.mark.parametrize(
    ("vectorization", "at", "fault"),
    [
        *(("sync", at, fault) for at in (0, 2) for fault in environments.FAULTY_MASKS),
        *(("async", 2, fault) for fault in ("nothing allowed", "missing", "NaN")),
        # It makes numbers of the first mask's type of others, or raises.
        *(("gymnasium", 2, fault) for fault in ("nothing allowed", "missing", "two")),
    ],
)
def test_a_mask_that_is_none_is_named_with_environment_step_and_seed(vectorization, at, fault):
    seeds = Stream(1, 0, 0, 4).reset_seeds(Purpose.TRAINING_RESET)
    if vectorization == "gymnasium":
        environments.Masked.made = 0
        envs = gymnasium.make_vec(
            "environments:Masked-v0",
            4,
            vectorization_mode="sync",
            fault=fault,
            at=at,
        )
    else:
        # In each of the processes the first is the only one.
        after = 0 if vectorization == "async" else 3
        envs = masked(vectorization=vectorization, fault=fault, at=at, after=after)
    guilty = "0" if vectorization == "async" else "3"
    when = "its reset" if at == 0 else f"step {at - 1}"
    named = rf"^environment ({guilty}) (\w.*) at {when} \(reset with seed (\d+)\): (.*)$"
    try:
        with pytest.raises(EnvironmentFailure, match=named) as caught:
            collect(envs, policy_for(envs), num_steps=1, seed=1, iteration=0, action_masks=True)
    finally:
        envs.close()
    index, verb, seed, reason = re.match(named, str(caught.value)).groups()
    assert int(seed) == seeds[int(index)]
    if fault == "nothing allowed":
        assert (verb, reason) == ("allows no action", "no value is 1 in its action_mask")
    else:
        assert verb == "failed"
        assert 'TypeError: expected info["action_mask"] of 5 booleans, got ' in reason


class Once(environments.Constant):
    """Gives masks in its first episode, and then such as allow nothing; 2 to 9 steps."""

    def reset(self, *, seed=None, options=None):
        self.first = seed is not None
        obs, _ = super().reset(seed=seed)
        self.length = int(self.np_random.integers(2, 10))
        return obs, self._info()

    def step(self, action):
        obs, reward, *_ = super().step(action)
        assert action == 1 or not self.first
        return obs, reward, self.steps == self.length, False, self._info()

    def _info(self):
        return {"action_mask": np.array([0, int(self.first)])}


def test_masks_of_environments_that_have_finished_are_no_matter():
    envs = InProcessEnvs([Once] * 6, action_masks=True)
    given = {"seed": 1, "iteration": 0, "action_masks": True}
    rollout = collect(envs, policy_for(envs), num_steps=1, **given)
    lengths = rollout.mask.sum(dim=0)
    assert len(lengths.unique()) > 1
    assert lengths.max() > lengths.min() + 2, "some go on with what allows nothing"
    assert (rollout.actions[rollout.mask] == 1).all()
    assert rollout.action_masks[~rollout.mask].all()
    with pytest.raises(EnvironmentFailure, match=r"environment \d allows no action at step \d+ "):
        collect(envs, policy_for(envs), num_steps=30, **given)


# -- uint8 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("room", [1, 2**28])
def test_uint8_stays_what_the_environment_gave(monkeypatch, vectorization, room):
    monkeypatch.setattr(stepping, "_MOST_BYTES", room)
    capacities, real = [], stepping.Rows

    def rows(capacity, *more, **others):
        capacities.append(capacity)
        return real(capacity, *more, **others)

    monkeypatch.setattr(stepping, "Rows", rows)
    settings = {"max_episode_steps": 6, "vectorization": vectorization}
    envs = make_envs("environments:Catch-v0", 3, **settings)
    try:
        rollout = collect(envs, policy_for(envs), num_steps=8, seed=3, iteration=1)
    finally:
        envs.close()
    assert capacities == [2 if room == 1 else 9]
    assert rollout.obs.dtype == rollout.final_obs.dtype == torch.uint8
    assert rollout.obs.nbytes == rollout.mask.numel() * 300
    seeds = Stream(3, 1, 0, 3).reset_seeds(Purpose.TRAINING_RESET)
    final = iter(rollout.final_obs)
    expected = {}
    for n, seed in enumerate(seeds):
        env = gymnasium.make("environments:Catch-v0", max_episode_steps=6)
        obs, _ = env.reset(seed=seed)
        for t in range(len(rollout.mask)):
            assert np.array_equal(rollout.obs[t, n].numpy(), obs)
            if not rollout.mask[t, n]:
                obs, _ = env.reset()
                continue
            obs, *_ = env.step(int(rollout.actions[t, n]))
            if rollout.truncations[t, n]:
                expected[t, n] = obs
    assert len(expected) == 6
    for row, found in zip(rollout.final_rows.tolist(), final, strict=True):
        assert np.array_equal(found.numpy(), expected[tuple(row)])


@pytest.mark.parametrize("value", [256.0, -1.0, 7.5, math.nan, math.inf, 300])
def test_what_no_uint8_is_does_not_become_one(monkeypatch, value):
    """Gymnasium's own copies make it one; others may not."""
    envs = make_envs("environments:Catch-v0", 3, vectorization="sync")
    real, kind = envs.step, np.int64 if isinstance(value, int) else np.float64

    def step(actions):
        obs, *rest = real(actions)
        obs = obs.astype(kind)
        obs[1, 2, 3, 0] = value
        return obs, *rest

    monkeypatch.setattr(envs, "step", step)
    with pytest.raises(
        EnvironmentFailure,
        match=r"environment 1 returned an observation with the number .* at step 0 \(reset with"
        r" seed \d+\); expected whole numbers from 0 to 255",
    ):
        collect(envs, policy_for(envs), num_steps=1, seed=1, iteration=0)
    value = 9
    rollout = collect(envs, policy_for(envs), num_steps=1, seed=1, iteration=0)
    assert (rollout.obs[1:, 1, 2, 3, 0] == 9).all()


class Integers(VectorEnv):
    """Two environments of one step, whose observations' squares sum to more than int16 has."""

    def __init__(self):
        self.num_envs = 2
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.single_observation_space = spaces.Box(-(2**15), 2**15 - 1, (4,), np.int16)
        self.single_action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.full((2, 4), -(2**15), np.int16), {}

    def step(self, actions):
        none = np.zeros(2, bool)
        return np.full((2, 4), 2**15 - 1, np.int16), np.ones(2), ~none, none, {}


def test_whole_numbers_of_other_types_become_float32():
    envs = Integers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollout = collect(envs, policy_for(envs), num_steps=1, seed=1, iteration=0)
    assert rollout.obs.dtype == torch.float32
    assert rollout.obs.unique().tolist() == [-(2**15)]


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.filterwarnings("ignore:.*obs returned by the:UserWarning")
@pytest.mark.parametrize(("dtype", "value"), [("uint16", 256), ("uint32", 70000)])
def test_a_whole_number_that_its_space_has_not_is_not_taken_for_another(
    vectorization, dtype, value
):
    for at, when in ((0, "its reset"), (2, "step 1")):
        kwargs = {"at": at, "dtype": dtype, "value": value}
        envs = make_envs("environments:Wide-v0", 2, vectorization=vectorization, env_kwargs=kwargs)
        message = rf"environment 0 failed at {when} .*expected an observation of uint8, got {value}"
        with pytest.raises(EnvironmentFailure, match=message):
            collect(envs, policy_for(envs), num_steps=1, seed=1, iteration=0)
        envs.close()
    kwargs = {"at": 99, "dtype": dtype}
    envs = make_envs("environments:Wide-v0", 2, vectorization=vectorization, env_kwargs=kwargs)
    rollout = collect(envs, policy_for(envs), num_steps=1, seed=1, iteration=0)
    envs.close()
    assert rollout.obs.dtype == torch.uint8
    assert (rollout.obs == torch.tensor([7, 255])).all()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("none", "expected an observation of float32, got None"),
        ("ragged", r"expected an observation of float32, got \[\[1.0\], \[1.0, 2.0\]\]"),
        ("longer", r"expected an observation of shape \(1,\), got \(2,\)"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_observation_is_named_alike_in_every_process(vectorization, what, message):
    kwargs = {"what": what}
    envs = make_envs("environments:Ragged-v0", 2, vectorization=vectorization, env_kwargs=kwargs)
    seed = Stream(1, 0, 0, 2).reset_seeds(Purpose.TRAINING_RESET)[0]
    message = rf"environment 0 failed at step 0 \(reset with seed {seed}\): .*{message}"
    with pytest.raises(EnvironmentFailure, match=message) as caught:
        collect(envs, policy_for(envs), num_steps=1, seed=1, iteration=0)
    assert caught.value.trace == "", "none of the environment's own code was running"
    envs.close()
