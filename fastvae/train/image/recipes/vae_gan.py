"""The recipe `vae-gan`: a VAE whose decoder is the generator of a GAN, after Larsen et al. 2016.

Encoder and decoder are those of `photos`. A discriminator distinguishes real images from generated ones. Images and
reconstructions are compared in the features of its layers; each layer has a Gaussian with a learned variance. The three
updates are in `fastvae.train.image.gan`.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.likelihoods import Gaussian, Product
from fastvae.train.errors import InputError
from fastvae.train.image.layers import Side, channel_counts, halving_sides
from fastvae.train.settings import option

from .resnet import Photos

if TYPE_CHECKING:
    from fastvae.train.image.gan import AdversarialVAE

__all__ = ["VAEGAN", "Discriminator"]


@dataclass(frozen=True, kw_only=True)
class VAEGAN(Photos):
    """VAE-GAN for a folder of pictures: compares images in a discriminator's features, not in pixels."""

    recipe = "vae-gan"
    automatic_optimization = False

    adversarial: float = option(
        0.5, "Length of the discriminator's gradient in the decoder, relative to that of the reconstruction.",
        "Objective", at_least=0, at_most=100,
    )  # fmt: skip
    latent: int = option(64, "Number of latent dimensions.", "Model", at_least=1)
    beta: float = option(
        16.0,
        "Weight of the KL relative to the nats of the features, of which there are several per pixel.",
        "Objective",
        at_least=0,
    )
    penalty: float = option(
        0.05,
        "Weight of the penalty on the discriminator's squared gradient at real images (R1).",
        "Objective",
        at_least=0,
        at_most=1e6,
    )
    lr: float = option(3e-4, "Learning rate of Adam.", "Training", above=0)

    def check(self) -> None:
        super().check()
        for name in ("sigma", "components", "binarize"):
            if getattr(self, name) != getattr(type(self), name):
                raise InputError(f"--{name} does not apply to vae-gan, which has no such likelihood")
        for name in ("objective", "samples", "capacity", "prior"):
            given, expected = getattr(self, name), getattr(type(self), name)
            if given != expected:
                raise InputError(
                    f"--{name} must be {expected} for vae-gan, whose loss is that of a discriminator, got {given}"
                )
        if (self.likelihood, self.variance) != ("gaussian", "learned"):
            given = self.likelihood if self.likelihood != "gaussian" else self.variance
            raise InputError(
                "vae-gan compares the features of a discriminator by Gaussians with a learned variance, so it does not "
                f"take --likelihood and --variance, got {given}"
            )
        if self.devices != 1 or self.strategy != "auto" or self.precision not in ("32-true", "bf16-mixed"):
            raise InputError(
                "vae-gan trains three networks in turn, which needs one device and --precision 32-true or bf16-mixed, "
                f"got --devices {self.devices} --strategy {self.strategy} --precision {self.precision}"
            )

    @property
    def monitor(self) -> None:
        # The negative ELBO of the pixels would prefer the blurred images of the first epochs.
        return None

    @property
    def likelihood_description(self) -> str:
        return "Gaussian likelihood of the discriminator's features; the table reports that of the pixels"

    def make_module(self, shape: tuple[int, int, int], **options: Any) -> "AdversarialVAE":
        from fastvae.train.image.gan import AdversarialVAE

        encoder, decoder = self.build(shape)
        height, width, colours = shape
        discriminator = Discriminator(halving_sides(self.recipe, height, width), colours, self.channels)
        discriminator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        bounds = (self.logvar_min, self.logvar_max)
        features = Product(
            {name: Gaussian("learned", logvar_bounds=bounds) for name in discriminator.feature_names}
        )
        return AdversarialVAE(
            encoder,
            decoder,
            self.make_elbo(features),
            discriminator=discriminator,
            likelihood=Gaussian("learned", logvar_bounds=bounds),
            penalty=self.penalty,
            adversarial=self.adversarial,
            clip=self.clip,
            **options,
        )


class Discriminator(nn.Module):
    """Maps images (B, C, H, W) to a dict of features, one entry per layer, and a score (B,).

    The features are normalised for each image, so that making all of them small does not reduce the loss.
    """

    def __init__(self, sides: list[Side], inputs: int, channels: int) -> None:
        super().__init__()
        sizes = [inputs, *channel_counts(channels, len(sides) - 1)]
        layers = (nn.Conv2d(before, after, 4, 2, padding=1) for before, after in pairwise(sizes))
        self.layers = nn.ModuleList(layers)
        small = prod(side // 2 ** len(self.layers) for side in sides[0])
        self.score = nn.Linear(sizes[-1] * small, 1)
        self.feature_names = [f"layer{i}" for i in range(len(self.layers))]

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        features = {}
        x = 2 * x - 1
        for i, layer in enumerate(self.layers):
            x = F.leaky_relu(layer(x), 0.2)
            features[f"layer{i}"] = F.layer_norm(x, x.shape[1:])
        return features, self.score(x.flatten(1)).squeeze(1)
