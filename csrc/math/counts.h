// The likelihoods of counts: -log p of one element in nats, and its derivatives. Each form of the Poisson is a struct as element.h
// describes it. The functions after them compute the negative binomial (Lopez et al. 2018, in scvi-tools' parametrisation), also with
// additional zeros (Risso et al. 2018). mu is the mean, theta the inverse dispersion, pi the logit of an additional zero and t the count.
//
// Most counts of a cell are zeros. Their nll is just theta log(1 + mu / theta), which any V can compute. The other counts need
// differences of log Gamma, which keep their digits only in fp64.
#pragma once
#include "element.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

// -log Poisson(t; exp(a)) = exp(a) - t a + log(t!).
struct Poisson {
  static constexpr int params = 1;
  static constexpr int constants = 0;
  static constexpr bool has_log1p = false;
  static constexpr bool has_scale_grad = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V*, V (&grad)[params], Log1pSum<V>&) {
    using P = Primitives<V>;
    constexpr auto from = stirling_from<V>();
    constexpr auto below = from - from * (sizeof(typename P::Scalar) == 8 ? 0x1p-54 : 0x1p-25);  // the largest number before it
    const V a = param[0];
    const auto large = P::less(V(below), t);
    if (!P::any(large)) {
      const V rate = P::exp(a);
      grad[0] = rate - t;
      return P::fma(P::neg(t), a, rate) + log_small_factorial(t);
    }
    // With u = a - log t the nll is t (exp(u) - 1 - u) + log(2 pi t) / 2 + .... In this form the three terms that are as large as t log t
    // have already been cancelled algebraically.
    const V n = P::select(large, t, V(1)), log_n = P::log(n);
    const ExpParts<V> parts = P::exp_parts(a - log_n);
    const V small = P::fma(P::neg(t), a, parts.exp) + log_small_factorial(P::select(large, V(0), t));
    const V rest = P::fma(V(0.5f), log_n, stirling_rest(V(1) / n) + V(0.918938533204672741780329736406));
    grad[0] = P::select(large, t * parts.minus_1, parts.exp - t);
    return P::select(large, P::fma(t, parts.minus_1_h, rest), small);
  }

  // An infinite rate has an infinite nll. At a rate of 0, the nll of a count of 0 is 0 and that of any other count is infinite.
  template <class V>
  static FASTVAE_HD V at_ends(const V (&param)[params], V t, V value) {
    using P = Primitives<V>;
    constexpr auto most = largest<typename P::Scalar>();
    const V of_none = P::select(P::less(V(0), t), V(INFINITY), t);
    return P::select(P::less(V(most), param[0]), param[0] + t, P::select(P::less(param[0], V(-most)), of_none, value));
  }
};

// -log Poisson(t; m) = m - t log m + log(t!) with m = rate + eps, where eps is the constant. The derivative by m is 1 - t / m. A rate of
// 0 gives a count of 0 the probability 1.
struct PoissonRate {
  static constexpr int params = 1;
  static constexpr int constants = 1;
  static constexpr bool has_log1p = false;
  static constexpr bool has_scale_grad = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V* constant, V (&grad)[params], Log1pSum<V>&) {
    using P = Primitives<V>;
    constexpr bool kWide = sizeof(typename P::Scalar) == 8;
    constexpr auto from = stirling_from<V>();
    constexpr auto below = from - from * (kWide ? 0x1p-54 : 0x1p-25);  // the largest number before it
    constexpr typename P::Scalar tiny = kWide ? 1e-300 : 1e-37, largest = kWide ? 1.79e308 : 3.4e38;
    const V m = param[0] + constant[0], d = m - t;
    const auto large = P::less(V(below), t), is_zero = P::less(P::abs(t), V(tiny));
    const V n = P::select(large, t, V(1)), inverse = V(1) / n, ratio = m * inverse;
    V log_ratio = P::log(ratio);
    if (P::any(P::less(ratio, V(tiny)))) {
      // This branch handles an m that is subnormal or not positive, and an m whose ratio became so in the division.
      constexpr typename P::Scalar scale = kWide ? 0x1p200 : 0x1p100, log_scale = (kWide ? 200 : 100) * 0.693147180559945309;
      const V scaled = m * V(scale), other = P::log(scaled) - V(log_scale) - P::log(n);
      const V at_most_zero = P::select(P::less(scaled, V(0)), V(NAN), V(-INFINITY));
      log_ratio = P::select(P::less(ratio, V(tiny)), P::select(P::less(V(0), scaled), other, at_most_zero), log_ratio);
    }
    log_ratio = P::select(is_zero, V(0), log_ratio);
    V value = P::fnma(t, log_ratio, m) + log_small_factorial(P::select(large, V(0), t));
    if (P::any(large)) {
      // With e = m / t - 1 the nll is t (e - log(1 + e)) + log(2 pi t) / 2 + .... Near e = 0 the logarithm is computed with
      // s = e / (2 + e) as log(1 + e) = 2 (s + s^3/3 + ...).
      constexpr float fit[] = {2.f / 13, 2.f / 11, 2.f / 9, 2.f / 7, 2.f / 5, 2.f / 3};
      const V e = d * inverse, s = e / (V(2) + e), square = s * s;
      V series;
      if constexpr (kWide) series = log1p_series(square);
      else series = polynomial(square, fit);
      const V by_series = t * (s * P::fnma(square, series, e));
      const V rest = P::fma(V(0.5f), P::log(n), stirling_rest(inverse) + V(0.918938533204672741780329736406));
      const V of_large = P::select(P::less(P::abs(e), V(0.5f)), by_series, P::fnma(t, log_ratio, d)) + rest;
      value = P::select(large, of_large, value);
    }
    // An infinite rate takes the limits.
    const auto infinite = P::less(V(largest), m);
    grad[0] = P::select(P::either(is_zero, infinite), V(1), d / m);
    return P::select(infinite, m, value);
  }
};

