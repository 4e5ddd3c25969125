"""Times other tiles and warps for Triton's kernels beside those of its table; faster ones should go into the table."""

import time
from collections.abc import Iterator

from . import clock
from .clock import Call, seconds
from .passes import passes_of, serving_backends
from .plan import REHEARSAL
from .stage import Item, Results

# (tile, warps) with 8 to 32 elements per thread.
CANDIDATES = [
    (tile, warps)
    for tile in (1024, 2048, 4096, 8192)
    for warps in (2, 4, 8)
    if 8 <= tile // (32 * warps) <= 32
]


def items() -> Iterator[Item]:
    device = clock.configure()
    if "triton" not in serving_backends() and not REHEARSAL:
        return
    passes: dict[str, list[list[Call]]] = {}
    side = serving_backends()[0] if REHEARSAL else "triton"
    for kernel, name, make in passes_of([side], device):
        # One pass each in float32 and bfloat16.
        if "fp32, uint8" not in name and "Bernoulli forward + gradient, bf16, uint8" not in name:
            passes.setdefault(kernel, []).append(make()[1][side])
    for kernel, calls in passes.items():
        yield kernel, lambda kernel=kernel, calls=calls: tune(kernel, calls)


def tune(kernel: str, calls: list[list[Call]]) -> Results:
    """Choose the tile and warps with the lowest score, the sum over passes of the time relative to the table's
    choice."""
    from fastvae._triton import tuning

    device = clock.device()
    choices = tuning.TABLE.setdefault(tuning.architecture(device), {})
    key, current = (kernel, "large"), tuning.choice(kernel, 1 << 30, device)
    stop = time.monotonic() + 6
    base = [seconds(c, 10) for c in calls]
    scores = {current: float(len(base))}
    for tile, warps in sorted(CANDIDATES, key=lambda c: abs(c[0] - current.tile)):
        if time.monotonic() > stop:
            print(f"{kernel}: out of time after {len(scores)} choices")
            break
        trial = tuning.Choice(tile, warps, current.programs)
        choices[key] = trial
        scores[trial] = sum(seconds(c, 10) / b for c, b in zip(calls, base, strict=True))
    best = min(scores, key=lambda choice: scores[choice])
    choices[key] = best
    gain = len(base) / scores[best]
    print(f'    ("{kernel}", "large"): {best},  # {gain:.2f} times as fast as {current}', flush=True)
    return {"tuned": {kernel: {"choice": list(best), "times_faster_than_table": round(gain, 3)}}}
