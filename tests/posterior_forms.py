"""The forms of a posterior's scale, each with the formula of the systems that use it, in float64."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.posteriors import LogStd, LogVar, ScaleForm, Softplus, Variance


class Form(NamedTuple):
    form: str | ScaleForm
    kernel: tuple[str, tuple[float, ...]]  # its name and constants in the backends
    log_std: Callable[[Tensor], Tensor]
    mean: Callable[[Tensor], Tensor] = lambda mu: mu


def _soft(x: Tensor, bound: float) -> Tensor:
    # tanh x = sign(x) (1 - 2 sigmoid(-2 |x|)) has an accurate derivative far out.
    y = x / bound
    return bound * torch.where(y.abs() < 1, torch.tanh(y), y.sign() * (1 - 2 * torch.sigmoid(-2 * y.abs())))


def _log_softplus(v: Tensor) -> Tensor:
    near = v > -40
    return torch.where(near, torch.log(F.softplus(torch.where(near, v, 0.0), threshold=50)), v)


FORMS = {
    "logvar": Form("logvar", ("logvar", ()), lambda v: v / 2),
    # diffusers and latent diffusion: torch.clamp(logvar, -30.0, 20.0)
    "diffusers": Form(
        LogVar(clamp=(-30.0, 20.0)), ("logvar_clamp", (-30.0, 20.0)), lambda v: v.clamp(-30, 20) / 2
    ),
    "clamp": Form(LogVar(clamp=(-1.0, 0.5)), ("logvar_clamp", (-1.0, 0.5)), lambda v: v.clamp(-1, 0.5) / 2),
    "bounds": Form(
        LogVar(bounds=(-6.0, 2.0)), ("logvar_bounds", (-6.0, 2.0)), lambda v: (_soft(v + 2, 4) - 2) / 2
    ),
    # VDVAE
    "log_std": Form("log_std", ("log_std", (0.0, 0.0)), lambda v: v),
    "log_std + eps": Form(
        LogStd(eps=1e-2),
        ("log_std", (0.0, 1e-2)),
        lambda v: torch.logaddexp(v, torch.full_like(v, math.log(1e-2))),
    ),
    # NVAE: soft_clamp5 of both, sigma = exp(log_sigma) + 1e-2
    "nvae": Form(
        LogStd(soft_clamp=5, eps=1e-2),
        ("log_std", (5.0, 1e-2)),
        lambda v: torch.log(torch.exp(_soft(v, 5)) + 1e-2),
        lambda mu: _soft(mu, 5),
    ),
    # stable-audio-tools and RAVE: softplus(scale) + 1e-4
    "softplus": Form(
        "softplus", ("softplus", (1e-4,)), lambda v: torch.log(F.softplus(v, threshold=50) + 1e-4)
    ),
    "softplus, no eps": Form(Softplus(eps=0.0), ("softplus", (0.0,)), _log_softplus),
    # scvi-tools: exp(v) + var_eps
    "variance": Form("variance", ("variance", (1e-4,)), lambda v: torch.log(torch.exp(v) + 1e-4) / 2),
    "variance, 1e-6": Form(
        Variance(eps=1e-6), ("variance", (1e-6,)), lambda v: torch.log(torch.exp(v) + 1e-6) / 2
    ),
    "variance, no eps": Form(Variance(eps=0.0), ("variance", (0.0,)), lambda v: v / 2),
}


def expm1_minus(h: Tensor) -> Tensor:
    """e^h - 1 - h, without cancellation."""
    near = h.abs() < 0.5
    small = torch.where(near, h, 0.0)
    series = torch.ones_like(small)
    for n in range(20, 2, -1):
        series = 1 + series * small / n
    return torch.where(near, small**2 / 2 * series, torch.exp(h) - 1 - h)


def formula(
    form: Form, mu: Tensor, v: Tensor, prior: list[Tensor], eps: Tensor, balance: float | None = None
) -> tuple[Tensor, Tensor]:
    """z, and the KL of every element."""
    mean, h = form.mean(mu), form.log_std(v)
    z = mean + torch.exp(h) * eps

    def kl(mean: Tensor, h: Tensor, prior_mean: Tensor, prior_h: Tensor) -> Tensor:
        return ((mean - prior_mean) * torch.exp(-prior_h)) ** 2 / 2 + expm1_minus(2 * (h - prior_h)) / 2

    if not prior:
        return z, kl(mean, h, torch.zeros_like(mean), torch.zeros_like(h))
    p = form.mean(prior[0]), form.log_std(prior[1])
    if balance is None:
        return z, kl(mean, h, *p)
    return z, balance * kl(mean.detach(), h.detach(), *p) + (1 - balance) * kl(
        mean, h, p[0].detach(), p[1].detach()
    )
