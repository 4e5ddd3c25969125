"""Set up the benchmarks, and save their results in `.benchmarks/latest-*.json` for the report.

On x86, all sides run on AVX2, for which the floors are stated; `ATEN_CPU_CAPABILITY=avx512 pytest benchmarks/` uses
AVX-512.
"""

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# torch reads this variable when it first chooses a kernel, so it must be set before torch is imported. torch does not
# check it against the CPU, so this does.
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
    group.addoption("--threads", type=int, default=2, help="CPU threads of every side (default: 2)")
    group.addoption("--device", default="auto", help="cpu, cuda, or auto: cuda if fastvae has kernels for it")


def pytest_configure(config: pytest.Config) -> None:
    # Show only the relevant columns of pytest-benchmark's table.
    if getattr(config.option, "benchmark_columns", ()) is None:
        config.option.benchmark_columns = ["median", "iqr", "min", "rounds"]


class Run:
    """One run of the benchmarks. A case is measured, with all its sides, when its first test requests it."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = machine.configure(device, threads)
        self.description = machine.describe(self.device)
        self.load_monitor = machine.LoadMonitor()
        self._measure = cache(lambda index: measure(CASES[index], self.device))
        self.measurements: dict[int, Measurement] = {}

    def __call__(self, index: int) -> Measurement:
        self.measurements[index] = self._measure(index)
        return self.measurements[index]

    def as_json(self) -> dict[str, Any]:
        cases = [machine.summarise(self.measurements[index]) for index in sorted(self.measurements)]
        used_by_others = self.load_monitor.cores_used_by_others()
        return self.description | {"cores_used_by_others": used_by_others, "cases": cases}


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    run = Run(request.config.getoption("--device"), request.config.getoption("--threads"))
    yield run
    # A run of only some cases (-k) is not saved.
    if len(run.measurements) == len(CASES):
        LATEST.mkdir(exist_ok=True)
        file = LATEST / f"latest-{run.description['instruction_set']}.json"
        file.write_text(json.dumps(run.as_json(), indent=1) + "\n")
