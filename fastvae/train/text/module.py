"""The model of text that is trained: `VAE` with a decoder that reads what it has written."""

import math
from typing import Any

import torch
from torch import Tensor

import fastvae
from fastvae.train.information import mutual_information
from fastvae.train.module import VAE

from .sentences import Batch

__all__ = ["TextVAE"]

_COMPARED = 2000  # held-out sentences that the mutual information is estimated from, after each epoch


class TextVAE(VAE):
    """A VAE of sentences, for Lightning's Trainer; see `VAE`.

    Args:
        train_tokens, held_out_tokens: how many a sentence has in the mean, with END: what perplexities are per.

    Nats are per sentence. Logged besides: train_perplexity and held_out_perplexity, e^(-ELBO / tokens), a bound on the
    true one from above; mutual_information, between held-out sentences and z (at most 2000 sentences, and of one
    process). There are no bits per dimension.
    """

    unit = "sentence"
    measures = ("perplexity",)
    others = ("mutual_information",)
    has_dropout = True
    shown = (("perplexity", "held_out_perplexity", 1), ("MI", "mutual_information", 2))

    def __init__(
        self, *args: Any, train_tokens: float = 1.0, held_out_tokens: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.tokens = {"train": train_tokens, "held_out": held_out_tokens}

    def decode(self, z: Tensor, before: Tensor) -> Tensor:  # type: ignore[override]
        """Logits (B, T + 1, V) of each next token after `before`, (B, T + 1)."""
        return self.decoder(z, before)

    def nll(self, z: Tensor, x: Batch) -> Tensor:
        return self.likelihood.nll(self.decode(z, x.before), x.after)

    def forward(self, x: Batch, seed: Tensor, row_offset: int) -> tuple[fastvae.ELBOOutput, Tensor, Tensor]:
        mu, logvar = self.encode(x)
        z, kl = self.elbo.reparameterize(mu, logvar, seed=seed, row_offset=row_offset)
        return self.elbo(self.decode(z, x.before), x.after, kl=kl), mu, logvar

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._posteriors: list[tuple[Tensor, Tensor]] = []

    def keep_posterior(self, mu: Tensor, logvar: Tensor) -> None:
        super().keep_posterior(mu, logvar)
        self._posteriors.append((mu, logvar))

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        mu, logvar = (torch.cat(parts).float() for parts in zip(*self._posteriors, strict=True))
        # Of all lengths: the batches come sorted by them.
        some = torch.linspace(0, len(mu) - 1, min(len(mu), _COMPARED)).round().long().to(mu.device)
        mu, logvar = mu[some], logvar[some]
        seed = torch.tensor([self.seed + 2, 0], device=mu.device)
        z, _ = fastvae.functional.reparameterize_kl(mu, logvar, seed=seed)
        self.log("mutual_information", mutual_information(mu, logvar, z))

    def terms(self, part: str, nll: float, kl: float) -> dict[str, float]:
        # No float64 holds more than e^709.
        perplexity = (
            math.exp(min((nll + kl) / self.tokens[part], 700)) if math.isfinite(nll + kl) else math.nan
        )
        return super().terms(part, nll, kl) | {f"{part}_perplexity": perplexity}
