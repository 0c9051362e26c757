"""Features of images: convolutions."""

import math

from torch import Tensor, nn

from vecpg.images import UNITS, Image, layers_for, outputs_of


class Convolutions(nn.Module):
    """Images (B, *obs_shape) float32 to features (B, 512): three convolutions and a layer.

    Of images whose sides are at least 36 they are those of Mnih et al. (2015): 32 channels by
    kernels of 8 x 8 with stride 4, 64 by 4 x 4 with stride 2, and 64 by 3 x 3. Smaller ones, on
    which these do not fit, go through as many channels by kernels of 3 x 3, with a border of one
    pixel of zeros and strides 1, 2 and 2. A ReLU follows each, and then a layer of 512 units with a
    ReLU. Weights are orthogonal, scaled by the square root of 2, and biases 0.

    Args:
        image: as `vecpg.images.image_of` finds it.

    Source: Mnih et al. (2015), "Human-level control through deep reinforcement learning", Methods.
    """

    def __init__(self, image: Image) -> None:
        super().__init__()
        self.image = image
        modules: list[nn.Module] = []
        channels = image.channels
        for layer in layers_for(image):
            modules += [
                nn.Conv2d(channels, layer.channels, layer.kernel, layer.stride, layer.padding),
                nn.ReLU(),
            ]
            channels = layer.channels
        inputs = math.prod(outputs_of(image)[-1])
        self.layers = nn.Sequential(*modules, nn.Flatten(), nn.Linear(inputs, UNITS), nn.ReLU())
        for module in self.layers:
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.float()  # whatever torch's default dtype
                nn.init.orthogonal_(module.weight, math.sqrt(2))
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, obs: Tensor) -> Tensor:
        """(B, *obs_shape) float32 to (B, 512)."""
        if obs.ndim == 3:
            images = obs[:, None]
        else:
            images = obs if self.image.channels_first else obs.permute(0, 3, 1, 2)
        features: Tensor = self.layers(images)
        return features
