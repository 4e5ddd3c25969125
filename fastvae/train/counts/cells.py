"""Cells and their counts of genes: loading a file or several as one data set, and making batches."""

import functools
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvae.train.errors import InputError

from .columns import Covariate, read_categories, read_covariates
from .formats import SUFFIXES, CountsFile, open_counts
from .matrix import Counts, DiskCounts, MemoryCounts, canonical, check_values
from .settings import CountsSettings

__all__ = ["Batch", "Cells", "list_files", "load", "make_batch", "to_device"]

# Default keys of an .npz file and columns of obs.
_LABELS = ("label", "labels", "cell_type", "celltype", "bulk_labels")
_BATCHES = ("batch",)


class Batch(NamedTuple):
    """The input of the model for some cells."""

    counts: Tensor
    """(B, G), float32, torch.sparse_csr, or dense on devices without sparse matrices."""
    library: Tensor
    """The total count of each cell, (B, 1), float32."""
    batch: Tensor
    """The index of each cell's batch, int64 (B,)."""
    covariates: Tensor | None = None
    """Each cell's covariates, float32 (B, K): the index of the category, or the standardised value. None if K is 0."""
    labels: Tensor | None = None
    """The index of each cell's label, int64 (B,)."""


@dataclass(frozen=True)
class Cells:
    """All cells of a data set; `train` and `val` are indices of cells.

    They are in random order. If the counts stay on disk, `val` is in the order of the file, in which it is read.
    """

    name: str
    counts: Counts
    library: Tensor
    """The total count of each cell, (N, 1), float32."""
    totals: Tensor
    """The total count of each gene in the training cells, float64 (G,)."""
    train: Tensor
    val: Tensor
    batches: Tensor
    """The index of each cell's batch in `batch_names`, int64 (N,)."""
    batch_names: tuple[str, ...]
    labels: Tensor | None
    """The index of each cell's label in `label_names`, int64 (N,)."""
    label_names: tuple[str, ...]
    covariates: tuple[Covariate, ...]
    covariate_values: Tensor
    """The values of each cell's covariates, float64 (N, K): the index of the category, or the number in the file."""
    genes: int
    gene_names: Any
    """The names of the genes as an array of strings, or None."""
    notes: tuple[str, ...]


def make_batch(cells: Cells, indices: Tensor, counts: Any = None) -> Batch:
    """Return these cells as a batch. Their rows of counts, a scipy.sparse array, may be given."""
    rows = cells.counts.rows(indices.numpy()) if counts is None else counts
    labels = None if cells.labels is None else cells.labels[indices]
    return Batch(
        _to_torch(rows), cells.library[indices], cells.batches[indices], _standardize(cells, indices), labels
    )


def _standardize(cells: Cells, indices: Tensor) -> Tensor | None:
    if not cells.covariates:
        return None
    mean, scale = (
        torch.tensor([getattr(covariate, name) for covariate in cells.covariates], dtype=torch.float64)
        for name in ("mean", "scale")
    )
    return ((cells.covariate_values[indices] - mean) / scale).float()


def _to_torch(rows: Any) -> Tensor:
    """Return a scipy.sparse.csr_array as a torch.sparse_csr tensor, with the indices that the kernels take."""
    _expect_warning()
    starts, columns = (torch.from_numpy(part.astype(np.int64)) for part in (rows.indptr, rows.indices))
    values = torch.from_numpy(rows.data)
    return torch.sparse_csr_tensor(starts, columns, values, rows.shape, check_invariants=False)


