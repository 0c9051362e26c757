import gc
import os
import signal
import sys
import threading
import time

import pytest

from vecpg import signals
from vecpg.run import interrupts as module
from vecpg.run.interrupts import Interrupted, Interrupts

HANDLED = (*signals.STOPPING, signal.SIGUSR1)


def send(*signums):
    for signum in signums:
        os.kill(os.getpid(), signum)


@pytest.fixture(autouse=True)
def _nothing_is_left():
    """Handlers, descriptors, threads and hooks are afterwards what they were."""

    def now():
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        handlers = [signal.getsignal(signum) for signum in HANDLED]
        return handlers, wakeup, os.listdir("/proc/self/fd"), sys.unraisablehook

    gc.collect()  # what another test has left open is closed now
    before = now()
    yield
    assert now() == before
    assert "vecpg-signals" not in [thread.name for thread in threading.enumerate()]
    assert Interrupts._outermost is None


@pytest.fixture
def ended(monkeypatch):
    """The statuses with which a second signal would have ended this process."""
    statuses = []
    monkeypatch.setattr(
        signals, "end_process", lambda signum: statuses.append(signals.exit_status(signum))
    )
    return statuses


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("signum", signals.STOPPING)
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


@pytest.mark.parametrize("second", signals.STOPPING)
def test_a_second_signal_ends_the_process_even_while_the_main_thread_is_busy(
    ended, monkeypatch, second
):
    """The main thread runs nothing of Python's meanwhile: its lock is released, and it waits."""
    monkeypatch.setattr(module, "_SAME", 0.0)
    monkeypatch.setattr(module, "_SAME_HANGUP", 0.0)
    with pytest.raises(Interrupted), Interrupts() as interrupts, interrupts.held():
        send(signal.SIGTERM)
        assert ended == []
        time.sleep(0.01)
        send(second)
        wait_for(lambda: ended)
    assert ended == [130 if second == signal.SIGINT else 143]


@pytest.mark.parametrize(
    ("signum", "name"), [(signal.SIGTERM, "_SAME"), (signal.SIGHUP, "_SAME_HANGUP")]
)
def test_a_signal_that_is_sent_twice_is_one(ended, monkeypatch, signum, name):
    """`timeout` and terminals that close do so."""
    monkeypatch.setattr(module, "_SAME", 0.0)
    monkeypatch.setattr(module, "_SAME_HANGUP", 0.0)
    monkeypatch.setattr(module, name, 1e6)
    with pytest.raises(Interrupted), Interrupts() as interrupts, interrupts.held():
        send(signum)
        time.sleep(0.01)
        send(signum)
        time.sleep(0.05)
    assert ended == []


def test_a_terminal_that_closes_reaches_ranks_as_one_signal(ended, monkeypatch):
    """Torchrun makes SIGTERM of the second SIGHUP."""
    monkeypatch.setattr(module, "_SAME", 0.0)
    monkeypatch.setattr(module, "_SAME_HANGUP", 1e6)
    with pytest.raises(Interrupted), Interrupts() as interrupts, interrupts.held():
        send(signal.SIGHUP)
        time.sleep(0.01)
        send(signal.SIGTERM)
        time.sleep(0.05)
    assert ended == []


def test_other_signals_end_nothing(ended, monkeypatch):
    monkeypatch.setattr(module, "_SAME", 0.0)
    before = signal.signal(signal.SIGUSR2, lambda *args: None)
    try:
        with pytest.raises(Interrupted), Interrupts(lambda: None) as interrupts, interrupts.held():
            send(signal.SIGTERM)
            time.sleep(0.01)
            send(signal.SIGUSR1, signal.SIGUSR2)
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert ended == []


@pytest.mark.parametrize("signum", signals.STOPPING)
def test_the_previous_handlers_come_back(signum):
    before = [signal.getsignal(each) for each in HANDLED]
    with Interrupts(lambda: None):
        assert all(
            signal.getsignal(each) != handler for each, handler in zip(HANDLED, before, strict=True)
        )
    with pytest.raises(Interrupted), Interrupts(lambda: None):
        send(signum)
    assert [signal.getsignal(each) for each in HANDLED] == before


@pytest.mark.parametrize("signum", HANDLED)
def test_what_is_ignored_stays_ignored(signum):
    """nohup, and a shell's &: also after another signal."""
    before = signal.signal(signum, signal.SIG_IGN)
    other = signal.SIGINT if signum == signal.SIGTERM else signal.SIGTERM
    try:
        with pytest.raises(Interrupted, match=other.name), Interrupts(pytest.fail) as interrupts:
            send(signum)
            with interrupts.held():
                send(other)
                assert signal.getsignal(signum) is signal.SIG_IGN
        assert signal.getsignal(signum) is signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def test_one_within_another_leaves_the_signals_to_it(monkeypatch):
    monkeypatch.setattr(signals, "remark", "; nothing to resume")
    with pytest.raises(Interrupted), Interrupts():
        handler = signal.getsignal(signal.SIGTERM)
        assert signals.remark
        with Interrupts(lambda: None) as inner:
            assert signal.getsignal(signal.SIGTERM) == handler
            assert signals.remark == ""
            with inner.held():
                send(signal.SIGTERM)
        pytest.fail("it should have been raised")