template <class V>
struct CountTerm {
  V value;
  V d_mu;     // the derivative by mu; d_theta and d_pi are those by theta and by pi
  V d_theta;
  V d_pi;
};

// The term of a count of 0. inverse_theta is 1 / theta.
template <class V>
FASTVAE_HD CountTerm<V> negative_binomial_zero(V mu, V theta, V inverse_theta) {
  using P = Primitives<V>;
  constexpr typename P::Scalar largest = sizeof(typename P::Scalar) == 8 ? 1e307 : 8e37;  // log1p_parts can still compute its logarithm
  const auto parts = P::log1p_parts(P::clamp(mu * inverse_theta, 0, largest));
  return {theta * parts.value, parts.inverse, parts.excess, V(0)};
}

// The term of a count of 0 with additional zeros: -log(p + (1 - p) exp(-z)), where p = 1 / (1 + exp(-pi)) and z is the value of
// `term`.
template <class V>
FASTVAE_HD CountTerm<V> with_additional_zeros(const CountTerm<V>& term, V pi) {
  using P = Primitives<V>;
  constexpr typename P::Scalar bound = sizeof(typename P::Scalar) == 8 ? 700 : 80;  // exp(+-bound) is neither infinite nor 0
  const V z = term.value, odds = P::exp_bounded(P::clamp(pi, -bound, bound));
  const auto decay = P::exp_pair(P::neg(z));
  const V q = V(1) / (odds + decay.exp), r = P::neg(decay.minus_1) * q;
  V value = P::log1p_parts(r).value, d_z = decay.exp * q, d_pi = P::neg(r) * (odds / (V(1) + odds));
  const V far = P::select(P::less(pi, V(-bound)), z, V(0));
  if (P::any(P::less(V(bound / 2), far))) {
    // Both exponentials are too small for their sum to be computed, so log(exp(pi) + exp(-z)) is computed from the larger one.
    const auto use = P::less(V(bound / 2), far);
    const V difference = z + pi, e = P::exp_bounded(P::neg_abs(difference)), share = V(1) / (V(1) + e);
    const V kept = P::select(P::less(difference, V(0)), share, e * share);
    value = P::select(use, P::minimum(P::neg(pi), z) - P::log1p(e), value);
    d_z = P::select(use, kept, d_z);
    d_pi = P::select(use, kept - V(1), d_pi);
  }
  return {value, term.d_mu * d_z, term.d_theta * d_z, d_pi};
}

// Dispersions and their logarithms are clamped when they are read. The lower bound keeps 1 / theta finite. There the nll of a count of
// zero has vanished, and `below` adds what the nll of other counts lacks. From the upper bound on, the distribution is the Poisson, and
// mu / theta still keeps its digits.
template <class C>
struct Bounds {
  static constexpr bool wide = sizeof(C) == 8;
  static constexpr C lowest_log = wide ? -650 : -85, highest_log = wide ? 600 : 60;
  static constexpr C lowest = wide ? 5.08e-283 : 1.22e-37, highest = wide ? 3.77e260 : 1.14e26;  // exp of those bounds
};

// What the clamp takes from the nll of a count above zero whose inverse dispersion is below the bound. There the nll is -log theta plus
// a part that no longer changes with theta.
FASTVAE_HD double below(double dispersion, bool is_logarithm) {
  using B = Bounds<double>;
  if (is_logarithm) return dispersion < B::lowest_log ? B::lowest_log - dispersion : 0;
  return dispersion < B::lowest ? std::log(B::lowest) - std::log(dispersion) : 0;
}

