"""Batches of cells for Lightning."""

from collections.abc import Iterator

from lightning.pytorch import LightningDataModule

from fastvae.train.batches import Batches
from fastvae.train.seeding import seeded_generator

from .cells import Batch, Cells, make_batch
from .recipe import Counts

__all__ = ["CellData"]

_VAL_BATCH_SIZE = 500


class CellData(LightningDataModule):
    """The cells of a run as batches (Batch, index of its first row in the whole batch).

    The order of epoch e depends on (seed, e); see `Batches`.
    """

    def __init__(self, cells: Cells, settings: Counts) -> None:
        super().__init__()
        self.cells, self.settings = cells, settings

    def train_dataloader(self) -> "CellBatches":
        return CellBatches(self, val=False)

    def val_dataloader(self) -> "CellBatches":
        return CellBatches(self, val=True)


class CellBatches(Batches):
    def __init__(self, data: CellData, val: bool) -> None:
        self.cells, self.seed = data.cells, data.settings.seed
        self.indices = data.cells.val if val else data.cells.train
        size = _VAL_BATCH_SIZE if val else data.settings.batch_size
        super().__init__(data, len(self.indices), size, val)

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        counts, indices = self.cells.counts, self.indices
        if not self.is_val:
            indices = counts.order(indices, self.size, seeded_generator(self.seed, 0, self.epoch))
        full_batches = indices.split(self.size)[: len(self)]
        slices = [self.process_slice(len(full_batch)) for full_batch in full_batches]
        parts = [full_batch[rows] for full_batch, rows in zip(full_batches, slices, strict=True)]
        read = counts.batches([part.numpy() for part in parts])
        for part, rows, found in zip(parts, slices, read, strict=True):
            yield make_batch(self.cells, part, found), rows.start
