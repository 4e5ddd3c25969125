"""The folder of a run of counts; what it has in common with one of images is in `runs`.

config.toml  cells.json  metrics.csv  kl_per_dimension.csv  checkpoints/last.ckpt  checkpoints/best.ckpt
latents.png  loss.png
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

import fastvae

from . import cells, files, messages, runs
from .cells import Cells
from .data import InputError
from .settings import Settings

if TYPE_CHECKING:
    from fastvae.recipes.counts import Counts

    from .cell_model import CellVAE

__all__ = ["CellRun", "build", "load", "resume", "train"]

GENES = "cells.json"
LEFT = ("latents.png", "loss.png", "evaluation.json")


@dataclass(frozen=True)
class Sizes:
    """What a model is built for, kept with the run."""

    genes: int
    batches: tuple[str, ...]


@dataclass
class CellRun:
    """A run of counts, finished or stopped, ready to be used."""

    path: Path
    settings: "Counts"
    sizes: Sizes
    model: "CellVAE"
    """In eval mode, on `device`; the averaged weights if there are any."""
    device: torch.device
    epoch: int
    """How many epochs the weights were trained for."""

    @cached_property
    def cells(self) -> Cells:
        """The run's data, read when first asked for. Raises InputError where they are gone, or of other genes."""
        return _cells(self.settings, self.sizes, self.path)


def load(path: Path, *, data: str | None = None, checkpoint: Literal["best", "last"] = "best") -> CellRun:
    """Open a run of counts. `data` takes the place of the data it was trained on.

    Raises InputError as `runs.load`.
    """
    settings, sizes = _read_config(path)
    if data is not None:
        settings = dataclasses.replace(settings, data=data)
    model = build(settings, sizes)
    device, epoch = runs.restore(model, path, settings, checkpoint)
    return CellRun(path, settings, sizes, model, device, epoch)


def train(settings: Settings, out: Path, *, overwrite: bool = False) -> None:
    """`runs.train` for counts."""
    settings = _as_counts(settings)
    if settings.likelihood == "poisson" and settings.dispersion != "gene":
        raise InputError("--dispersion is of zinb and nb, and --likelihood is poisson")
    data = cells.load(settings)
    settings = settings.located()
    if settings.devices > min(settings.batch_size, len(data.train)):
        raise InputError(f"--devices {settings.devices}: every device needs a cell of every batch")
    runs.refuse_unused(settings)
    runs.refuse_to_replace(out, overwrite, (GENES, *LEFT))
    sizes = Sizes(data.genes, data.batch_names)
    model = _fresh(settings, sizes, data)
    trainer = runs.make_trainer(settings, out, _drawer(data, settings, out))
    with runs.alone(out, (GENES, *LEFT)):
        if runs.is_first():
            runs.clear(out, (GENES, *LEFT))
            files.write(out / GENES, (json.dumps(dataclasses.asdict(sizes), indent=1) + "\n").encode())
            runs.write_config(out, settings)
        _fit(trainer, model, data, settings, out, 0)


def resume(path: Path, changed: dict[str, Any]) -> None:
    """`runs.resume` for counts."""
    settings, sizes = _read_config(path)
    settings = dataclasses.replace(settings, **changed).located()
    settings.check()
    data = _cells(settings, sizes, path)
    model = _fresh(settings, sizes, data)
    done = runs.epochs_done(model, path, settings)
    trainer = runs.make_trainer(settings, path, _drawer(data, settings, path), resumed=True)
    with runs.alone(path, (GENES, *LEFT)):
        if runs.is_first():
            runs.remove_partial(path)
            if changed:
                runs.write_config(path, settings)
        _fit(trainer, model, data, settings, path, done)


def build(settings: "Counts", sizes: Sizes) -> "CellVAE":
    """The model of a run, with fresh weights from torch's generator."""
    from .cell_model import CellVAE

    encoder, decoder = settings.networks(sizes.genes, len(sizes.batches))
    return CellVAE(
        encoder,
        decoder,
        fastvae.ELBO(settings.make_likelihood(sizes.genes), beta=settings.beta, free_bits=settings.free_bits),
        latents=settings.latent,
        dimensions=sizes.genes,
        lr=settings.lr,
        seed=settings.seed,
        schedule=settings.warmup,
        schedule_epochs=settings.warmup_epochs,
        cycles=settings.cycles,
    )


