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

// Against N(0, I). `variance` = exp(logvar), which the sampler has at hand.
template <class V>
FASTVAE_HD GaussianKl<V> standard_kl(V mu, V logvar, V variance) {
  const auto residual = exp_residual(logvar, variance);
  return {V(0.5f) * Primitives<V>::fma(mu, mu, residual.value), mu, V(0.5f) * residual.slope, V(0)};
}

template <class V>
FASTVAE_HD GaussianKl<V> prior_kl(V mu, V logvar, V prior_mu, V prior_logvar) {
  using P = Primitives<V>;
  const V v = logvar - prior_logvar;
  const auto residual = exp_residual(v, P::exp(v));
  const V difference = mu - prior_mu;
  const V scaled = difference * P::exp(V(0) - prior_logvar);
  const V square = difference * scaled;
  return {V(0.5f) * (square + residual.value), scaled, V(0.5f) * residual.slope,
          V(-0.5f) * (square + residual.slope)};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
