"""The LightningModule of counts: a `VAE` whose decoder also gets the batch and the library size of a cell."""

from typing import Any

import torch
from torch import Tensor

import fastvae
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

    def decode(self, z: Tensor, x: Batch) -> Any:  # type: ignore[override]
        """Return the likelihood's parameters: (logits, library, ...), or the log-rates for the Poisson."""
        logits, *other_params = self.decoder(z, x.batch)
        if isinstance(self.elbo.likelihood, Poisson):
            return torch.log_softmax(logits.float(), 1) + torch.log(x.library)
        return (logits, x.library, *other_params)

    def nll(self, z: Tensor, x: Batch) -> Tensor:
        return self.likelihood.nll(self.decode(z, x), x.counts)

    def forward(self, x: Batch, seed: Tensor, row_offset: int) -> tuple[fastvae.ELBOOutput, Tensor, Tensor]:
        mu, logvar = self.encode(x)
        z, kl = self.elbo.reparameterize(mu, logvar, seed=seed, row_offset=row_offset)
        return self.elbo(self.decode(z, x), x.counts, kl=kl), mu, logvar
