"""The settings that all image recipes share."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from fastvae import likelihoods
from fastvae.train.errors import InputError
from fastvae.train.settings import COMPONENTS, Settings, option

__all__ = ["ImageSettings"]

PIXEL_COMPONENTS = 10  # the default number of discretized logistics of a pixel, as in PixelCNN++

if TYPE_CHECKING:
    from typing_extensions import Self

    from .module import ImageVAE


@dataclass(frozen=True, kw_only=True)
class ImageSettings(Settings):
    """The settings of a run of images. A recipe adds its own fields and `build`."""

    kind = "image"
    components_apply_to = "--likelihood dmol, and to --prior mog or vamp"

    data: str = option(
        "digits",
        "digits (from scikit-learn), an .npz file in Keras' layout, a folder of images, or a Hugging Face dataset.",
        "Data",
    )
    size: int = option(
        0,
        "Side length that the images of a folder or dataset are cropped and resized to. 0 keeps images that all have "
        "the same size of at most 64 pixels, and resizes others to 64.",
        "Data",
        at_least=0,
    )
    val: int = option(
        0,
        "Number of training images, the last ones, to validate with. The images that would otherwise be for validation "
        "(x_test) are then left to `fastvae evaluate --test`. 0 validates with those.",
        "Data",
        at_least=0,
    )
    batch_size: int = option(128, "Images per batch, over all devices together.", "Training", at_least=1)
    likelihood: Literal["auto", "bernoulli", "gaussian", "discretized-logistic", "dmol"] = option(
        "auto",
        "bernoulli, gaussian, discretized-logistic (one for each byte), dmol (a mixture of discretized logistics for "
        "each pixel), or auto: bernoulli for grey images and gaussian for colour images.",
        "Model",
    )
    components: int = option(
        0,
        f"Number of components of --prior mog or vamp (0 stands for {COMPONENTS}, or as many as there are training "
        f"images); with --prior standard, of the mixture of each pixel for dmol (0 stands for {PIXEL_COMPONENTS}).",
        "Model",
        at_least=0,
    )
    variance: Literal["learned", "fixed", "per-element"] = option(
        "learned",
        "Variance of the Gaussian: learned (one for all pixels), fixed (see --sigma), or per-element (from the "
        "decoder).",
        "Model",
    )
    sigma: float = option(
        1.0,
        "Standard deviation for --variance fixed, on a scale from 0 (black) to 1 (white).",
        "Model",
        at_least=1e-4,
        at_most=1e4,
    )
    logvar_min: float = option(
        -12.0,
        "Lower bound of a learned or per-element log-variance (smooth clamp).",
        "Model",
        at_least=-50,
        at_most=50,
    )
    logvar_max: float = option(
        2.0,
        "Upper bound of a learned or per-element log-variance (smooth clamp).",
        "Model",
        at_least=-50,
        at_most=50,
    )
    augment: bool = option(
        False,
        "Mirror and (from 32 pixels on) shift the training images at random in every epoch.",
        "Data",
    )
    init_from: str = option(
        "",
        "Run or checkpoint to initialise from. Weights are copied wherever their names and shapes agree.",
        "Training",
    )
    bias_at_mean: bool = option(
        False,
        "Start the decoder's output bias at the mean of the binary images, as always for a Gaussian.",
        "Training",
    )
    binarize: Literal["threshold", "dynamic"] = option(
        "threshold",
        "Binarisation for the Bernoulli likelihood: threshold (at half of the range) or dynamic (drawn anew in every "
        "epoch).",
        "Data",
    )

    def check_values(self, display_name: Callable[[str], str]) -> None:
        super().check_values(display_name)
        if not self.logvar_min < self.logvar_max:
            raise InputError(
                f"{display_name('logvar_min')} must be below {display_name('logvar_max')} {self.logvar_max:g}, got "
                f"{self.logvar_min:g}"
            )

    def refuse_unused(self) -> None:
        """Also raises InputError for options of another likelihood."""
        super().refuse_unused()
        gaussian = self.likelihood == "gaussian"
        needs = {
            "binarize": ("--likelihood bernoulli", self.likelihood == "bernoulli"),
            "bias_at_mean": ("--likelihood bernoulli", self.likelihood == "bernoulli"),
            "variance": ("--likelihood gaussian", gaussian),
            "sigma": ("--variance fixed", self.variance == "fixed"),
        }
        for name in ("logvar_min", "logvar_max"):
            needed = "--variance learned or per-element" if gaussian else "--likelihood gaussian"
            needs[name] = (needed, gaussian and self.variance != "fixed")
        for name, (needed, holds) in needs.items():
            if getattr(self, name) != getattr(type(self), name) and not holds:
                raise InputError(f"--{name.replace('_', '-')} only applies to {needed}")

    @property
    def uses_components(self) -> bool:
        return self.has_mixture_prior or self.likelihood == "dmol"

    @property
    def pixel_components(self) -> int:
        """The number of discretized logistics of each pixel for dmol."""
        return (0 if self.has_mixture_prior else self.components) or PIXEL_COMPONENTS

    def build(self, shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
        """Build the encoder, x (B, C, H, W) -> (B, 2 latent), and the decoder, z (B, latent) -> (B, P, H, W).

        `shape` is (H, W, C), and P is `output_channels(C)`. Raises InputError for images that do not suit the model.
        """
        raise NotImplementedError

    def make_module(self, shape: tuple[int, int, int], **options: Any) -> "ImageVAE":
        """Build the module for images (H, W, C); `options` are those of its optimiser, noise and warm-up."""
        from .module import ImageVAE

        encoder, decoder = self.build(shape)
        return ImageVAE(encoder, decoder, self.make_elbo(self.make_likelihood()), **options)

    @property
    def models_bytes(self) -> bool:
        """Whether the likelihood is that of unscaled bytes."""
        return self.likelihood in ("discretized-logistic", "dmol")

    def make_likelihood(self) -> likelihoods.Likelihood:
        """Build the likelihood, which must not be `auto` any more."""
        if self.likelihood == "gaussian":
            if self.variance == "fixed":
                return likelihoods.Gaussian(self.sigma)
            scale = "learned" if self.variance == "learned" else "per_element"
            return likelihoods.Gaussian(scale, logvar_bounds=(self.logvar_min, self.logvar_max))
        if self.likelihood == "discretized-logistic":
            return likelihoods.DiscretizedLogistic()
        if self.likelihood == "dmol":
            return likelihoods.DiscretizedLogisticMixture(self.pixel_components)
        return likelihoods.Bernoulli()

    @property
    def likelihood_description(self) -> str:
        """A description of the likelihood for the user."""
        if self.likelihood == "gaussian":
            return {
                "learned": "Gaussian likelihood, one learned variance",
                "fixed": f"Gaussian likelihood, standard deviation {self.sigma:g}",
                "per-element": "Gaussian likelihood, a variance for each pixel",
            }[self.variance]
        if self.likelihood == "discretized-logistic":
            return "discretized logistic likelihood for each byte"
        if self.likelihood == "dmol":
            return f"likelihood of bytes: a mixture of {self.pixel_components} discretized logistics for each pixel"
        how = "at half of the range" if self.binarize == "threshold" else "anew in each epoch"
        return f"Bernoulli likelihood, images binarised {how}"

    def output_channels(self, channels: int) -> int:
        """Return how many numbers the decoder outputs for a pixel with so many channels."""
        return self.make_likelihood().channels(channels)

    def with_absolute_paths(self) -> "Self":
        return self if self.data == "digits" else super().with_absolute_paths()

    def resolve(self, channels: int) -> "Self":
        """Replace `auto` by a likelihood, and paths by absolute ones."""
        likelihood = self.likelihood
        if likelihood == "auto":
            likelihood = "bernoulli" if channels == 1 else "gaussian"
        start = str(Path(self.init_from).expanduser().resolve()) if self.init_from else ""
        return dataclasses.replace(self.with_absolute_paths(), likelihood=likelihood, init_from=start)
