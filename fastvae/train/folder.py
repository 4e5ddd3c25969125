"""The folder of a run.

config.toml  metrics.csv  kl_per_dimension.csv  loss.png  checkpoints/last.ckpt  checkpoints/best.ckpt

A kind of data has further files of its own: see `Kind`.
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
    "CHECKPOINTS", "CONFIG", "TABLES", "TENSORBOARD", "alone", "clear", "read_config", "refuse_to_replace",
    "remove_partial", "write_config",
]  # fmt: skip

CONFIG = "config.toml"
CHECKPOINTS = "checkpoints"
TABLES = ("metrics.csv", "kl_per_dimension.csv")
TENSORBOARD = "tensorboard"


def refuse_to_replace(out: Path, overwrite: bool, names: Sequence[str]) -> None:
    """Raises InputError where a run, or anything of these names that is none, is there already."""
    if (out / CONFIG).exists() and not overwrite and processes.is_first():
        resume = shlex.join(["fastvae", "resume", str(out)])
        raise InputError(
            f"{out}: there is a run in this folder; continue it ({resume}), give another --out, or replace it with "
            "--overwrite"
        )
    if not (out / CONFIG).exists() and processes.is_first():
        for name in (*TABLES, *names, CHECKPOINTS, TENSORBOARD):
            if (out / name).exists():
                raise InputError(
                    f"{out / name}: there already, in a folder that is no run (no {CONFIG}); a run would replace it: "
                    "move it away, or give another --out"
                )


@contextmanager
def alone(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Make a run's folder, and let no other process train in it meanwhile, where systems and file systems have locks.

    Raises InputError where one does, or where files of these names cannot be written. The lock goes with the process,
    however it ends.
    """
    if not processes.is_first():
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
            raise InputError(f"{folder}: this run is being trained, by another process") from None
        except OSError:
            pass  # no locks here, as on some network file systems
        yield
    finally:
        os.close(opened)


def clear(out: Path, names: Sequence[str]) -> None:
    """Remove what an earlier run has left, by name and nothing else; config.toml stays until it is replaced."""
    checkpoints, tensorboard = out / CHECKPOINTS, out / TENSORBOARD
    left = [out / name for name in (*TABLES, *names)]
    left += [checkpoints / "last.ckpt", checkpoints / "best.ckpt", tensorboard / "hparams.yaml"]
    for path in (*left, *tensorboard.glob("events.*")):
        path.unlink(missing_ok=True)
    remove_partial(out)


def remove_partial(path: Path) -> None:
    for folder in (path, path / CHECKPOINTS):
        files.remove_partial(folder)


def write_config(out: Path, settings: Settings, head: str = "") -> None:
    """Write config.toml; `head` are lines that stand before the settings."""
    import tomli_w

    first = {"recipe": settings.recipe, "fastvae": fastvae.__version__}
    text = tomli_w.dumps(first) + head + "\n" + tomli_w.dumps(dataclasses.asdict(settings))
    files.write(out / CONFIG, text.encode())


def read_config(path: Path) -> dict[str, Any]:
    """config.toml as it stands there. Raises InputError for a folder that is no run, and for what cannot be read."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    file = path / CONFIG
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        what = "no run: there is no config.toml in it" if path.is_dir() else "no such run"
        raise InputError(f"{path}: {what}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {files.reason(error)}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not TOML: {error}") from error
