"""One training step of an scVI-like model, fused loss against the same loss as scvi-tools' users write it.

    python -m benchmarks.counts_step [--likelihood zinb|nb] [--rounds N]

128 cells of 20,000 genes, 95 % zeros; hidden layers of 128, 10 latents, learned dispersion of each gene, Adam. Eager,
torch.compile of the loss alone, and fused take turns on the same batch; what is printed are medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastvae

from .cases import _written_nb_raw, _written_zinb_raw

CELLS, GENES, HIDDEN, LATENT = 128, 20_000, 128, 10
Step = Callable[[], None]


class Model(nn.Module):
    def __init__(self, inflated: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(GENES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT))
        self.hidden = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU())
        self.logits = nn.Linear(HIDDEN, GENES)
        self.zi_logits = nn.Linear(HIDDEN, GENES) if inflated else None
        self.log_theta = nn.Parameter(torch.zeros(GENES))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(torch.log1p(x)).chunk(2, dim=1)

    def decode(self, z: Tensor, library: Tensor) -> tuple[Tensor, ...]:
        """(logits, log_theta[, zi_logits], library)"""
        h = self.hidden(z)
        more = () if self.zi_logits is None else (self.zi_logits(h),)
        return self.logits(h), self.log_theta, *more, library


def fused_step(model: Model, x: Tensor, library: Tensor) -> Tensor:
    mu, logvar = model.encode(x)
    z, kl = fastvae.functional.reparameterize_kl(mu, logvar)
    row = "negative_binomial_logits" if model.zi_logits is None else "zero_inflated_negative_binomial_logits"
    mean = fastvae.reference.REDUCTIONS["mean"]
    # What ELBO calls, with the dispersion of this model.
    return fastvae.functional.loss.nll(row, model.decode(z, library), x, [], kl, None, mean)[0]


def written_step(model: Model, x: Tensor, library: Tensor, loss: Callable[..., tuple[Tensor, ...]]) -> Tensor:
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
    written = _written_zinb_raw if options.likelihood == "zinb" else _written_nb_raw
    losses = {
        "fused": lambda model: fused_step(model, x, library),
        "eager": lambda model: written_step(model, x, library, written),
        "compile": lambda model: written_step(model, x, library, compiled),
    }
    compiled = torch.compile(written, dynamic=False)
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
