"""The estimators against the exact policy gradient of two small decision processes.

With K episodes in an iteration, an estimate minus K / num_envs times one episode's expectation has
the expectation 0, since whether an episode starts depends on the past alone. Errors are over
iterations, whose episodes are not independent.
"""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from exact import (
    Noise,
    Tables,
    exact_gradient,
    expected_return,
    fenced_world,
    line_world,
    slip_world,
)
from gymnasium import spaces
from pairs import pairs, short
from torch import nn

from vecpg import update as update_module
from vecpg.advantage import advantages
from vecpg.config import Config
from vecpg.envs import make_envs, ops
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.policy import Policy
from vecpg.rollout import Rollout, collect
from vecpg.run.checkpoint import folders, load_policy
from vecpg.train import train
from vecpg.update import update

WORLDS = {"line": line_world(), "slip": slip_world(), "fenced": fenced_world()}
# The line on tensors, collected on the device.
ON_TENSORS = {"tensor": WORLDS["line"]}
EPISODES = 20_000
# Standard errors. By chance one of a few hundred independent numbers is this far off in one run of
# fifty; with seeds that are fixed it is not.
BOUND = 4.0
# What a wrong estimator has to reach at least.
FAR = 6.0
UNBIASED = [
    *(
        (weights, baseline)
        for baseline in ("none", "leave_one_out", "value")
        for weights in ("reward_to_go", "full_return")
    ),
    ("gae", "value"),
]


class Tabular(Policy):
    """pi(a|s) = softmax(table[s])[a]."""

    def __init__(self, logits):
        rows, actions = logits.shape
        super().__init__(spaces.Discrete(rows), spaces.Discrete(actions))
        table = torch.as_tensor(logits, dtype=torch.float32)
        self.network = nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, obs):
        return self.network(obs).t().contiguous()


class LineOnTensors:
    """The line; an observation is the state's number."""

    observation_space = spaces.Box(0, 4, (1,))
    action_space = spaces.Discrete(2)
    num_uniforms = 1

    @staticmethod
    def start(uniforms):
        return (0.0,)

    @staticmethod
    def transition(state, action):
        return (ops.maximum(state[0] + 2.0 * action - 1.0, 0.0),)

    @staticmethod
    def observation(state):
        return state

    @staticmethod
    def terminated(state):
        return state[0] == 4.0

    @staticmethod
    def reward(state, action, following):
        return ops.where(following[0] == 4.0, 10.0, -1.0)


class TabularOfNumbers(Tabular):
    """The same policy for observations that are the state's number in a box."""

    obs_shape, obs_dtype = (1,), torch.float32

    def forward(self, obs):
        return super().forward(obs[:, 0].long())


# -- Episodes, collected once --------------------------------------------------------------------


@functools.cache
def of_many_environments(name, num_steps):
    """Rollouts of many environments that make at least `EPISODES` whole episodes."""
    world, num_envs = (WORLDS | ON_TENSORS)[name], 64
    policy = Tabular(world.logits)
    if name == "line":
        envs = make_envs("vecpg/LineWorld-v0", num_envs, vectorization="sync")
    elif name == "tensor":
        num_envs, policy = 64 * 100, TabularOfNumbers(world.logits)
        envs = TensorVectorEnv(LineOnTensors, num_envs, max_episode_steps=100)
    else:
        num_envs = 64 * 313 if num_steps == 1 else 64 * 150
        envs = Tables(world, num_envs)
    rollouts, episodes = [], 0
    while episodes < EPISODES:
        given = {"num_steps": num_steps, "seed": 5, "iteration": len(rollouts)}
        rollout = collect(envs, policy, **given, action_masks=world.allowed is not None)
        if name == "tensor":
            numbers = rollout.obs[..., 0].masked_fill(~rollout.mask, 0).long()
            rollout = replace(rollout, obs=numbers)
        rollouts.append(rollout)
        episodes += rollouts[-1].dones.sum().item()
    return rollouts


@functools.cache
def collected(name, num_envs, num_steps):
    """The same as rollouts of `num_envs` environments: they know nothing of each other."""
    return [few for many in of_many_environments(name, num_steps) for few in dealt(many, num_envs)]


def dealt(rollout, num_envs):
    """A rollout of many environments as rollouts of a few."""
    rows = torch.arange(1, len(rollout.mask) + 1)[:, None]
    lengths = torch.where(rollout.mask, rows, 0).amax(dim=0)
    for start in range(0, rollout.mask.shape[1], num_envs):
        of = slice(start, start + num_envs)
        length = lengths[of].max()
        n = rollout.final_rows[:, 1]
        inside = (n >= of.start) & (n < of.stop)
        yield replace(
            rollout,
            final_obs=rollout.final_obs[inside],
            final_rows=rollout.final_rows[inside] - torch.tensor([0, start]),
            **{name: getattr(rollout, name)[:length, of] for name in fields(rollout)},
        )


