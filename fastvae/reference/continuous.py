"""The densities of real numbers, element by element, and the Bernoulli, which is computed in the same way."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .conventions import compute_dtype, plus, read_target, scaled, sum_event, weighted, without_removed

__all__ = [
    "bernoulli_nll",
    "bounded_logvar",
    "continuous_bernoulli_nll",
    "gamma_nll",
    "gaussian_head_nll",
    "gaussian_nll",
    "laplace_head_nll",
    "laplace_nll",
    "log_beta_half",
    "student_t_head_nll",
    "student_t_nll",
]


def bernoulli_nll(logits: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """-log Bernoulli(target | sigmoid(logits)), (B,) ([KW], appendix C.1, equation 11).

    Per element it is -[ t log s(a) + (1 - t) log s(-a) ], where s is the sigmoid. That equals
    max(a, 0) - a t + log(1 + e^-|a|), but for t in [0, 1] both terms are positive, so nothing cancels where the network
    is confident and right. For a grey target, 0 < t < 1, this is a cross-entropy, not a likelihood that integrates
    to 1.
    """
    dtype = compute_dtype(logits)
    a, t = without_removed(weight, logits.to(dtype), read_target(target, dtype))
    return sum_event(-(weighted(t, F.logsigmoid(a)) + weighted(1 - t, F.logsigmoid(-a))), weight)


def gaussian_nll(
    mean: Tensor,
    target: Tensor,
    logvar: Tensor | None = None,
    *,
    scale: float = 1.0,
    logvar_bounds: Sequence[float] | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """-log N(target | mean, variance), (B,), with its constant ([KW], appendix C.2, equation 12).

    Per element it is 1/2 [ log 2 pi + log s^2 + (x - m)^2 / s^2 ]. The variance s^2 is `scale`^2, or e^logvar for a
    `logvar` of mean's shape, or one e^logvar for all elements where `logvar` is 0-dimensional (the learned scale of
    [R]). With `logvar_bounds` (lo, hi), the log-variance is that of `bounded_logvar`.
    """
    dtype = compute_dtype(mean)
    mean, x = without_removed(weight, mean.to(dtype), read_target(target, dtype))
    distance = x - mean
    log_variances = torch.full_like(distance, 2 * math.log(scale)) if logvar is None else logvar.to(dtype)
    if log_variances.dim() > 0:
        (log_variances,) = without_removed(weight, log_variances)
    if logvar_bounds is not None:
        log_variances = bounded_logvar(log_variances, logvar_bounds)
    standardised = scaled(distance, log_variances / 2)
    return sum_event(
        plus(standardised * standardised / 2, (math.log(2 * math.pi) + log_variances) / 2), weight
    )


def gaussian_head_nll(
    params: Tensor,
    target: Tensor,
    *,
    logvar_bounds: Sequence[float] | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """`gaussian_nll` with mean and log-variance packed along dimension 1.

    `params` is (B, 2C, ...), with the mean first.
    """
    mean, logvar = params.chunk(2, dim=1)
    return gaussian_nll(mean, target, logvar, logvar_bounds=logvar_bounds, weight=weight)


def bounded_logvar(logvar: Tensor, bounds: Sequence[float]) -> Tensor:
    """A smooth clamp, mid + half tanh((v - mid) / half), for the middle and half the width of the bounds (lo, hi).

    In the middle it equals v to second order. It never leaves [lo, hi]. Its derivative, 1 - tanh^2, is positive, while
    that of a hard clamp is 0 outside the bounds.
    """
    lo, hi = bounds
    mid, half = lo / 2 + hi / 2, hi / 2 - lo / 2
    y = (logvar - mid) / half
    # Far out, tanh rounds to 1, and 1 - tanh^2 has no correct digit. The derivative of
    # tanh |y| = 1 - 2 sigmoid(-2 |y|) stays accurate.
    near = y.abs() < 1
    far = torch.where(near, 1.0, y)
    tanh = torch.where(near, torch.tanh(y), far.sign() * (1 - 2 * torch.sigmoid(-2 * far.abs())))
    return mid + half * tanh


def laplace_nll(
    loc: Tensor,
    target: Tensor,
    log_scale: Tensor | None = None,
    *,
    scale: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """-log Laplace(target | loc, scale), (B,), with its constant.

    Per element it is log 2b + |x - m| / b. The scale b is `scale`, or e^log_scale for a `log_scale` of loc's shape, or
    one e^log_scale for all elements where `log_scale` is 0-dimensional. The gradient in the kink x = m is 0.
    """
    dtype = compute_dtype(loc)
    loc, x = without_removed(weight, loc.to(dtype), read_target(target, dtype))
    distance = _absolute(x - loc)
    log_scales = _log_scales(distance, log_scale, scale, weight)
    return sum_event(plus(scaled(distance, log_scales), math.log(2) + log_scales), weight)


def _log_scales(distance: Tensor, log_scale: Tensor | None, scale: float, weight: Tensor | None) -> Tensor:
    """The log-scale of each element, or one for all of them (0-dimensional), in the dtype of `distance`."""
    if log_scale is None:
        return torch.full_like(distance, math.log(scale))
    log_scale = log_scale.to(distance.dtype)
    return without_removed(weight, log_scale)[0] if log_scale.dim() > 0 else log_scale


def laplace_head_nll(params: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """`laplace_nll` with location and log-scale packed along dimension 1.

    `params` is (B, 2C, ...), with the location first.
    """
    loc, log_scale = params.chunk(2, dim=1)
    return laplace_nll(loc, target, log_scale, weight=weight)


def _absolute(x: Tensor) -> Tensor:
    """|x|, with the derivative 0 at 0 and NaN at NaN (torch's derivative at NaN is also 0)."""
    return x * torch.where(x.isnan(), x, x.sign()).detach()


def student_t_nll(
    loc: Tensor,
    target: Tensor,
    log_scale: Tensor | None = None,
    *,
    df: float,
    scale: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """-log of Student's t with `df` degrees of freedom, (B,), a Gaussian with heavy tails ([LLT]).

    Per element, for z = (x - m) / s and df = v, it is
    (v + 1)/2 log(1 + z^2 / v) + log s + log B(v/2, 1/2) + 1/2 log v. The scale s is `scale`, or e^log_scale as for
    `laplace_nll`.
    """
    dtype = compute_dtype(loc)
    loc, x = without_removed(weight, loc.to(dtype), read_target(target, dtype))
    distance = (x - loc) / math.sqrt(df)
    constant = log_beta_half(df) + math.log(df) / 2
    log_scales = _log_scales(distance, log_scale, scale, weight)
    # Near the location, log(1 + y^2) is computed directly. Further out, y^2 or even y may overflow, so it is computed
    # from log y, which cannot.
    near = scaled(distance, log_scales).detach().abs() < 1
    square = scaled(torch.where(near, distance, 0.0), torch.where(near, log_scales, 0.0)) ** 2
    log_distance, log_s = (
        torch.log(torch.where(near, 1.0, distance.abs())),
        torch.where(near, 0.0, log_scales),
    )
    far = (df + 1) * (log_distance + F.softplus(2 * (log_s - log_distance)) / 2) - df * log_s
    nll = torch.where(near, (df + 1) / 2 * torch.log1p(square) + log_scales, far) + constant
    return sum_event(nll, weight)


def student_t_head_nll(params: Tensor, target: Tensor, *, df: float, weight: Tensor | None = None) -> Tensor:
    """`student_t_nll` with location and log-scale packed along dimension 1.

    `params` is (B, 2C, ...), with the location first.
    """
    loc, log_scale = params.chunk(2, dim=1)
    return student_t_nll(loc, target, log_scale, df=df, weight=weight)


def log_beta_half(df: float) -> float:
    """log B(df / 2, 1/2) = log Gamma(x) + 1/2 log pi - log Gamma(x + 1/2), where x = df / 2."""
    x = df / 2
    if df < 200:
        return math.lgamma(x) - math.lgamma(x + 0.5) + math.log(math.pi) / 2
    # The two log-gammas, each about x log x, would cancel, so their difference is computed by its asymptotic series.
    return (math.log(math.pi) - math.log(x)) / 2 + (1 / 8 - (1 / 192 - 1 / (640 * x * x)) / (x * x)) / x


# The Bernoulli numbers B_2, B_4, ...
BERNOULLI_NUMBERS = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798)


def continuous_bernoulli_nll(logits: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """-log CB(target | sigmoid(logits)), (B,), which normalises the Bernoulli's formula to a density on [0, 1] ([LC]).

    Per element, for a logit a, the density is proportional to e^(a t), whose integral over [0, 1] is (e^a - 1) / a. So
    the nll is log((e^a - 1) / a) - a t. At an infinite logit, all mass lies at one end: the nll is -inf there, and inf
    elsewhere.
    """
    dtype = compute_dtype(logits)
    a, t = without_removed(weight, logits.to(dtype), read_target(target, dtype))
    near = a.abs() < 0.5
    # Near 0, the even series of log(sinh(a / 2) / (a / 2)) is used. Both branches stay finite outside their range.
    small, large = torch.where(near, a, 0.0), torch.where(near, 1.0, a)
    square, series = small * small, torch.zeros_like(a)
    for n, bernoulli_number in reversed(list(enumerate(BERNOULLI_NUMBERS, 1))):
        series = (series + bernoulli_number / (2 * n * math.factorial(2 * n))) * square
    size = large.abs()
    # max(a, 0) - a t is |a| times the distance of t from the end that the sign of a favours.
    lost = weighted(torch.where(large < 0, t, 1 - t), size)
    far = plus(lost, torch.log(-torch.expm1(-size)) - torch.log(size))
    return sum_event(torch.where(near, small * (0.5 - t) + series, far), weight)


def gamma_nll(log_scale: Tensor, target: Tensor, *, shape: float, weight: Tensor | None = None) -> Tensor:
    """-log Gamma(target | shape, e^log_scale), (B,), for positive data, with a scale for every element.

    Per element, for shape k and log-scale s, it is log Gamma(k) + k s - (k - 1) log x + x e^-s. The mean is k e^s. At
    k = 1, the exponential distribution, the formula has no logarithm of the data, and 0 is an ordinary value. For other
    k, the nll of a zero is its limit: +inf for k > 1, where the density vanishes, and -inf for k < 1, where the density
    is unbounded. Its derivative by s is k.
    """
    dtype = compute_dtype(log_scale)
    s, x = without_removed(weight, log_scale.to(dtype), read_target(target, dtype))
    # The infinite logarithm of a zero, or an infinite ratio, determines the result, even at an infinite s.
    of_data = scaled(x, s) - torch.xlogy(shape - 1, x)
    return sum_event(
        of_data + (math.lgamma(shape) + shape * torch.where(of_data.isinf() & s.isinf(), 0.0, s)), weight
    )
