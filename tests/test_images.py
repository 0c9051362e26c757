import numpy as np
import pytest
import torch
from gymnasium import spaces

from vecpg.images import (
    LARGE,
    SMALL,
    Image,
    image_of,
    layers_for,
    num_parameters,
    outputs_of,
    resolve_network,
)


def picture(*shape, of=np.uint8):
    return spaces.Box(0, 255, shape, of)


@pytest.mark.parametrize(
    ("space", "network"),
    [
        (picture(210, 160, 3), "cnn"),
        (picture(4, 84, 84), "cnn"),
        (picture(84, 84), "cnn"),
        (picture(8, 8), "cnn"),
        (picture(7, 8), "mlp"),
        (picture(7, 7, 3), "mlp"),  # MiniGrid's, which is a table of numbers
        (picture(3, 210), "mlp"),
        (picture(128), "mlp"),  # Atari's memory
        (picture(4, 84, 84, 3), "mlp"),
        (picture(84, 84, 3, of=np.float32), "mlp"),
        (spaces.Box(0, 127, (84, 84, 3), np.int8), "mlp"),
        (spaces.MultiBinary((84, 84)), "mlp"),
        (spaces.Discrete(5), "mlp"),
        (spaces.Dict({"a": picture(84, 84)}), "mlp"),
    ],
    ids=str,
)
def test_auto_takes_convolutions_for_images_of_uint8(space, network):
    assert resolve_network("auto", space) == network
    for asked in ("mlp", "cnn", "mine:f"):
        assert resolve_network(asked, space) == asked


@pytest.mark.parametrize(
    ("shape", "image"),
    [
        ((5, 7), Image(5, 7, 1, False)),
        ((5, 7, 3), Image(5, 7, 3, False)),
        ((3, 5, 7), Image(5, 7, 3, True)),
        ((5, 4, 6), Image(4, 6, 5, True)),
        ((5, 9, 5), Image(5, 9, 5, False)),
        ((1, 9, 1), Image(1, 9, 1, False)),
    ],
)
def test_the_smaller_end_is_that_of_the_channels_and_of_equal_ones_the_last(shape, image):
    assert image_of(picture(*shape)) == image


@pytest.mark.parametrize(
    "space", [picture(9), picture(1, 2, 3, 4), spaces.Discrete(3), spaces.MultiBinary(5)], ids=str
)
def test_what_is_no_image_is_refused_with_what_is(space):
    message = (
        rf"--network cnn: expected images, a Box of shape .* got a {type(space).__name__} of shape"
    )
    with pytest.raises(ValueError, match=message):
        image_of(space)


@pytest.mark.parametrize("sides", [(36, 36), (36, 200), (84, 84), (210, 160), (37, 43)])
def test_large_images_go_through_the_kernels_of_mnih_et_al(sides):
    image = Image(*sides, 4, True)
    assert layers_for(image) == LARGE
    x = torch.zeros(1, 4, *sides)
    for (channels, kernel, stride, padding), expected in zip(LARGE, outputs_of(image), strict=True):
        x = torch.nn.functional.conv2d(
            x, torch.zeros(channels, x.shape[1], kernel, kernel), stride=stride, padding=padding
        )
        assert tuple(x.shape[1:]) == expected


@pytest.mark.parametrize("sides", [(35, 36), (36, 35), (10, 10), (8, 9), (2, 300), (1, 1)])
def test_smaller_ones_go_through_smaller_kernels(sides):
    image = Image(*sides, 3, True)
    assert layers_for(image) == SMALL
    x = torch.zeros(1, 3, *sides)
    for (channels, kernel, stride, padding), expected in zip(SMALL, outputs_of(image), strict=True):
        x = torch.nn.functional.conv2d(
            x, torch.zeros(channels, x.shape[1], kernel, kernel), stride=stride, padding=padding
        )
        assert tuple(x.shape[1:]) == expected


def test_there_are_as_many_parameters_as_in_the_paper():
    # Of convolutions with 8 x 8 x 4, 4 x 4 x 32 and 3 x 3 x 64 weights and a bias, and a layer.
    by_hand = 32 * 257 + 64 * 513 + 64 * 577 + 512 * (7 * 7 * 64 + 1)
    assert num_parameters(Image(84, 84, 4, True)) == by_hand
