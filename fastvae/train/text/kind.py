"""Runs of text: what they do in their own way.

tokenizer.json  samples.txt  reconstructions.txt  loss.png
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastvae
from fastvae.train import messages
from fastvae.train.errors import InputError
from fastvae.train.kind import Kind

from . import sentences
from .recipe import Text
from .run import TextRun
from .sentences import Corpus, Vocabulary

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from rich.console import Console

    from .evaluate import TextEvaluation
    from .loader import SentenceData
    from .module import TextVAE

__all__ = ["TextKind"]

TOKENIZER = "tokenizer.json"


class TextKind(Kind[Text, Vocabulary, Corpus, TextRun]):
    name = "text"
    a_datum = "a sentence"
    recipes = (Text,)
    run = TextRun
    kept = (TOKENIZER,)
    left = ("samples.txt", "reconstructions.txt", "loss.png", "evaluation.json")
    samples = 20
    elsewhere = (
        "a run of text, which has no pictures; there are sample, reconstruct, interpolate and evaluate"
    )

    def check(self, settings: Text) -> None:
        if settings.min_words > settings.max_words:
            raise InputError(
                f"--min-words {settings.min_words} is more than --max-words {settings.max_words}"
            )

    def load(self, settings: Text, form: Vocabulary | None = None, *, others: bool = False) -> Corpus:
        return sentences.load(settings)

    def make_form(self, settings: Text, data: Corpus) -> Vocabulary:
        return Vocabulary.train(data.train, settings)

    def read_form(self, path: Path, head: dict[str, Any]) -> Vocabulary:
        """The tokens are those that the run began with."""
        return Vocabulary.read(path / TOKENIZER)

    def write_form(self, out: Path, form: Vocabulary) -> None:
        form.write(out / TOKENIZER)

    def build(self, settings: Text, form: Vocabulary) -> "TextVAE":
        from .module import TextVAE

        encoder, decoder = settings.networks(len(form))
        likelihood = fastvae.likelihoods.Categorical(ignore_index=sentences.PAD)
        elbo = fastvae.ELBO(likelihood, beta=settings.beta, free_bits=settings.free_bits)
        return TextVAE(encoder, decoder, elbo, **settings.module_options())

    def drawer(self, data: Corpus, form: Vocabulary, settings: Text, folder: Path) -> "Callback":
        from .callbacks import Writings

        return Writings(folder, data, form, settings)

    def batches(self, model: "TextVAE", data: Corpus, form: Vocabulary, settings: Text) -> "SentenceData":
        from .loader import SentenceData

        train, held_out = (sentences.rows(form.numbers(part)) for part in (data.train, data.held_out))
        model.tokens = {"train": train.tokens_each, "held_out": held_out.tokens_each}
        return SentenceData(train, held_out, settings)

    def introduce(
        self, model: "TextVAE", data: Corpus, form: Vocabulary, settings: Text, batches: "SentenceData"
    ) -> Iterator[str]:
        train, held_out = batches.train, batches.held_out
        trained = messages.count(len(data.train), "sentence")
        yield f"data: {data.name}: {trained} to train on, {len(data.held_out)} held out"
        for note in data.notes:
            yield f"      {note}"
        what = "words and marks" if settings.tokens == "words" else "pieces of words"
        unknown = (held_out.tokens == sentences.UNKNOWN).sum() / held_out.lengths.sum()
        yield f"      {len(form)} {what}, and {unknown:.1%} of the held-out ones unknown"
        unigram = sentences.unigram_perplexity(train, held_out, len(form))
        yield f"      perplexity of the held-out sentences by a unigram model: {unigram:.1f}"
        yield messages.model_line(model, settings, f" ({settings.cell})")

    def evaluate(
        self,
        run: TextRun,
        console: "Console",
        *,
        checkpoint: str,
        samples: int,
        limit: int | None,
        seed: int,
    ) -> "TextEvaluation":
        from .evaluate import evaluate

        return evaluate(run, console, checkpoint=checkpoint, samples=samples, limit=limit, seed=seed)
