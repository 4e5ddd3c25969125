"""The LightningModule of text: a `VAE` with an autoregressive decoder."""

import math
from typing import Any

import torch
from torch import Tensor

import fastvae
from fastvae.train.information import mutual_information
from fastvae.train.module import VAE

from .sentences import Batch

__all__ = ["TextVAE"]

_MI_SENTENCES = 2000  # the largest number of validation sentences for estimating the mutual information


class TextVAE(VAE):
    """A VAE of sentences for Lightning's Trainer; see `VAE`.

    Args:
        train_tokens, val_tokens: the mean number of tokens per sentence with END, to which perplexities refer.

    Nats are per sentence. These metrics are logged as well: train_perplexity and val_perplexity, e^(-ELBO / tokens),
    which are upper bounds; and mutual_information between z and at most 2000 validation sentences of one process.
    There are no bits per dimension.
    """

    unit = "sentence"
    split_metrics = ("perplexity",)
    extra_metrics = ("mutual_information",)
    has_dropout = True
    table_columns = (("perplexity", "val_perplexity", 1), ("MI", "mutual_information", 2))

    def __init__(self, *args: Any, train_tokens: float = 1.0, val_tokens: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens = {"train": train_tokens, "val": val_tokens}

    def params(self, z: Tensor, x: Batch) -> Tensor:
        """Return the logits (K * B, T + 1, V) of the token after each of `x.before`."""
        draws = len(z) // len(x.before)
        return self.decoder(z, x.before if draws == 1 else x.before.repeat(draws, 1))

    def target(self, x: Batch) -> Tensor:
        return x.after

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._posteriors: list[tuple[Tensor, Tensor]] = []

    def collect_posterior(self, mu: Tensor, logvar: Tensor) -> None:
        super().collect_posterior(mu, logvar)
        self._posteriors.append((mu, logvar))

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        mu, logvar = (torch.cat(parts).float() for parts in zip(*self._posteriors, strict=True))
        # The batches are sorted by length, so take sentences evenly from all of them.
        indices_for_mi = (
            torch.linspace(0, len(mu) - 1, min(len(mu), _MI_SENTENCES)).round().long().to(mu.device)
        )
        mu, logvar = mu[indices_for_mi], logvar[indices_for_mi]
        seed = torch.tensor([self.seed + 2, 0], device=mu.device)
        z, _ = fastvae.functional.reparameterize_kl(mu, logvar, seed=seed)
        self.log("mutual_information", mutual_information(mu, logvar, z))

    def terms(self, part: str, nll: float, kl: float) -> dict[str, float]:
        # float64 overflows above e^709.
        perplexity = (
            math.exp(min((nll + kl) / self.tokens[part], 700)) if math.isfinite(nll + kl) else math.nan
        )
        return super().terms(part, nll, kl) | {f"{part}_perplexity": perplexity}
