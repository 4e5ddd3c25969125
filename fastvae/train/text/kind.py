"""The kind of runs that are trained on text.

Files: tokenizer.json  samples.txt  reconstructions.txt  loss.png
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastvae
from fastvae.train import messages
from fastvae.train.errors import InputError
from fastvae.train.factors import Factors
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
    datum_with_article = "a sentence"
    recipes = (Text,)
    run = TextRun
    form_files = (TOKENIZER,)
    training_files = ("samples.txt", "reconstructions.txt", "loss.png", "evaluation.json")
    default_samples = 20
    wrong_kind_message = (
        "this is a run of text, which has no pictures; use sample, reconstruct, interpolate or evaluate"
    )

    def check(self, settings: Text) -> None:
        if settings.min_words > settings.max_words:
            raise InputError(
                f"--min-words must be at most --max-words {settings.max_words}, got {settings.min_words}"
            )
        if settings.prior == "vamp":
            raise InputError(
                "--prior must be standard or mog for text, got vamp: its pseudo-inputs are learned by gradients, which "
                "words do not have"
            )

    def load(self, settings: Text, form: Vocabulary | None = None, *, other_data: bool = False) -> Corpus:
        return sentences.load(settings)

    def make_form(self, settings: Text, data: Corpus) -> Vocabulary:
        return Vocabulary.train(data.train, settings)

    def read_form(self, path: Path, form_values: dict[str, Any]) -> Vocabulary:
        """Read the tokenizer that was trained when the run was started."""
        return Vocabulary.read(path / TOKENIZER)

    def write_form(self, out: Path, form: Vocabulary) -> None:
        form.write(out / TOKENIZER)

    def build(self, settings: Text, form: Vocabulary) -> "TextVAE":
        from .module import TextVAE

        encoder, decoder = settings.networks(len(form))
        likelihood = fastvae.likelihoods.Categorical(ignore_index=sentences.PAD)
        elbo = settings.make_elbo(likelihood)
        return TextVAE(encoder, decoder, elbo, **settings.module_options())

    def examples_callback(self, data: Corpus, form: Vocabulary, settings: Text, folder: Path) -> "Callback":
        from .callbacks import SaveSentences

        return SaveSentences(folder, data, form, settings)

    def batches(self, model: "TextVAE", data: Corpus, form: Vocabulary, settings: Text) -> "SentenceData":
        from .loader import SentenceData

        train, val = (sentences.token_table(form.encode(part)) for part in (data.train, data.val))
        model.tokens = {"train": train.mean_tokens, "val": val.mean_tokens}
        return SentenceData(train, val, settings)

    def describe_run(
        self, model: "TextVAE", data: Corpus, form: Vocabulary, settings: Text, batches: "SentenceData"
    ) -> Iterator[str]:
        train, val = batches.train, batches.val
        train_size = messages.pluralize(len(data.train), "training sentence")
        yield f"data: {data.name}, {train_size}, {messages.pluralize(len(data.val), 'validation sentence')}"
        for note in data.notes:
            yield f"      {note}"
        what = "words and punctuation marks" if settings.tokens == "words" else "subwords"
        unknown = (val.tokens == sentences.UNKNOWN).sum() / val.lengths.sum()
        yield f"      {len(form)} {what}; {unknown:.1%} of those in the validation sentences are unknown"
        unigram = sentences.unigram_perplexity(train, val, len(form))
        yield f"      perplexity of a unigram model on the validation sentences: {unigram:.1f}"
        yield messages.describe_model(model, settings, f" ({settings.cell})")

    def evaluate(
        self,
        run: TextRun,
        console: "Console",
        *,
        checkpoint: str,
        samples: int,
        limit: int | None,
        seed: int,
        test: bool,
        factors: Factors | None,
    ) -> "TextEvaluation":
        from .evaluate import evaluate

        return evaluate(run, console, checkpoint=checkpoint, samples=samples, limit=limit, seed=seed)
