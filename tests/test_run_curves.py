import os
import time

import pytest
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from vecpg.run.curves import Curves, cut


def test_a_curve_goes_on_in_a_file_that_sorts_behind(tmp_path, monkeypatch):
    """Even on the same second, or when the clock was put back."""
    for number, second in enumerate((1000.0, 1000.0, 500.0, 2000.0)):
        monkeypatch.setattr(time, "time", lambda second=second: second)
        Curves(tmp_path).close()
        names = sorted(path.name for path in tmp_path.iterdir())
        assert len(names) == number + 1
        assert names[-1].endswith(f".{number:06d}")


def drawn(path):
    curves = Curves(path)
    curves.describe({"num_envs": 4})
    for step in (3, 10, 12):
        curves.draw({"charts/episodic_return": float(step)}, step)
    curves.draw({"eval/episodic_return": 1.0}, 12)
    curves.close()
    (file,) = path.iterdir()
    return file


def test_every_record_is_one_that_tensorboard_reads(tmp_path):
    """Its reader compares the checksums, ours does not."""
    file = drawn(tmp_path)
    events = [Event.FromString(record) for record in RawEventFileLoader(str(file)).Load()]
    assert events[0].file_version == "brain.Event:2"
    assert [event.step for event in events[-4:]] == [3, 10, 12, 12]
    before = file.read_bytes()
    assert cut(tmp_path, 12) == 12
    kept = file.read_bytes()
    assert before.startswith(kept)
    again = [Event.FromString(record) for record in RawEventFileLoader(str(file)).Load()]
    assert again == events[:-1]
    assert cut(tmp_path, 5) == 3
    assert cut(tmp_path, 0) == 0
    assert len(list(RawEventFileLoader(str(file)).Load())) == len(events) - 4


@pytest.mark.parametrize("rest", [b"\0" * 64, b"\xff" * 64, os.urandom(7)])
def test_what_was_never_written_whole_is_cut(tmp_path, rest):
    """After a loss of power the end of a file may be zeros, or anything."""
    file = drawn(tmp_path)
    whole = file.read_bytes()
    cut(tmp_path, 12)
    kept = file.read_bytes()
    file.write_bytes(kept + rest)
    assert cut(tmp_path, 12) == 12
    assert file.read_bytes() == kept
    # In the middle of a record, at every byte.
    for size in range(len(kept), len(kept) - 40, -1):
        file.write_bytes(whole[:size])
        assert cut(tmp_path, 12) == (12 if size == len(kept) else 10)
