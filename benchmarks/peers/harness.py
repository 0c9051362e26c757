"""What every harness gives, how it is timed, and the check that an environment is CartPole-v1.

A harness is a module with

* NEEDS: the modules that must be importable; none is imported before it is used.
* PACKAGES: the distributions whose versions are printed.
* entrants(): a list of `Entrant`.

and, where it can be compared in seconds to solve, `solve(seed)`.
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import gymnasium
import numpy as np

# One round takes at least so long, or one iteration.
ROUND_SECONDS = 0.4
# So small that policies stay where they began, at about 22 steps an episode.
LEARNING_RATE = 1e-5
LENGTH = 512  # rows of an iteration, or the start window


@dataclass(frozen=True)
class Entrant:
    """One line of one table.

    variants: makes by name. Each checks, compiles and warms up, and gives a function that does some
        work and returns how many steps (or elements) that was, or that and the seconds that count.
        All are tried, and the fastest one is compared.
    unequal: in which way its work is not that of vecpg.
    """

    group: str
    name: str
    variants: dict[str, Callable[[], Callable[[], float]]]
    unequal: str = ""


def training(num_envs):
    return f"training, {num_envs} copies"


def stepping(num_envs):
    return f"stepping with random actions, {num_envs} copies"


def steps_of(envs, actions):
    """What steps a vector environment of arrays, and counts the rows that do not only reset."""

    def step():
        ends = 0
        for row in actions:
            _, _, terminations, truncations, _ = envs.step(row)
            ends += np.count_nonzero(terminations | truncations)
        return actions.size - ends

    return step


def returns(num_envs):
    return f"discounted returns of 128 x {num_envs}"


def why_not(module):
    """Why a harness does not run here, or None."""
    for name in module.NEEDS:
        if importlib.util.find_spec(name) is None:
            return f"not installed: {name}"
    return None


def versions(module):
    return {package: metadata.version(package) for package in module.PACKAGES}


def speed(work):
    """What `work` does in a second; it may give the seconds that count itself."""
    done = seconds = 0.0
    while seconds < ROUND_SECONDS:
        started = time.perf_counter()
        result = work()
        spent = time.perf_counter() - started
        if isinstance(result, tuple):
            result, spent = result
        done += result
        seconds += spent
    return done / seconds


class Balancing:
    """A rule that keeps the pole up for as long as it is let, to see when an episode is cut."""

    weights = np.array([0.1, 0.3, 1.0, 0.5])

    def __call__(self, obs):
        return (np.asarray(obs, np.float64) @ self.weights > 0).astype(np.int64)


def check_limit(step, obs):
    """Under a rule that never lets the pole fall, an episode has 500 steps.

    step: takes actions (N,), gives observations (N, 4) and which episodes ended (N,).
    """
    act = Balancing()
    for t in range(1, 501):
        obs, ended = step(act(obs))
        assert np.all(np.asarray(ended, bool) == (t == 500)), f"an end at step {t}"


def check_rows(obs, actions, following, ended, rows=300):
    """Transitions (B, 4), (B,), (B, 4), (B,) are those of Gymnasium's scalar CartPole.

    Where an episode ended `following` is not looked at.
    """
    env = gymnasium.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    order = np.random.default_rng(0).permutation(len(obs))
    # Ends are rare, and must be among those that are looked at.
    chosen = np.concatenate([order[:rows], order[np.asarray(ended)[order]][:rows]])
    for row in chosen:
        env.state = np.asarray(obs[row], np.float64)
        env.steps_beyond_terminated = None
        expected, _, terminated, _, _ = env.step(int(actions[row]))
        assert bool(ended[row]) == terminated
        if not terminated:
            np.testing.assert_allclose(following[row], expected, atol=1e-5)
