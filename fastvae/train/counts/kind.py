"""The kind of runs that are trained on counts.

Files: cells.json  latents.png  loss.png  reconstructions.npz  topics.txt
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastvae.train import files, messages
from fastvae.train.errors import InputError
from fastvae.train.factors import Factors
from fastvae.train.kind import EvaluatedRows, Kind
from fastvae.train.seeding import seeded_generator

from . import cells, topics
from .cells import Cells
from .matrix import DiskCounts
from .recipe import Counts
from .run import CellRun, Sizes
from .sources import BLOCK

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from rich.console import Console

    from .evaluate import CellEvaluation
    from .loader import CellData
    from .module import CellVAE

__all__ = ["CountsKind"]

GENES = "cells.json"


class CountsKind(Kind[Counts, Sizes, Cells, CellRun]):
    name = "counts"
    datum_with_article = "a cell"
    recipes = (Counts,)
    run = CellRun
    form_files = (GENES,)
    training_files = ("latents.png", "loss.png", "evaluation.json", topics.FILE)
    command_files = ("reconstructions.npz",)
    default_samples = 100
    has_factors = True
    can_sample = False
    wrong_kind_message = (
        "this is a run of counts, which supports only evaluate, encode, reconstruct and resume"
    )

    def check(self, settings: Counts) -> None:
        if settings.dispersion != "gene" and not settings.has_dispersion:
            raise InputError(
                f"--dispersion only applies to --likelihood zinb or nb, got {settings.likelihood}"
            )

    def load(self, settings: Counts, form: Sizes | None = None, *, other_data: bool = False) -> Cells:
        return cells.load(settings)

    def make_form(self, settings: Counts, data: Cells) -> Sizes:
        return Sizes(data.genes, data.batch_names)

    def read_form(self, path: Path, form_values: dict[str, Any]) -> Sizes:
        file = path / GENES
        try:
            table = json.loads(file.read_bytes())
            return Sizes(int(table["genes"]), tuple(map(str, table["batches"])))
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {files.error_reason(error)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: damaged: it must have the keys `genes` and `batches`") from error

    def write_form(self, out: Path, form: Sizes) -> None:
        files.write(out / GENES, (json.dumps(dataclasses.asdict(form), indent=1) + "\n").encode())

    def adapt_data(self, data: Cells, form: Sizes, settings: Counts, path: Path) -> Cells:
        if data.genes != form.genes:
            raise InputError(f"{settings.data}: expected {form.genes} genes as in {path}, got {data.genes}")
        unknown = [name for name in data.batch_names if name not in form.batches]
        if unknown:
            raise InputError(
                f"{settings.data}: the batch {unknown[0]!r} is not one of those that {path} was trained on: "
                f"{', '.join(map(repr, form.batches))}"
            )
        numbers = torch.tensor([form.batches.index(name) for name in data.batch_names])
        return dataclasses.replace(data, batches=numbers[data.batches], batch_names=form.batches)

    def build(self, settings: Counts, form: Sizes) -> "CellVAE":
        from .module import CellVAE

        encoder, decoder = settings.networks(form.genes, len(form.batches))
        likelihood = settings.make_likelihood(form.genes)
        elbo = settings.make_elbo(likelihood)
        model = CellVAE(encoder, decoder, elbo, **settings.module_options())
        if settings.prior == "vamp":
            model.make_vamp_prior(settings.components, form.genes)
        return model

    def init_from_data(self, model: "CellVAE", settings: Counts, data: Cells) -> None:
        """Initialise the decoder with the share of each gene in all counts, and the pseudo-inputs of a VampPrior with
        cells."""
        share = (data.totals + 0.5) / (data.totals + 0.5).sum()
        model.decoder.heads[0].bias.copy_(share.log())  # type: ignore[index, union-attr]
        if settings.prior == "vamp":
            prior: Any = model.prior
            draws = seeded_generator(settings.seed, 5)
            chosen = torch.randperm(len(data.train), generator=draws)[: settings.components]
            batch = cells.make_batch(data, data.train[chosen])
            prior.pseudo_inputs.copy_(model.encoder.transform(batch.counts).to_dense())  # type: ignore[operator]
            model.pseudo_batches.copy_(batch.batch)  # type: ignore[operator]

    def examples_callback(self, data: Cells, form: Sizes, settings: Counts, folder: Path) -> "Callback":
        from .callbacks import SaveLatentPlot

        return SaveLatentPlot(folder, data)

    def batches(self, model: "CellVAE", data: Cells, form: Sizes, settings: Counts) -> "CellData":
        from .loader import CellData

        return CellData(data, settings)

    def describe_run(
        self, model: "CellVAE", data: Cells, form: Sizes, settings: Counts, batches: "CellData"
    ) -> Iterator[str]:
        zeros = 1 - data.counts.stored / (data.counts.shape[0] * data.genes)
        yield (
            f"data: {data.name}, {messages.pluralize(len(data.train), 'training cell')}, "
            f"{messages.pluralize(len(data.val), 'validation cell')}, {messages.pluralize(data.genes, 'gene')}, "
            f"{zeros:.1%} of the counts are zero"
        )
        if isinstance(data.counts, DiskCounts):
            yield (
                f"      read from disk in shuffled blocks of {BLOCK} cells, with at most {settings.memory:g} MB of "
                "counts in memory"
            )
        if len(data.batch_names) > 1:
            yield f"      {len(data.batch_names)} batches"
        if data.labels is not None:
            yield f"      {messages.pluralize(len(data.label_names), 'label')}, used only in latents.png"
        for note in data.notes:
            yield f"warning: {note}"
        yield messages.describe_model(model, settings)
        name = {
            "zinb": "zero-inflated negative binomial",
            "nb": "negative binomial",
            "poisson": "Poisson",
            "multinomial": "multinomial",
        }
        per = {"gene": "each gene", "gene-cell": "each gene in each cell"}[settings.dispersion]
        yield f"       {name[settings.likelihood]} likelihood" + (
            f", one dispersion for {per}" if settings.has_dispersion else ""
        )

    def evaluate(
        self,
        run: CellRun,
        console: "Console",
        *,
        checkpoint: str,
        samples: int,
        limit: int | None,
        seed: int,
        test: bool,
        factors: Factors | None,
    ) -> "CellEvaluation":
        from .evaluate import evaluate

        return evaluate(
            run, console, checkpoint=checkpoint, samples=samples, limit=limit, seed=seed, factors=factors
        )

    def after_evaluation(self, run: CellRun, seed: int) -> Iterator[str]:
        """Write the words or genes of each latent dimension of a linear decoder."""
        if run.settings.decoder != "mlp":
            yield from topics.write(run)

    def evaluated_rows(self, run: CellRun, test: bool) -> EvaluatedRows:
        return EvaluatedRows(run.cells.counts.shape[0], run.cells.val)
