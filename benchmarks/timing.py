"""Time a case: fused, eager, torch.compile and a bare multiplication, interleaved in one process.

What one machine does in one minute it does not do in the next, so only ratios of times taken side by side count. Every
round calls each side twice, in an order that turns from round to round. The first call takes the next of a ring of
input sets that together overflow the last cache; the second takes the same set again, which by now lies as near as it
fits, as a decoder's output does when the loss reads it. Cases that are about memory are judged by the first call, small
ones, where launching is what costs, by the second.
"""

import gc
import inspect
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvae

from .cases import Case, Inputs

Call = Callable[[], Any]
Result = tuple[Tensor, dict[str, Tensor]]  # the loss, and the gradients by the names of their inputs

SIDES = ("fused", "eager", "compile")
SMALL = 8 << 20  # bytes to move below which a case is not about memory
MOST_INPUTS = 3 << 29  # 1.5 GiB of inputs, whatever the size of the last cache

FEWEST_ROUNDS, MOST_ROUNDS = 9, 1500


@dataclass
class Measurement:
    case: Case
    cold: dict[str, list[float]]
    """The first calls of each side, of rival backends, and of `mul`: torch.mul(a, b, out=c) that moves as many bytes as
    the case must."""
    warm: dict[str, list[float]]
    """The second calls."""
    peak_bytes: dict[str, int]
    """The most that forward and backward of each side hold at a time above the inputs: gradients included."""
    input_sets: int

    @property
    def seconds(self) -> dict[str, list[float]]:
        """Those by which the case is judged."""
        return self.warm if self.case.moves < SMALL else self.cold

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])


def measure(
    case: Case, device: torch.device, budget: float = 4.0, rivals: Sequence[str] = (), **options: str
) -> Measurement:
    """Times `case` for about `budget` seconds, after a check that all sides compute the same.

    `rivals` are backends of fastvae, sides of their own beside "fused", which runs on the backend that is set.
    `options` are torch.compile's for the compiled side.
    """
    torch.manual_seed(0)
    first = case.setup(device)
    sets = [first, *(_copy(first) for _ in range(1, _ring(case.moves, _size(first), device)))]

    torch._dynamo.reset()
    fused = case.fused(device)
    compiled = torch.compile(case.written, dynamic=False, **options)
    functions = dict(zip(SIDES, (fused, case.written, compiled), strict=True))
    functions |= {rival: case.fused(device) for rival in rivals}
    calls = {side: [_bind(function, inputs) for inputs in sets] for side, function in functions.items()}
    results: dict[str, Result] = {}
    for side, function in functions.items():
        with _backend_of(side, rivals):
            results[side] = _result(function, first)
    _check(case, first, results)
    results.clear()

    rings: dict[str, Iterator[Call]] = {}
    order = itertools.cycle(range(len(sets)))  # one ring for all sides: a set is cold when its turn comes
    for side in functions:
        rings[side] = map(calls[side].__getitem__, order)
    rings["mul"] = itertools.cycle(_multiplications(case.moves, device))

    clock = _cuda_clock if device.type == "cuda" else _cpu_clock
    for side in rings:
        with _backend_of(side, rivals):
            for _ in range(3):
                clock(next(rings[side]))
    cold: dict[str, list[float]] = {side: [] for side in rings}
    warm: dict[str, list[float]] = {side: [] for side in rings}
    names = list(rings)
    gc.collect()
    gc.disable()
    try:
        stop = time.perf_counter() + budget
        for i in range(MOST_ROUNDS):
            if i >= FEWEST_ROUNDS and time.perf_counter() > stop:
                break
            for side in names[i % len(names) :] + names[: i % len(names)]:
                call = next(rings[side])
                with _backend_of(side, rivals):
                    cold[side].append(clock(call))
                    warm[side].append(clock(call))
    finally:
        gc.enable()
    peaks = {side: peak_bytes(calls[side][0], device) for side in SIDES}
    return Measurement(case, cold, warm, peaks, len(sets))


