// CUDA's primitives for math/: a value is a register.
#pragma once
#define FASTVAE_ISA isa_cuda
#include <cmath>

#include "../math/elementary.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

template <class C>
struct ScalarPrimitives {
  using Scalar = C;

  static FASTVAE_HD C neg(C x) { return -x; }
  static FASTVAE_HD bool less(C a, C b) { return a < b; }
  static FASTVAE_HD C select(bool mask, C a, C b) { return mask ? a : b; }
  static FASTVAE_HD C relu(C x) { return x < C(0) ? C(0) : x; }  // keeps a NaN, which fmax would not
};

template <>
struct Primitives<float> : ScalarPrimitives<float> {
  static FASTVAE_HD float fma(float a, float b, float c) { return fmaf(a, b, c); }
  static FASTVAE_HD float abs(float x) { return fabsf(x); }
  static FASTVAE_HD float log1p(float x) { return log1pf(x); }
  static FASTVAE_HD float exp(float x) { return expf(x); }
  static FASTVAE_HD float exp_bounded(float x) { return expf(x); }
  // Within two units in the last place, where the exact quotient takes ten instructions.
  static FASTVAE_HD float divide(float a, float b) { return __fdividef(a, b); }

  static FASTVAE_HD ExpParts<float> exp_parts(float h) { return exp_parts_by_split(h > 88.73f ? 88.73f : h); }

  // As in cpu/simd.h.
  static FASTVAE_HD ExpSplit<float> split(float x) {
    const float magic = 12582912.0f + 126.0f;
    x = x < -87.3f ? -87.3f : x;
    const float shifted = fmaf(x, 1.44269504f, magic);
    return {fmaf(shifted - magic, -0.693147182f, x), __int_as_float(__float_as_int(shifted) << 23)};
  }
};

template <>
struct Primitives<double> : ScalarPrimitives<double> {
  static FASTVAE_HD double fma(double a, double b, double c) { return ::fma(a, b, c); }
  static FASTVAE_HD double abs(double x) { return fabs(x); }
  static FASTVAE_HD double log1p(double x) { return ::log1p(x); }
  static FASTVAE_HD double exp(double x) { return ::exp(x); }
  static FASTVAE_HD double exp_bounded(double x) { return ::exp(x); }
  static FASTVAE_HD double divide(double a, double b) { return a / b; }
  static FASTVAE_HD ExpParts<double> exp_parts(double h) { return exp_parts_by_series(h); }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
