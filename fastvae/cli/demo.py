"""`fastvae demo`."""

from pathlib import Path
from typing import Annotated

import typer

from .ending import stoppable

__all__ = ["add"]


def add(app: typer.Typer) -> None:
    app.command()(stoppable(demo))


def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Images to train on: x_train, uint8 (N, H, W) or (N, H, W, C), and perhaps x_test. "
            "Without it: scikit-learn's digits.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the pictures go.")] = Path("runs/demo"),
    epochs: Annotated[int | None, typer.Option(help="40 for the digits, 5 for a file, if not given.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the weights, the batches and the noise.")] = 0,
) -> None:
    """Train a small VAE with fastvae.ELBO, then with the hand-written loss; compare them; leave two pictures."""
    from rich.console import Console

    from fastvae.train.image.demo import Settings, run

    run(Settings(data, out, epochs, batch_size, seed), Console())
