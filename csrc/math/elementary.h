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

// Scalar: the C type of one lane. Functions: exp, exp_nonpositive, log1p, abs, relu, fma, less, and
// select(mask, a, b) = mask ? a : b in each lane.
template <class V>
struct Primitives;

template <class V, class C, int N>
FASTVAE_HD V polynomial(V x, const C (&highest_first)[N]) {
  V sum(highest_first[0]);
  for (int i = 1; i < N; ++i) sum = Primitives<V>::fma(sum, x, V(highest_first[i]));
  return sum;
}

// 1/18!, ..., 1/3!, 1/2!: the Taylor series of (exp(v) - 1 - v) / v^2, exact in fp64 for |v| < 1.
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

// log(1 + e) for e in [0, 1].
template <class V>
FASTVAE_HD V log1p_unit(V e) {
  using P = Primitives<V>;
  if constexpr (sizeof(typename P::Scalar) == 8) {
    return P::log1p(e);
  } else {
    // log1p(e) / e, Chebyshev fit on [0, 1], relative error 2e-8. A product e * p(e) keeps that error relative for every e,
    // so rows of saturated logits, whose loss is a sum of tiny terms, stay exact.
    constexpr float fit[] = {-0.00317605701f, 0.0195425265f, -0.0563736111f, 0.105436236f,  -0.152696669f,
                             0.196632743f,    -0.249516159f, 0.333297104f,   -0.499998927f, 1.0f};
    return e * polynomial(e, fit);
  }
}

// value = exp(v) - 1 - v and slope = exp(v) - 1, given exp_v = exp(v). Both keep their relative accuracy near v = 0, where the
// subtraction of the textbook KL would leave nothing: that is where a posterior collapses.
template <class V>
struct ExpResidual {
  V value, slope;
};

template <class V>
FASTVAE_HD ExpResidual<V> exp_residual(V v, V exp_v) {
  using P = Primitives<V>;
  const auto series = [&] {
    if constexpr (sizeof(typename P::Scalar) == 8) {
      constexpr ResidualSeries taylor;
      return polynomial(v, taylor.coefficient);
    } else {
      // Chebyshev fit on [-1, 1], relative error 2e-8.
      constexpr float fit[] = {2.80628024e-06f, 2.53585131e-05f, 0.000198381022f, 0.00138853968f,
                               0.00833333936f,  0.041666735f,    0.166666672f,    0.5f};
      return polynomial(v, fit);
    }
  };
  const V near_value = v * v * series();
  const V far_slope = exp_v - V(1);
  const auto near = P::less(P::abs(v), V(1));
  return {P::select(near, near_value, far_slope - v), P::select(near, near_value + v, far_slope)};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
