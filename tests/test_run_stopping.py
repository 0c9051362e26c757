import logging

import pytest
import torch
from gymnasium import spaces

from vecpg.evaluate import EvalResult
from vecpg.policy import Policy
from vecpg.run.stopping import Returned, ReturnWindow, Stopping


class Judge:
    """A confirming evaluation with prepared results, which remembers whom it was shown."""

    def __init__(self, *means):
        self.means, self.shown = list(means), []

    def __call__(self, policy):
        self.shown.append(mark(policy))
        return EvalResult((self.means.pop(0),), (1,))


def marked_policy():
    return Policy(spaces.Box(-1, 1, (1,)), spaces.Discrete(1), hidden_sizes=())


def mark(policy, value=None):
    """Read or write the one number by which a policy is told apart."""
    if value is not None:
        with torch.no_grad():
            policy.network[0].bias.fill_(value)
    return policy.network[0].bias.item()


def returned(returns):
    return Returned(sum(returns), len(returns), min(returns), max(returns))


def run(stopping, *iterations, confirm=None):
    """Let policy k collect the returns of iteration k, then change it, as training does."""
    policy = marked_policy()
    for number, returns in enumerate(iterations):
        mark(policy, number)
        stopping.consider(
            policy, returned(returns), None if confirm is None else lambda: confirm(policy)
        )
        mark(policy, 99.0)
    return stopping


def best_mark(stopping):
    return stopping.best["network.0.bias"].item()


def test_the_window_holds_whole_iterations():
    window = ReturnWindow(5).with_iteration(3.0, 3)
    assert window.mean is None
    window = window.with_iteration(15.0, 3)
    assert window.mean == 3.0
    window = window.with_iteration(18.0, 2)
    # 3 + 2 episodes are enough, so the first iteration goes.
    assert window.mean == (15 + 18) / 5
    assert window.with_iteration(45.0, 10).mean == 4.5


def test_best_is_the_policy_that_collected_the_highest_full_window():
    stopping = run(Stopping(None, 4), [9.0, 9.0], [1.0, 1.0], [8.0, 8.0], [2.0, 2.0])
    # Full windows: (9, 1), (1, 8), (8, 2): means 5, 4.5, 5; the first of equals stays.
    assert stopping.best_return == 5.0
    assert best_mark(stopping) == 1.0
    assert not stopping.solved


def test_a_confirmed_target_ends_the_run_with_the_policy_that_was_confirmed():
    judge = Judge(10.0)
    stopping = run(Stopping(5.0, 2), [4.0, 4.0], [6.0, 6.0], confirm=judge)
    assert stopping.solved
    assert judge.shown == [1.0]
    assert best_mark(stopping) == 1.0
    assert stopping.evaluation.return_mean == 10.0


def test_an_unconfirmed_target_goes_on(caplog):
    caplog.set_level(logging.INFO)
    stopping = run(Stopping(5.0, 2), [9.0, 9.0], [5.0, 5.0], confirm=Judge(4.9, 5.0))
    assert "not confirmed: the window's mean is 9.0, a greedy evaluation gives 4.9" in caplog.text
    assert stopping.solved
    # The confirmed policy is the best, though another window was higher.
    assert best_mark(stopping) == 1.0
    # Of another target that is to be reached it says nothing.
    stopping.forget_solved()
    assert best_mark(stopping) == 0.0


def test_without_confirmation_the_window_alone_decides():
    stopping = run(Stopping(5.0, 2), [5.0, 5.0])
    assert stopping.solved
    assert stopping.evaluation is None


def test_no_target_never_stops():
    assert not run(Stopping(None, 1), [1e9], [1e9]).solved


@pytest.mark.parametrize(("iterations", "said"), [(4, 0), (5, 1), (12, 1)])
def test_equal_returns_are_noticed_once(caplog, iterations, said):
    run(Stopping(None, 3), [1.0, 2.0], *[[-500.0, -500.0]] * iterations)
    assert caplog.text.count("every episode has returned -500 for 5 iterations") == said


def test_returns_that_differ_are_not_called_equal(caplog):
    run(Stopping(None, 3), *[[-500.0, -499.0]] * 9, *[[float(k)] * 2 for k in range(9)])
    assert caplog.text == ""


def test_a_copy_goes_its_own_way_and_what_is_saved_goes_on_where_it_was():
    iterations = [[4.0, 4.0], [2.0, 3.0], [1.0, 1.0], [1.0, 1.0]]
    stopping = run(Stopping(None, 5), *iterations)
    before = stopping.state_dict()
    other = stopping.copy()
    run(other, [9.0, 9.0], [9.0, 9.0])
    assert stopping.state_dict() == before
    assert other.best_return == 6.0 + 1 / 3
    loaded = Stopping(None, 5)
    loaded.load_state_dict(before)
    rest = [[1.0, 1.0], [7.0, 8.0]]
    assert run(loaded, *rest).state_dict().keys() == before.keys()
    whole = run(Stopping(None, 5), *iterations, *rest)
    for name in ("window", "best_return", "equal"):
        assert loaded.state_dict()[name] == whole.state_dict()[name]
    assert best_mark(loaded) == 1.0  # the second of those that went on: 7.5 is its mean


def test_a_confirmation_is_saved_too():
    stopping = run(Stopping(5.0, 2), [6.0, 6.0], confirm=Judge(10.0))
    loaded = Stopping(5.0, 2)
    loaded.load_state_dict(stopping.state_dict())
    assert loaded.solved
    assert loaded.evaluation == EvalResult((10.0,), (1,))
