"""Files that the tests compile, kept in build/tests until their sources change."""

import hashlib
import importlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[1] / "build" / "tests"


def kept(name: str, sources: Iterable[Path], flags: Sequence[str], make: Callable[[Path], None]) -> Path:
    """Return the folder that `make` fills from `sources` (files, or folders with all their files) and `flags`.

    If several processes need it at the same time, one of them creates it and the others wait.
    """
    fcntl = importlib.import_module(
        "fcntl"
    )  # not available everywhere, but where it is not, nothing is compiled
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(repr((flags, torch.__version__, compiler)).encode())
    files = [
        file for source in sources for file in ([source] if source.is_file() else sorted(source.rglob("*")))
    ]
    for file in files:
        if file.is_file() and file.suffix != ".pyc":
            digest.update(file.name.encode() + file.read_bytes())
    folder = FOLDER / f"{name}-{digest.hexdigest()[:16]}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            for old in FOLDER.glob(f"{name}-*"):
                if old == folder or time.time() - old.stat().st_mtime > 24 * 3600:  # newer ones may be in use
                    shutil.rmtree(old)
            folder.mkdir()
            make(folder)
            (folder / "done").touch()
    return folder
