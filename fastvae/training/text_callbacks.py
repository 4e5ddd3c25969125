"""What a run of text leaves beside its tables: sentences."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from . import sentences
from .callbacks import _is_drawn
from .decoding import Decoding, write
from .loader import generator
from .sentences import Corpus, Vocabulary
from .text import TextVAE
from .text_runs import save

if TYPE_CHECKING:
    from fastvae.recipes.text import Text

__all__ = ["Writings"]

_SAMPLES, _RECONSTRUCTIONS = 20, 10


class Writings(Callback):
    """Writes samples.txt and reconstructions.txt.

    Stands before the moving average among the callbacks, which takes its weights back when an epoch's validation ends.
    """

    def __init__(self, folder: Path, corpus: Corpus, vocabulary: Vocabulary, settings: "Text") -> None:
        self.folder, self.corpus, self.vocabulary, self.settings = folder, corpus, vocabulary, settings

    def on_validation_epoch_end(self, trainer: Trainer, model: LightningModule) -> None:
        if trainer.is_global_zero and _is_drawn(trainer):
            assert isinstance(model, TextVAE)
            self.draw(model)

    @torch.no_grad()
    def draw(self, model: TextVAE) -> None:
        settings, vocabulary = self.settings, self.vocabulary
        longest = 2 * settings.max_words
        z = torch.randn(_SAMPLES, model.latents, generator=generator(settings.seed, 2))
        written = write(model, z, Decoding(longest=longest), generator(settings.seed, 3))
        save(self.folder / "samples.txt", [vocabulary.text(line) for line in written])

        lines = self.corpus.held_out[:_RECONSTRUCTIONS]
        some = sentences.batch(sentences.rows(vocabulary.numbers(lines)))
        mu, _ = model.encode(sentences.Batch(*(part.to(model.device) for part in some)))
        made = write(model, mu.float(), Decoding("greedy", longest=longest))
        pairs = zip(lines, made, strict=True)
        save(
            self.folder / "reconstructions.txt",
            [text for line, tokens in pairs for text in (line, f"  {vocabulary.text(tokens)}")],
        )
