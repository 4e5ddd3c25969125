"""The result of an evaluation, and the checks of its options."""

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from rich.table import Table

from . import files
from .errors import InputError

__all__ = ["Report", "check_options"]


class Report(ABC):
    """Base class for the dataclasses that hold the results of an evaluation."""

    data: str
    epoch: int

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """The number of validation examples that were used."""

    @abstractmethod
    def table(self) -> Table: ...

    def write(self, path: Path) -> None:
        """Write the results as JSON. Raises InputError if the file cannot be written."""
        # JSON has no NaN.
        values: dict[str, Any] = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()  # type: ignore[call-overload]
        }
        files.write(path, (json.dumps(values, indent=2) + "\n").encode())


def check_options(samples: int, limit: int | None, seed: int) -> None:
    """Raises InputError if an option is out of range."""
    if samples < 1:
        raise InputError(f"--samples must be at least 1, got {samples}")
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1, got {limit}")
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be between 0 and {2**32 - 1}, got {seed}")
