"""Batches of cells, for Lightning."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningDataModule

from .cells import Batch, Cells, batch
from .loader import generator

if TYPE_CHECKING:
    from fastvae.recipes.counts import Counts

__all__ = ["CellData"]

_HELD_OUT_BATCH = 500


class CellData(LightningDataModule):
    """The cells of a run as batches (Batch, the place of its first row in the whole batch).

    As with images everything is drawn by (seed, epoch), so that a resumed run, and one over several processes, goes
    through the same.
    """

    def __init__(self, cells: Cells, settings: "Counts") -> None:
        super().__init__()
        self.cells, self.settings = cells, settings

    def train_dataloader(self) -> "_Batches":
        return _Batches(self, held_out=False)

    def val_dataloader(self) -> "_Batches":
        return _Batches(self, held_out=True)


class _Batches:
    def __init__(self, data: CellData, held_out: bool) -> None:
        self.data, self.is_held_out = data, held_out
        self.rows = data.cells.held_out if held_out else data.cells.train
        trainer = data.trainer
        self.rank, self.world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    @property
    def size(self) -> int:
        return _HELD_OUT_BATCH if self.is_held_out else self.data.settings.batch_size

    def __len__(self) -> int:
        full, rest = divmod(len(self.rows), self.size)
        return full + (rest >= (1 if self.is_held_out else self.world))

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        trainer = self.data.trainer
        # Read here, at the first batch of an epoch: Lightning makes the iterator before it counts the epoch.
        epoch = trainer.current_epoch if trainer else 0
        rows = self.rows
        if not self.is_held_out:
            rows = rows[torch.randperm(len(rows), generator=generator(self.data.settings.seed, 0, epoch))]
        for whole in rows.split(self.size)[: len(self)]:
            n = len(whole) if self.is_held_out else len(whole) - len(whole) % self.world
            first, end = (place * n // self.world for place in (self.rank, self.rank + 1))
            yield batch(self.data.cells, whole[first:end]), first
