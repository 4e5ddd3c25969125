// The discretised logistic (Salimans et al. 2017, equation 2; Kingma et al. 2016): the mass that a logistic density assigns to the bin
// of a level. The first and the last bin extend to infinity.
//
// Data are measured in half bins: level l in 0 .. levels becomes the integer n = 2 l - levels, where the papers use x = n / levels in
// [-1, 1]. Let h = exp(-log_scale) / levels be half the width of a bin in units of the scale, u = h (n - middle) and t = |u|. The mass
// between u - h and u + h is then
//
//     sinh h / (cosh h + cosh t) = e^-relu(t - h) (1 - e^-2h) / ((1 + e^-|t - h|) (1 + e^-(t + h)))
//
// Unlike a difference of two sigmoids, every factor is accurate, no matter how close the mass is to 0 or to 1. An edge bin has all the
// mass below u + h (or above u - h), which is a single sigmoid.
#pragma once
#include "elementary.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

// The values that all elements share. If the mass is below `small` (1e-5 in the papers), the density at the middle of the bin times the
// width of the bin replaces it.
template <class V>
struct Bins {
  V levels, half_width, log_width;  // 2^bits - 1; 1 / levels and log(2 / levels), measured in x
  V floor, small;                   // lower bounds of the log-scale and of the mass
  bool any_wide;                    // whether the floor allows a half bin to be wider than 40 scales

  FASTVAE_HD Bins(V levels_, V half_width_, V log_width_, V floor_, V small_)
      : levels(levels_), half_width(half_width_), log_width(log_width_), floor(floor_), small(small_) {
    using P = Primitives<V>;
    any_wide = P::any(P::less(V(40), P::exp_bounded(P::neg(floor)) * half_width));
  }
};

// A level in half bins, and whether its bin is one of the two at the edges.
template <class V>
struct Level {
  V n;
  decltype(Primitives<V>::less(V(0), V(0))) edge;
  bool any_edge;

  FASTVAE_HD Level(V n_, const Bins<V>& bins)
      : n(n_), edge(Primitives<V>::less(bins.levels - V(1), Primitives<V>::abs(n_))), any_edge(Primitives<V>::any(edge)) {}
};

// The position u of a level and its half bin h, in units of the scale.
template <class V>
struct Standardised {
  V u, h, log_scale;
  decltype(Primitives<V>::less(V(0), V(0))) floored;

  // `distance` is the level minus the mean, in half bins.
  FASTVAE_HD Standardised(V distance, V raw_log_scale, const Bins<V>& bins) : floored(Primitives<V>::less(raw_log_scale, bins.floor)) {
    using P = Primitives<V>;
    log_scale = P::at_least(raw_log_scale, bins.floor);
    h = P::exp_bounded(P::neg(log_scale)) * bins.half_width;
    u = h * distance;
  }
};

// -log mass = linear + log(1 + e) + log(over), where 0 <= e <= 3 and over >= 1.
template <class V>
struct LogMass {
  V linear, e, over;
  V one_over;                 // 1 / ((1 + e) over)
  V by_middle, by_log_scale;  // derivatives of log mass

  FASTVAE_HD LogMass(const Level<V>& level, const Standardised<V>& x, const Bins<V>& bins) : LogMass(level, x, bins, level.any_edge) {}

