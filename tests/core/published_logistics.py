"""The likelihood of PixelCNN++, step by step as published, in float64, and the stored values that it gave.

`python published_logistics.py` writes published_logistics.json: random and difficult inputs, the negative
log-likelihood of each row, and the gradient of their sum. test_discretized.py compares every backend with them.

The steps are those of Salimans et al. 2017, section 2 and the appendix on its code: the logarithm of a difference of
two sigmoids if it exceeds 1e-5, and otherwise the logarithm of the density in the middle of the bin.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

STORED = Path(__file__).with_suffix(".json")


def log_probabilities(x: Tensor, means: Tensor, log_scales: Tensor, levels: int = 255) -> Tensor:
    """The log-probability of x in [-1, 1], elementwise."""
    log_scales = torch.clamp(log_scales, min=-7.0)
    centered = x - means
    inv_stdv = torch.exp(-log_scales)
    plus_in, min_in, mid_in = (inv_stdv * (centered + half) for half in (1 / levels, -1 / levels, 0.0))
    cdf_delta = torch.sigmoid(plus_in) - torch.sigmoid(min_in)
    log_cdf_plus = plus_in - F.softplus(plus_in, threshold=60)
    log_one_minus_cdf_min = -F.softplus(min_in, threshold=60)
    log_pdf_mid = mid_in - log_scales - 2 * F.softplus(mid_in, threshold=60)
    inside = torch.where(
        cdf_delta > 1e-5,
        torch.log(torch.clamp(cdf_delta, min=1e-12)),
        log_pdf_mid - torch.log(torch.tensor(levels / 2, dtype=x.dtype)),
    )
    return torch.where(x < -0.999, log_cdf_plus, torch.where(x > 0.999, log_one_minus_cdf_min, inside))


def logistic(params: Tensor, target: Tensor) -> Tensor:
    """The nll (B,) for params (B, 2C, P) and levels (B, C, P)."""
    means, log_scales = params.chunk(2, dim=1)
    return -log_probabilities(target.to(params.dtype) / 127.5 - 1, means, log_scales).sum((1, 2))


def mixture(params: Tensor, target: Tensor, nr_mix: int) -> Tensor:
    """The nll (B,) for params (B, 10 K, P) or (B, 3 K, P) and levels (B, C, P)."""
    batch, channels, pixels = target.shape
    logits, rest = params[:, :nr_mix], params[:, nr_mix:].reshape(batch, channels, -1, pixels)
    means, log_scales = rest[:, :, :nr_mix], rest[:, :, nr_mix : 2 * nr_mix]
    x = (target.to(params.dtype) / 127.5 - 1).unsqueeze(2).expand_as(means)
    if channels == 3:
        coeffs = torch.tanh(rest[:, :, 2 * nr_mix :])
        m2 = means[:, 1] + coeffs[:, 0] * x[:, 0]
        m3 = means[:, 2] + coeffs[:, 1] * x[:, 0] + coeffs[:, 2] * x[:, 1]
        means = torch.stack((means[:, 0], m2, m3), 1)
    log_probs = log_probabilities(x, means, log_scales).sum(1) + torch.log_softmax(logits, 1)
    return -torch.logsumexp(log_probs, 1).sum(1)


def _hard(planes: int, channels: int) -> tuple[Tensor, Tensor]:
    """Levels at and near the edges, with scales and means for which a bin has a tiny mass or nearly all of it."""
    levels = torch.tensor([0, 1, 127, 128, 254, 255])
    target = torch.stack([levels.roll(c) for c in range(channels)]).expand(8, -1, -1)
    shift = torch.tensor([-9.0, -5.0, -1.0, 3.0, 0.0, 1.5, -7.0, 6.0])
    params = torch.randn(8, planes, 6) + shift.view(8, 1, 1) * torch.linspace(-1, 1, planes).view(1, -1, 1)
    return params, target


def cases() -> dict[str, tuple[int, Tensor, Tensor]]:
    torch.manual_seed(0)
    inputs = {}
    for name, components, channels in (("logistic", 0, 3), ("grey", 3, 1), ("colour", 2, 3)):
        planes = components * (10 if channels == 3 else 3) or 2 * channels
        random = torch.randn(4, planes, 6), torch.randint(0, 256, (4, channels, 6))
        inputs[f"{name}, random"] = (components, *random)
        inputs[f"{name}, hard"] = (components, *_hard(planes, channels))
    # Rounded to three decimals, so that the stored inputs are exactly those of the computation.
    return {
        name: (k, (params.double() * 1000).round() / 1000, target.to(torch.uint8))
        for name, (k, params, target) in inputs.items()
    }


def main() -> None:
    stored = {}
    for name, (components, params, target) in cases().items():
        leaf = params.requires_grad_()
        nll = mixture(leaf, target, components) if components else logistic(leaf, target)
        (gradient,) = torch.autograd.grad(nll.sum(), leaf)
        stored[name] = {
            "components": components,
            "params": [[[round(v, 3) for v in row] for row in plane] for plane in params.tolist()],
            "target": target.tolist(),
            "nll": nll.tolist(),
            "gradient": [[[float(f"{v:.12g}") for v in row] for row in plane] for plane in gradient.tolist()],
        }
    STORED.write_text(json.dumps(stored) + "\n")


if __name__ == "__main__":
    main()
