"""Batches of sentences of like lengths, for Lightning."""

from collections.abc import Iterator

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from fastvae.train.batches import Batches
from fastvae.train.draws import generator

from .recipe import Text
from .sentences import Batch, Rows, batch

__all__ = ["SentenceBatches", "SentenceData"]

_POOL = 50  # batches whose sentences are sorted by length together


class SentenceData(LightningDataModule):
    """The sentences of a run as batches (Batch, the place of its first row in the whole batch).

    Sentences of like lengths are put together: an epoch's random order is cut into pools of 50 batches, which are
    sorted by length, and the batches are shuffled again. Epoch e does so by (seed, e), and batch b of it draws by
    (seed, e, b); see `Batches`.
    """

    def __init__(self, train: Rows, held_out: Rows, settings: Text) -> None:
        super().__init__()
        self.train, self.held_out, self.settings = train, held_out, settings

    def train_dataloader(self) -> "SentenceBatches":
        return SentenceBatches(self, held_out=False)

    def val_dataloader(self) -> "SentenceBatches":
        return SentenceBatches(self, held_out=True)


class SentenceBatches(Batches):
    def __init__(self, data: SentenceData, held_out: bool) -> None:
        self.table = data.held_out if held_out else data.train
        self.settings = data.settings
        # For held-out ones too: what fits into memory in training must do so then.
        super().__init__(data, len(self.table.lengths), data.settings.batch_size, held_out)

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        settings = self.settings
        if self.is_held_out:
            key, order = [settings.seed, 1], self.table.lengths.argsort(stable=True).split(self.size)
        else:
            key = [settings.seed, 0, self.epoch]
            order = self.buckets(generator(*key))
        hidden = 0.0 if self.is_held_out else settings.word_dropout
        for number, places in enumerate(order):
            whole = batch(
                Rows(self.table.tokens[places], self.table.lengths[places]), hidden, generator(*key, number)
            )
            own = self.own(len(places))
            yield Batch(*(part[own] for part in whole)), own.start

    def buckets(self, draws: torch.Generator) -> list[Tensor]:
        """The places of the sentences of each batch."""
        order = torch.randperm(self.rows, generator=draws)
        batches: list[Tensor] = []
        for pool in order.split(_POOL * self.size):
            batches += pool[self.table.lengths[pool].argsort(stable=True)].split(self.size)
        batches = [batches[i] for i in torch.randperm(len(batches), generator=draws).tolist()]
        # Of several processes each needs a row of every batch.
        return [places for places in batches if len(places) >= self.world][: len(self)]
