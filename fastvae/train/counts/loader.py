"""Batches of cells, for Lightning."""

from collections.abc import Iterator

import torch
from lightning.pytorch import LightningDataModule

from fastvae.train.batches import Batches
from fastvae.train.draws import generator

from .cells import Batch, Cells, batch
from .recipe import Counts

__all__ = ["CellData"]

_HELD_OUT_BATCH = 500


class CellData(LightningDataModule):
    """The cells of a run as batches (Batch, the place of its first row in the whole batch).

    Epoch e shuffles by (seed, e); see `Batches`.
    """

    def __init__(self, cells: Cells, settings: Counts) -> None:
        super().__init__()
        self.cells, self.settings = cells, settings

    def train_dataloader(self) -> "CellBatches":
        return CellBatches(self, held_out=False)

    def val_dataloader(self) -> "CellBatches":
        return CellBatches(self, held_out=True)


class CellBatches(Batches):
    def __init__(self, data: CellData, held_out: bool) -> None:
        self.cells, self.seed = data.cells, data.settings.seed
        self.places = data.cells.held_out if held_out else data.cells.train
        size = _HELD_OUT_BATCH if held_out else data.settings.batch_size
        super().__init__(data, len(self.places), size, held_out)

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        places = self.places
        if not self.is_held_out:
            draws = generator(self.seed, 0, self.epoch)
            places = places[torch.randperm(len(places), generator=draws)]
        for whole in places.split(self.size)[: len(self)]:
            own = self.own(len(whole))
            yield batch(self.cells, whole[own]), own.start
