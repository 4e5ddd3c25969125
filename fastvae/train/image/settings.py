"""The settings of a run of images; each recipe adds its own."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

import fastvae
from fastvae import likelihoods
from fastvae.train.errors import InputError
from fastvae.train.settings import Settings, option

__all__ = ["ImageSettings"]

if TYPE_CHECKING:
    from typing_extensions import Self

    from .module import ImageVAE


@dataclass(frozen=True, kw_only=True)
class ImageSettings(Settings):
    """What every recipe for images has; a recipe adds its own fields and `build`."""

    kind = "image"

    data: str = option(
        "digits",
        "digits (scikit-learn's), a .npz file (Keras' layout), a folder of images, or a Hugging Face dataset.",
        "Data",
    )
    size: int = option(
        0,
        "Side to which the images of a folder or dataset are cut and resized; 0: as they are if all have one size "
        "of at most 64 pixels, else 64.",
        "Data",
        at_least=0,
    )
    batch_size: int = option(128, "Images in a batch, over all devices together.", "Training", at_least=1)
    likelihood: Literal["auto", "bernoulli", "gaussian", "dlogistic", "dmol"] = option(
        "auto",
        "bernoulli, gaussian (with a learned scale), dlogistic or dmol (of bytes as they are: a discretised logistic "
        "for each, or a mixture for each pixel), or auto: the first for grey images, the second for colour.",
        "Model",
    )
    components: int = option(10, "Of dmol: logistics in a pixel's mixture.", "Model", at_least=1)
    variance: Literal["learned", "fixed", "per-pixel"] = option(
        "learned",
        "Of gaussian: learned (one for all pixels), fixed (--sigma), or per-pixel, from the decoder.",
        "Model",
    )
    sigma: float = option(
        1.0,
        "Of --variance fixed: the standard deviation, white being 1 and black 0.",
        "Model",
        at_least=1e-4,
        at_most=1e4,
    )
    logvar_min: float = option(
        -12.0,
        "Of a learned or per-pixel variance: no log-variance falls below, by a smooth clamp.",
        "Model",
        at_least=-50,
        at_most=50,
    )
    logvar_max: float = option(2.0, "And none rises above.", "Model", at_least=-50, at_most=50)
    augment: bool = option(
        False, "Mirror the training images, and shift them (from 32 pixels on), anew in every epoch.", "Data"
    )
    init_from: str = option(
        "",
        "A run, or a checkpoint, whose weights are taken to start from, wherever their names and shapes are the same.",
        "Training",
    )
    binarize: Literal["threshold", "dynamic"] = option(
        "threshold",
        "Of a Bernoulli likelihood: by threshold, at half of the full value, or dynamic: drawn afresh every epoch.",
        "Data",
    )

    def check_values(self, called: Callable[[str], str]) -> None:
        super().check_values(called)
        if not self.logvar_min < self.logvar_max:
            raise InputError(
                f"{called('logvar_min')} must be below {called('logvar_max')} {self.logvar_max:g}, got "
                f"{self.logvar_min:g}"
            )

    def refuse_unused(self) -> None:
        """Also for options of a likelihood that is not the run's."""
        super().refuse_unused()
        of = {
            "binarize": (
                "the Bernoulli likelihood",
                "--likelihood bernoulli",
                self.likelihood == "bernoulli",
            ),
            "components": ("dmol", "--likelihood dmol", self.likelihood == "dmol"),
            "variance": ("the Gaussian likelihood", "--likelihood gaussian", self.likelihood == "gaussian"),
            "sigma": ("a fixed variance", "--variance fixed", self.variance == "fixed"),
        }
        bounded = self.likelihood == "gaussian" and self.variance != "fixed"
        for name in ("logvar_min", "logvar_max"):
            needed = (
                "--likelihood gaussian" if self.variance != "fixed" else "--variance learned or per-pixel"
            )
            of[name] = ("a learned or per-pixel variance", needed, bounded)
        for name, (what, needed, holds) in of.items():
            if getattr(self, name) != getattr(type(self), name) and not holds:
                raise InputError(f"--{name.replace('_', '-')} is of {what}: give {needed}")

    def build(self, shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
        """Encoder and decoder for images (H, W, C): x (B, C, H, W) -> (B, 2 latent), z (B, latent) -> (B, P, H, W).

        P is `planes(C)`. Raises InputError for images that the model cannot take.
        """
        raise NotImplementedError

    def make_module(self, shape: tuple[int, int, int], **options: Any) -> "ImageVAE":
        """What is trained on images (H, W, C); `options` are those of its optimiser, its noise and its warm-up."""
        from .module import ImageVAE

        encoder, decoder = self.build(shape)
        elbo = fastvae.ELBO(self.make_likelihood(), beta=self.beta, free_bits=self.free_bits)
        return ImageVAE(encoder, decoder, elbo, **options)

    @property
    def of_bytes(self) -> bool:
        """Whether the likelihood is one of the images' bytes as they are."""
        return self.likelihood in ("dlogistic", "dmol")

    def make_likelihood(self) -> likelihoods.Likelihood:
        """That of a resolved `likelihood`."""
        if self.likelihood == "gaussian":
            if self.variance == "fixed":
                return likelihoods.Gaussian(self.sigma)
            scale = "learned" if self.variance == "learned" else "per_element"
            return likelihoods.Gaussian(scale, logvar_bounds=(self.logvar_min, self.logvar_max))
        if self.likelihood == "dlogistic":
            return likelihoods.DiscretizedLogistic()
        if self.likelihood == "dmol":
            return likelihoods.DiscretizedLogisticMixture(self.components)
        return likelihoods.Bernoulli()

    @property
    def described(self) -> str:
        """The likelihood in words."""
        if self.likelihood == "gaussian":
            return {
                "learned": "Gaussian likelihood, one learned variance",
                "fixed": f"Gaussian likelihood, standard deviation {self.sigma:g}",
                "per-pixel": "Gaussian likelihood, a variance for each pixel",
            }[self.variance]
        if self.likelihood == "dlogistic":
            return "likelihood of bytes: a discretised logistic for each"
        if self.likelihood == "dmol":
            return f"likelihood of bytes: a mixture of {self.components} discretised logistics for each pixel"
        how = "at half of the full value" if self.binarize == "threshold" else "afresh in each epoch"
        return f"Bernoulli likelihood, images binarised {how}"

    def planes(self, channels: int) -> int:
        """How many numbers the decoder gives for each pixel of so many channels."""
        return self.make_likelihood().channels(channels)

    def located(self) -> "Self":
        return self if self.data == "digits" else super().located()

    def resolve(self, channels: int) -> "Self":
        """With the likelihood that `auto` stands for, and `data` so that it is found from any folder."""
        likelihood = self.likelihood
        if likelihood == "auto":
            likelihood = "bernoulli" if channels == 1 else "gaussian"
        start = str(Path(self.init_from).expanduser().resolve()) if self.init_from else ""
        return dataclasses.replace(self.located(), likelihood=likelihood, init_from=start)
