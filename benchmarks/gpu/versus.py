"""The loss beside eager and torch.compile: forward and backward of the cases in benchmarks/cases.py."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from . import clock
from .clock import Call, seconds
from .passes import served_by
from .plan import REHEARSAL
from .stage import Item, Results

BUDGET = 0.02 if REHEARSAL else 0.6  # seconds for a case, beside what compiling it takes
LAUNCH_BOUND = 32 << 20  # bytes to move below which launching is what costs


def items() -> Iterator[Item]:
    """What "auto" takes is "fused"; another backend that serves this GPU runs beside it under its own name."""
    from ..cases import CASES, GPU_CASES

    device = clock.settle()
    names = served_by()
    rivals = [] if REHEARSAL else names[1:]
    cases = [case for case in CASES if case.moves < 1 << 21][:3] if REHEARSAL else GPU_CASES
    for case in cases:
        yield case.name, lambda case=case: versus(case, device, rivals)


def versus(case: Any, device: torch.device, rivals: list[str]) -> Results:
    from .. import machine
    from ..timing import measure

    small = case.moves < LAUNCH_BOUND
    options = {"backend": "eager"} if REHEARSAL else {"mode": "reduce-overhead"} if small else {}
    # A likelihood that a rival has no kernel for stays without it.
    result = machine.summarise(measure(case, device, BUDGET, rivals, **options))
    if small:
        result |= launch_bound(case, device, rivals, options)
    times = result["median_ms"]
    print(f"{case.name:50} " + "  ".join(f"{k} {v:.3g} ms" for k, v in times.items()), flush=True)
    if not REHEARSAL:
        torch.cuda.empty_cache()
    return {"cases": [result]}


def launch_bound(case: Any, device: torch.device, rivals: list[str], options: dict[str, str]) -> Results:
    """Microseconds of wall time per call with the device waited for after 20, of the host alone, and of a replay."""
    from ..timing import _backend_of, _bind

    inputs = case.setup(device)
    compiled = torch.compile(case.written, dynamic=False, **options)
    sides = {"fused": case.fused(device), "eager": case.written, "compile": compiled}
    sides |= {rival: case.fused(device) for rival in rivals}
    calls = {side: _bind(function, inputs) for side, function in sides.items()}
    host: dict[str, list[float]] = {side: [] for side in sides}
    wall: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(3 if REHEARSAL else 11):  # the first is a warm-up
        for side, call in calls.items():
            with _backend_of(side, rivals):
                clock.synchronize()
                start = time.perf_counter()
                for _ in range(20):
                    call()
                host[side].append((time.perf_counter() - start) / 20)
                clock.synchronize()
                wall[side].append((time.perf_counter() - start) / 20)
    replay = {}
    for side, call in calls.items():
        # What reduce-overhead compiles is a graph already.
        if side != "compile" and not REHEARSAL:
            with _backend_of(side, rivals):
                replay[side] = _replay(call)

    def medians(times: dict[str, list[float]]) -> dict[str, float]:
        return {side: round(1e6 * statistics.median(t[1:]), 1) for side, t in times.items()}

    return {"host_us": medians(host), "wall_us": medians(wall), "graph_replay_us": replay}


def _replay(call: Call) -> float | None:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            kept = call()
    except RuntimeError as error:
        print(f"no CUDA graph: {error}")
        return None
    result = round(1e6 * seconds([graph.replay], 50), 1)
    del kept
    return result
