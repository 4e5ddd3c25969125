"""What a run of counts leaves beside its tables: a map of the latent space."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from . import pictures
from .callbacks import _is_drawn
from .cell_model import CellVAE
from .cells import Batch, Cells, batch

if TYPE_CHECKING:
    from fastvae.recipes.counts import Counts

__all__ = ["Latents"]

_DRAWN = 5000  # cells in latents.png


class Latents(Callback):
    """Draws latents.png: the posterior means of all cells, coloured by label.

    Stands before the moving average among the callbacks, which takes its weights back when an epoch's validation ends.
    """

    def __init__(self, folder: Path, cells: Cells, settings: "Counts") -> None:
        self.folder, self.cells, self.settings = folder, cells, settings

    def on_validation_epoch_end(self, trainer: Trainer, model: LightningModule) -> None:
        if trainer.is_global_zero and _is_drawn(trainer):
            assert isinstance(model, CellVAE)
            self.draw(model)

    @torch.no_grad()
    def draw(self, model: CellVAE) -> None:
        cells = self.cells
        # Held-out ones, and where these are few, those that were trained on, too: labels play no part in training.
        rows = torch.cat((cells.held_out, cells.train))[:_DRAWN]
        mu = means(model, cells, rows)
        labels = None if cells.labels is None else cells.labels[rows]
        pictures.save_latents(mu, labels, self.folder / "latents.png", names=cells.label_names, what="cells")


@torch.no_grad()
def means(model: CellVAE, cells: Cells, rows: Tensor) -> Tensor:
    """Posterior means (n, L) of these cells, on the CPU."""
    parts = (batch(cells, some) for some in rows.split(500))
    return torch.cat(
        [model.encode(Batch(*(x.to(model.device) for x in part)))[0].float().cpu() for part in parts]
    )
