"""The likelihoods of counts: the Poisson, the negative binomial, also with additional zeros or as a mixture, and the
multinomial."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .conventions import compute_dtype, read_counts, sum_event, weighted, with_weight, without_removed
from .latents import expm1_minus

__all__ = [
    "multinomial_nll",
    "negative_binomial_logits_nll",
    "negative_binomial_mixture_nll",
    "negative_binomial_nll",
    "poisson_nll",
    "poisson_rate_nll",
    "zero_inflated_negative_binomial_logits_nll",
    "zero_inflated_negative_binomial_nll",
]


def poisson_nll(log_rate: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """-log Poisson(target | e^log_rate), (B,). Per element it is e^a - t a + log t!, with log t! = log Gamma(t + 1).

    For a large count, each of the three terms is as large as t log t, and they nearly cancel. With u = a - log t and
    Stirling's formula, the sum is t (e^u - 1 - u) + 1/2 log(2 pi t) + ...
    """
    dtype = compute_dtype(log_rate)
    a, t = without_removed(weight, log_rate.to(dtype), read_counts(target, dtype))
    large = t >= _STIRLING_FROM
    some = torch.where(large, t, _STIRLING_FROM)
    u = a - torch.log(some)
    # Where the rate is far above the count, nothing cancels, and the rounding of u would cost the rate a digit.
    cancels = large & (u < 4)
    rest = 0.5 * torch.log(2 * math.pi * some) + _stirling(some)
    of_large = t * expm1_minus(torch.where(cancels, u, 0.0)) + rest
    # An infinite rate has an infinite nll. At a rate of 0, a count of 0 is certain, and every other count impossible.
    whole = torch.exp(a) - weighted(t, torch.where(a == math.inf, 0.0, a)) + torch.lgamma(t + 1)
    return sum_event(torch.where(cancels, of_large, whole), weight)


def poisson_rate_nll(
    rate: Tensor, target: Tensor, *, eps: float = 0.0, reduction: str = "event", weight: Tensor | None = None
) -> Tensor:
    """-log Poisson(target | rate + eps), (B,). Per element it is m - t log m + log t! at m = rate + eps.

    At a rate of 0, the nll of a count of 0 is 0, and that of any other count is infinite. `reduction="event"` sums each
    row to (B,), and `"none"` keeps the elements.
    """
    dtype = _count_dtype(rate)
    m, t = without_removed(weight, rate.to(dtype) + eps, read_counts(target, dtype))
    # For a count of 0, the formula has no logarithm, so the logarithm must not pass a gradient.
    log_m = torch.log(torch.where(t == 0, 1.0, m))
    nll = m - t * log_m + torch.lgamma(t + 1)
    # As in `poisson_nll`, the sum is computed with e = m / t - 1 as t (e - log(1 + e)) + 1/2 log(2 pi t) + ...
    near = (t >= _STIRLING_FROM) & (2 * m > t) & (m < 2 * t)
    some, log_some = torch.where(near, t, _STIRLING_FROM), torch.log(torch.where(near, t, _STIRLING_FROM))
    e = (torch.where(near, m, some) - some) / some
    of_large = (
        0.5 * torch.log(2 * math.pi * some) + _stirling(some) - some * _log1p_minus(e, log_m - log_some)
    )
    nll = torch.where(near, of_large, nll)
    return _reduced(torch.where(m < math.inf, nll, m), reduction, rate, weight)


def negative_binomial_nll(
    mean: Tensor,
    target: Tensor,
    inverse_dispersion: Tensor,
    *,
    eps: float = 0.0,
    reduction: str = "event",
    weight: Tensor | None = None,
) -> Tensor:
    """-log NB(target | mean + eps, inverse_dispersion), (B,) ([L]). The variance is m + m^2 / inverse_dispersion.

    `inverse_dispersion` is (G,), one for every gene, or (B, G) like `mean`. `target` holds counts, dense or sparse CSR.
    `reduction="event"` sums each row to (B,), and `"none"` keeps the elements, (B, G).
    """
    dtype = _count_dtype(mean)
    mu, t = without_removed(weight, mean.to(dtype) + eps, _dense_counts(target, dtype))
    return _reduced(_by_mean(mu, inverse_dispersion.to(dtype), t, weight), reduction, mean, weight)


def zero_inflated_negative_binomial_nll(
    mean: Tensor,
    target: Tensor,
    inverse_dispersion: Tensor,
    zi_logits: Tensor,
    *,
    eps: float = 0.0,
    reduction: str = "event",
    weight: Tensor | None = None,
) -> Tensor:
    """`negative_binomial_nll` with additional zeros, of probability sigmoid(`zi_logits`), (B,) ([ZI], [L])."""
    dtype = _count_dtype(mean)
    mu, t, pi = without_removed(
        weight, mean.to(dtype) + eps, _dense_counts(target, dtype), zi_logits.to(dtype)
    )
    nll = _by_mean(mu, inverse_dispersion.to(dtype), t, weight)
    return _reduced(_with_zeros(nll, pi, t), reduction, mean, weight)


def negative_binomial_logits_nll(
    logits: Tensor,
    target: Tensor,
    log_dispersion: Tensor,
    library: Tensor,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """`negative_binomial_nll` from the raw outputs of a decoder ([L]).

    The mean is library * softmax(logits) over the features, and the inverse dispersion is e^log_dispersion. `library`
    is (B,) or (B, 1). The softmax includes the features of weight 0.
    """
    dtype = _count_dtype(logits)
    t = _without_removed_counts(weight, _dense_counts(target, dtype))
    nll = _by_logits(logits.to(dtype), library.to(dtype), log_dispersion.to(dtype), t, weight)
    return sum_event(nll, weight).to(compute_dtype(logits))


def zero_inflated_negative_binomial_logits_nll(
    logits: Tensor,
    target: Tensor,
    log_dispersion: Tensor,
    zi_logits: Tensor,
    library: Tensor,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """`negative_binomial_logits_nll` with the additional zeros of `zero_inflated_negative_binomial_nll`."""
    dtype = _count_dtype(logits)
    t = _without_removed_counts(weight, _dense_counts(target, dtype))
    (pi,) = without_removed(weight, zi_logits.to(dtype))
    nll = _by_logits(logits.to(dtype), library.to(dtype), log_dispersion.to(dtype), t, weight)
    return sum_event(_with_zeros(nll, pi, t), weight).to(compute_dtype(logits))


def negative_binomial_mixture_nll(
    mean1: Tensor,
    target: Tensor,
    inverse_dispersion: Tensor,
    mean2: Tensor,
    mixture_logits: Tensor,
    *,
    eps: float = 0.0,
    reduction: str = "event",
    weight: Tensor | None = None,
) -> Tensor:
    """-log(p NB(target | mean1 + eps) + (1 - p) NB(target | mean2 + eps)) with p = sigmoid(mixture_logits), (B,) ([G]).

    Both components have the inverse dispersion of `negative_binomial_nll`. `reduction` is as there.
    """
    dtype = _count_dtype(mean1)
    mu1, t, mu2, pi = without_removed(
        weight,
        mean1.to(dtype) + eps,
        _dense_counts(target, dtype),
        mean2.to(dtype) + eps,
        mixture_logits.to(dtype),
    )
    theta, lost = _within_bounds(inverse_dispersion.to(dtype).expand_as(mu1), t, weight)
    # A mean of 0 makes a count above 0 impossible. Its formula, whose slope is infinite there, is evaluated at 1.
    none1, none2 = ((mu == 0) & (t > 0) for mu in (mu1, mu2))
    nll1, nll2 = (_of_mean(mu.masked_fill(none, 1), theta, t) for mu, none in ((mu1, none1), (mu2, none2)))
    # `odds` is the logit of the first component, given the count. Neither has a part if it is impossible.
    out1, out2 = none1 | (pi == -math.inf), none2 | (pi == math.inf)
    odds = torch.where(out1, -math.inf, torch.where(out2, math.inf, pi + nll2 - nll1))
    values = torch.where(
        odds >= 0,
        nll1 - F.logsigmoid(pi) + F.logsigmoid(odds),
        nll2 - F.logsigmoid(-pi) + F.logsigmoid(-odds),
    )
    # Where the count is likely, log(1 + (P - 1)) keeps the digits of a small value; P is the sum in the logarithm.
    p1, p2 = torch.sigmoid(pi), torch.sigmoid(-pi)
    shortfall = p1 * _minus_1(nll1, none1) + p2 * _minus_1(nll2, none2)
    near = shortfall > -0.5
    values = torch.where(near, -torch.log1p(torch.where(near, shortfall, 0.0)), values)
    return _reduced(_at_means_of_0(values, mu1, mu2, t, p1, p2, out1, out2) + lost, reduction, mean1, weight)


def _minus_1(nll: Tensor, impossible: Tensor) -> Tensor:
    """The probability minus 1."""
    return torch.where(impossible, -1.0, torch.expm1(-nll))


def _at_means_of_0(
    values: Tensor,
    mu1: Tensor,
    mu2: Tensor,
    t: Tensor,
    p1: Tensor,
    p2: Tensor,
    out1: Tensor,
    out2: Tensor,
) -> Tensor:
    """The values of a mixture with the limits at means of 0, for counts t above 0.

    As a mean mu goes to 0, the probability of 1 is mu to first order, and that of more is of higher order. So a mean of
    0 has a slope beside a count of 1. If both components are impossible, the value is infinite.
    """
    both = out1 & out2
    for p, mu, out in ((p1, mu1, out1 & ~out2), (p2, mu2, out2 & ~out1)):
        at_0 = out & (mu == 0) & (t == 1)
        slope = p.detach() * torch.exp(values.detach().clamp(max=700.0))
        values = values - torch.where(at_0, slope, 0.0) * torch.where(at_0, mu, 0.0)
    of_each = [p.detach() * torch.where(both & (p > 0), mu, 0.0) for p, mu in ((p1, mu1), (p2, mu2))]
    return torch.where(both, -torch.log(torch.where(both, of_each[0] + of_each[1], 1.0)), values)


def multinomial_nll(logits: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """-log Multinomial(target | n, softmax(logits)) of each row, (B,), with the sum n of its counts ([LK], [B] 2.34).

    It is log prod_i t_i! - log n! - sum_i t_i log p_i with p = softmax(logits), and is computed as that of Poisson
    counts with the means mu = n p, given their sum: sum_i -log Poisson(t_i | mu_i) + log Poisson(n | n). The large
    terms are then those of `_poisson`, which cancel within it. A row without counts has the value 0.

    With weights, count i has the term w_i (log t_i! - t_i log p_i - t_i/n log n!). Features of weight 0 are left out of
    the softmax, too, as if they did not exist.
    """
    dtype = _count_dtype(logits)
    a, t = logits.to(dtype), _dense_counts(target, dtype)
    w = torch.ones_like(t)
    if weight is not None:
        w = weight.to(dtype).expand_as(t)
        a, t = a.masked_fill(w == 0, -math.inf), t.masked_fill(w == 0, 0)
    total = t.sum(1, keepdim=True)
    # Without counts, the logits change nothing, but a NaN must not go unseen.
    empty = total == 0
    a, n = a.masked_fill(empty & ~a.isnan(), 0.0), total.masked_fill(empty, 1.0)
    log_share = F.log_softmax(a, dim=1)
    log_mu = torch.where(t == 0, 0.0, torch.log(n) + log_share)
    mu = total * torch.exp(log_share)
    of_total = _poisson(n, torch.log(n), n).masked_fill(empty, 0.0)
    # The terms of a row in which every count has the mean weight, and what the counts' own weights change.
    mean_weight = (w * t).sum(1, keepdim=True) / n
    own = w * _poisson(mu, log_mu, t) + (w - mean_weight) * (t - mu)
    nll = torch.where(t == 0, mean_weight * mu, own)
    return (sum_event(nll) - (mean_weight * of_total).squeeze(1)).to(compute_dtype(logits))


def _without_removed_counts(weight: Tensor | None, t: Tensor) -> Tensor:
    """Counts with 0 where the weight is 0: unlike 1, this needs no logarithm of a library that may be 0."""
    return t if weight is None else t.masked_fill(weight == 0, 0)


def _reduced(values: Tensor, reduction: str, lead: Tensor, weight: Tensor | None) -> Tensor:
    """The sum of each row, or the elements, times `weight`, in the dtype of the results for `lead`."""
    values = with_weight(values, weight)
    return (sum_event(values) if reduction == "event" else values).to(compute_dtype(lead))


def _by_mean(mu: Tensor, theta: Tensor, t: Tensor, weight: Tensor | None) -> Tensor:
    """`_negative_binomial` for any mean and any inverse dispersion, including 0."""
    theta, lost = _within_bounds(theta.expand_as(mu), t, weight)
    return _of_mean(mu, theta, t) + lost


def _of_mean(mu: Tensor, theta: Tensor, t: Tensor) -> Tensor:
    # For a count of 0, the formula has no logarithm of the mean, so the logarithm must not pass a gradient.
    return _negative_binomial(mu, torch.log(torch.where(t == 0, 1.0, mu)), theta, t)


def _within_bounds(theta: Tensor, t: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The inverse dispersion of each element, clamped, and what the clamp takes from the nll; see `_log_bounds`."""
    low, high = _log_bounds(theta.dtype)
    (theta,), least = without_removed(weight, theta), math.exp(low)
    lost = low - torch.log(torch.where((theta < least) & (t > 0), theta, least))
    return theta.clamp(least, math.exp(high)), lost


