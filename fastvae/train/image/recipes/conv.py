"""The recipe `conv`: a convolutional VAE.

Each layer of the encoder halves the feature map, and each layer of the decoder doubles it. The outputs are as in `mlp`.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import prod

from torch import nn

from fastvae.train.image.layers import dense, halving_sides, upsampling_layer
from fastvae.train.image.settings import ImageSettings
from fastvae.train.settings import option

__all__ = ["Conv"]


@dataclass(frozen=True, kw_only=True)
class Conv(ImageSettings):
    """Convolutional VAE for images of at least 8 pixels, designed for 28 to 64."""

    recipe = "conv"

    channels: int = option(
        32, "Channels of the first layer; each further layer has twice as many.", "Model", at_least=1
    )
    hidden: int = option(256, "Units between the convolutions and the latent space.", "Model", at_least=1)

    def build(self, shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
        height, width, colours = shape
        sides = halving_sides(self.recipe, height, width)
        widths = [colours] + [self.channels * 2**i for i in range(len(sides) - 1)]
        down: list[nn.Module] = []
        for before, after in pairwise(widths):
            down += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        small = (widths[-1], *sides[-1])
        flat = prod(small)
        encoder = nn.Sequential(*down, nn.Flatten(), *dense(flat, self.hidden, 2 * self.latent))
        widths[0] = self.output_channels(colours)
        up: list[nn.Module] = [*dense(self.latent, self.hidden, flat), nn.Unflatten(1, small)]
        for i in range(len(sides) - 1, 0, -1):
            up += [nn.SiLU(), upsampling_layer(widths[i], widths[i - 1], sides[i - 1])]
        return encoder, nn.Sequential(*up)
