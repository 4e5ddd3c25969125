"""Where and how the benchmarks run, and what is kept of them: `.benchmarks/latest-*.json`, which the report reads.

On x86 both sides run on AVX2, which the floors are stated for; `ATEN_CPU_CAPABILITY=avx512 pytest benchmarks/` asks for
more.
"""

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# torch reads this when it first chooses a kernel, so before any import of it. It believes what it is told: ask the CPU.
if "ATEN_CPU_CAPABILITY" not in os.environ:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and " avx2 " in cpuinfo.read_text():
        os.environ["ATEN_CPU_CAPABILITY"] = "avx2"

from . import machine
from .cases import CASES
from .timing import Measurement, measure

LATEST = Path(__file__).parents[1] / ".benchmarks"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastvae")
    group.addoption("--threads", type=int, default=2, help="threads of every side on the CPU (default: 2)")
    group.addoption(
        "--device", default="auto", help="cpu, cuda, or auto: cuda where fastvae has kernels for it"
    )


def pytest_configure(config: pytest.Config) -> None:
    # What matters of pytest-benchmark's table.
    if getattr(config.option, "benchmark_columns", ()) is None:
        config.option.benchmark_columns = ["median", "iqr", "min", "rounds"]


class Run:
    """One run of the benchmarks: a case is measured when it is first asked for, with all its sides."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = machine.settle(device, threads)
        self.description = machine.describe(self.device)
        self.neighbours = machine.Neighbours()
        self.measured = cache(lambda index: measure(CASES[index], self.device))
        self.done: dict[int, Measurement] = {}

    def __call__(self, index: int) -> Measurement:
        self.done[index] = self.measured(index)
        return self.done[index]

    def as_json(self) -> dict[str, Any]:
        cases = [machine.summarise(self.done[index]) for index in sorted(self.done)]
        return self.description | {"cores_used_by_others": self.neighbours.cores(), "cases": cases}


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    run = Run(request.config.getoption("--device"), request.config.getoption("--threads"))
    yield run
    # A run of some cases (-k) is no record.
    if len(run.done) == len(CASES):
        LATEST.mkdir(exist_ok=True)
        file = LATEST / f"latest-{run.description['instruction_set']}.json"
        file.write_text(json.dumps(run.as_json(), indent=1) + "\n")
