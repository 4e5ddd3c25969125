"""The settings of a run: a dataclass for each recipe makes its command line, its config.toml and its defaults."""

import dataclasses
import difflib
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from .errors import InputError

__all__ = ["Settings", "option"]

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

    kind: ClassVar[str]
    """What it models, by the name of its `Kind`."""

    automatic: ClassVar[bool] = True
    """Whether Lightning takes the optimiser's steps, or the module itself."""

    judged: ClassVar[bool] = True
    """Whether the held-out negative ELBO tells which epoch is the best; else the last is."""

    data: str = option("", "The data.", "Data")
    latent: int = option(20, "Latent dimensions.", "Model", at_least=1)

    epochs: int = option(20, "Passes over the data.", "Training", at_least=1)
    batch_size: int = option(128, "Data in a batch, over all devices together.", "Training", at_least=1)
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
        return dataclasses.replace(self, data=str(path.resolve()) if path.exists() else self.data)

    def check(self) -> None:
        """Raises InputError for a value out of its range."""
        self.check_values(lambda name: f"--{name.replace('_', '-')}")

    def refuse_unused(self) -> None:
        """Raises InputError for options that would do nothing."""
        given = {
            name for name in ("cycles", "warmup_epochs") if getattr(self, name) != getattr(type(self), name)
        }
        if "cycles" in given and self.warmup != "cyclical":
            raise InputError("--cycles is of a cyclical warm-up: give --warmup cyclical")
        if "warmup_epochs" in given and self.warmup == "none":
            raise InputError("--warmup-epochs is of a warm-up: give --warmup linear, cyclical or sigmoid")

    def module_options(self) -> dict[str, Any]:
        """What every `VAE` takes of them: its optimiser, its noise, its warm-up."""
        return {
            "latents": self.latent,
            "lr": self.lr,
            "seed": self.seed,
            "schedule": self.warmup,
            "schedule_epochs": self.warmup_epochs,
            "cycles": self.cycles,
        }

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
        settings.check_values(lambda name: f"{where}: `{name}`")
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

    def check_values(self, called: Callable[[str], str]) -> None:
        """Raises InputError for a value out of its range; `called` is how the user names a setting."""
        for f in dataclasses.fields(self):
            value, bounds = getattr(self, f.name), f.metadata["bounds"]
            if (words := self.choices(f.name)) and value not in words:
                raise InputError(f"{called(f.name)} must be one of {', '.join(words)}, got {value!r}")
            if bounds and not all(_holds(value, word, bound) for word, bound in bounds.items()):
                text = " and ".join(f"{word} {bound:.10g}" for word, bound in bounds.items())
                if not math.isfinite(value):
                    text += " and finite"
                raise InputError(f"{called(f.name)} must be {text}, got {value:.10g}")


def _holds(value: float, word: str, bound: float) -> bool:
    if not math.isfinite(value):
        return False
    compare = {"at least": operator.ge, "above": operator.gt, "below": operator.lt, "at most": operator.le}
    return compare[word](value, bound)
