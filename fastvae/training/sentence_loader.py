"""Batches of sentences of like lengths, for Lightning."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from .loader import generator
from .sentences import Batch, Rows, batch

if TYPE_CHECKING:
    from fastvae.recipes.text import Text

__all__ = ["SentenceData"]

_POOL = 50  # batches whose sentences are sorted by length together
_HELD_OUT_BATCH = 250


class SentenceData(LightningDataModule):
    """The sentences of a run as batches (Batch, the place of its first row in the whole batch).

    Sentences of like lengths are put together: an epoch's random order is cut into pools of 50 batches, which are
    sorted by length, and the batches are shuffled again. As with images everything is drawn by (seed, epoch) or by
    (seed, epoch, number of the batch), so that a resumed run, and one over several processes, goes through the same.
    """

    def __init__(self, train: Rows, held_out: Rows, settings: "Text") -> None:
        super().__init__()
        self.train, self.held_out, self.settings = train, held_out, settings

    def train_dataloader(self) -> "_Batches":
        return _Batches(self, held_out=False)

    def val_dataloader(self) -> "_Batches":
        return _Batches(self, held_out=True)


class _Batches:
    def __init__(self, data: SentenceData, held_out: bool) -> None:
        self.data, self.is_held_out = data, held_out
        self.rows = data.held_out if held_out else data.train
        trainer = data.trainer
        self.rank, self.world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    @property
    def size(self) -> int:
        return _HELD_OUT_BATCH if self.is_held_out else self.data.settings.batch_size

    def __len__(self) -> int:
        full, rest = divmod(len(self.rows.lengths), self.size)
        return full + (rest >= (1 if self.is_held_out else self.world))

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        settings, trainer = self.data.settings, self.data.trainer
        # Read here, at the first batch of an epoch: Lightning makes the iterator before it counts the epoch.
        epoch = trainer.current_epoch if trainer else 0
        if self.is_held_out:
            key, order = [settings.seed, 1], self.rows.lengths.argsort(stable=True).split(self.size)
        else:
            key = [settings.seed, 0, epoch]
            order = self._buckets(generator(*key))
        hidden = 0.0 if self.is_held_out else settings.word_dropout
        for number, places in enumerate(order):
            whole = batch(
                Rows(self.rows.tokens[places], self.rows.lengths[places]), hidden, generator(*key, number)
            )
            n = len(places) if self.is_held_out else len(places) - len(places) % self.world
            first, end = (place * n // self.world for place in (self.rank, self.rank + 1))
            yield Batch(*(part[first:end] for part in whole)), first

    def _buckets(self, draws: torch.Generator) -> list[Tensor]:
        order = torch.randperm(len(self.rows.lengths), generator=draws)
        batches: list[Tensor] = []
        for pool in order.split(_POOL * self.size):
            batches += pool[self.rows.lengths[pool].argsort(stable=True)].split(self.size)
        batches = [batches[i] for i in torch.randperm(len(batches), generator=draws).tolist()]
        # Of several processes each needs a row of every batch.
        return [places for places in batches if len(places) >= self.world][: len(self)]
