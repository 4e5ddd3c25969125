// The few elementary functions that the likelihoods and the KL are made of, for any value type V: a scalar, a SIMD vector
// or a CUDA register. Each V brings its primitives in a specialisation of Primitives (cpu/simd.h has the CPU's).
#pragma once

#if defined(__CUDACC__)
#define FASTVAE_HD __host__ __device__ __forceinline__
#else
#define FASTVAE_HD inline __attribute__((always_inline))
#endif

// One inline namespace per instruction set: without it the linker would keep a single copy of these templates for all of
// them, and an AVX-512 copy crashes a machine that has only AVX2.
#ifndef FASTVAE_ISA
#define FASTVAE_ISA isa_portable
#endif

namespace fastvae::math {
inline namespace FASTVAE_ISA {

// Scalar: the C type of one lane. Functions: exp, exp_bounded (x must not pass 88), exp_parts and exp_pair (see ExpParts and
// ExpPair; x must not pass 88 in the latter), log, log1p, abs, neg, relu, fma, less, and select(mask, a, b) = mask ? a : b in each lane.
template <class V>
struct Primitives;

template <class V, class C, int N>
FASTVAE_HD V polynomial(V x, const C (&highest_first)[N]) {
  V sum(highest_first[0]);
  for (int i = 1; i < N; ++i) sum = Primitives<V>::fma(sum, x, V(highest_first[i]));
  return sum;
}

// A sum of log(1 + e), every e in [0, 1], with one logarithm at the end: that of the product of all 1 + e. What is kept is the
// product less 1, so tiny e are not lost in it, and the rows of saturated logits whose loss they make up keep their accuracy.
// Up to 127 factors fit in fp32.
template <class V>
struct Log1pSum {
  V excess = V(0);

  FASTVAE_HD void add(V e, V one_plus_e) { excess = Primitives<V>::fma(excess, one_plus_e, e); }
  FASTVAE_HD void add(const Log1pSum& other) { add(other.excess, V(1) + other.excess); }
  FASTVAE_HD V value() const { return Primitives<V>::log1p(excess); }
};

// exp(h), exp(h) - 1 and exp(h) - 1 - h, each with its relative accuracy near h = 0, where a subtraction would leave nothing: that is
// where a posterior collapses.
template <class V>
struct ExpParts {
  V exp, minus_1, minus_1_h;
};

// exp(x) and exp(x) - 1, each with its relative accuracy: ExpParts without what only a KL needs.
template <class V>
struct ExpPair {
  V exp, minus_1;
};

// 1/18!, ..., 1/3!, 1/2!: the Taylor series of (exp(h) - 1 - h) / h^2, exact in fp64 for |h| < 1.
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

// ExpParts where there is nothing shorter.
template <class V>
FASTVAE_HD ExpParts<V> exp_parts_by_series(V h) {
  using P = Primitives<V>;
  constexpr ResidualSeries taylor;
  const V exp_h = P::exp(h), near_zero = h * h * polynomial(h, taylor.coefficient);
  const auto near = P::less(P::abs(h), V(1));
  return {exp_h, P::select(near, near_zero + h, exp_h - V(1)), P::select(near, near_zero, exp_h - V(1) - h)};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
