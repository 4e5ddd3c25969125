"""Evaluation of count models on validation cells."""

import math
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastvae.train.bounds import estimate_in_batches
from fastvae.train.module import ACTIVE
from fastvae.train.report import Report, check_options

from .cells import Batch, make_batch
from .run import CellRun

__all__ = ["CellEvaluation", "evaluate"]

_ROWS = 500  # the largest number of cells to decode at a time


@dataclass(frozen=True)
class CellEvaluation(Report):
    """Means over the cells, in nats per cell unless noted otherwise."""

    run: str
    checkpoint: str
    epoch: int
    data: str
    cells: int
    genes: int
    samples: int
    seed: int
    neg_elbo: float
    reconstruction: float
    kl: float
    iw_nll: float
    """The importance-weighted bound: its expectation lies between the true NLL and the negative ELBO."""
    iw_nll_standard_error: float | None
    """The standard error over cells; None for a single cell."""
    active_units: int
    """Units whose posterior mean varies over the cells by more than 0.01 (Burda et al. 2016, section 5.2)."""
    latents: int

    @property
    def num_examples(self) -> int:
        return self.cells

    def table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, show_edge=False)
        table.add_column("")
        table.add_column("nats per cell", justify="right")
        for name, value in (
            ("negative ELBO", self.neg_elbo),
            ("  reconstruction", self.reconstruction),
            ("  KL", self.kl),
            (f"NLL, {self.samples} importance samples", self.iw_nll),
            ("  standard error over cells", self.iw_nll_standard_error),
        ):
            table.add_row(name, "" if value is None else f"{value:.3f}")
        table.add_section()
        table.add_row("active units", f"{self.active_units} of {self.latents}")
        return table


@torch.no_grad()
def evaluate(
    run: CellRun,
    console: Console,
    *,
    checkpoint: str = "best",
    samples: int = 100,
    limit: int | None = None,
    seed: int = 0,
) -> CellEvaluation:
    """Evaluate a run on its validation cells, or the first `limit`, with a progress bar on `console`.

    Raises InputError if a number is out of range.
    """
    check_options(samples, limit, seed)
    val = run.cells.val[:limit]

    def prepare(indices: Tensor) -> Batch:
        return Batch(*(part.to(run.device) for part in make_batch(run.cells, indices)))

    parts, means = [], []
    for _, _, part, mu in estimate_in_batches(
        run.model, val.split, prepare, _ROWS, samples, seed, console, "evaluating"
    ):
        parts.append(torch.stack(part).cpu())
        means.append(mu.double().cpu())
    nll, reconstruction, kl = torch.cat(parts, 1)
    count = len(val)
    return CellEvaluation(
        run=str(run.path),
        checkpoint=checkpoint,
        epoch=run.epoch,
        data=run.cells.name,
        cells=count,
        genes=run.cells.genes,
        samples=samples,
        seed=seed,
        neg_elbo=(reconstruction + kl).mean().item(),
        reconstruction=reconstruction.mean().item(),
        kl=kl.mean().item(),
        iw_nll=nll.mean().item(),
        iw_nll_standard_error=nll.std().item() / math.sqrt(count) if count > 1 else None,
        active_units=int((torch.cat(means).var(0, correction=0) > ACTIVE).sum()),
        latents=run.model.latents,
    )
