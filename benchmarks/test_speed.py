"""Forward and backward of every case, on three sides; pytest-benchmark's table shows the ratios in brackets.

The sides of a case are timed together, interleaved (timing.py), when the first of its tests runs. Each test then
replays its side's times to pytest-benchmark, on a clock that shows the measured times. Floors are recorded but never
asserted, because the benchmarks run on shared machines.
"""

from typing import Any

import pytest

from .cases import CASES
from .conftest import Run
from .machine import floors_of
from .timing import SIDES

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")


class Clock:
    """A clock that advances only when a test sets it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


clock = Clock()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
@pytest.mark.benchmark(timer=clock)
def test_speed(index: int, side: str, run: Run, benchmark: Any) -> None:
    case, measurement = CASES[index], run(index)
    floors = floors_of(case)
    seconds = iter(measurement.seconds[side])

    def replay() -> None:
        clock.now += next(seconds, 0.0)

    benchmark.group = f"{index + 1:2}. {case.name}"
    benchmark.name = side
    benchmark.extra_info |= {
        "times_slower_than_fused": measurement.median(side) / measurement.median("fused"),
        "floor": floors[SIDES.index(side) - 1] if floors and side != "fused" else None,
        "peak_bytes_above_inputs": measurement.peak_bytes[side],
        "share_of_mul_bandwidth": measurement.median("mul") / measurement.median(side),
    }
    benchmark.pedantic(replay, rounds=len(measurement.seconds[side]), iterations=1)
