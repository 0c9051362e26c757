import os
import signal
import threading

import pytest

from vecpg.run.interrupts import Interrupted, Interrupts


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_at_once(signum):
    with pytest.raises(Interrupted, match=signum.name) as caught, Interrupts():
        os.kill(os.getpid(), signum)
    assert caught.value.signum == signum


def test_inside_held_it_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(Interrupted), Interrupts() as interrupts:
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("block")
        done.append("after")
    assert done == ["block"]


def test_an_error_inside_held_is_not_hidden_by_the_signal():
    with pytest.raises(ZeroDivisionError), Interrupts() as interrupts, interrupts.held():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ZeroDivisionError


def test_an_error_on_its_way_is_not_hidden_by_what_is_held_for_it():
    done = []
    with pytest.raises(ZeroDivisionError), Interrupts() as interrupts:
        try:
            raise ZeroDivisionError
        finally:
            with interrupts.held():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("block")
    assert done == ["block"]


def test_after_the_first_signal_the_second_would_end_the_process():
    with pytest.raises(Interrupted), Interrupts() as interrupts, interrupts.held():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_previous_handlers_come_back():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before[0]
    with pytest.raises(Interrupted), Interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_nothing_is_changed():
    failures = []

    def use():
        try:
            with Interrupts() as interrupts, interrupts.held():
                pass
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert failures == []
