"""Images as observations: which network is for them, how they lie, how large convolutions are.

No torch is imported here: memory is counted before it is loaded.
"""

import math
from typing import Any, NamedTuple

from gymnasium import spaces

# Below this an image is taken for a table of numbers.
_LEAST_SIDE = 8
# On a smaller side the kernels of Mnih et al. (2015) do not fit.
_LEAST_LARGE_SIDE = 36


class Image(NamedTuple):
    """What there is in one observation.

    channels_first: it is (C, H, W); else (H, W, C) or (H, W).
    """

    height: int
    width: int
    channels: int
    channels_first: bool


class Layer(NamedTuple):
    """A convolution: `channels` come out of it. A ReLU follows."""

    channels: int
    kernel: int
    stride: int
    padding: int


LARGE = (Layer(32, 8, 4, 0), Layer(64, 4, 2, 0), Layer(64, 3, 1, 0))
SMALL = (Layer(32, 3, 1, 1), Layer(64, 3, 2, 1), Layer(64, 3, 2, 1))
# What comes out of the last layer, which is fully connected.
UNITS = 512


def resolve_network(network: str, space: spaces.Space[Any]) -> str:
    """The network that makes features of a space's observations: "mlp", "cnn", or a name.

    "auto" is "cnn" for a `Box` of uint8 of shape (H, W), (H, W, C) or (C, H, W) with both sides of
    at least 8, and "mlp" for all else.

    Example:
        >>> resolve_network("auto", spaces.Box(0, 255, (210, 160, 3), "uint8"))
        'cnn'
        >>> resolve_network("auto", spaces.Box(0, 255, (128,), "uint8"))
        'mlp'
    """
    if network != "auto":
        return network
    if (
        not isinstance(space, spaces.Box)
        or space.dtype != "uint8"
        or len(space.shape) not in (2, 3)
    ):
        return "mlp"
    image = image_of(space)
    return "cnn" if min(image.height, image.width) >= _LEAST_SIDE else "mlp"


def image_of(space: spaces.Space[Any]) -> Image:
    """How an image lies in the observations of a space.

    Of three dimensions the channels are the first if that is smaller than the last, else the last:
    (4, 84, 84) is (C, H, W), and (84, 84, 3) and (5, 5, 5) are (H, W, C).

    Raises:
        ValueError: they are no images.

    Example:
        >>> image_of(spaces.Box(0, 255, (4, 84, 80), "uint8"))
        Image(height=84, width=80, channels=4, channels_first=True)
    """
    shape = space.shape or ()
    if not isinstance(space, spaces.Box | spaces.MultiBinary) or len(shape) not in (2, 3):
        raise ValueError(
            "--network cnn: expected images, a Box of shape (H, W), (H, W, C) or (C, H, W), got a"
            f" {type(space).__name__} of shape {shape}; give --network mlp"
        )
    return image_of_shape(shape)


def image_of_shape(shape: tuple[int, ...]) -> Image:
    """As `image_of`, of two or three numbers."""
    if len(shape) == 2:
        return Image(shape[0], shape[1], 1, channels_first=False)
    if shape[0] < shape[2]:
        return Image(shape[1], shape[2], shape[0], channels_first=True)
    return Image(shape[0], shape[1], shape[2], channels_first=False)


def layers_for(image: Image) -> tuple[Layer, ...]:
    """The convolutions: those of Mnih et al. (2015), or smaller ones where those do not fit."""
    return LARGE if min(image.height, image.width) >= _LEAST_LARGE_SIDE else SMALL


def outputs_of(image: Image) -> list[tuple[int, int, int]]:
    """Of every convolution what comes out: channels, height and width.

    Example:
        >>> outputs_of(Image(84, 84, 4, channels_first=True))
        [(32, 20, 20), (64, 9, 9), (64, 7, 7)]
        >>> outputs_of(Image(10, 10, 3, channels_first=False))
        [(32, 10, 10), (64, 5, 5), (64, 3, 3)]
    """
    height, width = image.height, image.width
    found = []
    for layer in layers_for(image):
        height, width = (
            (side + 2 * layer.padding - layer.kernel) // layer.stride + 1
            for side in (height, width)
        )
        found.append((layer.channels, height, width))
    return found


def num_parameters(image: Image) -> int:
    """How many numbers are in the layers that make `UNITS` features of an image.

    Example:
        >>> num_parameters(Image(84, 84, 4, channels_first=True))
        1684128
    """
    count, channels = 0, image.channels
    for layer in layers_for(image):
        count += layer.channels * (channels * layer.kernel**2 + 1)
        channels = layer.channels
    return count + UNITS * (math.prod(outputs_of(image)[-1]) + 1)
