"""Single passes over memory, compared with the rate of a copy: how close the kernels come to the memory's bandwidth."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import clock
from .clock import Call, interleaved, seconds
from .plan import REHEARSAL
from .stage import Item, Results

ROWS, SIZE = (16, 96) if REHEARSAL else (8192, 12288)
COPY_BYTES = 1 << 16 if REHEARSAL else 1 << 30
MEAN = 2  # as in csrc/ops/common.h


def items() -> Iterator[Item]:
    device = clock.configure()
    names = serving_backends()
    measured: dict[str, float] = {}

    def copy() -> Results:
        measured["copy"] = copy_rate(device)
        print(f"a copy moves {measured['copy'] / 1e9:.0f} GB/s", flush=True)
        return {"copy_gb_per_s": round(measured["copy"] / 1e9, 1), "backend": names[0]}

    def time_pass(name: str, make: Callable[[], "Pass"]) -> Results:
        size, calls = make()
        rates = {side: size / time for side, time in interleaved(calls).items()}
        text = "  ".join(
            f"{side} {r / 1e9:5.0f} GB/s {r / measured['copy']:4.0%}" for side, r in rates.items()
        )
        print(f"{name:52} {text}", flush=True)
        result = {
            "pass": name,
            "gb_per_s": {side: round(rate / 1e9, 1) for side, rate in rates.items()},
            "of_copy": {side: round(rate / measured["copy"], 3) for side, rate in rates.items()},
        }
        return {"passes": [result]}

    yield "machine", describe
    yield "copy", copy
    for _, name, make in passes_of(names, device):
        yield name, lambda name=name, make=make: time_pass(name, make)


def describe() -> Results:
    from .. import machine

    return machine.describe(clock.device())


def serving_backends() -> list[str]:
    """The backends with kernels for the device; the one that "auto" uses comes first."""
    import fastvae  # noqa: F401
    from fastvae.backends import available, serve

    kind = clock.device().type
    default = serve("auto", kind)
    names = [n for n in ("native", "triton") if available.load(n) and available.serves(n, kind)]
    if not names:
        raise RuntimeError("no backend has kernels for this GPU; see `fastvae doctor`")
    return sorted(names, key=lambda n: default is None or n != default.name)


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy. It copies random numbers, because zeros can be faster."""
    buffers = [torch.randint(0, 256, (2, COPY_BYTES), dtype=torch.uint8, device=device) for _ in range(2)]
    return 2 * COPY_BYTES / seconds([lambda b=b: b[0].copy_(b[1]) for b in buffers])


# The number of bytes that a pass moves, and its calls for each requested namespace of ops.
Pass = tuple[int, dict[str, list[Call]]]


def calls_of(namespaces: list[str], sets: list[Callable[[Any], object]]) -> dict[str, list[Call]]:
    """Create the calls from `sets`, functions of a namespace of ops, one for each set of inputs."""
    from fastvae.backends import available

    ops = {name: getattr(torch.ops, available.NAMESPACES[name]) for name in namespaces}
    return {name: [lambda run=run, o=o: run(o) for run in sets] for name, o in ops.items()}


def loss_pass(
    namespaces: list[str], likelihood: str, dtype: torch.dtype, data: torch.dtype, device: torch.device
) -> Pass:
    """Forward and gradient of the loss of a Bernoulli or a Gaussian."""
    constants = [1.0] if likelihood == "gaussian" else []

    def make() -> Callable[[Any], object]:
        recon = torch.randn(ROWS, SIZE, device=device, dtype=dtype)
        x = torch.randint(0, 256, (ROWS, SIZE), device=device, dtype=torch.uint8)
        if data != torch.uint8:
            x = (x / 255).to(data)
        kl, beta = torch.rand(ROWS, device=device), torch.ones((), device=device)
        return lambda ops: ops.nll_forward.default(likelihood, [recon], x, constants, kl, beta, MEAN, 1)

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
                mu, logvar, None, None, "logvar", [], None, False, None, seed, 0, None, None
            )
        z_gradient, kl_gradient = torch.randn_like(mu), torch.ones(rows, device=device)
        return lambda ops: ops.reparameterize_kl_backward.default(
            z_gradient, kl_gradient, mu, logvar, None, None, "logvar", [], None, None, seed, 0, None, 0b11
        )

    size_in_bytes = rows * size * dtype.itemsize * (5 if backward else 3)
    return size_in_bytes, calls_of(namespaces, [make() for _ in range(2)])


def scale_pass(namespaces: list[str], dtype: torch.dtype, device: torch.device) -> Pass:
    """The backward of a loss whose factor is not 1. It is -1, so that repeated scaling does not overflow."""
    factor = torch.full((), -1.0, device=device)

    def make() -> Callable[[Any], object]:
        gradient = torch.randn(ROWS, SIZE, device=device, dtype=dtype)
        return lambda ops: ops.nll_backward_.default(
            factor, None, [gradient], None, None, None, ROWS, MEAN, False, False
        )

    return 2 * ROWS * SIZE * dtype.itemsize, calls_of(namespaces, [make() for _ in range(2)])


def passes_of(namespaces: list[str], device: torch.device) -> Iterator[tuple[str, str, Callable[[], Pass]]]:
    """Yield (kernel, name, maker) for every pass that must come close to the rate of a copy."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "uint8"}
    for dtype in (torch.float32, torch.bfloat16):
        for likelihood, data in (("bernoulli", dtype), ("bernoulli", torch.uint8), ("gaussian", dtype)):
            name = f"{likelihood.capitalize()} forward + gradient, {names[dtype]}, {names[data]} data"
            yield (
                "nll",
                name,
                lambda likelihood=likelihood, dtype=dtype, data=data: loss_pass(
                    namespaces, likelihood, dtype, data, device
                ),
            )
        for kernel, backward in (("sample", False), ("sample_gradient", True)):
            name = f"reparameterise + KL {'backward' if backward else 'forward'}, {names[dtype]}"
            yield (
                kernel,
                name,
                lambda dtype=dtype, b=backward: sample_pass(namespaces, dtype, device, backward=b),
            )
        name = f"scaling a gradient, {names[dtype]}"
        yield "scale", name, lambda dtype=dtype: scale_pass(namespaces, dtype, device)
