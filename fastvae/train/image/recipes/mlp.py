"""The recipe `mlp`: fully connected.

To read as an example: the encoder gives 2 x latent numbers for each image, mu and logvar, and the decoder the
parameters of the likelihood, which for the Bernoulli are logits; so neither ends in an activation. They meet a
`fastvae.ELBO` in `fastvae.train.module`.
"""

from dataclasses import dataclass
from math import prod

from torch import nn

from fastvae.train.image.layers import dense
from fastvae.train.image.settings import ImageSettings
from fastvae.train.settings import option

__all__ = ["MLP"]


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