def _by_logits(
    logits: Tensor, library: Tensor, log_theta: Tensor, t: Tensor, weight: Tensor | None
) -> Tensor:
    """`_negative_binomial` for the means library * softmax(logits), a cell's expected counts of every gene ([L])."""
    library = library.reshape(-1, 1)
    if weight is not None:
        (log_theta,) = without_removed(weight, log_theta.expand_as(t))
        # A cell all of whose features are removed has neither value nor gradient, whatever its logits are.
        logits, library = without_removed((weight != 0).any(1, keepdim=True), logits, library)
    log_share = F.log_softmax(logits, dim=1)
    # Only counts above 0 need the logarithm of a mean. An empty cell has none, so that of its library, which may be 0,
    # is not needed.
    log_library = torch.log(torch.where((t > 0).any(1, keepdim=True), library, 1.0))
    log_mu = torch.where(t == 0, 0.0, log_library + log_share)
    low, high = _log_bounds(log_theta.dtype)
    theta = torch.exp(log_theta.clamp(low, high)).expand_as(t)
    lost = torch.where(t > 0, torch.relu(low - log_theta), 0.0)
    return _negative_binomial(library * torch.exp(log_share), log_mu, theta, t) + lost


def _log_bounds(dtype: torch.dtype) -> tuple[float, float]:
    """The bounds to which the logarithm of an inverse dispersion is clamped.

    Above the upper bound, the distribution is the Poisson. Below the lower bound, the nll of a count of 0 vanishes, and
    that of other counts is -log theta plus a constant.
    """
    return (-650.0, 600.0) if dtype == torch.float64 else (-85.0, 60.0)


