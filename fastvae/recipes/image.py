"""Recipes for images: `mlp`, fully connected, and `conv`.

To read as an example: the encoder gives 2 x latent numbers for each image, mu and logvar, and the decoder the
parameters of the likelihood, which for the Bernoulli are logits; so neither ends in an activation. They meet a
`fastvae.ELBO` in `fastvae.training.module`.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import prod

from torch import nn

from fastvae.training.data import InputError
from fastvae.training.settings import ImageSettings, option

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
        encoder = nn.Sequential(nn.Flatten(), *_dense(prod(shape), *inner, 2 * self.latent))
        decoder = nn.Sequential(
            *_dense(self.latent, *inner, prod(shape)), nn.Unflatten(1, (channels, height, width))
        )
        return encoder, decoder


def _dense(*sizes: int) -> list[nn.Module]:
    """Linear layers with a ReLU between each two."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers[:-1]


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
        if min(height, width) < 8:
            raise InputError(
                f"conv: images must be at least 8 x 8 pixels, got {height} x {width}; mlp takes any size"
            )
        # Sides are halved (and rounded up) until the smaller one is 4 to 7.
        sizes = [(height, width)]
        while min(sizes[-1]) > 7:
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        widths = [colours] + [self.channels * 2**i for i in range(len(sizes) - 1)]
        down: list[nn.Module] = []
        for before, after in pairwise(widths):
            down += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        small = (widths[-1], *sizes[-1])
        flat = prod(small)
        encoder = nn.Sequential(*down, nn.Flatten(), *_dense(flat, self.hidden, 2 * self.latent))
        up: list[nn.Module] = [*_dense(self.latent, self.hidden, flat), nn.Unflatten(1, small)]
        for i in range(len(sizes) - 1, 0, -1):
            # The side that was halved comes back exactly: 2n - 1 from an odd one, 2n from an even one. Kernels of 4
            # cover every pixel equally often; others leave a chequerboard.
            odd = (sizes[i - 1][0] % 2, sizes[i - 1][1] % 2)
            up += [
                nn.SiLU(),
                nn.ConvTranspose2d(
                    widths[i], widths[i - 1], 4, 2, padding=(1 + odd[0], 1 + odd[1]), output_padding=odd
                ),
            ]
        return encoder, nn.Sequential(*up)
