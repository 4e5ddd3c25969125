"""What a run of text leaves beside its tables: sentences."""

from pathlib import Path

import torch

from fastvae.train.callbacks import Drawer
from fastvae.train.draws import generator

from . import sentences
from .decoding import Decoding, write
from .module import TextVAE
from .recipe import Text
from .sentences import Corpus, Vocabulary, save

__all__ = ["Writings"]

_SAMPLES, _RECONSTRUCTIONS = 20, 10


class Writings(Drawer):
    """Writes samples.txt and reconstructions.txt."""

    def __init__(self, folder: Path, corpus: Corpus, vocabulary: Vocabulary, settings: Text) -> None:
        self.folder, self.corpus, self.vocabulary, self.settings = folder, corpus, vocabulary, settings

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
