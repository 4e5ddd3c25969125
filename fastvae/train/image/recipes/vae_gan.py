"""The recipe `vae-gan`: a VAE whose decoder is the generator of a GAN, after Larsen et al. 2016.

To read as an example: encoder and decoder are those of `photos`. A discriminator tells real images from made ones; what
its layers see in an image is where reconstructions are compared, each layer with a Gaussian whose variance is learned.
The three updates are in `fastvae.train.image.gan`.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvae
from fastvae.likelihoods import Gaussian, Product
from fastvae.train.errors import InputError
from fastvae.train.image.layers import Side, halved, widths
from fastvae.train.settings import option

from .residual import Photos

if TYPE_CHECKING:
    from fastvae.train.image.gan import AdversarialVAE

__all__ = ["VAEGAN", "Discriminator"]


@dataclass(frozen=True, kw_only=True)
class VAEGAN(Photos):
    """A VAE-GAN for a folder of pictures: reconstructs what a discriminator sees, not pixels."""

    recipe = "vae-gan"
    automatic = False
    judged = False  # by the negative ELBO of pixels the blurred beginning would be best

    adversarial: float = option(
        0.5, "Length of the discriminator's gradient to the decoder, that of the reconstruction being 1.",
        "Objective", at_least=0, at_most=100,
    )  # fmt: skip
    latent: int = option(64, "Latent dimensions.", "Model", at_least=1)
    beta: float = option(
        16.0,
        "Weight of the KL, against nats of features: there are several to a pixel.",
        "Objective",
        at_least=0,
    )
    penalty: float = option(
        0.05, "Of the discriminator's squared gradient at real images.", "Objective", at_least=0, at_most=1e6
    )
    lr: float = option(3e-4, "Learning rate of Adam.", "Training", above=0)

    def check(self) -> None:
        super().check()
        for name in ("sigma", "components", "binarize"):
            if getattr(self, name) != getattr(type(self), name):
                raise InputError(f"--{name} is of a likelihood that vae-gan does not have: leave it out")
        if (self.likelihood, self.variance) != ("gaussian", "learned"):
            given = self.likelihood if self.likelihood != "gaussian" else self.variance
            raise InputError(
                f"vae-gan compares features of a discriminator, by Gaussians with a learned variance; --likelihood and "
                f"--variance are of other recipes, got {given}"
            )
        if self.devices != 1 or self.strategy != "auto" or self.precision not in ("32-true", "bf16-mixed"):
            raise InputError(
                "vae-gan trains three networks in turn: on one device, with --precision 32-true or bf16-mixed, got "
                f"--devices {self.devices} --strategy {self.strategy} --precision {self.precision}"
            )

    @property
    def described(self) -> str:
        return "Gaussian likelihood of a discriminator's features; that of pixels, as the table has it, only measures"

    def make_module(self, shape: tuple[int, int, int], **options: Any) -> "AdversarialVAE":
        from fastvae.train.image.gan import AdversarialVAE

        encoder, decoder = self.build(shape)
        height, width, colours = shape
        discriminator = Discriminator(halved(self.recipe, height, width), colours, self.channels)
        discriminator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        bounds = (self.logvar_min, self.logvar_max)
        features = Product(
            {name: Gaussian("learned", logvar_bounds=bounds) for name in discriminator.compared}
        )
        return AdversarialVAE(
            encoder,
            decoder,
            fastvae.ELBO(features, beta=self.beta, free_bits=self.free_bits),
            discriminator=discriminator,
            likelihood=Gaussian("learned", logvar_bounds=bounds),
            penalty=self.penalty,
            adversarial=self.adversarial,
            clip=self.clip,
            **options,
        )


class Discriminator(nn.Module):
    """Images (B, C, H, W) to the features that are compared, by the name of their layer, and a score (B,).

    The features are those of every layer, at the scale of their own image: making all of them small gains nothing.
    """

    def __init__(self, sides: list[Side], inputs: int, channels: int) -> None:
        super().__init__()
        sizes = [inputs, *widths(channels, len(sides) - 1)]
        layers = (nn.Conv2d(before, after, 4, 2, padding=1) for before, after in pairwise(sizes))
        self.layers = nn.ModuleList(layers)
        small = prod(side // 2 ** len(self.layers) for side in sides[0])
        self.score = nn.Linear(sizes[-1] * small, 1)
        self.compared = [f"layer{i}" for i in range(len(self.layers))]

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        features = {}
        x = 2 * x - 1
        for i, layer in enumerate(self.layers):
            x = F.leaky_relu(layer(x), 0.2)
            features[f"layer{i}"] = F.layer_norm(x, x.shape[1:])
        return features, self.score(x.flatten(1)).squeeze(1)