def fields(rollout):
    """What there is for every row."""
    return FIELDS if rollout.action_masks is None else (*FIELDS, "action_masks")


FIELDS = ("obs", "actions", "rewards", "terminations", "truncations", "mask")


# -- From episodes to standard errors ------------------------------------------------------------


def weigh(world, rollouts, config):
    """The advantages of each rollout."""
    table, values = torch.as_tensor(world.values, dtype=torch.float32), None
    for rollout in rollouts:
        if config.baseline == "value":
            values = table[rollout.obs].masked_fill(~rollout.mask, torch.nan)
        yield advantages(rollout, config, values)


def gradients(world, rollouts, weights, chunk_rows=499):
    """(iterations, S, A) float64: what `update` leaves in the parameters, for every rollout.

    One call serves them all: the rollouts follow one another in time, and each has a table of its
    own, which its observations point into.
    """
    states, actions = world.logits.shape
    policy = Tabular(np.tile(world.logits, (len(rollouts), 1)))
    moved = [replace(r, obs=r.obs + i * states) for i, r in enumerate(rollouts)]
    joined = Rollout(
        **{
            name: torch.cat([getattr(rollout, name) for rollout in moved])
            for name in fields(moved[0])
        },
        final_obs=torch.zeros(0, dtype=torch.int64),
        final_rows=torch.zeros(0, 2, dtype=torch.int64),
    )
    assert chunk_rows < joined.mask.numel()
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update_module, "CHUNK_ROWS", chunk_rows)
        weights = torch.cat(weights).masked_fill(~joined.mask, torch.nan)
        update(policy, optimizer, joined, weights, Config(reduction="episode"))
    # An optimizer descends.
    gradient = -policy.network.weight.grad.double()
    return gradient.reshape(len(rollouts), states, actions).numpy()


def deviations(estimates, rollouts, target):
    """(S, A): the mean residual in standard errors; infinite where it is off and never varies."""
    episodes = np.array([rollout.dones.sum().item() for rollout in rollouts])
    num_envs = rollouts[0].mask.shape[1]
    residuals = estimates - (episodes / num_envs)[:, None, None] * target
    error = residuals.std(axis=0, ddof=1) / len(residuals) ** 0.5
    mean = residuals.mean(axis=0)
    return np.divide(mean, error, out=np.where(mean == 0, 0.0, np.inf), where=error > 0)


def largest(world, rollouts, weights, target):
    """The largest deviation of an estimator that multiplies grad log pi by these weights."""
    return np.abs(deviations(gradients(world, rollouts, weights), rollouts, target)).max()


# -- The target ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_the_target_is_the_slope_of_the_expected_return(world, gamma):
    """Central differences of a return that is computed forward in time, without values."""
    slope, step = np.zeros_like(world.logits), 1e-5
    for at in np.ndindex(slope.shape):
        shift = np.zeros_like(slope)
        shift[at] = step
        above, below = (
            expected_return(replace(world, logits=world.logits + sign * shift), gamma)
            for sign in (1, -1)
        )
        slope[at] = (above - below) / (2 * step)
    np.testing.assert_allclose(exact_gradient(world, "full_return", gamma), slope, atol=1e-8)
    same = np.allclose(exact_gradient(world, "reward_to_go", gamma), slope, atol=1e-8)
    assert same == (gamma == 1.0), "at a smaller gamma the reward-to-go follows no such slope"
    alone = np.isclose(world.policy, 1) | np.isclose(world.policy, 0)
    of_consequence = ~world.terminal[:, None] & ~alone
    assert (np.abs(slope[of_consequence]) > 0.01).all(), "every number should be of consequence"
    assert (slope[alone] == 0).all()


def test_limits_are_reached_sometimes():
    ends = [
        (r.terminations.sum().item(), (r.truncations & ~r.terminations).sum().item())
        for r in collected("slip", 4, 16)
    ]
    terminated, cut = np.sum(ends, axis=0)
    assert 0.1 < cut / (cut + terminated) < 0.5


# -- The estimators ------------------------------------------------------------------------------


