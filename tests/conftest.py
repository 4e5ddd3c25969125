"""Fixtures of all tests: the backend under test, and the same random inputs in every run."""

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import compiled
import numpy as np
import pytest
import torch
from thinning import covering

import fastvae

# The tensors of these tests are on the CPU, where Triton's kernels run only in its interpreter: see test_triton.py.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ("reference", "native", *(("triton",) if INTERPRETED else ()))

# Triton's cache for test_triton_aot.py is kept with the other compiled files.
os.environ.setdefault("TRITON_CACHE_DIR", str(compiled.FOLDER / "triton"))

if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_as_hardware_does(self: Any, source: Any, target: Any) -> Any:
        """Round float32 to the nearest bfloat16, like GPUs and torch; the interpreter truncates."""
        if target.scalar != tl.bfloat16 or source.dtype.scalar != tl.float32:
            return cast(self, source, target)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(rounded, target.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast_as_hardware_does


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="i/n: of all tests every n-th, from the i-th on")
    parser.addoption(
        "--tests",
        choices=("few", "most", "rest", "all"),
        help="few, most: no test marked `slow`, and of each grid so many points that every value, or every pair "
        "of values, occurs; rest: the slow tests, and further points, so that any three values occur together; all: "
        "everything, with whole grids. Default: all where tests are chosen by name (FILE::TEST, -k, --lf), else most",
    )


def _how_triton_runs() -> str:
    if INTERPRETED:
        return "the interpreter"
    return "the GPU" if torch.cuda.is_available() else "the interpreter, in a process of its own"


def pytest_report_header() -> str:
    return f"Triton's kernels: on {_how_triton_runs()}"


def _key(value: object) -> Hashable:
    """A key that distinguishes parameter values: 1, 1.0 and True are different."""
    if isinstance(value, (bool, int, float)):
        return type(value), repr(value)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


# The number of values of a grid that occur together.
TOGETHER = {"few": 1, "most": 2, "rest": 3}


def _thinned(items: list[pytest.Item], together: int) -> set[pytest.Item]:
    """The tests without the mark `slow`, of each grid as many as `covering` needs."""
    chosen = set()
    grids: dict[Hashable, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow"):
            continue
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            grids[item.path, item.cls, item.originalname, item.callspec.params.get("backend")].append(item)
        else:
            chosen.add(item)
    for grid in grids.values():
        points = [{name: _key(value) for name, value in item.callspec.params.items()} for item in grid]
        # A tensor on the wrong device mostly shows for any values.
        on_meta = grid[0].get_closest_marker("on_meta") is not None
        chosen.update(grid[place] for place in covering(points, max(1, together - on_meta)))
    return chosen


def _chosen(items: list[pytest.Item], which: str) -> set[pytest.Item]:
    if which == "all":
        return set(items)
    if which != "rest":
        return _thinned(items, TOGETHER[which])
    slow = {item for item in items if item.get_closest_marker("slow")}
    return (slow | _thinned(items, TOGETHER["rest"])) - _thinned(items, TOGETHER["most"])


def _which_tests(config: pytest.Config) -> str:
    last_failed = getattr(config.option, "lf", False)  # the plugin is missing with -p no:cacheprovider
    by_name = any("::" in argument for argument in config.args) or config.option.keyword or last_failed
    return config.getoption("--tests") or ("all" if by_name else "most")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    i, n = map(int, config.getoption("--shard").split("/"))
    # Tests with the fixture `device` are run by test_triton.py in the interpreter, and by test_on_meta.py.
    elsewhere = "own" in _how_triton_runs()
    chosen = _chosen(items, _which_tests(config))
    kept = [
        item
        for item in items
        # Tests that start pytest themselves pass this option on.
        if (item in chosen or "which_tests" in getattr(item, "fixturenames", ()))
        and not (
            elsewhere
            and "device" in getattr(item, "fixturenames", ())
            and item.get_closest_marker("on_meta") is None
        )
    ][i::n]
    left = set(items).difference(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = kept


@pytest.fixture
def which_tests(pytestconfig: pytest.Config) -> list[str]:
    """The option for a test that starts pytest where kernels are slow: fewer points of each grid than in this run.

    `make test` then runs "few" of them, and `make test-rest` "most".
    """
    which = _which_tests(pytestconfig)
    return ["--tests", {"most": "few", "rest": "most"}.get(which, which)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20130614)


@pytest.fixture(autouse=True, scope="session")
def _no_range_warnings() -> None:
    """Turn range warnings off, because tests use all kinds of values. The tests of the warnings turn them on."""
    fastvae.set_range_warnings(False)


@pytest.fixture
def range_warnings() -> Iterator[None]:
    fastvae.functional.ranges._warned.clear()
    fastvae.set_range_warnings(True)
    yield
    fastvae.set_range_warnings(False)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each backend that has kernels for the CPU. None of them may be missing."""
    with fastvae.use_backend(request.param):
        yield request.param


@pytest.fixture
def native() -> Iterator[None]:
    """Run the test on the native backend, for what only the compiled kernels guarantee."""
    with fastvae.use_backend("native"):
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """Let the test change torch's thread count, and restore it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _capabilities() -> list[str]:
    best = torch.backends.cpu.get_cpu_capability()
    known = ["DEFAULT", "AVX2", "AVX512"]
    return known[: known.index(best) + 1] if best in known else ["DEFAULT"]


@pytest.fixture(params=_capabilities())
def on_capability(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Run a script in a fresh process with the kernels of one instruction set, and return its output."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": request.param.lower()}
    check = f"import fastvae._C; assert fastvae._C.cpu_capability().upper() == {request.param!r}\n"

    def run(script: str) -> str:
        # The check comes last, because no code of ours may run before the script's first call.
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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread, for small models, which gain nothing from threads and slow down other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def with_pictures() -> None:
    """Let runs draw pictures, for tests of the pictures."""


@pytest.fixture
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep runs from drawing pictures, which takes most of the time of such short runs."""
    if "with_pictures" not in request.fixturenames:
        monkeypatch.setattr("fastvae.train.callbacks.should_save_examples", lambda trainer: False)
