"""Plot how far the estimate of total correlation depends on the batch size, for latent dimensions that are independent.

    python -m benchmarks.total_correlation --out total_correlation.png

Every latent dimension is N(0, 1) in the population, and every posterior has the standard deviation 0.3, so the total
correlation of the population is 0. docs/priors.md explains why the estimates are not.
"""

import argparse
import math
from pathlib import Path

import matplotlib
import torch

from fastvae.regularizers import total_correlation

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZE, STD = 4096, 0.3
DIMENSIONS = (2, 5, 10, 20)
BATCHES = (64, 128, 256, 512, 1024, 2048, 4096)
REPEATS = 8


def estimate(dims: int, batch: int) -> float:
    """The mean over `REPEATS` batches."""
    torch.manual_seed(0)
    total = 0.0
    for _ in range(REPEATS):
        mu = math.sqrt(1 - STD**2) * torch.randn(batch, dims)
        z = mu + STD * torch.randn(batch, dims)
        total += total_correlation(z, mu, torch.full_like(mu, 2 * math.log(STD)), SIZE).item()
    return total / REPEATS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("total_correlation.png"))
    options = parser.parse_args()
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for dims in DIMENSIONS:
        values = [estimate(dims, batch) for batch in BATCHES]
        print(f"D = {dims}:", ", ".join(f"{b}: {v:.2f}" for b, v in zip(BATCHES, values, strict=True)))
        axis.plot(BATCHES, values, marker=".", label=f"D = {dims}")
    axis.set_xscale("log", base=2)
    axis.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    axis.set_xlabel(f"batch size, of {SIZE} data")
    axis.set_ylabel("estimate, nats (population: 0)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(options.out, dpi=120)
    plt.close(figure)
    print(options.out)


if __name__ == "__main__":
    main()
