"""What runs of one kind of data do in their own way. The rest, which they do alike, is in `runs` and `evaluate`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import torch

from .settings import Settings

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule
    from rich.console import Console

    from .module import VAE
    from .report import Report

__all__ = ["Data", "Kind", "Run"]


class Data(Protocol):
    """What a run is trained on and measured by."""

    @property
    def name(self) -> str: ...

    @property
    def train(self) -> Sized: ...

    @property
    def held_out(self) -> Sized: ...


S = TypeVar("S", bound=Settings)
F = TypeVar("F")
D = TypeVar("D", bound=Data)


@dataclass
class Run(Generic[S, F, D]):
    """A run, finished or stopped, ready to be used."""

    path: Path
    settings: S
    form: F
    """What the model was built for, besides the settings."""
    model: Any
    """In eval mode, on `device`; the averaged weights if there are any."""
    device: torch.device
    epoch: int
    """How many epochs the weights were trained for."""
    others: bool
    """Whether `settings.data` are other data than the run's."""
    read: Callable[[], D]

    @cached_property
    def data(self) -> D:
        """The run's data, read when first asked for.

        Raises InputError where they are gone, and for what the model does not take.
        """
        return self.read()


R = TypeVar("R", bound=Run[Any, Any, Any])


class Kind(ABC, Generic[S, F, D, R]):
    """A kind of data: its recipes, and what its runs do in their own way.

    Its type arguments are the settings S; the form F, which is what a model is built for besides the settings, as the
    shape of an image; the data D; and the opened run R. Whatever takes long to import is imported in the methods:
    `fastvae train --help` needs none of it.
    """

    name: ClassVar[str]
    a_datum: ClassVar[str]
    """With its article: "an image"."""
    recipes: ClassVar[Sequence[type[Settings]]]
    run: ClassVar[type[Any]]
    """The class R."""

    head: ClassVar[tuple[str, ...]] = ()
    """The keys of config.toml that hold the form."""
    kept: ClassVar[tuple[str, ...]] = ()
    """The files that hold the form."""
    left: ClassVar[tuple[str, ...]] = ()
    """The files that training leaves."""
    later: ClassVar[tuple[str, ...]] = ()
    """The files that the commands on a run leave."""

    samples: ClassVar[int]
    """How many importance samples `evaluate` takes if nobody says so."""
    sampled: ClassVar[bool] = True
    """Whether `fastvae sample` draws from it."""
    elsewhere: ClassVar[str]
    """What is said of a run of this kind where one of another kind is needed."""

    @property
    def datum(self) -> str:
        return self.a_datum.partition(" ")[2]

    # -----------------------------------------------------------------------------------------------------------------
    # Settings, data, form
    # -----------------------------------------------------------------------------------------------------------------

    def check(self, settings: S) -> None:
        """Before the data of a new run are read: raises InputError for settings that do not go together."""

    @abstractmethod
    def load(self, settings: S, form: F | None = None, *, others: bool = False) -> D:
        """Read the data; with `form` those of a run that is there, or `others` in their place. Raises InputError."""

    def settle(self, settings: S, data: D) -> S:
        """The settings as a new run keeps them. Raises InputError for what does nothing with these data."""
        settings = settings.located()
        settings.refuse_unused()
        return settings

    def settle_again(self, settings: S, form: F) -> S:
        """The settings as a run that goes on keeps them."""
        return settings.located()

    @abstractmethod
    def make_form(self, settings: S, data: D) -> F:
        """What the model of a new run is built for."""

    @abstractmethod
    def read_form(self, path: Path, head: dict[str, Any]) -> F:
        """That of a run: from the values of `head` in its config.toml, or from the files `kept`. Raises InputError."""

    def write_form(self, out: Path, form: F) -> None:
        """Write the files `kept`."""

    def head_lines(self, form: F) -> str:
        """The lines of `head` for config.toml."""
        return ""

    def suit(self, data: D, form: F, settings: S, path: Path) -> D:
        """The data of a run as its model takes them. Raises InputError where it does not."""
        return data

    # -----------------------------------------------------------------------------------------------------------------
    # Training
    # -----------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def build(self, settings: S, form: F) -> "VAE":
        """The model, with fresh weights from torch's generator."""

    def begin(self, model: Any, settings: S, data: D) -> None:
        """Set what a new model's weights should know of the data before the first step."""

    def initialise(self, model: Any, settings: S, out: Path, *, resumed: bool) -> None:
        """Give a model that was not trained yet the weights of another run, where the settings say so."""

    @abstractmethod
    def drawer(self, data: D, form: F, settings: S, folder: Path) -> "Callback":
        """What leaves samples in the folder of a run in training."""

    @abstractmethod
    def batches(self, model: Any, data: D, form: F, settings: S) -> "LightningDataModule": ...

    @abstractmethod
    def introduce(self, model: Any, data: D, form: F, settings: S, batches: Any) -> Iterator[str]:
        """Lines about the data and the model, before the training."""

    # -----------------------------------------------------------------------------------------------------------------
    # Measuring
    # -----------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def evaluate(
        self, run: R, console: "Console", *, checkpoint: str, samples: int, limit: int | None, seed: int
    ) -> "Report":
        """Measure a run on its held-out data, or the first `limit` of them, with a progress bar on `console`."""

    def after_evaluation(self, run: R, seed: int) -> Iterator[str]:
        """Draw what belongs to an evaluation besides numbers, with a line about each."""
        return iter(())