  // `any_edge` may be a compile-time constant, so that vectors without edge bins, which are the majority, get specialised code.
  template <class Bool>
  FASTVAE_HD LogMass(const Level<V>& level, const Standardised<V>& x, const Bins<V>& bins, Bool any_edge) {
    using P = Primitives<V>;
    constexpr bool in_double = sizeof(typename P::Scalar) == 8;
    const V zero(0), one(1), h = x.h, size = P::abs(x.u), y = size - h;
    const ExpPair<V> r = P::exp_pair(P::neg(h)), q = P::exp_pair(P::neg(size));
    // `tail` is e^-relu(size - h) and `inside` is e^-relu(h - size). One of them is exactly 1, and the other is e^-|size - h|.
    const V larger = P::at_least(q.exp, r.exp);
    V tail = P::divide(q.exp, larger), inside = P::divide(r.exp, larger);
    if (bins.any_wide) {
      const auto wide = P::less(V(40), h);
      tail = P::select(wide, P::exp_bounded(P::neg(P::relu(y))), tail);
      inside = P::select(wide, P::exp_bounded(P::neg(P::relu(P::neg(y)))), inside);
    }
    const V near = P::at_most(tail, inside), far = q.exp * r.exp;
    const V e_exact = P::fma(near, far, near + far), narrowing = P::fnma(r.minus_1, one + r.exp, zero);

    // In bins so narrow that `narrowing` would be tiny, the mass equals density times width to full precision.
    const auto is_small =
        P::either(P::less(h, V(in_double ? 1e-8 : 1e-4)), P::less(tail * narrowing, P::fma(bins.small, e_exact, bins.small)));
    const V one_if_small = P::keep_where(is_small, one);
    const V factor = P::at_least(narrowing, one_if_small);
    linear = P::select(is_small, size + (x.log_scale - bins.log_width), P::relu(y));
    e = P::select(is_small, P::fma(q.exp, q.exp, q.exp + q.exp), e_exact);

    const V divisor = one + e, inverse = P::divide(one, divisor * factor), one_over_divisor = inverse * factor;
    over = inverse * divisor;
    one_over = factor * one_over_divisor;
    // The derivative of -log mass by t: sinh t / (cosh h + cosh t).
    const V grad = P::fnma(q.minus_1, one + q.exp, zero) * P::at_least(inside, one_if_small) * one_over_divisor;
    const V inner = P::fnma(tail, one_over, P::fma(r.exp, r.exp, one) * over);  // coth h - mass
    by_middle = P::with_sign(h * grad, x.u);
    by_log_scale = size * grad - (P::zero_where(is_small, h * inner) + one_if_small);

    // Edge bins have their own formulas.
    if (any_edge) {
      const V outward = P::with_sign(one, level.n) * x.u, beyond = outward - h;
      const V rest = P::select(P::less(outward, zero), far, near), inverse = P::divide(one, one + rest);
      const V by_end = P::select(P::less(beyond, zero), rest, one) * inverse;
      linear = P::select(level.edge, P::relu(beyond), linear);
      e = P::select(level.edge, rest, e);
      over = P::select(level.edge, one, over);
      one_over = P::select(level.edge, inverse, one_over);
      by_middle = P::select(level.edge, P::with_sign(h * by_end, level.n), by_middle);
      by_log_scale = P::select(level.edge, beyond * by_end, by_log_scale);
    }
    by_log_scale = P::zero_where(x.floored, by_log_scale);
  }
};

// Collects the logarithms in the values of a few elements, so that all their terms log(1 + e) take one logarithm, and every eight terms
// log(over) take one. Each `over` is at most 5e3 (5e7 in fp64).
template <class V>
struct LogisticLogs {
  static constexpr int most = 63;  // 1 + e can be as large as 4
  Log1pSum<V> excess;
  V over = V(1), sum = V(0);
  int count = 0;

  FASTVAE_HD void add(const LogMass<V>& mass) {
    excess.add(mass.e, V(1) + mass.e);
    over = over * mass.over;
    if (++count % 8 != 0) return;
    sum = sum + Primitives<V>::log(over);
    over = V(1);
  }
  FASTVAE_HD V value() const { return sum + Primitives<V>::log(over) + excess.value(); }
};

// The discretised logistic as a struct of the kind that element.h describes; only CUDA uses it. The params are mean and log-scale. The
// target t is a level; levels above the highest count as the highest.
struct DiscretizedLogistic {
  static constexpr int params = 2;
  static constexpr int constants = 5;  // the members of Bins
  static constexpr bool has_log1p = true;
  static constexpr bool has_scale_grad = false;

  template <class V>
  static FASTVAE_HD Bins<V> bins(const V* constant) {
    return {constant[0], constant[1], constant[2], constant[3], constant[4]};
  }

  template <class V>
  static FASTVAE_HD V half_bins(V level, V levels) {
    level = Primitives<V>::select(Primitives<V>::less(levels, level), levels, level);
    return level + level - levels;
  }

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V* constant, V (&grad)[params], LogisticLogs<V>& logs) {
    using P = Primitives<V>;
    const Bins<V> all = bins(constant);
    const V n = half_bins(t, all.levels);
    const LogMass<V> mass({n, all}, {P::fnma(param[0], all.levels, n), param[1], all}, all);
    grad[0] = mass.by_middle * P::neg(all.levels);
    grad[1] = P::neg(mass.by_log_scale);
    logs.add(mass);
    return mass.linear;
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
