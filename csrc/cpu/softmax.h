// Logits that share a normaliser: their maximum, the sum of their exponentials, and their softmax, over one block of a row.
#pragma once
#include <cmath>
#include <limits>

#include "staging.h"

namespace fastvae::cpu::FASTVAE_ISA {

template <class C>
constexpr C kNothing = -std::numeric_limits<C>::infinity();

template <class C>
C max_of(const C* x, int64_t n) {
  using V = Vec<C>;
  constexpr int64_t W = V::size();
  V best[4] = {V(kNothing<C>), V(kNothing<C>), V(kNothing<C>), V(kNothing<C>)};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int k = 0; k < 4; ++k) best[k] = at::vec::clamp_min(best[k], V::loadu(x + i + k * W));
  for (; i + W <= n; i += W) best[0] = at::vec::clamp_min(best[0], V::loadu(x + i));
  C lanes[W], result = kNothing<C>;
  at::vec::clamp_min(at::vec::clamp_min(best[0], best[1]), at::vec::clamp_min(best[2], best[3])).store(lanes);
  for (C lane : lanes) result = lane > result ? lane : result;
  for (; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// The sum of exp(x - max), where no x is above max.
template <class C>
double sum_of_exp(const C* x, C max, int64_t n) {
  using V = Vec<C>;
  using P = math::Primitives<V>;
  constexpr int64_t W = V::size();
  const V shift(max);
  Sum<C> sum;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int k = 0; k < 4; ++k) sum.add(k, P::exp_bounded(V::loadu(x + i + k * W) - shift));
  for (; i + W <= n; i += W) sum.add(0, P::exp_bounded(V::loadu(x + i) - shift));
  if (i < n) sum.add_lanes(P::exp_bounded(load_lanes(x + i, n - i) - shift), n - i);
  return sum.total();
}

// The sum of exp(x) over some logits, stored as exp(max) * sum: it cannot overflow, and the logits are read only once. A NaN among the
// logits makes it NaN.
struct Scaled {
  double max = kNothing<double>, sum = 0;

  void add(double other_max, double other_sum) {
    if (other_max > max) {
      sum = sum * std::exp(max - other_max) + other_sum;
      max = other_max;
    } else {
      sum += other_sum * std::exp(other_max - max);
    }
  }

  // Adds n logits, at most a block.
  template <class C>
  void add_logits(const C* x, int64_t n) {
    const C most = max_of(x, n);
    if (most != kNothing<C>) return add(most, sum_of_exp(x, most, n));
    for (int64_t i = 0; i < n; ++i)
      if (std::isnan(x[i])) sum = NAN;
  }
};

// grad[i] = factor * exp(x[i] - max).
template <class C>
void softmax(const C* x, C max, C factor, C* grad, int64_t n) {
  using V = Vec<C>;
  using P = math::Primitives<V>;
  constexpr int64_t W = V::size();
  const V shift(max), f(factor);
  int64_t i = 0;
  for (; i + W <= n; i += W) (P::exp_bounded(V::loadu(x + i) - shift) * f).store(grad + i);
  if (i < n) store_lanes(P::exp_bounded(load_lanes(x + i, n - i) - shift) * f, grad + i, n - i);
}

}  // namespace fastvae::cpu::FASTVAE_ISA