def _backend_of(side: str, rivals: Sequence[str]) -> AbstractContextManager[None]:
    return fastvae.use_backend(side) if side in rivals else nullcontext()


def _bind(function: Callable[..., tuple[Tensor, ...]], inputs: Inputs) -> Call:
    """Forward and backward over one set of inputs: (outputs, gradients)."""
    args = [inputs[name] for name in inspect.signature(function).parameters]
    leaves = [inputs[name] for name in _leaves(function, inputs)]
    # The loss comes first, then z where there is one.
    weights = [None, inputs["z_gradient"]] if "z_gradient" in inputs else [None]

    def call() -> object:
        outputs = function(*args)
        return outputs, torch.autograd.grad(outputs, leaves, weights)

    return call


def _leaves(function: Callable[..., tuple[Tensor, ...]], inputs: Inputs) -> list[str]:
    return [name for name in inspect.signature(function).parameters if inputs[name].requires_grad]


def _result(function: Callable[..., tuple[Tensor, ...]], inputs: Inputs) -> Result:
    (loss, *_), gradients = _bind(function, inputs)()
    return loss.detach(), dict(zip(_leaves(function, inputs), gradients, strict=True))


def _check(case: Case, inputs: Inputs, results: dict[str, Result]) -> None:
    """All sides give the gradients of eager, and its loss. Where z is drawn, logvar's gradient depends on the noise,
    which each side draws for itself."""
    loss, gradients = results["eager"]
    for side, (side_loss, side_gradients) in results.items():
        assert side_gradients.keys() == gradients.keys(), f"{case.name}: {side} differentiates other inputs"
        pairs = {f"the gradients of {name}": (side_gradients[name], gradients[name]) for name in gradients}
        if "z_gradient" in inputs:
            del pairs["the gradients of logvar"]
        if case.same_loss:
            pairs["the losses"] = side_loss, loss
        for what, (found, expected) in pairs.items():
            error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
            assert error < case.tolerance, f"{case.name}: {what} of {side} and eager differ by {error:.2g}"


def _copy(inputs: Inputs) -> Inputs:
    return {
        name: value.detach().clone().requires_grad_(value.requires_grad) for name, value in inputs.items()
    }


def _size(inputs: Inputs) -> int:
    return sum(value.nbytes for value in inputs.values())


def _last_cache(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().removesuffix("K")) << 10 for path in sizes), default=64 << 20)


def _ring(moves: int, size: int, device: torch.device) -> int:
    """How many sets of `size` bytes to go through."""
    if moves < SMALL:
        return 4
    return max(2, min(3 * _last_cache(device) // 2, MOST_INPUTS) // size)


def _multiplications(moves: int, device: torch.device) -> list[Call]:
    count = max(1, moves // 12)
    # Their traffic comes on top of that of the other sides, so half of a ring does.
    ring = max(2, _ring(moves, moves, device) // 2)
    buffers = torch.ones(ring, 3, count, device=device)
    return [lambda a=a, b=b, c=c: torch.mul(a, b, out=c) for a, b, c in buffers]


def _cpu_clock(call: Call) -> float:
    start = time.perf_counter()
    results = call()
    seconds = time.perf_counter() - start
    del results
    return seconds


def _cuda_clock(call: Call) -> float:
    """Time of the GPU alone: while it sleeps, for some 2 ms, the host launches what is to be timed."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000)
    start.record()
    results = call()
    end.record()
    end.synchronize()
    del results
    return start.elapsed_time(end) / 1e3


def peak_bytes(call: Call, device: torch.device) -> int:
    """In a pass of its own: recording allocations takes time."""
    call()
    # Buffers that fastvae keeps from one call for the next count in the call that needs them.
    fastvae.empty_cache()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    # Every allocation and release of torch's CPU allocator, in order of time.
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        call()
    records = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    records.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in records), initial=0))
