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
  static constexpr bool vectors = true;

  static FASTVAE_HD V fma(V a, V b, V c) { return at::vec::fmadd(a, b, c); }
  static FASTVAE_HD V abs(V x) { return x.abs(); }
  static FASTVAE_HD V neg(V x) { return x.neg(); }
  static FASTVAE_HD V neg_abs(V x) { return x | V(C(-0.0)); }
  static FASTVAE_HD V fnma(V a, V b, V c) { return at::vec::fnmadd(a, b, c); }
  static FASTVAE_HD V divide(V a, V b) { return a / b; }
  static FASTVAE_HD V less(V a, V b) { return a < b; }
  static FASTVAE_HD V select(V mask, V a, V b) { return V::blendv(b, a, mask); }
  static FASTVAE_HD V if_negative(V x, V a, V b) {
#ifdef CPU_CAPABILITY_AVX2
    return V::blendv(b, a, x);  // a blend uses only the sign bits of its mask
#else
    return select(less(x, V(0)), a, b);
#endif
  }
  static FASTVAE_HD V either(V a, V b) { return a | b; }
  static FASTVAE_HD V keep_where(V mask, V x) { return x & mask; }
  static FASTVAE_HD V zero_where(V mask, V x) { return x ^ (x & mask); }
  static FASTVAE_HD V with_sign(V size, V x) { return size | (x & V(C(-0.0))); }
  static FASTVAE_HD bool any(V mask) { return mask.zero_mask() != (1 << V::size()) - 1; }
  static FASTVAE_HD bool any_less(V a, V b) {
    // The comparisons of Vectorized would turn the mask into a vector first.
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (sizeof(C) == 8) return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ) != 0;
    else return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) != 0;
#elif defined(CPU_CAPABILITY_AVX2)
    if constexpr (sizeof(C) == 8) return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_LT_OQ)) != 0;
    else return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)) != 0;
#else
    return any(less(a, b));
