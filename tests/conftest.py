"""Fixtures of all tests: the backend under test, and the same random inputs in every run."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

import fastvae

# Triton's kernels are held to the same tests from the day they exist.
BACKENDS = ("reference", "native", *(("triton",) if importlib.util.find_spec("fastvae._triton") else ()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20130614)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each backend. The compiled CPU kernels must be there; others may be missing, with a reason."""
    name = request.param
    if name == "triton":
        if not torch.cuda.is_available():
            pytest.skip("Triton's kernels need a GPU, and torch sees none")
        pytest.importorskip("triton")
    with fastvae.use_backend(name):
        yield name


@pytest.fixture
def native() -> Iterator[None]:
    """For what only the compiled kernels promise."""
    with fastvae.use_backend("native"):
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets the test change torch's thread count, and puts it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _capabilities() -> list[str]:
    best = torch.backends.cpu.get_cpu_capability()
    known = ["DEFAULT", "AVX2", "AVX512"]
    return known[: known.index(best) + 1] if best in known else ["DEFAULT"]


@pytest.fixture(params=_capabilities())
def on_capability(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Runs a script in a fresh process whose kernels are those of one instruction set; returns what it prints."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": request.param.lower()}
    check = f"import fastvae._C; assert fastvae._C.cpu_capability().upper() == {request.param!r}\n"

    def run(script: str) -> str:
        # The check comes last: nothing of ours may run before the script's first call.
        done = subprocess.run(
            [sys.executable, "-c", script + "\n" + check],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
