"""Time a case: fused, eager, torch.compile and a bare multiplication, interleaved in one process.

The speed of a shared machine changes from minute to minute, so only ratios of times that are taken side by side are
meaningful. Every round calls each side twice, in an order that rotates from round to round. The first call takes the
next of several input sets that together exceed the last cache. The second call takes the same set again, which is by
then as close as it can be, like a decoder's output when the loss reads it. Cases that are limited by memory are judged
by the first call; small ones, which are limited by launch costs, by the second.
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
Result = tuple[Tensor, dict[str, Tensor]]  # the loss, and the gradients by input name

SIDES = ("fused", "eager", "compile")
SMALL = 8 << 20  # a case that moves fewer bytes is not limited by memory
MAX_INPUT_BYTES = 3 << 29  # 1.5 GiB of inputs, whatever the size of the last cache

MIN_ROUNDS, MAX_ROUNDS = 9, 1500


@dataclass
class Measurement:
    case: Case
    cold: dict[str, list[float]]
    """The first calls of each side, of rival backends, and of `mul`, a torch.mul(a, b, out=c) that moves as many bytes
    as the case must."""
    warm: dict[str, list[float]]
    """The second calls."""
    peak_bytes: dict[str, int]
    """The maximum memory that forward and backward of each side hold above the inputs, including gradients."""
    input_sets: int

    @property
    def seconds(self) -> dict[str, list[float]]:
        """The times by which the case is judged."""
        return self.warm if self.case.moves < SMALL else self.cold

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])


def measure(
    case: Case, device: torch.device, budget: float = 4.0, rivals: Sequence[str] = (), **options: str
) -> Measurement:
    """Time `case` for about `budget` seconds, after checking that all sides compute the same.

    `rivals` are backends of fastvae that are measured as separate sides beside "fused", which uses the current backend.
    `options` are the options of torch.compile for the compiled side.
    """
    torch.manual_seed(0)
    first = case.setup(device)
    sets = [first, *(_copy(first) for _ in range(1, _ring(case.moves, _size(first), device)))]

    torch._dynamo.reset()
    fused = case.fused(device)
    compiled = torch.compile(case.baseline, dynamic=False, **options)
    functions = dict(zip(SIDES, (fused, case.baseline, compiled), strict=True))
    functions |= {rival: case.fused(device) for rival in rivals}
    calls = {side: [_bind(function, inputs) for inputs in sets] for side, function in functions.items()}
    results: dict[str, Result] = {}
    for side, function in functions.items():
        with _backend_of(side, rivals):
            results[side] = _result(function, first)
    _check(case, first, results)
    results.clear()

    rings: dict[str, Iterator[Call]] = {}
    order = itertools.cycle(
        range(len(sets))
    )  # shared by all sides, so that a set is cold when its turn comes
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
        for i in range(MAX_ROUNDS):
            if i >= MIN_ROUNDS and time.perf_counter() > stop:
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
    """Bind a function to a set of inputs: a call runs forward and backward, and returns (outputs, gradients)."""
    args = [inputs[name] for name in inspect.signature(function).parameters]
    leaves = [inputs[name] for name in _leaves(function, inputs)]
    # The loss is the first output, and z the second if there is one.
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
    """Check that all sides have the gradients and the loss of eager. If z is sampled, logvar's gradient depends on the
    noise, which is different for each side."""
    loss, gradients = results["eager"]
    for side, (side_loss, side_gradients) in results.items():
        assert side_gradients.keys() == gradients.keys(), f"{case.name}: {side} differentiates other inputs"
        pairs = {f"the gradients of {name}": (side_gradients[name], gradients[name]) for name in gradients}
        if "z_gradient" in inputs:
            # The sides draw other noise, on which the gradients of the scale depend.
            pairs.pop("the gradients of logvar", None)
            if "head" in gradients:
                of_means = side_gradients["head"].chunk(2, 1)[0], gradients["head"].chunk(2, 1)[0]
                pairs["the gradients of head"] = of_means
        if case.same_loss:
            pairs["the losses"] = side_loss, loss
        for quantity, (actual, expected) in pairs.items():
            error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
            assert error < case.tolerance, (
                f"{case.name}: {quantity} of {side} and eager differ by {error:.2g}"
            )


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
    """The number of input sets of `size` bytes to rotate through."""
    if moves < SMALL:
        return 4
    return max(2, min(3 * _last_cache(device) // 2, MAX_INPUT_BYTES) // size)


def _multiplications(moves: int, device: torch.device) -> list[Call]:
    count = max(1, moves // 12)
    # The other sides add to their traffic, so half of a ring is enough.
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
    """The time of the GPU alone: it sleeps for about 2 ms, while the host launches the call to be timed."""
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
    """The maximum memory that a call holds. It is measured separately, because recording allocations takes time."""
    call()
    # Buffers that fastvae keeps between calls must count in the call that needs them.
    fastvae.empty_cache()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    # All allocations and releases of torch's CPU allocator, in chronological order.
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        call()
    records = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    records.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in records), initial=0))
