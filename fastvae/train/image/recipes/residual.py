"""Recipes for colour: `gaussian`, and the deeper `photos` for folders of pictures.

To read as an example: the same residual networks, wider and deeper in `photos`; what differs is the data. How the
decoder's output becomes a likelihood is `ImageSettings.make_likelihood`: a Gaussian whose variance is fixed, learned
for all pixels together, or of each pixel; or discretised logistics.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fastvae.train.image.layers import halved, residual_decoder, residual_encoder
from fastvae.train.image.settings import ImageSettings
from fastvae.train.settings import option

__all__ = ["Colour", "Photos"]


@dataclass(frozen=True, kw_only=True)
class Colour(ImageSettings):
    """A residual VAE for colour images of 8 pixels and more, made for 32; its Gaussian's variance is an option."""

    recipe = "gaussian"

    likelihood: Literal["auto", "bernoulli", "gaussian", "dlogistic", "dmol"] = option(
        "gaussian",
        "gaussian (see --variance), dlogistic or dmol (of bytes as they are), or bernoulli.",
        "Model",
    )
    latent: int = option(128, "Latent dimensions.", "Model", at_least=1)
    channels: int = option(
        32,
        "Channels at half the side; each further half has twice as many, up to eight times.",
        "Model",
        at_least=1,
    )
    blocks: int = option(1, "Residual blocks at each half.", "Model", at_least=0)
    batch_size: int = option(64, "Images in a batch, over all devices together.", "Training", at_least=1)
    lr: float = option(5e-4, "Learning rate of Adam.", "Training", above=0)
    clip: float = option(200.0, "Largest norm of the gradient; 0: not clipped.", "Training", at_least=0)
    ema: float = option(
        0.999, "Decay of a moving average of the weights; 0: none.", "Training", at_least=0, below=1
    )

    def build(self, shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
        height, width, colours = shape
        sides = halved(self.recipe, height, width)
        size = (self.channels, self.blocks)
        encoder = residual_encoder(sides, colours, 2 * self.latent, *size)
        decoder = residual_decoder(sides, self.latent, self.planes(colours), *size)
        for network in (encoder, decoder):  # the layout that convolutions are fastest in, on CPUs and on GPUs
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return encoder, decoder


@dataclass(frozen=True, kw_only=True)
class Photos(Colour):
    """A deeper residual VAE for a folder of pictures of any size, made for 64 to 256 pixels."""

    recipe = "photos"

    size: int = option(
        64, "Side to which the pictures of a folder or dataset are cut and resized.", "Data", at_least=0
    )
    augment: bool = option(
        True, "Mirror the training images, and shift them (from 32 pixels on), anew in every epoch.", "Data"
    )
    blocks: int = option(2, "Residual blocks at each half.", "Model", at_least=0)
    batch_size: int = option(32, "Images in a batch, over all devices together.", "Training", at_least=1)
