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
  static FASTVAE_HD V less(V a, V b) { return a < b; }
  static FASTVAE_HD V select(V mask, V a, V b) { return V::blendv(b, a, mask); }
  static FASTVAE_HD V log1p(V x) { return x.log1p(); }

  static FASTVAE_HD V relu(V x) { return at::vec::clamp_min(x, V(0)); }  // keeps a NaN

  // Vectorized<float>::exp is exact to one unit in the last place, with far more instructions; this one has a relative error of a
  // few units. Results below e^-87 are 0.
  static FASTVAE_HD V exp(V x) {
    if constexpr (sizeof(C) == 8) return x.exp();
    else return V::blendv(exp_nonpositive(at::vec::clamp_max(x, V(88.722f))), V(INFINITY), x > V(88.722f));
  }

  // The same without a look at overflow: x must not pass 88.722.
  static FASTVAE_HD V exp_nonpositive(V x) {
    if constexpr (sizeof(C) == 8) return x.exp();
    else return V::blendv(exp_in_range(at::vec::clamp_min(x, V(-87.0f))), V(0.0f), x < V(-87.0f));
  }

 private:
  static FASTVAE_HD V exp_in_range(V x) {
    // x = n log 2 + r. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, ready to go into the exponent.
    const V magic(12582912.0f);
    const V shifted = at::vec::fmadd(x, V(1.44269504f), magic);
    const V n = shifted - magic;
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
    const V r = at::vec::fmadd(n, V(-0.693147182f), x);
#else
    // Without a fused multiply-add n log 2 would be rounded: the first part of the constant has no low bits.
    const V r = (x - n * V(0.693359375f)) - n * V(-2.12194440e-4f);
#endif
    constexpr float fit[] = {0.00836914871f, 0.0419175066f, 0.166665047f, 0.499988705f, 1.0f, 1.00000012f};
    const auto mantissa = at::vec::cast<int32_t>(polynomial(r, fit));
    const auto exponent = at::vec::cast<int32_t>(shifted) << at::vec::Vectorized<int32_t>(23);
    return at::vec::cast<float>(mantissa + exponent) + (x - x);  // a NaN's payload may have become an exponent
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
