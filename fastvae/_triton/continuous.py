"""The elements of the densities of real numbers and of the Bernoulli. element.py explains elements."""

import math
from collections.abc import Sequence

import triton
import triton.language as tl

from ..reference.continuous import log_beta_half
from .element import Element
from .elementary import exp, inverse_root, log1p, missed, plus, polynomial, tanh

_HALF_LOG_2PI: tl.constexpr = tl.constexpr(0.9189385332046727)
_LOG_2: tl.constexpr = tl.constexpr(0.6931471805599453)

# B_2n / (2n (2n)!) and B_2n / (2n)!: the Taylor series of log(sinh(a/2) / (a/2)) and its derivative, as multiples of
# a^2 and a, in powers of a^2. The series are exact in float64 for |a| < 1/2. The float32 coefficients are fits for
# |a| < 2, with relative errors 3e-8 and 5e-8.
_LOG_SINE_64: tl.constexpr = tl.constexpr(
    (
        -2.1185501852016142e-14,
        9.55895466477477e-13,
        -4.403491782239578e-11,
        2.08767569878681e-09,
        -1.033399470899471e-07,
        5.5114638447971785e-06,
        -1 / 2880,
        1 / 24,
    )
)
_COTANGENT_64: tl.constexpr = tl.constexpr(
    (
        -3.3896801963225827e-13,
        1.3382536530684679e-11,
        -5.284190138687493e-10,
        2.08767569878681e-08,
        -8.267195767195768e-07,
        3.306878306878307e-05,
        -1 / 720,
        1 / 12,
    )
)
_LOG_SINE_32: tl.constexpr = tl.constexpr(
    (1.70277914e-09, -1.02051338e-07, 5.50965933e-06, -0.000347221328, 0.0416666679)
)
_COTANGENT_32: tl.constexpr = tl.constexpr(
    (1.63568714e-08, -8.11700431e-07, 3.30478215e-05, -0.00138887856, 0.0833333358)
)


@triton.jit
def bernoulli(logit, _, target, scalar, shape, offset):
    """-log Bernoulli(t; sigmoid(a)) = max(a, 0) - a t + log(1 + e^-|a|)."""
    e = tl.exp(-tl.abs(logit))
    grad = tl.where(logit < 0.0, e, 1.0) / (1.0 + e) - target
    # max(a, 0) - a t is |a| times the distance of t from the end that the sign of a favours.
    value = missed(tl.abs(logit), tl.where(logit < 0.0, target, 1.0 - target))
    return value, e, grad, 0.0, 0.0


@triton.jit
def gaussian(mean, _, target, logvar, shape, offset):
    """-log N(t; m, e^v), with one v for all elements."""
    root = inverse_root(0.5 * logvar)
    scaled = (mean - target) * root * root
    grad = scaled * root * root
    half_square = 0.5 * scaled * scaled
    return plus(half_square, 0.5 * logvar + _HALF_LOG_2PI), 0.0, grad, 0.0, 0.5 - half_square


@triton.jit
def gaussian_per_element(mean, logvar, target, scalar, shape, offset):
    """-log N(t; m, e^v), with a v for every element."""
    root = inverse_root(0.5 * logvar)
    scaled = (mean - target) * root * root
    grad = scaled * root * root
    half_square = 0.5 * scaled * scaled
    return plus(half_square, 0.5 * logvar + _HALF_LOG_2PI), 0.0, grad, 0.5 - half_square, 0.0


@triton.jit
def gaussian_bounded(mean, logvar, target, scalar, middle, half):
    """-log N(t; m, e^b), with a v per element, clamped smoothly to b = middle + half tanh((v - middle) / half)."""
    position, grad = tanh((logvar - middle) / half)
    bounded = middle + half * position
    value, _, mean_grad, bounded_grad, _ = gaussian_per_element(mean, bounded, target, scalar, middle, half)
    return value, 0.0, mean_grad, bounded_grad * grad, 0.0


@triton.jit
def _weighted_distance(difference, root):
    """(|difference| root^2, its gradient). The gradient is 0 in the kink and NaN where the difference is NaN."""
    weight = root * root
    grad = tl.where(difference > 0.0, weight, tl.where(difference < 0.0, -weight, difference))
    return tl.abs(difference) * root * root, grad


@triton.jit
def laplace(loc, _, target, log_scale, shape, offset):
    """-log Laplace(t; m, e^s), with one s for all elements."""
    distance, grad = _weighted_distance(loc - target, inverse_root(log_scale))
    return plus(distance, log_scale + _LOG_2), 0.0, grad, 0.0, 1.0 - distance


@triton.jit
def laplace_per_element(loc, log_scale, target, scalar, shape, offset):
    """-log Laplace(t; m, e^s), with an s for every element."""
    distance, grad = _weighted_distance(loc - target, inverse_root(log_scale))
    return plus(distance, log_scale + _LOG_2), 0.0, grad, 1.0 - distance, 0.0


