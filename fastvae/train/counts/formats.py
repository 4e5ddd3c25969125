"""The formats of files of counts: .npz, .h5ad and .zarr. Each opens as a `CountsFile`.

An .h5ad file and a .zarr folder have the same parts, those of an AnnData object, which are read with h5py or zarr
themselves: X and the layers, each a dense matrix or a sparse one by rows or columns, and the columns of obs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvae.train import files
from fastvae.train.errors import InputError
from fastvae.train.npz import NpzFile

from .sources import CscSource, CsrSource, DenseSource, RawArray, Source, no_room, reading, scratch_file

__all__ = ["SUFFIXES", "CountsFile", "open_counts", "read_cell_names"]

SUFFIXES = (".npz", ".h5ad", ".zarr")

_MATRIX = ("x", "X", "counts")  # default keys of an .npz file
_GENES = ("genes", "gene", "var_names", "gene_names", "vocab", "vocabulary", "words", "items")


@dataclass
class CountsFile:
    """A file with a matrix of counts, columns with a value for each cell, and perhaps the names of the genes."""

    path: Path
    source: Source
    columns: tuple[str, ...]
    read: Callable[[str], Any]
    """Reads a column by name as an array; of an AnnData object as strings."""
    read_stored: Callable[[str], Any]
    """Reads a column as it is stored, so that numbers stay numbers."""
    genes: Any
    """The names of the genes as an array of strings, or None."""


def open_counts(path: Path, layer: str) -> CountsFile:
    """Open a file of counts. `layer` names a matrix in it other than the usual one.

    Raises InputError if it cannot be read, or has no such matrix.
    """
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _open_npz(path, layer)
    if suffix == ".h5ad":
        return _open_anndata(path, _open_h5(path), layer)
    return _open_anndata(path, _open_zarr(path), layer)


def read_cell_names(path: Path) -> Any:
    """Read the names of the cells as an array of strings; None for an .npz file, or if there are none."""
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return None
    return _Table(path, _open_h5(path) if suffix == ".h5ad" else _open_zarr(path), "obs").index()


# ---------------------------------------------------------------------------------------------------------------------
# .npz
# ---------------------------------------------------------------------------------------------------------------------

# The arrays that scipy.sparse.save_npz writes besides `format`, for each format.
_SPARSE = {
    "csr": ("data", "indices", "indptr", "shape"),
    "csc": ("data", "indices", "indptr", "shape"),
    "bsr": ("data", "indices", "indptr", "shape"),
    "coo": ("data", "row", "col", "shape"),
    "dia": ("data", "offsets", "shape"),
}


class _MemorySource(Source):
    """A matrix of a format that cannot be read in blocks. It is in memory as a whole, by rows."""

    def __init__(self, path: Path, matrix: Any) -> None:
        self.matrix = matrix.tocsr()
        super().__init__(path, self.matrix.shape, int(self.matrix.nnz), matrix.dtype)

    def read(self, block: int) -> Any:
        return self.matrix[self.rows_of(block)]

    def read_all(self) -> Any:
        return self.matrix


def _open_npz(path: Path, layer: str) -> CountsFile:
    arrays = NpzFile(path)
    kind = "csr"
    if "format" in arrays:
        stored = arrays.read("format").item()
        kind = stored.decode("ascii", "replace") if isinstance(stored, bytes) else str(stored)
    used = () if layer else _SPARSE.get(kind, ())
    source: Source
    if layer and layer not in arrays:
        raise InputError(f"--layer {layer}: {path} has no such array, only {arrays.contents()}")
    if used and all(name in arrays for name in used):
        source = _sparse_source(path, kind, arrays)
        used = (*used, "format", "_is_array")
    elif used := (layer,) if layer else tuple(name for name in _MATRIX if name in arrays)[:1]:
        source = _dense_source(path, _array(arrays, used[0]))
    else:
        raise InputError(
            f"{path}: no matrix of counts found: neither an array {' or '.join(_MATRIX)} nor a matrix from "
            f"scipy.sparse.save_npz; the file contains {arrays.contents()}; save the counts, cells by genes, with "
            "scipy.sparse.save_npz(path, scipy.sparse.csr_array(counts))"
        )
    names = next((name for name in _GENES if name in arrays), "")
    genes = None
    if names and arrays.shape(names) == source.shape[1:]:
        genes = np.asarray(arrays.read(names)).astype(str)
    columns = tuple(
        name for name in arrays.names if name not in (*used, *([names] if genes is not None else []))
    )
    return CountsFile(path, source, columns, arrays.read, arrays.read, genes)


def _sparse_source(path: Path, kind: str, arrays: NpzFile) -> Source:
    shape = tuple(int(size) for size in arrays.read("shape").tolist())
    if kind in ("csr", "csc") and len(shape) == 2:
        make = CsrSource if kind == "csr" else CscSource
        try:
            return make(path, shape, *(_array(arrays, name) for name in ("data", "indices", "indptr")))
        except InputError as error:
            raise InputError(
                f"{path}: not a valid sparse matrix: {str(error).removeprefix(f'{path}: ')}"
            ) from error
    parts = {name: arrays.read(name) for name in _SPARSE[kind]}
    return _MemorySource(path, _make_sparse(path, kind, parts, shape))


def _make_sparse(path: Path, kind: str, parts: dict[str, Any], shape: Any) -> Any:
    """Rebuild a matrix from the arrays of scipy.sparse.save_npz."""
    from scipy import sparse

    data = parts["data"].astype(np.float32) if parts["data"].dtype == np.float16 else parts["data"]
    try:
        if kind == "coo":
            return sparse.coo_array((data, (parts["row"], parts["col"])), shape=shape)
        if kind == "dia":
            return sparse.dia_array((data, parts["offsets"]), shape=shape)
        return sparse.bsr_array((data, parts["indices"], parts["indptr"]), shape=shape)
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"{path}: not a valid sparse matrix: {error}") from error


def _array(arrays: NpzFile, name: str) -> Any:
    """Return an array of an .npz file that is read in slices: from the file itself if it is not compressed."""
    place = arrays.locate(name)
    if place is None:  # Fortran's order, or objects
        return arrays.read(name)
    offset, dtype, shape, compressed = place
    if dtype.kind not in "iufb" or not shape:
        return arrays.read(name)
    if not compressed:
        return RawArray(arrays.path, arrays.open(), offset, dtype, shape)
    return _Unpacked(arrays, name, offset, dtype, shape)


class _Unpacked:
    """A compressed array of an .npz file. A whole array is read into memory, but for a slice it is unpacked first."""

    def __init__(self, arrays: NpzFile, name: str, offset: int, dtype: Any, shape: tuple[int, ...]) -> None:
        self.arrays, self.name, self.offset, self.dtype, self.shape = arrays, name, offset, dtype, shape
        self.unpacked: RawArray | None = None

    def __getitem__(self, rows: slice) -> Any:
        if self.unpacked is None and rows.indices(self.shape[0]) == (0, self.shape[0], 1):
            return self.arrays.read(self.name)
        if self.unpacked is None:
            path, file = self.arrays.path, scratch_file(self.arrays.path)
            try:
                self.arrays.unpack(self.name, file)
            except OSError as error:
                raise no_room(path, error) from error
            self.unpacked = RawArray(path, file, self.offset, self.dtype, self.shape)
        return self.unpacked[rows]


# ---------------------------------------------------------------------------------------------------------------------
# .h5ad and .zarr
# ---------------------------------------------------------------------------------------------------------------------


def _open_h5(path: Path) -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        if error.name != "h5py":
            raise
        raise InputError(f"{path}: .h5ad files need the package h5py: pip install h5py") from None
    try:
        return h5py.File(path, "r")
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read: {files.error_reason(error)}") from error
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        if "truncated file" in reason:
            reason = "the file was cut short; copy or download it again"
        raise InputError(f"{path}: cannot be read as an .h5ad file: {reason}") from error


def _open_zarr(path: Path) -> Any:
    try:
        import zarr
    except ModuleNotFoundError as error:
        if error.name != "zarr":
            raise
        raise InputError(f"{path}: .zarr folders need the package zarr: pip install zarr") from None
    try:
        return zarr.open_group(str(path), mode="r")
    except Exception as error:  # zarr raises many types
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: cannot be read as a zarr group: {reason}") from error


def _is_group(node: Any) -> bool:
    return hasattr(node, "keys")


def _open_anndata(path: Path, root: Any, layer: str) -> CountsFile:
    matrices = {"X": "X"} if "X" in root else {}
    if "layers" in root:
        matrices |= {name: f"layers/{name}" for name in sorted(root["layers"].keys())}
    if "raw" in root and "X" in root["raw"]:
        matrices["raw"] = "raw/X"
    elif "raw.X" in root:  # AnnData before 0.7
        matrices["raw"] = "raw.X"
    if layer and layer not in matrices:
        raise InputError(f"--layer {layer}: {path} has no such matrix, only {', '.join(matrices) or 'none'}")
    name = layer or ("counts" if "counts" in matrices else "X")
    if name not in matrices:
        raise InputError(
            f"{path}: no matrix found: neither layers['counts'] nor X; choose one with --layer: "
            f"{', '.join(matrices) or 'there is none'}"
        )
    source = _matrix(path, root[matrices[name]], name)
    obs = _Table(path, root, "obs")
    of_genes = _Table(path, root, matrices[name].replace("X", "var") if name == "raw" else "var")
    return CountsFile(path, source, obs.columns, obs.read, obs.read_stored, of_genes.index())


def _matrix(path: Path, node: Any, name: str) -> Source:
    if not _is_group(node):
        return _dense_source(path, node)
    attributes = dict(node.attrs)
    kind = _text(attributes.get("encoding-type", attributes.get("h5sparse_format", "")))
    shape = attributes.get("shape", attributes.get("h5sparse_shape"))
    makers: dict[str, type[CsrSource] | type[CscSource]] = {
        "csr_matrix": CsrSource,
        "csr": CsrSource,
        "csc_matrix": CscSource,
        "csc": CscSource,
    }
    make = makers.get(kind)
    if make is None or shape is None or any(part not in node for part in ("data", "indices", "indptr")):
        raise InputError(f"{path}: {name} is neither a dense matrix nor one by rows or columns, but {kind!r}")
    for part in ("data", "indices"):
        array = node[part]
        # A chunk that is missing would be read as zeros. (Chunks within shards are not counted.)
        if hasattr(array, "nchunks_initialized") and getattr(array, "shards", None) is None:
            missing = array.nchunks - array.nchunks_initialized
            if missing:
                raise InputError(
                    f"{path}: damaged, or cut short: {missing} chunks of {name}/{part} are missing"
                )
    return make(path, (int(shape[0]), int(shape[1])), *(node[part] for part in ("data", "indices", "indptr")))


def _dense_source(path: Path, array: Any) -> Source:
    if len(array.shape) != 2:
        raise InputError(
            f"{path}: the counts must be a matrix, cells by genes, got shape {tuple(array.shape)}"
        )
    return DenseSource(path, array)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class _Table:
    """The table `obs` or `var` of an AnnData object on disk."""

    def __init__(self, path: Path, root: Any, name: str) -> None:
        self.path, self.root = path, root
        self.node = root.get(name)
        self.columns: tuple[str, ...] = ()
        self._index = ""
        if self.node is None:
            return
        if _is_group(self.node):
            self._index = _text(self.node.attrs.get("_index", "_index"))
            names = [_text(key) for key in self.node.attrs.get("column-order", ())]
            self.columns = tuple(key for key in names or sorted(self.node.keys()) if key != self._index)
            self.columns = tuple(key for key in self.columns if key != "__categories")
        else:  # AnnData before 0.7 wrote one array of records
            self._index, *rest = self.node.dtype.names
            self.columns = tuple(rest)

    def index(self) -> Any:
        if self.node is None or (_is_group(self.node) and self._index not in self.node):
            return None
        with reading(self.path):
            values = self.node[self._index]
            return _strings(values if _is_group(self.node) else np.asarray(values))

    def read(self, name: str) -> Any:
        """Read a column as strings. Raises InputError if it has no value for a cell."""
        return _strings(self._complete(name))

    def read_stored(self, name: str) -> Any:
        """Read a column of numbers as they are, and others as strings. Raises InputError as `read` does."""
        values = self._complete(name)
        return values if values.dtype.kind in "iufb" else _strings(values)

    def _complete(self, name: str) -> Any:
        with reading(self.path):
            values, missing = self._values(name)
        if missing.any():
            raise InputError(
                f"{self.path}: `{name}` has no value for {missing.sum()} of the {len(missing)} cells, the first of "
                f"which is cell {missing.argmax()}; fill them in, for example with obs[name].astype(str), or use "
                "another column"
            )
        return values

    def _values(self, name: str) -> tuple[Any, Any]:
        """Return the values of a column, and where there is none."""
        node = self.node[name]
        if _is_group(self.node) and _is_group(node):
            if "codes" in node:
                return self._from_codes(np.asarray(node["codes"][:]), node["categories"])
            return np.asarray(node["values"][:]), np.asarray(node["mask"][:]).astype(bool)
        values = np.asarray(node[:] if _is_group(self.node) else node)
        if _is_group(self.node) and "__categories" in self.node and name in self.node["__categories"]:
            return self._from_codes(values, self.node["__categories"][name])
        if f"uns/{name}_categories" in self.root and not _is_group(self.node):
            return self._from_codes(values, self.root[f"uns/{name}_categories"])
        return values, values != values if values.dtype.kind == "f" else np.zeros(len(values), bool)

    @staticmethod
    def _from_codes(codes: Any, categories: Any) -> tuple[Any, Any]:
        names = _strings(categories["values"] if _is_group(categories) else categories)
        return names[np.maximum(codes, 0)], codes < 0


def _strings(values: Any) -> Any:
    if _is_group(values):
        values = values["values"]
    values = np.asarray(values[:])
    if values.dtype.kind in "SO":
        return np.asarray([_text(value) for value in values.tolist()], dtype=str)
    return np.array(values.tolist(), dtype=str)  # StringDType cannot be cast to str of fixed length
