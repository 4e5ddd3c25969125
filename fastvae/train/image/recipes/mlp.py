"""The recipe `mlp`: a fully connected VAE.

The encoder outputs 2 x latent numbers for each image, mu and logvar. The decoder outputs the parameters of the
likelihood, which are logits for the Bernoulli, so neither network ends in an activation. `fastvae.train.module` joins
them with a `fastvae.ELBO`.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import nn

from fastvae.train import networks
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
    activation: Literal["relu", "tanh", "elu", "silu", "gelu", "softplus", "gated"] = option(
        "relu",
        "Activation of the hidden layers: relu, tanh, elu, silu, gelu, softplus, or gated (a linear function times the "
        "sigmoid of another; Dauphin et al. 2017).",
        "Model",
    )
    init: Literal["default", "xavier", "kaiming"] = option(
        "default",
        "Initial weights: default (torch's), xavier (Glorot and Bengio 2010, uniform) or kaiming (He et al. 2015, "
        "normal). With the last two, biases start at 0.",
        "Model",
    )

    def build(self, shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
        height, width, channels = shape
        inner = [self.hidden] * self.layers
        outputs = self.output_channels(channels)
        encoder = nn.Sequential(
            nn.Flatten(), *dense(prod(shape), *inner, 2 * self.latent, activation=self.activation)
        )
        decoder = nn.Sequential(
            *dense(self.latent, *inner, outputs * height * width, activation=self.activation),
            nn.Unflatten(1, (outputs, height, width)),
        )
        for network in (encoder, decoder):
            networks.initialize(network, self.init)
        return encoder, decoder
