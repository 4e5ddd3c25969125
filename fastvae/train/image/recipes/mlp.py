"""The recipe `mlp`: a fully connected VAE.

The encoder outputs 2 x latent numbers for each image, mu and logvar. The decoder outputs the parameters of the
likelihood, which are logits for the Bernoulli, so neither network ends in an activation. `fastvae.train.module` joins
them with a `fastvae.ELBO`.
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
    """Fully connected VAE. The defaults are the 784-400-20 network of many tutorials."""

    recipe = "mlp"

    hidden: int = option(400, "Units per hidden layer.", "Model", at_least=1)
    layers: int = option(1, "Hidden layers in the encoder and in the decoder.", "Model", at_least=1)

    def build(self, shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
        height, width, channels = shape
        inner = [self.hidden] * self.layers
        encoder = nn.Sequential(nn.Flatten(), *dense(prod(shape), *inner, 2 * self.latent))
        decoder = nn.Sequential(
            *dense(self.latent, *inner, self.output_channels(channels) * height * width),
            nn.Unflatten(1, (self.output_channels(channels), height, width)),
        )
        return encoder, decoder
