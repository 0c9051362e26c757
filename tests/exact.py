"""Small decision processes with tables for everything, and their gradients without sampling.

The expectation is by dynamic programming over the states and the steps that are left, in float64;
nothing of vecpg is used here.
"""

from dataclasses import dataclass, replace

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

LEFT, RIGHT = 0, 1


@dataclass(frozen=True)
class World:
    """A decision process of S states and A actions, and the logits of a policy for it.

    start:    (S,)       probability of an episode's first state
    moves:    (S, A, S)  probability of the next state
    rewards:  (S, A, S)  what the move pays
    terminal: (S,) bool  an episode that gets here is over
    limit:               an episode of this many steps is cut
    logits:   (S, A)     pi(a|s) = softmax(logits[s])[a]
    values:   (S,)       any numbers, for a baseline that knows nothing
    allowed:  (S, A) bool, or None where all is: pi is the softmax over what is allowed
    """

    start: np.ndarray
    moves: np.ndarray
    rewards: np.ndarray
    terminal: np.ndarray
    limit: int
    logits: np.ndarray
    values: np.ndarray
    allowed: np.ndarray | None = None

    @property
    def policy(self):
        """(S, A) probabilities."""
        odds = np.exp(self.logits)
        if self.allowed is not None:
            odds = np.where(self.allowed | self.terminal[:, None], odds, 0.0)
        return odds / odds.sum(axis=1, keepdims=True)


def line_world():
    """States 0 to 4 from 0: -1 a step, but +10 for the one that reaches 4. At most 100 steps."""
    moves, rewards = np.zeros((5, 2, 5)), np.full((5, 2, 5), -1.0)
    for state in range(4):
        moves[state, LEFT, max(state - 1, 0)] = 1
        moves[state, RIGHT, state + 1] = 1
    rewards[:, :, 4] = 10
    logits = np.array([[-0.6, 0.5], [0.2, 1.1], [-0.5, 0.0], [0.3, 1.3], [0.7, -0.4]])
    values = np.array([3.0, -2.0, 6.0, 1.0, -4.0])
    return World(np.eye(5)[0], moves, rewards, np.arange(5) == 4, 100, logits, values)


def slip_world():
    """States 0 to 4, from one of the first three: back, stay, ahead, and every fifth move slips.

    A move that slips is one of the other two. Every move pays, and the one to state 4 ends the
    episode, which is cut after 12 steps.
    """
    moves, rewards = np.zeros((5, 3, 5)), np.zeros((5, 3, 5))
    for state in range(4):
        for action in range(3):
            for shift in range(3):
                following = max(state + shift - 1, 0)
                moves[state, action, following] += 0.8 if shift == action else 0.1
                rewards[state, action, following] = 0.5 * action - 1 + 0.75 * (following % 2)
    rewards[:, :, 4] = 6
    logits = np.array(
        [[-0.5, -0.2, 1.0], [-0.9, 0.0, 0.8], [0.1, -0.6, 1.2], [-0.4, 0.2, 0.7], [0.9, -0.9, 0.1]]
    )
    values = np.array([2.0, -1.0, 4.0, 0.5, 7.0])
    start = np.array([0.5, 0.2, 0.3, 0, 0])
    return World(start, moves, rewards, np.arange(5) == 4, 12, logits, values)


def fenced_world():
    """The world that slips, but not every move is allowed: in one state two are, in one a single.

    What is forbidden would pay best, and the network wants it most. Where an episode is over
    nothing is allowed.
    """
    world = slip_world()
    allowed = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]], bool)
    forbidden = ~allowed & ~world.terminal[:, None]
    rewards = world.rewards + 50.0 * forbidden[:, :, None]
    return replace(world, rewards=rewards, logits=world.logits + 3.0 * forbidden, allowed=allowed)


