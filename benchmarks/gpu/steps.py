"""Whole training steps: as users write them, eager and compiled, and with fastvae's loss, eager and captured.

Each side has the same model, from the same seed, and its own fused Adam. One side is compiled; if launches dominate, it
is compiled to reduce them.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from . import clock
from .plan import REHEARSAL
from .stage import Item, Results

Batch = tuple[Tensor, ...]
Loss = Callable[..., Tensor]
STEPS, BLOCKS = (1, 1) if REHEARSAL else (30, 12)  # steps in a block, and the maximum number of blocks
MAX_SECONDS = 6.0  # for a model, in addition to its compilation


class Mlp(nn.Module):
    """The fully connected VAE of tutorials: 784-400-20-400-784."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 40))
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(x).chunk(2, 1)


WIDTH = 8 if REHEARSAL else 32


class Conv(nn.Module):
    """32 x 32 colour images, with a mixture of 10 discretised logistics for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, WIDTH, 2 * WIDTH, 4 * WIDTH)
        down = [(nn.Conv2d(a, b, 4, 2, 1), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
        self.encoder = nn.Sequential(
            *(m for pair in down for m in pair), nn.Flatten(), nn.Linear(64 * WIDTH, 128)
        )
        ups = (4 * WIDTH, 2 * WIDTH, WIDTH, WIDTH)
        up = [(nn.ConvTranspose2d(a, b, 4, 2, 1), nn.ReLU()) for a, b in itertools.pairwise(ups)]
        self.decoder = nn.Sequential(
            nn.Linear(64, 64 * WIDTH),
            nn.Unflatten(1, (4 * WIDTH, 4, 4)),
            *(m for pair in up for m in pair),
            nn.Conv2d(WIDTH, 100, 1),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(x.float() / 127.5 - 1).chunk(2, 1)


def sample_and_kld(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """(z, sum of the KL) as users write them; the decoder uses the same z."""
    z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
    return z, -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def mlp(device: torch.device) -> tuple[Callable[[], nn.Module], dict[str, Loss], list[Batch]]:
    import fastvae

    elbo = fastvae.ELBO("bernoulli").to(device)

    def fused(model: Mlp, x: Tensor) -> Tensor:
        z, kl = elbo.reparameterize(*model.encode(x))
        return elbo(model.decoder(z), x, kl=kl).loss

    def baseline(model: Mlp, x: Tensor) -> Tensor:
        z, kld = sample_and_kld(*model.encode(x))
        bce = nn.functional.binary_cross_entropy_with_logits(model.decoder(z), x, reduction="sum")
        return (bce + kld) / x.shape[0]

    batches = [(torch.rand(128, 784, device=device),) for _ in range(8)]
    return Mlp, {"fused": fused, "eager": baseline}, batches


def dmol(device: torch.device) -> tuple[Callable[[], nn.Module], dict[str, Loss], list[Batch]]:
    import fastvae

    from ..cases import _baseline_mixture

    elbo = fastvae.ELBO(fastvae.likelihoods.DiscretizedLogisticMixture(10)).to(device)

    def fused(model: Conv, x: Tensor) -> Tensor:
        z, kl = elbo.reparameterize(*model.encode(x))
        return elbo(model.decoder(z), x, kl=kl).loss

    def baseline(model: Conv, x: Tensor) -> Tensor:
        z, kld = sample_and_kld(*model.encode(x))
        return _baseline_mixture(model.decoder(z), x, kld)[0]

    shape = (4 if REHEARSAL else 128, 3, 32, 32)
    batches = [(torch.randint(0, 256, shape, device=device, dtype=torch.uint8),) for _ in range(4)]
    return Conv, {"fused": fused, "eager": baseline}, batches


def zinb(device: torch.device) -> tuple[Callable[[], nn.Module], dict[str, Loss], list[Batch]]:
    """The hand-written model of counts_step.py."""
    from .. import counts_step
    from ..cases import _baseline_zinb_raw

    def baseline(model: counts_step.Model, x: Tensor, library: Tensor) -> Tensor:
        return counts_step.baseline_step(model, x, library, _baseline_zinb_raw)

    cells, genes = 8 if REHEARSAL else counts_step.CELLS, counts_step.GENES
    batches = []
    for _ in range(2 if REHEARSAL else 4):
        present = torch.rand(cells, genes, device=device) < 0.05
        x = (1 + torch.poisson(torch.exp(torch.randn(cells, genes, device=device)))) * present
        batches.append((x, x.sum(1)))
    return lambda: counts_step.Model(True), {"fused": counts_step.fused_step, "eager": baseline}, batches


MODELS = {
    "MLP 784-400-20-400-784, Bernoulli, batch 128": (mlp, "reduce-overhead"),
    "hand-written ZINB, 128 x 20000": (zinb, "default"),
    "convolutions, 10 mixed logistics, 128 x 3 x 32 x 32": (dmol, "default"),
}


def items() -> Iterator[Item]:
    device = clock.configure()
    for name, (make, mode) in MODELS.items():
        yield name, lambda name=name, make=make, mode=mode: time_steps(name, make, mode, device)


def step_of(
    make: Callable[[], nn.Module], loss: Loss, device: torch.device, mode: str | None, capturable: bool
) -> Callable[[Batch], Tensor]:
    torch.manual_seed(0)
    model = make().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=capturable)

    def loss_of(*batch: Tensor) -> Tensor:
        return loss(model, *batch)

    if mode is not None:
        loss_of = torch.compile(loss_of, **({"backend": "eager"} if REHEARSAL else {"mode": mode}))

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def time_steps(name: str, make: Callable[..., tuple], mode: str, device: torch.device) -> Results:
    """The wall time per step in microseconds. The device is waited for after each block of steps."""
    import fastvae

    model, losses, batches = make(device)
    on_gpu = device.type == "cuda"

    def capture(loss: Loss) -> Callable[[Batch], Tensor]:
        return fastvae.graph_step(step_of(model, loss, device, None, on_gpu), batches[0])

    sides: dict[str, Callable[[], Callable[[Batch], Tensor]]] = {
        "fused": lambda: step_of(model, losses["fused"], device, None, False),
        "eager": lambda: step_of(model, losses["eager"], device, None, False),
        "graph_step(fused)": lambda: capture(losses["fused"]),
        "graph_step(eager)": lambda: capture(losses["eager"]),
        "compile": lambda: step_of(model, losses["eager"], device, mode, False),
        "compile(fused)": lambda: step_of(model, losses["fused"], device, mode, False),
    }
    steps: dict[str, Callable[[Batch], Tensor]] = {}
    times: dict[str, list[float]] = {}
    failures: list[str] = []

    def time_block(side: str) -> float:
        clock.synchronize()
        start = time.perf_counter()
        for i in range(STEPS):
            loss = steps[side](batches[i % len(batches)])
        clock.synchronize()
        seconds = (time.perf_counter() - start) / STEPS
        if not torch.isfinite(loss).item():
            raise RuntimeError(f"the loss is {loss.item()}")
        return seconds

    for side, make_step in sides.items():
        try:
            steps[side] = make_step()
            time_block(side)  # compiles and captures
            times[side] = []
        except Exception as error:
            first_line = str(error).partition("\n")[0]
            print(f"FAILED: {name}, {side}: {error}", flush=True)
            failures.append(f"{name}, {side}: {first_line}")
    stop = time.monotonic() + MAX_SECONDS
    for _ in range(BLOCKS):
        for side, side_times in times.items():
            side_times.append(time_block(side))
        if time.monotonic() > stop:
            break
    result = {side: round(1e6 * statistics.median(t), 1) for side, t in times.items()}
    print(f"{name}: " + ", ".join(f"{side} {value} us" for side, value in result.items()), flush=True)
    return {"steps": [{"step": name, "compiled": mode, "us": result}], "failures": failures}
