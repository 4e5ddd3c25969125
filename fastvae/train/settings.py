"""The settings of a run. The dataclass of a recipe defines its command line, its config.toml and its defaults."""

import dataclasses
import difflib
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import fastvae

from .errors import InputError

__all__ = ["COMPONENTS", "Settings", "option"]

COMPONENTS = 500
"""The default number of components of a prior, as in Tomczak and Welling 2018."""

# The objectives of `fastvae.IWAE`, whose module must not be imported before torch is needed.
_BOUNDS = ("iwae", "stl", "dreg")

if TYPE_CHECKING:
    from typing_extensions import Self


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
    """A dataclass field with its help text, its group on the command line, and the bounds of its value."""
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
    """The settings that all recipes share. A recipe adds its own fields and builds its networks."""

    recipe: ClassVar[str]

    kind: ClassVar[str]
    """The name of the `Kind` of data that the recipe models."""

    components_apply_to: ClassVar[str] = "--prior mog or vamp"
    """What `components` belongs to, for a message."""

    automatic_optimization: ClassVar[bool] = True
    """Whether Lightning runs the optimisation steps; otherwise the module does."""

    data: str = option("", "Data to train on.", "Data")
    latent: int = option(20, "Number of latent dimensions.", "Model", at_least=1)
    posterior: Literal["logvar", "log_std", "softplus", "variance"] = option(
        "logvar",
        "How the encoder gives the posterior's scale: its log-variance, the logarithm of its standard deviation, or "
        "softplus(v) + 1e-4 (standard deviation) or exp(v) + 1e-4 (variance) of its output v.",
        "Model",
    )
    prior: Literal["standard", "mog", "vamp"] = option(
        "standard",
        "Prior of z: standard (N(0, I)), mog (a learned mixture of --components Gaussians), or vamp (the mean of the "
        "posteriors of --components learned pseudo-inputs; Tomczak and Welling 2018).",
        "Model",
    )
    components: int = option(
        0,
        f"Number of components of --prior mog or vamp; 0 stands for {COMPONENTS}, or as many as there are training "
        "examples.",
        "Model",
        at_least=0,
    )

    epochs: int = option(20, "Number of passes over the data.", "Training", at_least=1)
    batch_size: int = option(128, "Examples per batch, over all devices together.", "Training", at_least=1)
    lr: float = option(1e-3, "Learning rate of Adam.", "Training", above=0)
    lr_schedule: Literal["constant", "cosine", "burda"] = option(
        "constant",
        "Learning rate over the epochs: constant, cosine (falling to 0), or burda (eight stages, each thrice as long "
        "as the last, in which it falls to a tenth; Burda et al. 2016).",
        "Training",
    )
    adam_eps: float = option(1e-8, "Epsilon of Adam.", "Training", above=0)
    weight_decay: float = option(
        0.0, "Weight decay of the networks, decoupled from the gradient (AdamW).", "Training", at_least=0
    )
    clip: float = option(0.0, "Clip the gradient to this norm; 0 turns clipping off.", "Training", at_least=0)
    ema: float = option(
        0.0,
        "Decay of an exponential moving average of the weights, for example 0.999; 0 turns it off.",
        "Training",
        at_least=0,
        below=1,
    )
    seed: int = option(
        0,
        "Random seed for the weights, the batches and the noise.",
        "Training",
        at_least=0,
        at_most=2**32 - 1,
    )

    objective: Literal["elbo", "iwae", "stl", "dreg", "beta-tc", "info"] = option(
        "elbo",
        "elbo; the importance-weighted bound of several draws of z, with an estimator of its gradient: iwae, stl or "
        "dreg; beta-tc (--beta weighs only the total correlation, a part of the KL; Chen et al. 2018); or info (the "
        "ELBO with --mmd-weight times the MMD of z from its prior; InfoVAE, Zhao et al. 2019).",
        "Objective",
    )
    samples: int = option(
        1,
        "Draws of z for each example. elbo averages over them; the others weight them.",
        "Objective",
        at_least=1,
    )
    beta: float = option(
        1.0, "Weight of the KL; for beta-tc that of the total correlation.", "Objective", at_least=0
    )
    mmd_weight: float = option(
        1000.0, "Weight of the squared MMD for --objective info.", "Objective", at_least=0
    )
    capacity: float = option(
        0.0,
        "Capacity C in nats: the loss has beta |KL - C| in place of beta KL, and a warm-up raises C instead of beta. 0 "
        "turns it off.",
        "Objective",
        at_least=0,
    )
    free_bits: float = option(
        0.0, "KL in nats that each latent dimension may have at no cost (free bits).", "Objective", at_least=0
    )
    warmup: Literal["none", "linear", "cyclical", "sigmoid"] = option(
        "none", "Warm-up of the KL's weight to beta: none, linear, cyclical or sigmoid.", "Objective"
    )
    warmup_epochs: float = option(10.0, "Length of the warm-up in epochs.", "Objective", above=0)
    cycles: int = option(4, "Number of cycles of a cyclical warm-up.", "Objective", at_least=1)

    devices: int = option(1, "Number of devices. Each has its own process.", "Machine", at_least=1)
    accelerator: str = option("auto", "Lightning accelerator: auto, cpu, gpu, ...", "Machine")
    strategy: str = option("auto", "Lightning strategy: auto, ddp, fsdp, ...", "Machine")
    precision: str = option(
        "32-true",
        "Lightning precision: 32-true, bf16-mixed or 16-mixed; without --ema also bf16-true and 64-true.",
        "Machine",
    )
    logger: Literal["csv", "tensorboard"] = option(
        "csv", "csv, or tensorboard to write event files as well.", "Machine"
    )

    def with_absolute_paths(self) -> "Self":
        """Return the settings with an absolute path to the data."""
        path = Path(self.data).expanduser()
        return dataclasses.replace(self, data=str(path.resolve()) if path.exists() else self.data)

    def check(self) -> None:
        """Raises InputError if a value is out of range."""
        self.check_values(lambda name: f"--{name.replace('_', '-')}")

    def refuse_unused(self) -> None:
        """Raises InputError for options that have no effect together with the others."""
        changed = {
            name for name in ("cycles", "warmup_epochs") if getattr(self, name) != getattr(type(self), name)
        }
        if "cycles" in changed and self.warmup != "cyclical":
            raise InputError("--cycles only applies to --warmup cyclical")
        if "warmup_epochs" in changed and self.warmup == "none":
            raise InputError("--warmup-epochs only applies to --warmup linear, cyclical or sigmoid")
        self._check_prior()
        self._check_aggregate()
        if self.objective != "elbo":
            for name in ("free_bits", "capacity"):
                if value := getattr(self, name):
                    shown = f"--{name.replace('_', '-')}"
                    raise InputError(
                        f"{shown} {value:g} only applies to --objective elbo, got {self.objective}; add {shown} 0"
                    )
        if self.capacity and self.free_bits:
            raise InputError(
                f"--capacity {self.capacity:g} and --free-bits {self.free_bits:g} exclude each other; add --free-bits 0"
            )

    def _check_prior(self) -> None:
        if self.components and not self.uses_components:
            raise InputError(
                f"--components only applies to {self.components_apply_to}, got {self.components}"
            )
        one_gaussian = self.prior == "mog" and self.components == 1
        if self.free_bits and self.has_mixture_prior and not one_gaussian:
            raise InputError(
                f"--free-bits {self.free_bits:g} needs the KL of each latent dimension, which has no closed form with "
                f"--prior {self.prior}; add --free-bits 0"
            )

    def _check_aggregate(self) -> None:
        """Check the options of objectives that estimate the aggregate posterior from a batch."""
        if self.objective != "info" and self.mmd_weight != type(self).mmd_weight:
            raise InputError(
                f"--mmd-weight {self.mmd_weight:g} only applies to --objective info, got {self.objective}"
            )
        if not self.compares_aggregate:
            return
        where = f"--objective {self.objective}"
        if self.has_mixture_prior:
            raise InputError(f"{where} only applies to --prior standard, got {self.prior}")
        if self.samples != 1:
            raise InputError(f"--samples must be 1 for {where}, got {self.samples}")
        if self.batch_size < 2 * self.devices:
            raise InputError(
                f"{where} needs at least 2 examples per batch on each device, got --batch-size {self.batch_size} and "
                f"--devices {self.devices}"
            )

    @property
    def has_mixture_prior(self) -> bool:
        """Whether the prior has `components`."""
        return self.prior != "standard"

    @property
    def uses_components(self) -> bool:
        """Whether `components` has a meaning."""
        return self.has_mixture_prior

    @property
    def compares_aggregate(self) -> bool:
        """Whether the objective compares the aggregate posterior of a batch with its marginals or with the prior."""
        return self.objective in ("beta-tc", "info")

    def resolve_components(self, examples: int) -> "Self":
        """Return the settings with the number of components of the prior, for so many training examples.

        Raises InputError if a VampPrior has more pseudo-inputs than there are examples to start from.
        """
        if not self.has_mixture_prior:
            return self
        if self.prior == "vamp" and self.components > examples:
            raise InputError(
                f"--components must be at most {examples} for --prior vamp, whose pseudo-inputs start at training "
                f"examples, got {self.components}"
            )
        return dataclasses.replace(self, components=self.components or min(COMPONENTS, examples))

    @property
    def monitor(self) -> str | None:
        """The metric whose smallest value marks the best epoch. With None, the last epoch counts as the best."""
        return "val_neg_bound" if self.objective in _BOUNDS else "val_neg_elbo"

    def make_elbo(self, likelihood: Any) -> "fastvae.ELBO":
        """Return the training objective for a likelihood. A VampPrior is set when there is a model to encode its
        pseudo-inputs."""
        prior = None
        if self.prior == "mog":
            prior = fastvae.priors.GaussianMixture(self.components or COMPONENTS, self.latent)
        if self.objective in _BOUNDS:
            return fastvae.IWAE(likelihood, self.samples, self.objective, beta=self.beta, prior=prior)
        return fastvae.ELBO(
            likelihood,
            # The whole KL has weight 1 in the beta-TC-VAE; the module adds the rest of the total correlation's.
            beta=1.0 if self.objective == "beta-tc" else self.beta,
            free_bits=self.free_bits,
            capacity=self.capacity or None,
            samples=None if self.samples == 1 else self.samples,
            prior=prior,
        )

    def module_options(self) -> dict[str, Any]:
        """Return the arguments that every `VAE` takes: for its optimiser, its noise and its warm-up."""
        return {
            "latents": self.latent,
            "posterior": self.posterior,
            "lr": self.lr,
            "adam_eps": self.adam_eps,
            "weight_decay": self.weight_decay,
            "lr_schedule": self.lr_schedule,
            "seed": self.seed,
            "schedule": self.warmup,
            "schedule_epochs": self.warmup_epochs,
            "cycles": self.cycles,
            "aggregate": self.objective if self.compares_aggregate else None,
            "aggregate_weight": self.beta if self.objective == "beta-tc" else self.mmd_weight,
        }

    @classmethod
    def read(cls, table: Mapping[str, Any], where: str) -> "Self":
        """Return the settings of a config file, given as a table.

        Raises InputError for an unknown key, and for a value that has the wrong type or is out of range.
        """
        kinds = cls.kinds()
        values: dict[str, Any] = {}
        for key, value in table.items():
            if key not in kinds:
                close_matches = difflib.get_close_matches(key, kinds, n=1)
                hint = (
                    f"; did you mean `{close_matches[0]}`?"
                    if close_matches
                    else f"; the settings are {', '.join(kinds)}"
                )
                raise InputError(f"{where}: unknown setting `{key}`{hint}")
            kind = kinds[key]
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind:
                words = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
                raise InputError(f"{where}: `{key}` must be {words[kind]}, got {value!r}")
            values[key] = value
        settings = cls(**values)
        settings.check_values(lambda name: f"{where}: `{name}`")
        return settings

    @classmethod
    def kinds(cls) -> dict[str, type]:
        """Return the type of each setting; settings with a list of choices are strings."""
        hints = get_type_hints(cls)
        return {f.name: str if cls.choices(f.name) else hints[f.name] for f in dataclasses.fields(cls)}

    @classmethod
    def choices(cls, name: str) -> tuple[str, ...]:
        hint = get_type_hints(cls)[name]
        return get_args(hint) if get_origin(hint) is Literal else ()

    def check_values(self, display_name: Callable[[str], str]) -> None:
        """Raises InputError if a value is out of range. `display_name` names a setting in the message."""
        for f in dataclasses.fields(self):
            value, bounds = getattr(self, f.name), f.metadata["bounds"]
            if (words := self.choices(f.name)) and value not in words:
                raise InputError(f"{display_name(f.name)} must be one of {', '.join(words)}, got {value!r}")
            if bounds and not all(_satisfies(value, word, bound) for word, bound in bounds.items()):
                text = " and ".join(f"{word} {bound:.10g}" for word, bound in bounds.items())
                if not math.isfinite(value):
                    text += " and finite"
                raise InputError(f"{display_name(f.name)} must be {text}, got {value:.10g}")


def _satisfies(value: float, word: str, bound: float) -> bool:
    if not math.isfinite(value):
        return False
    compare = {"at least": operator.ge, "above": operator.gt, "below": operator.lt, "at most": operator.le}
    return compare[word](value, bound)
