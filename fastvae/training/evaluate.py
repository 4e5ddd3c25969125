"""How good a model is on images that it has not seen: the ELBO, the likelihood itself, its reconstructions.

To read it: `bounds` is the estimator, `evaluate` runs it over the held-out images of a run; `psnr` and `ssim` measure
what is seen.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from fastvae import functional

from . import files
from .data import InputError
from .loader import generator, held_out_batch, prepare
from .module import ACTIVE, VAE
from .runs import Run
from .settings import ImageSettings

__all__ = [
    "Bounds", "Evaluation", "Report", "bounds", "check_numbers", "evaluate", "progress", "psnr", "ssim",
]  # fmt: skip

# In dB: the error that rounding to bytes leaves, 1 / (12 * 255^2) in the mean square. A smaller one cannot be seen.
HIGHEST_PSNR = 10 * math.log10(12 * 255**2)
WINDOW = 11  # pixels


class Bounds(NamedTuple):
    """Of each image, in nats, float64 (B,)."""

    nll: Tensor
    """The importance-weighted bound on -log p(x)."""
    reconstruction: Tensor
    """-log p(x | z), the mean over the draws."""
    kl: Tensor


@torch.no_grad()
def bounds(
    model: VAE,
    x: Any,
    samples: int,
    *,
    seed: int = 0,
    first_row: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> tuple[Bounds, Tensor]:
    """The ELBO's terms and the importance-weighted likelihood of x (B, ...), and the posterior means (B, L).

    The latter is the bound of Burda et al. 2016 (equation 8) with K = `samples` draws z_k from the posterior:

        log p(x) >= E log 1/K sum_k w_k,    w_k = p(x | z_k) p(z_k) / q(z_k | x)

    which is the ELBO for K = 1 and tends to log p(x). Each draw is of the whole batch, against one and the same x, and
    its weights are summed as they come: the memory is that of one draw, whatever K is. Draw k of the row
    `first_row` + r depends on nothing but `seed`, so batches of any size give the same numbers, up to rounding.
    """
    mu, logvar = model.encode(x)
    mean, log_variance = mu.double().flatten(1), logvar.double().flatten(1)
    total = torch.full((len(mu),), -math.inf, dtype=torch.float64, device=mu.device)
    reconstruction = torch.zeros_like(total)
    for k in range(samples):
        noise = torch.tensor([seed, 4 * k], device=mu.device)
        z, kl = functional.reparameterize_kl(mu, logvar, seed=noise, row_offset=first_row)
        nll = model.nll(z, x).double()
        at = z.double().flatten(1)
        # log p(z) - log q(z | x), of the very z that was decoded: rounded to float32 it is not mu + sigma eps any more.
        ratio = ((at - mean).square() * torch.exp(-log_variance) + log_variance - at.square()).sum(1) / 2
        total = torch.logaddexp(total, ratio - nll)
        reconstruction += nll
        advance()
    return Bounds(math.log(samples) - total, reconstruction / samples, kl.double()), mu


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


class Report:
    """A dataclass of what was measured."""

    def write(self, path: Path) -> None:
        """As JSON. Raises InputError where that cannot be written."""
        # JSON has no NaN.
        values: dict[str, Any] = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()  # type: ignore[call-overload]
        }
        files.write(path, (json.dumps(values, indent=2) + "\n").encode())


def check_numbers(samples: int, limit: int | None, seed: int) -> None:
    """Raises InputError for one out of range."""
    if samples < 1:
        raise InputError(f"--samples must be at least 1, got {samples}")
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1, got {limit}")
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be between 0 and {2**32 - 1}, got {seed}")


def progress(console: Console) -> Progress:
    """A bar for `evaluate`, where there is a terminal to draw it on."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


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
    run: Run,
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
    with progress(console) as bar:
        task = bar.add_task(what, total=len(batches) * samples)
        for number, batch in enumerate(batches):
            x = prepare(batch, settings, draws).to(run.device)
            first = number * size
            found, mu = bounds(
                run.model, x, samples, seed=seed, first_row=first, advance=lambda: bar.advance(task)
            )
            yield batch, x, found, mu


def evaluate(
    run: Run,
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
def _reconstruction(run: Run, mu: Tensor) -> Tensor:
    """As pictures show it, (B, C, H, W) on the CPU."""
    return run.model.likelihood.mean(run.model.decode(mu)).cpu()


def _original(run: Run, images: Tensor, x: Tensor) -> Tensor:
    """What was to be reconstructed from x, in [0, 1] on the CPU: the zeros and ones of a Bernoulli, else the bytes.

    For the Gaussian too, whose means are those of (byte + 1/2) / 256: no more than half a byte from byte / 255.
    """
    return x.cpu() if run.settings.likelihood == "bernoulli" else images.permute(0, 3, 1, 2) / 255
