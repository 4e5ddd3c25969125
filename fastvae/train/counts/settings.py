"""The data settings of a run of counts; the recipe adds its own."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastvae.train.settings import Settings, option

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CountsSettings"]


@dataclass(frozen=True, kw_only=True)
class CountsSettings(Settings):
    """The file of counts and the names of its columns."""

    kind = "counts"

    data: str = option(
        "",
        "An .npz file with the counts, cells by genes, as `x` (or as written by scipy.sparse.save_npz) and optionally "
        "`label` and `batch`; an .h5ad file (needs the package h5py); or a .zarr folder (needs zarr). Several, with "
        "commas in between, or a folder of them, are one data set. Required.",
        "Data",
    )
    layer: str = option(
        "",
        "Matrix of an .h5ad file or .zarr folder: X, raw or the name of a layer. Defaults to the layer `counts`, or to "
        "X. For .npz, the name of an array.",
        "Data",
    )
    memory: float = option(
        500.0,
        "Memory for counts, in MB. Larger data stay on disk and are read in shuffled blocks.",
        "Data",
        at_least=1,
    )
    label: str = option(
        "",
        "Key of the labels that colour latents.png, also those of --dispersion gene-label. Defaults to label, labels, "
        "cell_type or similar.",
        "Data",
    )
    batch: str = option("", "Key of the batches. Defaults to `batch`.", "Data")
    covariates: str = option(
        "",
        "Keys of further covariates, with commas in between: fractional numbers are continuous, everything else is "
        "categorical.",
        "Data",
    )

    def with_absolute_paths(self) -> "Self":
        """Return the settings with absolute paths to the data."""
        if "," not in self.data or Path(self.data).expanduser().exists():
            return super().with_absolute_paths()
        paths = [
            str(Path(name.strip()).expanduser().resolve()) for name in self.data.split(",") if name.strip()
        ]
        return dataclasses.replace(self, data=",".join(paths))
