"""Time one training step of a model similar to scVI, with fastvae's loss and with the loss as scvi-tools' users write
it.

    python -m benchmarks.counts_step [--likelihood zinb|nb] [--rounds N]

The batch has 128 cells of 20,000 genes with 95 % zeros. The model has hidden layers of 128, 10 latents, a learned
dispersion for each gene, and Adam. Eager, torch.compile of the loss alone, and fused take turns on the same batch; the
output shows medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastvae

from .cases import _baseline_nb_raw, _baseline_zinb_raw

CELLS, GENES, HIDDEN, LATENT = 128, 20_000, 128, 10
Step = Callable[[], None]


class Model(nn.Module):
    def __init__(self, zero_inflated: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(GENES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT))
        self.hidden = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU())
        self.logits = nn.Linear(HIDDEN, GENES)
        self.zi_logits = nn.Linear(HIDDEN, GENES) if zero_inflated else None
        self.log_theta = nn.Parameter(torch.zeros(GENES))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(torch.log1p(x)).chunk(2, dim=1)

    def decode(self, z: Tensor, library: Tensor) -> tuple[Tensor, ...]:
        """Return (logits, log_theta[, zi_logits], library)."""
        h = self.hidden(z)
        zi_logits = () if self.zi_logits is None else (self.zi_logits(h),)
        return self.logits(h), self.log_theta, *zi_logits, library


def fused_step(model: Model, x: Tensor, library: Tensor) -> Tensor:
    mu, logvar = model.encode(x)
    z, kl = fastvae.functional.reparameterize_kl(mu, logvar)
    variant = (
        "negative_binomial_logits" if model.zi_logits is None else "zero_inflated_negative_binomial_logits"
    )
    mean = fastvae.reference.REDUCTIONS["mean"]
    # The call that ELBO makes, with this model's dispersion.
    return fastvae.functional.loss.nll(variant, model.decode(z, library), x, [], kl, None, mean)[0]


def baseline_step(
    model: Model, x: Tensor, library: Tensor, loss: Callable[..., tuple[Tensor, ...]]
) -> Tensor:
    mu, logvar = model.encode(x)
    z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1)
    return loss(*model.decode(z, library), x, kl)[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counts_step", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--likelihood", choices=("zinb", "nb"), default="zinb")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()

    torch.manual_seed(0)
    present = torch.rand(CELLS, GENES) < 0.05
    x = (1 + torch.poisson(torch.exp(torch.randn(CELLS, GENES)))) * present
    library = x.sum(1)
    baseline = _baseline_zinb_raw if options.likelihood == "zinb" else _baseline_nb_raw
    losses = {
        "fused": lambda model: fused_step(model, x, library),
        "eager": lambda model: baseline_step(model, x, library, baseline),
        "compile": lambda model: baseline_step(model, x, library, compiled),
    }
    compiled = torch.compile(baseline, dynamic=False)
    steps: dict[str, Step] = {}
    for side, loss in losses.items():
        model = Model(options.likelihood == "zinb")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

        def step(
            loss: Callable[[Model], Tensor] = loss,
            model: Model = model,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> None:
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

        steps[side] = step

    seconds: dict[str, list[float]] = {side: [] for side in steps}
    for i in range(options.rounds + 2):
        for side, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 2:
                seconds[side].append(time.perf_counter() - start)
    fused = statistics.median(seconds["fused"])
    for side, times in seconds.items():
        print(f"{side:8} {1e3 * statistics.median(times):8.1f} ms  {statistics.median(times) / fused:5.2f} x")


if __name__ == "__main__":
    main()
