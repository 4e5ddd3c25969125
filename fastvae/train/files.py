"""Files that are never found half written."""

import os
from collections.abc import Sequence
from pathlib import Path

from .errors import InputError

__all__ = ["beside", "prepare_folder", "reason", "remove_partial", "write"]

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


def prepare_folder(folder: Path, names: Sequence[str]) -> None:
    """Make a folder and see that files of these names can be written there: before the work, not after it.

    Raises InputError where they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}{_PARTIAL}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        # `mkdir` says "File exists" of a file in the folder's place.
        why = "it is a file" if folder.is_file() else reason(error)
        raise InputError(f"{folder}: cannot be written to: {why}") from error
    for name in names:
        if (folder / name).is_dir():
            raise InputError(f"{folder / name}: cannot be written: it is a folder")


def reason(error: OSError) -> str:
    text = error.strerror or type(error).__name__
    return text[:1].lower() + text[1:]
