"""The data settings of a run of counts; the recipe adds its own."""

from dataclasses import dataclass

from fastvae.train.settings import Settings, option

__all__ = ["CountsSettings"]


@dataclass(frozen=True, kw_only=True)
class CountsSettings(Settings):
    """The file of counts and the names of its columns."""

    kind = "counts"

    data: str = option(
        "",
        "An .npz file with the counts, cells by genes, as `x` (or as written by scipy.sparse.save_npz) and optionally "
        "`label` and `batch`; or an .h5ad file (needs the package anndata). Required.",
        "Data",
    )
    label: str = option(
        "",
        "Key of the labels that colour latents.png. Defaults to label, labels, cell_type or similar.",
        "Data",
    )
    batch: str = option("", "Key of the batches. Defaults to `batch`.", "Data")