def exact_gradient(world, weights, gamma):
    """(S, A): E sum over t of grad log pi(a_t|s_t) w_t over one episode.

    The gradient of log pi(a|s) in logits[s, b] is (a == b) - pi(b|s), with pi(b|s) = 0 where b is
    not allowed. Given the state and the steps
    that are left, what is expected of its product with the rewards from here on is therefore
    pi(b|s) (Q(s, b) - V(s)); with what was paid before, 0. In the full return the rewards from age
    t on are discounted by gamma^t more than in the reward-to-go.
    """
    policy = world.policy
    q_of = np.zeros((world.limit + 1, *policy.shape))
    value = np.zeros(len(policy))  # with no step left
    for left in range(1, world.limit + 1):
        q_of[left] = (world.moves * (world.rewards + gamma * value)).sum(axis=2)
        value = np.where(world.terminal, 0.0, (policy * q_of[left]).sum(axis=1))
    total, here = np.zeros_like(policy), world.start
    for age in range(world.limit):
        q = q_of[world.limit - age]
        advantage = q - (policy * q).sum(axis=1, keepdims=True)
        discount = gamma**age if weights == "full_return" else 1.0
        total += discount * here[:, None] * policy * advantage
        here = _following(world, here)
    return total


def expected_return(world, gamma):
    """E sum over t of gamma^t r_t, by where the episode is at each age: no values, no Q."""
    total, here = 0.0, world.start
    for age in range(world.limit):
        paid = (world.moves * world.rewards).sum(axis=2)
        total += gamma**age * (here[:, None] * world.policy * paid).sum()
        here = _following(world, here)
    return total


def _following(world, here):
    """Where an episode that is not over is one step later."""
    following = np.einsum("s,sa,sat->t", here, world.policy, world.moves)
    return np.where(world.terminal, 0.0, following)


class Tables(gymnasium.vector.VectorEnv):
    """Many copies of a world at once: a vector environment with one generator for all."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, world, num_envs):
        self.world, self.num_envs = world, num_envs
        states, actions = world.logits.shape
        self.single_observation_space = spaces.Discrete(states)
        self.single_action_space = spaces.Discrete(actions)
        self.thresholds = world.moves.cumsum(axis=2)

    def _infos(self):
        allowed = self.world.allowed
        return {} if allowed is None else {"action_mask": allowed[self.state]}

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.state, self.age = self._starts(), np.zeros(self.num_envs, int)
        self.over = np.zeros(self.num_envs, bool)
        return self.state.copy(), self._infos()

    def step(self, actions):
        resets, state = self.over, self.state
        if self.world.allowed is not None:
            assert (self.world.allowed[state, actions] | resets).all()
        draws = self.rng.random(self.num_envs)
        following = (self.thresholds[state, actions] <= draws[:, None]).sum(axis=1)
        # The last threshold of a row may be 1 - 1e-16; a terminal state has none.
        following = np.minimum(following, len(self.world.start) - 1)
        rewards = np.where(resets, 0.0, self.world.rewards[state, actions, following])
        self.state = np.where(resets, self._starts(), following)
        self.age = np.where(resets, 0, self.age + 1)
        terminations = ~resets & self.world.terminal[self.state]
        truncations = ~resets & (self.age == self.world.limit)
        self.over = terminations | truncations
        return self.state.copy(), rewards, terminations, truncations, self._infos()

    def _starts(self):
        return self.rng.choice(len(self.world.start), self.num_envs, p=self.world.start)


class Noise(gymnasium.vector.VectorEnv):
    """Observations that nothing has an influence on; episodes of 3 to 5 steps."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, action_space, num_envs):
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (3,))
        self.single_action_space = action_space

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.left = self.rng.integers(3, 6, self.num_envs)
        return self._obs(), {}

    def step(self, actions):
        assert self.single_action_space.contains(actions[0])
        begins = self.left == 0
        self.left = np.where(begins, self.rng.integers(3, 6, self.num_envs), self.left - 1)
        nothing = np.zeros(self.num_envs)
        return self._obs(), nothing, self.left == 0, nothing > 0, {}

    def _obs(self):
        return self.rng.standard_normal((self.num_envs, 3)).astype(np.float32)
