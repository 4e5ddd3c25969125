"""Everything that needs a GPU, in one go and in less than nine minutes: `make gpu`, or `python -m benchmarks.gpu`.

Builds the extension in place (where there is a compiler), runs the GPU tests, tries the block sizes around those of the
tuning table, times every backend that serves this GPU beside eager PyTorch and torch.compile, writes
`benchmarks/results/<gpu>.json` and the picture, and prints a short table last. Needs torch, triton, pytest,
pytest-benchmark, numpy and matplotlib; no network. Where torch sees no GPU it says so, and that is all.

Each step has a share of the time and gives up what does not fit in it; what was left out is said.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]

# Seconds for each step; the sum is below nine minutes.
BUILD, TESTS, TUNING, PASSES, SPEED = 80, 130, 100, 15, 170
TEST_PROCESSES = 8  # compiling is most of what the tests do

Call = Callable[[], object]


def main() -> None:
    if not torch.cuda.is_available():
        print("make gpu: torch sees no GPU here, so there is nothing to do")
        return
    start = time.perf_counter()
    failures = [failed for failed in (build(), test()) if failed]

    # Only now: importing fastvae loads the extension that was built.
    from . import machine, report

    device = machine.settle("cuda", torch.get_num_threads())
    description = machine.describe(device)
    copy = copy_rate(device)
    headline(f"{description['machine']}: a copy moves {copy / 1e9:.0f} GB/s")
    choices = tune(device)
    passes = time_passes(device, copy)
    for name, run in time_backends(device, description):
        run |= {"copy_gb_per_s": round(copy / 1e9), "passes": passes, "tuned": choices}
        path = report._keep(run | {"instruction_set": name})
    runs = report._load(path)
    report.draw(runs, path.with_suffix(".png"))

    headline("results")
    print("\n".join(short_table(runs, passes)))
    for failure in failures:
        print(f"\nFAILED: {failure}")
    print(f"\nwrote {path.relative_to(ROOT)} and its picture; {time.perf_counter() - start:.0f} s in all")
    sys.exit(1 if failures else 0)


def headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Build, test
# ---------------------------------------------------------------------------------------------------------------------


def build() -> str | None:
    """In place, with what is here: without a compiler the package stays pure, and Triton serves the GPU."""
    headline("the extension")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {"FASTVAE_NATIVE": "auto"} | os.environ
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=BUILD
        )
    except subprocess.TimeoutExpired:
        print(f"not built: it takes longer than {BUILD} s")
        return None
    if done.returncode != 0:
        print(f"not built: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    else:
        print("built" if list((ROOT / "fastvae").glob("_C*.so")) else f"not built: {done.stderr.strip()}")
    return None


def test() -> str | None:
    """The tests that run on a GPU: in several processes, because compiling takes most of the time."""
    headline("tests")
    deadline = time.monotonic() + TESTS
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_triton.py"]
    processes = [
        subprocess.Popen(
            [*command, f"--shard={i}/{TEST_PROCESSES}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(TEST_PROCESSES)
    ]
    failed = 0
    for i, process in enumerate(processes):
        try:
            output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            output += f"\n(stopped after {TESTS} s)"
        if process.returncode != 0:
            failed += 1
            print(output[-6000:])
        else:
            print(f"{i}: {output.strip().splitlines()[-1]}")
    return f"{failed} of {TEST_PROCESSES} processes of the GPU tests" if failed else None


# ---------------------------------------------------------------------------------------------------------------------
# Time single passes
# ---------------------------------------------------------------------------------------------------------------------


def seconds(calls: list[Call], rounds: int = 20) -> float:
    """The median of a call on the device. The calls are taken in turns, so that none finds its inputs in the cache."""
    for call in calls:
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    ring = itertools.cycle(calls)
    torch.cuda.synchronize()
    for before, after in events:
        call = next(ring)
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events) / 1e3


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    buffers = [torch.zeros(2, 1 << 30, dtype=torch.uint8, device=device) for _ in range(2)]
    return 2 * (1 << 30) / seconds([lambda b=b: b[0].copy_(b[1]) for b in buffers])


ROWS, SIZE = 8192, 12288


def loss_pass(dtype: torch.dtype, data: torch.dtype, device: torch.device) -> tuple[int, list[Call]]:
    """Forward and gradient of a Bernoulli loss, by Triton: (bytes to move, calls)."""
    from fastvae._triton import nll

    def make() -> Call:
        recon = torch.randn(ROWS, SIZE, device=device, dtype=dtype)
        x = torch.zeros(ROWS, SIZE, device=device, dtype=data)
        kl, beta = torch.zeros(ROWS, device=device), torch.ones((), device=device)
        return lambda: nll.nll_forward("bernoulli", [recon], x, [], kl, beta, nll.MEAN, 1)

    return ROWS * SIZE * (2 * dtype.itemsize + data.itemsize), [make() for _ in range(2)]


def sample_pass(dtype: torch.dtype, device: torch.device, *, backward: bool) -> tuple[int, list[Call]]:
    """Reparameterise + KL, or its backward."""
    from fastvae._triton import latents

    rows, size = ROWS * SIZE // 256, 256

    def make() -> Call:
        mu, logvar = torch.randn(2, rows, size, device=device, dtype=dtype)
        seed = torch.tensor([1, 2], device=device)
        if not backward:
            return lambda: latents.reparameterize_kl_forward(
                mu, logvar, None, None, None, seed, 0, None, None
            )
        by_z, by_kl = torch.randn_like(mu), torch.ones(rows, device=device)
        return lambda: latents.reparameterize_kl_backward(
            by_z, by_kl, mu, logvar, None, None, None, seed, 0, None, latents.MU | latents.LOGVAR
        )

    return rows * size * dtype.itemsize * (5 if backward else 3), [make() for _ in range(2)]


def scale_pass(dtype: torch.dtype, device: torch.device) -> tuple[int, list[Call]]:
    """The backward of a loss whose factor is not 1."""
    from fastvae._triton import nll

    gradients = [torch.zeros(ROWS, SIZE, device=device, dtype=dtype) for _ in range(2)]
    factor = torch.full((), 2.0, device=device)
    calls: list[Call] = [
        lambda g=g: nll.nll_backward_(factor, None, [g], None, None, None, ROWS, nll.MEAN, False, False)
        for g in gradients
    ]
    return 2 * ROWS * SIZE * dtype.itemsize, calls


def passes_of(device: torch.device) -> Iterator[tuple[str, str, Callable[[], tuple[int, list[Call]]]]]:
    """(kernel, name, maker) of everything that must come near to the rate of a copy."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "uint8"}
    for dtype in (torch.float32, torch.bfloat16):
        for data in (dtype, torch.uint8):
            name = f"Bernoulli forward + gradient, {names[dtype]}, {names[data]} data"
            yield "nll", name, lambda dtype=dtype, data=data: loss_pass(dtype, data, device)
        for kernel, backward in (("sample", False), ("sample_gradient", True)):
            name = f"reparameterise + KL {'backward' if backward else 'forward'}, {names[dtype]}"
            yield kernel, name, lambda dtype=dtype, b=backward: sample_pass(dtype, device, backward=b)
        yield "scale", f"scaling a gradient, {names[dtype]}", lambda dtype=dtype: scale_pass(dtype, device)


