"""Forward and backward of every case, three sides each; pytest-benchmark's table shows the ratios in brackets.

The sides of a case are timed together, interleaved (timing.py), when its first test runs. Each test then plays its
side's times to pytest-benchmark, on a clock that shows what was measured. Floors are recorded, never asserted: the
machines that run this are shared.
"""

from typing import Any

import pytest

from .cases import CASES
from .conftest import Run
from .timing import SIDES

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")


class Clock:
    """A clock that stands still but for the times it is told to show."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


clock = Clock()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
@pytest.mark.benchmark(timer=clock)
def test_speed(index: int, side: str, run: Run, benchmark: Any) -> None:
    case, measurement = CASES[index], run(index)
    seconds = iter(measurement.seconds[side])

    def replay() -> None:
        clock.now += next(seconds, 0.0)

    benchmark.group = f"{index + 1:2}. {case.name}"
    benchmark.name = side
    benchmark.extra_info |= {
        "times_slower_than_fused": measurement.median(side) / measurement.median("fused"),
        "floor": case.floors[SIDES.index(side) - 1] if case.floors and side != "fused" else None,
        "peak_bytes_above_inputs": measurement.peak_bytes[side],
        "share_of_mul_bandwidth": measurement.median("mul") / measurement.median(side),
    }
    benchmark.pedantic(replay, rounds=len(measurement.seconds[side]), iterations=1)
