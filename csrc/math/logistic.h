// The discretised logistic (Salimans et al. 2017, equation 2; Kingma et al. 2016): the mass that a logistic density puts into the
// bin of a level, the bins at the ends open.
//
// Data are counted in half bins: level l of 0 .. levels is n = 2 l - levels, an integer, where the papers have x = n / levels in
// [-1, 1]. With h = exp(-log_scale) / levels, half a bin in units of the scale, and u = h (n - middle), the mass between u - h and
// u + h is, where q = e^-|u| and r = e^-h,
//
//     sinh h / (cosh h + cosh u) = q (1 - r^2) / ((q + r) (1 + q r))
//
// of which every factor keeps its digits, however small the mass: no difference of two sigmoids. An edge has the mass on its side of
// u + h (or u - h): 1 / (1 + q r) where the mean is beyond that, else q / (q + r).
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

  Standardised() = default;
  // `middle`: the mean, in half bins.
  FASTVAE_HD Standardised(V n, V middle, V raw_log_scale, const Bins<V>& bins)
      : u(n - middle), floored(Primitives<V>::less(raw_log_scale, bins.floor)) {
    using P = Primitives<V>;
    log_scale = P::select(floored, bins.floor, raw_log_scale);
    h = P::exp_bounded(P::neg(log_scale)) * bins.half_width;
    u = h * u;
  }
};

// -log mass = linear + log(over) + log(1 + e), e >= 0; e is not 0 at an edge that has nearly all of the mass, and over then 1.
template <class V>
struct LogMass {
  V linear, over, e;
  V one_over;                 // 1 / (over (1 + e))
  V by_middle, by_log_scale;  // slopes of log mass

  FASTVAE_HD LogMass(V n, const Standardised<V>& x, const Bins<V>& bins) : e(V(0)) {
    using P = Primitives<V>;
    constexpr bool wide = sizeof(typename P::Scalar) == 8;
    const V zero(0), one(1), h = x.h, size = P::abs(x.u);

    // In a bin as wide as this only the end that is closer to the mean counts: it may as well be narrower by `excess`.
    const V excess = P::relu(h - V(wide ? 40 : 20)), t = P::relu(size - excess);
    const ExpPair<V> r = P::exp_pair(excess - h), q = P::exp_pair(P::neg(t));
    const V ab = (q.exp + r.exp) * P::fma(q.exp, r.exp, one), one_q = one + q.exp;
    V factor = P::neg(r.minus_1) * (one + r.exp);

    // In bins so narrow that this would have to be tiny, the density in the middle is the mass to all digits.
    const auto is_small = P::either(P::less(h, V(wide ? 1e-8 : 1e-4)), P::less(q.exp * factor, bins.small * ab));
    factor = P::select(is_small, one, factor);
    const V divisor = P::select(is_small, one_q * one_q, ab);
    linear = P::select(is_small, size + (x.log_scale - bins.log_width), t);

    const V inverse = P::divide(one, divisor * factor), one_over_divisor = inverse * factor, one_over_factor = inverse * divisor;
    one_over = factor * one_over_divisor;
    over = divisor * one_over_factor;
    // Of -log mass by t: sinh t / (cosh h + cosh t).
    const V slope = P::neg(q.minus_1) * one_q * P::select(is_small, one, r.exp) * one_over_divisor;
    const V inner = P::fma(P::fma(r.exp, r.exp, one), one_over_factor, P::neg(q.exp * one_over));  // coth h - mass
    by_middle = P::with_sign(h * slope, x.u);
    by_log_scale = P::fma(size, slope, P::neg(P::select(is_small, one, h * inner)));

    // Open bins in place of these. Most vectors have none.
    if (const auto edge = P::less(bins.levels - one, P::abs(n)); P::any(edge)) {
      const V outward = P::with_sign(one, n) * x.u, beyond = outward - excess;
      const auto inside = P::less(beyond, zero);  // the mean is beyond the edge
      const V end = P::exp_bounded(P::neg(P::abs(beyond))), rest = P::select(inside, end * r.exp, zero);
      const V most = P::select(inside, one, end + r.exp), one_over_most = P::divide(one, most + rest);
      const V by_end = P::select(inside, end, one) * r.exp * one_over_most;
      linear = P::select(edge, P::relu(beyond), linear);
      over = P::select(edge, most, over);
      e = P::select(edge, rest, zero);
      one_over = P::select(edge, one_over_most, one_over);
      by_middle = P::select(edge, P::with_sign(h * by_end, n), by_middle);
      by_log_scale = P::select(edge, (outward - h) * by_end, by_log_scale);
    }
    by_log_scale = P::zero_where(x.floored, by_log_scale);
  }
};

// What is left of the values of a few elements: one logarithm for all of their log(1 + e), and one for four of their log(over), each of
// which is between 2e-9 and 4e4 (in fp64 no more than the square of that).
template <class V>
struct LogisticLogs {
  Log1pSum<V> edges;
  V over = V(1), sum = V(0);
  int count = 0;

  FASTVAE_HD void add(const LogMass<V>& mass) {
    edges.add(mass.e, V(1) + mass.e);
    over = over * mass.over;
    if (++count % 4 != 0) return;
    sum = sum + Primitives<V>::log(over);
    over = V(1);
  }
  FASTVAE_HD V value() const { return sum + Primitives<V>::log(over) + edges.value(); }
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
    const LogMass<V> mass(n, {n, param[0] * all.levels, param[1], all}, all);
    slope[0] = mass.by_middle * P::neg(all.levels);
    slope[1] = P::neg(mass.by_log_scale);
    logs.add(mass);
    return mass.linear;
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
