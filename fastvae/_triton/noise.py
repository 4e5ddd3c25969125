"""The noise of `fastvae.reference` in Triton: the same integers from Philox4x32-10, and normals made from them.

Philox is described in Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, and the
transform to normals in Box and Muller 1958. In float32, logarithm, sine and cosine are polynomials: the hardware's
functions have an absolute error of 2^-21, which close to u = 1 is as large as log(u) itself.
"""

import triton
import triton.language as tl

from .elementary import polynomial

_MINUS_2_LN_2: tl.constexpr = tl.constexpr(-1.38629436111989)
# A fit of -2 log(1 + f) / f for 1 + f in [sqrt(1/2), sqrt(2)), with relative error 8e-9. Like all polynomials here, it
# has the coefficient of the highest power first.
_MINUS_2_LOG: tl.constexpr = tl.constexpr(
    (
        0.149023727,
        -0.256132216,
        0.265320628,
        -0.283993006,
        0.332167388,
        -0.400018782,
        0.50003159,
        -0.666666924,
        0.999999762,
        -2.0,
    )
)
# Polynomials in y = f^2 for sin(f pi / 2) / f and cos(f pi / 2), where f is in [-1/2, 1/2]. For float32 they are fits
# with relative errors 3e-8 and 1e-8; for float64 they are Taylor series, which are accurate to full precision.
_SINE_32: tl.constexpr = tl.constexpr(
    (0.000158206298, -0.00468126638, 0.0796925798, -0.645964086, 1.57079637)
)
_COSINE_32: tl.constexpr = tl.constexpr((0.000903628068, -0.0208600704, 0.253669202, -1.23370051, 1.0))
_SINE_64: tl.constexpr = tl.constexpr(
    (
        6.066935731106192e-12,
        -6.688035109811464e-10,
        5.692172921967924e-08,
        -3.598843235212084e-06,
        0.00016044118478735975,
        -0.004681754135318687,
        0.07969262624616703,
        -0.6459640975062462,
        1.5707963267948966,
    )
)
_COSINE_64: tl.constexpr = tl.constexpr(
    (
        -5.294400200734619e-13,
        6.565963114979468e-11,
        -6.386603083791849e-09,
        4.710874778818169e-07,
        -2.5202042373060596e-05,
        0.0009192602748394263,
        -0.020863480763352957,
        0.253669507901048,
        -1.2337005501361697,
        1.0,
    )
)


@triton.jit
def philox(key, low, high):
    """Four random words (uint32 tiles) per counter, whose uint64 halves are `low` (a scalar) and `high` (a tile)."""
    c0 = low.to(tl.uint32)
    c1 = (low >> 32).to(tl.uint32)
    c2 = high.to(tl.uint32)
    c3 = (high >> 32).to(tl.uint32)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # Each product compiles to a single multiplication of two 32-bit numbers with a 64-bit result.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _radius_32(word):
    """sqrt(-2 log u)."""
    # 1.m - (1 - 2^-24) = (2 m + 1) 2^-24 = u, exactly.
    u = ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375
    # u = 2^n m with m in [sqrt(1/2), sqrt(2)).
    biased = u.to(tl.uint32, bitcast=True) - 0x3F3504F3
    n = (biased.to(tl.int32, bitcast=True) >> 23).to(tl.float32)
    f = ((biased & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    return tl.sqrt(n * _MINUS_2_LN_2 + f * polynomial(f, _MINUS_2_LOG))


@triton.jit
def _circle(word, DTYPE: tl.constexpr):
    """The cosine and sine of 2 pi u, from the nearest quarter turn and the remainder."""
    quarter = (word + 0x20000000) >> 30
    # Without its two highest bits and read as signed, the word gives exactly 4 u minus the nearest integer, which is in
    # [-1/2, 1/2].
    f = ((word << 2).to(tl.int32, bitcast=True) >> 11).to(
        DTYPE
    ) * 4.76837158203125e-07 + 2.384185791015625e-07
    y = f * f
    if DTYPE == tl.float64:
        s = f * polynomial(y, _SINE_64)
        c = polynomial(y, _COSINE_64)
    else:
        s = f * polynomial(y, _SINE_32)
        c = polynomial(y, _COSINE_32)
    odd = (quarter & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) != 0, -cosine, cosine), tl.where((quarter & 2) != 0, -sine, sine)


@triton.jit
def box_muller(word0, word1, DTYPE: tl.constexpr):
    """Two independent standard normals from two random words."""
    if DTYPE == tl.float64:
        u = (2 * (word0 >> 9) + 1).to(tl.float64) * 5.9604644775390625e-08
        radius = tl.sqrt(-2.0 * tl.log(u))
    else:
        radius = _radius_32(word0)
    cosine, sine = _circle(word1, DTYPE)
    return radius * cosine, radius * sine


@triton.jit
def normals(seed, draw, block, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """A tile (ROWS, COLUMNS) of standard normals.

    seed    a pointer to (seed, offset), int64
    draw    the number of the sample
    block   (ROWS, COLUMNS / 4), int64: (row_offset + row) * ceil(dims / 4) + element // 4 for each group of four
    """
    key = (tl.load(seed) & 0x7FFFFFFFFFFFFFFF).to(tl.uint64)
    low = ((tl.load(seed + 1) & 0x7FFFFFFFFFFFFFFF) >> 2) + draw
    w0, w1, w2, w3 = philox(key, low.to(tl.uint64), block.to(tl.uint64))
    n0, n1 = box_muller(w0, w1, DTYPE)
    n2, n3 = box_muller(w2, w3, DTYPE)
    # The last two dimensions of the joined tile count 0, 1, 2, 3, so that the four normals are adjacent in a row.
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (ROWS, COLUMNS))