def time_passes(device: torch.device, copy: float) -> list[dict[str, Any]]:
    headline("single passes, by Triton")
    deadline, results = time.monotonic() + PASSES, []
    for _, name, make in passes_of(device):
        if time.monotonic() > deadline:
            print(f"out of time before: {name}")
            break
        size, calls = make()
        rate = size / seconds(calls)
        results.append({"pass": name, "gb_per_s": round(rate / 1e9), "of_copy": round(rate / copy, 3)})
        print(f"{name:55} {rate / 1e9:6.0f} GB/s  {rate / copy:4.0%} of a copy", flush=True)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Tune
# ---------------------------------------------------------------------------------------------------------------------

# (tile, warps): 8 to 32 elements for each thread.
CANDIDATES = [
    (tile, warps)
    for tile in (1024, 2048, 4096, 8192)
    for warps in (2, 4, 8)
    if 8 <= tile // (32 * warps) <= 32
]


def tune(device: torch.device) -> dict[str, Any]:
    """Tries tiles and warps for large shapes, keeps the best of them for this process and says what to write down.

    The score of a choice is the sum, over the passes of its kernel, of the time relative to what the table has.
    """
    from fastvae._triton import tuning

    headline(f"tuning, {tuning.architecture(device)}")
    deadline = time.monotonic() + TUNING
    passes: dict[str, list[list[Call]]] = {}
    for kernel, name, make in passes_of(device):
        # One pass each of float32 and of bfloat16.
        if "fp32, uint8" not in name and "bf16, bf16" not in name:
            passes.setdefault(kernel, []).append(make()[1])
    own = tuning.TABLE.setdefault(tuning.architecture(device), {})
    found: dict[str, Any] = {}
    for number, (kernel, calls) in enumerate(passes.items()):
        share = time.monotonic() + (deadline - time.monotonic()) / (len(passes) - number)
        key, now = (kernel, "large"), tuning.choice(kernel, 1 << 30, device)
        base = [seconds(c, 10) for c in calls]
        scores = {now: float(len(base))}
        for tile, warps in sorted(CANDIDATES, key=lambda c: abs(c[0] - now.tile)):
            if time.monotonic() > share:
                print(f"{kernel}: out of time after {len(scores)} choices")
                break
            trial = tuning.Choice(tile, warps, now.programs)
            own[key] = trial
            scores[trial] = sum(seconds(c, 10) / b for c, b in zip(calls, base, strict=True))
        best = min(scores, key=lambda choice: scores[choice])
        own[key] = best
        gain = len(base) / scores[best]
        found[kernel] = {"choice": list(best), "times_faster_than_table": round(gain, 3)}
        print(f'    ("{kernel}", "large"): {best},  # {gain:.2f} times as fast as {now}', flush=True)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Every backend beside eager and torch.compile
