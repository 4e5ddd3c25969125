"""The commands that use a run of counts: each writes a file and prints a line about it."""

from pathlib import Path
from typing import Literal

from fastvae.train import counts, messages
from fastvae.train.counts import generate

__all__ = ["encode", "reconstruct"]

Checkpoint = Literal["best", "last"]


def encode(run: Path, out: Path, *, data: str | None, checkpoint: Checkpoint) -> None:
    opened = counts.load(run, data=data, checkpoint=checkpoint)
    count = generate.encode(opened, out)
    place = "`z`" if out.suffix.lower() == ".npz" else f"obsm[{generate.OBSM!r}]"
    messages.print_line(
        f"{out}: {place}, the latent means of {messages.pluralize(count, 'cell')}, "
        f"{messages.pluralize(opened.model.latents, 'dimension')}"
    )


def reconstruct(
    run: Path, *, n: int | None, data: str | None, checkpoint: Checkpoint, out: Path | None
) -> None:
    out = out or run / "reconstructions.npz"
    cells, genes = generate.reconstruct(counts.load(run, data=data, checkpoint=checkpoint), out, n)
    messages.print_line(
        f"{out}: `x`, denoised counts of {messages.pluralize(cells, 'cell')} and {messages.pluralize(genes, 'gene')}"
    )
