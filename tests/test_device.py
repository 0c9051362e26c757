import json

import pytest
import torch

from vecpg import device as device_module
from vecpg.device import faster_device, resolve_device


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
