// The discretised logistic (Salimans et al. 2017, equation 2; Kingma et al. 2016): the mass that a logistic density puts into the
// bin of a level, the bins at the ends open.
//
// Data are counted in half bins: level l of 0 .. levels is n = 2 l - levels, an integer, where the papers have x = n / levels in
// [-1, 1]. With h = exp(-log_scale) / levels, half a bin in units of the scale, and u = h (n - middle), the mass between u - h and
// u + h is, where t = |u|,
//
//     sinh h / (cosh h + cosh t) = e^-relu(t - h) (1 - e^-2h) / ((1 + e^-|t - h|) (1 + e^-(t + h)))
//
// of which every factor keeps its digits, however small the mass, or what is left of it: no difference of two sigmoids. An edge has the
// mass on its side of u + h (or u - h), a sigmoid.
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

// A level in units of the scale: u and h.
template <class V>
struct Standardised {
  V u, h, log_scale;
  decltype(Primitives<V>::less(V(0), V(0))) floored;

  // `distance` of the level from the mean, in half bins.
  FASTVAE_HD Standardised(V distance, V raw_log_scale, const Bins<V>& bins) : floored(Primitives<V>::less(raw_log_scale, bins.floor)) {
    using P = Primitives<V>;
    log_scale = P::select(floored, bins.floor, raw_log_scale);
    h = P::exp_bounded(P::neg(log_scale)) * bins.half_width;
    u = h * distance;
  }
};

// -log mass = linear + log(1 + e) + log(over), 0 <= e <= 3 and 1 <= over.
template <class V>
struct LogMass {
  V linear, e, over;
  V one_over;                 // 1 / ((1 + e) over)
  V by_middle, by_log_scale;  // slopes of log mass

  FASTVAE_HD LogMass(V n, const Standardised<V>& x, const Bins<V>& bins) {
    using P = Primitives<V>;
    constexpr bool in_double = sizeof(typename P::Scalar) == 8;
    const V zero(0), one(1), h = x.h, size = P::abs(x.u), y = size - h;
    const auto within = P::less(y, zero);  // the mean is in the bin
    const ExpPair<V> r = P::exp_pair(P::neg(h)), q = P::exp_pair(P::neg(size));
    // e^-|size - h| and e^-(size + h).
    V near = P::divide(P::select(within, r.exp, q.exp), P::select(within, q.exp, r.exp));
    if (const auto wide = P::less(V(40), h); P::any(wide)) near = P::select(wide, P::exp_bounded(P::neg(P::abs(y))), near);
    const V far = q.exp * r.exp, both = (one + near) * (one + far), tail = P::select(within, one, near);
    V factor = P::neg(r.minus_1) * (one + r.exp);

    // In bins so narrow that this would have to be tiny, the density in the middle is the mass to all digits.
    const auto is_small = P::either(P::less(h, V(in_double ? 1e-8 : 1e-4)), P::less(tail * factor, bins.small * both));
    const V one_q = one + q.exp, divisor = P::select(is_small, one_q * one_q, both);
    factor = P::select(is_small, one, factor);
    linear = P::select(is_small, size + (x.log_scale - bins.log_width), P::relu(y));
    e = P::select(is_small, P::fma(q.exp, q.exp, q.exp + q.exp), P::fma(near, far, near + far));

    const V inverse = P::divide(one, divisor * factor), one_over_divisor = inverse * factor;
    over = inverse * divisor;
    one_over = factor * one_over_divisor;
    // Of -log mass by t: sinh t / (cosh h + cosh t).
    const V slope = P::neg(q.minus_1) * one_q * P::select(P::zero_where(is_small, within), near, one) * one_over_divisor;
    const V inner = P::fma(P::fma(r.exp, r.exp, one), over, P::neg(tail * one_over));  // coth h - mass
    by_middle = P::with_sign(h * slope, x.u);
    by_log_scale = P::fma(size, slope, P::neg(P::select(is_small, one, h * inner)));

    // Open bins in place of these. Most vectors have none.
    if (const auto edge = P::less(bins.levels - one, P::abs(n)); P::any(edge)) {
      const V outward = P::with_sign(one, n) * x.u, beyond = outward - h;
      const V rest = P::select(P::less(outward, zero), far, near), inverse = P::divide(one, one + rest);
      const V by_end = P::select(P::less(beyond, zero), rest, one) * inverse;
      linear = P::select(edge, P::relu(beyond), linear);
      e = P::select(edge, rest, e);
      over = P::select(edge, one, over);
      one_over = P::select(edge, inverse, one_over);
      by_middle = P::select(edge, P::with_sign(h * by_end, n), by_middle);
      by_log_scale = P::select(edge, beyond * by_end, by_log_scale);
    }
    by_log_scale = P::zero_where(x.floored, by_log_scale);
  }
};

// What is left of the values of a few elements: one logarithm for all of their log(1 + e), and one for eight of their log(over), each of
// which is no more than 5e3 (in fp64, 5e7).
template <class V>
struct LogisticLogs {
  static constexpr int most = 63;  // 1 + e may be 4
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

// The same for CUDA as one of the structs of likelihoods.h. Params are mean and log-scale; t is a level, and the highest where it is above.
struct DiscretizedLogistic {
  static constexpr int params = 2;
  static constexpr int constants = 5;  // Bins
  static constexpr bool has_log1p = true;
  static constexpr bool has_pull = false;

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
  static FASTVAE_HD V element(const V (&param)[params], V t, const V* constant, V (&slope)[params], LogisticLogs<V>& logs) {
    using P = Primitives<V>;
    const Bins<V> all = bins(constant);
    const V n = half_bins(t, all.levels);
    const LogMass<V> mass(n, {P::fma(P::neg(param[0]), all.levels, n), param[1], all}, all);
    slope[0] = mass.by_middle * P::neg(all.levels);
    slope[1] = P::neg(mass.by_log_scale);
    logs.add(mass);
    return mass.linear;
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
