// The CPU's primitives: at::vec::Vectorized, compiled once for each instruction set.
#pragma once
#include <ATen/cpu/vec/vec.h>

#include "../math/elementary.h"

namespace fastvae::cpu::FASTVAE_ISA {
template <class C>
using Vec = at::vec::Vectorized<C>;
}  // namespace fastvae::cpu::FASTVAE_ISA

namespace fastvae::math {
inline namespace FASTVAE_ISA {

template <class C>
struct Primitives<at::vec::Vectorized<C>> {
  using Scalar = C;
  using V = at::vec::Vectorized<C>;

  static FASTVAE_HD V fma(V a, V b, V c) { return at::vec::fmadd(a, b, c); }
  static FASTVAE_HD V abs(V x) { return x.abs(); }
  static FASTVAE_HD V max(V a, V b) { return at::vec::maximum(a, b); }
  static FASTVAE_HD V less(V a, V b) { return a < b; }
  static FASTVAE_HD V select(V mask, V a, V b) { return V::blendv(b, a, mask); }
  static FASTVAE_HD V log1p(V x) { return x.log1p(); }
  static FASTVAE_HD V expm1(V x) { return x.expm1(); }

  // Vectorized<float>::exp is exact to one unit in the last place and slow, exp_u20 is fast and exact to twenty; this one is as
  // fast and exact to two. Results below 2^-126 are 0.
  static FASTVAE_HD V exp(V x) {
    if constexpr (sizeof(C) == 8) {
      return x.exp();
    } else {
      constexpr float fit[] = {0.00139411085f, 0.00837512594f, 0.0416663513f, 0.166664153f, 0.5f, 1.0f, 1.0f};
      const V clamped = at::vec::clamp(x, V(-104.0f), V(89.0f));  // keeps a NaN
      const V n = (clamped * V(1.44269504f)).round();
      const V r = at::vec::fmadd(n, V(2.12194440e-4f), at::vec::fmadd(n, V(-0.693359375f), clamped));
      const V mantissa = polynomial(r, fit);
#if defined(CPU_CAPABILITY_AVX512)
      return _mm512_scalef_ps(mantissa, n);
#else
      // 2^n in two factors: n may be 128, whose power is no float.
      const auto exponent = at::vec::convert_to_int_of_same_size<float>(n + V(126.0f));
      const V power = at::vec::cast<float>(exponent << at::vec::Vectorized<int32_t>(23));
      return V::blendv(mantissa * power * V(2.0f), V(0.0f), x < V(-87.0f));
#endif
    }
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
