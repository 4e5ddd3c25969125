"""Everything that needs a GPU, in one go and in less than nine minutes: `make gpu`, or `python -m benchmarks.gpu`.

Builds the extension in place (with CUDA kernels for this GPU, where there are compilers), runs the GPU tests, tries the
block sizes around those of Triton's tuning table, times the native kernels and Triton's beside eager PyTorch and
torch.compile, and a whole training step as one CUDA graph, writes `benchmarks/results/<gpu>.json` and the picture, and
prints a short table last, with what was to be reached. Needs torch, triton, pytest, pytest-benchmark, numpy and
matplotlib; no network. Where torch sees no GPU it says so, and that is all.

Each step has a share of the time and gives up what does not fit in it; what was left out is said.
"""

import itertools
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
BUILD, TESTS, TUNING, PASSES, SPEED, STEP = 100, 140, 50, 30, 140, 50
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
    run = description | time_backends(device)
    run |= {"copy_gb_per_s": round(copy / 1e9), "passes": passes, "tuned": choices}
    run["training_step_us"] = time_training_step(device)
    path = report._keep(run)
    report.draw(report._load(path), path.with_suffix(".png"))

    headline("results")
    print("\n".join(short_table(run)))
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
    """In place, with what is here: without a compiler the package stays pure, without nvcc Triton serves the GPU."""
    headline("the extension")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    major, minor = torch.cuda.get_device_capability()
    environment = {"FASTVAE_NATIVE": "auto", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"} | os.environ
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=BUILD
        )
    except subprocess.TimeoutExpired:
        print(f"not built: it takes longer than {BUILD} s")
        return f"the build takes longer than {BUILD} s"
    lines = (done.stderr + done.stdout).strip().splitlines()
    if done.returncode != 0:
        print("not built:\n" + "\n".join(lines[-30:]))
        return "the build"
    print(*(line for line in lines if line.startswith("fastvae:")), sep="\n")
    print(f"done in {time.perf_counter() - start:.0f} s")
    return None


def test() -> str | None:
    """The tests that run on a GPU: in several processes, because compiling takes most of the time."""
    headline("tests")
    deadline = time.monotonic() + TESTS
    files = [
        f"tests/{name}.py"
        for name in ("backends/triton/test_triton", "backends/cuda/test_cuda", "core/test_graphs")
    ]
    command = [sys.executable, "-m", "pytest", "--tests", "all", "-q", "-p", "no:cacheprovider", *files]
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
    return interleaved({"": calls}, rounds)[""]


