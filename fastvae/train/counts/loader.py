"""Batches of cells for Lightning."""

from collections.abc import Iterator

import torch
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
        indices = self.indices
        if not self.is_val:
            draws = seeded_generator(self.seed, 0, self.epoch)
            indices = indices[torch.randperm(len(indices), generator=draws)]
        for full_batch in indices.split(self.size)[: len(self)]:
            rows = self.process_slice(len(full_batch))
            yield make_batch(self.cells, full_batch[rows]), rows.start