# Below this number, Stirling's series does not reach the precision of float64.
_STIRLING_FROM = 8.0


def _count_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of computation: float64 where the device has it, which keeps eight digits beside log(1e6!)."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _dense_counts(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Counts as numbers. A sparse CSR matrix becomes a dense one."""
    if target.layout != torch.sparse_csr:
        return read_counts(target, dtype)
    lengths = target.crow_indices().diff()
    rows = torch.repeat_interleave(torch.arange(lengths.numel(), device=target.device), lengths)
    dense = torch.zeros(target.shape, dtype=dtype, device=target.device)
    return dense.index_put((rows, target.col_indices()), read_counts(target.values(), dtype), accumulate=True)


def _negative_binomial(mu: Tensor, log_mu: Tensor, theta: Tensor, t: Tensor) -> Tensor:
    """-log NB(t; mean mu, inverse dispersion theta) of each element ([L], scvi-tools' log_nb_positive without its eps):

        lgamma(theta) + lgamma(t + 1) - lgamma(t + theta) - theta log(theta / (theta + mu)) - t log(mu / (theta + mu))

    Of the three lgamma, the large ones nearly cancel, and what is left of them cancels against the other terms. So
    where theta is small compared with t, two of them are subtracted within Stirling's formula. Elsewhere, the
    distribution is nearly Poisson, and the result is Poisson's -log p plus a correction, both computed from differences
    d = mu - t.
    """
    n, d = t + theta, mu - t
    large = t >= _STIRLING_FROM
    some = torch.where(
        large, t, _STIRLING_FROM
    )  # every branch stays finite where it is not used, so that no gradient is NaN
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

    poisson = _poisson(mu, log_mu, t)
    theta_some = torch.where(theta >= _STIRLING_FROM, theta, _STIRLING_FROM)
    correction = n * _log1p_minus(d / n, torch.log((theta + mu) / n)) + 0.5 * torch.log1p(t / theta)
    correction = correction + _stirling(theta_some) - _stirling(n_some)

    nearly_poisson = (theta >= _STIRLING_FROM) & (1000 * theta >= t)
    return torch.where(t == 0, at_zero, torch.where(nearly_poisson, poisson + correction, dispersed))


