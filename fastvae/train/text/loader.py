"""Batches for Lightning that contain sentences of similar lengths."""

from collections.abc import Iterator

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from fastvae.train.batches import Batches
from fastvae.train.seeding import seeded_generator

from .recipe import Text
from .sentences import Batch, TokenTable, make_batch

__all__ = ["SentenceBatches", "SentenceData"]

_POOL = 50  # number of batches whose sentences are sorted by length together


class SentenceData(LightningDataModule):
    """The sentences of a run as batches (Batch, index of its first row in the whole batch).

    To put sentences of similar lengths together, the random order of an epoch is cut into pools of 50 batches. Each
    pool is sorted by length, and then the batches are shuffled. The order of epoch e depends on (seed, e), and the
    draws of its batch b on (seed, e, b); see `Batches`.
    """

    def __init__(self, train: TokenTable, val: TokenTable, settings: Text) -> None:
        super().__init__()
        self.train, self.val, self.settings = train, val, settings

    def train_dataloader(self) -> "SentenceBatches":
        return SentenceBatches(self, val=False)

    def val_dataloader(self) -> "SentenceBatches":
        return SentenceBatches(self, val=True)


class SentenceBatches(Batches):
    def __init__(self, data: SentenceData, val: bool) -> None:
        self.table = data.val if val else data.train
        self.settings = data.settings
        # Validation uses the same size, so that it needs no more memory than training.
        super().__init__(data, len(self.table.lengths), data.settings.batch_size, val)

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        settings = self.settings
        if self.is_val:
            key, order = [settings.seed, 1], self.table.lengths.argsort(stable=True).split(self.size)
        else:
            key = [settings.seed, 0, self.epoch]
            order = self.buckets(seeded_generator(*key))
        hidden = 0.0 if self.is_val else settings.word_dropout
        for number, indices in enumerate(order):
            full_batch = make_batch(
                TokenTable(self.table.tokens[indices], self.table.lengths[indices]),
                hidden,
                seeded_generator(*key, number),
            )
            rows = self.process_slice(len(indices))
            yield Batch(*(part[rows] for part in full_batch)), rows.start

    def buckets(self, draws: torch.Generator) -> list[Tensor]:
        """Return the indices of the sentences in each batch."""
        order = torch.randperm(self.rows, generator=draws)
        batches: list[Tensor] = []
        for pool in order.split(_POOL * self.size):
            batches += pool[self.table.lengths[pool].argsort(stable=True)].split(self.size)
        batches = [batches[i] for i in torch.randperm(len(batches), generator=draws).tolist()]
        # With several processes, each needs a row of every batch.
        return [indices for indices in batches if len(indices) >= self.world][: len(self)]
