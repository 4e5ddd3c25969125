"""Evaluation of count models on validation cells."""

import math
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastvae.train.bounds import estimate_in_batches
from fastvae.train.factors import Factors
from fastvae.train.report import Report, check_options, shared_results

from .cells import Batch, make_batch, to_device
from .run import CellRun

__all__ = ["CellEvaluation", "evaluate"]

_ROWS = 500  # the largest number of cells to decode at a time


@dataclass(frozen=True)
class CellEvaluation(Report):
    """Means over the cells, in nats per cell unless noted otherwise."""

    cells: int
    genes: int
    iw_nll_standard_error: float | None
    """The standard error over cells; None for a single cell."""

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
            *self.information_rows(),
        ):
            table.add_row(name, "" if value is None else f"{value:.3f}")
        table.add_section()
        for row in self.latent_rows():
            table.add_row(*row)
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
    factors: Factors | None = None,
) -> CellEvaluation:
    """Evaluate a run on its validation cells, or the first `limit`, with a progress bar on `console`.

    `factors` are those of all validation cells.

    Raises InputError if a number is out of range.
    """
    check_options(samples, limit, seed)
    val = run.cells.val[:limit]

    def prepare(indices: Tensor) -> Batch:
        return to_device(make_batch(run.cells, indices), run.device)

    parts, posteriors = [], []
    for _, x, part, _ in estimate_in_batches(
        run.model, val.split, prepare, _ROWS, samples, seed, console, "evaluating"
    ):
        parts.append(torch.stack(part).cpu())
        with torch.no_grad():
            posteriors.append(torch.stack(run.model.encode(x)).cpu())
    bounds_of_all = torch.cat(parts, 1)
    count = len(val)
    return CellEvaluation(
        run=str(run.path),
        checkpoint=checkpoint,
        epoch=run.epoch,
        data=run.cells.name,
        split="val",
        cells=count,
        genes=run.cells.genes,
        samples=samples,
        seed=seed,
        iw_nll_standard_error=bounds_of_all[0].std().item() / math.sqrt(count) if count > 1 else None,
        **shared_results(run.model, bounds_of_all, torch.cat(posteriors, 1), factors, seed=seed),
    )
