import pytest
import torch

from vecpg.device import resolve_device


def test_auto_is_the_cpu_and_says_why():
    device, reason = resolve_device("auto")
    assert device == torch.device("cpu")
    assert "measurement" in reason


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
