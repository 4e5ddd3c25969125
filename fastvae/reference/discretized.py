"""Levels: the mass that a logistic, or a mixture of them, puts into their bins."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .conventions import compute_dtype, sum_event

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
) -> Tensor:
    """-log of the mass of the target's levels under logistics, (B,) ([S17], equation 2, without the mixture).

    `params` (B, 2C, ...) has mean and log-scale packed along dimension 1, mean first; `target` is uint8 (B, C, ...).
    """
    dtype = compute_dtype(params)
    mean, log_scale = params.to(dtype).chunk(2, dim=1)
    x, half_bin = read_levels(target, bits, dtype)
    return sum_event(-_log_mass(x, mean, log_scale, half_bin, log_scale_floor, min_mass))


def discretized_logistic_mixture_nll(
    params: Tensor,
    target: Tensor,
    *,
    components: int,
    bits: int = 8,
    log_scale_floor: float = -7.0,
    min_mass: float = 1e-5,
) -> Tensor:
    """-log of the mass of each pixel under a mixture of logistics, (B,) ([S17], section 2.1 and equation 3).

    A pixel has one component for its 1 or 3 channels, log sum_k pi_k prod_c mass_kc, and the means of later channels
    depend on the channels before: `mixture_means`. `params` is what `mixture_parts` takes apart.
    """
    dtype = compute_dtype(params)
    logits, mean, log_scale, coefficients = mixture_parts(params.to(dtype), components, target.shape[1])
    x, half_bin = read_levels(target, bits, dtype)
    mean = torch.stack(mixture_means(mean, coefficients, x.unbind(1)), 1)
    log_mass = _log_mass(x.unsqueeze(2), mean, log_scale, half_bin, log_scale_floor, min_mass)
    mixed = torch.logsumexp(torch.log_softmax(logits, 1) + log_mass.sum(1), 1)
    return sum_event(-mixed)


def read_levels(target: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Levels 0, ..., 2^bits - 1 as x in [-1, 1], and half their distance. Higher ones count as the highest."""
    highest = 2**bits - 1
    return (2 * target.clamp(max=highest).to(dtype) - highest) / highest, 1 / highest


def mixture_parts(params: Tensor, components: int, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parts of `params` (B, K + ..., *rest), in the order of [S17]'s code, for 1 or 3 channels of data.

    K logits (B, K, ...); then for each channel in turn K means and K log-scales, (B, C, K, ...) each, and for three
    channels K coefficients, (B, 3, K, ...), which go through tanh here. (None for one channel: (B, 1, 0, ...).)
    """
    logits, rest = params[:, :components], params[:, components:]
    blocks = 3 if channels == 3 else 2
    rest = rest.reshape(rest.shape[0], channels, blocks, components, *rest.shape[2:])
    coefficients = torch.tanh(rest[:, :, 2]) if channels == 3 else rest[:, :, 0, :0]
    return logits, rest[:, :, 0], rest[:, :, 1], coefficients


def mixture_means(mean: Tensor, coefficients: Tensor, x: Sequence[Tensor]) -> list[Tensor]:
    """The mean (B, K, ...) of each channel, given x (B, ...) of the channels before ([S17], equation 3).

    Of three channels, red green blue: m_g + a r and m_b + b r + c g, with coefficients a, b, c. More means than
    `x` has values for are not made.
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
    """log of the mass that a logistic puts between x - half_bin and x + half_bin, as [S17]'s code has it.

    With s the sigmoid, a and b the standardised ends of the bin: s(a) - s(b), where x = -1 and 1 take all that lies
    beyond, s(a) and 1 - s(b); and where s(a) - s(b) is less than `min_mass`, the density at x times the bin.
    Log-scales are no lower than the floor. s(a) - s(b) = s(a) s(-b) (1 - e^(b - a)), in which nothing cancels.
    """
    log_scale = log_scale.clamp(min=log_scale_floor)
    inverse = torch.exp(-log_scale)
    middle = (x - mean) * inverse
    a, b, bin_width = middle + half_bin * inverse, middle - half_bin * inverse, 2 * half_bin * inverse
    # A bin that is nothing in units of the scale belongs to the density. Its logarithm is discarded; a gradient of
    # 0 * inf would still be NaN.
    narrow = bin_width < (1e-8 if x.dtype == torch.float64 else 1e-4)
    inner = F.logsigmoid(a) + F.logsigmoid(-b) + torch.log(-torch.expm1(-torch.where(narrow, 1.0, bin_width)))
    density = F.logsigmoid(middle) + F.logsigmoid(-middle) - log_scale + math.log(2 * half_bin)
    small = narrow | (inner < (math.log(min_mass) if min_mass > 0 else -math.inf))
    # Half way to the next level: x is exact to its last bit or two.
    lowest, highest = x < half_bin - 1, x > 1 - half_bin
    edge = torch.where(lowest, F.logsigmoid(a), F.logsigmoid(-b))
    return torch.where(lowest | highest, edge, torch.where(small, density, inner))
