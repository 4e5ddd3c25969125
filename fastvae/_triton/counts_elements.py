"""The elements of count likelihoods: the Poisson, and the negative binomials' zeros, small counts and others.

csrc/math/counts.h has the formulas and explains them.
"""

import triton
import triton.language as tl

from .element import Element
from .elementary import (
    LOG1P_SERIES_32,
    LOG1P_SERIES_64,
    exp,
    exp_minus_1_minus,
    exp_of_bounded,
    log1p,
    log1p_excess,
    log1p_parts,
    log_factorial,
    log_of_normal,
    lost_by_decay,
    polynomial,
    reciprocal,
)

# The series that Stirling's formulas for log Gamma and digamma leave out (Abramowitz and Stegun 6.1.41, 6.3.18). They
# are accurate from 8 on.
_STIRLING_FROM: tl.constexpr = tl.constexpr(8.0)
_LOG_GAMMA: tl.constexpr = tl.constexpr(
    (-3617 / 122400, 1 / 156, -691 / 360360, 1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12)
)
_DIGAMMA: tl.constexpr = tl.constexpr(
    (43867 / 14364, -3617 / 8160, 1 / 12, -691 / 32760, 1 / 132, -1 / 240, 1 / 252, -1 / 120, 1 / 12)
)
_HALF_LOG_2PI: tl.constexpr = tl.constexpr(0.9189385332046727)


@triton.jit
def poisson(a, _, target, scalar, shape, offset):
    """-log Poisson(t; e^a) = e^a - t a + log t!, whose terms cancel where t is large.

    There, with u = a - log t, the value is computed as t (e^u - 1 - u) + log(2 pi t) / 2 + ... Where the rate is far
    above the count, nothing cancels, and e^a is computed from a, because the rounding of u would cost it a digit.
    """
    large = target >= (16.0 if target.dtype == tl.float64 else 2.0)
    log_n, rest, small = log_factorial(target, large)
    u = a - tl.where(large, log_n, 0.0)
    far = u > 4.0
    e = exp(tl.where(far, a, u))
    minus_1_u = exp_minus_1_minus(u, e)
    # Above this bound the rate is infinite, and u is capped so that inf - inf does not occur. A count of 0 has no term
    # in u.
    BEYOND: tl.constexpr = 710.0 if target.dtype == tl.float64 else 89.0
    taken = tl.where(u > BEYOND, BEYOND, u)
    value = tl.where(
        large, e - target * (1.0 + taken) + rest, e - target * tl.where(target > 0.0, taken, 0.0) + small
    )
    cancels = large & ~far
    minus_1 = tl.where(u < -1.0, e - 1.0, minus_1_u + u)
    grad = tl.where(cancels, target * minus_1, e - target)
    return tl.where(cancels, target * minus_1_u + rest, value), 0.0, grad, 0.0, 0.0


@triton.jit
def poisson_rate(rate, _, target, eps, shape, offset):
    """-log Poisson(t; m) = m - t log m + log t!, m = rate + eps.

    Where t is large, it is computed with e = m / t - 1 as t (e - log(1 + e)) + log(2 pi t) / 2 + ...
    """
    m = rate + eps
    d = m - target
    large = target >= (16.0 if target.dtype == tl.float64 else 2.0)
    log_n, rest, small = log_factorial(target, large)
    ratio = m / tl.where(large, target, 1.0)
    tiny = ratio < 1e-30
    log_ratio = tl.log(tl.where(tiny, m, ratio)) - tl.where(tiny & large, log_n, 0.0)
    # For a count of 0, no logarithm is needed, whatever the rate.
    log_ratio = tl.where(target == 0.0, 0.0, log_ratio)
    e = d / tl.where(large, target, 1.0)
    near = tl.abs(e) < 0.5
    s = e / (2.0 + e)
    series = polynomial(s * s, LOG1P_SERIES_64 if m.dtype == tl.float64 else LOG1P_SERIES_32)
    by_series = target * (s * (e - s * s * series))
    value = tl.where(
        large, tl.where(near, by_series, d - target * log_ratio) + rest, m - target * log_ratio + small
    )
    # At an infinite rate, the results are the limits.
    certain = (target == 0.0) | (m == float("inf"))
    return tl.where(m == float("inf"), m, value), 0.0, tl.where(certain, 1.0, d / m), 0.0, 0.0


