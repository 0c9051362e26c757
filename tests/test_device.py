import json

import pytest
import torch

from vecpg import device as device_module
from vecpg.device import faster_device, resolve_device
from vecpg.torchrun import Place


def measured(**speeds):
    """Rows as speeds.json has them: for each device, speeds at 8 and 512 environments."""
    return [
        {
            "gpu": "NVIDIA T",
            "vectorization": "tensor",
            "num_envs": num_envs,
            "device": device,
            "p5": 0.9 * speed,
            "median": speed,
            "p95": 1.1 * speed,
        }
        for device, pair in speeds.items()
        for num_envs, speed in zip((8, 512), pair, strict=True)
    ]


def test_auto_without_a_gpu_is_the_cpu_and_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, reason = resolve_device("auto")
    assert device == torch.device("cpu")
    assert "finds no CUDA device here" in reason


def test_auto_with_a_gpu_that_nobody_measured_is_the_cpu_and_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T")
    device, reason = resolve_device("auto", "tensor", 64)
    assert device == torch.device("cpu")
    assert reason == "there is no committed measurement of NVIDIA T with tensor"


@pytest.mark.parametrize("content", [None, "x", "{}"])
def test_auto_without_a_table_is_the_cpu_and_says_why(monkeypatch, tmp_path, content):
    if content is not None:
        (tmp_path / "speeds.json").write_text(content)
    monkeypatch.setattr(device_module, "_SPEEDS", tmp_path / "speeds.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device, reason = resolve_device("auto")
    assert device == torch.device("cpu")
    assert "the measurements cannot be read" in reason


@pytest.mark.parametrize(
    ("cuda", "num_envs", "device"),
    [
        ((200, 200), 64, "cuda"),
        ((200, 200), 1, "cuda"),
        ((200, 200), 4096, "cuda"),
        ((10, 200), 64, "cpu"),
        ((200, 10), 64, "cpu"),
        ((10, 200), 8, "cpu"),
        ((10, 200), 512, "cuda"),
        ((10, 200), 513, "cuda"),
        ((10, 200), 1, "cpu"),
        ((120, 120), 64, "cpu"),  # faster, but not beyond doubt: 108 against 110
    ],
)
def test_cuda_is_taken_only_between_numbers_where_it_was_faster(cuda, num_envs, device):
    rows = measured(cpu=(100, 100), cuda=cuda)
    name, reason = faster_device(rows, "NVIDIA T", "tensor", num_envs)
    assert name == device, reason
    assert "NVIDIA T, tensor x" in reason
    assert faster_device(rows, "NVIDIA T", "sync", num_envs)[0] == "cpu"
    assert faster_device(rows, "NVIDIA U", "tensor", num_envs)[0] == "cpu"


def test_auto_looks_at_the_gpu_the_vectorization_and_the_number(monkeypatch, tmp_path):
    rows = measured(cpu=(100, 100), cuda=(10, 200))
    (tmp_path / "speeds.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(device_module, "_SPEEDS", tmp_path / "speeds.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T")
    asked = [("tensor", 512), ("tensor", 8), ("sync", 512)]
    assert [resolve_device("auto", *each)[0].type for each in asked] == ["cuda", "cpu", "cpu"]


def test_one_device_alone_decides_nothing():
    assert faster_device(measured(cuda=(9, 9)), "NVIDIA T", "tensor", 8)[0] == "cpu"


def test_cpu_is_taken_as_asked():
    assert resolve_device("cpu")[0] == torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "mps", "meta", ""])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(ValueError, match="--device: expected auto, cpu, cuda or cuda:i, got"):
        resolve_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_without_cuda_names_the_way_out(device):
    with pytest.raises(ValueError, match=f"--device {device}: torch .* finds no CUDA device here"):
        resolve_device(device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_that_is_not_there_is_refused():
    assert resolve_device("cuda")[0].type == "cuda"
    with pytest.raises(ValueError, match="expected an index below"):
        resolve_device("cuda:99")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """So many GPUs, and a rank of so many on this machine; CUDA was measured to be faster."""
    rows = measured(cpu=(100, 100), cuda=(200, 200))
    (tmp_path / "speeds.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(device_module, "_SPEEDS", tmp_path / "speeds.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T")

    def make(gpus, rank, ranks):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        # As on the second of two machines.
        place = Place(ranks + rank, 2 * ranks, rank, ranks, 0, 0, "x", "localhost", 1)
        monkeypatch.setattr(device_module, "place", lambda: place)

    return make


@pytest.mark.parametrize("name", ["cuda", "auto"])
def test_each_rank_has_a_gpu_of_its_own(machine, name):
    for rank in range(4):
        machine(4, rank, 4)
        assert resolve_device(name, "tensor", 64)[0] == torch.device("cuda", rank)
    machine(4, 0, 1)
    assert resolve_device(name, "tensor", 64)[0] == torch.device("cuda")


def test_fewer_gpus_than_ranks_are_refused_and_auto_says_why_it_is_the_cpu(machine):
    machine(1, 3, 4)
    lacking = "at least 4 GPUs for 4 ranks on this machine, got 1"
    message = f"--device cuda: expected {lacking}; start fewer ranks, or use --device cpu"
    with pytest.raises(ValueError, match=f"^{message}$"):
        resolve_device("cuda")
    device, reason = resolve_device("auto", "tensor", 64)
    assert (device, reason) == (torch.device("cpu"), f"CUDA takes {lacking}")
    assert resolve_device("cpu") == (torch.device("cpu"), "as asked")


def test_several_ranks_cannot_share_one_gpu(machine):
    machine(4, 1, 2)
    with pytest.raises(
        ValueError, match=r"^--device cuda:0: expected a GPU for each of 2 ranks on"
    ):
        resolve_device("cuda:0")
    machine(4, 0, 1)
    assert resolve_device("cuda:3")[0] == torch.device("cuda:3")
