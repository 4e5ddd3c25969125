"""The device to measure and its clock. In a rehearsal, these are the CPU, and the host's clock instead of events."""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .plan import REHEARSAL

Call = Callable[[], object]


def device() -> torch.device:
    return torch.device("cpu" if REHEARSAL else "cuda")


class HostEvent:
    """An event of a device that completes everything immediately."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "HostEvent") -> float:
        return 1e3 * (end.at - self.at)


def event() -> Any:
    return HostEvent() if REHEARSAL else torch.cuda.Event(enable_timing=True)


def synchronize() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


def let_the_host_get_ahead() -> None:
    """Keep the GPU busy for about 2 ms while the host launches the calls to be timed, to exclude the host's time."""
    if not REHEARSAL:
        torch.cuda._sleep(4_000_000)


def configure() -> torch.device:
    torch.manual_seed(0)
    if not REHEARSAL:
        torch.cuda.set_device(0)
    return device()


def seconds(calls: list[Call], rounds: int = 20) -> float:
    """The median time of a call on the device. The calls take turns, so that none finds its inputs in the cache."""
    return interleaved({"": calls}, rounds)[""]


def interleaved(sides: dict[str, list[Call]], rounds: int = 20) -> dict[str, float]:
    """The median times of several sides, which are called in turn."""
    for calls in sides.values():
        for call in calls:
            call()
    rings = {side: itertools.cycle(calls) for side, calls in sides.items()}
    events = {side: [[event(), event()] for _ in range(rounds)] for side in sides}
    synchronize()
    for i in range(rounds):
        let_the_host_get_ahead()
        for side, ring in rings.items():
            call = next(ring)
            before, after = events[side][i]
            before.record()
            call()
            after.record()
    synchronize()
    return {
        side: statistics.median(before.elapsed_time(after) for before, after in pairs) / 1e3
        for side, pairs in events.items()
    }