#endif
  }
  static FASTVAE_HD V log1p(V x) { return x.log1p(); }

  // Vectorized<float>::log is exact to one unit in the last place, but takes several times as many instructions (see exp).
  static FASTVAE_HD V log(V x) {
    if constexpr (sizeof(C) == 8) return x.log();
    else {
      // x is split into 2^k (1 + f), with 1 + f from sqrt(1/2) to sqrt(2).
      using Bits = at::vec::Vectorized<int32_t>;
      const Bits bits = at::vec::cast<int32_t>(x), k = (bits - Bits(0x3f3504f3)) >> Bits(23);
      const V f = at::vec::cast<float>(bits - (k << Bits(23))) - V(1);
      const V n = at::vec::cast<float>(k + Bits(0x4b400000)) - V(12582912.0f);  // 1.5 * 2^23 has room for an integer in its low bits
      // This is a Chebyshev fit of (log(1 + f) - f + f^2 / 2) / f^3. Its error is 3e-8 of the logarithm.
      constexpr float fit[] = {0.0904878452f, -0.140308917f, 0.147038996f, -0.166027188f, 0.199842229f, -0.250007033f, 0.333334148f};
      return fma(n, V(0.693147182f), fma(f * f, fma(f, polynomial(f, fit), V(-0.5f)), f));
    }
  }

  static FASTVAE_HD V log_factorial(V t) { return (t + V(1)).lgamma(); }

  static FASTVAE_HD V at_least(V x, V low) { return at::vec::clamp_min(x, low); }
  static FASTVAE_HD V at_most(V x, V high) { return at::vec::clamp_max(x, high); }
  static FASTVAE_HD V minimum(V a, V b) { return at::vec::minimum(a, b); }
  static FASTVAE_HD V clamp(V x, C low, C high) { return at::vec::clamp_min(at::vec::clamp_max(x, V(high)), V(low)); }  // keeps a NaN

  // Vectorized<float>::log1p is exact to one unit in the last place, but takes several times as many instructions.
  static FASTVAE_HD Log1pParts<V> log1p_parts(V x) {
    const V one_plus_x = V(1) + x, inverse = V(1) / one_plus_x;
    if constexpr (sizeof(C) == 8) return log1p_parts_by_series(x, x.log1p(), inverse);
    else {
      // 1 + x is split into 2^k (1 + f), with 1 + f from sqrt(1/2) to sqrt(2). The digits of x that 1 + x has lost are added to f.
      using Bits = at::vec::Vectorized<int32_t>;
      const Bits bits = at::vec::cast<int32_t>(one_plus_x), k = (bits - Bits(0x3f3504f3)) >> Bits(23);
      const V m = at::vec::cast<float>(bits - (k << Bits(23))), scale = at::vec::cast<float>((Bits(127) - k) << Bits(23));
      const V f = fma(x - (one_plus_x - V(1)), scale, m - V(1));
      const V n = at::vec::cast<float>(k + Bits(0x4b400000)) - V(12582912.0f);  // 1.5 * 2^23 has room for an integer in its low bits
      // This is a minimax fit of (log(1 + f) - f) / f^2 with an absolute error of 3e-8.
      constexpr float fit[] = {-0.0806465298f, 0.129178673f, -0.130725533f, 0.141734555f, -0.166289195f,
                               0.200026959f,   -0.25000751f, 0.333333135f,  -0.49999997f};
      const V rest = polynomial(f, fit), value = fma(n, V(0.693147182f), fma(f * f, rest, f));
      // Where k is 0, f equals x, and x - x / (1 + x) = x^2 / (1 + x).
      return {value, select(less(x, V(0.414f)), x * x * (rest + inverse), fma(neg(x), inverse, value)), inverse};
    }
  }

  static FASTVAE_HD V relu(V x) { return at::vec::clamp_min(x, V(0)); }  // keeps a NaN

  // Vectorized<float>::exp is exact to one unit in the last place, but takes far more instructions. This one has a relative error of a
  // few units. Results below e^-87 are 0.
  static FASTVAE_HD V exp(V x) {
    if constexpr (sizeof(C) == 8) return x.exp();
    else return V::blendv(exp_bounded(at::vec::clamp_max(x, V(88.722f))), V(INFINITY), x > V(88.722f));
  }

  // exp without the check for overflow: x must not exceed 88.722.
  static FASTVAE_HD V exp_bounded(V x) {
    if constexpr (sizeof(C) == 8) return x.exp();
    else {
      const ExpSplit<V> s = split(x);
      // This is a minimax fit of 2 exp(r) with a relative error of 1e-7. The last two coefficients were held fixed.
      constexpr float twice[] = {0.0166251101f, 0.0837803185f, 0.333342284f, 0.999984622f, 2.0f, 2.0f};
      return polynomial(s.r, twice) * s.power;
    }
  }

  static FASTVAE_HD V exp_finite(V x) { return exp_bounded(x); }

  static FASTVAE_HD ExpParts<V> exp_parts(V h) {
    if constexpr (sizeof(C) == 8) return exp_parts_by_series(h);
    else return exp_parts_by_split(at::vec::clamp_max(h, V(88.73f)));
  }

  static FASTVAE_HD ExpPair<V> exp_pair(V x) {
    if constexpr (sizeof(C) == 8) return {x.exp(), x.expm1()};
    else return exp_pair_by_split(x);
  }

  static FASTVAE_HD ExpSplit<V> split(V x) {
    // Adding 1.5 * 2^23 + 126 rounds to an integer and leaves n - 1, plus the bias of an exponent, in the low bits. For the lowest x
    // these bits are 0, which is the exponent of zero.
    const V magic(12582912.0f + 126.0f);
    x = at::vec::clamp_min(x, V(-87.3f));  // keeps a NaN
    const V shifted = fma(x, V(1.44269504f), magic);
    const V n = shifted - magic;
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
    const V r = fma(n, V(-0.693147182f), x);
#else
    // Without a fused multiply-add, n log 2 would be rounded. The constant is therefore in two parts, the first without low bits.
    const V r = (x - n * V(0.693359375f)) - n * V(-2.12194440e-4f);
#endif
    return {r, at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << at::vec::Vectorized<int32_t>(23))};
  }
};

// Several vectors that go through the arithmetic side by side. If an element is a long chain of operations, each of which waits for the
// one before, the processor is busy only if the program has other operations close by that it can do in the meantime.
template <class V, int N>
struct Pack {
  V lane[N];

  Pack() = default;
  FASTVAE_HD explicit Pack(V v) {
    for (V& x : lane) x = v;
  }
  FASTVAE_HD explicit Pack(typename Primitives<V>::Scalar v) : Pack(V(v)) {}

