"""Counts to train on: cells and their genes, from a .npz or .h5ad file, as a sparse matrix."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvae.train.arrays import Arrays
from fastvae.train.errors import InputError

from .settings import CountsSettings

__all__ = ["Batch", "Cells", "batch", "load"]

# Keys of an .npz file, and columns of an .h5ad one, that are looked for if none is given.
_MATRIX = ("x", "X", "counts")
_LABELS = ("label", "labels", "cell_type", "celltype", "bulk_labels")
_BATCHES = ("batch",)


class Batch(NamedTuple):
    """What the model takes of a few cells."""

    counts: Tensor
    """(B, G), float32."""
    library: Tensor
    """The counts of a cell, summed: (B, 1), float32."""
    batch: Tensor
    """The number of each cell's batch, int64 (B,)."""


@dataclass(frozen=True)
class Cells:
    """All cells of a file; `train` and `held_out` are rows of `counts`."""

    name: str
    counts: Any
    """A scipy.sparse.csr_array (N, G) of float32."""
    train: Tensor
    held_out: Tensor
    batches: Tensor
    """The number of each cell's batch, int64 (N,): its place in `batch_names`."""
    batch_names: tuple[str, ...]
    labels: Tensor | None
    """The number of each cell's label, int64 (N,): its place in `label_names`."""
    label_names: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def genes(self) -> int:
        return int(self.counts.shape[1])


def batch(cells: Cells, rows: Tensor) -> Batch:
    counts = torch.from_numpy(cells.counts[rows.numpy()].toarray())
    return Batch(counts, counts.sum(1, keepdim=True), cells.batches[rows])


