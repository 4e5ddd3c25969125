"""The model of images that is trained: `VAE`, measured in bits per dimension too."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastvae
from fastvae.train.module import VAE

__all__ = ["ImageVAE", "unbounded_logvar"]


def unbounded_logvar(logvar: Tensor, bounds: Sequence[float]) -> Tensor:
    """Where to start a bounded log-variance that is to be `logvar`: the inverse of `reference.bounded_logvar`.

    Within 0.95 of the way to a bound: further out there is little gradient to come back by.
    """
    lo, hi = bounds
    mid, half = (lo + hi) / 2, (hi - lo) / 2
    return mid + half * torch.atanh(((logvar - mid) / half).clamp(-0.95, 0.95))


class ImageVAE(VAE):
    """A VAE of images, for Lightning's Trainer; see `VAE`.

    Args:
        encoder: x (B, C, H, W) -> (B, 2L), the posterior's mu and logvar.
        decoder: z (B, L) -> the likelihood's parameters, (B, P, H, W).
        dimensions: C H W.
        bits_offset: what bits per dimension need added to nats / (D ln 2): 0 for binary data and for bytes as they are,
            8 for bytes scaled to [0, 1], None where the data have no bits per dimension.

    Logged besides: train_bits_per_dim and held_out_bits_per_dim.
    """

    unit = "image"
    measures = ("bits_per_dim",)
    shown: tuple[tuple[str, str, int], ...] = (("bits/dim", "held_out_bits_per_dim", 3),)

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        elbo: fastvae.ELBO,
        *,
        dimensions: int,
        bits_offset: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(encoder, decoder, elbo, **options)
        self.dimensions = dimensions
        self.bits_offset = bits_offset

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu, logvar: (B, L) each. Bytes are scaled to [0, 1] for the encoder."""
        return super().encode(x.float() / 255 if x.dtype == torch.uint8 else x)

    def start(self, images: Tensor) -> None:
        """Called once, with some training images (B, C, H, W) in [0, 1], before the first step."""

    def terms(self, part: str, nll: float, kl: float) -> dict[str, float]:
        terms = super().terms(part, nll, kl)
        if self.bits_offset is not None:
            terms[f"{part}_bits_per_dim"] = self.bits_per_dim(nll + kl)
        return terms

    def bits_per_dim(self, nats: Any) -> Any:
        """Nats per image as bits per dimension of the data as they were, where they have such."""
        return nats / (self.dimensions * math.log(2)) + self.bits_offset
