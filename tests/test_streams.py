import io
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from vecpg import streams

TRAIN = [sys.executable, str(ROOT / "scripts" / "train.py")]
BRIEFLY = "--num-envs 4 --total-iterations 3 --eval-episodes 2 --log-every 1e-9"


@pytest.fixture
def pipe():
    """Both ends; the reading one may be closed by the test."""
    reading, writing = os.pipe()
    yield reading, writing
    for end in (reading, writing):
        try:
            os.close(end)
        except OSError:
            assert end == reading


def test_what_nobody_reads_goes_nowhere_and_the_loss_is_known(pipe):
    reading, writing = pipe
    stream = streams._kept(writing, io.TextIOWrapper(io.BytesIO(), line_buffering=True))
    print("read", file=stream)
    assert streams.loss(stream) is None
    assert os.read(reading, 99) == b"read\n"
    os.close(reading)
    for _ in range(3):
        print("lost", file=stream, flush=True)
    assert isinstance(streams.loss(stream), BrokenPipeError)
    # What writes there from C is heard as little, and gets no signal or error either.
    assert os.write(writing, b"lost") == 4


def test_what_is_still_buffered_is_lost_without_an_error(pipe):
    reading, writing = pipe
    stream = streams._kept(writing, io.TextIOWrapper(io.BytesIO()))
    print("x" * 1000, file=stream)
    os.close(reading)
    assert isinstance(streams.loss(stream), BrokenPipeError)
    stream.close()


def test_a_full_disk_is_a_loss_too():
    full = os.open("/dev/full", os.O_WRONLY)
    stream = streams._kept(full, io.TextIOWrapper(io.BytesIO()))
    print("lost", file=stream)
    assert "No space left" in str(streams.loss(stream))
    os.close(full)


def test_what_is_lost_beside_a_stream_is_its_loss_too(pipe):
    kept = os.open(os.devnull, os.O_WRONLY)
    stream = streams._kept(kept, io.TextIOWrapper(io.BytesIO()))
    reading, writing = pipe
    beside = streams.beside(stream, writing)
    os.close(reading)
    print("lost", file=beside, flush=True)
    print("lost", file=beside, flush=True)
    assert isinstance(streams.loss(stream), BrokenPipeError)
    os.close(kept)


def test_beside_any_other_stream_a_loss_is_an_error(pipe):
    reading, writing = pipe
    os.close(reading)
    beside = streams.beside(io.StringIO(), writing)
    with pytest.raises(BrokenPipeError):
        print("lost", file=beside, flush=True)
    with pytest.raises(BrokenPipeError):
        beside.close()


def test_a_stream_is_as_the_one_it_stands_for(pipe):
    before = io.TextIOWrapper(io.BytesIO(), "ascii", "backslashreplace", line_buffering=True)
    stream = streams._kept(pipe[1], before)
    assert not stream.isatty()
    assert stream.fileno() == pipe[1]
    print("ä", file=stream)
    assert os.read(pipe[0], 99) == b"\\xe4\n"


def run_all(commands, cwd):
    """Of commands of a shell that run side by side: statuses, and what they left in files."""
    processes = [
        subprocess.Popen(
            ["bash", "-c", command],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    ended = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *said) for process, said in zip(processes, ended, strict=True)]


@pytest.mark.slow
def test_a_run_whose_streams_are_closed_or_lost_is_trained_to_its_end(tmp_path):
    """The status is 0, but for stdout that was there and is not when the summary is due."""
    train = " ".join([*TRAIN, BRIEFLY])
    first_line, no_stderr, neither, full, first_of_many = run_all(
        [
            f"{train} --exp-name first_line 2>&1 | head -1; exit ${{PIPESTATUS[0]}}",
            f"{train} --exp-name no_stderr 2>&-",
            f"{train} --exp-name neither <&- >&- 2>&-",
            f"{train} --exp-name full >/dev/full",
            f"{train} --num-seeds 4 --out-dir many | head -1; exit ${{PIPESTATUS[0]}}",
        ],
        tmp_path,
    )
    assert first_line == (141, first_line[1], "")
    assert first_line[1].startswith("CartPole-v1 x 4, ")
    assert first_line[1].count("\n") == 1
    assert (no_stderr[0], no_stderr[2]) == (0, "")
    assert json.loads(no_stderr[1])["iterations"] == 3
    assert neither == (0, "", "")
    assert full[:2] == (1, "")
    assert full[2].splitlines()[-1] == "error: stdout cannot be written: No space left on device"
    assert "Traceback" not in full[2]
    assert "ignored" not in full[2]
    assert first_of_many[0] == 141
    assert first_of_many[1].count("\n") == 1
    assert "4 of 4 runs ended" in first_of_many[2]
    assert len(list(tmp_path.glob("many/*/*/summary.json"))) == 4
    assert len(list(tmp_path.glob("runs/*/summary.json"))) == 4
    for run_dir in tmp_path.glob("runs/*"):
        assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3


def test_what_is_only_printed_needs_no_reader_either(tmp_path):
    train = " ".join(TRAIN)
    assert run_all(
        [
            f"{train} --help | true; exit ${{PIPESTATUS[0]}}",
            f"{train} --recipe list >&-",
            f"{train} --gama 1 2>&-",
            f"{train} --help >/dev/full",
        ],
        tmp_path,
    ) == [
        (141, "", ""),
        (0, "", ""),
        (2, "", ""),
        (1, "", "error: stdout cannot be written: No space left on device\n"),
    ]
