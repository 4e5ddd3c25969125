"""The counts of a data set: all files one after another, in memory or read in blocks of cells from disk.

On disk, an epoch goes over the cells in an order that keeps reading cheap: `shuffle_in_blocks`. Rounds of batches are
read at a time, the next one while the current one is in use, so that memory is bounded by the size of a few rounds.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvae.train.errors import InputError

from .sources import BLOCK, Source

__all__ = ["Counts", "DiskCounts", "MemoryCounts", "check_values", "shuffle_in_blocks"]

_LARGEST = float(np.finfo(np.float32).max)

LANES = 8
"""The number of places of the data that a batch is drawn from at a time, at least."""


class Counts(ABC):
    """Counts (cells, genes), of which `stored` are stored."""

    shape: tuple[int, int]
    stored: int

    @abstractmethod
    def rows(self, indices: Any) -> Any:
        """Return these cells as a scipy.sparse.csr_array of float32, with ascending genes."""

    @abstractmethod
    def batches(self, indices: Sequence[Any]) -> Iterator[Any]:
        """Yield `rows` of each array of indices."""

    @abstractmethod
    def order(self, cells: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
        """Return the cells in random order for an epoch of batches."""


class MemoryCounts(Counts):
    def __init__(self, matrix: Any) -> None:
        self.matrix, self.shape, self.stored = matrix, matrix.shape, int(matrix.nnz)

    def rows(self, indices: Any) -> Any:
        return self.matrix[indices]

    def batches(self, indices: Sequence[Any]) -> Iterator[Any]:
        return map(self.rows, indices)

    def order(self, cells: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
        return cells[torch.randperm(len(cells), generator=generator)]


class DiskCounts(Counts):
    """Counts that stay in their files. So many bytes of `memory` are used for those that are read."""

    def __init__(self, sources: Sequence[Source], memory: int) -> None:
        self.sources = sources
        cells = [source.shape[0] for source in sources]
        self.shape = (sum(cells), sources[0].shape[1])
        self.stored = sum(source.stored for source in sources)
        self._first_cell = np.concatenate(([0], np.cumsum(cells)))
        self._first_block = np.concatenate(([0], np.cumsum([source.blocks for source in sources])))
        # The first cell of each block. Blocks do not reach over the end of a file.
        starts = [
            first + BLOCK * np.arange(s.blocks) for first, s in zip(self._first_cell, sources, strict=False)
        ]
        self.starts = np.concatenate([*starts, [self.shape[0]]])
        # Two rounds are in memory, and while the second is read, its blocks and their copy are as well. The rest is for
        # the batches, and for what the allocator keeps.
        self.round_bytes = memory // 7

    def read(self, block: int) -> Any:
        """Read a block of all files."""
        file = int(np.searchsorted(self._first_block, block, "right")) - 1
        return canonical(self.sources[file].read(block - int(self._first_block[file])), np.float32)

    def read_checked(self, block: int) -> Any:
        """Read a block and check its values, with the place in its own file."""
        file = int(np.searchsorted(self._first_block, block, "right")) - 1
        source, number = self.sources[file], block - int(self._first_block[file])
        matrix = source.read(number)
        matrix.sum_duplicates()
        check_values(source.path, matrix, number * BLOCK)
        return matrix

    def blocks_of(self, indices: Any) -> Any:
        return np.searchsorted(self.starts, indices, "right") - 1

    def rows_in_round(self, batch_size: int) -> int:
        """Return how many cells of whole batches to read at a time."""
        of_cell = 8 * self.stored / self.shape[0]
        return batch_size * max(1, int(self.round_bytes / (1.25 * of_cell * batch_size + 1)))

    def rows(self, indices: Any) -> Any:
        indices = np.asarray(indices)
        (matrix,) = self.batches([indices])
        return matrix

    def batches(self, indices: Sequence[Any]) -> Iterator[Any]:
        """Yield the cells of each batch, with the next round of batches being read meanwhile."""
        if not len(indices):
            return
        size = max(1, self.rows_in_round(1) // max(1, max(len(part) for part in indices)))
        rounds = [indices[first : first + size] for first in range(0, len(indices), size)]
        wanted = [np.unique(np.concatenate(batches)) for batches in rounds]
        kept: dict[int, Any] = {}

        def read(number: int) -> Any:
            """Read the wanted cells of a round. Blocks that the next round needs as well are kept until then."""
            from scipy import sparse

            if not len(wanted[number]):
                return self.read(0)[:0]
            after = set(self.blocks_of(wanted[number + 1]).tolist()) if number + 1 < len(rounds) else set()
            blocks = self.blocks_of(wanted[number])
            ends = np.flatnonzero(np.diff(blocks, append=-1)) + 1
            parts, start = [], 0
            for end in ends.tolist():
                block = int(blocks[start])
                matrix = kept.pop(block) if block in kept else self.read(block)
                parts.append(matrix[wanted[number][start:end] - self.starts[block]])
                if block in after and len(kept) < 2 * LANES:
                    kept[block] = matrix
                start = end
            return sparse.vstack(parts, format="csr")

        with ThreadPoolExecutor(1, "fastvae-reader") as pool:
            future = pool.submit(read, 0)
            for number, batches in enumerate(rounds):
                matrix = future.result()
                if number + 1 < len(rounds):
                    future = pool.submit(read, number + 1)
                for part in batches:
                    yield matrix[np.searchsorted(wanted[number], part)]
                del matrix

    def order(self, cells: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
        block = torch.from_numpy(self.blocks_of(cells.numpy()))
        return shuffle_in_blocks(
            cells, block, batch_size, self.rows_in_round(batch_size) // batch_size, generator
        )


def shuffle_in_blocks(
    cells: Tensor, block: Tensor, batch_size: int, batches: int, generator: torch.Generator
) -> Tensor:
    """Return the cells in random order, so that rounds of so many batches need few blocks.

    The blocks are put into random order, and the sequence of their cells is cut into LANES parts. Each batch takes a
    share of each part, one after another, so that the first of n processes, which takes the first 1/n of every batch,
    reads the first 1/n of the parts and no other blocks (if n divides LANES). Within a part, the cells of a round are
    shuffled. The order depends on the arguments only, and not on the number of processes.
    """
    ranks = torch.randperm(int(block.max()) + 1 if len(block) else 0, generator=generator)
    sequence = cells[torch.sort(ranks[block], stable=True).indices]
    full, rest = divmod(len(cells), batch_size)

    def shares(size: int) -> list[int]:
        cuts = [lane * size // LANES for lane in range(LANES + 1)]
        return [end - start for start, end in pairwise(cuts)]

    share, last_share = shares(batch_size), shares(rest)
    lanes = sequence.split([full * s + end for s, end in zip(share, last_share, strict=True)])
    shuffled = []
    for lane, s in zip(lanes, share, strict=True):
        parts = lane.split(batches * s) if batches * s and len(lane) else (lane,)
        shuffled.append(torch.cat([part[torch.randperm(len(part), generator=generator)] for part in parts]))
    whole = [lane[: full * s].view(full, s) for lane, s in zip(shuffled, share, strict=True)]
    ends = [lane[full * s :] for lane, s in zip(shuffled, share, strict=True)]
    return torch.cat([torch.cat(whole, 1).flatten(), *ends])


def canonical(matrix: Any, dtype: Any) -> Any:
    """Return a CSR array of this dtype with ascending genes, each once, and columns of four bytes where they fit."""
    matrix.sum_duplicates()
    return matrix.astype(dtype, copy=False)


def check_values(path: Any, matrix: Any, first_cell: int = 0) -> None:
    """Raises InputError, with the place, unless all values of a CSR array are non-negative whole numbers in the
    range of float32."""
    values = matrix.data
    # Most files are in order, and then a single pass says so. (A NaN fails every comparison.)
    if not len(values) or values.dtype.kind in "ub":
        return
    in_order = bool(((values >= 0) & (values == np.floor(values))).all())
    if in_order and values.max() <= _LARGEST:
        return
    for bad, what in (
        (~np.isfinite(values), "not finite"),
        (values < 0, "negative"),
        (
            values != np.floor(values),
            "fractional, but raw counts are needed (normalised or log-transformed?)",
        ),
        (values > _LARGEST, "too large for float32, in which counts are kept"),
    ):
        if bad.any():
            position = int(bad.argmax())
            cell = first_cell + int(np.searchsorted(matrix.indptr, position, side="right")) - 1
            column = int(matrix.indices[position])
            raise InputError(f"{path}: a count is {what}: {values[position]:g} in cell {cell}, gene {column}")
