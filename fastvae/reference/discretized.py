"""Likelihoods of discrete levels: the mass that a logistic, or a mixture of logistics, assigns to their bins."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .conventions import compute_dtype, sum_event, without_removed

__all__ = [
    "discretized_logistic_mixture_nll",
    "discretized_logistic_nll",
    "mixture_means",
    "mixture_parts",
    "read_levels",
]


def discretized_logistic_nll(
    params: Tensor,
    target: Tensor,
    *,
    bits: int = 8,
    log_scale_floor: float = -7.0,
    min_mass: float = 1e-5,
    weight: Tensor | None = None,
) -> Tensor:
    """The nll (B,) of the target's levels under discretised logistics ([S17], equation 2, without the mixture).

    `params` (B, 2C, ...) contains mean and log-scale along dimension 1, mean first; `target` is uint8 (B, C, ...).
    """
    dtype = compute_dtype(params)
    mean, log_scale = without_removed(weight, *params.to(dtype).chunk(2, dim=1))
    x, half_bin = read_levels(target, bits, dtype)
    return sum_event(-_log_mass(x, mean, log_scale, half_bin, log_scale_floor, min_mass), weight)


def discretized_logistic_mixture_nll(
    params: Tensor,
    target: Tensor,
    *,
    components: int,
    bits: int = 8,
    log_scale_floor: float = -7.0,
    min_mass: float = 1e-5,
    weight: Tensor | None = None,
) -> Tensor:
    """The nll (B,) of the pixels under a mixture of discretised logistics ([S17], section 2.1 and equation 3).

    All 1 or 3 channels of a pixel belong to the same component, so that its log-likelihood is
    log sum_k pi_k prod_c mass_kc. The mean of a channel depends on the channels before it: see `mixture_means`.
    `mixture_parts` describes the layout of `params`. A `weight` is that of each pixel, (B, 1, ...).
    """
    (wide,) = without_removed(weight, params.to(compute_dtype(params)))
    logits, mean, log_scale, coefficients = mixture_parts(wide, components, target.shape[1])
    x, half_bin = read_levels(target, bits, wide.dtype)
    mean = torch.stack(mixture_means(mean, coefficients, x.unbind(1)), 1)
    log_mass = _log_mass(x.unsqueeze(2), mean, log_scale, half_bin, log_scale_floor, min_mass)
    mixed = torch.logsumexp(torch.log_softmax(logits, 1) + log_mass.sum(1), 1)
    return sum_event(-mixed, None if weight is None else weight.squeeze(1))


def read_levels(target: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Levels 0, ..., 2^bits - 1 as x in [-1, 1], and half their spacing. Higher levels count as the highest."""
    highest = 2**bits - 1
    return (2 * target.clamp(max=highest).to(dtype) - highest) / highest, 1 / highest


def mixture_parts(params: Tensor, components: int, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Splits `params` (B, K + ..., *rest), in the order of [S17]'s code, for data with 1 or 3 channels.

    Dimension 1 contains K logits and then, for each channel, K means, K log-scales and, if there are three channels,
    K coefficients. Returns the logits (B, K, ...), the means and the log-scales, (B, C, K, ...) each, and the tanh of
    the coefficients, (B, 3, K, ...), which is (B, 1, 0, ...) if there is one channel.
    """
    logits, rest = params[:, :components], params[:, components:]
    blocks = 3 if channels == 3 else 2
    rest = rest.reshape(rest.shape[0], channels, blocks, components, *rest.shape[2:])
    coefficients = torch.tanh(rest[:, :, 2]) if channels == 3 else rest[:, :, 0, :0]
    return logits, rest[:, :, 0], rest[:, :, 1], coefficients


def mixture_means(mean: Tensor, coefficients: Tensor, x: Sequence[Tensor]) -> list[Tensor]:
    """The mean (B, K, ...) of each channel, given x (B, ...) of the channels before it ([S17], equation 3).

    If there are three channels, red, green and blue, the means are m_r, m_g + a r and m_b + b r + c g, where a, b and c
    are the coefficients. Means that depend on channels missing from `x` are left out.
    """
    means = [mean[:, 0]]
    if mean.shape[1] == 3 and len(x) > 0:
        means.append(mean[:, 1] + coefficients[:, 0] * x[0].unsqueeze(1))
    if mean.shape[1] == 3 and len(x) > 1:
        means.append(
            mean[:, 2] + coefficients[:, 1] * x[0].unsqueeze(1) + coefficients[:, 2] * x[1].unsqueeze(1)
        )
    return means


def _log_mass(
    x: Tensor, mean: Tensor, log_scale: Tensor, half_bin: float, log_scale_floor: float, min_mass: float
) -> Tensor:
    """The log of the mass that a logistic assigns to [x - half_bin, x + half_bin], as in [S17]'s code.

    Let s be the sigmoid, and a and b the standardised upper and lower end of the bin. The mass is s(a) - s(b). The bins
    of x = -1 and x = 1 extend to infinity, so their masses are s(a) and 1 - s(b). If s(a) - s(b) is less than
    `min_mass`, the density at x times the width of the bin replaces it. Log-scales below the floor are raised to it.
    The difference is computed as s(a) - s(b) = s(a) s(-b) (1 - e^(b - a)), which avoids cancellation.
    """
    log_scale = log_scale.clamp(min=log_scale_floor)
    inverse = torch.exp(-log_scale)
    middle = (x - mean) * inverse
    a, b, bin_width = middle + half_bin * inverse, middle - half_bin * inverse, 2 * half_bin * inverse
    # Bins that are very narrow in units of the scale use the density. For them `inner` is discarded, but its gradient
    # would still be 0 * inf = NaN if the bin's width were not replaced.
    narrow = bin_width < (1e-8 if x.dtype == torch.float64 else 1e-4)
    inner = F.logsigmoid(a) + F.logsigmoid(-b) + torch.log(-torch.expm1(-torch.where(narrow, 1.0, bin_width)))
    density = F.logsigmoid(middle) + F.logsigmoid(-middle) - log_scale + math.log(2 * half_bin)
    small = narrow | (inner < (math.log(min_mass) if min_mass > 0 else -math.inf))
    # The thresholds are half way to the next level, because x is only exact to its last bit or two.
    lowest, highest = x < half_bin - 1, x > 1 - half_bin
    edge = torch.where(lowest, F.logsigmoid(a), F.logsigmoid(-b))
    return torch.where(lowest | highest, edge, torch.where(small, density, inner))