// From here on, V must be in fp64.

// Below this, Stirling's series does not have the accuracy of fp64.
constexpr double kStirlingFrom = 8;
constexpr double kHalfLogTwoPi = 0.918938533204672741780329736406;

// These two functions compute log Gamma(z) - [(z - 1/2) log z - z + log(2 pi) / 2] and log z - 1 / (2 z) - digamma(z) from 1 / z, for
// z >= kStirlingFrom (Abramowitz and Stegun 6.1.41, 6.3.18).
template <class V>
FASTVAE_HD V log_gamma_rest(V inverse) {
  constexpr double series[] = {-3617. / 122400, 1. / 156, -691. / 360360, 1. / 1188, -1. / 1680, 1. / 1260, -1. / 360, 1. / 12};
  return inverse * polynomial(inverse * inverse, series);
}
template <class V>
FASTVAE_HD V digamma_rest(V inverse) {
  constexpr double series[] = {43867. / 14364, -3617. / 8160, 1. / 12,   -691. / 32760, 1. / 132,
                               -1. / 240,      1. / 252,      -1. / 120, 1. / 12};
  const V square = inverse * inverse;
  return square * polynomial(square, series);
}

// log Gamma(z) and digamma(z) for z in (0, 2 kStirlingFrom). They are computed from those of z + 8, with the product of z, ..., z + 7
// and its logarithmic derivative.
template <class V>
struct GammaParts {
  V log_gamma, digamma;
};
template <class V>
FASTVAE_HD GammaParts<V> gamma_parts(V z) {
  using P = Primitives<V>;
  V product = z, derivative = V(1);
  for (int k = 1; k < 8; ++k) {
    const V factor = z + V(k);
    derivative = P::fma(derivative, factor, product);
    product = product * factor;
  }
  const V shifted = z + V(8), log_shifted = P::log(shifted), inverse = V(1) / shifted;
  const V log_gamma = P::fma(shifted - V(0.5), log_shifted, V(kHalfLogTwoPi) - shifted) + log_gamma_rest(inverse);
  const V digamma = log_shifted - V(0.5) * inverse - digamma_rest(inverse);
  return {log_gamma - P::log(product), digamma - derivative / product};
}

// The part that does not depend on the count: log Gamma(theta) and digamma(theta), or for theta >= kStirlingFrom the remainders of
// Stirling's formula for them.
template <class V>
FASTVAE_HD GammaParts<V> dispersion_parts(V theta) {
  using P = Primitives<V>;
  const auto small = P::less(theta, V(kStirlingFrom));
  GammaParts<V> parts{V(0), V(0)};
  if (P::any(small)) parts = gamma_parts(P::select(small, theta, V(1)));
  const V inverse = V(1) / P::select(small, V(kStirlingFrom), theta);
  return {P::select(small, parts.log_gamma, log_gamma_rest(inverse)), P::select(small, parts.digamma, digamma_rest(inverse))};
}

// The term of a whole count t from 1 to 7, for theta of at least kFewFrom; kOne says that t is 1 in all lanes. With q_i = 1 + i / theta,
// log Gamma(t + theta) - log Gamma(theta) is t log theta + log(q_1 ... q_(t-1)), and the first summand is combined with
// t log(theta + mu). d_mu is the derivative by log mu.
constexpr double kFewFrom = 1e-40;  // the product of the q_i is still finite here
template <bool kOne, class V>
FASTVAE_HD CountTerm<V> negative_binomial_few(V t, V mu, V log_mu, V theta, V log_factorial) {
  using P = Primitives<V>;
  const V inverse_theta = V(1) / theta, x = mu * inverse_theta;
  const auto parts = P::log1p_parts(x);
  V rest = P::neg(t * log_mu), share = P::neg(t * x * parts.inverse);
  if constexpr (!kOne) {
    V product = V(1), sum = V(0);  // sum / product = 1 / (theta + 1) + 2 / (theta + 2) + ...
    for (int i = 1; i < 7; ++i) {
      const auto more = P::less(V(i), t);
      if (!P::any(more)) break;
      const V ratio = V(i) * inverse_theta, q = V(1) + ratio;
      sum = P::select(more, P::fma(sum, q, ratio * product), sum);
      product = P::select(more, product * q, product);
    }
    rest = rest + (log_factorial - P::log(product));
    share = share + sum / product;
  }
  return {P::fma(theta + t, parts.value, rest), (mu - t) * parts.inverse, P::fma(share, inverse_theta, parts.excess), V(0)};
}

