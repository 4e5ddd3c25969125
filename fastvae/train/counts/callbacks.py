"""The callback that plots the latent space during training."""

from pathlib import Path

import torch
from torch import Tensor

from fastvae.train import figures
from fastvae.train.callbacks import SaveExamples

from .cells import Batch, Cells, make_batch
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
        indices = torch.cat((cells.val, cells.train))[:_DRAWN]
        mu = posterior_means(model, cells, indices)
        labels = None if cells.labels is None else cells.labels[indices]
        figures.save_latents(mu, labels, self.folder / "latents.png", names=cells.label_names, what="cells")


@torch.no_grad()
def posterior_means(model: CellVAE, cells: Cells, indices: Tensor) -> Tensor:
    """Return posterior means (n, L) of these cells, on the CPU."""
    parts = (make_batch(cells, chunk) for chunk in indices.split(500))
    return torch.cat(
        [model.encode(Batch(*(x.to(model.device) for x in part)))[0].float().cpu() for part in parts]
    )
