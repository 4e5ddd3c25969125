"""Pictures from a run: samples, reconstructions, interpolations, traversals of latent dimensions, and inpainting.

Each function is short and builds on `encode` and `decode` of `ImageRun.model`, so it can serve as an example. The
pictures show means of the likelihood, and input images are validation images.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich import get_console
from torch import Tensor

from fastvae.train import files
from fastvae.train.errors import InputError
from fastvae.train.seeding import seeded_generator

from . import pictures
from .evaluate import estimate_in_batches
from .loader import prepare, val_batch_size
from .run import ImageRun

__all__ = [
    "Ranking", "compare_with_real", "inpaint", "interpolate", "nearest_neighbours", "reconstruct", "sample",
    "sample_best", "traverse",
]  # fmt: skip

_COLUMNS = 10
_DRAWS = 20  # draws of z to estimate the likelihood of an image


def sample(run: ImageRun, path: Path, *, n: int = 64, seed: int = 0, temperature: float = 1.0) -> None:
    """Draw n new images, decoded from z of the prior, whose standard deviation is multiplied by the temperature."""
    _check("-n", n, 1, 10_000)
    _check_seed(seed)
    _check("--temperature", temperature, 0)
    _prepare_output(path)
    z = _prior_samples(run, n, seed, temperature)
    pictures.save_samples(_decode_means(run, z), path)


class Ranking(NamedTuple):
    """The measure that images were ranked by, and the value of each image."""

    measure: str
    unit: str
    """The unit to print after a value, with a leading space; empty for a score."""
    decimals: int
    values: Tensor
    """The values of all images, best first, float64."""


@torch.no_grad()
def sample_best(
    run: ImageRun, path: Path, *, n: int = 16, of: int = 256, seed: int = 0, temperature: float = 1.0
) -> Ranking:
    """Draw the n best, in order, of the `of` new images that `sample` would draw.

    They are ranked by the importance-weighted bound on their likelihood under the model, as bytes (for the Bernoulli as
    zeros and ones). This prefers plain images, which need few bits. If the model has a method
    `realism(images (B, C, H, W) in [0, 1]) -> (B,)`, such as a discriminator's score, that ranks them instead.
    """
    _check("--of", of, 1, 10_000)
    if not 1 <= n <= of:
        raise InputError(f"--best must be between 1 and {of} (--of), got {n}")
    _check_seed(seed)
    _check("--temperature", temperature, 0)
    _prepare_output(path)
    z = _prior_samples(run, of, seed, temperature)
    images = _decode_means(run, z).clamp(0, 1)
    realism = getattr(run.model, "realism", None)
    if realism is not None:
        parts = (part.permute(0, 3, 1, 2).to(run.device) for part in _batches(run, images))
        values = torch.cat([realism(part).double().cpu() for part in parts])
        measure, unit, decimals = "the discriminator's score", "", 4
    else:
        values = _nll(run, (images * 255).round().to(torch.uint8), seed)
        measure, unit, decimals = f"likelihood under the model ({_DRAWS} importance samples)", " nats", 2
        if run.model.bits_offset is not None:
            values = run.model.bits_per_dim(values)
            unit, decimals = " bits per dimension", 4
    # NaN is sorted last in both cases.
    order = (values if realism is None else -values).argsort(stable=True)
    pictures.save_samples(images[order[:n]], path)
    return Ranking(measure, unit, decimals, values[order])


def _nll(run: ImageRun, images: Tensor, seed: int) -> Tensor:
    """Return the importance-weighted bound on -log p of uint8 images (N, H, W, C) in nats, (N,)."""
    # The means are binarised by a threshold, as their picture looks, even if training draws them.
    settings = dataclasses.replace(run.settings, binarize="threshold")
    batches = estimate_in_batches(run, images, settings, _DRAWS, seed, get_console(), "ranking")
    return torch.cat([found.nll.cpu() for _, _, found, _ in batches])


def reconstruct(run: ImageRun, path: Path, *, n: int = 30) -> int:
    """Draw the first n validation images, each above its reconstruction from the posterior mean.

    Returns the number of images, which may be smaller than n.
    """
    _check("-n", n, 1, 10_000)
    images = run.images.val[:n]
    _prepare_output(path)
    pictures.save_reconstructions(
        _to_unit_range(images), _decode_means(run, _posterior_means(run, images)), path
    )
    return len(images)


def compare_with_real(run: ImageRun, path: Path, *, n: int = 40, seed: int = 0) -> None:
    """Draw n new images and, below them, at most n validation images."""
    _prepare_output(path)
    new, real = _decode_means(run, _prior_samples(run, n, seed)), _to_unit_range(run.images.val[:n])
    grid_rows = [*new.split(_COLUMNS), *real.split(_COLUMNS)]
    pictures.save_grid(grid_rows, path, group=len(new.split(_COLUMNS)))


def nearest_neighbours(
    run: ImageRun, path: Path, *, n: int = 10, num_neighbours: int = 3, seed: int = 0
) -> None:
    """Draw n new images, each above the nearest training images in pixels, which shows whether the model copies any.

    Mirrored training images also count if training mirrored them.
    """
    _prepare_output(path)
    new, train = _decode_means(run, _prior_samples(run, n, seed)), run.images.train
    indices = []
    for image in new:
        views = [image, image.flip(1)] if run.settings.augment else [image]
        distance = torch.stack([_distances(run, view) for view in views]).amin(0)
        indices.append(distance.topk(min(num_neighbours, len(train)), largest=False).indices)
    nearest = torch.stack(indices, 1)  # (near, n)
    pictures.save_grid([new, *(_to_unit_range(train[indices]) for indices in nearest)], path)


def _distances(run: ImageRun, image: Tensor) -> Tensor:
    """Return the squared distances of all training images from one image (H, W, C) in [0, 1]."""
    parts = _batches(run, run.images.train)
    return torch.cat([(_to_unit_range(part) - image).square().flatten(1).sum(1) for part in parts])


def interpolate(
    run: ImageRun, path: Path, *, starts: Sequence[int] = (), ends: Sequence[int] = (), steps: int = 10
) -> list[tuple[int, int]]:
    """Interpolate between validation images; `starts` and `ends` are their indices.

    Each pair makes a line of the picture: `steps` images, decoded on the straight line between the two posterior means,
    with the two originals at its ends. Without pairs, the first 16 images make 8 pairs. Returns the pairs.
    """
    _check("--steps", steps, 2, 100)
    if len(starts) != len(ends):
        raise InputError(
            f"--from and --to must be given equally often, got {len(starts)} and {len(ends)} of them"
        )
    val = run.images.val
    _check_indices("--from", starts, val)
    _check_indices("--to", ends, val)
    pairs = list(zip(starts, ends, strict=True))
    if not pairs:
        # A single image is paired with itself.
        last = len(val) - 1
        pairs = [(2 * i, min(2 * i + 1, last)) for i in range(min(8, max(1, len(val) // 2)))]
    _prepare_output(path)
    first, second = (val[list(indices)] for indices in zip(*pairs, strict=True))
    start, end = _posterior_means(run, first), _posterior_means(run, second)
    z = torch.stack(
        [start.lerp(end, t) for t in torch.linspace(0, 1, steps).tolist()], 1
    )  # (pairs, steps, L)
    between = _decode_means(run, z.flatten(0, 1)).unflatten(0, (-1, steps))
    grid_rows = torch.cat([_to_unit_range(first)[:, None], between, _to_unit_range(second)[:, None]], 1)
    pictures.save_grid(list(grid_rows), path, ends_apart=True)
    return pairs


def traverse(run: ImageRun, path: Path, *, image: int = 0, n: int = 20, steps: int = 11) -> list[int]:
    """Vary each latent dimension from -3 to 3, starting with the most active one.

    The other dimensions keep the posterior mean of a validation image. The activity of a dimension is the variance of
    its posterior mean over at most 2000 validation images. Returns the dimensions in their order, at most n.
    """
    _check("-n", n, 1)
    _check("--steps", steps, 2, 100)
    _check_indices("--image", [image], run.images.val)
    _prepare_output(path)
    mu = _posterior_means(run, run.images.val[:2000])
    order = mu.double().var(0, correction=0).argsort(descending=True)[:n].tolist()
    z = _posterior_means(run, run.images.val[image : image + 1]).expand(len(order), steps, -1).clone()
    for grid_row, dimension in enumerate(order):
        z[grid_row, :, dimension] = torch.linspace(-3, 3, steps)
    grid_rows = _decode_means(run, z.flatten(0, 1)).unflatten(0, (-1, steps))
    pictures.save_grid(list(grid_rows), path, labels=[f"z{dimension}" for dimension in order])
    return order


class Box(NamedTuple):
    """Pixels with x0 <= x < x1 and y0 <= y < y1; (0, 0) is at the top left."""

    x0: int
    y0: int
    x1: int
    y1: int


def box(mask: str, height: int, width: int) -> Box:
    """Return the box of `--mask` in an image of this size: a half of it, its centre, or explicit corners.

    Raises InputError for anything else.
    """
    named = {
        "left": Box(0, 0, width // 2, height),
        "right": Box(width - width // 2, 0, width, height),
        "top": Box(0, 0, width, height // 2),
        "bottom": Box(0, height - height // 2, width, height),
        "center": Box(width // 4, height // 4, width - width // 4, height - height // 4),
    }
    if mask in named:
        return named[mask]
    if not re.fullmatch(r"\s*-?\d+\s*(,\s*-?\d+\s*){3}", mask):
        raise InputError(
            f"--mask must be one of {', '.join(named)}, or a box x0,y0,x1,y1 in pixels, got {mask!r}"
        )
    corners = Box(*map(int, mask.split(",")))
    if not (0 <= corners.x0 < corners.x1 <= width and 0 <= corners.y0 < corners.y1 <= height):
        raise InputError(
            f"--mask {mask}: the box must lie inside the image of {width} x {height} pixels (width x height), so "
            f"0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height} for x0,y0,x1,y1"
        )
    return corners


@torch.no_grad()
def inpaint(
    run: ImageRun, path: Path, *, mask: str = "right", steps: int = 100, n: int = 10, seed: int = 0
) -> int:
    """Draw the first n validation images, each with a part masked, with that part inpainted, and as it was.

    The masked part starts as noise. Each step encodes the image, draws z from the posterior, and draws the masked part
    from the likelihood, so that it moves towards what the model finds likely given the rest (Rezende et al. 2014,
    appendix F). The last step takes means. Returns the number of images, which may be smaller than n.
    """
    height, width, _ = run.shape
    x0, y0, x1, y1 = box(mask, height, width)
    _check("--steps", steps, 1)
    _check("-n", n, 1, 1000)
    _check_seed(seed)
    images = run.images.val[:n]
    _prepare_output(path)
    model, likelihood = run.model, run.model.likelihood
    draws = torch.Generator(run.device).manual_seed(seed)
    x = prepare(images, run.settings, seeded_generator(seed)).to(run.device)
    hidden = x[:, :, y0:y1, x0:x1]  # a view
    if run.settings.models_bytes:
        hidden.random_(0, 256, generator=draws)
    else:
        hidden.uniform_(generator=draws)
    for step in range(steps):
        mu, logvar = model.encode(x)
        if step < steps - 1:
            z, _ = model.elbo.reparameterize(mu, logvar, generator=draws)
            hidden.copy_(likelihood.sample(model.decode(z), draws)[:, :, y0:y1, x0:x1])
    filled = likelihood.mean(model.decode(mu))[:, :, y0:y1, x0:x1]
    masked, originals = _to_unit_range(images), _to_unit_range(images)
    masked[:, y0:y1, x0:x1] = pictures.BACKGROUND / 255
    inpainted = originals.clone()
    inpainted[:, y0:y1, x0:x1] = filled.float().cpu().permute(0, 2, 3, 1)
    grid_rows: list[Tensor] = []
    for group in zip(*(part.split(_COLUMNS) for part in (masked, inpainted, originals)), strict=True):
        grid_rows += group
    pictures.save_grid(grid_rows, path, group=3)
    return len(images)


# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


def _batches(run: ImageRun, tensor: Tensor) -> tuple[Tensor, ...]:
    """Split images, or their z, into batches that fit into memory."""
    return tensor.split(val_batch_size(run.settings, run.shape))


def _prior_samples(run: ImageRun, n: int, seed: int, temperature: float = 1.0) -> Tensor:
    """Draw z from the prior, (n, L), on the CPU."""
    return run.model.sample_prior(n, torch.Generator().manual_seed(seed), temperature)


def _to_unit_range(images: Tensor) -> Tensor:
    """Convert uint8 to [0, 1]."""
    return images / 255


@torch.no_grad()
def _posterior_means(run: ImageRun, images: Tensor) -> Tensor:
    """Return posterior means (N, L) of uint8 images (N, H, W, C), on the CPU."""
    draws = seeded_generator(run.settings.seed, 3)
    parts = (prepare(part, run.settings, draws).to(run.device) for part in _batches(run, images))
    return torch.cat([run.model.encode(part)[0].float().cpu() for part in parts])


@torch.no_grad()
def _decode_means(run: ImageRun, z: Tensor) -> Tensor:
    """Return the means of the likelihood (N, H, W, C) for z (N, L), on the CPU."""
    mean = run.model.likelihood.mean
    parts = [mean(run.model.decode(part.to(run.device))) for part in _batches(run, z)]
    return torch.cat([part.float().cpu() for part in parts]).permute(0, 2, 3, 1)


def _prepare_output(path: Path) -> None:
    """Check that a picture can be written there, before any long work."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--out {path}: the picture is saved as PNG, so the name must end in .png")
    files.prepare_folder(path.parent, [path.name])


def _check(name: str, value: float, low: int, high: int | None = None) -> None:
    if not (math.isfinite(value) and low <= value and (high is None or value <= high)):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f"{name} must be {bounds}, got {value}")


def _check_seed(seed: int) -> None:
    _check("--seed", seed, 0, 2**32 - 1)


def _check_indices(name: str, indices: Sequence[int], images: Tensor) -> None:
    for index in indices:
        if not 0 <= index < len(images):
            raise InputError(
                f"{name} must be between 0 and {len(images) - 1}, as there are {len(images)} validation images, got "
                f"{index}"
            )