// The term of any count t > 0. In all lanes t must lie on the same side of kStirlingFrom (kLarge: at or above it), and so must theta
// (kNearPoisson: at or above it). log_factorial is log(t!) and is read only for small t. d_mu is the derivative by log mu.
//
// Let n = t + theta and d = mu - t. Where theta is large, Stirling's formula for log Gamma(n) - log Gamma(theta) gives
//   value = n log(1 + d / n) + log(1 + t / theta) / 2 + t - t log mu + log t! + rest(theta) - rest(n)
// and where t is large, the formula is used for log t! as well. The derivative by theta is
// log(1 + d / n) - d / (theta + mu) - t / (2 theta n) + ..., of which one function computes the first two terms.
template <bool kLarge, bool kNearPoisson, class V>
FASTVAE_HD CountTerm<V> negative_binomial_positive(V t, V mu, V log_mu, V theta, const GammaParts<V>& of_theta, V log_factorial) {
  using P = Primitives<V>;
  const V n = t + theta, d = mu - t, share = theta / (theta + mu);
  CountTerm<V> term;
  term.d_mu = d * share;
  if constexpr (kNearPoisson) {
    const V inverse_n = V(1) / n, e = d * inverse_n;
    const auto parts = log1p_parts_by_series(e, P::log1p(e), n / (theta + mu));
    const V rest = of_theta.log_gamma - log_gamma_rest(inverse_n), t_theta = t / theta;
    if constexpr (kLarge)
      term.value = P::fma(theta, parts.value, t * P::log1p(P::neg(theta) * e / mu)) +
                   (V(0.5) * P::log(t * (V(1) + t_theta)) + (V(kHalfLogTwoPi) + log_gamma_rest(V(1) / t) + rest));
    else
      term.value = P::fma(n, parts.value, t) - t * log_mu + (V(0.5) * P::log1p(t_theta) + (log_factorial + rest));
    term.d_theta = parts.excess - V(0.5) * t_theta * inverse_n + (digamma_rest(inverse_n) - of_theta.digamma);
  } else {
    const V x = mu / theta;
    const auto parts = log1p_parts_by_series(x, P::log1p(x), share);
    const V zeros = P::fma(theta, parts.value, t * P::log1p(theta / mu)) + of_theta.log_gamma;
    V digamma_n;
    if constexpr (kLarge) {
      const V inverse_n = V(1) / n, a = t + V(1), b = theta - V(1), log_n = P::log(n), ratio = P::log1p(b / a);
      // This is log Gamma(n) - log t!, where log a is computed as log n - ratio.
      const V difference = P::fma(n - V(0.5), ratio, b * (log_n - ratio - V(1)));
      term.value = zeros - (difference + (log_gamma_rest(inverse_n) - log_gamma_rest(V(1) / a)));
      digamma_n = log_n - V(0.5) * inverse_n - digamma_rest(inverse_n);
    } else {
      const auto of_n = gamma_parts(n);
      term.value = zeros + (log_factorial - of_n.log_gamma);
      digamma_n = of_n.digamma;
    }
    term.d_theta = parts.excess + t / (theta + mu) - (digamma_n - of_theta.digamma);
  }
  return term;
}

// -log Poisson(t; mu) for t >= kStirlingFrom. The logarithm of mu is given as well, because mu may have underflowed. The formula is that of
// PoissonRate.
template <class V>
FASTVAE_HD V poisson_large(V t, V mu, V log_mu) {
  using P = Primitives<V>;
  const V log_t = P::log(t), d = mu - t, e = d / t, s = e / (V(2) + e), square = s * s;
  const V near = t * (s * P::fnma(square, log1p_series(square), e)), far = P::fnma(t, log_mu - log_t, d);
  const V rest = P::fma(V(0.5), log_t, V(kHalfLogTwoPi) + log_gamma_rest(V(1) / t));
  return P::select(P::less(P::abs(e), V(0.5)), near, far) + rest;
}

// The same for any count t > 0.
template <class V>
FASTVAE_HD V poisson_positive(V t, V mu, V log_mu) {
  using P = Primitives<V>;
  const auto small = P::less(t, V(kStirlingFrom));
  const V of_large = poisson_large(P::select(small, V(kStirlingFrom), t), mu, log_mu);
  if (!P::any(small)) return of_large;
  return P::select(small, P::fnma(t, log_mu, mu) + log_small_factorial(P::select(small, t, V(0))), of_large);
}

// Adds to the term of a count above 0 what it costs that the element was not an additional zero.
template <class V>
FASTVAE_HD void without_additional_zero(CountTerm<V>& term, V pi) {
  using P = Primitives<V>;
  const V e = P::exp_bounded(P::neg_abs(pi)), share = V(1) / (V(1) + e);
  term.value = term.value + (P::relu(pi) + P::log1p(e));
  term.d_pi = P::select(P::less(pi, V(0)), e * share, share);
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
