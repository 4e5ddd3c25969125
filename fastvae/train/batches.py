"""Batches over one or several processes, for Lightning."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningDataModule

__all__ = ["Batches"]


class Batches(ABC):
    """The batches of a run's training or held-out data: (batch, the place of its first row in the whole batch).

    They are the same in every run, and over any number of processes: everything is drawn by the seed, the epoch and
    the number of the batch, for all of its rows, and each process takes a contiguous part. All parts are of one size,
    as averaging gradients asks: the rows that do not divide by the number of processes, fewer than it in each batch,
    are left out of that epoch. No held-out row is left out.
    """

    def __init__(self, module: LightningDataModule, rows: int, size: int, held_out: bool) -> None:
        self.rows, self.size, self.is_held_out = rows, size, held_out
        self._trainer = module.trainer
        self.rank, self.world = (
            (self._trainer.global_rank, self._trainer.world_size) if self._trainer else (0, 1)
        )

    @property
    def epoch(self) -> int:
        """To be read at the first batch of an epoch: Lightning makes the iterator before it counts the epoch."""
        return self._trainer.current_epoch if self._trainer else 0

    def __len__(self) -> int:
        full, rest = divmod(self.rows, self.size)
        return full + (rest >= (1 if self.is_held_out else self.world))

    def own(self, rows: int) -> slice:
        """Of a whole batch of so many rows, those of this process."""
        n = rows if self.is_held_out else rows - rows % self.world
        return slice(*(place * n // self.world for place in (self.rank, self.rank + 1)))

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Any, int]]: ...
