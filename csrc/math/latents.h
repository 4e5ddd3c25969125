// KL( N(mu, exp(v)) || N(mu_p, exp(v_p)) ) of one element, in nats, and its derivatives:
//   KL = 1/2 [ (mu - mu_p)^2 exp(-v_p) + exp(v - v_p) - 1 - (v - v_p) ]
// (Kingma & Welling 2014, appendix B, for mu_p = v_p = 0).
#pragma once
#include "elementary.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

template <class V>
struct GaussianKl {
  V value;
  V d_mu, d_logvar;  // the prior's: d_prior_mu = -d_mu
  V d_prior_logvar;
};

// The part of the scales, with sigma = exp((v - v_p) / 2) and h its logarithm: exp(2 h) - 1 - 2 h and exp(2 h) - 1. As sums of the parts of
// exp(h) they are never small differences of large numbers.
template <class V>
FASTVAE_HD V scale_term(const ExpParts<V>& sigma) {
  return Primitives<V>::fma(sigma.minus_1, sigma.minus_1, sigma.minus_1_h + sigma.minus_1_h);
}
template <class V>
FASTVAE_HD V scale_slope(const ExpParts<V>& sigma) {
  return Primitives<V>::fma(sigma.minus_1, sigma.minus_1, sigma.minus_1 + sigma.minus_1);
}

// Against N(0, I). `sigma`: the parts of exp(logvar / 2), which the sampler needs too.
template <class V>
FASTVAE_HD GaussianKl<V> standard_kl(V mu, const ExpParts<V>& sigma) {
  return {V(0.5f) * Primitives<V>::fma(mu, mu, scale_term(sigma)), mu, V(0.5f) * scale_slope(sigma), V(0)};
}

template <class V>
FASTVAE_HD GaussianKl<V> prior_kl(V mu, V logvar, V prior_mu, V prior_logvar) {
  using P = Primitives<V>;
  const auto ratio = P::exp_parts(V(0.5f) * (logvar - prior_logvar));
  // Twice the inverse of the prior's scale, not once its square: that is finite for half as many.
  const V inverse = P::exp(V(-0.5f) * prior_logvar), scaled = (mu - prior_mu) * inverse;
  const V square = scaled * scaled, slope = scale_slope(ratio);
  return {V(0.5f) * (square + scale_term(ratio)), scaled * inverse, V(0.5f) * slope, V(-0.5f) * (square + slope)};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
