"""Recipes for images: `mlp`, fully connected, and `conv`.

To read as an example: the encoder gives 2 x latent numbers for each image, mu and logvar, and the decoder the
parameters of the likelihood, which for the Bernoulli are logits; so neither ends in an activation. They meet a
`fastvae.ELBO` in `fastvae.training.module`.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import prod

from torch import nn

from fastvae.training.settings import ImageSettings, option

from .layers import dense, double, halved

__all__ = ["MLP", "Conv"]


@dataclass(frozen=True, kw_only=True)
class MLP(ImageSettings):
    """A fully connected VAE: with the settings as they are, the 784-400-20 of the tutorials."""

    recipe = "mlp"

    hidden: int = option(400, "Units in a hidden layer.", "Model", at_least=1)
    layers: int = option(1, "Hidden layers in the encoder, and in the decoder.", "Model", at_least=1)

    def build(self, shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
        height, width, channels = shape
        inner = [self.hidden] * self.layers
        encoder = nn.Sequential(nn.Flatten(), *dense(prod(shape), *inner, 2 * self.latent))
        decoder = nn.Sequential(
            *dense(self.latent, *inner, self.planes(channels) * height * width),
            nn.Unflatten(1, (self.planes(channels), height, width)),
        )
        return encoder, decoder


@dataclass(frozen=True, kw_only=True)
class Conv(ImageSettings):
    """A convolutional VAE for grey and colour images of 8 pixels and more, made for 28 to 64."""

    recipe = "conv"

    channels: int = option(
        32, "Channels of the first layer; each further one has twice as many.", "Model", at_least=1
    )
    hidden: int = option(
        256, "Units between the convolutions and the latent dimensions.", "Model", at_least=1
    )

    def build(self, shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
        height, width, colours = shape
        sides = halved(self.recipe, height, width)
        widths = [colours] + [self.channels * 2**i for i in range(len(sides) - 1)]
        down: list[nn.Module] = []
        for before, after in pairwise(widths):
            down += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        small = (widths[-1], *sides[-1])
        flat = prod(small)
        encoder = nn.Sequential(*down, nn.Flatten(), *dense(flat, self.hidden, 2 * self.latent))
        widths[0] = self.planes(colours)
        up: list[nn.Module] = [*dense(self.latent, self.hidden, flat), nn.Unflatten(1, small)]
        for i in range(len(sides) - 1, 0, -1):
            up += [nn.SiLU(), double(widths[i], widths[i - 1], sides[i - 1])]
        return encoder, nn.Sequential(*up)
