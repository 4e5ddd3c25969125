"""The elementary functions that the likelihoods, the KL and the noise use, in Triton.

Each function takes and returns tiles of float32 or float64. The hardware's float32 functions (2^x, log2, sine) are used
where they are accurate enough. Elsewhere they are corrected, or replaced by a polynomial. libdevice is not used,
because it exists on NVIDIA only.
"""

import triton
import triton.language as tl

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950216293335)  # log2(e), rounded to float32
_HALF_LOG_2PI: tl.constexpr = tl.constexpr(0.9189385332046727)
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

# (expm1(v) - v) / v^2 for |v| < 1, with the highest power first. For float32 it is a fit with relative error 2e-8, and
# for float64 the Taylor series 1/18!, ..., 1/2!, which is exact there.
_SERIES_32: tl.constexpr = tl.constexpr(
    (
        2.80628024e-06,
        2.53585131e-05,
        0.000198381022,
        0.00138853968,
        0.00833333936,
        0.041666735,
        0.166666672,
        0.5,
    )
)
_SERIES_64: tl.constexpr = tl.constexpr(
    (
        1.5619206968586225e-16,
        2.8114572543455206e-15,
        4.779477332387385e-14,
        7.647163731819816e-13,
        1.1470745597729725e-11,
        1.6059043836821613e-10,
        2.08767569878681e-09,
        2.505210838544172e-08,
        2.755731922398589e-07,
        2.7557319223985893e-06,
        2.48015873015873e-05,
        0.0001984126984126984,
        0.001388888888888889,
        0.008333333333333333,
        0.041666666666666664,
        0.16666666666666666,
        0.5,
    )
)

# log1p(s) / s for s in [0, 1], with relative error 2e-8.
_LOG1P: tl.constexpr = tl.constexpr(
    (
        -0.00317605701,
        0.0195425265,
        -0.0563736111,
        0.105436236,
        -0.152696669,
        0.196632743,
        -0.249516159,
        0.333297104,
        -0.499998927,
        1.0,
    )
)


# log Gamma(t + 1) / (t (t - 1)) for t in [0, 2], with relative error 2e-8.
_SMALL_FACTORIAL: tl.constexpr = tl.constexpr(
    (
        -3.63155232e-05,
        0.000477342051,
        -0.00283509935,
        0.0101589505,
        -0.0249239597,
        0.0456450246,
        -0.0677630454,
        0.0893085077,
        -0.114591829,
        0.155378178,
        -0.245249093,
        0.577215672,
    )
)

# log(t!) - (t log t - t + log(2 pi t) / 2) as a multiple of 1 / t, in powers of 1 / t^2. For float32 it is a fit for
# t >= 2 with absolute error 5e-9, and for float64 the asymptotic series, which is exact for t >= 16.
_STIRLING_32: tl.constexpr = tl.constexpr((-0.000349723909, 0.000761539966, -0.00277628028, 0.0833333209))
_STIRLING_64: tl.constexpr = tl.constexpr(
    (1 / 156, -691 / 360360, 1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12)
)


@triton.constexpr_function
def _count(coefficients):
    return len(coefficients)


@triton.jit
def polynomial(x, HIGHEST_FIRST: tl.constexpr):
    """The polynomial at `x`, by Horner's scheme."""
    total = x * HIGHEST_FIRST[0] + HIGHEST_FIRST[1]
    for i in tl.static_range(2, _count(HIGHEST_FIRST)):
        total = total * x + HIGHEST_FIRST[i]
    return total


@triton.jit
def exp(x):
    """e^x with nearly the accuracy of 2^x: at |x| = 40, its relative error is 5e-7, and that of tl.exp is 2e-6.

    tl.exp rounds x log2(e) before it computes 2^x, with an error of half a unit of a number that may be large. This
    function computes the rounding error and corrects for it.
    """
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        scaled = x * _LOG2_E
        lost = tl.fma(x, _LOG2_E, -scaled)
        # An infinite x has no rounding error, but inf - inf is NaN.
        lost = tl.where(tl.abs(scaled) < 1024.0, lost, 0.0)
        result = tl.exp2(scaled) * (1.0 + lost * _LN_2)
    return result


