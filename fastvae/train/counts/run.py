"""An opened run of counts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastvae.train.kind import Run

from .cells import Cells
from .columns import Covariate
from .recipe import Counts

if TYPE_CHECKING:
    from .module import CellVAE

__all__ = ["CellRun", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """What the model of a run is built for."""

    genes: int
    batches: tuple[str, ...]
    labels: tuple[str, ...] = ()
    """Those that have a dispersion of their own."""
    covariates: tuple[Covariate, ...] = ()
    gene_names: tuple[str, ...] = ()
    """Empty if the data have none, or if an older version wrote the run."""


@dataclass
class CellRun(Run[Counts, Sizes, Cells]):
    """A run of counts."""

    model: "CellVAE"

    @property
    def sizes(self) -> Sizes:
        return self.form

    @property
    def cells(self) -> Cells:
        """The data of the run, with batches numbered as in training."""
        return self.data
