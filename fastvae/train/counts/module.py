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

    def make_vamp_prior(self, components: int, genes: int) -> None:
        """Set a VampPrior whose pseudo-inputs are log(1 + counts), each with a batch that stays the same."""
        self.register_buffer("pseudo_batches", torch.zeros(components, dtype=torch.int64))
        self.set_vamp_prior(components, genes, self.encode_logs, bounds=None)

    def encode_logs(self, logs: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and logvar of the pseudo-inputs, (M, L) each."""
        encoder: Any = self.encoder
        return self.posterior_of(encoder.read_logs(logs, self.pseudo_batches))

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