def load(settings: CountsSettings) -> Cells:
    """The cells that the settings name, a sixth of them held out.

    Raises InputError for a file that is not there or cannot be read, for what is not a matrix of counts, and for
    labels or batches that are not one for each cell.
    """
    if not settings.data:
        raise InputError(
            "--data is needed: a matrix of counts, cells by genes, as an .npz or .h5ad file (see --help)"
        )
    path = Path(settings.data).expanduser()
    if not path.is_file():
        raise InputError(f"{settings.data}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".h5ad"):
        raise InputError(f"{path}: must be an .npz or an .h5ad file")
    with _npz(path) if suffix == ".npz" else _h5ad(path) as file:
        counts = _checked_counts(path, file.matrix)
        labels, label_names = _column(path, file, settings.label, "--label", _LABELS, counts.shape[0])
        batches, batch_names = _column(path, file, settings.batch, "--batch", _BATCHES, counts.shape[0])

    library = np.asarray(counts.sum(1)).ravel()
    kept = np.flatnonzero(library > 0)
    notes = []
    if len(kept) < len(library):
        notes.append(f"cells without a single count are left out: {len(library) - len(kept)}")
    if len(kept) < 2:
        raise InputError(f"{path}: {len(kept)} cells with counts are too few: some are held out")
    # Shuffled first: files are often sorted, by batch or by type.
    draws = torch.Generator().manual_seed(settings.seed)
    order = torch.from_numpy(kept)[torch.randperm(len(kept), generator=draws)]
    held_out, train = order.tensor_split([max(1, len(kept) // 6)])
    return Cells(
        path.name,
        counts,
        train,
        held_out,
        torch.zeros(len(library), dtype=torch.int64) if batches is None else batches,
        batch_names or ("",),
        labels,
        label_names,
        tuple(notes),
    )


@dataclass
class _File:
    """A matrix of counts, and what else its file holds of the cells."""

    matrix: Any
    columns: tuple[str, ...]
    read: Callable[[str], Any]
    """A column by its name, as an array."""


# What scipy.sparse.save_npz writes besides `format`, by format.
_SPARSE = {
    "csr": ("data", "indices", "indptr", "shape"),
    "csc": ("data", "indices", "indptr", "shape"),
    "bsr": ("data", "indices", "indptr", "shape"),
    "coo": ("data", "row", "col", "shape"),
    "dia": ("data", "offsets", "shape"),
}


@contextmanager
def _npz(path: Path) -> Iterator[_File]:
    with Arrays(path) as arrays:
        kind = "csr"
        if "format" in arrays:
            stored = arrays.read("format").item()
            kind = stored.decode("ascii", "replace") if isinstance(stored, bytes) else str(stored)
        used = _SPARSE.get(kind, ())
        if used and all(name in arrays for name in used):
            matrix = _sparse(path, kind, {name: arrays.read(name) for name in used})
            used = (*used, "format", "_is_array")
        elif used := tuple(name for name in _MATRIX if name in arrays)[:1]:
            matrix = arrays.read(used[0])
        else:
            raise InputError(
                f"{path}: holds no matrix of counts: none of {', '.join(_MATRIX)}, and not what "
                f"scipy.sparse.save_npz writes; it holds {arrays.contents()}; store the counts, cells by genes, with "
                "scipy.sparse.save_npz(path, scipy.sparse.csr_array(counts))"
            )
        yield _File(matrix, tuple(name for name in arrays.names if name not in used), arrays.read)


def _sparse(path: Path, kind: str, parts: dict[str, Any]) -> Any:
    """The matrix that scipy.sparse.save_npz has taken apart."""
    from scipy import sparse

    data, shape = _wide(parts["data"]), tuple(parts["shape"].tolist())
    try:
        if kind == "coo":
            return sparse.coo_array((data, (parts["row"], parts["col"])), shape=shape)
        if kind == "dia":
            return sparse.dia_array((data, parts["offsets"]), shape=shape)
        make = {"csr": sparse.csr_array, "csc": sparse.csc_array, "bsr": sparse.bsr_array}[kind]
        return make((data, parts["indices"], parts["indptr"]), shape=shape)
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"{path}: not a sparse matrix: {error}") from error


def _wide(values: Any) -> Any:
    """Half precision as float32: scipy's sparse matrices have no half."""
    return values.astype(np.float32) if values.dtype == np.float16 else values


@contextmanager
def _h5ad(path: Path) -> Iterator[_File]:
    """The matrix of raw counts (`layers["counts"]` where there is one, else X), and the columns of obs."""
    try:
        import anndata
    except ModuleNotFoundError as error:
        if error.name != "anndata":
            raise
        raise InputError(f"{path}: needs a package that is missing: pip install anndata") from None
    try:
        data = anndata.read_h5ad(path)
    except Exception as error:  # h5py and anndata raise many things
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: cannot be read as an .h5ad file: {reason}") from error
    matrix = data.layers.get("counts", data.X)
    if matrix is None:
        raise InputError(f"{path}: holds no matrix: neither layers['counts'] nor X")

    def read(name: str) -> Any:
        column = data.obs[name]
        missing = np.flatnonzero(column.isna())
        if len(missing):
            raise InputError(
                f"{path}: `{name}` has no value for {len(missing)} of the {len(column)} cells, cell {missing[0]} the "
                "first of them; fill them in, for example with obs[name].astype(str), or name another column"
            )
        return np.asarray(column.astype(str), dtype=str)

    yield _File(matrix, tuple(map(str, data.obs.columns)), read)


def _checked_counts(path: Path, matrix: Any) -> Any:
    """As a CSR array of float32, every value of it a whole number, 0 or more."""
    from scipy import sparse

    if matrix.ndim != 2:
        raise InputError(
            f"{path}: the counts must be a matrix, cells by genes, got the shape {tuple(matrix.shape)}"
        )
    if matrix.dtype.kind not in "iufb":
        raise InputError(f"{path}: the counts must be numbers, got {matrix.dtype}")
    cells, genes = matrix.shape
    if genes == 0 or cells == 0:
        what = "no genes" if genes == 0 else "no cells"
        raise InputError(f"{path}: {what}: the counts have the shape ({cells}, {genes})")
    if not sparse.issparse(matrix):
        matrix = _wide(np.asarray(matrix))
    counts = sparse.csr_array(matrix)
    # Of a file from a machine of the other byte order, too.
    counts.data = _wide(counts.data).astype(counts.dtype.newbyteorder("="), copy=False)
    counts.sum_duplicates()
    values = counts.data
    for bad, what in (
        (~np.isfinite(values), "not finite"),
        (values < 0, "negative"),
        (values != np.floor(values), "fractional (normalised or log-transformed? the raw counts are needed)"),
    ):
        if bad.any():
            place = int(bad.argmax())
            row = int(np.searchsorted(counts.indptr, place, side="right")) - 1
            column = int(counts.indices[place])
            raise InputError(f"{path}: a count is {what}: {values[place]:g}, of cell {row}, gene {column}")
    return counts.astype(np.float32)


def _column(
    path: Path, file: _File, key: str, option: str, usual: tuple[str, ...], cells: int
) -> tuple[Tensor | None, tuple[str, ...]]:
    """The values of a column as numbers, and their names. Without `key`, that of a usual name, if there is one."""
    if key and key not in file.columns:
        raise InputError(
            f"{option} {key}: there is none in {path}; it holds {', '.join(file.columns) or 'nothing else'}"
        )
    name = key or next((name for name in usual if name in file.columns), "")
    if not name:
        return None, ()
    values = file.read(name)
    if values.shape != (cells,):
        raise InputError(
            f"{path}: `{name}` must have one value for each of the {cells} cells, got the shape {values.shape}"
        )
    names, numbers = np.unique(values, return_inverse=True)
    return torch.from_numpy(numbers.astype(np.int64)), tuple(str(value) for value in names.tolist())