def in_full(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# Every pair of two of them; in short every estimator once, where episodes are collected soonest.
IN_FULL = pairs(
    UNBIASED, ["line", "slip", "fenced", "tensor"], [(4, 16), (4, 1), (64, 1)], [0.9, 1.0]
)
IN_SHORT = [
    (estimator, ("line", "tensor")[i % 2], (4, 16), 0.9) for i, estimator in enumerate(UNBIASED)
]
IN_SHORT += [
    ((weights, baseline), "fenced", (4, 16), 0.9)
    for weights, baseline in (
        ("reward_to_go", "none"),
        ("reward_to_go", "leave_one_out"),
        ("reward_to_go", "value"),
        ("gae", "value"),
    )
]


@pytest.mark.parametrize(
    ("estimator", "name", "size", "gamma"),
    IN_SHORT + [in_full(*case) for case in IN_FULL if case not in IN_SHORT],
    ids=short,
)
def test_the_estimator_is_exact(estimator, name, size, gamma):
    (weights, baseline), world = estimator, (WORLDS | ON_TENSORS)[name]
    rollouts = collected(name, *size)
    config = Config(
        weights=weights, baseline=baseline, gamma=gamma, gae_lambda=1.0, normalize=False
    )
    estimates = gradients(world, rollouts, list(weigh(world, rollouts, config)))
    off = deviations(estimates, rollouts, exact_gradient(world, weights, gamma))
    assert np.abs(off).max() < BOUND, off.round(1)
    assert (estimates[:, world.terminal] == 0).all()
    fixed = np.isclose(world.policy, 1) | np.isclose(world.policy, 0)
    assert (estimates[:, fixed] == 0).all(), "what is not allowed, or all that is, has no gradient"
    assert (estimates[:, ~world.terminal[:, None] & ~fixed].std(axis=0) > 0).all()


@pytest.mark.parametrize("name", WORLDS)
def test_one_update_for_all_is_an_update_for_each(name):
    """Alone, 4 environments and a chunk of 7 rows; together, a chunk that fits several of them."""
    world, rollouts = WORLDS[name], collected(name, 4, 16)[:40]
    weights = list(weigh(world, rollouts, Config(gamma=0.9)))
    together = gradients(world, rollouts, weights)
    for i, rollout in enumerate(rollouts):
        alone = gradients(world, [rollout], [weights[i]], chunk_rows=7)
        np.testing.assert_allclose(together[i], alone[0], atol=1e-5)


@pytest.mark.parametrize("num_steps", [16, in_full(1)])
def test_the_environments_dealt_out_are_those_of_a_small_collection(num_steps):
    world = WORLDS["line"]
    envs = make_envs("vecpg/LineWorld-v0", 4)
    for iteration in (0, 7):
        given = {"num_steps": num_steps, "seed": 5, "iteration": iteration}
        small = collect(envs, Tabular(world.logits), **given)
        of_many = collected("line", 4, num_steps)[iteration * 16]
        counted = small.mask
        for field in FIELDS:
            one, other = getattr(small, field), getattr(of_many, field)
            rows = counted if field in ("obs", "actions") else ...
            assert torch.equal(one[rows], other[rows]), field


@pytest.mark.slow
def test_sync_and_async_learn_the_same_over_fifty_iterations(tmp_path):
    runs = {}
    for vectorization in ("sync", "async"):
        config = Config(
            env_id="vecpg/LineWorld-v0",
            num_envs=4,
            num_steps=16,
            vectorization=vectorization,
            total_timesteps=None,
            total_iterations=50,
            target_return=None,
            eval_episodes=4,
            out_dir=str(tmp_path / vectorization),
            progress=False,
        )
        run_dir = train(config).run_dir
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 50
        clockless = [
            {k: v for k, v in row.items() if k != "charts/SPS" and not k.startswith("perf/")}
            for row in rows
        ]
        policy = load_policy(folders(run_dir)[0])
        runs[vectorization] = clockless, [p.tolist() for p in policy.parameters()]
    assert runs["sync"] == runs["async"]


# -- Tests of the test: what is biased is found --------------------------------------------------


def only(rollout, kept):
    """The rollout without the episodes that are not kept."""
    names = ("terminations", "truncations", "mask")
    return replace(rollout, **{name: getattr(rollout, name) & kept for name in names})


def first_finished(rollout, count):
    """The first episodes to finish, in time."""
    kept = torch.zeros_like(rollout.mask)
    for t, n in rollout.dones.nonzero()[:count].tolist():
        earlier = rollout.dones[:t, n].nonzero()[:, 0].tolist()
        kept[max(earlier, default=-1) + 1 : t + 1, n] = True
    return only(rollout, kept)


def without_tails(rollout, rows):
    """What has finished within so many rows."""
    kept = torch.zeros_like(rollout.mask)
    kept[:rows] = rollout.dones[:rows].flip(0).cummax(dim=0).values.flip(0)
    return only(rollout, kept)


@functools.cache
def one_each(name):
    """Rollouts of 4 environments with the first episode of each: an episode's age is the row."""
    rollouts = collected(name, 4, 16)
    return [only(r, r.dones.cumsum(dim=0) - r.dones.int() == 0) for r in rollouts]


def test_masks_forgotten_in_the_update_are_found():
    world, rollouts = WORLDS["fenced"], collected("fenced", 4, 16)
    unmasked = [replace(rollout, action_masks=None) for rollout in rollouts]
    config = Config(baseline="value", gamma=0.9)
    weights = list(weigh(world, rollouts, config))
    target = exact_gradient(world, "reward_to_go", 0.9)
    assert largest(world, unmasked, weights, target) > FAR


def test_the_entropys_gradient_is_that_of_the_masked_distribution():
    """d H(s) / d logits[s, b] = -pi(b|s) (log pi(b|s) + H(s)), in float64, over counted rows."""
    world, rollout = WORLDS["fenced"], collected("fenced", 4, 16)[0]
    policy = Tabular(world.logits)
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    nothing = torch.zeros(rollout.mask.shape)
    stats = update(policy, optimizer, rollout, nothing, Config(ent_coef=1.0))
    pi = world.policy
    log_pi = np.log(pi, out=np.zeros_like(pi), where=pi > 0)
    entropy = -(pi * log_pi).sum(axis=1)
    states = rollout.obs[rollout.mask].numpy()
    shares = np.bincount(states, minlength=len(pi)) / len(states)
    expected = -shares[:, None] * pi * (log_pi + entropy[:, None])
    np.testing.assert_allclose(-policy.network.weight.grad.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(stats.entropy.item(), (shares * entropy).sum(), rtol=1e-5)
    assert (policy.network.weight.grad.numpy()[~world.allowed] == 0).all()
    assert np.abs(expected).max() > 0.01


in_both = pytest.mark.parametrize("name", ["line", in_full("slip")])


@in_both
@pytest.mark.parametrize("weights", ["reward_to_go", in_full("full_return")])
@pytest.mark.parametrize("selection", ["first finished", "no tails"])
def test_a_selection_of_episodes_is_found(name, selection, weights):
    world, rollouts = WORLDS[name], collected(name, 4, 16)
    select = functools.partial(first_finished, count=4)
    if selection == "no tails":
        select = functools.partial(without_tails, rows=16)
    selected = [select(rollout) for rollout in rollouts]
    config = Config(weights=weights, baseline="none", gamma=0.9)
    target = exact_gradient(world, weights, 0.9)
    off = largest(world, selected, list(weigh(world, selected, config)), target)
    assert off > FAR


@in_both
@pytest.mark.parametrize("weights", ["reward_to_go", in_full("full_return")])
@pytest.mark.parametrize("baseline", ["mean", "timestep_mean"])
def test_a_baseline_with_the_own_return_is_found(name, baseline, weights):
    world, rollouts = WORLDS[name], one_each(name)
    config = Config(weights=weights, baseline=baseline, gamma=0.9)
    target = exact_gradient(world, weights, 0.9)
    off = largest(world, rollouts, list(weigh(world, rollouts, config)), target)
    assert off > FAR


@pytest.mark.parametrize("weights", ["reward_to_go", in_full("full_return")])
def test_a_sole_survivor_with_advantage_zero_is_found(weights):
    world, rollouts = WORLDS["line"], one_each("line")
    config = Config(weights=weights, baseline="leave_one_out", gamma=0.9)
    ignored = [
        advantages.masked_fill(rollout.mask.sum(dim=1, keepdim=True) == 1, 0.0)
        for rollout, advantages in zip(rollouts, weigh(world, rollouts, config), strict=True)
    ]
    off = largest(world, rollouts, ignored, exact_gradient(world, weights, 0.9))
    assert off > FAR


@in_both
def test_minus_the_mean_over_episodes_is_three_quarters(name):
    """Of K = 4 episodes the own one is a quarter of the mean: (K - 1) / K is left."""
    world, rollouts = WORLDS[name], one_each(name)
    config = Config(weights="full_return", baseline="none", gamma=0.9)
    centred = [
        torch.where(rollout.mask, weights - weights[0].mean(), 0.0)
        for rollout, weights in zip(rollouts, weigh(world, rollouts, config), strict=True)
    ]
    target = exact_gradient(world, "full_return", 0.9)
    estimates = gradients(world, rollouts, centred)
    off = np.abs(deviations(estimates, rollouts, 0.75 * target)).max()
    assert off < BOUND
    assert np.abs(deviations(estimates, rollouts, target)).max() > FAR


@in_both
def test_the_wrong_discount_is_found(name):
    """The reward-to-go has no gamma^t in front."""
    world, rollouts = WORLDS[name], collected(name, 4, 16)
    config = Config(weights="reward_to_go", baseline="value", gamma=0.9)
    target = exact_gradient(world, "full_return", 0.9)
    off = largest(world, rollouts, list(weigh(world, rollouts, config)), target)
    assert off > FAR


# -- Every distribution, with dropout ------------------------------------------------------------

ACTIONS = {
    "discrete": (spaces.Discrete(3, start=1), {}),
    "multi-discrete": (spaces.MultiDiscrete([2, 3]), {}),
    "box": (spaces.Box(-0.5, 0.5, (3,)), {}),
    "box, deviation from the network": (spaces.Box(-0.5, 0.5, (2,)), {"log_std": "network"}),
}
every_distribution = pytest.mark.parametrize(
    ("action_space", "settings"), ACTIONS.values(), ids=ACTIONS
)


def with_dropout(kind, action_space, settings):
    """A policy that is nowhere near its small initial logits."""
    given = {"hidden_sizes": (6,), "dropout": 0.5} | settings
    policy = kind(spaces.Box(-np.inf, np.inf, (3,)), action_space, **given)
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.7, generator=generator)
    return policy


@every_distribution
def test_a_baseline_of_the_state_alone_adds_nothing_in_expectation(action_space, settings):
    """E[grad log pi(a|s) b(s)] = 0, and not so with other dropout masks or with clipped actions."""
    policy = with_dropout(Policy, action_space, settings)
    envs = Noise(action_space, 128)
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)

    def score(rollout):
        baseline = (1 + rollout.obs[..., 0] + rollout.obs[..., 1] ** 2).masked_fill(
            ~rollout.mask, torch.nan
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(update_module, "CHUNK_ROWS", 499)
            update(policy, optimizer, rollout, baseline, Config())
        return np.concatenate([p.grad.double().reshape(-1).numpy() for p in policy.parameters()])

    def largest_mean(scores):
        scores = np.stack(scores)
        error = scores.std(axis=0, ddof=1) / len(scores) ** 0.5
        return np.abs(scores.mean(axis=0) / error).max()

    rollouts = [
        collect(envs, policy, num_steps=4, seed=5, iteration=iteration) for iteration in range(100)
    ]
    assert largest_mean([score(rollout) for rollout in rollouts]) < BOUND
    few = rollouts[:50]
    others = [
        replace(rollout, stream=replace(rollout.stream, iteration=100 + iteration))
        for iteration, rollout in enumerate(few)
    ]
    assert largest_mean([score(rollout) for rollout in others]) > FAR
    if isinstance(action_space, spaces.Box):
        clipped = [replace(rollout, actions=rollout.actions.clamp(-0.5, 0.5)) for rollout in few]
        assert largest_mean([score(rollout) for rollout in clipped]) > FAR


class Recording(Policy):
    """Keeps what it was asked for."""

    drawn, differentiated = (), ()

    def sample(self, obs, uniforms, dropout=None):
        actions = super().sample(obs, uniforms, dropout)
        drawn = super().log_probs_and_entropy(obs, actions, dropout)[0]
        self.drawn = (*self.drawn, drawn.clone())
        return actions

    def log_probs_and_entropy(self, obs, actions, dropout=None):
        log_probs, entropy = super().log_probs_and_entropy(obs, actions, dropout)
        self.differentiated = (*self.differentiated, log_probs.detach())
        return log_probs, entropy


@every_distribution
def test_log_probabilities_in_the_update_are_those_at_sampling(monkeypatch, action_space, settings):
    monkeypatch.setattr(update_module, "CHUNK_ROWS", 499)
    policy = with_dropout(Recording, action_space, settings)
    rollout = collect(Noise(action_space, 64), policy, num_steps=4, seed=5, iteration=2)
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    update(policy, optimizer, rollout, torch.ones(rollout.mask.shape), Config())
    drawn = torch.stack(policy.drawn)[rollout.mask]
    torch.testing.assert_close(torch.cat(policy.differentiated), drawn, atol=1e-5, rtol=1e-5)
    assert len(drawn.unique()) > len(drawn) / 20
    undropped = policy.log_probs_and_entropy(
        rollout.obs[rollout.mask], rollout.actions[rollout.mask]
    )[0]
    assert (undropped - drawn).abs().mean() > 0.1
