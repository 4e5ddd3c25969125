"""Training on counts of single cells."""

from pathlib import Path
from typing import Literal

from fastvae.train import registry, runs

from .kind import CountsKind
from .run import CellRun

__all__ = ["KIND", "CellRun", "load"]

KIND = registry.register(CountsKind())


def load(path: Path, *, data: str | None = None, checkpoint: Literal["best", "last"] = "best") -> CellRun:
    """Open a run of counts; see `runs.load`."""
    return runs.load(KIND, path, data=data, checkpoint=checkpoint)
