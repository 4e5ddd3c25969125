"""How good a model is on images that it has not seen: the ELBO, the likelihood itself, its reconstructions.

To read it: `evaluate` runs `fastvae.train.bounds` over the held-out images of a run; `psnr` and `ssim` measure what is
seen.
"""

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
from fastvae.train.draws import generator
from fastvae.train.module import ACTIVE
from fastvae.train.report import Report, check_numbers

from .loader import held_out_batch, prepare
from .run import ImageRun
from .settings import ImageSettings

__all__ = ["Evaluation", "evaluate", "in_batches", "psnr", "ssim"]

# In dB: the error that rounding to bytes leaves, 1 / (12 * 255^2) in the mean square. A smaller one cannot be seen.
HIGHEST_PSNR = 10 * math.log10(12 * 255**2)
WINDOW = 11  # pixels


def psnr(shown: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images (B, C, H, W) in [0, 1], float64 (B,), in dB: -10 log10 of the squared error.

    What leaves [0, 1] is clamped, as it is in a picture. At most 58.9 dB (`HIGHEST_PSNR`), which would be infinity for
    equal images, and a mean over images then too.
    """
    ratio = peak_signal_noise_ratio(
        shown.double(), original.double(), data_range=(0.0, 1.0), reduction="none", dim=(1, 2, 3)
    )
    return ratio.clamp(max=HIGHEST_PSNR)


def ssim(shown: Tensor, original: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images (B, C, H, W) in [0, 1], float64 (B,): 1 for equal ones.

    The mean over all windows of 11 x 11 pixels that lie in the image, weighted by a Gaussian of 1.5, each channel for
    itself. What leaves [0, 1] is clamped.
    """
    edge = WINDOW // 2
    parts = []
    # On the CPU: a GPU's TF32 would be too coarse for variances as E x^2 - (E x)^2, and float64 takes far longer.
    for ours, theirs in zip(shown.float().cpu().split(64), original.float().cpu().split(64), strict=True):
        _, index = structural_similarity_index_measure(
            ours, theirs, sigma=1.5, kernel_size=WINDOW, data_range=(0.0, 1.0), return_full_image=True
        )
        # The whole one has windows past the edges too, where the images are mirrored.
        parts.append(index[:, :, edge:-edge, edge:-edge].double().mean((1, 2, 3)))
    return torch.cat(parts)


@dataclass(frozen=True)
class Evaluation(Report):
    """Means over the images, in nats per image where nothing else is said."""

    run: str
    checkpoint: str
    epoch: int
    data: str
    images: int
    dimensions: int
    samples: int
    seed: int
    nelbo: float
    reconstruction: float
    kl: float
    iw_nll: float
    """By importance weighting: at least the true one in expectation, at most the negative ELBO."""
    iw_nll_standard_error: float | None
    """Of the mean over images; None of a single one."""
    bits_per_dim: float
    """From `iw_nll`."""
    nelbo_bits_per_dim: float
    active_units: int
    """Whose posterior mean varies over the images by more than 0.01 (Burda et al. 2016, section 5.2)."""
    latents: int
    psnr: float
    """Of reconstructions from the posterior's mean, in dB; see `psnr`."""
    ssim: float | None
    """The same; None of images with a side below 11 pixels."""

    @property
    def count(self) -> int:
        return self.images

    def table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, show_edge=False)
        table.add_column("")
        table.add_column("nats per image", justify="right")
        table.add_column("bits per dimension", justify="right")
        error = self.iw_nll_standard_error
        for name, value, bits in (
            ("negative ELBO", self.nelbo, self.nelbo_bits_per_dim),
            ("  reconstruction", self.reconstruction, None),
            ("  KL", self.kl, None),
            (f"NLL, {self.samples} importance samples", self.iw_nll, self.bits_per_dim),
            ("  standard error over images", error, None),
        ):
            nats = "" if value is None else f"{value:.3f}"
            table.add_row(name, nats, "" if bits is None else f"{bits:.4f}")
        table.add_section()
        table.add_row("active units", f"{self.active_units} of {self.latents}", "")
        table.add_row("reconstructions: PSNR", f"{self.psnr:.2f} dB", "")
        needs = f" (from {WINDOW} x {WINDOW} pixels)" if self.ssim is None else ""
        table.add_row(f"  SSIM{needs}", "-" if self.ssim is None else f"{self.ssim:.3f}", "")
        return table


