"""Atomic file writing: a file is either complete or unchanged."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

__all__ = ["error_reason", "prepare_folder", "remove_partial", "replacing", "temporary_path", "write"]

_PARTIAL = ".part"


def temporary_path(path: Path) -> Path:
    """Return the temporary path that is renamed to `path` once it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")


def write(path: Path, content: bytes) -> None:
    """Write a temporary file and rename it. Raises InputError if that fails."""
    with replacing(path) as part:
        part.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file to write, which then becomes `path`.

    If the block raises, the temporary file is removed. An OSError becomes an InputError.
    """
    part = temporary_path(path)
    try:
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error_reason(error)}") from error


def remove_partial(folder: Path) -> None:
    """Remove temporary files that killed processes have left behind."""
    for part in folder.glob(f".*{_PARTIAL}"):
        part.unlink(missing_ok=True)


def prepare_folder(folder: Path, names: Sequence[str]) -> None:
    """Create a folder and check that files with these names can be written to it, before any long work.

    Raises InputError if they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}{_PARTIAL}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        # If the path is a file, `mkdir` only says "File exists".
        why = "it is a file" if folder.is_file() else error_reason(error)
        raise InputError(f"{folder}: cannot be written to: {why}") from error
    for name in names:
        if (folder / name).is_dir():
            raise InputError(f"{folder / name}: cannot be written: it is a folder")


def error_reason(error: OSError) -> str:
    text = error.strerror or type(error).__name__
    return text[:1].lower() + text[1:]
