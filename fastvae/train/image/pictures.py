"""Pictures as PNG files, written beside and renamed: grids of images."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastvae.train import files

__all__ = ["BACKGROUND", "save_grid", "save_reconstructions", "save_samples"]

BACKGROUND = 64  # a grey that tells black images apart
_COLUMNS = 10
_GAP = 2  # pixels between images
_SIDE = 64  # small images are enlarged to at least this many pixels
_FONT, _LETTER = 13, 200  # pixels; grey


def save_grid(
    rows: Sequence[Tensor],
    path: Path,
    *,
    group: int | None = None,
    ends_apart: bool = False,
    labels: Sequence[str] = (),
) -> None:
    """Write rows of images, each (columns, H, W, C) in [0, 1], as one PNG. Later rows may be shorter than the first.

    With `group`, that many rows stand together; with `ends_apart` the first and the last column stand by themselves.
    `labels` are written to the left of the rows. Raises InputError if the file cannot be written.
    """
    columns, height, width, channels = rows[0].shape
    factor = -(-_SIDE // max(height, width))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(_FONT)
    margin = _GAP + max((round(font.getlength(label)) + 4 * _GAP for label in labels), default=0)
    apart = 4 * _GAP if ends_apart else 0
    tops = [_GAP + r * (height + _GAP) + (4 * _GAP * (r // group) if group else 0) for r in range(len(rows))]
    lefts = [margin + c * (width + _GAP) + apart * ((c > 0) + (c == columns - 1)) for c in range(columns)]
    canvas = torch.full(
        (tops[-1] + height + _GAP, lefts[-1] + width + _GAP, channels), BACKGROUND, dtype=torch.uint8
    )
    for row, top in zip(rows, tops, strict=True):
        pixels = (row.clamp(0, 1) * 255).round().to(torch.uint8)
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
    """Write images (N, H, W, C) in [0, 1] as a grid that is about square. Raises InputError as `save_grid`."""
    n = len(images)
    save_grid(images.split(n if n <= 8 else math.ceil(math.sqrt(n))), path)


def save_reconstructions(originals: Tensor, shown: Tensor, path: Path) -> None:
    """Write rows of ten originals, each above what the model makes of it. Raises InputError as `save_grid`."""
    pairs = zip(originals.split(_COLUMNS), shown.split(_COLUMNS), strict=True)
    save_grid([row for pair in pairs for row in pair], path, group=2)
