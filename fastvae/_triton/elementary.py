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

# (log(1 + f) - f) / f^2 for f in [-1/4, 1/2]: the logarithm's relative error is 5e-9.
_LOG1P_REST: tl.constexpr = tl.constexpr(
    (
        -0.0449096084,
        0.104483315,
        -0.131622323,
        0.144820616,
        -0.166477671,
        0.199906067,
        -0.250000546,
        0.333334544,
        -0.500000008,
    )
)

# (1 - e^-z) / z for z in [0, 0.35], with relative error 2e-8.
_DECAY: tl.constexpr = tl.constexpr((0.00721385516, -0.0413337015, 0.166625708, -0.499998242, 1.0))

# 2 (1/3 + s^2/5 + s^4/7 + ...), for log(1 + x) = 2 (s + s^3/3 + ...) with s = x / (2 + x), for |x| < 1/2.
LOG1P_SERIES_32: tl.constexpr = tl.constexpr((2 / 13, 2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3))
LOG1P_SERIES_64: tl.constexpr = tl.constexpr(tuple(2 / n for n in range(25, 1, -2)))

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
def exp_of_bounded(x):
    """`exp` for finite x, without its treatment of infinite ones."""
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        scaled = x * _LOG2_E
        power = tl.exp2(scaled)
        result = power * (tl.fma(x, _LOG2_E, -scaled) * _LN_2) + power
    return result


@triton.jit
def reciprocal(x):
    """1 / x for x from 1.2e-38 to 8e37, with an error of up to two units in float32.

    Triton's division in float32 takes twice as many instructions, which treat the numbers beyond these bounds.
    """
    if x.dtype == tl.float64:
        result = 1.0 / x
    else:
        root = tl.rsqrt(x)
        square = root * root
        result = tl.fma(square, tl.fma(-x, square, 1.0), square)
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
        # The second term is, to first order, what rounding 1 + s loses of s. It needs few digits. An infinite s loses
        # nothing.
        inverse = (1.0 / sum.to(tl.float32)).to(tl.float64)
        result = tl.log(sum) - tl.where(sum < float("inf"), ((sum - 1.0) - s) * inverse, 0.0)
    else:
        result = tl.where(s < 1.0, s * polynomial(s, _LOG1P), tl.log(1.0 + s))
    return result


@triton.jit
def log1p_excess(x, log_1_x, inverse):
    """log(1 + x) - x / (1 + x) with full relative accuracy near 0, in float64, given log(1 + x) and 1 / (1 + x)."""
    s = x / (2.0 + x)
    square = s * s
    series = s * polynomial(square, LOG1P_SERIES_64)
    return tl.where(tl.abs(x) < 0.5, square * (series + (2.0 + x) * inverse), log_1_x - x * inverse)


@triton.jit
def log1p_parts(x):
    """(log(1 + x), log(1 + x) - x / (1 + x), 1 / (1 + x)) for x from 0 to 8e37 (float64: 1e307), each accurate near 0.

    In float32, 1 + x is 2^n (1 + f) with f in [-1/4, 1/2], and f is computed from x, so that it has the digits of x
    that 1 + x has not. Below 1/2 it is x itself.
    """
    one_plus_x = 1.0 + x
    inverse = reciprocal(one_plus_x)
    if x.dtype == tl.float64:
        value = log1p(x)
        excess = log1p_excess(x, value, inverse)
    else:
        # The bits of 2^n, those of 1 less: 0x3f400000 are the bits of 3/4.
        exponent = (one_plus_x.to(tl.int32, bitcast=True) - 0x3F400000) & -0x800000
        down = (0x3F800000 - exponent).to(tl.float32, bitcast=True)
        f = tl.fma(x, down, down - 1.0)
        rest = f * polynomial(f, _LOG1P_REST)
        value = exponent.to(tl.float32) * (_LN_2 / (1 << 23)) + tl.fma(f, rest, f)
        y = x * inverse
        excess = tl.where(x < 0.5, x * (y + rest), value - y)
    return value, excess, inverse


@triton.jit
def log_of_normal(x):
    """log(x) of a normal float32 above 0, in little more than half as many instructions as tl.log."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F400000) & -0x800000  # see log1p_parts
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    return exponent.to(tl.float32) * (_LN_2 / (1 << 23)) + tl.fma(f, f * polynomial(f, _LOG1P_REST), f)


@triton.jit
def lost_by_decay(z, decay):
    """1 - e^-z with its relative accuracy near 0, for z >= 0. `decay` is e^-z."""
    if z.dtype == tl.float64:
        result = tl.where(z < 1.0, z - exp_minus_1_minus(-z, decay), 1.0 - decay)
    else:
        result = tl.where(z < 0.35, z * polynomial(z, _DECAY), 1.0 - decay)
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