ELEMENTS = {
    "poisson": Element(poisson, warps_64=4),
    "poisson_rate": Element(poisson_rate, warps_64=4, scalar_of=lambda constants: constants[0]),
}


@triton.jit
def bounded(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """`x` clamped to [LOW, HIGH]. A NaN stays NaN."""
    return tl.where(x < LOW, LOW, tl.where(x > HIGH, HIGH, x))


# The bounds to which the logarithm of an inverse dispersion is clamped. The comment at Bounds in csrc/cpu/counts.cpp
# gives the reasons.
_LOWEST_LOG_64: tl.constexpr = tl.constexpr(-650.0)
_HIGHEST_LOG_64: tl.constexpr = tl.constexpr(600.0)
_LOWEST_LOG_32: tl.constexpr = tl.constexpr(-85.0)
_HIGHEST_LOG_32: tl.constexpr = tl.constexpr(60.0)


@triton.jit
def dispersion_of_zeros(given, RAW: tl.constexpr):
    """The inverse dispersion for counts of 0, and its reciprocal. With RAW, `given` is its logarithm."""
    LOW: tl.constexpr = _LOWEST_LOG_64 if given.dtype == tl.float64 else _LOWEST_LOG_32
    HIGH: tl.constexpr = _HIGHEST_LOG_64 if given.dtype == tl.float64 else _HIGHEST_LOG_32
    if RAW:
        theta = exp_of_bounded(bounded(given, LOW, HIGH))
    else:
        theta = bounded(
            given,
            5.08e-283 if given.dtype == tl.float64 else 1.22e-37,
            3.77e260 if given.dtype == tl.float64 else 1.14e26,
        )
    return theta, reciprocal(theta)


@triton.jit
def dispersion_of_others(given, RAW: tl.constexpr):
    """The inverse dispersion for the other counts, in float64, and the nll that clamping it takes away.

    Below the lower bound the nll is -log theta plus a constant.
    """
    if RAW:
        theta = tl.exp(bounded(given, _LOWEST_LOG_64, _HIGHEST_LOG_64))
        logarithm = given
    else:
        theta = bounded(given, 5.08e-283, 3.77e260)
        logarithm = tl.log(given)
    return theta, tl.where(logarithm < _LOWEST_LOG_64, _LOWEST_LOG_64 - logarithm, 0.0)


@triton.jit
def zero_term(mu, theta, inverse_theta):
    """-log NB(0) and its derivatives by mu and theta."""
    # Beyond this bound, the reciprocal of 1 + x would be lost.
    MOST: tl.constexpr = 1e307 if mu.dtype == tl.float64 else 8e37
    x = mu * inverse_theta
    value, excess, inverse = log1p_parts(tl.where(x > MOST, MOST, x))
    return theta * value, inverse, excess


@triton.jit
def with_additional_zeros(z, pi):
    """-log(p + (1 - p) e^-z), p = sigmoid(pi), and its derivatives by z and pi."""
    # The exponential of the bound is neither 0 nor infinite.
    BOUND: tl.constexpr = 700.0 if z.dtype == tl.float64 else 80.0
    odds = exp_of_bounded(bounded(pi, -BOUND, BOUND))
    decay = exp_of_bounded(-z)
    q = reciprocal(odds + decay)
    r = lost_by_decay(z, decay) * q
    value, _, _ = log1p_parts(r)
    d_z = decay * q
    d_pi = -r * (odds * reciprocal(1.0 + odds))
    # Where both terms are too small for their sum, the value is computed from the larger one.
    far = (pi < -BOUND) & (z > BOUND / 2)
    if tl.max(far.to(tl.int32), 0) > 0:
        difference = z + pi
        e = tl.exp(-tl.abs(difference))
        share = tl.where(difference < 0.0, 1.0, e) / (1.0 + e)
        value = tl.where(far, tl.minimum(-pi, z) - log1p(e), value)
        d_z = tl.where(far, share, d_z)
        d_pi = tl.where(far, share - 1.0, d_pi)
    return value, d_z, d_pi


@triton.jit
def small_count(t, lead, dispersion, offset, RAW: tl.constexpr):
    """Whether float32 is enough for a count, its nll and its derivatives; see small_count in csrc/cuda.

    It is for whole counts from 1 to 7 whose mean and dispersion are not extreme. The derivatives are those by the mean
    and the inverse dispersion or, with RAW, by their logarithms. `offset` is added to the mean or, with RAW, to the
    logit, in float64. With the products written as one, i = 1, ..., t - 1, the value is
        theta log(1 + mu / theta) + log[(1 + mu / theta) prod (i + 1) (theta + mu) / (theta + i)] - t log mu.
    It is at least 1, and of its terms no two are so much larger that their difference would lose digits of it.
    """
    LOWEST: tl.constexpr = -11.5 if RAW else 1e-5
    HIGHEST: tl.constexpr = 69.0 if RAW else 1e30
    if RAW:
        # In float64, because the error would be the same in the whole row.
        mean = (lead.to(tl.float64) + offset).to(tl.float32)
        fits = mean < 9.2
    else:
        mean = lead + offset.to(tl.float32)
        fits = (mean > 1e-37) & (mean < 1e4)
    fits = fits & (t >= 1.0) & (t < 8.0) & (tl.floor(t) == t) & (dispersion > LOWEST) & (dispersion < HIGHEST)
    t = tl.where(fits, t, 1.0)
    mean = tl.where(fits, mean, 1.0)
    theta = tl.where(fits, dispersion, 1.0)
    if RAW:
        log_mu = mean
        mu = exp(log_mu)
        theta = exp(theta)
    else:
        mu = mean
        log_mu = log_of_normal(mu)
    inverse_theta = reciprocal(theta)
    x = mu * inverse_theta
    log_1_x, excess, inverse = log1p_parts(x)
    both = theta + mu
    product = 1.0 + x
    # The sum of (i - mu) / (theta + i), from i = 0 on. Divided by theta + mu, it is t / (theta + mu) less the
    # difference of digamma's values at theta + t and theta.
    shares = -x
    for i in tl.static_range(1, 7):
        inverse_i = tl.where(t > i, reciprocal(theta + i), 0.0)
        shares += (i - mu) * inverse_i
        product = tl.where(t > i, product * (both * (inverse_i * (i + 1.0))), product)
    shares *= inverse
    value = theta * log_1_x + (log_of_normal(product) - t * log_mu)
    d_lead = (mu - t) * inverse
    if RAW:
        d_theta = excess * theta + shares
    else:
        d_lead = d_lead / mu
        d_theta = excess + shares * inverse_theta
    return fits, value, d_lead, d_theta


@triton.jit
def gamma_parts(z):
    """log Gamma(z) and digamma(z), in float64 for z in (0, 16), computed from those of z + 8."""
    product = z
    derivative = tl.full(z.shape, 1.0, tl.float64)
    for k in tl.static_range(1, 8):
        derivative = derivative * (z + k) + product
        product *= z + k
    shifted = z + 8.0
    log_shifted = tl.log(shifted)
    inverse = 1.0 / shifted
    log_gamma = (shifted - 0.5) * log_shifted + (_HALF_LOG_2PI - shifted) + log_gamma_rest(inverse)
    digamma = log_shifted - 0.5 * inverse - digamma_rest(inverse)
    return log_gamma - tl.log(product), digamma - derivative / product


@triton.jit
def log_gamma_rest(inverse):
    return inverse * polynomial(inverse * inverse, _LOG_GAMMA)


@triton.jit
def digamma_rest(inverse):
    square = inverse * inverse
    return square * polynomial(square, _DIGAMMA)


@triton.jit
def positive_term(t, mu, log_mu, theta):
    """-log NB(t) of a count above zero, and its derivatives by log mu and theta, in float64."""
    n = t + theta
    d = mu - t
    inverse_sum = 1.0 / (theta + mu)
    share = theta * inverse_sum
    large = t >= _STIRLING_FROM
    near_poisson = theta >= _STIRLING_FROM
    inverse_n = 1.0 / tl.where(n >= _STIRLING_FROM, n, _STIRLING_FROM)
    inverse_theta = 1.0 / tl.where(near_poisson, theta, _STIRLING_FROM)
    t_theta = t * inverse_theta

    # Each logarithm and each quotient is computed once, with the arguments that the element's case needs.
    e = tl.where(near_poisson, d, mu) / tl.where(near_poisson, n, theta)
    first = log1p(e)
    excess = log1p_excess(e, first, tl.where(near_poisson, n, theta) * inverse_sum)
    ratio_2 = tl.where(near_poisson, -theta * e, theta) / mu  # in the first case, e is d / n
    second = log1p(tl.where(near_poisson & ~large, t_theta, ratio_2))
    third = tl.log(tl.where(near_poisson, t * (1.0 + t_theta), n))
    a = tl.where(large, t, 0.0) + 1.0
    inverse_t = 1.0 / tl.where(large, tl.where(near_poisson, t, a), _STIRLING_FROM)
    ratio = log1p((theta - 1.0) * inverse_t)

    # Each of these branches is seldom needed by any element: large counts need only the second one, and counts of a
    # distribution near the Poisson none of the two.
    log_factorial = tl.zeros(t.shape, tl.float64)
    log_gamma_n = log_factorial
    digamma_n = log_factorial
    if tl.min(large.to(tl.int32), 0) == 0:
        log_factorial, _ = gamma_parts(tl.where(large, 0.0, t) + 1.0)
        log_gamma_n, digamma_n = gamma_parts(tl.where(large | near_poisson, 1.0, n))
    log_gamma_theta = tl.zeros(t.shape, tl.float64)
    digamma_theta = log_gamma_theta
    if tl.min(near_poisson.to(tl.int32), 0) == 0:
        log_gamma_theta, digamma_theta = gamma_parts(tl.where(near_poisson, 1.0, theta))
    rest_n = log_gamma_rest(inverse_n)
    digamma_rest_n = digamma_rest(inverse_n)
    rest_t = log_gamma_rest(inverse_t)

    rest = log_gamma_rest(inverse_theta) - rest_n
    near = tl.where(
        large,
        theta * first + t * second + (0.5 * third + (_HALF_LOG_2PI + rest_t + rest)),
        (n * first + t) - t * log_mu + (0.5 * second + (log_factorial + rest)),
    )
    difference = (n - 0.5) * ratio + (theta - 1.0) * (third - ratio - 1.0) + (rest_n - rest_t)
    zeros = theta * first + t * second + log_gamma_theta
    dispersed = tl.where(large, zeros - difference, zeros + (log_factorial - log_gamma_n))

    d_near = excess - 0.5 * t_theta * inverse_n + (digamma_rest_n - digamma_rest(inverse_theta))
    digamma_n = tl.where(large, third - 0.5 * inverse_n - digamma_rest_n, digamma_n)
    d_dispersed = excess + t * inverse_sum - (digamma_n - digamma_theta)
    return tl.where(near_poisson, near, dispersed), d * share, tl.where(near_poisson, d_near, d_dispersed)


@triton.jit
def other_count(t, lead, dispersion, offset, RAW: tl.constexpr):
    """The nll of any count above zero and its derivatives, in float64. The arguments are those of small_count."""
    theta, lost = dispersion_of_others(dispersion, RAW)
    if RAW:
        unbounded = lead + offset
        log_mu = bounded(unbounded, -670.0, 670.0)
        mu = tl.exp(log_mu)
        # Below the lower bound, the nll is -t log mu plus a constant.
        lost += t * tl.where(unbounded < log_mu, log_mu - unbounded, 0.0)
    else:
        mu = lead + offset
        log_mu = tl.log(mu)
    value, d_lead, d_theta = positive_term(t, mu, log_mu, theta)
    if RAW:
        d_theta *= theta
    else:
        d_lead = d_lead / mu
    return value + lost, d_lead, d_theta


@triton.jit
def poisson_term(t, mu, log_mu):
    """-log Poisson(t; mu) of a count above zero, in float64. `mu` may have underflowed, so its logarithm is given too.

    The formula for large t is that of `poisson_rate`.
    """
    large = t >= _STIRLING_FROM
    some = tl.where(large, t, _STIRLING_FROM)
    log_some = tl.log(some)
    d = mu - some
    e = d / some
    s = e / (2.0 + e)
    series = polynomial(s * s, LOG1P_SERIES_64)
    cancelled = tl.where(tl.abs(e) < 0.5, some * (s * (e - s * s * series)), d - some * (log_mu - log_some))
    of_large = cancelled + 0.5 * log_some + (_HALF_LOG_2PI + log_gamma_rest(1.0 / some))
    few = tl.where(large, 0.0, t)
    log_factorial, _ = gamma_parts(few + 1.0)
    return tl.where(large, of_large, mu - few * log_mu + log_factorial)