@torch.no_grad()
def _fresh(settings: "Counts", sizes: Sizes, data: Cells) -> "CellVAE":
    """The model as training starts from it: it gives every gene the share that it has in all cells together."""
    torch.manual_seed(settings.seed)
    model = build(settings, sizes)
    totals = torch.from_numpy(data.counts[data.train.numpy()].sum(0)).double()
    share = (totals + 0.5) / (totals + 0.5).sum()
    model.decoder.heads[0].bias.copy_(share.log())  # type: ignore[index, union-attr]
    return model


def _drawer(data: Cells, settings: "Counts", folder: Path) -> Any:
    from .cell_callbacks import Latents

    return Latents(folder, data, settings)


def _fit(trainer: Any, model: "CellVAE", data: Cells, settings: "Counts", out: Path, done: int) -> None:
    from .cell_loader import CellData

    said = [*messages.backend_lines(trainer.strategy.root_device), *_introduction(model, data, settings)]
    runs.fit(trainer, model, CellData(data, settings), settings, out, done, said, LEFT)


def _introduction(model: "CellVAE", data: Cells, settings: "Counts") -> Iterator[str]:
    zeros = 1 - data.counts.nnz / (data.counts.shape[0] * data.genes)
    yield (
        f"data: {data.name}: {len(data.train)} cells to train on, {len(data.held_out)} held out; {data.genes} genes, "
        f"{zeros:.1%} of the counts zero"
    )
    if len(data.batch_names) > 1:
        yield f"      {len(data.batch_names)} batches"
    if data.labels is not None:
        yield f"      {len(data.label_names)} labels, for latents.png only"
    for note in data.notes:
        yield f"warning: {note}"
    parameters = sum(p.numel() for p in model.parameters())
    yield f"model: {settings.recipe}, {settings.latent} latent dimensions, {parameters:,} parameters"
    name = {"zinb": "zero-inflated negative binomial", "nb": "negative binomial", "poisson": "Poisson"}
    per = {"gene": "each gene", "gene-cell": "each gene in each cell"}[settings.dispersion]
    yield f"       {name[settings.likelihood]} likelihood" + (
        "" if settings.likelihood == "poisson" else f", a dispersion for {per}"
    )


def _read_config(path: Path) -> tuple["Counts", Sizes]:
    settings = _as_counts(runs._read_table(path)[0])
    file = path / GENES
    try:
        table = json.loads(file.read_bytes())
        sizes = Sizes(int(table["genes"]), tuple(map(str, table["batches"])))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {files.reason(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: damaged: it must hold the numbers `genes` and `batches`") from error
    return settings, sizes


def _as_counts(settings: Settings) -> "Counts":
    from fastvae.recipes.counts import Counts  # upwards, as `runs` does to find a run's recipe

    assert isinstance(settings, Counts)
    return settings


def _cells(settings: "Counts", sizes: Sizes, path: Path) -> Cells:
    """The data of a run, their batches numbered as the run's are."""
    try:
        data = cells.load(settings)
    except InputError as error:
        raise InputError(f"{error} (the data of {path}; give others with --data)") from error
    if data.genes != sizes.genes:
        raise InputError(f"{settings.data}: {data.genes} genes, and the model of {path} is of {sizes.genes}")
    unknown = [name for name in data.batch_names if name not in sizes.batches]
    if unknown:
        raise InputError(
            f"{settings.data}: the batch {unknown[0]!r} is none of those that {path} was trained on: "
            f"{', '.join(map(repr, sizes.batches))}"
        )
    numbers = torch.tensor([sizes.batches.index(name) for name in data.batch_names])
    return dataclasses.replace(data, batches=numbers[data.batches], batch_names=sizes.batches)
