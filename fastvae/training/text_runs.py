"""The folder of a run of text; what it has in common with one of images is in `runs`.

config.toml  tokenizer.json  metrics.csv  kl_per_dimension.csv  checkpoints/last.ckpt  checkpoints/best.ckpt
samples.txt  reconstructions.txt  loss.png
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

import fastvae

from . import files, messages, runs, sentences
from .data import InputError
from .sentences import Vocabulary
from .settings import Settings

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from fastvae.recipes.text import Text

    from .text import TextVAE

__all__ = ["TextRun", "build", "load", "resume", "train"]

TOKENIZER = "tokenizer.json"
LEFT = ("samples.txt", "reconstructions.txt", "loss.png", "evaluation.json")


@dataclass
class TextRun:
    """A run of text, finished or stopped, ready to be used."""

    path: Path
    settings: "Text"
    vocabulary: Vocabulary
    model: "TextVAE"
    """In eval mode, on `device`; the averaged weights if there are any."""
    device: torch.device
    epoch: int
    """How many epochs the weights were trained for."""

    @cached_property
    def corpus(self) -> sentences.Corpus:
        """The run's data, read when first asked for. Raises InputError where they are gone."""
        return _corpus(self.settings, self.path)


def load(path: Path, *, data: str | None = None, checkpoint: Literal["best", "last"] = "best") -> TextRun:
    """Open a run of text. `data` takes the place of the data it was trained on.

    Raises InputError as `runs.load`.
    """
    settings = _read_config(path)
    if data is not None:
        settings = dataclasses.replace(settings, data=data)
    vocabulary = Vocabulary.read(path / TOKENIZER)
    model = build(settings, vocabulary)
    device, epoch = runs.restore(model, path, settings, checkpoint)
    return TextRun(path, settings, vocabulary, model, device, epoch)


def train(settings: Settings, out: Path, *, overwrite: bool = False) -> None:
    """`runs.train` for text."""
    settings = _as_text(settings)
    if settings.min_words > settings.max_words:
        raise InputError(f"--min-words {settings.min_words} is more than --max-words {settings.max_words}")
    corpus = sentences.load(settings)
    settings = settings.located()
    if settings.devices > min(settings.batch_size, len(corpus.train)):
        raise InputError(f"--devices {settings.devices}: every device needs a sentence of every batch")
    runs.refuse_unused(settings)
    runs.refuse_to_replace(out, overwrite, (TOKENIZER, *LEFT))
    vocabulary = Vocabulary.train(corpus.train, settings)
    model = _fresh(settings, vocabulary)
    trainer = runs.make_trainer(settings, out, _drawer(corpus, vocabulary, settings, out))
    with runs.alone(out, (TOKENIZER, *LEFT)):
        if runs.is_first():
            runs.clear(out, (TOKENIZER, *LEFT))
            vocabulary.write(out / TOKENIZER)
            runs.write_config(out, settings)
        _fit(trainer, model, corpus, vocabulary, settings, out, 0)


def resume(path: Path, changed: dict[str, Any]) -> None:
    """`runs.resume` for text: the tokens are those that the run began with."""
    settings = dataclasses.replace(_read_config(path), **changed).located()
    settings.check()
    vocabulary = Vocabulary.read(path / TOKENIZER)
    corpus = _corpus(settings, path)
    model = _fresh(settings, vocabulary)
    done = runs.epochs_done(model, path, settings)
    trainer = runs.make_trainer(settings, path, _drawer(corpus, vocabulary, settings, path), resumed=True)
    with runs.alone(path, (TOKENIZER, *LEFT)):
        if runs.is_first():
            runs.remove_partial(path)
            if changed:
                runs.write_config(path, settings)
        _fit(trainer, model, corpus, vocabulary, settings, path, done)


def build(settings: "Text", vocabulary: Vocabulary) -> "TextVAE":
    """The model of a run, with fresh weights from torch's generator."""
    from .text import TextVAE

    encoder, decoder = settings.networks(len(vocabulary))
    return TextVAE(
        encoder,
        decoder,
        fastvae.ELBO(
            fastvae.likelihoods.Categorical(ignore_index=sentences.PAD),
            beta=settings.beta,
            free_bits=settings.free_bits,
        ),
        latents=settings.latent,
        lr=settings.lr,
        seed=settings.seed,
        schedule=settings.warmup,
        schedule_epochs=settings.warmup_epochs,
        cycles=settings.cycles,
    )


def _fresh(settings: "Text", vocabulary: Vocabulary) -> "TextVAE":
    torch.manual_seed(settings.seed)
    return build(settings, vocabulary)


def _fit(
    trainer: Any,
    model: "TextVAE",
    corpus: sentences.Corpus,
    vocabulary: Vocabulary,
    settings: "Text",
    out: Path,
    done: int,
) -> None:
    from .sentence_loader import SentenceData

    train, held_out = (sentences.rows(vocabulary.numbers(part)) for part in (corpus.train, corpus.held_out))
    model.tokens = {"train": tokens_each(train), "held_out": tokens_each(held_out)}
    said = [
        *messages.backend_lines(trainer.strategy.root_device),
        *_introduction(model, corpus, vocabulary, train, held_out, settings),
    ]
    runs.fit(trainer, model, SentenceData(train, held_out, settings), settings, out, done, said, LEFT)


def tokens_each(rows: sentences.Rows) -> float:
    """Of a sentence, with END, in the mean."""
    return rows.lengths.double().mean().item() + 1


def _introduction(
    model: "TextVAE",
    corpus: sentences.Corpus,
    vocabulary: Vocabulary,
    train: sentences.Rows,
    held_out: sentences.Rows,
    settings: "Text",
) -> Iterator[str]:
    yield f"data: {corpus.name}: {len(corpus.train)} sentences to train on, {len(corpus.held_out)} held out"
    for note in corpus.notes:
        yield f"      {note}"
    what = "words and marks" if settings.tokens == "words" else "pieces of words"
    unknown = (held_out.tokens == sentences.UNKNOWN).sum() / held_out.lengths.sum()
    yield f"      {len(vocabulary)} {what}, and {unknown:.1%} of the held-out ones unknown"
    unigram = sentences.unigram_perplexity(train, held_out, len(vocabulary))
    yield f"      perplexity of the held-out sentences by a unigram model: {unigram:.1f}"
    parameters = sum(p.numel() for p in model.parameters())
    yield f"model: {settings.recipe} ({settings.cell}), {settings.latent} latent dimensions, {parameters:,} parameters"


def _drawer(corpus: sentences.Corpus, vocabulary: Vocabulary, settings: "Text", folder: Path) -> "Callback":
    from .text_callbacks import Writings

    return Writings(folder, corpus, vocabulary, settings)


def _read_config(path: Path) -> "Text":
    return _as_text(runs._read_table(path)[0])


def _as_text(settings: Settings) -> "Text":
    from fastvae.recipes.text import Text  # upwards, as `runs` does to find a run's recipe

    assert isinstance(settings, Text)
    return settings


def _corpus(settings: "Text", path: Path) -> sentences.Corpus:
    try:
        return sentences.load(settings)
    except InputError as error:
        raise InputError(f"{error} (the data of {path}; give others with --data)") from error


def save(path: Path, lines: list[str]) -> None:
    files.write(path, ("\n".join(lines) + "\n").encode())
