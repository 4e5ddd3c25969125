"""The callback that plots the latent space during training."""

from pathlib import Path

import torch
from torch import Tensor

from fastvae.train import figures
from fastvae.train.callbacks import SaveExamples

from .cells import Cells, make_batch, to_device
from .module import CellVAE

__all__ = ["SaveLatentPlot", "posterior_means"]

_DRAWN = 5000  # the largest number of cells in latents.png


class SaveLatentPlot(SaveExamples):
    """Saves latents.png: the posterior means of the cells, coloured by label."""

    def __init__(self, folder: Path, cells: Cells) -> None:
        self.folder, self.cells = folder, cells

    @torch.no_grad()
    def save_examples(self, model: CellVAE) -> None:
        cells = self.cells
        # Training cells are added if there are few validation cells; training does not use the labels.
        order = torch.randperm(len(cells.val), generator=torch.Generator().manual_seed(0))
        indices = torch.cat((cells.val[order], cells.train))[:_DRAWN]
        mu = posterior_means(model, cells, indices)
        labels = None if cells.labels is None else cells.labels[indices]
        figures.save_latents(mu, labels, self.folder / "latents.png", names=cells.label_names, what="cells")


@torch.no_grad()
def posterior_means(model: CellVAE, cells: Cells, indices: Tensor) -> Tensor:
    """Return posterior means (n, L) of these cells, on the CPU."""
    # Read in the order of the file.
    ordered, place = indices.sort()
    parts = ordered.split(500)
    means = torch.empty(len(indices), model.latents)
    for part, at, rows in zip(
        parts, place.split(500), cells.counts.batches([part.numpy() for part in parts]), strict=True
    ):
        batch = to_device(make_batch(cells, part, rows), model.device)
        means[at] = model.encode(batch)[0].float().cpu()
    return means
