// The discretised logistic (Salimans et al. 2017, equation 2; Kingma et al. 2016): the mass that a logistic density puts into the
// bin of a level, the bins at the ends open.
//
// Data are counted in half bins: level l of 0 .. levels is n = 2 l - levels, an integer, where the papers have x = n / levels in
// [-1, 1]. With h = exp(-log_scale) / levels, half a bin in units of the scale, and u = h (n - middle), the mass between u - h and
// u + h is
//
//     sinh h / (cosh h + cosh u) = e^-relu(y) (1 - r^2) / ((1 + e^-|y|) (1 + q r)),   y = |u| - h,  q = e^-|u|,  r = e^-h
//
// of which every factor keeps its digits, however small the mass: no difference of two sigmoids.
#pragma once
#include "elementary.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

// What is the same for all elements. A mass below `small` (1e-5 in the papers) is that of the density in the middle of the bin.
template <class V>
struct Bins {
  V levels, half_width, log_width;  // 2^bits - 1; in x: 1 / levels, log(2 / levels)
  V floor, small;                   // of log-scales; of masses
};

// -log mass = linear + log(1 + e1) + log(1 + e2) - log(factor). The slopes are those of log mass.
template <class V>
struct LogMass {
  V linear, e1, e2, factor;
  V by_middle, by_log_scale;
  V one_over_factors;  // factor / ((1 + e1) (1 + e2))

  // `middle`: the mean, in half bins.
  FASTVAE_HD LogMass(V n, V middle, V raw_log_scale, const Bins<V>& bins) {
    using P = Primitives<V>;
    const V zero(0), one(1);
    const auto floored = P::less(raw_log_scale, bins.floor);
    const V log_scale = P::select(floored, bins.floor, raw_log_scale);
    const V h = P::exp_bounded(P::neg(log_scale)) * bins.half_width;
    const V u = h * (n - middle), size = P::abs(u);
    const ExpPair<V> r = P::exp_pair(P::neg(h)), q = P::exp_pair(P::neg(size));

    const auto edge = P::less(bins.levels - one, P::abs(n));
    const V sign = P::select(P::less(P::select(edge, n, u), zero), V(-1), one), t = u * sign;  // |u| but at the edges
    V y = t - h;
    e1 = P::exp_bounded(P::neg(P::abs(y)));
    e2 = P::select(edge, zero, q.exp * r.exp);
    factor = P::select(edge, one, P::neg(r.minus_1) * (one + r.exp));
    const V odd = P::select(edge, one, P::neg(q.minus_1) * (one + q.exp));

    // In bins so narrow that 1 - r^2 would have to be tiny, the density in the middle is the mass to all digits.
    constexpr double narrow = sizeof(typename P::Scalar) == 8 ? 1e-8 : 1e-4;
    const V above = P::select(P::less(zero, y), e1, one) * factor;  // the mass but for (1 + e1) (1 + e2)
    const V judged = P::select(edge, V(2), P::select(P::less(h, V(narrow)), V(-1), above));
    const auto is_small = P::less(judged, bins.small * (one + e1) * (one + e2));
    y = P::select(is_small, size, y);
    e1 = P::select(is_small, q.exp, e1);
    e2 = P::select(is_small, q.exp, e2);
    factor = P::select(is_small, one, factor);
    linear = P::relu(y) + P::select(is_small, log_scale - bins.log_width, zero);

    const V f1 = one + e1, f2 = one + e2, f12 = f1 * f2;
    const V inverse = one / (f12 * factor), i12 = inverse * factor;
    one_over_factors = factor * i12;
    const V slope = P::select(P::less(y, zero), e1, one) * odd * i12;  // of -log mass by t: sinh t / (cosh h + cosh t)
    const V inner = P::fma(P::fma(r.exp, r.exp, one), inverse * f12, P::neg(above * i12));  // coth h - mass
    const V by_h = P::select(is_small, one, h * P::select(edge, slope, inner));
    by_log_scale = P::select(floored, zero, P::fma(t, slope, P::neg(by_h)));
    by_middle = h * sign * slope;
  }
};

// tanh(x) and its derivative.
template <class V>
struct Tanh {
  V value, slope;

  FASTVAE_HD explicit Tanh(V x) {
    using P = Primitives<V>;
    const ExpPair<V> e = P::exp_pair(V(-2) * P::abs(x));
    const V inverse = V(1) / (V(1) + e.exp);
    const V size = P::neg(e.minus_1) * inverse;
    value = P::select(P::less(x, V(0)), P::neg(size), size);
    slope = V(4) * e.exp * inverse * inverse;
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
