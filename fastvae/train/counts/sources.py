"""Matrices of counts on disk, of which a block of cells is read at a time, whatever their layout."""

import os
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastvae.train import files
from fastvae.train.errors import InputError

__all__ = ["BLOCK", "CscSource", "CsrSource", "DenseSource", "RawArray", "Source", "reading", "scratch_file"]

BLOCK = 256
"""The number of cells that are read at a time."""

_CHUNK = 1 << 25  # the number of bytes of a sparse matrix by columns that are sorted at a time


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error of the block into an InputError that says that the file is damaged.

    h5py and zarr raise many types for damaged files, zarr those of its codecs too.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: damaged, or cut short: {reason}") from error


class Source(ABC):
    """A matrix of counts in a file, (cells, genes), of which `stored` values are stored."""

    def __init__(self, path: Path, shape: tuple[int, int], stored: int, dtype: Any) -> None:
        self.path, self.shape, self.stored, self.dtype = path, shape, stored, np.dtype(dtype)

    @property
    def nbytes(self) -> int:
        """The memory that the whole matrix takes, as CSR with values and columns of four bytes each."""
        return 8 * self.stored

    @property
    def blocks(self) -> int:
        return -(-self.shape[0] // BLOCK)

    def rows_of(self, block: int) -> slice:
        return slice(block * BLOCK, min((block + 1) * BLOCK, self.shape[0]))

    @abstractmethod
    def read(self, block: int) -> Any:
        """Read a block of cells as a scipy.sparse.csr_array with the values as they are stored.

        Raises InputError if the file is damaged.
        """

    @abstractmethod
    def read_all(self) -> Any:
        """Read the whole matrix, as an array or a scipy.sparse array."""

    def _damaged(self, why: str) -> InputError:
        return InputError(f"{self.path}: damaged, or cut short: {why}")


class RawArray:
    """A one-dimensional array, or the rows of a matrix, that lie in a file one after another from `offset` on."""

    def __init__(self, path: Path, file: BinaryIO, offset: int, dtype: Any, shape: tuple[int, ...]) -> None:
        self.path, self.file, self.offset, self.dtype, self.shape = path, file, offset, np.dtype(dtype), shape

    def __getitem__(self, rows: slice) -> Any:
        start, stop, _ = rows.indices(self.shape[0])
        width = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        size, begin = max(0, stop - start) * width, self.offset + start * width
        parts = bytearray()
        while len(parts) < size:
            # A single call returns at most 2 GiB.
            part = _read_at(self.file, min(size - len(parts), 1 << 30), begin + len(parts))
            if not part:
                raise InputError(f"{self.path}: the file was cut short: it ends within its counts")
            parts += part
        return np.frombuffer(parts, self.dtype).reshape(-1, *self.shape[1:])


_LOCK = threading.Lock()


def _read_at(file: BinaryIO, size: int, position: int) -> bytes:
    """Read from a position of a file that several threads share."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, position)
    with _LOCK:  # Windows has no such call
        file.seek(position)
        return file.read(size)


def scratch_file(path: Path) -> BinaryIO:
    """Open a temporary file without a name, for counts whose own file cannot be read in blocks."""
    try:
        return tempfile.TemporaryFile(prefix="fastvae-")
    except OSError as error:
        raise no_room(path, error) from error


def no_room(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path}: reading it in blocks needs a temporary file in {tempfile.gettempdir()}, which cannot be written: "
        f"{files.error_reason(error)}; set TMPDIR to a folder with more room, or save them uncompressed and by rows"
    )


class DenseSource(Source):
    """A dense matrix, whose rows `array[a:b]` reads."""

    def __init__(self, path: Path, array: Any) -> None:
        cells, genes = map(int, array.shape)
        super().__init__(path, (cells, genes), cells * genes, array.dtype)
        self.array = array

    @property
    def nbytes(self) -> int:
        return self.stored * int(self.array.dtype.itemsize)

    def read(self, block: int) -> Any:
        from scipy import sparse

        return sparse.csr_array(self._read(self.rows_of(block)))

    def read_all(self) -> Any:
        return self._read(slice(None))

    def _read(self, rows: slice) -> Any:
        with reading(self.path):
            return _plain(np.asarray(self.array[rows]))


class _SparseSource(Source):
    """A sparse matrix, whose arrays are sliced: `data`, `indices`, and `indptr`, which is read at once."""

    def __init__(self, path: Path, shape: tuple[int, int], data: Any, indices: Any, indptr: Any) -> None:
        with reading(path):
            self.indptr = np.asarray(indptr[:]).astype(np.int64)
        super().__init__(path, shape, int(self.indptr[-1]) if len(self.indptr) else 0, data.dtype)
        self.data, self.indices = data, indices
        lines = shape[self._axis]
        if len(self.indptr) != lines + 1 or self.indptr[0] != 0 or (np.diff(self.indptr) < 0).any():
            raise self._damaged(f"`indptr` must have {lines + 1} numbers that rise from 0")
        for name, array in (("data", data), ("indices", indices)):
            if array.shape[0] < self.stored:
                raise self._damaged(f"`{name}` must have {self.stored} numbers, got {array.shape[0]}")

    _axis: int

    def _slice(self, start: int, stop: int) -> tuple[Any, Any]:
        """Read values and indices of a part of the matrix."""
        with reading(self.path):
            data, indices = (np.asarray(array[start:stop]) for array in (self.data, self.indices))
        limit = self.shape[1 - self._axis]
        if len(indices) != stop - start or len(data) != stop - start:
            raise self._damaged(f"expected {stop - start} numbers, got {len(data)} and {len(indices)}")
        if len(indices) and not (indices.min() >= 0 and indices.max() < limit):
            raise self._damaged(f"`indices` must lie between 0 and {limit - 1}")
        return _plain(data), indices.astype(
            np.int32 if limit <= np.iinfo(np.int32).max else np.int64, copy=False
        )


class CsrSource(_SparseSource):
    """A sparse matrix that is stored by cells."""

    _axis = 0

    def read(self, block: int) -> Any:
        rows = self.rows_of(block)
        return self._rows(rows.start, rows.stop)

    def read_all(self) -> Any:
        return self._rows(0, self.shape[0])

    def _rows(self, first: int, last: int) -> Any:
        from scipy import sparse

        indptr = self.indptr[first : last + 1]
        data, indices = self._slice(int(indptr[0]), int(indptr[-1]))
        return sparse.csr_array((data, indices, indptr - indptr[0]), shape=(last - first, self.shape[1]))


# A value of a matrix by columns on its way into blocks of cells.
_ENTRY = np.dtype([("row", np.int32), ("column", np.int32), ("value", np.float64)])


class CscSource(_SparseSource):
    """A sparse matrix that is stored by genes.

    Before the first block is read, all values are sorted into blocks of cells in a temporary file, in two passes with
    bounded memory.
    """

    _axis = 1
    _sorted: BinaryIO | None = None

    def read(self, block: int) -> Any:
        from scipy import sparse

        if self._sorted is None:
            self._sort()
        rows = self.rows_of(block)
        array = RawArray(self.path, self._sorted, 0, _ENTRY, (self.stored,))  # type: ignore[arg-type]
        entries = array[slice(int(self._starts[block]), int(self._starts[block + 1]))]
        shape = (rows.stop - rows.start, self.shape[1])
        return sparse.coo_array((entries["value"], (entries["row"], entries["column"])), shape=shape).tocsr()

    def read_all(self) -> Any:
        from scipy import sparse

        data, indices = self._slice(0, self.stored)
        return sparse.csc_array((data, indices, self.indptr), shape=self.shape)

    def _sort(self) -> None:
        counts = np.zeros(self.blocks, np.int64)
        for _, _, indices in self._chunks():
            counts += np.bincount(indices // BLOCK, minlength=self.blocks)
        self._starts = np.concatenate(([0], np.cumsum(counts)))
        file, cursor = scratch_file(self.path), self._starts[:-1].copy()
        try:
            for start, data, indices in self._chunks():
                entries = np.empty(len(data), _ENTRY)
                # The columns of the values from `start` on.
                entries["column"] = (
                    np.searchsorted(self.indptr, np.arange(start, start + len(data)), "right") - 1
                )
                entries["row"], entries["value"] = indices % BLOCK, data
                block = indices // BLOCK
                entries = entries[np.argsort(block, kind="stable")]
                sizes = np.bincount(block, minlength=self.blocks)
                ends = np.cumsum(sizes)
                for b in np.flatnonzero(sizes):
                    file.seek(int(cursor[b]) * _ENTRY.itemsize)
                    file.write(entries[ends[b] - sizes[b] : ends[b]].tobytes())
                cursor += sizes
            file.flush()
        except OSError as error:
            raise no_room(self.path, error) from error
        self._sorted = file

    def _chunks(self) -> Iterator[tuple[int, Any, Any]]:
        size = _CHUNK // _ENTRY.itemsize
        for start in range(0, self.stored, size):
            yield start, *self._slice(start, min(start + size, self.stored))


def _plain(values: Any) -> Any:
    """Return numbers in the byte order of this machine, and half precision as float32: scipy takes no others."""
    kind = np.dtype(np.float32) if values.dtype.kind == "f" and values.dtype.itemsize == 2 else values.dtype
    return values.astype(kind.newbyteorder("="), copy=False)
