"""The LightningModule of images: a `VAE` that also measures bits per dimension."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastvae
from fastvae.train.module import VAE

__all__ = ["ImageVAE", "unbounded_logvar"]


def unbounded_logvar(logvar: Tensor, bounds: Sequence[float]) -> Tensor:
    """Return the unbounded value whose bounded log-variance is `logvar`: the inverse of `reference.bounded_logvar`.

    The result stays within 95% of the distance to a bound, because the gradient nearly vanishes beyond.
    """
    lo, hi = bounds
    mid, half = (lo + hi) / 2, (hi - lo) / 2
    return mid + half * torch.atanh(((logvar - mid) / half).clamp(-0.95, 0.95))


class ImageVAE(VAE):
    """A VAE of images for Lightning's Trainer; see `VAE`.

    Args:
        encoder: maps x (B, C, H, W) to (B, 2L), the posterior's mu and logvar.
        decoder: maps z (B, L) to the likelihood's parameters, (B, P, H, W).
        dimensions: C H W.
        bits_offset: what to add to nats / (D ln 2) for bits per dimension: 0 for binary data and for unscaled bytes, 8
            for bytes scaled to [0, 1], None if the data have no bits per dimension.

    train_bits_per_dim and val_bits_per_dim are logged as well.
    """

    unit = "image"
    split_metrics = ("bits_per_dim",)
    table_columns: tuple[tuple[str, str, int], ...] = (("bits/dim", "val_bits_per_dim", 3),)

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
        """Return mu and logvar, (B, L) each. Bytes are scaled to [0, 1] for the encoder."""
        return super().encode(x.float() / 255 if x.dtype == torch.uint8 else x)

    def init_from_images(self, images: Tensor) -> None:
        """Initialise from some training images (B, C, H, W) in [0, 1]. Called once, before the first step."""

    def terms(self, part: str, nll: float, kl: float) -> dict[str, float]:
        terms = super().terms(part, nll, kl)
        if self.bits_offset is not None:
            terms[f"{part}_bits_per_dim"] = self.bits_per_dim(nll + kl)
        return terms

    def bits_per_dim(self, nats: Any) -> Any:
        """Convert nats per image into bits per dimension of the original data."""
        return nats / (self.dimensions * math.log(2)) + self.bits_offset
