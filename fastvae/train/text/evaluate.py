"""Evaluation of text models on validation sentences: perplexity, and how much information z holds."""

import math
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastvae.train.bounds import estimate_in_batches
from fastvae.train.report import Report, check_options, shared_results

from . import sentences
from .run import TextRun

__all__ = ["TextEvaluation", "evaluate"]


@dataclass(frozen=True)
class TextEvaluation(Report):
    """Means over the sentences, in nats per sentence unless noted otherwise."""

    sentences: int
    tokens: int
    """The number of tokens, including the END of each sentence."""
    unknown: int
    """The number of tokens that are <unk>."""
    vocabulary: int
    perplexity: float
    """The upper bound on the perplexity that follows from `neg_elbo`."""
    iw_perplexity: float
    """The tighter bound that follows from `iw_nll`."""
    unigram_perplexity: float
    """The perplexity of the same tokens under a unigram model of the run's training sentences."""

    @property
    def num_examples(self) -> int:
        return self.sentences

    def table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, show_edge=False)
        table.add_column("")
        table.add_column("nats per sentence", justify="right")
        table.add_column("perplexity", justify="right")
        for name, value, perplexity in (
            ("negative ELBO", self.neg_elbo, self.perplexity),
            ("  reconstruction", self.reconstruction, None),
            ("  KL", self.kl, None),
            (f"NLL, {self.samples} importance samples", self.iw_nll, self.iw_perplexity),
            ("unigram model", None, self.unigram_perplexity),
            *((name, value, None) for name, value in self.information_rows()),
        ):
            nats = "" if value is None else f"{value:.3f}"
            table.add_row(name, nats, "" if perplexity is None else f"{perplexity:.1f}")
        table.add_section()
        for row in self.latent_rows():
            table.add_row(*row, "")
        return table


@torch.no_grad()
def evaluate(
    run: TextRun,
    console: Console,
    *,
    checkpoint: str = "best",
    samples: int = 20,
    limit: int | None = None,
    seed: int = 0,
) -> TextEvaluation:
    """Evaluate a run on its validation sentences, or the first `limit`, with a progress bar on `console`.

    Raises InputError if a number is out of range.
    """
    check_options(samples, limit, seed)
    vocabulary, model = run.vocabulary, run.model
    val = sentences.token_table(vocabulary.encode(run.corpus.val[:limit]))
    train = sentences.token_table(vocabulary.encode(run.corpus.train))

    def prepare(indices: Tensor) -> sentences.Batch:
        batch = sentences.make_batch(sentences.TokenTable(val.tokens[indices], val.lengths[indices]))
        return sentences.Batch(*(part.to(run.device) for part in batch))

    parts, posteriors = [], []
    order = val.lengths.argsort(stable=True)
    for _, x, part, _ in estimate_in_batches(
        model, order.split, prepare, run.settings.batch_size, samples, seed, console, "evaluating"
    ):
        parts.append(torch.stack(part).cpu())
        posteriors.append(torch.stack(model.encode(x)).cpu())
    # The sentences are sorted by length, so that those that are compared with each other have all lengths.
    shared = shared_results(model, torch.cat(parts, 1), torch.cat(posteriors, 1), None, seed=seed)
    tokens_per_sentence, count = val.mean_tokens, len(val.lengths)
    return TextEvaluation(
        run=str(run.path),
        checkpoint=checkpoint,
        epoch=run.epoch,
        data=run.corpus.name,
        split="val",
        sentences=count,
        tokens=round(tokens_per_sentence * count),
        unknown=int((val.tokens == sentences.UNKNOWN).sum()),
        vocabulary=len(vocabulary),
        samples=samples,
        seed=seed,
        perplexity=_safe_exp(shared["neg_elbo"] / tokens_per_sentence),
        iw_perplexity=_safe_exp(shared["iw_nll"] / tokens_per_sentence),
        unigram_perplexity=sentences.unigram_perplexity(train, val, len(vocabulary)),
        **shared,
    )


def _safe_exp(nats: float) -> float:
    return math.exp(min(nats, 700)) if math.isfinite(nats) else math.nan
