import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from vecpg.images import SMALL, image_of, num_parameters
from vecpg.policy.convolutions import Convolutions
from vecpg.policy.network import Encoder


def convolved(x, weight, bias, stride, padding):
    """(C, H, W) by a loop over what comes out, in float64."""
    size = weight.shape[-1]
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    rows, columns = ((side + 2 * padding - size) // stride + 1 for side in (x.shape[1], x.shape[2]))
    out = np.empty((len(weight), rows, columns))
    for i in range(rows):
        for j in range(columns):
            seen = padded[:, i * stride : i * stride + size, j * stride : j * stride + size]
            out[:, i, j] = [(kernel * seen).sum() for kernel in weight] + bias
    return out.clip(0)


@pytest.mark.parametrize("layout", ["(H, W)", "(H, W, C)", "(C, H, W)"])
def test_features_are_those_of_a_plain_loop(layout):
    shape = {"(H, W)": (6, 8), "(H, W, C)": (6, 8, 3), "(C, H, W)": (3, 6, 8)}[layout]
    encoder = Encoder(spaces.Box(-1, 1, shape), network="cnn")
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((3, *shape)).astype(np.float32)
    found = encoder(torch.from_numpy(obs)).detach().numpy()
    assert found.shape == (3, encoder.features) == (3, 512)
    numbers = [parameter.detach().double().numpy() for parameter in encoder.parameters()]
    for one, features in zip(obs.astype(np.float64), found, strict=True):
        x = {"(H, W)": one[None], "(C, H, W)": one}.get(layout)
        x = one.transpose(2, 0, 1) if x is None else x
        for layer, weight, bias in zip(SMALL, numbers[0:6:2], numbers[1:6:2], strict=True):
            x = convolved(x, weight, bias, layer.stride, layer.padding)
        expected = (numbers[6] @ x.reshape(-1) + numbers[7]).clip(0)
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(84, 84, 4), (3, 40, 50), (10, 10, 3), (9, 12)])
def test_they_begin_orthogonal_and_are_counted(shape):
    image = image_of(spaces.Box(0, 255, shape, np.uint8))
    body = Convolutions(image)
    assert sum(each.numel() for each in body.parameters()) == num_parameters(image)
    for name, parameter in body.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
            continue
        rows = parameter.detach().reshape(len(parameter), -1)
        short = rows if rows.shape[0] <= rows.shape[1] else rows.t()
        torch.testing.assert_close(
            short @ short.t(), 2 * torch.eye(len(short)), rtol=1e-4, atol=1e-4
        )
    assert torch.equal(body(torch.zeros(1, *shape)), torch.zeros(1, 512))


def test_torchs_default_dtype_is_not_theirs():
    torch.set_default_dtype(torch.float64)
    try:
        body = Convolutions(image_of(spaces.Box(-1, 1, (8, 8))))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {each.dtype for each in body.parameters()} == {torch.float32}


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    encoder = Encoder(spaces.Box(-1, 1, (4, 4, 2)), network="cnn").double()
    obs = torch.randn(3, 4, 4, 2, dtype=torch.float64)
    weights = torch.randn(3, encoder.features, dtype=torch.float64)

    def loss():
        return (encoder(obs) * weights).sum()

    loss().backward()
    rng = np.random.default_rng(0)
    for parameter in encoder.parameters():
        flat, gradient = parameter.detach().reshape(-1), parameter.grad.reshape(-1)
        for place in rng.integers(0, len(flat), 5):
            was, step = flat[place].item(), 1e-6
            with torch.no_grad():
                flat[place] = was + step
                above = loss().item()
                flat[place] = was - step
                below = loss().item()
                flat[place] = was
            slope = (above - below) / (2 * step)
            assert math.isclose(slope, gradient[place].item(), rel_tol=1e-5, abs_tol=1e-6)
