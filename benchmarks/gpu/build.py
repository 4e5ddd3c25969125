"""The extension for this GPU: an existing one if it fits, otherwise it is built in place."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import util
from pathlib import Path

from .plan import REHEARSAL, ROOT
from .stage import Item, Results

FIT_CHECK = """
import sys
from fastvae.backends import available
sys.exit(available.load("native") is None or not available.serves("native", {kind!r}))
"""


def items() -> Iterator[Item]:
    yield "the extension", extension


def extension() -> Results:
    if fits():
        print("the existing extension fits")
        return {"build": "kept"}
    if REHEARSAL:
        return {"build": "skipped in a rehearsal"}
    import torch

    major, minor = torch.cuda.get_device_capability()
    # Build for this GPU only, whatever the environment says: containers name a dozen GPUs, and each takes as long.
    variables = {"FASTVAE_NATIVE": "1", "FASTVAE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    start = time.perf_counter()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    process = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
    )
    if process.returncode != 0:
        print("\n".join((process.stdout + process.stderr).strip().splitlines()[-40:]), flush=True)
        raise RuntimeError("the extension could not be built; see log.txt")
    print(f"built in {time.perf_counter() - start:.0f} s", flush=True)
    if not fits():
        raise RuntimeError("the extension was built, but does not fit; see `fastvae doctor`")
    return {"build": f"{time.perf_counter() - start:.0f} s"}


def sources() -> str:
    """The digest of the sources, which setup.py records as SOURCES when it builds them."""
    digest = hashlib.sha256()
    for path in (ROOT / "setup.py", *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def fits() -> bool:
    """Whether the existing extension was built from these sources, loads, and has kernels for this GPU."""
    record = Path(ROOT, "fastvae", "_build_info.py")
    if not record.exists():
        return False
    spec = util.spec_from_file_location("build_info", record)
    assert spec is not None
    assert spec.loader is not None
    info = util.module_from_spec(spec)
    spec.loader.exec_module(info)
    if getattr(info, "SOURCES", None) != sources():
        return False
    check = FIT_CHECK.format(kind="cpu" if REHEARSAL else "cuda")
    return subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
