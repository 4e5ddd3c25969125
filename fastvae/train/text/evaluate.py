"""Evaluation of text models on validation sentences: perplexity, and how much information z holds."""

import math
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastvae
from fastvae.train.bounds import estimate_in_batches
from fastvae.train.information import mutual_information
from fastvae.train.module import ACTIVE
from fastvae.train.report import Report, check_options

from . import sentences
from .run import TextRun

__all__ = ["TextEvaluation", "evaluate"]

_MI_SENTENCES = 10_000  # the largest number of sentences for estimating the mutual information


@dataclass(frozen=True)
class TextEvaluation(Report):
    """Means over the sentences, in nats per sentence unless noted otherwise."""

    run: str
    checkpoint: str
    epoch: int
    data: str
    sentences: int
    tokens: int
    """The number of tokens, including the END of each sentence."""
    unknown: int
    """The number of tokens that are <unk>."""
    vocabulary: int
    samples: int
    seed: int
    neg_elbo: float
    reconstruction: float
    kl: float
    iw_nll: float
    """The importance-weighted bound: its expectation lies between the true NLL and the negative ELBO."""
    perplexity: float
    """The upper bound on the perplexity that follows from `neg_elbo`."""
    iw_perplexity: float
    """The tighter bound that follows from `iw_nll`."""
    unigram_perplexity: float
    """The perplexity of the same tokens under a unigram model of the run's training sentences."""
    active_units: int
    """Units whose posterior mean varies over the sentences by more than 0.01 (Burda et al. 2016, section 5.2)."""
    latents: int
    mutual_information: float
    """The mutual information of x and z for at most 10,000 sentences. For N sentences it is at most log N."""

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
            ("mutual information of x and z", self.mutual_information, None),
        ):
            nats = "" if value is None else f"{value:.3f}"
            table.add_row(name, nats, "" if perplexity is None else f"{perplexity:.1f}")
        table.add_section()
        table.add_row("active units", f"{self.active_units} of {self.latents}", "")
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
    nll, reconstruction, kl = torch.cat(parts, 1)
    mu, logvar = torch.cat(posteriors, 1)
    indices_for_mi = torch.linspace(0, len(mu) - 1, min(len(mu), _MI_SENTENCES)).round().long()
    z, _ = fastvae.functional.reparameterize_kl(
        mu[indices_for_mi], logvar[indices_for_mi], seed=torch.tensor([seed, 0])
    )
    tokens_per_sentence = val.mean_tokens
    neg_elbo, iw_nll = (reconstruction + kl).mean().item(), nll.mean().item()
    return TextEvaluation(
        run=str(run.path),
        checkpoint=checkpoint,
        epoch=run.epoch,
        data=run.corpus.name,
        sentences=len(mu),
        tokens=round(tokens_per_sentence * len(mu)),
        unknown=int((val.tokens == sentences.UNKNOWN).sum()),
        vocabulary=len(vocabulary),
        samples=samples,
        seed=seed,
        neg_elbo=neg_elbo,
        reconstruction=reconstruction.mean().item(),
        kl=kl.mean().item(),
        iw_nll=iw_nll,
        perplexity=_safe_exp(neg_elbo / tokens_per_sentence),
        iw_perplexity=_safe_exp(iw_nll / tokens_per_sentence),
        unigram_perplexity=sentences.unigram_perplexity(train, val, len(vocabulary)),
        active_units=int((mu.double().var(0, correction=0) > ACTIVE).sum()),
        latents=model.latents,
        mutual_information=mutual_information(
            mu[indices_for_mi], logvar[indices_for_mi], z[: len(indices_for_mi)]
        ),
    )


def _safe_exp(nats: float) -> float:
    return math.exp(min(nats, 700)) if math.isfinite(nats) else math.nan