@functools.cache
def _expect_warning() -> None:
    """Let torch say once per process, to nobody, that its sparse matrices are new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(
            torch.zeros(2, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0)
        )


def to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "mps":  # it has no sparse matrices
        batch = batch._replace(counts=batch.counts.to_dense())
    parts: Any = (None if part is None else part.to(device, non_blocking=True) for part in batch)
    return Batch(*parts)


def list_files(data: str) -> list[Path]:
    """Return the files of `--data`: one, several with commas between them, or all in a folder.

    Raises InputError if there are none, or one is missing.
    """
    path = Path(data).expanduser()
    if path.is_dir() and path.suffix.lower() != ".zarr":
        found = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)
        if not found:
            raise InputError(
                f"{data}: there is no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} in this folder"
            )
        return found
    names = [name.strip() for name in data.split(",")] if "," in data and not path.exists() else [data]
    paths = [Path(name).expanduser() for name in names if name]
    for each in paths:
        is_zarr = each.suffix.lower() == ".zarr"
        if not each.exists() or (each.is_dir() and not is_zarr):
            raise InputError(f"{each}: {'this is a folder' if each.is_dir() else 'no such file'}")
        if each.suffix.lower() not in SUFFIXES:
            raise InputError(f"{each}: the file must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    return paths


def load(
    settings: CountsSettings,
    covariates: Sequence[Covariate] | None = None,
    *,
    needs_batches: bool = False,
) -> Cells:
    """Load the cells of `--data`. A sixth of them is for validation. `covariates` are those of an existing run.
    `needs_batches` says that it was trained with batches.

    All values are checked, and library sizes are summed. If the counts take more than `--memory`, they stay on disk.

    Raises InputError if a file is missing or cannot be read, if it does not hold a matrix of counts, if files do not
    have the same genes, or if there is not exactly one label, batch or covariate for each cell.
    """
    if not settings.data:
        raise InputError(
            "--data is missing: give a matrix of counts, cells by genes, as an .npz, .h5ad or .zarr file (see --help)"
        )
    paths = list_files(settings.data)
    opened = [open_counts(path, settings.layer) for path in paths]
    _check_genes(opened)
    sizes = [file.source.shape[0] for file in opened]
    cells, genes = sum(sizes), opened[0].source.shape[1]
    if cells < 2:
        raise InputError(
            f"{settings.data}: expected at least 2 cells, for training and validation, got {cells}"
        )
    labels, label_names = read_categories(opened, settings.label, "--label", _LABELS)
    batches, batch_names = read_categories(opened, settings.batch, "--batch", _BATCHES, needed=needs_batches)

    # Files are often sorted by batch or cell type, so shuffle first.
    draws = torch.Generator().manual_seed(settings.seed)
    val, train = torch.randperm(cells, generator=draws).tensor_split([max(1, cells // 6)])
    covariate_values, found_covariates = read_covariates(opened, settings.covariates, train, covariates)
    limit = int(settings.memory * 1e6)
    in_memory = sum(file.source.nbytes for file in opened) <= limit
    counts: Counts = (
        MemoryCounts(_read_all(opened)) if in_memory else DiskCounts([file.source for file in opened], limit)
    )
    if not in_memory:
        val = val.sort().values
    library, totals, stored = _sum(counts, train, cells, genes)
    counts.stored = stored
    notes = []
    if empty := int((library == 0).sum()):
        notes.append(f"{empty} of the {cells} cells have no counts; they are trained on as they are")
    return Cells(
        paths[0].name if len(paths) == 1 else f"{len(paths)} files of {_folder(paths)}",
        counts,
        library,
        totals,
        train,
        val,
        torch.zeros(cells, dtype=torch.int64) if batches is None else batches,
        batch_names or ("",),
        labels,
        label_names,
        found_covariates,
        covariate_values,
        genes,
        next((file.genes for file in opened if file.genes is not None), None),
        tuple(notes),
    )


def _folder(paths: list[Path]) -> str:
    return Path(os.path.commonpath([path.parent.resolve() for path in paths])).name


def _check_genes(files: list[CountsFile]) -> None:
    """Raises InputError unless every file has a matrix of numbers, and all have the same genes."""
    first = files[0]
    for file in files:
        source = file.source
        if source.dtype.kind not in "iufb":
            raise InputError(f"{file.path}: the counts must be numbers, got {source.dtype}")
        if 0 in source.shape:
            what = "genes" if source.shape[1] == 0 else "cells"
            raise InputError(f"{file.path}: there are no {what}: the counts have shape {source.shape}")
        if source.shape[1] != first.source.shape[1]:
            raise InputError(
                f"{file.path}: all files must have the same genes: expected {first.source.shape[1]}, as in "
                f"{first.path}, got {source.shape[1]}"
            )
        if file.genes is None or first.genes is None:
            continue
        different = np.flatnonzero(file.genes != first.genes)
        if len(different):
            gene = int(different[0])
            raise InputError(
                f"{file.path}: all files must have the same genes in the same order: gene {gene} is "
                f"{str(file.genes[gene])!r}, but {str(first.genes[gene])!r} in {first.path}"
            )


def _read_all(files: list[CountsFile]) -> Any:
    """Read all files into one CSR array of float32, and check the values."""
    from scipy import sparse

    parts = []
    for file in files:
        matrix = sparse.csr_array(file.source.read_all())
        matrix.sum_duplicates()
        check_values(file.path, matrix)
        parts.append(canonical(matrix, np.float32))
    return parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")


def _sum(counts: Counts, train: Tensor, cells: int, genes: int) -> tuple[Tensor, Tensor, int]:
    """Return the total of each cell, the total of each gene in the training cells, and the number of stored values."""
    is_train = np.zeros(cells, np.float64)
    is_train[train.numpy()] = 1
    if isinstance(counts, MemoryCounts):
        library = np.asarray(counts.matrix.sum(1, dtype=np.float64)).ravel()
        return _library(library), torch.from_numpy(counts.matrix.T @ is_train), counts.stored
    assert isinstance(counts, DiskCounts)
    library, totals, stored = np.empty(cells), np.zeros(genes), 0
    for block in range(len(counts.starts) - 1):
        start, stop = int(counts.starts[block]), int(counts.starts[block + 1])
        matrix = counts.read_checked(block)
        library[start:stop] = np.asarray(matrix.sum(1, dtype=np.float64)).ravel()
        totals += matrix.T @ is_train[start:stop]
        stored += int(matrix.nnz)
    return _library(library), torch.from_numpy(totals), stored


def _library(totals: Any) -> Tensor:
    return torch.from_numpy(totals.astype(np.float32))[:, None]
