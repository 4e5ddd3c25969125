// The few elementary functions that the likelihoods and the KL are made of. They work for any value type V: a scalar, a SIMD vector or
// a CUDA register. Each V provides its primitives in a specialisation of Primitives (those of the CPU are in cpu/simd.h).
#pragma once
#include <cmath>

#if defined(__CUDACC__)
#define FASTVAE_HD __device__ __forceinline__
#define FASTVAE_COLD FASTVAE_HD
#else
#define FASTVAE_HD inline __attribute__((always_inline))
// Marks code that hardly ever runs, to keep it out of the way of the code that does.
#define FASTVAE_COLD __attribute__((noinline, cold))
#endif
// The same attribute for lambdas.
#define FASTVAE_INLINE __attribute__((always_inline))

// There is one inline namespace per instruction set. Without it the linker would keep a single copy of these templates for all
// instruction sets, and a copy compiled for AVX-512 crashes on a machine that has only AVX2.
#ifndef FASTVAE_ISA
#define FASTVAE_ISA isa_portable
#endif

namespace fastvae::math {
inline namespace FASTVAE_ISA {

// The primitives of V. Scalar is the C type of one lane, and `vectors` says whether V has several lanes. The functions are:
//   exp
//   exp_bounded     exp for x of at most 88; exp_bounded(0) is 1
//   exp_finite      exp for x of at most 88, as accurate as exp
//   exp_parts       see ExpParts
//   exp_pair        see ExpPair; x must be at most 88
//   log             the logarithm of a positive, normal, finite number
//   log1p
//   log1p_parts     see Log1pParts; for x >= 0
//   log_factorial   only in fp64
//   abs, neg, neg_abs(x) = -|x|, relu, minimum, clamp
//   fma, fnma(a, b, c) = c - a b
//   divide          the divisor must be neither very large nor very small
//   with_sign(size, x)      size with the sign of x, for size >= 0
//   at_least(x, low), at_most(x, high)      both return NaN where x is NaN
//   less, either            either(a, b) is the union of two masks
//   any(mask), any_less(a, b) = any(less(a, b))
//   select(mask, a, b)      mask ? a : b in each lane
//   if_negative(x, a, b)    x < 0 ? a : b; where x is -0, it may be either of them
//   keep_where(mask, x)     mask ? x : 0
//   zero_where(mask, x)     mask ? 0 : x
template <class V>
struct Primitives;

template <class V, class C, int N>
FASTVAE_HD V polynomial(V x, const C (&highest_first)[N]) {
  V sum(highest_first[0]);
  for (int i = 1; i < N; ++i) sum = Primitives<V>::fma(sum, x, V(highest_first[i]));
  return sum;
}

// A sum of log(1 + e), with every e in [0, 1], that takes a single logarithm at the end: that of the product of all 1 + e. The struct
// keeps the product minus 1, so that tiny e are not lost. They make up the loss of a row of saturated logits, which stays accurate.
template <class V>
struct Log1pSum {
  static constexpr int most = 127;  // the number of factors whose product fits in fp32
  V excess = V(0);

  FASTVAE_HD void add(V e, V one_plus_e) { excess = Primitives<V>::fma(excess, one_plus_e, e); }
  FASTVAE_HD void add(const Log1pSum& other) { add(other.excess, V(1) + other.excess); }
  FASTVAE_HD V value() const { return Primitives<V>::log1p(excess); }
};

// exp(h), exp(h) - 1 and exp(h) - 1 - h. Each keeps its relative accuracy near h = 0, where a subtraction would lose all digits. A
// collapsed posterior lies there.
template <class V>
struct ExpParts {
  V exp, minus_1, minus_1_h;
};

// Splits x into n log 2 + r with |r| <= log(2) / 2. power is 2^(n - 1), or 0 where x is below -87.
template <class V>
struct ExpSplit {
  V r, power;
};

// 2 (exp(r) - 1 - r) by a Chebyshev fit with a relative error of 1.4e-7.
template <class V>
FASTVAE_HD V twice_residual(V r) {
  constexpr float fit[] = {0.00278524263f, 0.0167264063f, 0.0833331123f, 0.333331525f, 1.0f};
  return r * r * polynomial(r, fit);
}

// ExpParts in fp32, for a V whose primitives have `split`. h must not exceed 88.73, from where on exp(h) is infinite.
template <class V>
FASTVAE_HD ExpParts<V> exp_parts_by_split(V h) {
  using P = Primitives<V>;
  const ExpSplit<V> s = P::split(h);
  const V square = twice_residual(s.r), twice_r = s.r + s.r, rest = twice_r + square, power_minus_1 = P::fma(V(2), s.power, V(-1));
  // Where |h| is small, n is 0, so power_minus_1 and the inner fma vanish and only the term of `square` is left. exp(h) - 1 is not
  // derived from minus_1_h, because far below 0 minus_1_h is hardly more than -h, and it is infinite where h is.
  const V minus_1_h = P::fma(s.power, square, P::fma(s.power, twice_r, power_minus_1 - h));
  return {s.power * (V(2) + rest), P::fma(s.power, rest, power_minus_1), minus_1_h};
}

// The largest number of C.
template <class C>
constexpr C largest() {
  return sizeof(C) == 8 ? C(1.79769313486231570815e308) : C(3.402823466385288598e38f);
}

// The inverse of a scale is finite if the logarithm of the scale is at least this.
template <class V>
constexpr typename Primitives<V>::Scalar lowest_log() {
  return sizeof(typename Primitives<V>::Scalar) == 8 ? -709 : -88;
}

// exp(-x / 2), bounded so that it stays finite: the root of 1 / s, where x is the logarithm of a scale s. To divide a distance by s, the
// caller multiplies it by the root twice, one multiplication after the other. A distance of zero then stays zero, however small s is.
// Where the bound takes effect, any other distance that is a normal number becomes infinite, as it should.
template <class V>
FASTVAE_HD V inverse_root(V log_scale) {
  using P = Primitives<V>;
  return P::exp_finite(V(-0.5f) * P::at_least(log_scale, V(2 * lowest_log<V>())));
}

// Returns `x` where `size` is finite, and 0 elsewhere. Beside an infinite summand x makes no difference, unless x is infinite too and
// their sum would be NaN.
template <class V>
FASTVAE_HD V beside(V x, V size) {
  using P = Primitives<V>;
  return P::keep_where(P::less(size, V(INFINITY)), x);
}

// log(1 + x), log(1 + x) - x / (1 + x), which keeps its relative accuracy near x = 0, and 1 / (1 + x).
template <class V>
struct Log1pParts {
  V value, excess, inverse;
};

// With s = x / (2 + x), log(1 + x) = 2 (s + s^3/3 + s^5/5 + ...) and x / (1 + x) = 2 s / (1 + s). The function takes s^2 and returns
// what follows 2 s in the first series, divided by s^3. It is exact in fp64 for |x| < 1/2.
template <class V>
FASTVAE_HD V log1p_series(V square) {
  constexpr double series[] = {2. / 25, 2. / 23, 2. / 21, 2. / 19, 2. / 17, 2. / 15, 2. / 13, 2. / 11, 2. / 9, 2. / 7, 2. / 5, 2. / 3};
  return polynomial(square, series);
}

// Log1pParts for any x > -1, given log(1 + x) and 1 / (1 + x).
template <class V>
FASTVAE_HD Log1pParts<V> log1p_parts_by_series(V x, V value, V inverse) {
  using P = Primitives<V>;
  const V s = x / (V(2) + x), square = s * s;
  const V near = square * P::fma(s, log1p_series(square), V(2) / (V(1) + s));
  return {value, P::select(P::less(P::abs(x), V(0.5f)), near, P::fma(P::neg(x), inverse, value)), inverse};
}

// exp(x) and exp(x) - 1, each with its relative accuracy. ExpParts has a third value, which only a KL needs.
template <class V>
struct ExpPair {
  V exp, minus_1;
};

template <class V>
FASTVAE_HD ExpPair<V> exp_pair_by_split(V x) {
  using P = Primitives<V>;
  const ExpSplit<V> s = P::split(x);
  const V rest = s.r + s.r + twice_residual(s.r);
  // Where |x| is small, n is 0 and the innermost fma vanishes.
  return {s.power * (V(2) + rest), P::fma(s.power, rest, P::fma(V(2), s.power, V(-1)))};
}

// tanh(x) and its derivative. The derivative keeps its relative accuracy for large |x|, where 1 - tanh^2 would lose all digits. The
// value has its relative accuracy near 0 if kRelative is set; otherwise it costs less, and its error there is relative to 1.
template <class V, bool kRelative = true>
struct Tanh {
  V value, grad;

  FASTVAE_HD explicit Tanh(V x) {
    using P = Primitives<V>;
    V e, size;
    if constexpr (kRelative) {
      const ExpPair<V> pair = P::exp_pair(V(-2) * P::abs(x));
      e = pair.exp;
      size = P::neg(pair.minus_1);
    } else {
      e = P::exp_bounded(V(-2) * P::abs(x));
      size = V(1) - e;
    }
    const V inverse = P::divide(V(1), V(1) + e);
    value = P::with_sign(size * inverse, x);
    grad = V(4) * e * inverse * inverse;
  }
};

// The coefficients 1/18!, ..., 1/3!, 1/2! of the Taylor series of (exp(h) - 1 - h) / h^2, which is exact in fp64 for |h| < 1.
struct ResidualSeries {
  double coefficient[17];
  constexpr ResidualSeries() : coefficient() {
    double factorial = 1;
    for (int k = 2; k <= 18; ++k) {
      factorial *= k;
      coefficient[18 - k] = 1 / factorial;
    }
  }
};

// log(t!) for t in [0, 2). It is 0 for 0 and 1; for fractions, t! stands for Gamma(t + 1).
template <class V>
FASTVAE_HD V log_small_factorial(V t) {
  using P = Primitives<V>;
  const V roots = t * (t - V(1));
  if (!P::any(P::less(V(0), P::abs(roots)))) return V(0);
  if constexpr (sizeof(typename P::Scalar) == 8) return P::select(P::less(V(0), P::abs(roots)), P::log_factorial(t), V(0));
  // This is a Chebyshev fit of log Gamma(t + 1) / (t (t - 1)) with a relative error of 2e-8.
  constexpr double fit[] = {-3.63155232e-05, 0.000477342051, -0.00283509935, 0.0101589505, -0.0249239597, 0.0456450246,
                            -0.0677630454,   0.0893085077,   -0.114591829,   0.155378178,  -0.245249093,  0.577215672};
  return roots * polynomial(t, fit);
}

// From stirling_from() on, log(t!) = t log t - t + log(2 pi t) / 2 + stirling_rest(1 / t).
template <class V>
constexpr typename Primitives<V>::Scalar stirling_from() {
  return sizeof(typename Primitives<V>::Scalar) == 8 ? 16 : 2;
}

template <class V>
FASTVAE_HD V stirling_rest(V inverse) {
  if constexpr (sizeof(typename Primitives<V>::Scalar) == 8) {
    constexpr double series[] = {1. / 156, -691. / 360360, 1. / 1188, -1. / 1680, 1. / 1260, -1. / 360, 1. / 12};
    return inverse * polynomial(inverse * inverse, series);
  } else {
    constexpr float fit[] = {-0.000349723909f, 0.000761539966f, -0.00277628028f, 0.0833333209f};  // the absolute error is 5e-9
    return inverse * polynomial(inverse * inverse, fit);
  }
}

// ExpParts for a V that has no shorter way to compute them.
template <class V>
FASTVAE_HD ExpParts<V> exp_parts_by_series(V h) {
  using P = Primitives<V>;
  constexpr ResidualSeries taylor;
  const V exp_h = P::exp(h), near_zero = h * h * polynomial(h, taylor.coefficient);
  const V bounded = P::at_most(h, V(800));  // keeps an infinite h from being subtracted from an infinite exponential
  const auto near = P::less(P::abs(h), V(1));
  return {exp_h, P::select(near, near_zero + h, exp_h - V(1)), P::select(near, near_zero, exp_h - V(1) - bounded)};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
