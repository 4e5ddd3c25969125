// The KL divergence of one element, KL( N(mu, exp(v)) || N(mu_p, exp(v_p)) ), in nats, and its derivatives:
//   KL = 1/2 [ (mu - mu_p)^2 exp(-v_p) + exp(v - v_p) - 1 - (v - v_p) ]
// (Kingma & Welling 2014, appendix B, for mu_p = v_p = 0).
#pragma once
#include "elementary.h"
#include "scale_form.h"

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

// log sigma^2 and its derivative by the encoder's number.
template <class V>
struct LogVariance {
  V value, grad;
};

// log(1 + t) for t in [0, 1], with a relative error of 2e-8 in fp32.
template <class V>
FASTVAE_HD V log1p_of_unit(V t) {
  if constexpr (sizeof(typename Primitives<V>::Scalar) == 8) return Primitives<V>::log1p(t);
  constexpr float fit[] = {-0.00317605701f, 0.0195425265f, -0.0563736111f, 0.105436236f,  -0.152696669f,
                           0.196632743f,    -0.249516159f, 0.333297104f,   -0.499998927f, 1.0f};
  return t * polynomial(t, fit);
}

// log(exp(v) + exp(low)) and its derivative by v. The larger exponential is taken out, so nothing overflows.
template <class V>
FASTVAE_HD LogVariance<V> log_of_shifted(V v, V low) {
  using P = Primitives<V>;
  const V t = P::exp_bounded(P::neg(P::abs(v - low)));
  return {P::at_least(v, low) + log1p_of_unit(t), P::select(P::less(v, low), t, V(1)) / (V(1) + t)};
}

// log((log(1 + exp(v)) + eps)^2) and its derivative. Below `tail`, log(1 + exp(v)) + eps counts as exp(v), which may underflow.
template <class V>
FASTVAE_HD LogVariance<V> log_of_softplus(V v, V eps, V tail) {
  using P = Primitives<V>;
  const V t = P::exp_bounded(P::neg(P::abs(v))), sigma = P::relu(v) + log1p_of_unit(t) + eps;
  const auto below = P::less(v, tail);
  const V positive = P::select(below, V(1), sigma);
  // P::log takes neither infinity nor NaN.
  const V logarithm = P::select(P::less(positive, V(INFINITY)), P::log(positive), positive);
  // The derivative of log(1 + exp(v)) is 1 / (1 + t), or t / (1 + t) where v is negative.
  const V grad = P::select(P::less(v, V(0)), t + t, V(2)) / ((V(1) + t) * positive);
  return {V(2) * P::select(below, v, logarithm), P::select(below, V(2), grad)};
}

// Calls f with the function of `form` that turns v into log sigma^2, so that the form is chosen once for many elements.
template <class V, class F>
FASTVAE_HD void with_log_variance(const ScaleForm& form, const F& f) {
  using P = Primitives<V>;
  using C = typename P::Scalar;
  const C first = C(form.constants[0]), second = C(form.constants[1]), third = C(form.constants[2]);
  switch (form.kind) {
    case ScaleForm::clamped:
      return f([=](V v) FASTVAE_INLINE {
        const auto outside = P::either(P::less(v, V(first)), P::less(V(second), v));
        return LogVariance<V>{P::at_most(P::at_least(v, V(first)), V(second)), P::zero_where(outside, V(1))};
      });
    case ScaleForm::bounded:
      return f([=](V v) FASTVAE_INLINE {
        const Tanh<V> tanh((v - V(first)) * V(third));
        return LogVariance<V>{P::fma(V(second), tanh.value, V(first)), tanh.grad};
      });
    case ScaleForm::log_std:
      return f([=](V v) FASTVAE_INLINE { return LogVariance<V>{V(2) * v, V(2)}; });
    case ScaleForm::shifted_log_std:
      return f([=](V v) FASTVAE_INLINE {
        const LogVariance<V> half = log_of_shifted(v, V(first));
        return LogVariance<V>{V(2) * half.value, V(2) * half.grad};
      });
    case ScaleForm::softplus:
      return f([=, tail = first > C(0) ? -C(INFINITY) : C(sizeof(C) == 8 ? -40 : -20)](V v) FASTVAE_INLINE {
        return log_of_softplus(v, V(first), V(tail));
      });
    case ScaleForm::shifted_variance:
      return f([=](V v) FASTVAE_INLINE { return log_of_shifted(v, V(first)); });
    default:
      return f([=](V v) FASTVAE_INLINE { return LogVariance<V>{v, V(1)}; });
  }
}

// The soft clamp bound * tanh(v / bound), and its derivative.
template <class V>
FASTVAE_HD LogVariance<V> soft_clamp(V v, typename Primitives<V>::Scalar bound) {
  const Tanh<V> tanh(v / V(bound));
  return {V(bound) * tanh.value, tanh.grad};
}

// `grad` times `factor`, which is at least 0. A factor of 0 gives 0 even for an infinite gradient.
template <class V>
FASTVAE_HD V chained(V grad, V factor) {
  using P = Primitives<V>;
  return P::zero_where(P::less(factor, V(1e-37f)), grad * factor);
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
