"""The callback that saves sentences during training."""

from pathlib import Path

import torch

from fastvae.train.callbacks import SaveExamples
from fastvae.train.seeding import seeded_generator

from . import sentences
from .decoding import Decoding, decode
from .module import TextVAE
from .recipe import Text
from .sentences import Corpus, Vocabulary, write_lines

__all__ = ["SaveSentences"]

_SAMPLES, _RECONSTRUCTIONS = 20, 10


class SaveSentences(SaveExamples):
    """Saves samples.txt and reconstructions.txt."""

    def __init__(self, folder: Path, corpus: Corpus, vocabulary: Vocabulary, settings: Text) -> None:
        self.folder, self.corpus, self.vocabulary, self.settings = folder, corpus, vocabulary, settings

    @torch.no_grad()
    def save_examples(self, model: TextVAE) -> None:
        settings, vocabulary = self.settings, self.vocabulary
        longest = 2 * settings.max_words
        z = model.sample_prior(_SAMPLES, seeded_generator(settings.seed, 2))
        samples = decode(model, z, Decoding(longest=longest), seeded_generator(settings.seed, 3))
        write_lines(self.folder / "samples.txt", [vocabulary.decode(line) for line in samples])

        lines = self.corpus.val[:_RECONSTRUCTIONS]
        batch = sentences.make_batch(sentences.token_table(vocabulary.encode(lines)))
        mu, _ = model.encode(sentences.Batch(*(part.to(model.device) for part in batch)))
        reconstructions = decode(model, mu.float(), Decoding("greedy", longest=longest))
        pairs = zip(lines, reconstructions, strict=True)
        write_lines(
            self.folder / "reconstructions.txt",
            [text for line, tokens in pairs for text in (line, f"  {vocabulary.decode(tokens)}")],
        )
