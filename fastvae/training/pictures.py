"""Grids of images as PNG files."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .data import InputError

__all__ = ["prepare_folder", "save_grid"]

_GAP, _BACKGROUND = 2, 64  # pixels between images; a grey that tells black images apart
_SIDE = 64  # small images are enlarged to about this many pixels


def prepare_folder(folder: Path, names: Sequence[str]) -> None:
    """Make a folder and see that files of these names can be written there: before the work, not after it.

    Raises InputError where they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        # `mkdir` says "File exists" of a file in the folder's place.
        reason = "it is a file" if folder.is_file() else _reason(error)
        raise InputError(f"{folder}: cannot be written to: {reason}") from error
    for name in names:
        if (folder / name).is_dir():
            raise InputError(f"{folder / name}: cannot be written: it is a folder")


def save_grid(rows: Sequence[Tensor], path: Path, *, group: int | None = None) -> None:
    """Write rows of images, each (columns, H, W, C) in [0, 1], as one PNG; with `group`, that many rows stand together.

    The file is written beside and renamed, so that nobody ever finds half of it. Raises InputError if that fails.
    """
    columns, height, width, channels = rows[0].shape
    factor = max(1, _SIDE // max(height, width))
    cell_h, cell_w = height * factor + _GAP, width * factor + _GAP
    wider = [4 * _GAP * (r // group) if group else 0 for r in range(len(rows))]
    canvas = torch.full(
        (len(rows) * cell_h + wider[-1] + _GAP, columns * cell_w + _GAP, channels),
        _BACKGROUND,
        dtype=torch.uint8,
    )
    for r, row in enumerate(rows):
        pixels = (row.clamp(0, 1) * 255).round().to(torch.uint8)
        pixels = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        for c, image in enumerate(pixels):
            top, left = _GAP + r * cell_h + wider[r], _GAP + c * cell_w
            canvas[top : top + height * factor, left : left + width * factor] = image
    png = io.BytesIO()
    Image.fromarray(canvas.squeeze(-1).numpy()).save(png, "PNG")

    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            beside.write_bytes(png.getvalue())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    text = error.strerror or type(error).__name__
    return text[:1].lower() + text[1:]
