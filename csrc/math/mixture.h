// The density of a Gaussian as one component of a mixture, and the running sum of the components.
//
// The kernels work with halved squares: with r = exp(-logvar / 2) / sqrt(2) and t = (z - mu) r, the log-density of one dimension is
// -t^2 - (logvar + log(2 pi)) / 2. Its derivatives by z, mu and logvar are -2 t r, 2 t r and t^2 - 1/2.
#pragma once
#include "elementary.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

// r above. It is finite, so that a distance of 0 stays 0 for every variance.
template <class V>
FASTVAE_HD V half_inverse_root(V logvar) {
  return inverse_root(logvar) * V(0.70710678118654752440);
}

// The logarithm of a variance of 0, in place of -inf: differences of such numbers are not NaN.
constexpr float kLogOfNothing = -1e30f;
// No other log-density comes near this, so from here on it is that of a point met exactly by a component without variance.
constexpr float kInfiniteLogDensity = 1e29f;

// The constant -(logvar + log(2 pi)) / 2 of one dimension.
template <class V>
FASTVAE_HD V log_normaliser(V logvar) {
  using P = Primitives<V>;
  return P::fma(V(-0.5), P::at_least(logvar, V(kLogOfNothing)), V(-0.91893853320467274178));
}

// A sum of exponentials, exp(max) * sum, that takes one exponential for each summand.
template <class V>
struct RunningSum {
  // Below every finite summand, but finite: the difference of two -inf would be NaN.
  V max = V(-largest<typename Primitives<V>::Scalar>()), sum = V(0);

  FASTVAE_HD void add(V x) {
    using P = Primitives<V>;
    const V e = P::exp_bounded(P::neg_abs(x - max));
    const auto above = P::less(max, x);
    sum = P::select(above, P::fma(sum, e, V(1)), sum + e);
    max = P::select(above, x, max);
  }
};

// exp(x - total) for a summand x of a sum whose logarithm is `total`, which x exceeds only by rounding errors.
template <class V>
FASTVAE_HD V share(V x, V total) {
  using P = Primitives<V>;
  return P::exp_bounded(P::at_most(x - total, V(0)));
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
