"""The interface of a kind of data: what differs between kinds. What they share is in `runs` and `evaluate`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .settings import Settings

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule
    from rich.console import Console

    from .factors import Factors
    from .module import VAE
    from .report import Report

__all__ = ["Data", "EvaluatedRows", "Kind", "Run"]


class Data(Protocol):
    """The data of a run, in a training and a validation part."""

    @property
    def name(self) -> str: ...

    @property
    def train(self) -> Sized: ...

    @property
    def val(self) -> Sized: ...


class EvaluatedRows(NamedTuple):
    """The rows of a file with one row per datum that belong to the evaluated data, in their order."""

    total: int
    """The number of rows that the file must have."""
    chosen: Tensor | None = None
    """The indices of those that are evaluated, int64; None for all."""


S = TypeVar("S", bound=Settings)
F = TypeVar("F")
D = TypeVar("D", bound=Data)


@dataclass
class Run(Generic[S, F, D]):
    """An opened run."""

    path: Path
    settings: S
    form: F
    """What the model was built for besides the settings, for example the shape of an image."""
    model: Any
    """The model in eval mode on `device`, with the averaged weights if there are any."""
    device: torch.device
    epoch: int
    """The number of epochs that the weights were trained for."""
    is_other_data: bool
    """Whether `settings.data` are not the data that the run was trained on."""
    read_data: Callable[[], D]

    @cached_property
    def data(self) -> D:
        """The data of the run, loaded when first used.

        Raises InputError if the data are missing or the model cannot take them.
        """
        return self.read_data()


R = TypeVar("R", bound=Run[Any, Any, Any])


class Kind(ABC, Generic[S, F, D, R]):
    """A kind of data: its recipes, and everything that is specific to its runs.

    The type arguments are the settings S; the form F, which is what a model is built for besides the settings, for
    example the shape of an image; the data D; and the opened run R. Methods import slow packages themselves, so that
    `fastvae train --help` stays fast.
    """

    name: ClassVar[str]
    datum_with_article: ClassVar[str]
    """The name of one example, with its article: "an image"."""
    recipes: ClassVar[Sequence[type[Settings]]]
    run: ClassVar[type[Any]]
    """The class R."""

    form_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of config.toml that hold the form."""
    form_files: ClassVar[tuple[str, ...]] = ()
    """Files that hold the form."""
    training_files: ClassVar[tuple[str, ...]] = ()
    """Files that training writes."""
    command_files: ClassVar[tuple[str, ...]] = ()
    """Files that the commands using a run write."""

    default_samples: ClassVar[int]
    """Default number of importance samples of `evaluate`."""
    has_test: ClassVar[bool] = False
    """Whether runs may have data for a test besides those for validation."""
    has_factors: ClassVar[bool] = False
    """Whether `evaluate` supports known factors of the data."""
    can_sample: ClassVar[bool] = True
    """Whether `fastvae sample` supports this kind."""
    wrong_kind_message: ClassVar[str]
    """The message if a run of this kind is used where another kind is needed."""

    @property
    def datum(self) -> str:
        return self.datum_with_article.partition(" ")[2]

    # -----------------------------------------------------------------------------------------------------------------
    # Settings, data, form
    # -----------------------------------------------------------------------------------------------------------------

    def check(self, settings: S) -> None:
        """Raises InputError if settings contradict each other; called before the data are loaded."""

    @abstractmethod
    def load(self, settings: S, form: F | None = None, *, other_data: bool = False) -> D:
        """Load the data. `form` is that of an existing run; `other_data` says that the data are not its own.

        Raises InputError.
        """

    def resolve_settings(self, settings: S, data: D) -> S:
        """Return the settings as a new run stores them. Raises InputError for options that do not fit the data."""
        settings = settings.with_absolute_paths()
        settings.refuse_unused()
        return settings

    def resolve_on_resume(self, settings: S, form: F) -> S:
        """Return the settings as a resumed run stores them."""
        return settings.with_absolute_paths()

    @abstractmethod
    def make_form(self, settings: S, data: D) -> F:
        """Return the form of a new run."""

    @abstractmethod
    def read_form(self, path: Path, form_values: dict[str, Any]) -> F:
        """Return the form of a run, from the values of `form_keys` or from `form_files`. Raises InputError."""

    def write_form(self, out: Path, form: F) -> None:
        """Write `form_files`."""

    def form_lines(self, form: F) -> str:
        """Return the lines of `form_keys` for config.toml."""
        return ""

    def adapt_data(self, data: D, form: F, settings: S, path: Path) -> D:
        """Return the data in the form that the model of a run takes. Raises InputError if that is impossible."""
        return data

    # -----------------------------------------------------------------------------------------------------------------
    # Training
    # -----------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def build(self, settings: S, form: F) -> "VAE":
        """Build the model with random weights from torch's generator."""

    def init_from_data(self, model: Any, settings: S, data: D) -> None:
        """Initialise those weights of a new model that depend on the data."""

    def init_from_run(self, model: Any, settings: S, out: Path, *, resumed: bool) -> None:
        """Copy weights of another run into an untrained model, if the settings say so."""

    @abstractmethod
    def examples_callback(self, data: D, form: F, settings: S, folder: Path) -> "Callback":
        """Return the callback that saves examples of the model's output during training."""

    @abstractmethod
    def batches(self, model: Any, data: D, form: F, settings: S) -> "LightningDataModule": ...

    @abstractmethod
    def describe_run(self, model: Any, data: D, form: F, settings: S, batches: Any) -> Iterator[str]:
        """Yield lines about the data and the model, to be printed before training."""

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation
    # -----------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def evaluate(
        self,
        run: R,
        console: "Console",
        *,
        checkpoint: str,
        samples: int,
        limit: int | None,
        seed: int,
        test: bool,
        factors: "Factors | None",
    ) -> "Report":
        """Evaluate a run on its validation data, or those of a `test`, or the first `limit` examples, with a progress
        bar on `console`. `factors` are those of all these data."""

    def evaluated_rows(self, run: R, test: bool) -> EvaluatedRows:
        """Return which rows of a file of factors belong to the data that are evaluated. Raises InputError."""
        raise NotImplementedError

    def after_evaluation(self, run: R, seed: int) -> Iterator[str]:
        """Draw the pictures that belong to an evaluation, and yield a line about each."""
        return iter(())
