"""What a run of counts leaves beside its tables: a map of the latent space."""

from pathlib import Path

import torch
from torch import Tensor

from fastvae.train import figures
from fastvae.train.callbacks import Drawer

from .cells import Batch, Cells, batch
from .module import CellVAE

__all__ = ["Latents", "means"]

_DRAWN = 5000  # cells in latents.png


class Latents(Drawer):
    """Draws latents.png: the posterior means of all cells, coloured by label."""

    def __init__(self, folder: Path, cells: Cells) -> None:
        self.folder, self.cells = folder, cells

    @torch.no_grad()
    def draw(self, model: CellVAE) -> None:
        cells = self.cells
        # Held-out ones, and where these are few, those that were trained on, too: labels play no part in training.
        rows = torch.cat((cells.held_out, cells.train))[:_DRAWN]
        mu = means(model, cells, rows)
        labels = None if cells.labels is None else cells.labels[rows]
        figures.save_latents(mu, labels, self.folder / "latents.png", names=cells.label_names, what="cells")


@torch.no_grad()
def means(model: CellVAE, cells: Cells, rows: Tensor) -> Tensor:
    """Posterior means (n, L) of these cells, on the CPU."""
    parts = (batch(cells, some) for some in rows.split(500))
    return torch.cat(
        [model.encode(Batch(*(x.to(model.device) for x in part)))[0].float().cpu() for part in parts]
    )
