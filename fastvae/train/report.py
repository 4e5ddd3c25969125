"""What an evaluation has measured, and the numbers that it is asked for."""

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from rich.table import Table

from . import files
from .errors import InputError

__all__ = ["Report", "check_numbers"]


class Report(ABC):
    """A dataclass of what was measured."""

    data: str
    epoch: int

    @property
    @abstractmethod
    def count(self) -> int:
        """Of how many held-out data."""

    @abstractmethod
    def table(self) -> Table: ...

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