def _poisson(mu: Tensor, log_mu: Tensor, t: Tensor) -> Tensor:
    """-log Poisson(t; mu) of each element: mu - t log mu + log t!, whose terms cancel within Stirling's formula."""
    large = t >= _STIRLING_FROM
    some = torch.where(large, t, _STIRLING_FROM)
    stirling = 0.5 * torch.log(2 * math.pi * some) + _stirling(some)
    return torch.where(
        large,
        stirling - some * _log1p_minus((mu - t) / some, log_mu - torch.log(some)),
        mu - t * log_mu + torch.lgamma(t + 1),
    )


def _with_zeros(nll: Tensor, zi_logits: Tensor, t: Tensor) -> Tensor:
    """-log of pi [t = 0] + (1 - pi) e^-nll for each element, where pi = sigmoid(zi_logits).

    The sources are [ZI] and log_zinb_positive of scvi-tools.
    """
    keep = torch.sigmoid(-zi_logits)
    # At t = 0, log(pi + (1 - pi) e^-nll) = log1p((1 - pi) expm1(-nll)), which is used unless the argument of
    # that logarithm is close to 0.
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
    """log(1 + e) - e, accurate to the last digits also near 0. `log_1_e` is log(1 + e), which is used elsewhere.

    With s = e / (2 + e), log(1 + e) = 2 (s + s^3/3 + s^5/5 + ...) and 2 s - e = -e s.
    """
    near = e.abs() < 0.5
    small = torch.where(near, e, 0.0)
    s = small / (2 + small)
    series = torch.zeros_like(s)
    for n in range(25, 1, -2):
        series = series * (s * s) + 2 / n
    return torch.where(near, s * (s * s * series - small), log_1_e - e)