# ---------------------------------------------------------------------------------------------------------------------


def time_backends(device: torch.device, description: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of the run, run) of each backend with kernels for this GPU; what "auto" takes comes first, as "cuda"."""
    import fastvae
    from fastvae import backend

    from . import machine
    from .cases import GPU_CASES
    from .timing import measure

    default = backend._serve("auto", "cuda")
    names = [n for n in ("native", "triton") if backend._load(n) and backend._has_kernels(n, "cuda")]
    names.sort(key=lambda n: default is None or n != default.name)
    for place, name in enumerate(names):
        headline(f"speed of {name}, beside eager and torch.compile")
        deadline = time.monotonic() + SPEED / len(names)
        neighbours, cases = machine.Neighbours(), []
        with fastvae.use_backend(name):
            for case in GPU_CASES:
                if time.monotonic() > deadline:
                    print(f"out of time before: {case.name}")
                    continue
                result = machine.summarise(measure(case, device, budget=1.5))
                if case.moves < 32 << 20:
                    result |= launch_bound(case, device)
                cases.append(result)
                times = result["median_ms"]
                print(f"{case.name:50} " + "  ".join(f"{k} {v:.3g} ms" for k, v in times.items()), flush=True)
                torch.cuda.empty_cache()
        run = description | {"backend": name, "cores_used_by_others": neighbours.cores(), "cases": cases}
        yield ("cuda" if place == 0 else f"cuda-{name}"), run


def launch_bound(case: Any, device: torch.device) -> dict[str, Any]:
    """Microseconds of host wall time per call with the device never waited for, and of a replay as a CUDA graph."""
    from .timing import _bind

    inputs = case.setup(device)
    sides = {"fused": case.fused(device), "eager": case.written, "compile": torch.compile(case.written)}
    host, replay = {}, {}
    for side, function in sides.items():
        call = _bind(function, inputs)
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        times = []
        for _ in range(200):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        host[side] = round(1e6 * statistics.median(times), 1)
        replay[side] = _replay(call)
    return {"host_us": host, "graph_replay_us": replay}


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


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def short_table(runs: dict[str, dict[str, Any]], passes: list[dict[str, Any]]) -> list[str]:
    from . import report

    lines = []
    for name, run in runs.items():
        if not name.startswith("cuda"):
            continue
        lines += [f"{run['backend']}: forward + backward", f"{'':50}{'x eager':>9}{'x compile':>11}{'ms':>9}"]
        for row in run["cases"]:
            pair = [report.faster(row, side) for side in ("eager", "compile")]
            times = row["median_ms"]["fused"]
            lines.append(f"{row['case']:50}{pair[0]:9.1f}{pair[1]:11.1f}{times:9.3f}")
            if "host_us" in row:
                for label, values in (("host", row["host_us"]), ("graph", row["graph_replay_us"])):
                    told = ", ".join(f"{side} {value}" for side, value in values.items())
                    lines.append(f"    {label}, us: {told}")
        lines.append("")
    lines.append(
        "Triton's passes, of a copy's rate: " + json.dumps({p["pass"]: p["of_copy"] for p in passes})
    )
    return lines


if __name__ == "__main__":
    main()
