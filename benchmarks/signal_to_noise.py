"""Plot the bound of K draws and the noise of its gradient, for a model whose evidence is known.

    python -m benchmarks.signal_to_noise --out signal_to_noise.png

z ~ N(0, 1) and x ~ N(1.3 z, 1) in one dimension, and a posterior near the true one. The signal-to-noise ratio is
|mean| / std of the gradient with respect to the posterior's mean, over independent estimates.
"""

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import fastvae

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SLOPE, MU, LOGVAR = 1.3, 0.4, -0.6  # the true posterior of x = 1 has mean 0.48 and log-variance -0.99
DRAWS = (1, 2, 4, 8, 16, 32, 64)
ESTIMATES, ROUNDS = 100_000, 10
ESTIMATORS = {"iwae": "C3", "dreg": "C0"}


def estimates(estimator: str, draws: int) -> tuple[float, float]:
    """The mean bound, and the signal-to-noise ratio of the gradient."""
    torch.manual_seed(0)
    iwae = fastvae.IWAE(fastvae.likelihoods.Gaussian(), draws, estimator, reduction="sum")
    bounds: list[Tensor] = []
    gradients: list[Tensor] = []
    for _ in range(ROUNDS):
        mu = torch.full((ESTIMATES, 1), MU, dtype=torch.float64, requires_grad=True)
        out = iwae(
            lambda z: SLOPE * z, torch.ones_like(mu.detach()), mu, torch.full_like(mu.detach(), LOGVAR)
        )
        gradients.append(torch.autograd.grad(out.loss, mu)[0])
        bounds.append(out.bound.detach())
    gradient = torch.cat(gradients)
    return torch.cat(bounds).mean().item(), (gradient.mean().abs() / gradient.std()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("signal_to_noise.png"))
    options = parser.parse_args()
    evidence = torch.distributions.Normal(0.0, math.sqrt(SLOPE**2 + 1)).log_prob(torch.ones(())).item()

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for estimator, color in ESTIMATORS.items():
        bounds, ratios = zip(*(estimates(estimator, draws) for draws in DRAWS), strict=True)
        print(f"{estimator}:", ", ".join(f"{k}: {r:.3f}" for k, r in zip(DRAWS, ratios, strict=True)))
        right.plot(DRAWS, ratios, marker=".", color=color, label=f'estimator="{estimator}"')
        exponent = 0.5 if estimator == "dreg" else -0.5
        line = [ratios[-1] * (draws / DRAWS[-1]) ** exponent for draws in DRAWS]
        right.plot(DRAWS, line, ":", color=color, label=f"$K^{{{'' if exponent > 0 else '-'}1/2}}$")
        if estimator == "iwae":
            left.plot(DRAWS, bounds, marker=".", color="C2", label="bound of K draws")
            left.axhline(bounds[0], ls="--", color="0.5", label="ELBO")
    left.axhline(evidence, color="k", lw=1, label="log p(x)")
    left.set_ylabel("nats")
    right.set_yscale("log")
    right.set_ylabel("signal-to-noise ratio\nof the encoder's gradient")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(DRAWS, [str(draws) for draws in DRAWS])
        axis.set_xlabel("draws K")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(options.out, dpi=120)
    plt.close(figure)
    print(options.out)


if __name__ == "__main__":
    main()
