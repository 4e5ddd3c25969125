"""The kind of runs that are trained on counts.

Files: cells.json  latents.png  loss.png  reconstructions.npz  topics.txt
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvae.train import files, messages
from fastvae.train.errors import InputError
from fastvae.train.factors import Factors
from fastvae.train.kind import EvaluatedRows, Kind
from fastvae.train.seeding import seeded_generator

from . import cells, topics
from .cells import Cells
from .columns import Covariate
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

_NO_BATCHES = ("",)  # the names of the batches of data without any

_BF16 = 256  # the largest whole number up to which bfloat16 has all


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
        if form is None:
            return cells.load(settings)
        return cells.load(settings, form.covariates, needs_batches=form.batches != _NO_BATCHES)

    def resolve_settings(self, settings: Counts, data: Cells) -> Counts:
        if settings.dispersion == "gene-batch" and data.batch_names == _NO_BATCHES:
            raise InputError(
                "--dispersion gene-batch needs the batches of the cells; give their key with --batch"
            )
        if settings.dispersion == "gene-label" and data.labels is None:
            raise InputError(
                "--dispersion gene-label needs the labels of the cells; give their key with --label"
            )
        for covariate in data.covariates:
            if settings.precision == "bf16-true" and len(covariate.categories) > _BF16:
                raise InputError(
                    f"--precision bf16-true: bfloat16 tells only {_BF16} categories apart, but the covariate "
                    f"{covariate.name} has {len(covariate.categories)}; use bf16-mixed"
                )
        return super().resolve_settings(settings, data)

    def make_form(self, settings: Counts, data: Cells) -> Sizes:
        labels = data.label_names if settings.dispersion == "gene-label" else ()
        names = () if data.gene_names is None else tuple(data.gene_names.tolist())
        return Sizes(data.genes, data.batch_names, labels, data.covariates, names)

    def read_form(self, path: Path, form_values: dict[str, Any]) -> Sizes:
        file = path / GENES
        try:
            table = json.loads(file.read_bytes())
            covariates = [
                Covariate(
                    str(each["name"]),
                    tuple(map(str, each["categories"])),
                    float(each["mean"]),
                    float(each["scale"]),
                )
                for each in table.get("covariates", ())
            ]
            batches, labels, gene_names = (
                tuple(map(str, names))
                for names in (table["batches"], table.get("labels", ()), table.get("gene_names", ()))
            )
            return Sizes(int(table["genes"]), batches, labels, tuple(covariates), gene_names)
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {files.error_reason(error)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: damaged: it must have the keys `genes` and `batches`") from error

    def write_form(self, out: Path, form: Sizes) -> None:
        files.write(out / GENES, (json.dumps(dataclasses.asdict(form), indent=1) + "\n").encode())

    def adapt_data(self, data: Cells, form: Sizes, settings: Counts, path: Path) -> Cells:
        if data.genes != form.genes:
            raise InputError(f"{settings.data}: expected {form.genes} genes as in {path}, got {data.genes}")
        if data.gene_names is not None:
            for i, (name, expected) in enumerate(
                zip(data.gene_names.tolist(), form.gene_names, strict=False)
            ):
                if name != expected:
                    raise InputError(
                        f"{settings.data}: expected the same genes in the same order as in {path}: gene {i} is "
                        f"{name!r}, but {expected!r} there; `gene_names` in {path / GENES} lists them"
                    )

        def renumber(values: Tensor, what: str, names: Sequence[str], known: Sequence[str]) -> Tensor:
            unknown = [name for name in names if name not in known]
            if unknown:
                raise InputError(
                    f"{settings.data}: the {what} {unknown[0]!r} is not one of those that {path} was trained on: "
                    f"{', '.join(map(repr, known))}"
                )
            return torch.tensor([known.index(name) for name in names])[values.long()]

        changes: dict[str, Any] = {"batch_names": form.batches}
        if form.batches == _NO_BATCHES:  # the model has no use for those of other data
            changes["batches"] = torch.zeros_like(data.batches)
        else:
            changes["batches"] = renumber(data.batches, "batch", data.batch_names, form.batches)
        if form.labels:
            if data.labels is None:
                raise InputError(
                    f"{settings.data}: labels are missing, which --dispersion gene-label of {path} needs"
                )
            changes["labels"] = renumber(data.labels, "label", data.label_names, form.labels)
            changes["label_names"] = form.labels
        values = data.covariate_values.clone()
        for i, (found, known) in enumerate(zip(data.covariates, form.covariates, strict=True)):
            if known.categories:
                what = f"covariate {known.name}"
                values[:, i] = renumber(values[:, i], what, found.categories, known.categories).double()
        changes |= {"covariates": form.covariates, "covariate_values": values}
        return dataclasses.replace(data, **changes)

    def build(self, settings: Counts, form: Sizes) -> "CellVAE":
        from .module import CellVAE

        categories = tuple(len(covariate.categories) for covariate in form.covariates)
        encoder, decoder = settings.networks(form.genes, len(form.batches), categories)
        likelihood = settings.make_likelihood(form.genes)
        elbo = settings.make_elbo(likelihood)
        model = CellVAE(encoder, decoder, elbo, **settings.module_options())
        groups = {"gene-batch": ("batch", form.batches), "gene-label": ("labels", form.labels)}
        if settings.dispersion in groups:
            of, names = groups[settings.dispersion]
            model.make_dispersions(of, len(names), form.genes)
        if settings.prior == "vamp":
            model.make_vamp_prior(settings.components, form.genes, len(form.covariates))
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
            if batch.covariates is not None:
                model.pseudo_covariates.copy_(batch.covariates)  # type: ignore[union-attr]

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
            use = "" if settings.dispersion == "gene-label" else ", used only in latents.png"
            yield f"      {messages.pluralize(len(data.label_names), 'label')}{use}"
        for covariate in data.covariates:
            count = len(covariate.categories)
            what = f"{count} categories" if count else "continuous"
            yield f"      covariate {covariate.name}: {what}"
        for note in data.notes:
            yield f"warning: {note}"
        yield messages.describe_model(model, settings)
        name = {
            "zinb": "zero-inflated negative binomial",
            "nb": "negative binomial",
            "poisson": "Poisson",
            "multinomial": "multinomial",
        }
        per = "each gene" + {"gene": "", "gene-batch": " in each batch", "gene-label": " in each label"}.get(
            settings.dispersion, " in each cell"
        )
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
