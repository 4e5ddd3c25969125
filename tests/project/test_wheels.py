""".ci/wheels.py: the page that pip reads, and what it says of what cannot be had. It builds nothing here."""

import hashlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheels() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheels", ROOT / ".ci" / "wheels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_index_leads_to_every_wheel(wheels: ModuleType, tmp_path: Path) -> None:
    """A + in a path is a + to most servers, and a space to some. The digest is what pip compares."""
    wheel = tmp_path / "fastvae_elbo-0.2.0+torch2.13-cp311-cp311-manylinux_2_28_x86_64.whl"
    wheel.write_bytes(b"its bytes")
    page = wheels.index([wheel], "https://example.org/v0.2.0/")
    ((link, text),) = re.findall(r'<a href="([^"]+)"[^>]*>([^<]+)</a>', page)
    assert text == wheel.name
    path, _, digest = link.partition("#sha256=")
    assert path == f"https://example.org/v0.2.0/{wheel.name.replace('+', '%2B')}"
    assert digest == hashlib.sha256(b"its bytes").hexdigest()


def test_a_python_that_is_not_there_is_named(wheels: ModuleType) -> None:
    assert wheels.find(sys.executable) == sys.executable
    with pytest.raises(wheels.Unavailable, match=r"there is no python2\.99 here"):
        wheels.find("python2.99")


def test_a_torch_that_is_not_there_is_named(wheels: ModuleType) -> None:
    """In the words of pip."""
    found = "ERROR: Could not find a version that satisfies the requirement torch==1.99.* (from versions: 2.11.0)\n"
    nothing = "ERROR: No matching distribution found for torch==1.99.*\n"
    assert wheels.reason(found + nothing) == "No matching distribution found for torch==1.99.*"
    assert wheels.reason("WARNING: Retrying\nERROR: [Errno 28] No space left\n") == "[Errno 28] No space left"
    assert wheels.reason("") == "pip failed"
