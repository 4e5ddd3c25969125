"""Training on text."""

from pathlib import Path
from typing import Literal

from fastvae.train import registry, runs

from .kind import TextKind
from .run import TextRun

__all__ = ["KIND", "TextRun", "load"]

KIND = registry.register(TextKind())


def load(path: Path, *, data: str | None = None, checkpoint: Literal["best", "last"] = "best") -> TextRun:
    """Open a run of text; see `runs.load`."""
    return runs.load(KIND, path, data=data, checkpoint=checkpoint)
