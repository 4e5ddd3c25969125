"""Loading counts of cells and genes as a sparse matrix from an .npz or .h5ad file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvae.train.errors import InputError
from fastvae.train.npz import NpzFile

from .settings import CountsSettings

__all__ = ["Batch", "Cells", "load", "make_batch"]

# Default keys of an .npz file and columns of an .h5ad file.
_MATRIX = ("x", "X", "counts")
_LABELS = ("label", "labels", "cell_type", "celltype", "bulk_labels")
_BATCHES = ("batch",)


class Batch(NamedTuple):
    """The input of the model for some cells."""

    counts: Tensor
    """(B, G), float32."""
    library: Tensor
    """The total count of each cell, (B, 1), float32."""
    batch: Tensor
    """The index of each cell's batch, int64 (B,)."""


@dataclass(frozen=True)
class Cells:
    """All cells of a file; `train` and `val` are indices of cells in `counts`."""

    name: str
    counts: Any
    """A scipy.sparse.csr_array (N, G) of float32."""
    train: Tensor
    val: Tensor
    batches: Tensor
    """The index of each cell's batch in `batch_names`, int64 (N,)."""
    batch_names: tuple[str, ...]
    labels: Tensor | None
    """The index of each cell's label in `label_names`, int64 (N,)."""
    label_names: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def genes(self) -> int:
        return int(self.counts.shape[1])


def make_batch(cells: Cells, indices: Tensor) -> Batch:
    counts = torch.from_numpy(cells.counts[indices.numpy()].toarray())
    return Batch(counts, counts.sum(1, keepdim=True), cells.batches[indices])


