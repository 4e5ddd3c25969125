"""The settings of a run: a dataclass for each recipe makes its command line, its config.toml and its defaults."""

import dataclasses
import difflib
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from torch import nn

import fastvae
from fastvae import likelihoods

from .data import InputError

__all__ = ["ImageSettings", "Settings", "option"]

if TYPE_CHECKING:
    from typing_extensions import Self

    from .module import VAE


def option(
    default: Any,
    help: str,
    group: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A dataclass field with what the command line says of it, and the bounds that its value must keep."""
    bounds = {"at least": at_least, "above": above, "below": below, "at most": at_most}
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "group": group,
            "bounds": {word: bound for word, bound in bounds.items() if bound is not None},
        },
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every recipe has; a recipe adds its own fields and makes its networks."""

    recipe: ClassVar[str]

    kind: ClassVar[str] = "image"
    """What it models: image, text or counts."""

    automatic: ClassVar[bool] = True
    """Whether Lightning takes the optimiser's steps, or the module itself."""

    judged: ClassVar[bool] = True
    """Whether the held-out negative ELBO tells which epoch is the best; else the last is."""

    data: str = option("", "The data.", "Data")
    latent: int = option(20, "Latent dimensions.", "Model", at_least=1)

    epochs: int = option(20, "Passes over the data.", "Training", at_least=1)
    batch_size: int = option(128, "Images in a batch, over all devices together.", "Training", at_least=1)
    lr: float = option(1e-3, "Learning rate of Adam.", "Training", above=0)
    clip: float = option(0.0, "Largest norm of the gradient; 0: not clipped.", "Training", at_least=0)
    ema: float = option(
        0.0, "Decay of a moving average of the weights, as 0.999; 0: none.", "Training", at_least=0, below=1
    )
    seed: int = option(
        0, "Of the weights, the batches and the noise.", "Training", at_least=0, at_most=2**32 - 1
    )

    beta: float = option(1.0, "Weight of the KL.", "Objective", at_least=0)
    free_bits: float = option(
        0.0, "Nats of KL that each latent dimension has at no cost; 0: none.", "Objective", at_least=0
    )
    warmup: Literal["none", "linear", "cyclical", "sigmoid"] = option(
        "none", "How the weight of the KL rises to beta: none, linear, cyclical or sigmoid.", "Objective"
    )
    warmup_epochs: float = option(10.0, "Over how many epochs.", "Objective", above=0)
    cycles: int = option(4, "Of a cyclical warm-up: how many cycles.", "Objective", at_least=1)

    devices: int = option(1, "How many devices, a process each.", "Machine", at_least=1)
    accelerator: str = option("auto", "Lightning's: auto, cpu, gpu, ...", "Machine")
    strategy: str = option("auto", "Lightning's: auto, ddp, fsdp, ...", "Machine")
    precision: str = option(
        "32-true",
        "Lightning's: 32-true, bf16-mixed, 16-mixed, or, without --ema, bf16-true and 64-true.",
        "Machine",
    )
    logger: Literal["csv", "tensorboard"] = option(
        "csv", "csv, or tensorboard: its event files too.", "Machine"
    )

    def located(self) -> "Self":
        """With `data` so that it is found from any folder."""
        path = Path(self.data).expanduser()
        is_file = self.data != "digits" and path.exists()
        return dataclasses.replace(self, data=str(path.resolve()) if is_file else self.data)

    def check(self) -> None:
        """Raises InputError for a value out of its range."""
        self._check(lambda name: f"--{name.replace('_', '-')}")

    @classmethod
    def read(cls, table: Mapping[str, Any], where: str) -> "Self":
        """The settings of a config file.

        Raises InputError for a key that is none, and for a value of another type or out of its range.
        """
        kinds = cls.kinds()
        values: dict[str, Any] = {}
        for key, value in table.items():
            if key not in kinds:
                near = difflib.get_close_matches(key, kinds, n=1)
                hint = f"; did you mean `{near[0]}`?" if near else f"; there are {', '.join(kinds)}"
                raise InputError(f"{where}: there is no setting `{key}`{hint}")
            kind = kinds[key]
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind:
                words = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
                raise InputError(f"{where}: `{key}` must be {words[kind]}, got {value!r}")
            values[key] = value
        settings = cls(**values)
        settings._check(lambda name: f"{where}: `{name}`")
        return settings

    @classmethod
    def kinds(cls) -> dict[str, type]:
        """The type of each setting; one of several words is a str."""
        hints = get_type_hints(cls)
        return {f.name: str if cls.choices(f.name) else hints[f.name] for f in dataclasses.fields(cls)}

    @classmethod
    def choices(cls, name: str) -> tuple[str, ...]:
        hint = get_type_hints(cls)[name]
        return get_args(hint) if get_origin(hint) is Literal else ()

    def _check(self, called: Callable[[str], str]) -> None:
        for f in dataclasses.fields(self):
            value, bounds = getattr(self, f.name), f.metadata["bounds"]
            if (words := self.choices(f.name)) and value not in words:
                raise InputError(f"{called(f.name)} must be one of {', '.join(words)}, got {value!r}")
            if bounds and not all(_holds(value, word, bound) for word, bound in bounds.items()):
                text = " and ".join(f"{word} {bound:.10g}" for word, bound in bounds.items())
                if not math.isfinite(value):
                    text += " and finite"
                raise InputError(f"{called(f.name)} must be {text}, got {value:.10g}")


@dataclass(frozen=True, kw_only=True)
class ImageSettings(Settings):
    """What every recipe for images has; a recipe adds its own fields and `build`."""

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

    def _check(self, called: Callable[[str], str]) -> None:
        super()._check(called)
        if not self.logvar_min < self.logvar_max:
            raise InputError(
                f"{called('logvar_min')} must be below {called('logvar_max')} {self.logvar_max:g}, got "
                f"{self.logvar_min:g}"
            )

    def build(self, shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
        """Encoder and decoder for images (H, W, C): x (B, C, H, W) -> (B, 2 latent), z (B, latent) -> (B, P, H, W).

        P is `planes(C)`. Raises InputError for images that the model cannot take.
        """
        raise NotImplementedError

    def make_module(self, shape: tuple[int, int, int], **options: Any) -> "VAE":
        """What is trained on images (H, W, C); `options` are those of its optimiser, its noise and its warm-up."""
        from .module import VAE

        encoder, decoder = self.build(shape)
        elbo = fastvae.ELBO(self.make_likelihood(), beta=self.beta, free_bits=self.free_bits)
        return VAE(encoder, decoder, elbo, **options)

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

    def resolve(self, channels: int) -> "Self":
        """With the likelihood that `auto` stands for, and `data` so that it is found from any folder."""
        likelihood = self.likelihood
        if likelihood == "auto":
            likelihood = "bernoulli" if channels == 1 else "gaussian"
        start = str(Path(self.init_from).expanduser().resolve()) if self.init_from else ""
        return dataclasses.replace(self.located(), likelihood=likelihood, init_from=start)


def _holds(value: float, word: str, bound: float) -> bool:
    if not math.isfinite(value):
        return False
    compare = {"at least": operator.ge, "above": operator.gt, "below": operator.lt, "at most": operator.le}
    return compare[word](value, bound)
