"""Batches for Lightning, divided between one or more processes."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningDataModule

__all__ = ["Batches"]


class Batches(ABC):
    """The training or validation batches of a run, as pairs (batch, index of its first row in the whole batch).

    The batches are the same in every run and for any number of processes: all draws depend on the seed, the epoch and
    the number of the batch, and are made for the whole batch, of which each process takes a contiguous part. All parts
    of a training batch have the same size, because gradients are averaged; the rows that are left over, fewer than
    there are processes, are dropped for that epoch. Validation drops no rows.
    """

    def __init__(self, module: LightningDataModule, rows: int, size: int, val: bool) -> None:
        self.rows, self.size, self.is_val = rows, size, val
        self._trainer = module.trainer
        self.rank, self.world = (
            (self._trainer.global_rank, self._trainer.world_size) if self._trainer else (0, 1)
        )

    @property
    def epoch(self) -> int:
        """The current epoch. It is only valid from the first batch on: Lightning creates the iterator earlier."""
        return self._trainer.current_epoch if self._trainer else 0

    def __len__(self) -> int:
        full, rest = divmod(self.rows, self.size)
        return full + (rest >= (1 if self.is_val else self.world))

    def process_slice(self, rows: int) -> slice:
        """Return the rows of a whole batch that belong to this process."""
        n = rows if self.is_val else rows - rows % self.world
        return slice(*(rank * n // self.world for rank in (self.rank, self.rank + 1)))

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Any, int]]: ...
