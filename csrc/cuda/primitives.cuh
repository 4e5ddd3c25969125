// CUDA's primitives for math/. A value is a register.
#pragma once
#define FASTVAE_ISA isa_cuda
#include <cmath>

#include "../math/elementary.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

// These call the approximate functions of the hardware, without the extra instructions that would preserve results below 2^-126.
FASTVAE_HD float exp2_approximately(float x) {
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
#else
  return exp2f(x);
#endif
}
FASTVAE_HD float reciprocal_approximately(float x) {
#ifdef __CUDA_ARCH__
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
#else
  return __frcp_rn(x);
#endif
}

FASTVAE_HD float inverse_root_approximately(float x) {
#ifdef __CUDA_ARCH__
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
#else
  return rsqrtf(x);
#endif
}

FASTVAE_HD float log2_approximately(float x) {
#ifdef __CUDA_ARCH__
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
#else
  return __log2f(x);
#endif
}

// at_most returns the smaller of two numbers and at_least the larger. Both return NaN where x is NaN.
FASTVAE_HD float at_most(float x, float bound) {
#ifdef __CUDA_ARCH__
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(bound));
  return x;
#else
  return x > bound ? bound : x;
#endif
}
FASTVAE_HD float at_least(float x, float bound) {
#ifdef __CUDA_ARCH__
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(bound));
  return x;
#else
  return x < bound ? bound : x;
#endif
}

template <class C>
struct ScalarPrimitives {
  using Scalar = C;
  static constexpr bool vectors = false;

  static FASTVAE_HD C neg(C x) { return -x; }
  static FASTVAE_HD bool less(C a, C b) { return a < b; }
  static FASTVAE_HD C select(bool mask, C a, C b) { return mask ? a : b; }
  static FASTVAE_HD bool any(bool mask) { return mask; }
  static FASTVAE_HD bool any_less(C a, C b) { return a < b; }
  static FASTVAE_HD bool either(bool a, bool b) { return a || b; }
  static FASTVAE_HD C if_negative(C x, C a, C b) { return x < C(0) ? a : b; }
  static FASTVAE_HD C keep_where(bool mask, C x) { return mask ? x : C(0); }
  static FASTVAE_HD C zero_where(bool mask, C x) { return mask ? C(0) : x; }
  static FASTVAE_HD bool zero_where(bool mask, bool x) { return !mask && x; }
  static FASTVAE_HD C relu(C x) { return x < C(0) ? C(0) : x; }  // keeps a NaN, which fmax would not
};

template <>
struct Primitives<float> : ScalarPrimitives<float> {
  static FASTVAE_HD float fma(float a, float b, float c) { return fmaf(a, b, c); }
  static FASTVAE_HD float fnma(float a, float b, float c) { return fmaf(-a, b, c); }
  static FASTVAE_HD float abs(float x) { return fabsf(x); }
  static FASTVAE_HD float neg_abs(float x) { return -fabsf(x); }
  static FASTVAE_HD float at_least(float x, float low) { return math::at_least(x, low); }
  static FASTVAE_HD float at_most(float x, float high) { return math::at_most(x, high); }
  static FASTVAE_HD float with_sign(float size, float x) { return copysignf(size, x); }
  static FASTVAE_HD float log1p(float x) { return log1pf(x); }
  static FASTVAE_HD float exp(float x) { return expf(x); }
  static FASTVAE_HD float exp_finite(float x) { return expf(x); }
  static FASTVAE_HD float log(float x) { return logf(x); }
  static FASTVAE_HD float minimum(float a, float b) { return fminf(a, b); }
  static FASTVAE_HD float clamp(float x, float low, float high) { return math::at_least(math::at_most(x, high), low); }
  // With y = x / (1 + x), log(1 + x) - y = y^2 (1/2 + y/3 + y^2/4 + ...). For x < 1/2, where the hardware's logarithm would lose digits,
  // this is a minimax fit with a relative error of 5e-7. x must not exceed 8e37.
  static FASTVAE_HD Log1pParts<float> log1p_parts(float x) {
    constexpr float fit[] = {0.390660614f, 0.0543918796f, 0.221273854f, 0.248247623f, 0.33338502f, 0.499999762f};
    const float one_plus_x = 1.0f + x, inverse = reciprocal_approximately(one_plus_x), y = x * inverse;
    const float near = y * y * polynomial(y, fit), far = fmaf(log2_approximately(one_plus_x), 0.693147182f, -y);
    const float excess = x < 0.5f ? near : far;
    return {y + excess, excess, inverse};
  }
  // This takes two instructions. x log2(e) is rounded before the power of 2 is taken. At x = -87, where results underflow, this causes
  // a relative error of 3e-6.
  static FASTVAE_HD float exp_bounded(float x) { return exp2_approximately(1.44269504f * x); }
  // This is the approximate quotient, improved by one Newton step. Where a gradient is the difference of a probability and the data, it
  // may consist of just the last unit, which the step corrects. It takes half as many instructions as the exact quotient.
  static FASTVAE_HD float divide(float a, float b) {
    const float inverse = reciprocal_approximately(b), quotient = a * inverse;
    return fmaf(fmaf(-b, quotient, a), inverse, quotient);
  }

  static FASTVAE_HD ExpParts<float> exp_parts(float h) { return exp_parts_by_split(at_most(h, 88.73f)); }
  static FASTVAE_HD ExpPair<float> exp_pair(float x) { return exp_pair_by_split(x); }

  // As in cpu/simd.h.
  static FASTVAE_HD ExpSplit<float> split(float x) {
    const float magic = 12582912.0f + 126.0f;
    x = at_least(x, -87.3f);
    const float shifted = fmaf(x, 1.44269504f, magic);
    return {fmaf(shifted - magic, -0.693147182f, x), __int_as_float(__float_as_int(shifted) << 23)};
  }
};

template <>
struct Primitives<double> : ScalarPrimitives<double> {
  static FASTVAE_HD double fma(double a, double b, double c) { return ::fma(a, b, c); }
  static FASTVAE_HD double fnma(double a, double b, double c) { return ::fma(-a, b, c); }
  static FASTVAE_HD double abs(double x) { return fabs(x); }
  static FASTVAE_HD double neg_abs(double x) { return -fabs(x); }
  static FASTVAE_HD double at_least(double x, double low) { return x < low ? low : x; }
  static FASTVAE_HD double at_most(double x, double high) { return high < x ? high : x; }
  static FASTVAE_HD double with_sign(double size, double x) { return copysign(size, x); }
  static FASTVAE_HD double log1p(double x) { return ::log1p(x); }
  static FASTVAE_HD double minimum(double a, double b) { return fmin(a, b); }
  static FASTVAE_HD double clamp(double x, double low, double high) { return at_least(at_most(x, high), low); }
  static FASTVAE_HD Log1pParts<double> log1p_parts(double x) { return log1p_parts_by_series(x, ::log1p(x), 1 / (1 + x)); }
  static FASTVAE_HD double exp(double x) { return ::exp(x); }
  static FASTVAE_HD double exp_finite(double x) { return ::exp(x); }
  static FASTVAE_HD double log(double x) { return ::log(x); }
  static FASTVAE_HD double log_factorial(double t) { return lgamma(t + 1); }
  static FASTVAE_HD double exp_bounded(double x) { return ::exp(x); }
  static FASTVAE_HD double divide(double a, double b) { return a / b; }
  static FASTVAE_HD ExpParts<double> exp_parts(double h) { return exp_parts_by_series(h); }
  static FASTVAE_HD ExpPair<double> exp_pair(double x) { return {::exp(x), ::expm1(x)}; }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