  template <class F>
  static FASTVAE_HD Pack map(const F& f) {
    Pack out;
    for (int i = 0; i < N; ++i) out.lane[i] = f(i);
    return out;
  }

  friend FASTVAE_HD Pack operator+(Pack a, Pack b) { return map([&](int i) FASTVAE_INLINE { return a.lane[i] + b.lane[i]; }); }
  friend FASTVAE_HD Pack operator-(Pack a, Pack b) { return map([&](int i) FASTVAE_INLINE { return a.lane[i] - b.lane[i]; }); }
  friend FASTVAE_HD Pack operator*(Pack a, Pack b) { return map([&](int i) FASTVAE_INLINE { return a.lane[i] * b.lane[i]; }); }
  friend FASTVAE_HD Pack operator/(Pack a, Pack b) { return map([&](int i) FASTVAE_INLINE { return a.lane[i] / b.lane[i]; }); }
};

template <class V, int N>
struct Primitives<Pack<V, N>> {
  using P = Primitives<V>;
  using Scalar = typename P::Scalar;
  using W = Pack<V, N>;

  static FASTVAE_HD W fma(W a, W b, W c) {
    return W::map([&](int i) FASTVAE_INLINE { return P::fma(a.lane[i], b.lane[i], c.lane[i]); });
  }
  static FASTVAE_HD W fnma(W a, W b, W c) {
    return W::map([&](int i) FASTVAE_INLINE { return P::fnma(a.lane[i], b.lane[i], c.lane[i]); });
  }
  static FASTVAE_HD W abs(W x) { return W::map([&](int i) FASTVAE_INLINE { return P::abs(x.lane[i]); }); }
  static FASTVAE_HD W divide(W a, W b) { return a / b; }
  static FASTVAE_HD W neg(W x) { return W::map([&](int i) FASTVAE_INLINE { return P::neg(x.lane[i]); }); }
  static FASTVAE_HD W relu(W x) { return W::map([&](int i) FASTVAE_INLINE { return P::relu(x.lane[i]); }); }
  static FASTVAE_HD W less(W a, W b) { return W::map([&](int i) FASTVAE_INLINE { return P::less(a.lane[i], b.lane[i]); }); }
  static FASTVAE_HD W either(W a, W b) { return W::map([&](int i) FASTVAE_INLINE { return P::either(a.lane[i], b.lane[i]); }); }
  static FASTVAE_HD W keep_where(W mask, W x) {
    return W::map([&](int i) FASTVAE_INLINE { return P::keep_where(mask.lane[i], x.lane[i]); });
  }
  static FASTVAE_HD W zero_where(W mask, W x) {
    return W::map([&](int i) FASTVAE_INLINE { return P::zero_where(mask.lane[i], x.lane[i]); });
  }
  static FASTVAE_HD W at_least(W x, W low) {
    return W::map([&](int i) FASTVAE_INLINE { return P::at_least(x.lane[i], low.lane[i]); });
  }
  static FASTVAE_HD W at_most(W x, W high) {
    return W::map([&](int i) FASTVAE_INLINE { return P::at_most(x.lane[i], high.lane[i]); });
  }
  static FASTVAE_HD W with_sign(W size, W x) {
    return W::map([&](int i) FASTVAE_INLINE { return P::with_sign(size.lane[i], x.lane[i]); });
  }
  static FASTVAE_HD W select(W mask, W a, W b) {
    return W::map([&](int i) FASTVAE_INLINE { return P::select(mask.lane[i], a.lane[i], b.lane[i]); });
  }
  static FASTVAE_HD bool any(W mask) {
    V all = mask.lane[0];
    for (int i = 1; i < N; ++i) all = P::either(all, mask.lane[i]);
    return P::any(all);
  }
  static FASTVAE_HD W exp_bounded(W x) { return W::map([&](int i) FASTVAE_INLINE { return P::exp_bounded(x.lane[i]); }); }
  static FASTVAE_HD ExpPair<W> exp_pair(W x) {
    ExpPair<W> out;
    for (int i = 0; i < N; ++i) {
      const ExpPair<V> one = P::exp_pair(x.lane[i]);
      out.exp.lane[i] = one.exp;
      out.minus_1.lane[i] = one.minus_1;
    }
    return out;
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
