"""The LightningModule of counts: a `VAE` whose decoder also gets the batch and the library size of a cell."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.likelihoods import Multinomial, Poisson
from fastvae.train.module import VAE

from .cells import Batch, to_device

__all__ = ["CellVAE"]


class CellVAE(VAE):
    """A VAE of cells for Lightning's Trainer; see `VAE`. Nats are per cell.

    The library size of a cell is its observed total count (Lopez et al. 2018 can also infer it).
    """

    unit = "cell"
    has_dropout = True
    dispersion_of: str | None = None
    """Which cells share a dispersion of each gene: those of a `batch`, or with the same of the `labels`."""
    pseudo_covariates: Tensor | None

    def make_dispersions(self, of: str, groups: int, genes: int) -> None:
        """Give each gene a trained dispersion in each batch or label."""
        self.dispersion_of = of
        self.log_dispersions = nn.Parameter(torch.zeros(groups, genes))

    def scale_parameters(self) -> list[nn.Parameter]:
        own = [] if self.dispersion_of is None else [self.log_dispersions]
        return [*super().scale_parameters(), *own]

    def make_vamp_prior(self, components: int, genes: int, covariates: int) -> None:
        """Set a VampPrior whose pseudo-inputs are transformed counts, each with a batch and covariates that stay the
        same."""
        self.register_buffer("pseudo_batches", torch.zeros(components, dtype=torch.int64))
        self.register_buffer("pseudo_covariates", torch.zeros(components, covariates) if covariates else None)
        self.set_vamp_prior(components, genes, self.encode_transformed, bounds=None)

    def encode_transformed(self, pseudo_inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and logvar of the pseudo-inputs, (M, L) each."""
        encoder: Any = self.encoder
        head = encoder.read_transformed(pseudo_inputs, self.pseudo_batches, self.pseudo_covariates)
        return self.posterior_of(head)

    def params(self, z: Tensor, x: Batch) -> Any:
        """Return the likelihood's parameters: (logits, library, ...), the log-rates for the Poisson, or the logits for
        the multinomial."""
        draws = len(z) // len(x.batch)
        batch, library, covariates = x.batch, x.library, x.covariates
        if draws > 1:
            batch, library = batch.repeat(draws), library.repeat(draws, 1)
            covariates = None if covariates is None else covariates.repeat(draws, 1)
        logits, *other_params = self.decoder(z, batch, covariates)
        if isinstance(self.elbo.likelihood, Multinomial):
            return logits
        if isinstance(self.elbo.likelihood, Poisson):
            return torch.log_softmax(logits.float(), 1) + torch.log(library)
        if self.dispersion_of is not None:
            group = getattr(x, self.dispersion_of).repeat(draws)
            other_params.insert(0, F.embedding(group, self.log_dispersions).to(logits.dtype))
        return (logits, library, *other_params)

    def denoised(self, z: Tensor, x: Batch) -> Tensor:
        """Return the expected counts (B, G) given z, without the additional zeros of a zero-inflated likelihood."""
        params = self.params(z, x)
        if isinstance(self.elbo.likelihood, Poisson):
            return torch.exp(params)
        logits = params if isinstance(params, Tensor) else params[0]
        return x.library * torch.softmax(logits.float(), 1)

    def target(self, x: Batch) -> Tensor:
        # The Poisson reads dense counts only.
        return x.counts.to_dense() if isinstance(self.elbo.likelihood, Poisson) else x.counts

    def transfer_batch_to_device(
        self, batch: tuple[Batch, int], device: torch.device, dataloader_idx: int
    ) -> tuple[Batch, int]:
        return to_device(batch[0], device), batch[1]

    def on_train_start(self) -> None:
        super().on_train_start()
        # A run of an older version stored the first layer by rows. The fused optimiser goes over memory as it lies, so
        # the state must lie as the weights do.
        for optimizer in self.trainer.optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        state[name] = torch.empty_like(parameter).copy_(value)
