"""The recipes `resnet` and `photos`: residual VAEs for colour images and for folders of pictures.

Both use the same residual networks, which are wider and deeper in `photos`. `ImageSettings.make_likelihood` turns the
output of the decoder into a likelihood: a Gaussian with a fixed, learned or per-element variance, or discretized
logistics.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fastvae.train.image.layers import halving_sides, residual_decoder, residual_encoder
from fastvae.train.image.settings import ImageSettings
from fastvae.train.settings import option

__all__ = ["Photos", "ResNet"]


@dataclass(frozen=True, kw_only=True)
class ResNet(ImageSettings):
    """Residual VAE for colour images of at least 8 pixels, designed for 32."""

    recipe = "resnet"

    likelihood: Literal["auto", "bernoulli", "gaussian", "discretized-logistic", "dmol"] = option(
        "gaussian",
        "gaussian (see --variance), discretized-logistic (one for each byte), dmol (a mixture of discretized logistics "
        "for each pixel), bernoulli, or auto: bernoulli for grey images and gaussian for colour images.",
        "Model",
    )
    latent: int = option(128, "Number of latent dimensions.", "Model", at_least=1)
    channels: int = option(
        32,
        "Channels after the first halving; each further halving doubles them, up to eight times.",
        "Model",
        at_least=1,
    )
    blocks: int = option(1, "Residual blocks per halving.", "Model", at_least=0)
    batch_size: int = option(64, "Images per batch, over all devices together.", "Training", at_least=1)
    lr: float = option(5e-4, "Learning rate of Adam.", "Training", above=0)
    clip: float = option(
        200.0, "Clip the gradient to this norm; 0 turns clipping off.", "Training", at_least=0
    )
    ema: float = option(
        0.999,
        "Decay of an exponential moving average of the weights; 0 turns it off.",
        "Training",
        at_least=0,
        below=1,
    )

    def build(self, shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
        height, width, colours = shape
        sides = halving_sides(self.recipe, height, width)
        size = (self.channels, self.blocks)
        encoder = residual_encoder(sides, colours, 2 * self.latent, *size)
        decoder = residual_decoder(sides, self.latent, self.output_channels(colours), *size)
        for network in (encoder, decoder):  # convolutions are fastest in this layout, on CPUs and on GPUs
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return encoder, decoder


@dataclass(frozen=True, kw_only=True)
class Photos(ResNet):
    """Deeper residual VAE for a folder of pictures of any size, designed for 64 to 256 pixels."""

    recipe = "photos"

    size: int = option(
        64,
        "Side length that the pictures of a folder or dataset are cropped and resized to.",
        "Data",
        at_least=0,
    )
    augment: bool = option(
        True, "Mirror and (from 32 pixels on) shift the training images at random in every epoch.", "Data"
    )
    blocks: int = option(2, "Residual blocks per halving.", "Model", at_least=0)
    batch_size: int = option(32, "Images per batch, over all devices together.", "Training", at_least=1)