def test_what_was_swallowed_is_raised_again():
    done = []
    with pytest.raises(Interrupted), Interrupts() as interrupts:
        try:
            send(signal.SIGTERM)
        except BaseException:
            done.append("swallowed")
        with interrupts.held():
            done.append("held")
        done.append("after")
    assert done == ["swallowed", "held"]
    with pytest.raises(Interrupted), Interrupts():
        try:
            send(signal.SIGTERM)
        except BaseException:
            done.append("swallowed")
        done.append("to the end")
    assert done == ["swallowed", "held", "swallowed", "to the end"]


def test_what_came_out_as_another_error_is_a_signal_still():
    """As of an import, in C. But not what fails afterwards: saving, say."""
    with pytest.raises(Interrupted), Interrupts():
        try:
            send(signal.SIGTERM)
        except Interrupted:
            raise ImportError("numpy failed to import") from None
    with pytest.raises(OSError, match="full"), Interrupts() as interrupts:
        try:
            send(signal.SIGTERM)
        finally:
            with interrupts.held():
                raise OSError("the disk is full")


def test_where_it_cannot_be_raised_it_is_raised_later_without_a_word(capsys):
    class Old:
        def __del__(self):
            send(signal.SIGTERM)

    done = []
    with pytest.raises(Interrupted), Interrupts() as interrupts:
        Old()
        with interrupts.held():
            done.append("block")
    assert done == ["block"]
    assert capsys.readouterr().err == ""


def test_sigusr1_saves_at_once_and_goes_on():
    saved = []
    with Interrupts(lambda: saved.append("saved")) as interrupts:
        send(signal.SIGUSR1)
        assert saved == ["saved"]
        send(signal.SIGUSR1)
        assert saved == ["saved"] * 2
        with interrupts.held():
            pass
    assert saved == ["saved"] * 2


def test_sigusr1_waits_where_the_state_changes():
    saved = []
    with Interrupts(lambda: saved.append("saved")) as interrupts:
        with interrupts.held():
            send(signal.SIGUSR1, signal.SIGUSR1)
            saved.append("block")
        assert saved == ["block", "saved"]
        with interrupts.held():
            pass
    assert saved == ["block", "saved"]


def test_what_cannot_be_saved_in_between_is_told_where_it_can_be():
    """Raised where SIGUSR1 comes, it would be an error of the environment."""
    tries = []

    def full():
        tries.append(True)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"), Interrupts(full) as interrupts:
        send(signal.SIGUSR1)
        assert len(tries) == 1
        with interrupts.held():
            pass
        pytest.fail("it should have been raised")
    assert len(tries) == 2


def test_a_signal_while_sigusr1_saves_waits_until_it_is_saved():
    done = []

    def save():
        send(signal.SIGTERM, signal.SIGUSR1)
        done.append("saved")

    with pytest.raises(Interrupted), Interrupts(save):
        send(signal.SIGUSR1)
        done.append("went on")
    assert done == ["saved"]


def test_who_is_stopped_is_not_saved_twice():
    with pytest.raises(Interrupted), Interrupts(pytest.fail) as interrupts, interrupts.held():
        send(signal.SIGUSR1, signal.SIGTERM)


def test_without_something_to_save_sigusr1_is_left_as_it_was():
    got = []
    before = signal.signal(signal.SIGUSR1, lambda *args: got.append(True))
    try:
        with Interrupts():
            send(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert got == [True]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it has threads, and forks
def test_a_forked_child_is_on_its_own(ended, monkeypatch):
    """What it gets is none of its parent's, who would take it for a first signal."""
    monkeypatch.setattr(module, "_SAME", 0.0)
    with pytest.raises(Interrupted), Interrupts() as interrupts, interrupts.held():
        child = os.fork()
        if child == 0:
            before = signal.signal(signal.SIGTERM, lambda *args: None)
            send(signal.SIGTERM)
            signal.signal(signal.SIGTERM, before)
            try:
                with Interrupts() as own, own.held():
                    for _ in range(2):
                        send(signal.SIGTERM)
                        time.sleep(0.01)
                    wait_for(lambda: ended)
            except Interrupted:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        send(signal.SIGTERM)
        time.sleep(0.05)
    assert ended == []


@pytest.mark.slow
def test_a_signal_to_a_forked_child_is_its_own():
    """Sent at once, while it may still have what its parent has."""
    with Interrupts():
        for _ in range(30):
            child = os.fork()
            if child == 0:
                time.sleep(20)
                os._exit(0)
            os.kill(child, signal.SIGTERM)
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


def test_in_another_thread_nothing_is_changed():
    failures = []

    before = [signal.getsignal(signum) for signum in HANDLED]

    def use():
        try:
            with Interrupts(lambda: None) as interrupts, interrupts.held():
                assert [signal.getsignal(signum) for signum in HANDLED] == before
        except (ValueError, AssertionError) as error:
            failures.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert failures == []
