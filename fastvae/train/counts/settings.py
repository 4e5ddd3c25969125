"""The settings of a run of counts that say what it reads; the recipe adds its own."""

from dataclasses import dataclass

from fastvae.train.settings import Settings, option

__all__ = ["CountsSettings"]


@dataclass(frozen=True, kw_only=True)
class CountsSettings(Settings):
    """The file of counts, and its columns."""

    kind = "counts"

    data: str = option(
        "",
        "An .npz file with the counts, cells by genes, as `x` (or as scipy.sparse.save_npz writes them) and perhaps "
        "`label` and `batch`; or an .h5ad file (needs anndata). Required.",
        "Data",
    )
    label: str = option(
        "", "Key of the labels that colour latents.png, if not a usual one: label, labels, cell_type.", "Data"
    )
    batch: str = option("", "Key of the batches, if not `batch`.", "Data")
