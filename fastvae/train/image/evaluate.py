"""Evaluation of image models on validation or test images: the ELBO and the parts of its KL, the importance-weighted
likelihood, PSNR and SSIM."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from fastvae.train import bounds
from fastvae.train.bounds import Bounds
from fastvae.train.factors import Factors
from fastvae.train.report import Report, check_options, shared_results
from fastvae.train.seeding import seeded_generator

from .loader import prepare, val_batch_size
from .run import ImageRun
from .settings import ImageSettings

__all__ = ["Evaluation", "estimate_in_batches", "evaluate", "psnr", "ssim"]

# In dB, for the mean squared error of rounding to bytes, 1 / (12 * 255^2). A smaller error cannot be seen.
HIGHEST_PSNR = 10 * math.log10(12 * 255**2)
WINDOW = 11  # pixels


def psnr(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images (B, C, H, W) in [0, 1], in dB, float64 (B,): -10 log10 of the squared error.

    Values outside [0, 1] are clamped, as they are in a picture. The ratio is limited to 58.9 dB (`HIGHEST_PSNR`),
    because a single perfect image would make the mean infinite.
    """
    ratio = peak_signal_noise_ratio(
        reconstruction.double(), original.double(), data_range=(0.0, 1.0), reduction="none", dim=(1, 2, 3)
    )
    return ratio.clamp(max=HIGHEST_PSNR)


