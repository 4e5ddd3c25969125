"""Evaluation of count models on validation cells."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastvae.train import messages
from fastvae.train.bounds import estimate_in_batches
from fastvae.train.factors import Factors
from fastvae.train.report import Report, check_options, shared_results

from . import ranking
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
    ranking: dict[str, Any] | None
    """How well held-out items are ranked, for a multinomial likelihood: `recall@20`, `recall@50` and `ndcg@100`, each
    with `mean` and `standard_error`, and the number of `rows` and of those `left_out`; see `ranking.measure`."""

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
        for row in (*self.latent_rows(), *self._ranking_rows()):
            table.add_row(*row)
        return table

    def _ranking_rows(self) -> list[tuple[str, str]]:
        if self.ranking is None:
            return []
        left_out = self.ranking["left_out"]
        of = f"ranking of held-out items, {messages.pluralize(self.ranking['rows'], 'row')}"
        rows = [(of + (f" ({left_out} have too few items)" if left_out else ""), "")]
        for name, value in self.ranking.items():
            if isinstance(value, dict) and value["mean"] is not None:
                error = value["standard_error"]
                rows.append(
                    (f"  {name}", f"{value['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}"))
                )
        return rows


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
        ranking=ranking.measure(run, val, seed) if run.settings.likelihood == "multinomial" else None,
        **shared_results(run.model, bounds_of_all, torch.cat(posteriors, 1), factors, seed=seed),
    )