@triton.jit
def inverse_root(log_scale):
    """e^(-log_scale / 2), which is finite for every scale. Multiplying a distance by it twice divides by the scale.

    inverse_root in csrc/math/elementary.h gives the reasons.
    """
    LOWEST: tl.constexpr = -1418.0 if log_scale.dtype == tl.float64 else -177.0
    return exp(-0.5 * tl.where(log_scale < LOWEST, LOWEST, log_scale))


@triton.jit
def plus(size, summand):
    """`size` + `summand`. An infinite `size` is the result whatever the summand, so inf - inf does not occur."""
    return tl.where(tl.abs(size) == float("inf"), size, size + summand)


@triton.jit
def missed(size, miss):
    """`size` times `miss`. A miss of 0 gives 0 even for an infinite size."""
    return tl.where(miss == 0.0, 0.0, size * miss)


@triton.jit
def exp_minus_1_minus(v, exp_v):
    """expm1(v) - v with full relative accuracy near 0, where a posterior collapses. `exp_v` is e^v."""
    series = polynomial(v, _SERIES_64 if v.dtype == tl.float64 else _SERIES_32)
    # v is capped, because an infinite e^v minus an infinite v would be NaN.
    return tl.where(tl.abs(v) < 1.0, v * v * series, exp_v - 1.0 - tl.where(v > 800.0, 800.0, v))


@triton.jit
def tanh(x):
    """(tanh(x), its derivative)."""
    twice = 2.0 * tl.abs(x)
    e = exp(-twice)
    inverse = 1.0 / (1.0 + e)
    size = tl.where(twice < 1.0, twice - exp_minus_1_minus(-twice, e), 1.0 - e) * inverse
    return tl.where(x < 0.0, -size, size), 4.0 * e * inverse * inverse


@triton.jit
def log1p(s):
    """log(1 + s) for s >= 0."""
    if s.dtype == tl.float64:
        sum = 1.0 + s
        # The second term is, to first order, what rounding 1 + s loses of s. An infinite s loses nothing.
        result = tl.log(sum) - tl.where(sum < float("inf"), ((sum - 1.0) - s) / sum, 0.0)
    else:
        result = tl.where(s < 1.0, s * polynomial(s, _LOG1P), tl.log(1.0 + s))
    return result


@triton.jit
def combine_excess(s, e):
    """(1 + s) (1 + e) - 1. Products of many 1 + e are kept minus 1, so that a tiny e is not lost in them.

    With this, a sum of log(1 + e) needs one logarithm for many elements, and is still accurate to all digits for rows
    of saturated logits.
    """
    return s * (1.0 + e) + e


@triton.jit
def log_factorial(t, large):
    """(log t, log t! - t log t + t) where `large`, that is from 2 on (float64: 16), and elsewhere (_, _, log t!).

    log t! is exactly 0 for t = 0 and t = 1. For fractions it is log Gamma(t + 1).
    """
    # Below 16, float64 computes t! from (t + 16)!.
    n = tl.where(large, t, t + 16.0 if t.dtype == tl.float64 else 1.0)
    log_n = tl.log(n)
    inverse = 1.0 / n
    series = polynomial(inverse * inverse, _STIRLING_64 if t.dtype == tl.float64 else _STIRLING_32)
    rest = 0.5 * log_n + inverse * series + _HALF_LOG_2PI
    if t.dtype == tl.float64:
        product = t + 1.0
        for i in tl.static_range(2, 17):
            product *= t + i
        small = n * log_n - n + rest - tl.log(tl.where(large, 1.0, product))
        small = tl.where((t == 0.0) | (t == 1.0), 0.0, small)
    else:
        small = t * (t - 1.0) * polynomial(t, _SMALL_FACTORIAL)
    return log_n, rest, small
