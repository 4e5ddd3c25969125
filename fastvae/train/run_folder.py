"""The folder of a run.

config.toml  metrics.csv  kl_per_dimension.csv  loss.png  checkpoints/last.ckpt  checkpoints/best.ckpt

Each kind of data adds its own files; see `Kind`.
"""

import dataclasses
import importlib.util
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastvae

from . import files, processes
from .errors import InputError
from .settings import Settings

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "FORMAT",
    "TABLES",
    "TENSORBOARD",
    "lock",
    "read_config",
    "refuse_to_replace",
    "remove_outputs",
    "remove_partial",
    "write_config",
]

CONFIG = "config.toml"
CHECKPOINTS = "checkpoints"
TABLES = ("metrics.csv", "kl_per_dimension.csv")
TENSORBOARD = "tensorboard"

FORMAT = 2
"""The format of run folders; 1 was that of fastvae 0.1. It changes with the names in config.toml and the tables."""


def refuse_to_replace(out: Path, overwrite: bool, names: Sequence[str]) -> None:
    """Raises InputError if the folder already contains a run, or files that a run would replace."""
    if (out / CONFIG).exists() and not overwrite and processes.is_main_process():
        resume = shlex.join(["fastvae", "resume", str(out)])
        raise InputError(
            f"{out}: this folder already contains a run; continue it with {resume}, choose another --out, or replace "
            "it with --overwrite"
        )
    if not (out / CONFIG).exists() and processes.is_main_process():
        for name in (*TABLES, *names, CHECKPOINTS, TENSORBOARD):
            if (out / name).exists():
                raise InputError(
                    f"{out / name}: this file would be replaced, and its folder is not a run (config.toml is missing); "
                    "move it away, or choose another --out"
                )


@contextmanager
def lock(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Create a run's folder and keep other processes from training in it, where the file system supports locks.

    Raises InputError if another process is training in it, or if files with these names cannot be written. The lock is
    released when the process ends, however that happens.
    """
    if not processes.is_main_process():
        yield
        return
    files.prepare_folder(folder, (CONFIG, *TABLES, *names))
    if importlib.util.find_spec("fcntl") is None:
        yield
        return
    import fcntl

    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is training this run") from None
        except OSError:
            pass  # some network file systems have no locks
        yield
    finally:
        os.close(opened)


def remove_outputs(out: Path, names: Sequence[str]) -> None:
    """Remove the files of an earlier run, and no others. config.toml stays until it is replaced."""
    checkpoints, tensorboard = out / CHECKPOINTS, out / TENSORBOARD
    outputs = [out / name for name in (*TABLES, *names)]
    outputs += [checkpoints / "last.ckpt", checkpoints / "best.ckpt", tensorboard / "hparams.yaml"]
    for path in (*outputs, *tensorboard.glob("events.*")):
        path.unlink(missing_ok=True)
    remove_partial(out)


def remove_partial(path: Path) -> None:
    for folder in (path, path / CHECKPOINTS):
        files.remove_partial(folder)


def write_config(out: Path, settings: Settings, form_lines: str = "") -> None:
    """Write config.toml; `form_lines` come before the settings."""
    import tomli_w

    first = {"recipe": settings.recipe, "fastvae": fastvae.__version__, "format": FORMAT}
    text = tomli_w.dumps(first) + form_lines + "\n" + tomli_w.dumps(dataclasses.asdict(settings))
    files.write(out / CONFIG, text.encode())


def read_config(path: Path) -> dict[str, Any]:
    """Read config.toml. Raises InputError if the folder is not a run or the file cannot be read."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    file = path / CONFIG
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        what = "not a run directory: config.toml is missing" if path.is_dir() else "no such run directory"
        raise InputError(f"{path}: {what}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {files.error_reason(error)}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid TOML: {error}") from error
