"""Counts: Poisson, negative binomial, and with additional zeros."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .conventions import compute_dtype, read_counts, sum_event, weighted
from .latents import expm1_minus

__all__ = [
    "negative_binomial_logits_nll",
    "negative_binomial_nll",
    "poisson_nll",
    "poisson_rate_nll",
    "zero_inflated_negative_binomial_logits_nll",
    "zero_inflated_negative_binomial_nll",
]


def poisson_nll(log_rate: Tensor, target: Tensor) -> Tensor:
    """-log Poisson(target | e^log_rate), (B,): per element e^a - t a + log t!, with log t! = log Gamma(t + 1).

    Of a large count each of the three is of the size of t log t, and next to nothing may be left. With u = a - log t
    and Stirling's formula it is t (e^u - 1 - u) + 1/2 log(2 pi t) + ...
    """
    dtype = compute_dtype(log_rate)
    a, t = log_rate.to(dtype), read_counts(target, dtype)
    large = t >= _STIRLING_FROM
    some = torch.where(large, t, _STIRLING_FROM)
    u = a - torch.log(some)
    # Where the rate is far above the count nothing cancels, and rounding u would cost the rate a digit.
    cancels = large & (u < 4)
    rest = 0.5 * torch.log(2 * math.pi * some) + _stirling(some)
    of_large = t * expm1_minus(torch.where(cancels, u, 0.0)) + rest
    # An infinite rate is that; of none a count of zero, and no other, is certain.
    whole = torch.exp(a) - weighted(t, torch.where(a == math.inf, 0.0, a)) + torch.lgamma(t + 1)
    return sum_event(torch.where(cancels, of_large, whole))


def poisson_rate_nll(rate: Tensor, target: Tensor, *, eps: float = 0.0, reduction: str = "event") -> Tensor:
    """-log Poisson(target | rate + eps), (B,): per element m - t log m + log t! at m = rate + eps.

    A rate of 0 is certain of a count of 0, whose value is 0; that of any other count is infinite. `reduction="event"`
    sums each row to (B,), `"none"` keeps the elements.
    """
    dtype = _count_dtype(rate)
    m, t = rate.to(dtype) + eps, read_counts(target, dtype)
    # Where the count is 0 there is no logarithm, nor a gradient of one.
    log_m = torch.log(torch.where(t == 0, 1.0, m))
    nll = m - t * log_m + torch.lgamma(t + 1)
    # As in `poisson_nll`, with e = m / t - 1: t (e - log(1 + e)) + 1/2 log(2 pi t) + ...
    near = (t >= _STIRLING_FROM) & (2 * m > t) & (m < 2 * t)
    some, log_some = torch.where(near, t, _STIRLING_FROM), torch.log(torch.where(near, t, _STIRLING_FROM))
    e = (torch.where(near, m, some) - some) / some
    of_large = (
        0.5 * torch.log(2 * math.pi * some) + _stirling(some) - some * _log1p_minus(e, log_m - log_some)
    )
    nll = torch.where(near, of_large, nll)
    return _reduced(torch.where(m < math.inf, nll, m), reduction, rate)


def negative_binomial_nll(
    mean: Tensor, target: Tensor, inverse_dispersion: Tensor, *, eps: float = 0.0, reduction: str = "event"
) -> Tensor:
    """-log NB(target | mean + eps, inverse_dispersion), (B,) ([L]): the variance is m + m^2 / inverse_dispersion.

    `inverse_dispersion` is (G,), one for every gene, or like `mean` (B, G). `target`: counts, dense or sparse CSR.
    `reduction="event"` sums each row to (B,), `"none"` keeps the elements, (B, G).
    """
    dtype = _count_dtype(mean)
    mu, t = mean.to(dtype) + eps, _dense_counts(target, dtype)
    return _reduced(_by_mean(mu, inverse_dispersion.to(dtype), t), reduction, mean)


def zero_inflated_negative_binomial_nll(
    mean: Tensor,
    target: Tensor,
    inverse_dispersion: Tensor,
    zi_logits: Tensor,
    *,
    eps: float = 0.0,
    reduction: str = "event",
) -> Tensor:
    """`negative_binomial_nll` where an element is 0 with probability sigmoid(`zi_logits`) besides, (B,) ([ZI], [L])."""
    dtype = _count_dtype(mean)
    mu, t = mean.to(dtype) + eps, _dense_counts(target, dtype)
    nll = _by_mean(mu, inverse_dispersion.to(dtype), t)
    return _reduced(_with_zeros(nll, zi_logits.to(dtype), t), reduction, mean)


def negative_binomial_logits_nll(
    logits: Tensor, target: Tensor, log_dispersion: Tensor, library: Tensor
) -> Tensor:
    """`negative_binomial_nll` from a decoder's raw outputs: mean = library * softmax(logits) over the features,
    inverse dispersion = e^log_dispersion ([L]). `library`: (B,) or (B, 1)."""
    dtype = _count_dtype(logits)
    t = _dense_counts(target, dtype)
    nll = _by_logits(logits.to(dtype), library.to(dtype), log_dispersion.to(dtype), t)
    return sum_event(nll).to(compute_dtype(logits))


def zero_inflated_negative_binomial_logits_nll(
    logits: Tensor, target: Tensor, log_dispersion: Tensor, zi_logits: Tensor, library: Tensor
) -> Tensor:
    """`negative_binomial_logits_nll` with the additional zeros of `zero_inflated_negative_binomial_nll`."""
    dtype = _count_dtype(logits)
    t = _dense_counts(target, dtype)
    nll = _by_logits(logits.to(dtype), library.to(dtype), log_dispersion.to(dtype), t)
    return sum_event(_with_zeros(nll, zi_logits.to(dtype), t)).to(compute_dtype(logits))


def _reduced(values: Tensor, reduction: str, lead: Tensor) -> Tensor:
    """The sum of each row, or the elements, in the type that results for `lead` have."""
    return (sum_event(values) if reduction == "event" else values).to(compute_dtype(lead))


def _by_mean(mu: Tensor, theta: Tensor, t: Tensor) -> Tensor:
    """`_negative_binomial` for any mean and any inverse dispersion, 0 among them."""
    # Where the count is 0 there is no logarithm of the mean, nor a gradient of one.
    log_mu = torch.log(torch.where(t == 0, 1.0, mu))
    low, high = _log_bounds(theta.dtype)
    theta, least = theta.expand_as(mu), math.exp(low)
    lost = low - torch.log(torch.where((theta < least) & (t > 0), theta, least))
    return _negative_binomial(mu, log_mu, theta.clamp(least, math.exp(high)), t) + lost


def _by_logits(logits: Tensor, library: Tensor, log_theta: Tensor, t: Tensor) -> Tensor:
    """`_negative_binomial` of means library * softmax(logits), what a cell is expected to hold of every gene ([L])."""
    library, log_share = library.reshape(-1, 1), F.log_softmax(logits, dim=1)
    # Only counts ask for the logarithm of a mean. An empty cell has none, and a library of 0 then has no logarithm.
    log_library = torch.log(torch.where((t > 0).any(1, keepdim=True), library, 1.0))
    log_mu = torch.where(t == 0, 0.0, log_library + log_share)
    low, high = _log_bounds(log_theta.dtype)
    theta = torch.exp(log_theta.clamp(low, high)).expand_as(t)
    lost = torch.where(t > 0, torch.relu(low - log_theta), 0.0)
    return _negative_binomial(library * torch.exp(log_share), log_mu, theta, t) + lost


def _log_bounds(dtype: torch.dtype) -> tuple[float, float]:
    """Between which logarithms of an inverse dispersion are read.

    Above, the distribution is the Poisson. Below, a count of 0 has lost all of its nll, and that of others is
    -log theta and what does not change.
    """
    return (-650.0, 600.0) if dtype == torch.float64 else (-85.0, 60.0)


# Below, Stirling's series does not reach the precision of float64.
_STIRLING_FROM = 8.0


def _count_dtype(tensor: Tensor) -> torch.dtype:
    """Counts are computed in float64, of which 1e6! leaves eight digits, where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _dense_counts(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Counts as numbers; a sparse CSR matrix becomes a dense one."""
    if target.layout != torch.sparse_csr:
        return read_counts(target, dtype)
    lengths = target.crow_indices().diff()
    rows = torch.repeat_interleave(torch.arange(lengths.numel(), device=target.device), lengths)
    dense = torch.zeros(target.shape, dtype=dtype, device=target.device)
    return dense.index_put((rows, target.col_indices()), read_counts(target.values(), dtype), accumulate=True)


def _negative_binomial(mu: Tensor, log_mu: Tensor, theta: Tensor, t: Tensor) -> Tensor:
    """-log NB(t; mean mu, inverse dispersion theta) of each element ([L], scvi-tools' log_nb_positive without its eps):

        lgamma(theta) + lgamma(t + 1) - lgamma(t + theta) - theta log(theta / (theta + mu)) - t log(mu / (theta + mu))

    Of the three lgamma, the large ones nearly cancel, and the rest cancels against what is left of them. So where
    theta is small beside t, two of them are subtracted within Stirling's formula; where it is not, the distribution is
    nearly Poisson, and this is Poisson's -log p and what corrects it, all of it in differences d = mu - t.
    """
    n, d = t + theta, mu - t
    large = t >= _STIRLING_FROM
    some = torch.where(
        large, t, _STIRLING_FROM
    )  # in every branch, numbers that the others' gradients survive
    n_some = torch.where(n >= _STIRLING_FROM, n, _STIRLING_FROM)

    b = theta - 1
    ratio = (n_some - 0.5) * torch.log1p(b / (some + 1)) + b * (torch.log(some + 1) - 1)
    ratio = ratio + _stirling(n_some) - _stirling(some + 1)  # lgamma(t + theta) - lgamma(t + 1)
    ratio = torch.where(large, ratio, torch.lgamma(n) - torch.lgamma(t + 1))
    log1p_ratio = torch.where(
        theta < mu, torch.log1p(theta / torch.maximum(mu, theta)), torch.log(theta + mu) - log_mu
    )
    x = mu / theta
    log1p_x = torch.log1p(x)
    at_zero = torch.where(x < 0.5, mu + theta * _log1p_minus(x, log1p_x), theta * log1p_x)
    dispersed = at_zero + t * log1p_ratio + torch.lgamma(theta) - ratio

    stirling = 0.5 * torch.log(2 * math.pi * some) + _stirling(some)
    poisson = torch.where(
        large,
        stirling - some * _log1p_minus(d / some, log_mu - torch.log(some)),
        mu - t * log_mu + torch.lgamma(t + 1),
    )
    theta_some = torch.where(theta >= _STIRLING_FROM, theta, _STIRLING_FROM)
    correction = n * _log1p_minus(d / n, torch.log((theta + mu) / n)) + 0.5 * torch.log1p(t / theta)
    correction = correction + _stirling(theta_some) - _stirling(n_some)

    nearly_poisson = (theta >= _STIRLING_FROM) & (1000 * theta >= t)
    return torch.where(t == 0, at_zero, torch.where(nearly_poisson, poisson + correction, dispersed))


def _with_zeros(nll: Tensor, zi_logits: Tensor, t: Tensor) -> Tensor:
    """-log of pi [t = 0] + (1 - pi) e^-nll for each element, pi = sigmoid(zi_logits) ([ZI]; log_zinb_positive)."""
    keep = torch.sigmoid(-zi_logits)
    # At t = 0, log(pi + (1 - pi) e^-nll) = log1p((1 - pi) expm1(-nll)), but not where that is a logarithm of next to 0.
    lost = keep * torch.expm1(-nll)
    near = lost > -0.5
    zero = torch.where(
        near,
        -torch.log1p(torch.where(near, lost, 0.0)),
        -F.logsigmoid(-zi_logits) - torch.logaddexp(zi_logits, -nll),
    )
    return torch.where(t == 0, zero, nll - F.logsigmoid(-zi_logits))


def _stirling(z: Tensor) -> Tensor:
    """log Gamma(z) - [ (z - 1/2) log z - z + 1/2 log 2 pi ], for z >= 8 ([AS] 6.1.41)."""
    square, series = 1 / (z * z), torch.zeros_like(z)
    for numerator, denominator in (
        (-3617, 122400), (1, 156), (-691, 360360), (1, 1188), (-1, 1680), (1, 1260), (-1, 360), (1, 12),
    ):  # fmt: skip
        series = series * square + numerator / denominator
    return series / z


def _log1p_minus(e: Tensor, log_1_e: Tensor) -> Tensor:
    """log(1 + e) - e, right to the last digits near 0 too, given log(1 + e) for where that is not near.

    With s = e / (2 + e), log(1 + e) = 2 (s + s^3/3 + s^5/5 + ...) and 2 s - e = -e s.
    """
    near = e.abs() < 0.5
    small = torch.where(near, e, 0.0)
    s = small / (2 + small)
    series = torch.zeros_like(s)
    for n in range(25, 1, -2):
        series = series * (s * s) + 2 / n
    return torch.where(near, s * (s * s * series - small), log_1_e - e)
