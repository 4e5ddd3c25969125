"""`fastvae demo`."""

from pathlib import Path
from typing import Annotated

import typer

from .failures import catch_interrupt

__all__ = ["add"]


def add(app: typer.Typer) -> None:
    app.command()(catch_interrupt(demo))


def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Images to train on: an array x_train, uint8 (N, H, W) or (N, H, W, C), and optionally x_test. "
            "Defaults to scikit-learn's digits.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write the pictures to.")] = Path(
        "runs/demo"
    ),
    epochs: Annotated[
        int | None,
        typer.Option(help="Number of epochs.", show_default="40 for the digits, 5 for a file"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of images per batch.")] = 128,
    seed: Annotated[int, typer.Option(help="Random seed for the weights, the batches and the noise.")] = 0,
) -> None:
    """Train a small VAE with fastvae.ELBO and with a hand-written loss, compare the two, and save two pictures."""
    from rich.console import Console

    from fastvae.train.image.demo import Settings, run

    run(Settings(data, out, epochs, batch_size, seed), Console())
