"""The likelihoods of counts: the elements of the Poisson, and the kernel of the negative binomials.

The negative binomials, with or without additional zeros, describe the counts of genes in cells. csrc/math/counts.h has
their formulas and explains them. Most counts are zeros, so the kernel first computes every element as if its count were
0, in the type of computation C. Then it lists the places of the other counts, tile by tile, computes these in float64,
and overwrites the first results.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._spec import VARIANTS
from .element import Element
from .elementary import exp, exp_minus_1_minus, log1p, log_factorial, polynomial
from .launch import (
    COMPUTE,
    dense_rows,
    divisor,
    kernel,
    launch,
    number,
    row_dtype,
    row_stride,
    weight_view,
)
from .tiles import by_weight, load_weights

# 2 (1/3 + s^2/5 + s^4/7 + ...), for log(1 + x) = 2 (s + s^3/3 + ...) with s = x / (2 + x), for |x| < 1/2.
_LOG1P_32: tl.constexpr = tl.constexpr((2 / 13, 2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3))
_LOG1P_64: tl.constexpr = tl.constexpr(tuple(2 / n for n in range(25, 1, -2)))
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
    series = polynomial(s * s, _LOG1P_64 if m.dtype == tl.float64 else _LOG1P_32)
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
def log1p_excess(x, log_1_x, inverse):
    """log(1 + x) - x / (1 + x) with full relative accuracy near 0, given log(1 + x) and 1 / (1 + x)."""
    s = x / (2.0 + x)
    square = s * s
    series = polynomial(square, _LOG1P_64 if x.dtype == tl.float64 else _LOG1P_32)
    return tl.where(tl.abs(x) < 0.5, square * (s * series + 2.0 / (1.0 + s)), log_1_x - x * inverse)


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
    """The inverse dispersion for counts of 0. With RAW, `given` is its logarithm."""
    LOW: tl.constexpr = _LOWEST_LOG_64 if given.dtype == tl.float64 else _LOWEST_LOG_32
    HIGH: tl.constexpr = _HIGHEST_LOG_64 if given.dtype == tl.float64 else _HIGHEST_LOG_32
    if RAW:
        theta = exp(bounded(given, LOW, HIGH))
    else:
        theta = bounded(
            given,
            5.08e-283 if given.dtype == tl.float64 else 1.22e-37,
            3.77e260 if given.dtype == tl.float64 else 1.14e26,
        )
    return theta


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
def zero_term(mu, theta):
    """-log NB(0) and its derivatives by mu and theta."""
    # Beyond this bound, the reciprocal of 1 + x would be lost.
    x = bounded(mu / theta, 0.0, 1e307 if mu.dtype == tl.float64 else 8e37)
    inverse = 1.0 / (1.0 + x)
    log_1_x = log1p(x)
    return theta * log_1_x, inverse, log1p_excess(x, log_1_x, inverse)


@triton.jit
def with_additional_zeros(z, pi):
    """-log(p + (1 - p) e^-z), p = sigmoid(pi), and its derivatives by z and pi."""
    BOUND: tl.constexpr = (
        700.0 if z.dtype == tl.float64 else 80.0
    )  # its exponential is neither 0 nor infinite
    odds = tl.exp(bounded(pi, -BOUND, BOUND))
    decayed = tl.exp(-z)
    q = 1.0 / (odds + decayed)
    # The first difference alone would not do: the compiler joins it to the product that z is, and then only one of the
    # two z is rounded.
    lost = tl.where(z < 1.0, z - exp_minus_1_minus(-z, decayed), 1.0 - decayed)  # 1 - e^-z
    r = lost * q
    # Where both terms are too small for their sum, the value is computed from the larger one.
    far = (pi < -BOUND) & (z > BOUND / 2)
    difference = z + pi
    e = tl.exp(-tl.abs(difference))
    share = tl.where(difference < 0.0, 1.0, e) / (1.0 + e)
    value = tl.where(far, tl.minimum(-pi, z) - log1p(e), log1p(r))
    d_z = tl.where(far, share, decayed * q)
    d_pi = tl.where(far, share - 1.0, -r * (odds / (1.0 + odds)))
    return value, d_z, d_pi


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
    share = theta / (theta + mu)
    large = t >= _STIRLING_FROM
    near_poisson = theta >= _STIRLING_FROM
    both = large & near_poisson
    inverse_n = 1.0 / tl.where(n >= _STIRLING_FROM, n, _STIRLING_FROM)
    inverse_theta = 1.0 / tl.where(near_poisson, theta, _STIRLING_FROM)
    t_theta = t / theta

    # Each logarithm is computed once, with the argument that the element's case needs.
    e = tl.where(near_poisson, d / n, mu / theta)
    first = log1p(e)
    excess = log1p_excess(e, first, tl.where(near_poisson, n / (theta + mu), share))
    second = log1p(
        tl.where(both, -theta * e / mu, tl.where(near_poisson, t_theta, theta / mu))
    )  # in the first case, e is d / n
    third = tl.log(tl.where(near_poisson, t * (1.0 + t_theta), n))
    a = tl.where(large, t, 0.0) + 1.0
    ratio = log1p((theta - 1.0) / a)

    log_factorial, _ = gamma_parts(tl.where(large, 0.0, t) + 1.0)
    log_gamma_theta, digamma_theta = gamma_parts(tl.where(near_poisson, 1.0, theta))
    log_gamma_n, digamma_n = gamma_parts(tl.where(large | near_poisson, 1.0, n))
    rest_n = log_gamma_rest(inverse_n)
    digamma_rest_n = digamma_rest(inverse_n)
    rest = log_gamma_rest(inverse_theta) - rest_n

    rest_t = log_gamma_rest(1.0 / tl.where(large, t, _STIRLING_FROM))
    near = tl.where(
        large,
        theta * first + t * second + (0.5 * third + (_HALF_LOG_2PI + rest_t + rest)),
        (n * first + t) - t * log_mu + (0.5 * second + (log_factorial + rest)),
    )
    difference = (n - 0.5) * ratio + (theta - 1.0) * (third - ratio - 1.0)
    difference += rest_n - log_gamma_rest(1.0 / tl.where(large, a, _STIRLING_FROM))
    zeros = theta * first + t * second + log_gamma_theta
    dispersed = tl.where(large, zeros - difference, zeros + (log_factorial - log_gamma_n))

    d_near = excess - 0.5 * t_theta / n + (digamma_rest_n - digamma_rest(inverse_theta))
    digamma_n = tl.where(large, third - 0.5 * inverse_n - digamma_rest_n, digamma_n)
    d_dispersed = excess + t / (theta + mu) - (digamma_n - digamma_theta)
    return tl.where(near_poisson, near, dispersed), d * share, tl.where(near_poisson, d_near, d_dispersed)


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
    series = polynomial(s * s, _LOG1P_64)
    cancelled = tl.where(tl.abs(e) < 0.5, some * (s * (e - s * s * series)), d - some * (log_mu - log_some))
    of_large = cancelled + 0.5 * log_some + (_HALF_LOG_2PI + log_gamma_rest(1.0 / some))
    few = tl.where(large, 0.0, t)
    log_factorial, _ = gamma_parts(few + 1.0)
    return tl.where(large, of_large, mu - few * log_mu + log_factorial)


@triton.jit
def grad_of_empty(
    mean,
    target,
    zero_logits,
    genes,
    top,
    weights,
    weights_size_0,
    weights_size_1,
    weights_size_2,
    weights_stride_0,
    weights_stride_1,
    weights_stride_2,
    weights_stride_3,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
):
    """The derivative of a cell's nll by a library of 0, times the sum of e^(logit - top).

    The formula is explained at at_ends in csrc/cpu/counts.cpp.
    """
    shares = tl.zeros((COLUMNS,), C)
    for start in range(0, genes, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < genes
        share = exp(tl.load(mean + columns, inside, -float("inf")).to(C) - top)
        if zero_logits is not None:
            share /= 1.0 + exp(tl.load(zero_logits + columns, inside, 0.0).to(C))
        share = tl.where(tl.load(target + columns, inside, 0) == 0, share, -float("inf"))
        if WEIGHTED > 0:
            share = by_weight(
                load_weights(
                    weights,
                    columns,
                    inside,
                    weights_size_0,
                    weights_size_1,
                    weights_size_2,
                    weights_stride_0,
                    weights_stride_1,
                    weights_stride_2,
                    weights_stride_3,
                    WEIGHTED,
                    C,
                ),
                share,
            )
        shares += share
    return tl.sum(shares, 0)


@kernel
def count_kernel(
    mean,  # (rows, genes), with any stride of rows; with RAW, logits
    dispersion,  # (rows, genes), or one row for all with stride 0; with RAW, logarithms
    zero_logits,  # (rows, genes), or None
    library,  # with RAW, (rows,)
    target,
    weights,  # the weights of elements (target_rows, genes), or None; this and the next eight are in a WeightView
    weights_stride: "number",
    weights_size_0: "number",
    weights_size_1: "number",
    weights_size_2: "number",
    weights_stride_0: "number",
    weights_stride_1: "number",
    weights_stride_2: "number",
    weights_stride_3: "number",
    d_mean,  # out, or None: (rows, genes), dense, as are the next two
    d_dispersion,
    d_zero_logits,
    d_library,  # out, or None: (rows,)
    row_sums,  # out: (rows,) in C
    element_values,  # out, or None: (rows, genes) in C, dense, times the factor of the derivatives; not with RAW
    log_grads,  # with RAW, room for (rows, genes) in C
    places,  # room for (rows, COLUMNS) int16
    grad_loss,  # see row_factor in tiles.py
    grad_nll,
    weight: tl.float64,
    eps: tl.float64,  # added to the mean; not with RAW
    genes: "number",  # this and the strides of rows in units of UNIT elements
    mean_stride: "number",
    dispersion_stride: "number",
    zero_stride: "number",
    library_stride: "number",
    target_stride: "number",
    target_rows: "number",  # see elementwise.py
    grad_loss_stride: "number",
    grad_nll_stride: "number",
    REPEATED: tl.constexpr,
    WEIGHTED: tl.constexpr,  # KIND of the weights
    RAW: tl.constexpr,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
    C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    genes = genes * UNIT
    mean += row * mean_stride * UNIT
    dispersion += row * dispersion_stride * UNIT
    data_row = row
    if REPEATED:
        data_row = row % target_rows
    target += data_row * target_stride * UNIT
    if WEIGHTED > 0:
        weights += data_row * weights_stride
    if zero_logits is not None:
        zero_logits += row * zero_stride * UNIT
    dense = row * genes
    if grad_loss is None and grad_nll is None:
        factor = tl.full((), weight, C)
    else:
        factor = tl.full((), 0.0, C)
        if grad_loss is not None:
            factor += tl.load(grad_loss + row * grad_loss_stride).to(C) * tl.full((), weight, C)
        if grad_nll is not None:
            factor += tl.load(grad_nll + row * grad_nll_stride).to(C)

    if RAW:
        largest = tl.full((COLUMNS,), -float("inf"), C)
        for start in range(0, genes, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            largest = tl.maximum(largest, tl.load(mean + columns, columns < genes, -float("inf")).to(C))
        top = tl.max(largest, 0)
        exponentials = tl.zeros((COLUMNS,), C)
        for start in range(0, genes, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            logits = tl.load(mean + columns, columns < genes, -float("inf")).to(C)
            exponentials += exp(logits - top)
        total = tl.sum(exponentials, 0)
        size = tl.load(library + row * library_stride).to(C)
        scale = bounded(size / total, 0.0, 1.79e308 if C == tl.float64 else 3.4e38)
        log_offset = tl.log(size.to(tl.float64)) - top.to(tl.float64) - tl.log(total.to(tl.float64))

    values = tl.zeros((COLUMNS,), C)
    grads = tl.zeros((COLUMNS,), C)
    other_values = tl.zeros((PLACES,), tl.float64)
    other_grads = tl.zeros((PLACES,), tl.float64)
    if WEIGHTED > 0:
        weighs = tl.zeros((COLUMNS,), tl.int32)
    places += row * COLUMNS
    for start in range(0, genes, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < genes
        mu = tl.load(mean + columns, inside, 1.0).to(C)
        theta = tl.load(dispersion + columns, inside, 1.0).to(C)
        t = tl.load(target + columns, inside, 0).to(C)
        kept = inside
        if WEIGHTED > 0:
            own = load_weights(
                weights,
                columns,
                inside,
                weights_size_0,
                weights_size_1,
                weights_size_2,
                weights_stride_0,
                weights_stride_1,
                weights_stride_2,
                weights_stride_3,
                WEIGHTED,
                C,
            )
            kept = inside & (own != 0.0)
            weighs = tl.where(kept, 1, weighs)
        if RAW:
            mu = exp(mu - top) * scale
        else:
            mu += tl.full((), eps, C)
        theta = dispersion_of_zeros(theta, RAW)
        value, d_mu, d_theta = zero_term(mu, theta)
        if zero_logits is not None:
            pi = tl.load(zero_logits + columns, inside, 0.0).to(C)
            value, d_z, d_pi = with_additional_zeros(value, pi)
            d_mu *= d_z
            d_theta *= d_z
            if WEIGHTED > 0:
                d_pi = by_weight(own, d_pi)
            if d_zero_logits is not None:
                tl.store(
                    d_zero_logits + dense + columns,
                    (d_pi * factor).to(d_zero_logits.dtype.element_ty),
                    inside,
                )
        if RAW:
            d_mu *= mu
            d_theta *= theta
        if WEIGHTED > 0:
            value = by_weight(own, value)
            d_mu = by_weight(own, d_mu)
            d_theta = by_weight(own, d_theta)
        if element_values is not None:
            tl.store(element_values + dense + columns, value * factor, inside)
        is_zero = kept & (t == 0.0)
        values += tl.where(is_zero, value, 0.0)
        if RAW:
            grads += tl.where(is_zero, d_mu, 0.0)
            if log_grads is not None:
                tl.store(log_grads + dense + columns, d_mu, inside)
        elif d_mean is not None:
            tl.store(d_mean + dense + columns, (d_mu * factor).to(d_mean.dtype.element_ty), inside)
        if d_dispersion is not None:
            tl.store(
                d_dispersion + dense + columns,
                (d_theta * factor).to(d_dispersion.dtype.element_ty),
                inside,
            )

        other = kept & (t != 0.0)
        position = tl.cumsum(other.to(tl.int32), 0) - 1
        count = tl.sum(other.to(tl.int32), 0)
        tl.store(places + position, (columns - start).to(tl.int16), other)
        # All threads must have written the places and the derivatives of zeros before other threads read or overwrite
        # them.
        tl.debug_barrier()
        for begin in range(0, count, PLACES):
            j = begin + tl.arange(0, PLACES)
            there = j < count
            place = start + tl.load(places + j, there, 0).to(tl.int32)
            other_t = tl.load(target + place, there, 1).to(C).to(tl.float64)
            other_mu = tl.load(mean + place, there, 1.0).to(C).to(tl.float64)
            other_theta = tl.load(dispersion + place, there, 1.0).to(C).to(tl.float64)
            if RAW:
                unbounded = other_mu + log_offset
                log_mu = bounded(unbounded, -670.0, 670.0)
                other_mu = tl.exp(log_mu)
            else:
                other_mu += tl.full((), eps, tl.float64)
                log_mu = tl.log(other_mu)
            other_theta, lost = dispersion_of_others(other_theta, RAW)
            other_value, d_log_mu, other_d_theta = positive_term(other_t, other_mu, log_mu, other_theta)
            other_value += lost
            if RAW:
                # Below the lower bound, the nll is -t log mu plus a constant.
                other_value += other_t * tl.where(unbounded < log_mu, log_mu - unbounded, 0.0)
                other_d_theta *= other_theta
            if WEIGHTED > 0:
                other_weight = load_weights(
                    weights,
                    place,
                    there,
                    weights_size_0,
                    weights_size_1,
                    weights_size_2,
                    weights_stride_0,
                    weights_stride_1,
                    weights_stride_2,
                    weights_stride_3,
                    WEIGHTED,
                    C,
                ).to(tl.float64)
                d_log_mu *= other_weight
                other_d_theta *= other_weight
            if zero_logits is not None:
                other_pi = tl.load(zero_logits + place, there, 0.0).to(C).to(tl.float64)
                other_e = tl.exp(-tl.abs(other_pi))
                other_value += tl.where(other_pi > 0.0, other_pi, 0.0) + log1p(other_e)
                if d_zero_logits is not None:
                    other_d_pi = tl.where(other_pi < 0.0, other_e, 1.0) / (1.0 + other_e)
                    if WEIGHTED > 0:
                        other_d_pi *= other_weight
                    tl.store(
                        d_zero_logits + dense + place,
                        (other_d_pi * factor).to(C).to(d_zero_logits.dtype.element_ty),
                        there,
                    )
            if WEIGHTED > 0:
                other_value *= other_weight
            if element_values is not None:
                tl.store(element_values + dense + place, (other_value * factor).to(C), there)
            other_values += tl.where(there, other_value, 0.0)
            if RAW:
                other_grads += tl.where(there, d_log_mu, 0.0)
                if log_grads is not None:
                    tl.store(log_grads + dense + place, d_log_mu.to(C), there)
            elif d_mean is not None:
                tl.store(
                    d_mean + dense + place,
                    (d_log_mu / other_mu * factor).to(C).to(d_mean.dtype.element_ty),
                    there,
                )
            if d_dispersion is not None:
                tl.store(
                    d_dispersion + dense + place,
                    (other_d_theta * factor).to(C).to(d_dispersion.dtype.element_ty),
                    there,
                )
        tl.debug_barrier()

    row_sum = (tl.sum(values, 0).to(tl.float64) + tl.sum(other_values, 0)).to(C)
    if WEIGHTED > 0:
        any_weight = tl.max(weighs, 0) > 0
    if RAW:
        infinite = size == float("inf")
        if WEIGHTED > 0:
            infinite = infinite & any_weight
        row_sum = tl.where(infinite, row_sum + size, row_sum)
    tl.store(row_sums + row, row_sum)
    if RAW:
        grad = (tl.sum(grads, 0).to(tl.float64) + tl.sum(other_grads, 0)).to(C)
        if d_library is not None:
            by_library = grad / size
            if size == 0.0:
                by_library = grad_of_empty(
                    mean,
                    target,
                    zero_logits,
                    genes,
                    top,
                    weights,
                    weights_size_0,
                    weights_size_1,
                    weights_size_2,
                    weights_stride_0,
                    weights_stride_1,
                    weights_stride_2,
                    weights_stride_3,
                    WEIGHTED,
                    COLUMNS,
                    C,
                )
                by_library /= total
            if WEIGHTED > 0:
                by_library = tl.where(any_weight, by_library, 0.0)
            tl.store(d_library + row, (factor * by_library).to(d_library.dtype.element_ty))
        if d_mean is not None:
            # The derivative by logit g is the derivative by log mu_g minus gene g's share of the sum over all genes.
            part = grad / total
            for start in range(0, genes, COLUMNS):
                columns = start + tl.arange(0, COLUMNS)
                inside = columns < genes
                d = tl.load(log_grads + dense + columns, inside, 0.0)
                d -= exp(tl.load(mean + columns, inside, 0.0).to(C) - top) * part
                if WEIGHTED > 0:  # without any weight there is no derivative, whatever the logits are
                    d = tl.where(any_weight, d, 0.0)
                tl.store(d_mean + dense + columns, (d * factor).to(d_mean.dtype.element_ty), inside)


class Form(NamedTuple):
    """Where a likelihood keeps its params. The dispersion is always the second one."""

    raw: bool
    zero_logits: int | None
    library: int | None

    @property
    def tensors(self) -> int:
        return 2 + (self.zero_logits is not None) + (self.library is not None)


def _form(tensors: Sequence[str]) -> Form:
    place = {name: i for i, name in enumerate(tensors)}
    return Form("library" in place, place.get("zi_logits"), place.get("library"))


FORMS = {
    variant.name: _form(variant.tensors)
    for variant in VARIANTS.values()
    if variant.density.endswith("negative_binomial")
}


def shared_bit(likelihood: str, params: Sequence[Tensor]) -> int:
    """The bit of a param that all rows share. With a factor for each row, its gradient must be computed again."""
    return 2 if likelihood in FORMS and params[1].dim() == 1 else 0


def dense_counts(values: Tensor, starts: Tensor, columns: Tensor, shape: torch.Size) -> Tensor:
    """A sparse target as a dense matrix, which the kernel reads."""
    values = values if values.is_floating_point() or values.dtype == torch.int64 else values.to(torch.int32)
    index = torch.searchsorted(starts, torch.arange(values.numel(), device=values.device), right=True) - 1
    return values.new_zeros(shape).index_put_((index, columns), values, accumulate=True)


def evaluate(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    needs: int,
    weight: float,
    *,
    grad_loss: Tensor | None = None,
    grad_nll: Tensor | None = None,
    values: bool = True,
    element_values: Tensor | None = None,
    element_weight: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Run count_kernel, as elementwise.evaluate runs the kernel of elements. It always computes the values."""
    form, lead = FORMS[likelihood], params[0]
    rows, genes = lead.shape
    dtype = row_dtype(lead)
    if len(params) > form.tensors:
        starts, columns = params[-2:]
        target = dense_counts(target, starts, columns, torch.Size((starts.numel() - 1, genes)))
    mean, data = dense_rows(lead), dense_rows(target)
    shared = params[1].dim() == 1
    dispersion = params[1].contiguous() if shared else dense_rows(params[1])
    zero_logits = dense_rows(params[form.zero_logits]) if form.zero_logits is not None else None
    library = params[form.library] if form.library is not None else None

    of_element = lead.dtype if element_values is None else dtype

    def room(wanted: bool, dtype: torch.dtype = of_element) -> Tensor | None:
        return lead.new_empty((rows, genes), dtype=dtype) if wanted else None

    d_mean = room(bool(needs & 1))
    # The gradient of a shared dispersion is summed over the rows afterwards, in an order that does not depend on the
    # launch.
    d_dispersion = room(bool(needs & 2), dtype if shared else of_element)
    d_zero_logits = room(form.zero_logits is not None and bool(needs >> form.zero_logits & 1))
    d_library = (
        torch.empty_like(library) if library is not None and needs >> (form.library or 0) & 1 else None
    )
    log_grads = None
    if form.raw and d_mean is not None:
        log_grads = d_mean if d_mean.dtype == dtype else room(True, dtype)
    row_sums = lead.new_empty((rows, 1), dtype=dtype)
    # In a full tile, a thread has four elements, or two in float64, and half as many with weights. Their arithmetic
    # takes most of its registers.
    widest = 512 if dtype == torch.float32 else 256
    columns = min(widest, max(16, triton.next_power_of_2(genes)))
    strides = [
        t.stride(0) if t is not None and t.dim() == 2 else 0 for t in (mean, dispersion, zero_logits, data)
    ]
    unit = divisor(genes, *strides)
    weights = weight_view(element_weight, data.shape)
    launch(
        count_kernel,
        rows,
        lead.device,
        mean,
        dispersion,
        zero_logits,
        library,
        data,
        *weights.arguments,
        d_mean,
        d_dispersion,
        d_zero_logits,
        d_library,
        row_sums,
        element_values,
        log_grads,
        torch.empty((rows, columns), dtype=torch.int16, device=lead.device),
        grad_loss,
        grad_nll,
        weight,
        0.0 if form.raw else constants[0],
        genes // unit,
        strides[0] // unit,
        strides[1] // unit,
        strides[2] // unit,
        library.stride(0) if library is not None else 0,
        strides[3] // unit,
        data.shape[0],
        row_stride(grad_loss),
        row_stride(grad_nll),
        REPEATED=data.shape[0] != rows,
        WEIGHTED=weights.kind,
        RAW=form.raw,
        UNIT=unit,
        COLUMNS=columns,
        PLACES=min(128, columns),
        C=COMPUTE[dtype],
        num_warps=max(1, (8 if weights.kind else 4) * columns // widest),
    )
    if shared and d_dispersion is not None and element_values is None:
        d_dispersion = d_dispersion.sum(0).to(params[1].dtype)
    by_param = {0: d_mean, 1: d_dispersion, form.zero_logits: d_zero_logits, form.library: d_library}
    gradients = [by_param[i] for i in range(form.tensors) if needs >> i & 1]
    return [gradient for gradient in gradients if gradient is not None], row_sums, None
