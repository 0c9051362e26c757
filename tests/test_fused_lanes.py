import random
import threading

import numpy as np
import pytest

from vecpg.fused.lanes import share


class Ring:
    """Iterations that came to (number, run), in so many slots; what is written over is lost."""

    def __init__(self, runs, slots):
        self.runs, self.slots = runs, slots
        self.launched = self.released = 0
        self.kept = {}
        self.restored = []

    @property
    def room(self):
        return self.slots - 1 - (self.launched - self.released)

    def iterate(self):
        assert self.room > 0
        self.kept[self.launched % self.slots] = self.launched
        self.launched += 1

    def read(self, first, count):
        assert self.released <= first
        assert first + count <= self.launched
        numbers = [self.kept[k % self.slots] for k in range(first, first + count)]
        entries = np.array([[(number, run) for run in range(self.runs)] for number in numbers])
        return entries, entries

    def acted(self, run, number):
        return {"of": (run, self.kept[number % self.slots])}

    def restore(self, run, number, policy, optimizer):
        self.restored.append((run, number))

    def release(self, number):
        self.released = max(self.released, number + 1)


def go(lane, iterations, reads, found, failures):
    """Some iterations of a run, of which it reads so many at a time, or fewer."""
    try:
        read, rng = 0, random.Random(lane.run)
        while read < iterations:
            if lane.room and lane.launched < iterations:
                lane.iterate()
            count = lane.launched - read
            if count >= reads or not lane.room or lane.launched == iterations:
                entries, _ = lane.read(read, count)
                found.extend(entries[:, lane.run].tolist())
                assert lane.acted(lane.run, read)["of"] == (lane.run, read)
                read += count
                lane.release(read - 1)
            if rng.random() < 0.1:
                threading.Event().wait(0.001)
    except BaseException as error:
        failures.append(error)
    finally:
        lane.leave()
        lane.leave()  # whoever has left may leave


@pytest.mark.parametrize("slots", [4, 32])
def test_each_sees_its_own_iterations_in_order_however_far_the_others_are(slots):
    lengths, reads = [50, 7, 50, 23, 1], [1, 2, 40, 5, 1]
    ring = Ring(len(lengths), slots)
    lanes = share(ring, len(lengths))
    found, failures = [[] for _ in lanes], []
    threads = [
        threading.Thread(target=go, args=(*each, failures), daemon=True)
        for each in zip(lanes, lengths, reads, found, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
    for run, length in enumerate(lengths):
        assert found[run] == [[number, run] for number in range(length)]
    # None was launched twice, nor for nobody.
    assert ring.launched == max(lengths)


def test_one_that_is_ahead_waits_for_those_behind():
    ring = Ring(2, 3)
    one, other = share(ring, 2)
    one.iterate()
    one.iterate()
    assert (one.room, other.room) == (0, 2)
    one.release(1)
    assert (one.room, ring.released) == (2, 0)
    waits = threading.Thread(target=one.iterate, daemon=True)
    waits.start()
    waits.join(0.05)
    assert waits.is_alive()
    other.iterate()
    assert other.launched == 1
    assert ring.launched == 2
    other.release(0)
    waits.join(30)
    assert not waits.is_alive()
    assert ring.launched == 3
    one.restore(0, 1, None, None)
    assert ring.restored == [(0, 1)]