def interleaved(sides: dict[str, list[Call]], rounds: int = 20) -> dict[str, float]:
    """The medians of several sides, one call of each after the other."""
    for calls in sides.values():
        for call in calls:
            call()
    rings = {side: itertools.cycle(calls) for side, calls in sides.items()}
    events = {
        side: [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for side in sides
    }
    torch.cuda.synchronize()
    for i in range(rounds):
        for side, ring in rings.items():
            call = next(ring)
            before, after = events[side][i]
            before.record()
            call()
            after.record()
    torch.cuda.synchronize()
    return {
        side: statistics.median(before.elapsed_time(after) for before, after in pairs) / 1e3
        for side, pairs in events.items()
    }


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    buffers = [torch.zeros(2, 1 << 30, dtype=torch.uint8, device=device) for _ in range(2)]
    return 2 * (1 << 30) / seconds([lambda b=b: b[0].copy_(b[1]) for b in buffers])


ROWS, SIZE = 8192, 12288
MEAN = 2  # of csrc/ops/common.h


# What a pass returns: the bytes to move, and calls of the op by each namespace of ops that is asked for.
Pass = tuple[int, dict[str, list[Call]]]


def calls_of(namespaces: list[str], sets: list[Callable[[Any], object]]) -> dict[str, list[Call]]:
    """`sets`: functions of a namespace of ops, one for each set of inputs."""
    ops = {name: getattr(torch.ops, backend_namespace(name)) for name in namespaces}
    return {name: [lambda run=run, o=o: run(o) for run in sets] for name, o in ops.items()}


def backend_namespace(name: str) -> str:
    from fastvae.backends import available

    return available.NAMESPACES[name]


def loss_pass(namespaces: list[str], dtype: torch.dtype, data: torch.dtype, device: torch.device) -> Pass:
    """Forward and gradient of a Bernoulli loss."""

    def make() -> Callable[[Any], object]:
        recon = torch.randn(ROWS, SIZE, device=device, dtype=dtype)
        x = torch.zeros(ROWS, SIZE, device=device, dtype=data)
        kl, beta = torch.zeros(ROWS, device=device), torch.ones((), device=device)
        return lambda ops: ops.nll_forward.default("bernoulli", [recon], x, [], kl, beta, MEAN, 1)

    return ROWS * SIZE * (2 * dtype.itemsize + data.itemsize), calls_of(
        namespaces, [make() for _ in range(2)]
    )


def sample_pass(namespaces: list[str], dtype: torch.dtype, device: torch.device, *, backward: bool) -> Pass:
    """Reparameterise + KL, or its backward."""
    rows, size = ROWS * SIZE // 256, 256

    def make() -> Callable[[Any], object]:
        mu, logvar = torch.randn(2, rows, size, device=device, dtype=dtype)
        seed = torch.tensor([1, 2], device=device)
        if not backward:
            return lambda ops: ops.reparameterize_kl_forward.default(
                mu, logvar, None, None, None, seed, 0, None, None
            )
        by_z, by_kl = torch.randn_like(mu), torch.ones(rows, device=device)
        return lambda ops: ops.reparameterize_kl_backward.default(
            by_z, by_kl, mu, logvar, None, None, None, seed, 0, None, 0b11
        )

    size_in_bytes = rows * size * dtype.itemsize * (5 if backward else 3)
    return size_in_bytes, calls_of(namespaces, [make() for _ in range(2)])


def scale_pass(namespaces: list[str], dtype: torch.dtype, device: torch.device) -> Pass:
    """The backward of a loss whose factor is not 1."""
    factor = torch.full((), 2.0, device=device)

    def make() -> Callable[[Any], object]:
        gradient = torch.zeros(ROWS, SIZE, device=device, dtype=dtype)
        return lambda ops: ops.nll_backward_.default(
            factor, None, [gradient], None, None, None, ROWS, MEAN, False, False
        )

    return 2 * ROWS * SIZE * dtype.itemsize, calls_of(namespaces, [make() for _ in range(2)])


def passes_of(namespaces: list[str], device: torch.device) -> Iterator[tuple[str, str, Callable[[], Pass]]]:
    """(kernel, name, maker) of everything that must come near to the rate of a copy."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "uint8"}
    for dtype in (torch.float32, torch.bfloat16):
        for data in (dtype, torch.uint8):
            name = f"Bernoulli forward + gradient, {names[dtype]}, {names[data]} data"
            yield "nll", name, lambda dtype=dtype, data=data: loss_pass(namespaces, dtype, data, device)
        for kernel, backward in (("sample", False), ("sample_gradient", True)):
            name = f"reparameterise + KL {'backward' if backward else 'forward'}, {names[dtype]}"
            yield (
                kernel,
                name,
                lambda dtype=dtype, b=backward: sample_pass(namespaces, dtype, device, backward=b),
            )
        name = f"scaling a gradient, {names[dtype]}"
        yield "scale", name, lambda dtype=dtype: scale_pass(namespaces, dtype, device)


def served_by() -> list[str]:
    """The backends with kernels for this GPU; what "auto" takes comes first."""
    import fastvae  # noqa: F401
    from fastvae.backends import available, serve

    default = serve("auto", "cuda")
    names = [n for n in ("native", "triton") if available.load(n) and available.serves(n, "cuda")]
    return sorted(names, key=lambda n: default is None or n != default.name)


def time_passes(device: torch.device, copy: float) -> list[dict[str, Any]]:
    names = served_by()
    headline(f"single passes: {', '.join(names)}")
    deadline, results = time.monotonic() + PASSES, []
    for _, name, make in passes_of(names, device):
        if time.monotonic() > deadline:
            print(f"out of time before: {name}")
            break
        size, calls = make()
        rates = {side: size / time for side, time in interleaved(calls).items()}
        results.append(
            {
                "pass": name,
                "gb_per_s": {side: round(rate / 1e9) for side, rate in rates.items()},
                "of_copy": {side: round(rate / copy, 3) for side, rate in rates.items()},
            }
        )
        told = "  ".join(f"{side} {rate / 1e9:5.0f} GB/s {rate / copy:4.0%}" for side, rate in rates.items())
        print(f"{name:52} {told}", flush=True)
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
    if "triton" not in served_by():
        return {}
    from fastvae._triton import tuning

    headline(f"tuning Triton, {tuning.architecture(device)}")
    deadline = time.monotonic() + TUNING
    passes: dict[str, list[list[Call]]] = {}
    for kernel, name, make in passes_of(["triton"], device):
        # One pass each of float32 and of bfloat16.
        if "fp32, uint8" not in name and "bf16, bf16" not in name:
            passes.setdefault(kernel, []).append(make()[1]["triton"])
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
# The loss, beside eager and torch.compile
# ---------------------------------------------------------------------------------------------------------------------


def time_backends(device: torch.device) -> dict[str, Any]:
    """What "auto" takes is "fused"; another backend that serves this GPU runs beside it under its own name."""
    from . import machine
    from .cases import GPU_CASES
    from .timing import measure

    names = served_by()
    if not names:
        sys.exit("FAILED: no backend has kernels for this GPU; see above, and `fastvae doctor`")
    headline(f"speed of {' and '.join(names)}, beside eager and torch.compile")
    deadline, neighbours, cases = time.monotonic() + SPEED, machine.Neighbours(), []
    for case in GPU_CASES:
        if time.monotonic() > deadline:
            print(f"out of time before: {case.name}")
            continue
        result = machine.summarise(measure(case, device, budget=2.0, rivals=names[1:]))
        if case.moves < 32 << 20:
            result |= launch_bound(case, device, names[1:])
        cases.append(result)
        times = result["median_ms"]
        print(f"{case.name:50} " + "  ".join(f"{k} {v:.3g} ms" for k, v in times.items()), flush=True)
        torch.cuda.empty_cache()
    return {"backend": names[0], "cores_used_by_others": neighbours.cores(), "cases": cases}


def launch_bound(case: Any, device: torch.device, rivals: list[str]) -> dict[str, Any]:
    """Microseconds of host wall time per call with the device never waited for, and of a replay as a CUDA graph."""
    from .timing import _backend_of, _bind

    inputs = case.setup(device)
    sides = {"fused": case.fused(device), "eager": case.written, "compile": torch.compile(case.written)}
    sides |= {rival: case.fused(device) for rival in rivals}
    calls = {side: _bind(function, inputs) for side, function in sides.items()}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(11):  # the first is a warm-up
        for side, call in calls.items():
            with _backend_of(side, rivals):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(20):
                    call()
                times[side].append((time.perf_counter() - start) / 20)
    host = {side: round(1e6 * statistics.median(t[1:]), 1) for side, t in times.items()}
    replay = {}
    for side, call in calls.items():
        with _backend_of(side, rivals):
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
# A whole training step
# ---------------------------------------------------------------------------------------------------------------------


class Vae(torch.nn.Module):
    """The fully connected VAE of the tutorials: 784-400-20-400-784."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.posterior = torch.nn.Linear(784, 400), torch.nn.Linear(400, 40)
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(20, 400), torch.nn.ReLU(), torch.nn.Linear(400, 784)
        )

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.posterior(self.hidden(x).relu()).chunk(2, 1)


