// The CPU's primitives: at::vec::Vectorized, compiled once for each instruction set.
#pragma once
#include <ATen/cpu/vec/vec.h>

#include "../math/elementary.h"

// A lambda that stays a function call costs more than the arithmetic in it.
#define FASTVAE_INLINE __attribute__((always_inline))

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
  static FASTVAE_HD V neg(V x) { return x.neg(); }
  static FASTVAE_HD V less(V a, V b) { return a < b; }
  static FASTVAE_HD V select(V mask, V a, V b) { return V::blendv(b, a, mask); }
  static FASTVAE_HD V log(V x) { return x.log(); }
  static FASTVAE_HD V log1p(V x) { return x.log1p(); }

  static FASTVAE_HD V relu(V x) { return at::vec::clamp_min(x, V(0)); }  // keeps a NaN

  // Vectorized<float>::exp is exact to one unit in the last place, with far more instructions; this one has a relative error of a
  // few units. Results below e^-87 are 0.
  static FASTVAE_HD V exp(V x) {
    if constexpr (sizeof(C) == 8) return x.exp();
    else return V::blendv(exp_bounded(at::vec::clamp_max(x, V(88.722f))), V(INFINITY), x > V(88.722f));
  }

  // The same without a look at overflow: x must not pass 88.722.
  static FASTVAE_HD V exp_bounded(V x) {
    if constexpr (sizeof(C) == 8) return x.exp();
    else {
      const Split s = split(x);
      constexpr float twice[] = {0.01673829742f, 0.0838350132f, 0.33333009f, 0.99997741f, 2.0f, 2.00000024f};
      return polynomial(s.r, twice) * s.power;
    }
  }

  static FASTVAE_HD ExpParts<V> exp_parts(V h) {
    if constexpr (sizeof(C) == 8) return exp_parts_by_series(h);
    else {
      h = at::vec::clamp_max(h, V(88.73f));  // infinity from here on
      const Split s = split(h);
      const V square = twice_residual(s.r), twice_r = s.r + s.r;
      // Where |h| is small n is 0, so the bracket vanishes exactly and `square` is left.
      const V minus_1_h = fma(s.power, square, fma(s.power, twice_r, fma(V(2), s.power, V(-1)) - h));
      return {s.power * (V(2) + (twice_r + square)), minus_1_h + h, minus_1_h};
    }
  }

  static FASTVAE_HD ExpPair<V> exp_pair(V x) {
    if constexpr (sizeof(C) == 8) return {x.exp(), x.expm1()};
    else {
      const Split s = split(x);
      const V rest = s.r + s.r + twice_residual(s.r);
      // Where |x| is small n is 0, and the last bracket vanishes.
      return {s.power * (V(2) + rest), fma(s.power, rest, fma(V(2), s.power, V(-1)))};
    }
  }

 private:
  // 2 (exp(r) - 1 - r), Chebyshev fit, relative error 1.4e-7.
  static FASTVAE_HD V twice_residual(V r) {
    constexpr float fit[] = {0.00278524263f, 0.0167264063f, 0.0833331123f, 0.333331525f, 1.0f};
    return r * r * polynomial(r, fit);
  }

  // x = n log 2 + r, |r| <= log(2) / 2, and power = 2^(n - 1); 0 where x is below -87.
  struct Split {
    V r, power;
  };

  static FASTVAE_HD Split split(V x) {
    // Adding 1.5 * 2^23 + 126 rounds to an integer and leaves n - 1, with the bias of an exponent, in the low bits. The lowest x has 0
    // there: the exponent of zero.
    const V magic(12582912.0f + 126.0f);
    x = at::vec::clamp_min(x, V(-87.3f));  // keeps a NaN
    const V shifted = fma(x, V(1.44269504f), magic);
    const V n = shifted - magic;
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
    const V r = fma(n, V(-0.693147182f), x);
#else
    // Without a fused multiply-add n log 2 would be rounded: the first part of the constant has no low bits.
    const V r = (x - n * V(0.693359375f)) - n * V(-2.12194440e-4f);
#endif
    return {r, at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << at::vec::Vectorized<int32_t>(23))};
  }
};

// Several vectors that go through the arithmetic side by side. Where an element is a long chain of operations, each waiting for the
// one before, a processor is busy only if there are others to do meanwhile, close by in the program.
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
  static FASTVAE_HD W abs(W x) { return W::map([&](int i) FASTVAE_INLINE { return P::abs(x.lane[i]); }); }
  static FASTVAE_HD W neg(W x) { return W::map([&](int i) FASTVAE_INLINE { return P::neg(x.lane[i]); }); }
  static FASTVAE_HD W relu(W x) { return W::map([&](int i) FASTVAE_INLINE { return P::relu(x.lane[i]); }); }
  static FASTVAE_HD W log(W x) { return W::map([&](int i) FASTVAE_INLINE { return P::log(x.lane[i]); }); }
  static FASTVAE_HD W log1p(W x) { return W::map([&](int i) FASTVAE_INLINE { return P::log1p(x.lane[i]); }); }
  static FASTVAE_HD W less(W a, W b) { return W::map([&](int i) FASTVAE_INLINE { return P::less(a.lane[i], b.lane[i]); }); }
  static FASTVAE_HD W select(W mask, W a, W b) {
    return W::map([&](int i) FASTVAE_INLINE { return P::select(mask.lane[i], a.lane[i], b.lane[i]); });
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
