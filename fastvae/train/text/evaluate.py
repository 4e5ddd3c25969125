"""How good a model of text is on sentences that it has not seen, and how much of them is in z."""

import math
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastvae
from fastvae.train.bounds import in_batches
from fastvae.train.information import mutual_information
from fastvae.train.module import ACTIVE
from fastvae.train.report import Report, check_numbers

from . import sentences
from .run import TextRun

__all__ = ["TextEvaluation", "evaluate"]

_COMPARED = 10_000  # sentences that the mutual information is estimated from, at most


@dataclass(frozen=True)
class TextEvaluation(Report):
    """Means over the sentences, in nats per sentence where nothing else is said."""

    run: str
    checkpoint: str
    epoch: int
    data: str
    sentences: int
    tokens: int
    """With the END of each."""
    unknown: int
    """How many of them are <unk>."""
    vocabulary: int
    samples: int
    seed: int
    nelbo: float
    reconstruction: float
    kl: float
    iw_nll: float
    """By importance weighting: at least the true one in expectation, at most the negative ELBO."""
    perplexity: float
    """From `nelbo`: a bound on the true one from above."""
    iw_perplexity: float
    """From `iw_nll`: a closer one."""
    unigram_perplexity: float
    """Of the same tokens, by their shares in the run's training sentences."""
    active_units: int
    """Whose posterior mean varies over the sentences by more than 0.01 (Burda et al. 2016, section 5.2)."""
    latents: int
    mutual_information: float
    """Of x and z; at most log N for N sentences, and for at most 10,000 of them."""

    @property
    def count(self) -> int:
        return self.sentences

    def table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, show_edge=False)
        table.add_column("")
        table.add_column("nats per sentence", justify="right")
        table.add_column("perplexity", justify="right")
        for name, value, perplexity in (
            ("negative ELBO", self.nelbo, self.perplexity),
            ("  reconstruction", self.reconstruction, None),
            ("  KL", self.kl, None),
            (f"NLL, {self.samples} importance samples", self.iw_nll, self.iw_perplexity),
            ("a unigram model", None, self.unigram_perplexity),
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
    """Evaluate a run on its held-out sentences, or the first `limit` of them, with a progress bar on `console`.

    Raises InputError for a number out of range.
    """
    check_numbers(samples, limit, seed)
    vocabulary, model = run.vocabulary, run.model
    held_out = sentences.rows(vocabulary.numbers(run.corpus.held_out[:limit]))
    train = sentences.rows(vocabulary.numbers(run.corpus.train))
    size = run.settings.batch_size

    def prepared(places: Tensor) -> sentences.Batch:
        some = sentences.batch(sentences.Rows(held_out.tokens[places], held_out.lengths[places]))
        return sentences.Batch(*(part.to(run.device) for part in some))

    parts, posteriors = [], []
    batches = held_out.lengths.argsort(stable=True).split(size)
    for _, x, part, _ in in_batches(model, batches, prepared, size, samples, seed, console, "evaluating"):
        parts.append(torch.stack(part).cpu())
        posteriors.append(torch.stack(model.encode(x)).cpu())
    nll, reconstruction, kl = torch.cat(parts, 1)
    mu, logvar = torch.cat(posteriors, 1)
    compared = torch.linspace(0, len(mu) - 1, min(len(mu), _COMPARED)).round().long()
    z, _ = fastvae.functional.reparameterize_kl(mu[compared], logvar[compared], seed=torch.tensor([seed, 0]))
    each = held_out.tokens_each
    nelbo, iw_nll = (reconstruction + kl).mean().item(), nll.mean().item()
    return TextEvaluation(
        run=str(run.path),
        checkpoint=checkpoint,
        epoch=run.epoch,
        data=run.corpus.name,
        sentences=len(mu),
        tokens=round(each * len(mu)),
        unknown=int((held_out.tokens == sentences.UNKNOWN).sum()),
        vocabulary=len(vocabulary),
        samples=samples,
        seed=seed,
        nelbo=nelbo,
        reconstruction=reconstruction.mean().item(),
        kl=kl.mean().item(),
        iw_nll=iw_nll,
        perplexity=_exp(nelbo / each),
        iw_perplexity=_exp(iw_nll / each),
        unigram_perplexity=sentences.unigram_perplexity(train, held_out, len(vocabulary)),
        active_units=int((mu.double().var(0, correction=0) > ACTIVE).sum()),
        latents=model.latents,
        mutual_information=mutual_information(mu[compared], logvar[compared], z[: len(compared)]),
    )


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700)) if math.isfinite(nats) else math.nan
