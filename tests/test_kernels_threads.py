import concurrent.futures
import contextlib
import threading
import time

import pytest
import torch

from vecpg.kernels import threads


def test_results_come_in_order_whoever_was_first():
    last_is_done = threading.Event()

    def slow_first(block):
        if block == 0:
            assert last_is_done.wait(30)
        elif block == 8:
            last_is_done.set()
        return block, threading.get_ident()

    with threads.using(3):
        results = threads.run(slow_first, 9)
    assert [block for block, _ in results] == list(range(9))
    assert results[0][1] != results[8][1]


def test_the_number_is_torchs_unless_said_otherwise():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert threads.count() == 2
        with threads.using(7), threads.using(5):
            assert threads.count() == 5
        assert threads.count() == 2
    finally:
        torch.set_num_threads(before)


def overlapping(first, second, inside=lambda: None):
    """Enter `first` here and `second` in a thread of its own, and leave them in that order."""
    entered, left = threading.Event(), threading.Event()

    def other():
        with second:
            inside()
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    with first:
        thread.start()
        assert entered.wait(10)
    left.set()
    thread.join(10)


def in_a_new_thread(ask):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(ask).result()


def test_a_number_is_that_of_the_thread_that_said_it():
    torch.set_num_threads(2)
    heard = []
    overlapping(threads.using(7), threads.using(5), lambda: heard.append(threads.count()))
    overlapping(threads.using(7), contextlib.nullcontext(), lambda: heard.append(threads.count()))
    assert heard == [5, 2]
    assert threads.count() == in_a_new_thread(threads.count) == 2


def test_torchs_number_is_as_before_whoever_leaves_last():
    torch.set_num_threads(3)
    heard = []
    with threads.torch_using(2), threads.torch_using(1):
        heard.append(torch.get_num_threads())
    with pytest.raises(KeyError), threads.torch_using(1):
        raise KeyError
    overlapping(
        threads.torch_using(1),
        threads.torch_using(2),
        lambda: heard.append(torch.get_num_threads()),
    )
    assert heard == [1, 2]
    assert torch.get_num_threads() == in_a_new_thread(torch.get_num_threads) == 3


@pytest.mark.parametrize("number", [1, 3])
def test_an_error_is_raised_when_every_thread_is_done_and_nothing_more_is_begun(number):
    begun, ended = [], []

    def task(block):
        begun.append(block)
        if block == 1:
            raise KeyError(block)
        time.sleep(0.1)
        ended.append(block)

    with threads.using(number), pytest.raises(KeyError):
        threads.run(task, 50)
    assert sorted(begun) == sorted([*ended, 1])
    assert len(begun) < 10


def test_an_interrupt_leaves_no_thread_at_work():
    """The memory it writes to may be given back."""
    begun, ended = threading.Barrier(3, timeout=30), []

    def task(block):
        begun.wait()
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        time.sleep(0.3)
        ended.append(block)

    with threads.using(3), pytest.raises(KeyboardInterrupt):
        threads.run(task, 3)
    assert len(ended) == 2


def test_an_interrupt_while_a_thread_is_given_work_waits_for_it(monkeypatch):
    begun, finished = threading.Event(), []

    class Interrupted(concurrent.futures.ThreadPoolExecutor):
        def submit(self, *arguments):
            super().submit(*arguments)
            assert begun.wait(10)
            raise KeyboardInterrupt  # before anybody knows the future

    def slow(block):
        begun.set()
        time.sleep(0.2)
        finished.append(block)

    with Interrupted(2) as pool:
        monkeypatch.setattr(threads, "_pool", pool)
        with threads.using(2), pytest.raises(KeyboardInterrupt):
            threads.run(slow, 2)
        assert finished == [0]
