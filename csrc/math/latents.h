// The KL divergence of one element, KL( N(mu, exp(v)) || N(mu_p, exp(v_p)) ), in nats, and its derivatives:
//   KL = 1/2 [ (mu - mu_p)^2 exp(-v_p) + exp(v - v_p) - 1 - (v - v_p) ]
// (Kingma & Welling 2014, appendix B, for mu_p = v_p = 0).
#pragma once
#include "elementary.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

template <class V>
struct GaussianKl {
  V value;
  V d_mu, d_logvar;  // the derivative by the prior's mean is -d_mu
  V d_prior_logvar;
};

// The part of the KL that depends on the scales, and its derivative. With sigma = exp((v - v_p) / 2) and h = log sigma, they are half of
// exp(2 h) - 1 - 2 h and half of exp(2 h) - 1. As sums of the parts of exp(h) they are never small differences of large numbers. Halving
// comes before squaring, so that they are finite wherever the KL is.
template <class V>
FASTVAE_HD V half_scale_term(const ExpParts<V>& sigma) {
  return Primitives<V>::fma(V(0.5f) * sigma.minus_1, sigma.minus_1, sigma.minus_1_h);
}
template <class V>
FASTVAE_HD V half_scale_grad(const ExpParts<V>& sigma) {
  return Primitives<V>::fma(V(0.5f) * sigma.minus_1, sigma.minus_1, sigma.minus_1);
}

// The KL against N(0, I). `sigma` has the parts of exp(logvar / 2), which the sampler needs too.
template <class V>
FASTVAE_HD GaussianKl<V> standard_kl(V mu, const ExpParts<V>& sigma) {
  return {Primitives<V>::fma(V(0.5f) * mu, mu, half_scale_term(sigma)), mu, half_scale_grad(sigma), V(0)};
}

template <class V>
FASTVAE_HD GaussianKl<V> prior_kl(V mu, V logvar, V prior_mu, V prior_logvar) {
  using P = Primitives<V>;
  const auto ratio = P::exp_parts(V(0.5f) * (logvar - prior_logvar));
  const V root = inverse_root(V(0.5f) * prior_logvar), scaled = (mu - prior_mu) * root * root;
  const V half_square = V(0.5f) * scaled * scaled, half_grad = half_scale_grad(ratio);
  return {half_square + half_scale_term(ratio), scaled * root * root, half_grad, P::neg(half_square + half_grad)};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
