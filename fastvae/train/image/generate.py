"""Pictures drawn from a run: new images, reconstructions, ways between images, what a dimension does, inpainting.

To read it as an example: each function is a few lines on `ImageRun.model`, whose `encode` and `decode` are those of
the recipe.
What is shown are means of the likelihood; images come from the run's held-out part.
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
from fastvae.train.draws import generator
from fastvae.train.errors import InputError

from . import pictures
from .evaluate import in_batches
from .loader import held_out_batch, prepare
from .run import ImageRun

__all__ = [
    "Ranking", "beside", "best", "inpaint", "interpolate", "neighbours", "reconstruct", "sample", "traverse",
]  # fmt: skip

_COLUMNS = 10
_DRAWS = 20  # of z for each image's likelihood


def sample(run: ImageRun, path: Path, *, n: int = 64, seed: int = 0, temperature: float = 1.0) -> None:
    """n new images, decoded from z ~ N(0, temperature^2 I)."""
    _check("-n", n, 1, 10_000)
    _check_seed(seed)
    _check("--temperature", temperature, 0)
    _prepare(path)
    z = temperature * _prior(run, n, seed)
    pictures.save_samples(_shown(run, z), path)


class Ranking(NamedTuple):
    """What images were ranked by, and what each of them got."""

    measure: str
    unit: str
    """To follow a value, with its space; a score has none."""
    decimals: int
    values: Tensor
    """Of all that were drawn, the best first, float64."""


@torch.no_grad()
def best(
    run: ImageRun, path: Path, *, n: int = 16, of: int = 256, seed: int = 0, temperature: float = 1.0
) -> Ranking:
    """The n best, best first, of the `of` new images that `sample` would draw.

    They are ranked by the importance-weighted bound on the likelihood that the model gives them, as bytes (for the
    Bernoulli as zeros and ones). It prefers plain images, which cost few bits. Where the model has a method
    `realism(images (B, C, H, W) in [0, 1]) -> (B,)`, a discriminator's score, that ranks instead: the highest first.
    """
    _check("--of", of, 1, 10_000)
    if not 1 <= n <= of:
        raise InputError(f"--best must be between 1 and {of} (--of), got {n}")
    _check_seed(seed)
    _check("--temperature", temperature, 0)
    _prepare(path)
    z = temperature * _prior(run, of, seed)
    shown = _shown(run, z).clamp(0, 1)
    realism = getattr(run.model, "realism", None)
    if realism is not None:
        parts = (part.permute(0, 3, 1, 2).to(run.device) for part in _parts(run, shown))
        values = torch.cat([realism(part).double().cpu() for part in parts])
        measure, unit, decimals = "the discriminator's score", "", 4
    else:
        values = _nll(run, (shown * 255).round().to(torch.uint8), seed)
        measure, unit, decimals = f"likelihood under the model ({_DRAWS} importance samples)", " nats", 2
        if run.model.bits_offset is not None:
            values = run.model.bits_per_dim(values)
            unit, decimals = " bits per dimension", 4
    # In either direction NaN comes last.
    order = (values if realism is None else -values).argsort(stable=True)
    pictures.save_samples(shown[order[:n]], path)
    return Ranking(measure, unit, decimals, values[order])


def _nll(run: ImageRun, images: Tensor, seed: int) -> Tensor:
    """The importance-weighted bound on -log p of uint8 images (N, H, W, C): nats, (N,)."""
    # A mean is brought to zeros and ones as its picture looks, not drawn.
    settings = dataclasses.replace(run.settings, binarize="threshold")
    batches = in_batches(run, images, settings, _DRAWS, seed, get_console(), "ranking")
    return torch.cat([found.nll.cpu() for _, _, found, _ in batches])


def reconstruct(run: ImageRun, path: Path, *, n: int = 30) -> int:
    """The first n held-out images, or as many as there are, each above what the model makes of it.

    The latter is decoded from the posterior's mean. Returns how many images there were.
    """
    _check("-n", n, 1, 10_000)
    images = run.images.held_out[:n]
    _prepare(path)
    pictures.save_reconstructions(_grey(images), _shown(run, _means(run, images)), path)
    return len(images)


def beside(run: ImageRun, path: Path, *, n: int = 40, seed: int = 0) -> None:
    """n new images, and below them, apart, as many held-out ones (or as many as there are)."""
    _prepare(path)
    new, real = _shown(run, _prior(run, n, seed)), _grey(run.images.held_out[:n])
    rows = [*new.split(_COLUMNS), *real.split(_COLUMNS)]
    pictures.save_grid(rows, path, group=len(new.split(_COLUMNS)))


def neighbours(run: ImageRun, path: Path, *, n: int = 10, near: int = 3, seed: int = 0) -> None:
    """n new images, and below each the training images nearest to it in their pixels: does it repeat one?

    Mirrored ones count too where the run has mirrored them in training.
    """
    _prepare(path)
    new, train = _shown(run, _prior(run, n, seed)), run.images.train
    rows = []
    for image in new:
        views = [image, image.flip(1)] if run.settings.augment else [image]
        distance = torch.stack([_distances(run, view) for view in views]).amin(0)
        rows.append(distance.topk(min(near, len(train)), largest=False).indices)
    nearest = torch.stack(rows, 1)  # (near, n)
    pictures.save_grid([new, *(_grey(train[row]) for row in nearest)], path)


def _distances(run: ImageRun, image: Tensor) -> Tensor:
    """Squared, of the run's training images from one (H, W, C) in [0, 1]."""
    parts = _parts(run, run.images.train)
    return torch.cat([(_grey(part) - image).square().flatten(1).sum(1) for part in parts])


