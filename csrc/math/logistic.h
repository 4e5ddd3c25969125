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
    const ExpParts<V> r = P::exp_parts(P::neg(h));
    const ExpParts<V> parts = P::exp_parts(P::neg(size));
    const V q = parts.exp;

    const auto lowest = P::less(n, one - bins.levels), highest = P::less(bins.levels - one, n);
    const auto inner_or = [&](V inner, V edge) { return P::select(lowest, edge, P::select(highest, edge, inner)); };
    const V t = P::select(lowest, P::neg(u), P::select(highest, u, size));
    const V sign = P::select(lowest, V(-1), P::select(highest, one, P::select(P::less(u, zero), V(-1), one)));
    V y = t - h;
    e1 = P::exp_bounded(P::neg(P::abs(y)));
    e2 = inner_or(q * r.exp, zero);
    factor = inner_or(one_minus_square(h, r), one);
    const V odd = inner_or(one_minus_square(size, parts), one);

    // In bins so narrow that 1 - r^2 would have to be tiny, the density in the middle is the mass to all digits.
    constexpr double narrow = sizeof(typename P::Scalar) == 8 ? 1e-8 : 1e-4;
    const V above_0 = P::select(P::less(zero, y), e1, one) * factor;  // the mass but for (1 + e1) (1 + e2)
    const V judged = inner_or(P::select(P::less(h, V(narrow)), V(-1), above_0), V(2));
    const auto is_small = P::less(judged, bins.small * (one + e1) * (one + e2));
    y = P::select(is_small, size, y);
    e1 = P::select(is_small, q, e1);
    e2 = P::select(is_small, q, e2);
    factor = P::select(is_small, one, factor);
    linear = P::relu(y) + P::select(is_small, log_scale - bins.log_width, zero);

    const V f1 = one + e1, f2 = one + e2;
    const V inverse = one / (f1 * f2 * factor), i1 = inverse * f2 * factor, i2 = inverse * f1 * factor;
    one_over_factors = factor * i1 * i2;
    const V slope = P::select(P::less(y, zero), e1, one) * odd * i1 * i2;  // of -log mass by t: sinh t / (cosh h + cosh t)
    const V coth = P::fma(r.exp, r.exp, one) * (inverse * f1 * f2);
    const V by_h = P::select(is_small, one, h * inner_or(coth - P::select(P::less(zero, y), e1, one) * one_over_factors, slope));
    by_log_scale = P::select(floored, zero, P::fma(t, slope, P::neg(by_h)));
    by_middle = h * sign * slope;
  }

 private:
  // 1 - e^-2x for x >= 0, given the parts of e^-x.
  static FASTVAE_HD V one_minus_square(V x, const ExpParts<V>& parts) {
    using P = Primitives<V>;
    const V one(1);
    return P::select(P::less(x, one), P::neg(parts.minus_1), one - parts.exp) * (one + parts.exp);
  }
};

// tanh(x) and its derivative.
template <class V>
struct Tanh {
  V value, slope;

  FASTVAE_HD explicit Tanh(V x) {
    using P = Primitives<V>;
    const ExpParts<V> e = P::exp_parts(V(-2) * P::abs(x));
    const V inverse = V(1) / (V(1) + e.exp);
    const V size = P::neg(e.minus_1) * inverse;
    value = P::select(P::less(x, V(0)), P::neg(size), size);
    slope = V(4) * e.exp * inverse * inverse;
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
