"""The log-density of a mixture of diagonal Gaussians, for aggregate posteriors and mixture priors."""

import math

import torch
from torch import Tensor

from .conventions import compute_dtype

__all__ = ["gaussian_mixture_log_prob"]

# The logarithm of a variance of 0, in place of -inf. Differences of such numbers are not NaN.
_LOG_OF_NOTHING = -1e30


def gaussian_mixture_log_prob(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weight: Tensor | None = None,
    *,
    per_dimension: bool | str = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log sum_m w_m N(z_b; mu_m, e^logvar_m), (B,), for `z` (B, D), `mu` and `logvar` (M, D) ([B], equation 9.7).

    With `per_dimension`, every dimension is a mixture of its own, log sum_m w_m N(z_bd; mu_md, e^logvar_md), (B, D);
    "both" returns the two. The log-weights are (M,) or (B, M), and log(1 / M) by default.

    A component that is infinitely far away adds nothing, and has no gradient. A point that no component reaches has
    the value -inf and no gradient.
    """
    dtype = compute_dtype(z)
    z, mu, logvar = z.to(dtype), mu.to(dtype), logvar.to(dtype)
    components = mu.shape[0]
    if log_weight is None:
        log_weight = mu.new_full((components,), -math.log(components))
    log_weight = log_weight.to(dtype)
    # The inverse of the standard deviation is finite, so that a distance of 0 remains 0 for every variance.
    inverse = torch.exp(logvar.clamp(min=-1418.0 if dtype == torch.float64 else -176.0) / -2)
    distance = z.unsqueeze(1) - mu
    infinite = distance.isinf()
    standardised = torch.where(infinite, 0.0, distance) * inverse
    unreached = infinite | (standardised * standardised).isinf()
    standardised = torch.where(unreached, 0.0, standardised)
    logvar = torch.where(logvar < _LOG_OF_NOTHING, _LOG_OF_NOTHING, logvar)
    elements = (standardised * standardised + logvar + math.log(2 * math.pi)) / -2
    elements = torch.where(unreached, -math.inf, elements)  # (B, M, D)
    joint = _log_sum_exp(elements.sum(2) + log_weight)
    if per_dimension is False:
        return joint
    of_each = _log_sum_exp(elements + log_weight.unsqueeze(-1))
    return (joint, of_each) if per_dimension == "both" else of_each


def _log_sum_exp(x: Tensor) -> Tensor:
    """log sum exp over dimension 1. Where all summands are -inf, so is the result, and its gradient is 0."""
    nothing = (x == -math.inf).all(1)
    total = torch.logsumexp(torch.where(nothing.unsqueeze(1), 0.0, x), 1)
    total = torch.where(nothing, -math.inf, total)
    return total + torch.where(total > -0.1 * _LOG_OF_NOTHING, math.inf, 0.0)