def interpolate(
    run: ImageRun, path: Path, *, starts: Sequence[int] = (), ends: Sequence[int] = (), steps: int = 10
) -> list[tuple[int, int]]:
    """From image to image, a row for each pair of `starts` and `ends`, which count the held-out images from 0.

    A row is `steps` images, decoded on the straight line between the two posterior means, between the two originals.
    Without pairs the first 16 images make 8 of them. Returns the pairs.
    """
    _check("--steps", steps, 2, 100)
    if len(starts) != len(ends):
        raise InputError(
            f"--from and --to make pairs: got {len(starts)} of the one and {len(ends)} of the other"
        )
    held_out = run.images.held_out
    _check_places("--from", starts, held_out)
    _check_places("--to", ends, held_out)
    pairs = list(zip(starts, ends, strict=True))
    if not pairs:
        # A single image leads to itself.
        last = len(held_out) - 1
        pairs = [(2 * i, min(2 * i + 1, last)) for i in range(min(8, max(1, len(held_out) // 2)))]
    _prepare(path)
    first, second = (held_out[list(places)] for places in zip(*pairs, strict=True))
    start, end = _means(run, first), _means(run, second)
    way = torch.stack(
        [start.lerp(end, t) for t in torch.linspace(0, 1, steps).tolist()], 1
    )  # (pairs, steps, L)
    between = _shown(run, way.flatten(0, 1)).unflatten(0, (-1, steps))
    rows = torch.cat([_grey(first)[:, None], between, _grey(second)[:, None]], 1)
    pictures.save_grid(list(rows), path, ends_apart=True)
    return pairs


def traverse(run: ImageRun, path: Path, *, image: int = 0, n: int = 20, steps: int = 11) -> list[int]:
    """What the dimensions do: a row for each, the most active first, in which it alone goes from -3 to 3.

    The others stay at the posterior's mean of a held-out image. Activity is the variance of the posterior's mean over
    (at most 2000) held-out images. There are at most n rows. Returns the dimensions in their order.
    """
    _check("-n", n, 1)
    _check("--steps", steps, 2, 100)
    _check_places("--image", [image], run.images.held_out)
    _prepare(path)
    mu = _means(run, run.images.held_out[:2000])
    order = mu.double().var(0, correction=0).argsort(descending=True)[:n].tolist()
    z = _means(run, run.images.held_out[image : image + 1]).expand(len(order), steps, -1).clone()
    for row, dimension in enumerate(order):
        z[row, :, dimension] = torch.linspace(-3, 3, steps)
    rows = _shown(run, z.flatten(0, 1)).unflatten(0, (-1, steps))
    pictures.save_grid(list(rows), path, labels=[f"z{dimension}" for dimension in order])
    return order


class Box(NamedTuple):
    """The pixels from x0 to before x1, and from y0 to before y1; (0, 0) is at the top left."""

    x0: int
    y0: int
    x1: int
    y1: int


def box(mask: str, height: int, width: int) -> Box:
    """What `--mask` means for an image of this size: half of it, its centre, or the corners of a box.

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
            f"--mask {mask}: not a box in an image of {width} x {height} pixels (width x height): x0,y0,x1,y1 "
            f"with 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}"
        )
    return corners


@torch.no_grad()
def inpaint(
    run: ImageRun, path: Path, *, mask: str = "right", steps: int = 100, n: int = 10, seed: int = 0
) -> int:
    """The first n held-out images, or as many as there are: with a part masked, with that part filled, and whole.

    The masked part starts as noise. Each step encodes the image, draws z from the posterior and then the masked part
    from the likelihood, so that it drifts to what the model holds likely given the rest (Rezende et al. 2014,
    appendix F). The last step takes means. Returns how many images there were.
    """
    height, width, _ = run.shape
    x0, y0, x1, y1 = box(mask, height, width)
    _check("--steps", steps, 1)
    _check("-n", n, 1, 1000)
    _check_seed(seed)
    images = run.images.held_out[:n]
    _prepare(path)
    model, likelihood = run.model, run.model.likelihood
    draws = torch.Generator(run.device).manual_seed(seed)
    x = prepare(images, run.settings, generator(seed)).to(run.device)
    hidden = x[:, :, y0:y1, x0:x1]  # a view
    if run.settings.of_bytes:
        hidden.random_(0, 256, generator=draws)
    else:
        hidden.uniform_(generator=draws)
    for step in range(steps):
        mu, logvar = model.encode(x)
        if step < steps - 1:
            z, _ = model.elbo.reparameterize(mu, logvar, generator=draws)
            hidden.copy_(likelihood.sample(model.decode(z), draws)[:, :, y0:y1, x0:x1])
    filled = likelihood.mean(model.decode(mu))[:, :, y0:y1, x0:x1]
    masked, whole = _grey(images), _grey(images)
    masked[:, y0:y1, x0:x1] = pictures.BACKGROUND / 255
    completed = whole.clone()
    completed[:, y0:y1, x0:x1] = filled.float().cpu().permute(0, 2, 3, 1)
    rows: list[Tensor] = []
    for three in zip(*(part.split(_COLUMNS) for part in (masked, completed, whole)), strict=True):
        rows += three
    pictures.save_grid(rows, path, group=3)
    return len(images)


# ---------------------------------------------------------------------------------------------------------------------
# What they share
# ---------------------------------------------------------------------------------------------------------------------


def _parts(run: ImageRun, rows: Tensor) -> tuple[Tensor, ...]:
    """As many images, or their z, at a time as memory is meant to hold."""
    return rows.split(held_out_batch(run.settings, run.shape))


def _prior(run: ImageRun, n: int, seed: int) -> Tensor:
    """z ~ N(0, I), (n, L), on the CPU."""
    return torch.randn(n, run.model.latents, generator=torch.Generator().manual_seed(seed))


def _grey(images: Tensor) -> Tensor:
    """uint8 to [0, 1]."""
    return images / 255


@torch.no_grad()
def _means(run: ImageRun, images: Tensor) -> Tensor:
    """Posterior means (N, L) of uint8 images (N, H, W, C), on the CPU."""
    draws = generator(run.settings.seed, 3)
    parts = (prepare(part, run.settings, draws).to(run.device) for part in _parts(run, images))
    return torch.cat([run.model.encode(part)[0].float().cpu() for part in parts])


@torch.no_grad()
def _shown(run: ImageRun, z: Tensor) -> Tensor:
    """The likelihood's means (N, H, W, C) of z (N, L), on the CPU."""
    mean = run.model.likelihood.mean
    parts = [mean(run.model.decode(part.to(run.device))) for part in _parts(run, z)]
    return torch.cat([part.float().cpu() for part in parts]).permute(0, 2, 3, 1)


def _prepare(path: Path) -> None:
    """See that a picture can be written there: before the work, not after it."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--out {path}: the picture is a PNG file, so its name must end in .png")
    files.prepare_folder(path.parent, [path.name])


def _check(name: str, value: float, low: int, high: int | None = None) -> None:
    if not (math.isfinite(value) and low <= value and (high is None or value <= high)):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f"{name} must be {bounds}, got {value}")


def _check_seed(seed: int) -> None:
    _check("--seed", seed, 0, 2**32 - 1)


def _check_places(name: str, places: Sequence[int], images: Tensor) -> None:
    for place in places:
        if not 0 <= place < len(images):
            raise InputError(f"{name} {place}: there are {len(images)} held-out images, counted from 0")
