"""Files that are never found half written."""

import os
from pathlib import Path

from .data import InputError

__all__ = ["remove_partial", "write"]

_PARTIAL = ".part"


def beside(path: Path) -> Path:
    """Where to write what is then renamed to `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")


def write(path: Path, content: bytes) -> None:
    """Write beside and rename. Raises InputError if that fails."""
    part = beside(path)
    try:
        try:
            part.write_bytes(content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {reason(error)}") from error


def remove_partial(folder: Path) -> None:
    """Remove what processes that were killed while writing have left."""
    for part in folder.glob(f".*{_PARTIAL}"):
        part.unlink(missing_ok=True)


def reason(error: OSError) -> str:
    text = error.strerror or type(error).__name__
    return text[:1].lower() + text[1:]