def in_batches(
    run: ImageRun,
    images: Tensor,
    settings: ImageSettings,
    samples: int,
    seed: int,
    console: Console,
    what: str,
) -> Iterator[tuple[Tensor, Tensor, Bounds, Tensor]]:
    """Of uint8 images (N, H, W, C), a batch at a time: they, as `settings` prepare them, their bounds, posterior means.

    `seed` is of all that is drawn; a progress bar on `console` says `what` is done.
    """
    draws, size = generator(seed), held_out_batch(settings, images.shape[1:])
    batches = images.split(size)

    def prepared(batch: Tensor) -> Tensor:
        return prepare(batch, settings, draws).to(run.device)

    return bounds.in_batches(run.model, batches, prepared, size, samples, seed, console, what)


def evaluate(
    run: ImageRun,
    console: Console,
    *,
    checkpoint: str = "best",
    samples: int = 500,
    limit: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Evaluate a run on its held-out images, or the first `limit` of them, with a progress bar on `console`.

    `seed` is of the draws of z and of what `prepare` draws: runs are compared on the same x.

    Raises InputError for a number out of range.
    """
    check_numbers(samples, limit, seed)
    held_out = run.images.held_out[:limit]
    parts, means, ratios, similarities = [], [], [], []
    for images, x, part, mu in in_batches(run, held_out, run.settings, samples, seed, console, "evaluating"):
        parts.append(torch.stack(part).cpu())
        means.append(mu.double().cpu())
        shown, original = _reconstruction(run, mu), _original(run, images, x)
        ratios.append(psnr(shown, original))
        if min(original.shape[2:]) >= WINDOW:
            similarities.append(ssim(shown, original))
    nll, reconstruction, kl = torch.cat(parts, 1)
    count, dimensions = len(held_out), held_out[0].numel()
    bits = run.model.bits_per_dim
    nelbo, iw_nll = (reconstruction + kl).mean().item(), nll.mean().item()
    return Evaluation(
        run=str(run.path),
        checkpoint=checkpoint,
        epoch=run.epoch,
        data=run.images.name,
        images=count,
        dimensions=dimensions,
        samples=samples,
        seed=seed,
        nelbo=nelbo,
        reconstruction=reconstruction.mean().item(),
        kl=kl.mean().item(),
        iw_nll=iw_nll,
        iw_nll_standard_error=nll.std().item() / math.sqrt(count) if count > 1 else None,
        bits_per_dim=bits(iw_nll),
        nelbo_bits_per_dim=bits(nelbo),
        active_units=int((torch.cat(means).flatten(1).var(0, correction=0) > ACTIVE).sum()),
        latents=run.model.latents,
        psnr=torch.cat(ratios).mean().item(),
        ssim=torch.cat(similarities).mean().item() if similarities else None,
    )


@torch.no_grad()
def _reconstruction(run: ImageRun, mu: Tensor) -> Tensor:
    """As pictures show it, (B, C, H, W) on the CPU."""
    return run.model.likelihood.mean(run.model.decode(mu)).cpu()


def _original(run: ImageRun, images: Tensor, x: Tensor) -> Tensor:
    """What was to be reconstructed from x, in [0, 1] on the CPU: the zeros and ones of a Bernoulli, else the bytes.

    For the Gaussian too, whose means are those of (byte + 1/2) / 256: no more than half a byte from byte / 255.
    """
    return x.cpu() if run.settings.likelihood == "bernoulli" else images.permute(0, 3, 1, 2) / 255
