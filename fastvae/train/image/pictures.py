"""Grids of images as PNG files."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastvae.train import files

__all__ = ["BACKGROUND", "save_grid", "save_reconstructions", "save_samples"]

BACKGROUND = 64  # a grey that black images stand out from
_COLUMNS = 10
_GAP = 2  # pixels between images
_SIDE = 64  # smaller images are enlarged to at least this many pixels
_FONT, _LETTER = 13, 200  # the size in pixels, and the grey of the letters


def save_grid(
    grid_rows: Sequence[Tensor],
    path: Path,
    *,
    group: int | None = None,
    ends_apart: bool = False,
    labels: Sequence[str] = (),
) -> None:
    """Write a grid of images as one PNG; each of its rows is (columns, H, W, C) in [0, 1]. Later rows may be shorter.

    With `group`, the grid is divided into groups of that many rows. With `ends_apart`, the first and last column are
    set apart. `labels` are written to the left of the rows. Raises InputError if the file cannot be written.
    """
    columns, height, width, channels = grid_rows[0].shape
    factor = -(-_SIDE // max(height, width))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(_FONT)
    margin = _GAP + max((round(font.getlength(label)) + 4 * _GAP for label in labels), default=0)
    apart = 4 * _GAP if ends_apart else 0
    tops = [
        _GAP + r * (height + _GAP) + (4 * _GAP * (r // group) if group else 0) for r in range(len(grid_rows))
    ]
    lefts = [margin + c * (width + _GAP) + apart * ((c > 0) + (c == columns - 1)) for c in range(columns)]
    canvas = torch.full(
        (tops[-1] + height + _GAP, lefts[-1] + width + _GAP, channels), BACKGROUND, dtype=torch.uint8
    )
    for grid_row, top in zip(grid_rows, tops, strict=True):
        pixels = (grid_row.clamp(0, 1) * 255).round().to(torch.uint8)
        pixels = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        for image, left in zip(pixels, lefts, strict=False):
            canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas.squeeze(-1).numpy())
    draw = ImageDraw.Draw(picture)
    for label, top in zip(labels, tops, strict=False):
        middle = (margin - 2 * _GAP, top + height // 2)
        draw.text(middle, label, _LETTER if channels == 1 else (_LETTER,) * 3, font, anchor="rm")
    png = io.BytesIO()
    picture.save(png, "PNG")
    files.write(path, png.getvalue())


def save_samples(images: Tensor, path: Path) -> None:
    """Write images (N, H, W, C) in [0, 1] as a roughly square grid. Raises InputError as `save_grid` does."""
    n = len(images)
    save_grid(images.split(n if n <= 8 else math.ceil(math.sqrt(n))), path)


def save_reconstructions(originals: Tensor, reconstructions: Tensor, path: Path) -> None:
    """Write originals, ten in a line, each above its reconstruction. Raises InputError as `save_grid` does."""
    pairs = zip(originals.split(_COLUMNS), reconstructions.split(_COLUMNS), strict=True)
    save_grid([grid_row for pair in pairs for grid_row in pair], path, group=2)