@triton.jit
def continuous_bernoulli(a, _, target, scalar, shape, offset):
    """-log of the continuous Bernoulli: log((e^a - 1) / a) - a t. The mean is the derivative of the logarithm.

    At an infinite logit, all mass lies at one end: the nll is -inf there, and inf elsewhere.
    """
    wide: tl.constexpr = a.dtype == tl.float64
    size = tl.abs(a)
    # Near 0, the formulas for large |a| are evaluated at 2, which keeps them finite, and are not used.
    near = size < (0.5 if wide else 2.0)
    x = tl.where(near, 2.0, size)
    e = exp(-x)
    c = 1.0 - e
    rest = 1.0 / x - e / c
    far_mean = tl.where(a < 0.0, rest, 1.0 - rest)
    far = plus(missed(size, tl.where(a < 0.0, target, 1.0 - target)), tl.log(c / x))
    square = a * a
    near_mean = 0.5 + a * polynomial(square, _COTANGENT_64 if wide else _COTANGENT_32)
    close = a * (0.5 - target) + square * polynomial(square, _LOG_SINE_64 if wide else _LOG_SINE_32)
    return tl.where(near, close, far), 0.0, tl.where(near, near_mean, far_mean) - target, 0.0, 0.0


@triton.jit
def _student_t(loc, target, log_scale, df, offset):
    """(value, grad by loc, grad by log_scale) of -log of Student's t, whose normaliser is `offset`."""
    root = inverse_root(log_scale)
    inverse_df = 1.0 / tl.sqrt(df)
    distance = loc - target
    y = distance * root * root * inverse_df
    # Beyond this bound, 1 + y^2 rounds to y^2, and y may overflow. There, log |y| is computed from the logarithms of
    # the distance and of the scale, and its derivatives are 1 / distance and 1.
    far = tl.abs(y) > (1e9 if y.dtype == tl.float64 else 1e5)
    square = y * y
    inverse = 1.0 / tl.where(far, distance, 1.0 + square)
    log_distance = tl.log(tl.where(far, tl.abs(distance), 1.0)) + tl.log(inverse_df)
    half_log = tl.where(far, log_distance, 0.5 * log1p(tl.where(far, 0.0, square)))
    grad = tl.where(far, inverse, y * inverse * root * root * inverse_df)
    scale_grad = tl.where(far, 1.0, square * inverse)
    # Far out, (df + 1) log |y| contains -(df + 1) log_scale. With the summand log_scale, that is -df log_scale.
    of_scale = tl.where(far, -df, 1.0) * log_scale
    return (df + 1.0) * half_log + (of_scale + offset), (df + 1.0) * grad, 1.0 - (df + 1.0) * scale_grad


@triton.jit
def student_t(loc, _, target, log_scale, shape, offset):
    """-log of Student's t, with one log-scale for all elements."""
    value, grad, log_scale_grad = _student_t(loc, target, log_scale, shape, offset)
    return value, 0.0, grad, 0.0, log_scale_grad


@triton.jit
def student_t_per_element(loc, log_scale, target, scalar, shape, offset):
    """-log of Student's t, with a log-scale for every element."""
    value, grad, log_scale_grad = _student_t(loc, target, log_scale, shape, offset)
    return value, 0.0, grad, log_scale_grad, 0.0


@triton.jit
def gamma(log_scale, _, target, scalar, shape, offset):
    """-log Gamma(x; k, e^s) = k s - (k - 1) log x + x e^-s, plus its normaliser `offset`."""
    root = inverse_root(log_scale)
    # The exponential distribution, k = 1, has no term in log x.
    positive = target > 0.0
    ratio = target * root * root
    log_target = tl.where(positive, tl.log(tl.where(positive, target, 1.0)), -float("inf"))
    power = tl.where(shape == 1.0, 0.0, (shape - 1.0) * log_target)
    return plus(ratio - power, shape * log_scale + offset), 0.0, shape - ratio, 0.0, 0.0


# What the host computes from the constants of a variant. A fixed scale is the last of them; a learned scale is not
# among them.


def _gaussian_scalar(constants: Sequence[float]) -> float:
    return 2 * math.log(constants[0]) if constants else 0.0


def _laplace_scalar(constants: Sequence[float]) -> float:
    return math.log(constants[0]) if constants else 0.0


def _student_t_scalar(constants: Sequence[float]) -> float:
    return math.log(constants[1]) if len(constants) > 1 else 0.0


def _df(constants: Sequence[float]) -> float:
    return constants[0]


def _shape(constants: Sequence[float]) -> float:
    return constants[0]


def _log_gamma(constants: Sequence[float]) -> float:
    return math.lgamma(constants[0])


def _middle(constants: Sequence[float]) -> float:
    return constants[0] / 2 + constants[1] / 2


def _half(constants: Sequence[float]) -> float:
    return constants[1] / 2 - constants[0] / 2


def _student_t_offset(constants: Sequence[float]) -> float:
    return log_beta_half(constants[0]) + math.log(constants[0]) / 2


# The keys are the names of the variants in fastvae/_spec.py.
ELEMENTS = {
    "bernoulli": Element(bernoulli, log_term=True),
    "gaussian": Element(gaussian, scalar_of=_gaussian_scalar),
    "gaussian_per_element": Element(gaussian_per_element),
    "gaussian_bounded": Element(gaussian_bounded, warps_64=2, shape_of=_middle, offset_of=_half),
    "laplace": Element(laplace, scalar_of=_laplace_scalar),
    "laplace_per_element": Element(laplace_per_element),
    "continuous_bernoulli": Element(continuous_bernoulli),
    "gamma": Element(gamma, shape_of=_shape, offset_of=_log_gamma),
    "student_t": Element(student_t, scalar_of=_student_t_scalar, shape_of=_df, offset_of=_student_t_offset),
    "student_t_per_element": Element(student_t_per_element, shape_of=_df, offset_of=_student_t_offset),
}