def training_steps(device: torch.device) -> dict[str, Callable[[torch.Tensor], object]]:
    """The step as users write it, eager, compiled and captured, and with fastvae's loss, eager and captured."""
    import fastvae

    from .cases import _written_step

    elbo = fastvae.ELBO("bernoulli").to(device)

    def step(fused: bool, capturable: bool, compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        torch.manual_seed(0)
        model = Vae().to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=capturable)

        def loss_of(x: torch.Tensor) -> torch.Tensor:
            mu, logvar = model.encode(x)
            if fused:
                z, kl = elbo.reparameterize(mu, logvar)
                return elbo(model.decoder(z), x, kl=kl).loss
            z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
            return _written_step(mu, logvar, model.decoder(z), x)[0]

        if compiled:
            loss_of = torch.compile(loss_of, mode="reduce-overhead")

        def train_step(x: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(x)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return train_step

    example = torch.rand(128, 784, device=device)
    return {
        "graph_step(fused)": fastvae.graph_step(step(True, True, False), example),
        "fused": step(True, False, False),
        "eager": step(False, False, False),
        "graph_step(eager)": fastvae.graph_step(step(False, True, False), example),
        "compile": step(False, False, True),
    }


def time_training_step(device: torch.device) -> dict[str, float]:
    """Microseconds of wall time per step: 50 steps at a time, the device waited for at the end."""
    headline("a training step: 784-400-20-400-784, batch 128, fused Adam")
    deadline = time.monotonic() + STEP
    batches = [torch.rand(128, 784, device=device) for _ in range(8)]
    steps = training_steps(device)
    times: dict[str, list[float]] = {side: [] for side in steps}

    def block(side: str) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(50):
            loss = steps[side](batches[i % len(batches)])
        torch.cuda.synchronize()
        assert torch.isfinite(loss).item(), f"{side}: the loss is {loss}"
        return (time.perf_counter() - start) / 50

    for side in list(times):
        try:
            block(side)  # compiles, captures
        except Exception as error:
            print(f"FAILED: {side}: {error}")
            del times[side]
    for _ in range(20):
        for side, own in times.items():
            own.append(block(side))
        if time.monotonic() > deadline:
            break
    result = {side: round(1e6 * statistics.median(t), 1) for side, t in times.items()}
    print("\n".join(f"{side:26} {value:8.1f} us" for side, value in result.items()))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def short_table(run: dict[str, Any]) -> list[str]:
    from . import report

    lines = [f"{run['backend']}: forward + backward"]
    lines += [f"{'':50}{'x eager':>9}{'x compile':>11}{'x triton':>10}{'ms':>9}"]
    for row in run["cases"]:
        ratios = [report.faster(row, side) for side in ("eager", "compile")]
        rival = f"{report.faster(row, 'triton'):10.2f}" if "triton" in row["median_ms"] else f"{'':10}"
        lines.append(
            f"{row['case']:50}{ratios[0]:9.1f}{ratios[1]:11.1f}{rival}{row['median_ms']['fused']:9.3f}"
        )
        if "host_us" in row:
            for label, values in (("host", row["host_us"]), ("graph", row["graph_replay_us"])):
                told = ", ".join(f"{side} {value}" for side, value in values.items())
                lines.append(f"    {label}, us: {told}")
    lines += ["", "passes, of a copy's rate"]
    for item in run["passes"]:
        told = ", ".join(f"{side} {share:.1%}" for side, share in item["of_copy"].items())
        lines.append(f"    {item['pass']:52} {told}")
    lines += ["", "a training step, us: " + ", ".join(f"{k} {v}" for k, v in run["training_step_us"].items())]
    return [*lines, "", *(f"{'ok ' if met else 'NOT'} {text}" for met, text in floors(run))]


def floors(run: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """(reached, what): what the kernels of this GPU are meant to reach."""
    from . import report

    for row in run["cases"]:
        if "host_us" in row and row["case"].startswith("ELBO step"):
            for side, floor in (("eager", 3), ("compile", 2)):
                ratio = row["host_us"][side] / row["host_us"]["fused"]
                yield (
                    ratio >= floor,
                    f"host time of the loss, launch-bound: {ratio:.1f} x {side} (at least {floor})",
                )
        if "triton" in row["median_ms"] and "host_us" not in row:
            ratio = 1 / report.faster(row, "triton")
            yield ratio <= 1.03, f"{row['case']}: {ratio:.3f} of Triton's time (at most 1.03)"
    step = run["training_step_us"]
    for side, floor in (("eager", 5), ("compile", 1.5)):
        ratio = step.get(side, 0.0) / step.get("graph_step(fused)", float("inf"))
        yield ratio >= floor, f"training step through graph_step: {ratio:.1f} x {side} (at least {floor})"
    for item in run["passes"]:
        share = item["of_copy"][run["backend"]]
        yield share >= 0.92, f"{item['pass']}: {share:.1%} of a copy's rate (at least 92%)"
        if "triton" in item["gb_per_s"] and run["backend"] != "triton":
            ratio = item["gb_per_s"]["triton"] / item["gb_per_s"][run["backend"]]
            yield ratio <= 1.03, f"{item['pass']}: {ratio:.3f} of Triton's time (at most 1.03)"


if __name__ == "__main__":
    main()
