"""The LightningModule of counts: a `VAE` whose decoder also gets the batch and the library size of a cell."""

from typing import Any

import torch
from torch import Tensor

from fastvae.likelihoods import Poisson
from fastvae.train.module import VAE

from .cells import Batch

__all__ = ["CellVAE"]


class CellVAE(VAE):
    """A VAE of cells for Lightning's Trainer; see `VAE`. Nats are per cell.

    The library size of a cell is its observed total count (Lopez et al. 2018 can also infer it).
    """

    unit = "cell"
    has_dropout = True

    def params(self, z: Tensor, x: Batch) -> Any:
        """Return the likelihood's parameters: (logits, library, ...), or the log-rates for the Poisson."""
        draws = len(z) // len(x.batch)
        batch, library = (
            (x.batch, x.library) if draws == 1 else (x.batch.repeat(draws), x.library.repeat(draws, 1))
        )
        logits, *other_params = self.decoder(z, batch)
        if isinstance(self.elbo.likelihood, Poisson):
            return torch.log_softmax(logits.float(), 1) + torch.log(library)
        return (logits, library, *other_params)

    def target(self, x: Batch) -> Tensor:
        return x.counts
