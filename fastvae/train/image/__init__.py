"""Training on images."""

from pathlib import Path
from typing import Literal

from fastvae.train import registry, runs

from .kind import ImageKind
from .run import ImageRun

__all__ = ["KIND", "ImageRun", "load"]

KIND = registry.register(ImageKind())


def load(path: Path, *, data: str | None = None, checkpoint: Literal["best", "last"] = "best") -> ImageRun:
    """Open a run of images; see `runs.load`."""
    return runs.load(KIND, path, data=data, checkpoint=checkpoint)