def ssim(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images (B, C, H, W) in [0, 1], float64 (B,); 1 for equal images.

    This is the mean over all windows of 11 x 11 pixels inside the image, weighted by a Gaussian with sigma 1.5 and
    computed for each channel separately. Values outside [0, 1] are clamped.
    """
    edge = WINDOW // 2
    parts = []
    # On the CPU: TF32 on a GPU is too coarse for variances as E x^2 - (E x)^2, and float64 is much slower.
    for reconstructions, originals in zip(
        reconstruction.float().cpu().split(64), original.float().cpu().split(64), strict=True
    ):
        _, index = structural_similarity_index_measure(
            reconstructions,
            originals,
            sigma=1.5,
            kernel_size=WINDOW,
            data_range=(0.0, 1.0),
            return_full_image=True,
        )
        # The full image includes windows across the edges, where it is mirrored.
        parts.append(index[:, :, edge:-edge, edge:-edge].double().mean((1, 2, 3)))
    return torch.cat(parts)


@dataclass(frozen=True)
class Evaluation(Report):
    """Means over the images, in nats per image unless noted otherwise."""

    images: int
    dimensions: int
    iw_nll_standard_error: float | None
    """The standard error over images; None for a single image."""
    bits_per_dim: float
    """Computed from `iw_nll`."""
    neg_elbo_bits_per_dim: float
    psnr: float
    """PSNR of reconstructions from the posterior mean, in dB; see `psnr`."""
    ssim: float | None
    """SSIM of the same; None for images with a side of fewer than 11 pixels."""

    @property
    def num_examples(self) -> int:
        return self.images

    def table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, show_edge=False)
        table.add_column("")
        table.add_column("nats per image", justify="right")
        table.add_column("bits per dimension", justify="right")
        error = self.iw_nll_standard_error
        for name, value, bits in (
            ("negative ELBO", self.neg_elbo, self.neg_elbo_bits_per_dim),
            ("  reconstruction", self.reconstruction, None),
            ("  KL", self.kl, None),
            (f"NLL, {self.samples} importance samples", self.iw_nll, self.bits_per_dim),
            ("  standard error over images", error, None),
            *((name, value, None) for name, value in self.information_rows()),
        ):
            nats = "" if value is None else f"{value:.3f}"
            table.add_row(name, nats, "" if bits is None else f"{bits:.4f}")
        table.add_section()
        for row in self.latent_rows():
            table.add_row(*row, "")
        table.add_row("reconstructions: PSNR", f"{self.psnr:.2f} dB", "")
        needs = f" (from {WINDOW} x {WINDOW} pixels)" if self.ssim is None else ""
        table.add_row(f"  SSIM{needs}", "-" if self.ssim is None else f"{self.ssim:.3f}", "")
        return table


def estimate_in_batches(
    run: ImageRun,
    images: Tensor,
    settings: ImageSettings,
    samples: int,
    seed: int,
    console: Console,
    what: str,
) -> Iterator[tuple[Tensor, Tensor, Bounds, Tensor]]:
    """Yield batches of uint8 images (N, H, W, C), each with its prepared version, its bounds and its posterior means.

    `seed` seeds all draws. A progress bar on `console` has the description `what`.
    """
    draws, rows = seeded_generator(seed), val_batch_size(settings, images.shape[1:])

    def prepare_batch(batch: Tensor) -> Tensor:
        return prepare(batch, settings, draws).to(run.device)

    return bounds.estimate_in_batches(
        run.model, images.split, prepare_batch, rows, samples, seed, console, what
    )


def evaluate(
    run: ImageRun,
    console: Console,
    *,
    checkpoint: str = "best",
    samples: int = 500,
    limit: int | None = None,
    seed: int = 0,
    test: bool = False,
    factors: Factors | None = None,
) -> Evaluation:
    """Evaluate a run on its validation or test images, or the first `limit`, with a progress bar on `console`.

    `factors` are those of all these images.

    `seed` seeds the draws of z and those in `prepare`, so that runs are compared on the same x.

    Raises InputError if a number is out of range.
    """
    check_options(samples, limit, seed)
    val = run.evaluated_images(test)[:limit]
    parts, posteriors, ratios, similarities = [], [], [], []
    for images, x, part, mu in estimate_in_batches(
        run, val, run.settings, samples, seed, console, "evaluating"
    ):
        parts.append(torch.stack(part).cpu())
        posteriors.append(_posterior(run, x))
        reconstruction, original = _reconstruction(run, mu), _original(run, images, x)
        ratios.append(psnr(reconstruction, original))
        if min(original.shape[2:]) >= WINDOW:
            similarities.append(ssim(reconstruction, original))
    bounds_of_all = torch.cat(parts, 1)
    count, dimensions = len(val), val[0].numel()
    bits = run.model.bits_per_dim
    shared = shared_results(run.model, bounds_of_all, torch.cat(posteriors, 1), factors, seed=seed)
    return Evaluation(
        run=str(run.path),
        checkpoint=checkpoint,
        epoch=run.epoch,
        data=run.images.name,
        split="test" if test else "val",
        images=count,
        dimensions=dimensions,
        samples=samples,
        seed=seed,
        iw_nll_standard_error=bounds_of_all[0].std().item() / math.sqrt(count) if count > 1 else None,
        bits_per_dim=bits(shared["iw_nll"]),
        neg_elbo_bits_per_dim=bits(shared["neg_elbo"]),
        **shared,
        psnr=torch.cat(ratios).mean().item(),
        ssim=torch.cat(similarities).mean().item() if similarities else None,
    )


@torch.no_grad()
def _posterior(run: ImageRun, x: Tensor) -> Tensor:
    """Return mu and logvar of prepared images, (2, B, L) on the CPU."""
    return torch.stack(run.model.encode(x)).cpu()


@torch.no_grad()
def _reconstruction(run: ImageRun, mu: Tensor) -> Tensor:
    """Return the reconstructions as pictures show them, (B, C, H, W) on the CPU."""
    return run.model.likelihood.mean(run.model.decode(mu)).cpu()


def _original(run: ImageRun, images: Tensor, x: Tensor) -> Tensor:
    """Return what x was to be reconstructed as, in [0, 1] on the CPU: zeros and ones for a Bernoulli, otherwise bytes.

    The means of a Gaussian estimate (byte + 1/2) / 256, which differs from byte / 255 by at most half a byte.
    """
    return x.cpu() if run.settings.likelihood == "bernoulli" else images.permute(0, 3, 1, 2) / 255
