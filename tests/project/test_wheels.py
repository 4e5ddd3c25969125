""".ci/wheels.py: its index page, and its messages about what is not available. Nothing is built here."""

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


def test_index_page_links_to_every_wheel(wheels: ModuleType, tmp_path: Path) -> None:
    """Most servers read a + in a path as a +, but some as a space. pip compares the digest."""
    wheel = tmp_path / "fastvae_elbo-0.2.0+torch2.13-cp311-cp311-manylinux_2_28_x86_64.whl"
    wheel.write_bytes(b"its bytes")
    page = wheels.index_page([wheel], "https://example.org/v0.2.0/")
    ((link, text),) = re.findall(r'<a href="([^"]+)"[^>]*>([^<]+)</a>', page)
    assert text == wheel.name
    path, _, digest = link.partition("#sha256=")
    assert path == f"https://example.org/v0.2.0/{wheel.name.replace('+', '%2B')}"
    assert digest == hashlib.sha256(b"its bytes").hexdigest()


def test_find_interpreter_of_a_missing_python_raises(wheels: ModuleType) -> None:
    assert wheels.find_interpreter(sys.executable) == sys.executable
    with pytest.raises(wheels.Unavailable, match=r"python2\.99 was not found"):
        wheels.find_interpreter("python2.99")


def test_pip_failure_returns_the_message_of_pip(wheels: ModuleType) -> None:
    versions = "ERROR: Could not find a version that satisfies the requirement torch==1.99.* (from versions: 2.11.0)\n"
    nothing = "ERROR: No matching distribution found for torch==1.99.*\n"
    assert wheels.pip_failure(versions + nothing) == "No matching distribution found for torch==1.99.*"
    assert (
        wheels.pip_failure("WARNING: Retrying\nERROR: [Errno 28] No space left\n")
        == "[Errno 28] No space left"
    )
    assert wheels.pip_failure("") == "pip failed"