def load(settings: CountsSettings) -> Cells:
    """Load the cells of `--data`. A sixth of them is for validation.

    Raises InputError if the file is missing or cannot be read, if it does not hold a matrix of counts, or if there is
    not exactly one label or batch for each cell.
    """
    if not settings.data:
        raise InputError(
            "--data is missing: give a matrix of counts, cells by genes, as an .npz or .h5ad file (see --help)"
        )
    path = Path(settings.data).expanduser()
    if not path.is_file():
        raise InputError(f"{settings.data}: {'this is a folder' if path.is_dir() else 'no such file'}")
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".h5ad"):
        raise InputError(f"{path}: the file must end in .npz or .h5ad")
    with _open_npz(path) if suffix == ".npz" else _open_h5ad(path) as file:
        counts = _check_counts(path, file.matrix)
        labels, label_names = _read_column(path, file, settings.label, "--label", _LABELS, counts.shape[0])
        batches, batch_names = _read_column(path, file, settings.batch, "--batch", _BATCHES, counts.shape[0])

    library = np.asarray(counts.sum(1)).ravel()
    nonempty = np.flatnonzero(library > 0)
    notes = []
    if len(nonempty) < len(library):
        notes.append(f"skipped {len(library) - len(nonempty)} cells without any counts")
    if len(nonempty) < 2:
        raise InputError(
            f"{path}: expected at least 2 cells with counts, for training and validation, got {len(nonempty)}"
        )
    # Files are often sorted by batch or cell type, so shuffle first.
    draws = torch.Generator().manual_seed(settings.seed)
    order = torch.from_numpy(nonempty)[torch.randperm(len(nonempty), generator=draws)]
    val, train = order.tensor_split([max(1, len(nonempty) // 6)])
    return Cells(
        path.name,
        counts,
        train,
        val,
        torch.zeros(len(library), dtype=torch.int64) if batches is None else batches,
        batch_names or ("",),
        labels,
        label_names,
        tuple(notes),
    )


@dataclass
class _File:
    """A matrix of counts and the other columns of its file."""

    matrix: Any
    columns: tuple[str, ...]
    read: Callable[[str], Any]
    """Reads a column by name as an array."""


# The arrays that scipy.sparse.save_npz writes besides `format`, for each format.
_SPARSE = {
    "csr": ("data", "indices", "indptr", "shape"),
    "csc": ("data", "indices", "indptr", "shape"),
    "bsr": ("data", "indices", "indptr", "shape"),
    "coo": ("data", "row", "col", "shape"),
    "dia": ("data", "offsets", "shape"),
}


@contextmanager
def _open_npz(path: Path) -> Iterator[_File]:
    with NpzFile(path) as arrays:
        kind = "csr"
        if "format" in arrays:
            stored = arrays.read("format").item()
            kind = stored.decode("ascii", "replace") if isinstance(stored, bytes) else str(stored)
        used = _SPARSE.get(kind, ())
        if used and all(name in arrays for name in used):
            matrix = _make_sparse(path, kind, {name: arrays.read(name) for name in used})
            used = (*used, "format", "_is_array")
        elif used := tuple(name for name in _MATRIX if name in arrays)[:1]:
            matrix = arrays.read(used[0])
        else:
            raise InputError(
                f"{path}: no matrix of counts found: neither an array {' or '.join(_MATRIX)} nor a matrix from "
                f"scipy.sparse.save_npz; the file contains {arrays.contents()}; save the counts, cells by genes, with "
                "scipy.sparse.save_npz(path, scipy.sparse.csr_array(counts))"
            )
        yield _File(matrix, tuple(name for name in arrays.names if name not in used), arrays.read)


def _make_sparse(path: Path, kind: str, parts: dict[str, Any]) -> Any:
    """Rebuild the matrix from the arrays of scipy.sparse.save_npz."""
    from scipy import sparse

    data, shape = _without_half(parts["data"]), tuple(parts["shape"].tolist())
    try:
        if kind == "coo":
            return sparse.coo_array((data, (parts["row"], parts["col"])), shape=shape)
        if kind == "dia":
            return sparse.dia_array((data, parts["offsets"]), shape=shape)
        make = {"csr": sparse.csr_array, "csc": sparse.csc_array, "bsr": sparse.bsr_array}[kind]
        return make((data, parts["indices"], parts["indptr"]), shape=shape)
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"{path}: not a valid sparse matrix: {error}") from error


def _without_half(values: Any) -> Any:
    """Convert half precision to float32, because scipy has no sparse matrices of half precision."""
    return values.astype(np.float32) if values.dtype == np.float16 else values


@contextmanager
def _open_h5ad(path: Path) -> Iterator[_File]:
    """Read the raw counts (`layers["counts"]` if there is one, otherwise X) and the columns of obs."""
    try:
        import anndata
    except ModuleNotFoundError as error:
        if error.name != "anndata":
            raise
        raise InputError(f"{path}: .h5ad files need the package anndata: pip install anndata") from None
    try:
        data = anndata.read_h5ad(path)
    except Exception as error:  # h5py and anndata raise many types
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: cannot be read as an .h5ad file: {reason}") from error
    matrix = data.layers.get("counts", data.X)
    if matrix is None:
        raise InputError(f"{path}: no matrix found: neither layers['counts'] nor X")

    def read(name: str) -> Any:
        column = data.obs[name]
        missing = np.flatnonzero(column.isna())
        if len(missing):
            raise InputError(
                f"{path}: `{name}` has no value for {len(missing)} of the {len(column)} cells, the first of which is "
                f"cell {missing[0]}; fill them in, for example with obs[name].astype(str), or use another column"
            )
        return np.asarray(column.astype(str), dtype=str)

    yield _File(matrix, tuple(map(str, data.obs.columns)), read)


def _check_counts(path: Path, matrix: Any) -> Any:
    """Return the counts as a CSR array of float32. Raises InputError unless all are non-negative whole numbers."""
    from scipy import sparse

    if matrix.ndim != 2:
        raise InputError(
            f"{path}: the counts must be a matrix, cells by genes, got shape {tuple(matrix.shape)}"
        )
    if matrix.dtype.kind not in "iufb":
        raise InputError(f"{path}: the counts must be numbers, got {matrix.dtype}")
    cells, genes = matrix.shape
    if genes == 0 or cells == 0:
        what = "genes" if genes == 0 else "cells"
        raise InputError(f"{path}: there are no {what}: the counts have shape ({cells}, {genes})")
    if not sparse.issparse(matrix):
        matrix = _without_half(np.asarray(matrix))
    counts = sparse.csr_array(matrix)
    # The file may have been written with another byte order.
    counts.data = _without_half(counts.data).astype(counts.dtype.newbyteorder("="), copy=False)
    counts.sum_duplicates()
    values = counts.data
    for bad, what in (
        (~np.isfinite(values), "not finite"),
        (values < 0, "negative"),
        (
            values != np.floor(values),
            "fractional, but raw counts are needed (normalised or log-transformed?)",
        ),
    ):
        if bad.any():
            position = int(bad.argmax())
            cell = int(np.searchsorted(counts.indptr, position, side="right")) - 1
            column = int(counts.indices[position])
            raise InputError(f"{path}: a count is {what}: {values[position]:g} in cell {cell}, gene {column}")
    return counts.astype(np.float32)


def _read_column(
    path: Path, file: _File, key: str, option: str, usual: tuple[str, ...], cells: int
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Return the values of a column as integers, and their names. Without `key`, use a column with a usual name."""
    if key and key not in file.columns:
        raise InputError(
            f"{option} {key}: {path} has no such column, only {', '.join(file.columns) or 'the counts'}"
        )
    name = key or next((name for name in usual if name in file.columns), "")
    if not name:
        return None, ()
    values = file.read(name)
    if values.shape != (cells,):
        raise InputError(
            f"{path}: `{name}` must have one value for each of the {cells} cells, got shape {values.shape}"
        )
    names, numbers = np.unique(values, return_inverse=True)
    return torch.from_numpy(numbers.astype(np.int64)), tuple(str(value) for value in names.tolist())
