"""Forward and backward of the cases in benchmarks/cases.py, compared with eager and torch.compile."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from . import clock
from .clock import Call, seconds
from .passes import serving_backends
from .plan import REHEARSAL
from .stage import Item, Results

BUDGET = 0.02 if REHEARSAL else 0.6  # seconds for a case, in addition to its compilation
# The cases of a rehearsal, which take little time on a CPU.
SMALL = (
    "Bernoulli 128 x 784",
    "reparameterise + KL 128 x 20",
    "ELBO step: latent 128 x 20, Bernoulli 128 x 784",
)
LAUNCH_BOUND = 32 << 20  # a case that moves fewer bytes is limited by launches


def items() -> Iterator[Item]:
    """ "fused" is the backend that "auto" uses; other backends that serve this GPU are measured under their names."""
    from ..cases import CASES, GPU_CASES

    device = clock.configure()
    names = serving_backends()
    rivals = [] if REHEARSAL else names[1:]
    cases = [case for case in CASES if case.name in SMALL] if REHEARSAL else GPU_CASES
    for case in cases:
        yield case.name, lambda case=case: versus(case, device, rivals)
    # After a capture that fails, torch draws no random numbers any more in this process, so these come last.
    for case in (case for case in cases if case.moves < LAUNCH_BOUND and not REHEARSAL):
        for side in ("fused", "eager", *rivals):
            yield (
                f"{case.name}, replay of {side}",
                lambda case=case, side=side: replay(case, side, device, rivals),
            )


def versus(case: Any, device: torch.device, rivals: list[str]) -> Results:
    from .. import machine
    from ..timing import measure

    small = case.moves < LAUNCH_BOUND
    options = {"backend": "eager"} if REHEARSAL else {"mode": "reduce-overhead"} if small else {}
    # A rival that has no kernel for a likelihood is not measured.
    result = machine.summarise(measure(case, device, BUDGET, rivals, **options))
    if small:
        result |= launch_bound(case, device, rivals, options)
    times = result["median_ms"]
    print(f"{case.name:50} " + "  ".join(f"{k} {v:.3g} ms" for k, v in times.items()), flush=True)
    if not REHEARSAL:
        torch.cuda.empty_cache()
    return {"cases": [result]}


def launch_bound(case: Any, device: torch.device, rivals: list[str], options: dict[str, str]) -> Results:
    """Microseconds per call: of wall time, with a synchronisation after 20 calls, and of the host alone."""
    from ..timing import _backend_of, _bind

    inputs = case.setup(device)
    compiled = torch.compile(case.baseline, dynamic=False, **options)
    sides = {"fused": case.fused(device), "eager": case.baseline, "compile": compiled}
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

    def medians(times: dict[str, list[float]]) -> dict[str, float]:
        return {side: round(1e6 * statistics.median(t[1:]), 1) for side, t in times.items()}

    return {"host_us": medians(host), "wall_us": medians(wall)}


def replay(case: Any, side: str, device: torch.device, rivals: list[str]) -> Results:
    """Microseconds for a replay of a call as a CUDA graph. Compiled with reduce-overhead, a call is one already."""
    from ..timing import _backend_of, _bind

    call = _bind(case.baseline if side == "eager" else case.fused(device), case.setup(device))
    with _backend_of(side, rivals):
        return {"replay_us": {case.name: {side: _replay(call)}}}


def _replay(call: Call) -> float:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        outputs = call()
    result = round(1e6 * seconds([graph.replay], 50), 1)
    del outputs
    return result
