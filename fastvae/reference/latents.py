"""Samples from the posterior, its KL, and free bits."""

import math

import torch
from torch import Tensor

from .conventions import compute_dtype, scaled, sum_event
from .noise import draw_seed, normal_noise

__all__ = ["free_bits", "gaussian_kl", "reparameterize_kl"]


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    reduction: str = "event",
) -> Tensor:
    """KL( N(mu, e^logvar) || N(prior_mu, e^prior_logvar) ), for diagonal covariances.

    The prior is N(0, 1) if none is given. Per element, the KL ([RW], equation A.23, for one dimension; for a standard
    normal prior [KW], appendix B) is

        1/2 [ (mu - prior_mu)^2 e^-prior_logvar + e^v - 1 - v ],    v = logvar - prior_logvar

    `reduction="event"` sums each row to (B,), and `"none"` keeps the elements.
    """
    dtype = compute_dtype(mu)
    distance, v = mu.to(dtype), logvar.to(dtype)
    if prior_mu is not None and prior_logvar is not None:
        # The conversion is done once: with two, both gradients of a half tensor would be rounded before they are added.
        prior_v = prior_logvar.to(dtype)
        # The distance is scaled by half of the exponent before it is squared, so that the square of a large distance
        # over a large variance stays finite.
        distance = scaled(distance - prior_mu.to(dtype), prior_v / 2)
        v = v - prior_v
    kl = distance * distance / 2 + expm1_minus(v) / 2
    return sum_event(kl) if reduction == "event" else kl


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    samples: int | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    row_offset: int = 0,
    eps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """z = mu + e^(logvar / 2) eps, eps ~ N(0, 1) ([KW], section 2.4), and the row's `gaussian_kl`.

    z has mu's dtype, and mu's shape or (samples, *shape). The noise is `eps` if it is given. Otherwise it is generated
    from `seed`, or from a seed drawn from `generator` (or from torch's default generator).
    """
    dtype = compute_dtype(mu)
    shape = mu.shape if samples is None else (samples, *mu.shape)
    if eps is None:
        if seed is None:
            seed = draw_seed(mu.device, generator)
        rows, dims, draws = mu.shape[0], math.prod(mu.shape[1:]), 1 if samples is None else samples
        eps = normal_noise(seed, row_offset, rows, dims, draws, dtype).reshape(shape)
    mean, v = mu.to(dtype), logvar.to(dtype)  # converted once for z and the KL, as in `gaussian_kl`
    z = mean + torch.exp(v / 2) * eps.to(dtype)
    return z.to(mu.dtype), gaussian_kl(mean, v, prior_mu, prior_logvar)


def free_bits(kl: Tensor, nats: float, *, batch_mean: bool = True) -> Tensor:
    """The KL per row with free bits, (B,). A dimension whose KL is below `nats` counts as `nats` ([K16], appendix C.8).

    `kl` is per dimension, (B, ...). With `batch_mean`, as in [K16], the mean of a dimension over the batch is compared
    with `nats`: the mean of the rows is sum_j max(nats, mean_b kl_bj), and the gradients agree too. Without it, every
    row is compared by itself: max(nats, kl_bj).
    """
    judged = kl.mean(0, keepdim=True) if batch_mean else kl
    return sum_event(torch.where(judged > nats, kl, nats))


def expm1_minus(v: Tensor) -> Tensor:
    """e^v - 1 - v = expm1(v) - v, accurate to the last digits also near 0, as are both derivatives.

    Near 0 the result is v^2 / 2, while expm1(v) and v are each as large as v, so their difference has no correct digit
    if v is below the square root of the precision. There, the Taylor series v^2/2 (1 + v/3 (1 + v/4 (...))) is used.
    Up to v^20 / 20! it is exact in float64 for |v| < 1. From 1 on, the subtraction costs at most two bits.
    """
    near = v.abs() < 1
    # Outside its range, the series is evaluated at 0. where() discards its value, but without this the gradient could
    # be 0 * inf, which is NaN.
    small = torch.where(near, v, 0.0)
    series = torch.ones_like(small)
    for n in range(20, 2, -1):
        series = 1 + series * small / n
    return torch.where(
        near, small * small / 2 * series, torch.exp(v) - (1 + torch.where(v == math.inf, 0.0, v))
    )
