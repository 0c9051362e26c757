import pytest
import torch
from pretend import pretended

from vecpg.kernels.announce import anew
from vecpg.kernels.graphs import capture


def test_on_the_host_it_is_the_function_itself():
    def function():
        raise AssertionError("it is not called")

    assert capture(function, torch.device("cpu"), "doing") is function


def test_what_was_recorded_is_done_again_on_the_same_memory():
    with pretended() as device:
        total, step, calls = torch.zeros(2, device="cuda"), torch.ones(2, device="cuda"), []

        def function():
            calls.append(0)
            total.add_(step * 2)

        again = capture(function, total.device, "adding")
        # The first call has its effects, the recorded one has none.
        assert (len(calls), total.tolist()) == (2, [2, 2])
        step.fill_(3.0)
        device.clear()
        again()
        assert (len(calls), total.tolist()) == (2, [8, 8])
        assert device.operations.of() == 1


def test_the_first_call_is_after_what_was_given_before_and_before_what_follows(monkeypatch):
    with pretended():
        order, device = [], torch.device("cuda", 0)
        waits = lambda stream, other: order.append((stream, other))  # noqa: E731
        monkeypatch.setattr(torch.cuda.Stream, "wait_stream", waits)
        current = torch.cuda.current_stream()
        capture(lambda: order.append(torch.cuda.current_stream()), device, "asking")
        side = order[1]
        assert order[:3] == [(side, current), side, (current, side)]
        assert side is not current


def test_what_cannot_be_recorded_is_done_op_by_op_and_the_log_says_why_once(caplog):
    caplog.set_level("INFO", "vecpg")
    with anew(), pretended():
        total = torch.zeros(2, device="cuda")

        def waiting():
            total.add_(total.max().item() + 1)

        for _ in range(2):
            assert capture(waiting, total.device, "adding up") is waiting
        waiting()
        assert total.tolist() == [7, 7]
    (said,) = caplog.messages
    assert said.startswith(
        "adding up: op by op, as a CUDA graph cannot hold it: operation not perm"
    )


def test_the_log_has_the_first_reason_and_the_stream_is_as_before_where_torch_cannot_end(
    caplog, monkeypatch
):
    """As `torch.cuda.graph` fails: its end raises too, before its stream is given back."""
    with anew(), pretended():
        total, before = torch.zeros(2, device="cuda"), torch.cuda.current_stream()

        class Graph:
            def __init__(self, graph, stream, capture_error_mode):
                self.entered = torch.cuda.stream(stream)

            def __enter__(self):
                self.entered.__enter__()

            def __exit__(self, *raised):
                raise RuntimeError("operation failed due to a previous error during capture")

        monkeypatch.setattr(torch.cuda, "graph", Graph)
        calls = []

        def waiting():
            calls.append(0)
            if len(calls) == 2:
                raise RuntimeError("operation not permitted when stream is capturing")

        assert capture(waiting, total.device, "waiting") is waiting
        assert torch.cuda.current_stream() is before
    (said,) = caplog.messages
    assert said.endswith("cannot hold it: operation not permitted when stream is capturing")


def test_what_fails_without_a_graph_is_no_matter_of_graphs():
    def failing():
        raise RuntimeError("sizes do not match")

    with pretended(), pytest.raises(RuntimeError, match="sizes do not match"):
        capture(failing, torch.device("cuda", 0), "failing")
